"""DreamDance's attentions, each with one signature for all its backends (contract C2), and a fused group norm."""

from dreamdance_kernels.attention_operator import segmented_attention
from dreamdance_kernels.checkpointing import checkpoint_keeping_attention
from dreamdance_kernels.dispatch import UnavailableBackendError, available_backends
from dreamdance_kernels.functions import geometry_attention, reference_attention, temporal_attention
from dreamdance_kernels.group_norm_operator import group_norm_silu

__all__ = [
    "UnavailableBackendError",
    "available_backends",
    "checkpoint_keeping_attention",
    "geometry_attention",
    "group_norm_silu",
    "reference_attention",
    "segmented_attention",
    "temporal_attention",
]
