"""Overlapping windows over a sequence of any length, and the blending of their predictions.

At every denoising step each window predicts on its own; where windows overlap the predictions are averaged with
triangular weights, so that no frame is decided by a window's rim. Knows nothing of models or pipelines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingWindow:
    """Frames `start` (inclusive) to `stop` (exclusive), and how much each of them counts.

    Attributes:
        weights: `f` float32, positive; over all windows of a plan the weights of a frame sum to one.
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
    """First frames of windows which cover `num_frames`; the last one is shifted to end exactly at the end.

    Args:
        num_frames: length of the sequence, at least 1.
        window_frames: frames of a window; a shorter sequence is one window of its own length.
        overlap: frames shared by neighbouring windows (the last two may share more).

    Raises:
        ValueError: a length is not positive, or the windows would not advance.
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
    """Weights 1, 2, ..., 2, 1 over a window, `f` float64: highest in the middle, positive at the rims."""
    position = torch.arange(window_frames, dtype=torch.float64)
    return torch.minimum(position + 1, window_frames - position)


def plan_windows(num_frames: int, window_frames: int, overlap: int) -> list[SamplingWindow]:
    """Windows over a sequence with their normalised triangular weights.

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
    """Runs `predict` on every window and averages the predictions of each frame by the windows' weights.

    Args:
        predict: window -> prediction `b f ...` over the window's frames.
        windows: as `plan_windows` returns them.

    Returns:
        `b f ...` over all frames, float32. A single window's prediction comes back unchanged.
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
