"""The workloads: the shapes that occur in the models, their random inputs, and their least cost.

Letters as in `dreamdance.models`. Lengths are those of a 256 x 384 picture (latent 32 x 48) and its halvings, and of
the controller of stage 2 at latent 64 x 96.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamdance_kernels import reference

# The tensors whose gradients are computed, by name.
Inputs = dict[str, Tensor]

PLACES_CHECKED = 64  # places of a temporal attention; all other functions are checked on one whole sample


@dataclass(frozen=True)
class Workload:
    """One function at one shape.

    Args:
        name: its name in the tables.
        function: `geometry`, `reference`, `temporal` or `group_norm_silu`.
        outer: b, the batch items that share nothing; images of a normalisation.
        inner: domains of geometry attention, samples that share a reference, frames of temporal attention.
        num_tokens: n of every sample, also of the reference; pixels of a normalisation.
        num_heads: heads; the groups of a normalisation.
        head_width: d; the channels of one group.
        with_compiled: measure rivals that take tens of seconds to compile; set at one batch size of each shape.
        with_concat: measure the concat-and-repeat form of Wonder3D.
    """

    name: str
    function: str
    outer: int
    inner: int
    num_tokens: int
    num_heads: int
    head_width: int
    with_compiled: bool = False
    with_concat: bool = False

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_width

    @property
    def num_queries(self) -> int:
        """Queries of one softmax."""
        return {"geometry": self.inner * self.num_tokens, "temporal": self.inner}.get(self.function, self.num_tokens)

    @property
    def num_keys(self) -> int:
        """Keys of one softmax: a reference has as many tokens as a sample."""
        return 2 * self.num_tokens if self.function == "reference" else self.num_queries

    @property
    def num_softmaxes(self) -> int:
        """Independent softmaxes: batch times heads."""
        batch = {"geometry": self.outer, "temporal": self.outer * self.num_tokens}.get(
            self.function, self.outer * self.inner
        )
        return batch * self.num_heads

    def useful_flops(self, direction: str) -> float:
        """Multiply-adds count twice; the backward of attention has five products, two of them recomputed; no padding.

        Zero for a normalisation, which is bound by bytes.
        """
        if self.function == "group_norm_silu":
            return 0.0
        attention = 4.0 * self.num_softmaxes * self.num_queries * self.num_keys * self.head_width
        projections = 0.0
        if self.function == "reference":
            num_projected = 3 * self.outer * self.inner + 2 * self.outer
            projections = 2.0 * num_projected * self.num_tokens * self.channels**2
        return attention + projections if direction == "forward" else 2.5 * attention + 2.0 * projections

    def fewest_bytes(self, direction: str, element_size: int) -> float:
        """Every input read once and every output written once."""
        rows = float(self.outer * self.inner * self.num_tokens * self.channels)
        if self.function == "group_norm_silu":
            return element_size * rows * (2 if direction == "forward" else 3)
        if self.function == "reference":
            small = float(self.outer * self.num_tokens * self.channels + 3 * self.channels**2)
            return element_size * ((2 * rows + small) if direction == "forward" else (3 * rows + 2 * small))
        return element_size * rows * (4 if direction == "forward" else 8)


def workloads() -> list[Workload]:
    """All workloads that one call measures; those with a target come first."""
    geometry = Workload("geometry d40 1536x3 B16", "geometry", 16, 3, 1536, 8, 40, with_compiled=True, with_concat=True)
    reference_ = Workload("reference d40 1536+1536 B16x3", "reference", 16, 3, 1536, 8, 40, with_compiled=True)
    temporal = Workload("temporal d40 T16 1 clip", "temporal", 1, 16, 4608, 8, 40, with_compiled=True)
    norm = Workload("group_norm_silu 320x32x48 B48", "group_norm_silu", 48, 1, 1536, 32, 10, with_compiled=True)
    middle = replace(geometry, name="geometry d80 384x3 B16", num_tokens=384, head_width=80, with_concat=False)
    deep = replace(geometry, name="geometry d160 96x3 B16", num_tokens=96, head_width=160, with_concat=False)
    controller = Workload("controller 5x64 1536x3 B16", "geometry", 16, 3, 1536, 5, 64)
    return [
        geometry,
        reference_,
        temporal,
        norm,
        replace(temporal, name="temporal d40 T24 1 clip", inner=24),
        middle,
        deep,
        replace(temporal, name="temporal d40 T16 4 clips", outer=4, with_compiled=False),
        replace(temporal, name="temporal d40 T24 4 clips", outer=4, inner=24, with_compiled=False),
        *(
            replace(shape, name=shape.name.replace("B16", f"B{batch}"), outer=batch, with_compiled=False)
            for shape in (replace(geometry, with_concat=False), middle, deep)
            for batch in (8, 32)
        ),
        replace(reference_, name="reference d40 1536+1536 B8x3", outer=8, with_compiled=False),
        controller,
        replace(controller, name="controller 5x64 6144x3 B16", num_tokens=6144),
        Workload("temporal SVD 5x64 T16 1 video", "temporal", 1, 16, 6144, 5, 64),
        replace(reference_, name="reference d80 384+384 B16x3", num_tokens=384, head_width=80, with_compiled=False),
        replace(reference_, name="reference d160 96+96 B16x3", num_tokens=96, head_width=160, with_compiled=False),
        replace(temporal, name="temporal d80 T16 1 clip", num_tokens=1152, head_width=80, with_compiled=False),
        replace(temporal, name="temporal d160 T16 1 clip", num_tokens=288, head_width=160, with_compiled=False),
        replace(norm, name="group_norm_silu 640x16x24 B48", num_tokens=384, head_width=20, with_compiled=False),
        replace(norm, name="group_norm_silu 1280x8x12 B48", num_tokens=96, head_width=40, with_compiled=False),
        replace(norm, name="group_norm_silu 960x32x48 B48", head_width=30, with_compiled=False),
        replace(temporal, name="temporal d40 T16 16 clips", outer=16, with_compiled=False),
    ]


def tiny_workloads() -> list[Workload]:
    """The same functions and the same code at sizes that a CPU, and Triton's interpreter, finish in seconds."""
    return [
        Workload("geometry d40 tiny", "geometry", 2, 2, 24, 2, 40, with_compiled=True, with_concat=True),
        Workload("reference d40 tiny", "reference", 2, 2, 24, 1, 40, with_compiled=True),
        Workload("temporal d40 T4 tiny", "temporal", 2, 4, 6, 2, 40, with_compiled=True),
        Workload("group_norm_silu tiny", "group_norm_silu", 2, 1, 24, 4, 10, with_compiled=True),
    ]


