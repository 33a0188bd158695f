"""Backend `flash`: the package flash-attn, if it is installed; NVIDIA GPUs and half precision only.

flash-attn takes one tensor of keys, as torch's attention does, so this backend uses the views of the backend `sdpa`.
"""

import importlib.util
from functools import partial

import torch
from torch import Tensor

from dreamdance_kernels import sdpa

DTYPES = (torch.float16, torch.bfloat16)


def why_unavailable() -> str | None:
    """The reason why flash-attn cannot run on this machine; None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    return None if torch.cuda.is_available() and torch.version.hip is None else "it needs an NVIDIA GPU"


def attend_with_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of `batch heads n d` by `flash_attn_func`, whose layout is `batch n heads d`."""
    from flash_attn import flash_attn_func  # here, because importing it loads CUDA libraries

    output: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
    return output.transpose(1, 2)


geometry_attention = partial(sdpa.geometry_attention, attend=attend_with_flash)
reference_attention = partial(sdpa.reference_attention, attend=attend_with_flash)
temporal_attention = partial(sdpa.temporal_attention, attend=attend_with_flash)
