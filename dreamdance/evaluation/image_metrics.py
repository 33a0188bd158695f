"""Distances between predicted and true frames (L1, PSNR, SSIM), over the whole frame or inside a mask; their grain.

The correct metrics have plain names. Papers on the TikTok benchmark report numbers of DisCo's code
(dreamdance/README.md, "The metric trap"): a function that repeats that code exactly has `disco` in its name, and does
not measure quality.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as functional
from einops import rearrange, reduce
from numpy.typing import NDArray

from dreamdance.media.surfaces import erode

FloatArray = NDArray[np.floating[Any]]
MaskArray = NDArray[np.bool_]

# PSNR of two identical frames, in decibel.
IDENTICAL_FRAMES_PSNR = 100.0
# A truth with less detail than this is flat: a root mean square in grey levels of 255.
MIN_DETAIL_LEVELS = 0.25
SSIM_WINDOW = 7
_SSIM_K1, _SSIM_K2 = 0.01, 0.03


def l1(prediction: FloatArray, truth: FloatArray, mask: MaskArray | None = None) -> float:
    """Mean absolute difference, in [0, 1], over all pixels (inside the mask) of all frames.

    Args:
        prediction, truth: `f H W c` in [0, 1].
        mask: `f H W`, True where pixels count. The result for an empty mask is NaN.
    """
    _check_frames(prediction, truth, mask)
    return _mean_inside(np.abs(_as_float64(prediction) - _as_float64(truth)), mask)


def psnr(prediction: FloatArray, truth: FloatArray, mask: MaskArray | None = None) -> float:
    """Peak signal-to-noise ratio in decibel, computed in float64 for each frame, then averaged over frames.

    Args:
        prediction, truth: `f H W c` in [0, 1].
        mask: `f H W`; frames with an empty mask are left out. The result is NaN if no frame remains.

    Returns:
        10 log10(1 / mean squared error); `IDENTICAL_FRAMES_PSNR` for identical frames.
    """
    # not scikit-image's: it knows no mask, and is infinite for identical frames
    _check_frames(prediction, truth, mask)
    squares = (_as_float64(prediction) - _as_float64(truth)) ** 2
    errors = [_mean_inside(squares[i], None if mask is None else mask[i]) for i in range(len(squares))]
    values = [_decibel(1.0 / error) if error > 0 else IDENTICAL_FRAMES_PSNR for error in errors if not np.isnan(error)]
    return float(np.mean(values)) if values else float("nan")


def ssim(prediction: FloatArray, truth: FloatArray, mask: MaskArray | None = None) -> float:
    """Structural similarity as scikit-image computes it (7x7 uniform window, sample covariance), mean of the channels.

    Args:
        prediction, truth: `f H W c` in [0, 1], at least 7 pixels high and wide.
        mask: `f H W`: the mean is over windows whose centre lies inside; NaN if there is none.
    """
    return ssim_inside(prediction, truth, [mask])[0]


def ssim_inside(prediction: FloatArray, truth: FloatArray, masks: Sequence[MaskArray | None]) -> list[float]:
    """`ssim` for each of several masks; the similarity is computed once, frame by frame."""
    for mask in masks:
        _check_frames(prediction, truth, mask)
    rim = SSIM_WINDOW // 2
    sums, counts = [0.0] * len(masks), [0] * len(masks)
    for number, (frame, true_frame) in enumerate(zip(prediction, truth, strict=True)):
        similarity = _ssim_map(_as_float64(frame), _as_float64(true_frame), data_range=1.0)
        for place, mask in enumerate(masks):
            inside = similarity if mask is None else similarity[mask[number, rim:-rim, rim:-rim]]
            sums[place] += float(inside.sum())
            counts[place] += inside.size
    return [total / count if count else float("nan") for total, count in zip(sums, counts, strict=True)]


def l1_disco(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """DisCo's "L1": mean absolute difference of 0..255 values divided by the frame's pixels H x W.

    It becomes smaller for larger frames: compare at equal resolution only.

    Args:
        prediction, truth: `f H W c` uint8.
    """
    _check_bytes(prediction, truth)
    height, width = truth.shape[1:3]
    return float(np.abs(_as_float64(prediction) - _as_float64(truth)).mean() / (height * width))


def psnr_disco(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """DisCo's PSNR since it was repaired ("PSNR*" in newer papers): that of bytes in float64, the mean over frames.

    Args:
        prediction, truth: `f H W c` uint8.
    """
    _check_bytes(prediction, truth)
    return psnr(_as_float64(prediction) / 255.0, _as_float64(truth) / 255.0)


def psnr_disco_overflow(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """DisCo's first "PSNR": differences and squares wrap around in uint8, so that different frames get about 30 dB.

    Args:
        prediction, truth: `f H W c` uint8.

    Returns:
        Mean over frames, without a meaning in decibel; `IDENTICAL_FRAMES_PSNR` for identical frames.
    """
    _check_bytes(prediction, truth)
    wrapped = (prediction - truth) ** 2
    errors = wrapped.mean(axis=(1, 2, 3), dtype=np.float64)
    return float(np.mean([_decibel(255.0**2 / error) if error > 0 else IDENTICAL_FRAMES_PSNR for error in errors]))


def ssim_disco(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """DisCo's SSIM: frames are converted to grey and rounded to bytes; the rest as scikit-image's defaults.

    Args:
        prediction, truth: `f H W 3` uint8 RGB, at least 7 pixels high and wide.
    """
    _check_bytes(prediction, truth)
    grey = [_as_float64(rearrange(_grey_bytes(frames), "f H W -> f H W 1")) for frames in (prediction, truth)]
    return float(np.mean([_ssim_map(*pair, data_range=255.0).mean() for pair in zip(*grey, strict=True)]))


def mean_colour(frames: FloatArray, mask: MaskArray | None = None) -> NDArray[np.float64]:
    """Mean colour `c` of frames `f H W c`, inside the mask `f H W` unless the mask is empty or None."""
    if mask is not None and mask.any():
        inside: NDArray[np.float64] = _as_float64(frames)[mask].mean(axis=0)
        return inside
    return reduce(_as_float64(frames), "f H W c -> c", "mean")


def _as_float64(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _decibel(ratio: float) -> float:
    return float(10.0 * np.log10(ratio))


def _mean_inside(values: NDArray[np.float64], mask: MaskArray | None) -> float:
    """Mean of `... H W c` over the mask `... H W` and all channels; NaN if the mask is empty."""
    if mask is None:
        return float(values.mean())
    return float(values[mask].mean()) if mask.any() else float("nan")


def _grey_bytes(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """BT.601 grey of `f H W 3` RGB in OpenCV's fixed-point arithmetic, which DisCo used."""
    weights = np.array([9798, 19235, 3735], dtype=np.int64)
    return ((np.int64(frames) @ weights + (1 << 14)) >> 15).astype(np.uint8)


