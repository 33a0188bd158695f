"""The attention functions of DreamDance behind one signature each, whatever computes them (contract C2)."""

from dreamdance_kernels.dispatch import UnavailableBackendError, available_backends
from dreamdance_kernels.functions import geometry_attention, reference_attention, temporal_attention

__all__ = [
    "UnavailableBackendError",
    "available_backends",
    "geometry_attention",
    "reference_attention",
    "temporal_attention",
]
