"""Windows cover every frame, their weights sum to one, and blending changes nothing that needs no blending."""

import itertools

import pytest
import torch
from einops import repeat

from dreamdance.pipelines.windows import blend_windows, plan_windows, triangular_weights, window_starts

SHAPES = [
    (1, 16, 4),
    (5, 16, 4),
    (16, 16, 4),
    (17, 16, 4),
    (28, 16, 4),
    (29, 16, 4),
    (100, 16, 4),
    (7, 3, 2),
    (6, 2, 0),
]


@pytest.mark.parametrize(("num_frames", "window_frames", "overlap"), SHAPES)
def test_the_weights_of_every_frame_are_positive_and_sum_to_one(num_frames, window_frames, overlap):
    total = torch.zeros(num_frames)
    for window in plan_windows(num_frames, window_frames, overlap):
        assert (window.weights > 0).all()
        total[window.frames] += window.weights
    torch.testing.assert_close(total, torch.ones(num_frames), rtol=0, atol=2e-7)


@pytest.mark.parametrize(("num_frames", "window_frames", "overlap"), SHAPES)
def test_windows_keep_their_overlap_and_the_last_ends_at_the_end(num_frames, window_frames, overlap):
    windows = plan_windows(num_frames, window_frames, overlap)
    assert windows[0].start == 0
    assert windows[-1].stop == num_frames
    assert all(window.num_frames == min(num_frames, window_frames) for window in windows)
    shared = [left.stop - right.start for left, right in itertools.pairwise(windows)]
    assert all(frames == overlap for frames in shared[:-1])
    assert all(frames >= overlap for frames in shared[-1:])


def test_a_sequence_that_fits_is_one_window():
    assert window_starts(16, 16, 4) == [0]
    assert window_starts(3, 16, 4) == [0]
    assert window_starts(17, 16, 4) == [0, 1]
    assert window_starts(40, 16, 4) == [0, 12, 24]


@pytest.mark.parametrize(("num_frames", "window_frames", "overlap"), SHAPES)
def test_a_model_that_predicts_each_frame_alone_gives_the_same_windowed_as_whole(num_frames, window_frames, overlap):
    sequence = torch.randn(2, num_frames, 3, 4, generator=torch.Generator().manual_seed(0))

    def per_frame(frames: torch.Tensor) -> torch.Tensor:
        return frames.sin() * frames

    windows = plan_windows(num_frames, window_frames, overlap)
    blended = blend_windows(lambda window: per_frame(sequence[:, window.frames]), windows)
    torch.testing.assert_close(blended, per_frame(sequence), rtol=2e-7, atol=1e-7)


def test_one_window_is_passed_through_bit_for_bit():
    sequence = torch.randn(1, 5, 3)
    blended = blend_windows(lambda window: sequence[:, window.frames], plan_windows(5, 16, 4))
    assert torch.equal(blended, sequence)


def test_the_shared_frames_pass_from_one_window_to_the_next_in_even_steps():
    """Two windows which disagree by one: over the overlap the blend climbs from 0 to 1 without a jump."""
    windows = plan_windows(28, 16, 4)
    blended = blend_windows(
        lambda window: repeat(torch.tensor(float(window.start > 0)), "-> 1 f", f=window.num_frames), windows
    )
    jumps = blended[0].diff()
    assert torch.all(jumps >= 0)
    torch.testing.assert_close(blended[0, 12:16], torch.tensor([0.2, 0.4, 0.6, 0.8]), rtol=1e-6, atol=0)
    without_overlap = blend_windows(
        lambda window: repeat(torch.tensor(float(window.start > 0)), "-> 1 f", f=window.num_frames),
        plan_windows(32, 16, 0),
    )
    assert without_overlap[0].diff().max() == 1
    assert jumps.max() <= 0.2 + 1e-6


def test_half_precision_predictions_are_summed_in_float32():
    ones = torch.ones(1, 40, 2, dtype=torch.bfloat16)
    blended = blend_windows(lambda window: ones[:, window.frames], plan_windows(40, 16, 12))
    assert blended.dtype == torch.float32
    torch.testing.assert_close(blended, torch.ones(1, 40, 2), rtol=0, atol=3e-7)


def test_the_triangle_is_symmetric_for_odd_and_even_lengths():
    assert triangular_weights(4).tolist() == [1, 2, 2, 1]
    assert triangular_weights(5).tolist() == [1, 2, 3, 2, 1]
    assert triangular_weights(1).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 16, 4), "at least one frame"),
        ((8, 0, 0), "window_frames"),
        ((8, 4, 4), "window_overlap"),
        ((8, 4, -1), "-1"),
    ],
)
def test_windows_that_cannot_advance_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        plan_windows(*arguments)