def _ssim_map(prediction: NDArray[np.float64], truth: NDArray[np.float64], *, data_range: float) -> NDArray[np.float64]:
    """Similarity of each full window of a frame `H W c`: `H-6 W-6 c`.

    Not scikit-image's, which tests compare it with: it gives the same in the same time (0.10 s of CPU for a frame of
    512x768, here 0.12 s), but no job needs it, and with scipy and what else it needs it takes 200 MB.
    """
    height, width = truth.shape[:2]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, not {width}x{height}")

    def local_mean(frame: torch.Tensor) -> torch.Tensor:
        # one axis after the other: 14 additions for a pixel, not 49
        return functional.avg_pool2d(functional.avg_pool2d(frame, (SSIM_WINDOW, 1), 1), (1, SSIM_WINDOW), 1)

    x, y = (torch.from_numpy(rearrange(frame, "H W c -> c H W")) for frame in (prediction, truth))
    samples = SSIM_WINDOW**2
    unbiased = samples / (samples - 1)
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = unbiased * (local_mean(x * x) - mean_x * mean_x)
    variance_y = unbiased * (local_mean(y * y) - mean_y * mean_y)
    covariance = unbiased * (local_mean(x * y) - mean_x * mean_y)
    c1, c2 = (_SSIM_K1 * data_range) ** 2, (_SSIM_K2 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return rearrange(similarity, "c H W -> H W c").numpy()


def grain(frames: FloatArray, truth: FloatArray, mask: MaskArray | None = None) -> float:
    """Energy of the background's finest detail, relative to the truth's: more than 1 is noise, less is blur.

    The detail of a pixel is its Laplacian, the sum of the differences to its four neighbours. A pixel counts if it and
    all its eight neighbours lie inside the frame and outside of the body.

    Args:
        frames, truth: `f H W c` in [0, 1].
        mask: `f H W`, the true body; None counts whole frames.

    Returns:
        The ratio of the sums of squared Laplacians; NaN if no pixel counts, or if the truth has no detail there.
    """
    _check_frames(frames, truth, mask)
    counted = erode(np.ones(truth.shape[:3], dtype=np.bool_) if mask is None else ~mask)
    if not counted.any():
        return float("nan")
    of_frames, of_truth = (_detail(_as_float64(part), counted) for part in (frames, truth))
    return of_frames / of_truth if of_truth > (MIN_DETAIL_LEVELS / 255) ** 2 else float("nan")


def _detail(frames: NDArray[np.float64], counted: MaskArray) -> float:
    laplacians = np.stack([cv2.Laplacian(frame, cv2.CV_64F) for frame in frames])
    return float((laplacians[counted] ** 2).mean())


def _check_frames(prediction: FloatArray, truth: FloatArray, mask: MaskArray | None) -> None:
    for name, frames in (("prediction", prediction), ("truth", truth)):
        if not np.issubdtype(frames.dtype, np.floating):
            raise ValueError(f"{name} must be floats in [0, 1], not {frames.dtype}: divide bytes by 255 first")
    if prediction.shape != truth.shape or truth.ndim != 4:
        raise ValueError(f"prediction and truth must both be f H W c, not {prediction.shape} and {truth.shape}")
    if mask is not None and mask.shape != truth.shape[:3]:
        raise ValueError(f"the mask must be f H W = {truth.shape[:3]}, not {mask.shape}")


def _check_bytes(prediction: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
    if prediction.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"DisCo's metrics are defined on uint8 frames, not {prediction.dtype} and {truth.dtype}")
    if prediction.shape != truth.shape or truth.ndim != 4:
        raise ValueError(f"prediction and truth must both be f H W c, not {prediction.shape} and {truth.shape}")
