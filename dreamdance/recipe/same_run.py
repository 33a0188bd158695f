"""The recipe keys that may change within a run (C7); the launcher, checkpoints and `evaluate` use this list."""

from typing import Any

from dreamdance.recipe.schema import Recipe

# Key or section -> why another value continues the same run. (The launcher refuses a `max_steps` that was lowered.)
CHANGEABLE_KEYS = {
    "cluster": "where a run is computed, and by how many processes, does not change its result (C8)",
    "logging": "reports do not change the result",
    "max_steps": "a run may be continued beyond its last step",
    "checkpoint.allow_changed": "it only lists permitted changes",
    "checkpoint.copy_in_memory": "how a state is written does not change it",
    "data.mixed_backgrounds": "it only permits or refuses a training set; it does not change what is read",
    "sharding.gradient_checkpointing": "activations that are computed again are the same bits",
    "data.verify": "how data is checked does not change what sound data contains",
    "compression": "how shard files are compressed does not change the clips; an output that was begun keeps its own",
    "videos.list": "added and removed videos are refused where the output is compared with its videos",
    "videos.on_error": "a damaged video that is skipped is written when it has been repaired",
}


def is_changeable(key: str) -> bool:
    """Whether a dotted key may change within a run."""
    return any(key == changeable or key.startswith(f"{changeable}.") for changeable in CHANGEABLE_KEYS)


def result_json(recipe: Recipe) -> str:
    """Everything in a recipe that changes the result, as JSON: two recipes with the same text are of the same run."""
    excluded: dict[str, Any] = {}
    for key in CHANGEABLE_KEYS:
        section, _, name = key.partition(".")
        if name:
            excluded.setdefault(section, set()).add(name)
        else:
            excluded[section] = True
    return recipe.model_dump_json(exclude=excluded)
