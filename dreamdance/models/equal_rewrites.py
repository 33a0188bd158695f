"""Rewrites that make networks compute the same function with less work. Trainers and pipelines apply them.

Constructors and loaders do not: as constructed or loaded, a network equals diffusers' own bit for bit (contracts C3 and
C4). A rewrite changes classes of modules in place. Weights, their names, order and shapes stay, so that checkpoints,
exports and optimizers do not see it. Results differ by rounding alone.
"""

from collections.abc import Callable, Collection, Mapping

from torch import nn

from dreamdance.models.gated_gelu import join_gate_gradients
from dreamdance.models.interpolated_blending import blend_in_one_pass
from dreamdance.models.one_token_attention import skip_softmax_over_one_token
from dreamdance.models.temporal_convolution import fold_temporal_convolutions
from dreamdance.models.undivided_sums import skip_division_by_one

_REWRITES: Mapping[str, Callable[[nn.Module], None]] = {
    "one_token_attention": skip_softmax_over_one_token,
    "no_division": skip_division_by_one,
    "temporal_convolutions": fold_temporal_convolutions,
    "blending": blend_in_one_pass,
    "gate_gradients": join_gate_gradients,
}
# All names; a measurement of one rewrite's gain applies the others.
EQUAL_REWRITES = frozenset(_REWRITES)


def apply_equal_rewrites(network: nn.Module, rewrites: Collection[str] = EQUAL_REWRITES) -> None:
    """Rewrites a network in place; a second call changes nothing.

    Args:
        network: a network, or a module that holds several. What no rewrite knows stays as it is.
        rewrites: names from `EQUAL_REWRITES`.

    Raises:
        ValueError: a name is unknown.
    """
    if unknown := sorted(set(rewrites) - EQUAL_REWRITES):
        raise ValueError(f"unknown rewrites {unknown}; accepted: {', '.join(_REWRITES)}")
    for name, rewrite in _REWRITES.items():
        if name in rewrites:
            rewrite(network)
