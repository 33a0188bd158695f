"""Guidance: one scale per domain for stage 1 (Eq. 6), one weight for stage 2."""

from collections.abc import Sequence

from einops import repeat
from torch import Tensor


def multi_domain_guidance(conditional: Tensor, unconditional: Tensor, scales: Sequence[float] | Tensor) -> Tensor:
    """Multi-domain classifier-free guidance, Eq. 6: `e + s_domain * (e - e_uncond)`.

    In this form scale 0 gives the conditional prediction, and equal scales s are plain guidance of weight 1 + s.

    Args:
        conditional: `((b f m) c h w)`, domains innermost (C1).
        unconditional: same shape; predicted with the reference replaced by zeros and the same pose.
        scales: `m` numbers, for rgb, normal and depth.

    Returns:
        `((b f m) c h w)` in the type of `conditional`; computed in float32 where that type is narrower.

    Raises:
        ValueError: The shapes differ, or the batch does not divide into domains.
    """
    num_domains = len(scales)
    if conditional.shape != unconditional.shape or num_domains < 1 or len(conditional) % num_domains:
        raise ValueError(
            f"guidance of {num_domains} scales needs two predictions of one shape ((b f m) c h w), m={num_domains}; "
            f"these are {tuple(conditional.shape)} and {tuple(unconditional.shape)}"
        )
    wide = _widen(conditional)
    per_domain = wide.new_tensor([float(scale) for scale in scales])
    per_sample = repeat(per_domain, "m -> (k m) 1 1 1", k=len(wide) // num_domains)
    return (wide + per_sample * (wide - unconditional.to(wide))).to(conditional.dtype)


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Plain guidance `e_uncond + w * (e - e_uncond)` with one weight for all frames; weight 1 means no guidance.

    SVD's own pipeline raises w from 1 to 3 over the frames; with overlapping windows that would give visible seams.

    Args:
        conditional: any shape.
        unconditional: the same shape.
        weight: w.

    Raises:
        ValueError: The shapes differ.
    """
    if conditional.shape != unconditional.shape:
        raise ValueError(f"guidance of predictions of {tuple(conditional.shape)} and {tuple(unconditional.shape)}")
    wide, wide_unconditional = _widen(conditional), _widen(unconditional)
    # written from the conditional side, so that weight 1 returns the conditional prediction exactly
    return (wide + (weight - 1) * (wide - wide_unconditional)).to(conditional.dtype)


def _widen(prediction: Tensor) -> Tensor:
    """Converts half precisions to float32, because guidance amplifies the difference of two close predictions."""
    return prediction.float() if prediction.itemsize < 4 else prediction
