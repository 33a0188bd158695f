"""The parameter groups of the optimizer: parts of the networks with learning rates of their own. Knows no DeepSpeed."""

from collections.abc import Collection, Iterable, Mapping

from dreamdance.errors import RecipeError

# The name of the group of all parameters that no scale names.
REST = ""


def group_names(trainable: Collection[str], frozen: Iterable[str], scales: Mapping[str, float]) -> dict[str, list[str]]:
    """Divides parameters by the networks, or parts of networks, that `optimizer.lr_scales` names.

    Args:
        trainable: names of the parameters that train, such as `unet.domain_embedder.linear_1.weight`.
        frozen: names of the others, to explain errors.
        scales: the recipe's `optimizer.lr_scales`; a name stands for all parameters below it, and the longest counts.

    Returns:
        name in `scales`, or `REST` -> its parameters in the order of `trainable`; `REST` is first, unless it is empty.

    Raises:
        RecipeError: a name stands for no parameter that trains; the text lists what is accepted.
    """
    groups: dict[str, list[str]] = {name: [] for name in (REST, *scales)}
    for parameter in trainable:
        parts = parameter.split(".")
        above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        groups[next((name for name in above if name in scales), REST)].append(parameter)
    for name in scales:
        if groups[name]:
            continue
        if any(parameter.startswith(f"{name}.") for parameter in trainable):
            reason = "longer names of optimizer.lr_scales have all of its parameters"
        elif any(f"{parameter}.".startswith(f"{name}.") for parameter in frozen):
            reason = "it does not train in this recipe"
        else:
            reason = "there is no such part"
        raise RecipeError(
            f"optimizer.lr_scales names '{name}': {reason}. Parts that train: {', '.join(_parts(trainable))}, and "
            "what lies below them"
        )
    return {name: members for name, members in groups.items() if members}


def _parts(trainable: Iterable[str]) -> list[str]:
    """The networks that train and their parts, in the order of the parameters."""
    found: dict[str, None] = {}
    for parameter in trainable:
        network, *rest = parameter.split(".")
        found[network] = None
        if len(rest) > 1:
            found[f"{network}.{rest[0]}"] = None
    return list(found)
