"""Driving videos: which frames are taken, and BlazePose's key points of a real search, kept and found again."""

import numpy as np
import pytest
from support.exact_annotator import EXACT, NAME
from support.networks import require_blazepose

from dreamdance.annotators.driving_video import choose_frames
from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.errors import UserError
from dreamdance.inference.driving_videos import KeypointFinder
from dreamdance.media.keypoints import BODY
from dreamdance.media.video import probe_video, write_video
from dreamdance.recipe.annotator_section import DrivingAnnotators
from dreamdance.runs.file_states import read_state

WIDTH, HEIGHT, NUM_FRAMES = 256, 384, 4


@pytest.fixture
def dancer(tmp_path):
    clip = render_clip(HELD_OUT_SEEDS[200], num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=10.0)
    write_video(tmp_path / "dance.mp4", clip.rgb, fps=10.0)
    return clip


@pytest.mark.parametrize(("fps", "frames"), [(None, [0, 1, 2, 3]), (5.0, [0, 2]), (10.0, [0, 1, 2, 3]), (4.0, [0, 2])])
def test_frames_are_taken_at_the_wanted_rate(dancer, tmp_path, fps, frames):
    assert choose_frames(probe_video(tmp_path / "dance.mp4"), fps) == frames


def test_a_video_that_is_replaced_while_it_is_searched_leaves_nothing_behind(dancer, tmp_path):
    EXACT.learn(dancer.rgb, dancer.keypoints)
    video = tmp_path / "dance.mp4"
    state, info = read_state(video), probe_video(video)
    write_video(tmp_path / "other.mp4", dancer.rgb[::-1], fps=10.0)
    (tmp_path / "other.mp4").replace(video)
    finder = KeypointFinder(DrivingAnnotators(pose=NAME), tmp_path)
    with pytest.raises(UserError, match=r"dance.mp4: the file was replaced"):
        finder.of_video(info, state, person=None, fps=None)
    assert not (tmp_path / ".keypoints").exists()


def test_blazepose_finds_a_dancer_and_keeps_the_key_points(dancer, tmp_path):
    folder = require_blazepose()
    video = probe_video(tmp_path / "dance.mp4")
    state = read_state(video.path)
    beats = []
    finder = KeypointFinder(DrivingAnnotators(weights=str(folder)), tmp_path, lambda: beats.append(1))
    found = finder.of_video(video, state, person=None, fps=None)
    size = (WIDTH, HEIGHT)
    truth = dancer.keypoints
    seen = (truth[:, BODY, 2] > 0.5) & (found.keypoints[:, BODY, 2] > 0.3)
    assert seen.mean() > 0.6
    errors = np.linalg.norm((found.keypoints[:, BODY, :2] - truth[:, BODY, :2]) * size, axis=-1)
    hips = truth[:, [8, 11], :2].mean(axis=1)
    torso = np.linalg.norm((truth[:, 1, :2] - hips) * size, axis=-1).mean()
    assert np.median(errors[seen]) < 0.08 * torso
    assert beats
    again = KeypointFinder(DrivingAnnotators(weights=str(folder)), tmp_path)
    again.annotator.find_people = None  # the kept ones are taken: a search would fail
    np.testing.assert_array_equal(again.of_video(video, state, person=None, fps=None).keypoints, found.keypoints)
