"""Overlapping windows over a sequence of any length, and the blending of their predictions.

At every denoising step there is one prediction for each window. Where windows overlap, their predictions are averaged
with triangular weights: frames near the edge of a window count less. This module does not know models or pipelines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingWindow:
    """Frames `start` (inclusive) to `stop` (exclusive) of a sequence, with their weights.

    Attributes:
        start: first frame.
        stop: the frame after the last.
        weights: `f` float32, positive; the weights of a frame sum to one over all windows of a plan.
    """

    start: int
    stop: int
    weights: Tensor

    @property
    def frames(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def window_starts(num_frames: int, window_frames: int, overlap: int) -> list[int]:
    """First frames of windows that cover `num_frames`; the last window is shifted to end at the last frame.

    Args:
        num_frames: length of the sequence, at least 1.
        window_frames: length of a window; a shorter sequence is one window of its own length.
        overlap: number of frames shared by neighbouring windows (the last two may share more).

    Raises:
        ValueError: a length is not positive, or the overlap is not less than a window.
    """
    if num_frames < 1:
        raise ValueError(f"a sequence needs at least one frame, not {num_frames}")
    if window_frames < 1:
        raise ValueError(f"window_frames must be at least 1, not {window_frames}")
    if not 0 <= overlap < window_frames:
        raise ValueError(
            f"window_overlap must be at least 0 and less than window_frames {window_frames}, not {overlap}"
        )
    if num_frames <= window_frames:
        return [0]
    last = num_frames - window_frames
    return [*range(0, last, window_frames - overlap), last]


def triangular_weights(window_frames: int) -> Tensor:
    """Weights 1, 2, ..., 2, 1 over a window, `f` float64: highest in the middle, positive at the edges."""
    position = torch.arange(window_frames, dtype=torch.float64)
    return torch.minimum(position + 1, window_frames - position)


def plan_windows(num_frames: int, window_frames: int, overlap: int) -> list[SamplingWindow]:
    """Windows over a sequence, with normalised triangular weights.

    Raises:
        ValueError: see `window_starts`.
    """
    length = min(num_frames, window_frames)
    starts = window_starts(num_frames, window_frames, overlap)
    triangle = triangular_weights(length)
    total = torch.zeros(num_frames, dtype=torch.float64)
    for start in starts:
        total[start : start + length] += triangle
    return [
        SamplingWindow(start, start + length, (triangle / total[start : start + length]).to(torch.float32))
        for start in starts
    ]


def blend_windows(predict: Callable[[SamplingWindow], Tensor], windows: Sequence[SamplingWindow]) -> Tensor:
    """Runs `predict` on every window, and averages the predictions for each frame with the windows' weights.

    Args:
        predict: window -> prediction `b f ...` over the window's frames.
        windows: as `plan_windows` returns them.

    Returns:
        `b f ...` over all frames, float32. The prediction of a single window is returned unchanged.
    """
    if len(windows) == 1:
        return predict(windows[0]).float()
    blended: Tensor | None = None
    for window in windows:
        prediction = predict(window).float()
        if blended is None:
            shape = (prediction.shape[0], windows[-1].stop, *prediction.shape[2:])
            blended = prediction.new_zeros(shape)
        weights = window.weights.to(prediction.device).reshape(-1, *[1] * (prediction.ndim - 2))
        blended[:, window.frames] += weights * prediction
    assert blended is not None
    return blended