def random_inputs(workload: Workload, *, seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Normal random inputs that nothing requires a gradient of yet; the same ones for the same seed.

    Queries, keys and values are chunks of one packed projection, as in the models; the weights of projections have the
    scale of a linear layer's; pictures are channels-last.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    samples, channels = workload.outer * workload.inner, workload.channels
    if workload.function == "group_norm_silu":
        picture = draw(samples, *height_and_width(workload.num_tokens), channels).movedim(-1, 1)
        return {"picture": picture, "weight": draw(channels) + 1, "bias": draw(channels)}
    if workload.function == "reference":
        weights = {f"weight_{name}": draw(channels, channels, scale=channels**-0.5) for name in ("q", "k", "v")}
        hidden = {"hidden": draw(samples, workload.num_tokens, channels)}
        return {**hidden, "reference": draw(workload.outer, workload.num_tokens, channels), **weights}
    packed = draw(samples, workload.num_tokens, 3 * channels).chunk(3, dim=-1)
    return dict(zip(("query", "key", "value"), packed, strict=True))


def height_and_width(num_pixels: int) -> tuple[int, int]:
    """Height and width of a picture whose sides are 2 : 3."""
    height = math.isqrt(num_pixels * 2 // 3)
    if height * (num_pixels // height) != num_pixels:
        raise ValueError(f"{num_pixels} pixels make no picture of whole rows near 2 : 3; take 2*3*k**2")
    return height, num_pixels // height


def checked_part(workload: Workload, name: str, tensor: Tensor) -> Tensor | None:
    """The slice of an input, of its gradient or of the `output` on which errors are looked for, or None.

    It is the last batch item (and the last head, the last places): an index that overflows shows at the end. A weight's
    gradient sums over the whole batch and is not looked at here; the tests do.
    """
    if name.startswith(("weight", "bias")):
        return None
    if workload.function == "reference":
        return tensor[-1:] if name == "reference" else tensor[-workload.inner :]
    if workload.function == "temporal":
        return tensor[-workload.inner :, -PLACES_CHECKED:, -workload.head_width :]
    if workload.function == "geometry":
        return tensor[-workload.inner :, :, -workload.head_width :]
    return tensor[-1:]


def expected(workload: Workload, inputs: Inputs, grad_output: Tensor) -> Inputs:
    """The checked part of the output and of every gradient in float64, by name."""
    parts = {name: part for name, x in inputs.items() if (part := checked_part(workload, name, x)) is not None}
    leaves = {name: x.detach().double().requires_grad_() for name, x in (inputs | parts).items()}
    output = _compute(workload, leaves)
    grad = checked_part(workload, "output", grad_output)
    assert grad is not None
    gradients = torch.autograd.grad(output, [leaves[name] for name in parts], grad.double())
    return {"output": output.detach(), **dict(zip(parts, gradients, strict=True))}


def _compute(workload: Workload, x: Inputs) -> Tensor:
    if workload.function == "group_norm_silu":
        return F.silu(F.group_norm(x["picture"], workload.num_heads, x["weight"], x["bias"], eps=1e-5))
    if workload.function == "reference":
        query, key, value = (x["hidden"] @ x[f"weight_{name}"].T for name in ("q", "k", "v"))
        shared = [x["reference"] @ x[f"weight_{name}"].T for name in ("k", "v")]
        return reference.reference_attention(query, key, value, *shared, num_heads=workload.num_heads)
    qkv = (x["query"], x["key"], x["value"])
    if workload.function == "temporal":
        return reference.temporal_attention(*qkv, num_frames=workload.inner, num_heads=1)
    return reference.geometry_attention(*qkv, num_domains=workload.inner, num_heads=1)
