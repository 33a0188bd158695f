"""The gradients that the backward of an attention returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """The gradient of each input, in its shape and dtype; `None` without a shared segment, or if nobody needs its."""

    query: Tensor
    key: Tensor
    value: Tensor
    shared_key: Tensor | None = None
    shared_value: Tensor | None = None
