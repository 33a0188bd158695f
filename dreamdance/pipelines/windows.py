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
        after_first: whether frame 0 of the sequence, the reference, comes before them.
    """

    start: int
    stop: int
    weights: Tensor
    after_first: bool = False

    @property
    def frames(self) -> slice | list[int]:
        """The index of the window's frames."""
        return [0, *range(self.start, self.stop)] if self.after_first else slice(self.start, self.stop)

    @property
    def num_frames(self) -> int:
        return self.stop - self.start + self.after_first


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


def plan_windows(
    num_frames: int, window_frames: int, overlap: int, *, reference_first: bool = False
) -> list[SamplingWindow]:
    """Windows over a sequence, with normalised triangular weights.

    Args:
        num_frames: number of frames, without the reference.
        window_frames: length of a window, with the reference.
        overlap: number of frames that neighbouring windows share, without the reference.
        reference_first: whether the sequence begins with the reference, followed by its `num_frames` frames. Then every
            window does, as in MimicMotion; in all windows frame 0 has the same weight.

    Raises:
        ValueError: see `window_starts`.
    """
    if reference_first and not 0 <= overlap < window_frames - 1:
        raise ValueError(
            f"each window begins with the reference: window_overlap must be less than window_frames {window_frames} "
            f"- 1, not {overlap}"
        )
    before = int(reference_first)
    length = min(num_frames, window_frames - before)
    starts = window_starts(num_frames, window_frames - before, overlap)
    triangle = triangular_weights(length)
    total = torch.zeros(num_frames, dtype=torch.float64)
    for start in starts:
        total[start : start + length] += triangle
    of_reference = torch.full((before,), 1 / len(starts), dtype=torch.float64)
    windows = []
    for start in starts:
        weights = torch.cat([of_reference, triangle / total[start : start + length]]).to(torch.float32)
        windows.append(SamplingWindow(before + start, before + start + length, weights, reference_first))
    return windows


def repeat_noise(noise: Tensor, num_frames: int, *, reference_first: bool) -> Tensor:
    """Repeats the noise of one window over a sequence, so that all windows begin with the same noises.

    As in MimicMotion, frames that are a window apart have the same noise: any window contains each noise once, and
    the windows differ in its order. The reference keeps its own noise.

    Args:
        noise: `b w ...`, for a window of w frames, the reference first if the sequence begins with it.
        num_frames: number of frames of the sequence, with the reference.

    Returns:
        `b num_frames ...`.
    """
    before = int(reference_first)
    length = noise.shape[1] - before
    index = [*range(before), *(before + number % length for number in range(num_frames - before))]
    return noise[:, index]


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
