"""What the backward of an attention returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """The gradient of each input, of its shape and dtype; `None` for a shared segment that was not given."""

    query: Tensor
    key: Tensor
    value: Tensor
    shared_key: Tensor | None = None
    shared_value: Tensor | None = None
