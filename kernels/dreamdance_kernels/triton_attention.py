"""Backend `triton`: the three attentions as calls of the one operator, computed by this package's kernels.

The inputs are views, never copies, also of a packed projection: geometry attention merges `(m n)`, reference attention
splits off the frames and domains that share a reference, temporal attention swaps frames and places.
"""

import os

import torch
from einops import rearrange
from torch import Tensor

from dreamdance_kernels import triton_package
from dreamdance_kernels.attention_operator import segmented_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_ARCHITECTURE = (8, 0)  # the first with matrix instructions in bfloat16 and asynchronous copies
UNFIT_GENERATIONS = (10, 11)  # their matrix products use a separate memory, too small for the tiles of sm_90


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on CPU, as in the tests; slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable() -> str | None:
    """The reason why the kernels cannot run on this machine; None if they can."""
    if (reason := triton_package.why_unusable()) is not None:
        return reason
    if is_interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if (found := torch.cuda.get_device_capability()) < OLDEST_ARCHITECTURE:
        return f"it needs compute capability {_dotted(OLDEST_ARCHITECTURE)} or higher, this GPU has {_dotted(found)}"
    if found[0] in UNFIT_GENERATIONS:
        return f"its tiles are cut for compute capability 8.x, 9.x and 12.x, this GPU has {_dotted(found)}"
    return triton_package.why_unable_to_start()


def geometry_attention(query: Tensor, key: Tensor, value: Tensor, *, num_domains: int, num_heads: int) -> Tensor:
    """Eq. 5 as one self-attention over the merged tokens of all domains. Tensors: `((b f m), n, heads*d)`."""
    query, key, value = (rearrange(x, "(b m) n c -> b 1 (m n) c", m=num_domains) for x in (query, key, value))
    output = segmented_attention(query, key, value, num_heads=num_heads, implementation="triton")
    return rearrange(output, "b 1 (m n) c -> (b m) n c", m=num_domains)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    reference_value: Tensor | None,
    *,
    num_heads: int,
) -> Tensor:
    """Eq. 4 with the reference as the shared segment, neither repeated nor appended."""
    if reference_key is not None and reference_key.shape[1] == 0:
        reference_key = reference_value = None
    num_references = 1 if reference_key is None else reference_key.shape[0]
    query, key, value = (rearrange(x, "(b r) n c -> b r n c", b=num_references) for x in (query, key, value))
    output = segmented_attention(
        query, key, value, reference_key, reference_value, num_heads=num_heads, implementation="triton"
    )
    return rearrange(output, "b r n c -> (b r) n c")


def temporal_attention(query: Tensor, key: Tensor, value: Tensor, *, num_frames: int, num_heads: int) -> Tensor:
    """Attention over the frames; inputs `((b f), n, heads*d)` are read in place."""
    query, key, value = (rearrange(x, "(b f) n c -> b n f c", f=num_frames) for x in (query, key, value))
    output = segmented_attention(query, key, value, num_heads=num_heads, implementation="triton")
    return rearrange(output, "b n f c -> (b f) n c")


def _dotted(architecture: tuple[int, int]) -> str:
    return ".".join(map(str, architecture))
