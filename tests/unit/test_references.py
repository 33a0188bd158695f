"""The references that `prepare` stores with each clip show the whole video, at the times that their positions name."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.known_videos import counters, known_frames
from support.video_folders import stored_clips, videos_recipe

from dreamdance.dancers.render import render_clip
from dreamdance.data.prepare import prepare
from dreamdance.data.writing.clip_record import spread_over
from dreamdance.data.writing.dancer_clips import render_record
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.video import write_video
from dreamdance.recipe.schema import DancersSource

NUM_FRAMES = 200


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A video whose frames show their numbers, with the same pictures as its pose, in reverse order as its normals."""
    folder = tmp_path_factory.mktemp("videos")
    frames = known_frames(NUM_FRAMES)
    for name, pictures in (("rgb", frames), ("pose", frames), ("normal", frames[::-1])):
        write_video(folder / f"a.{name}.mp4", pictures, fps=25.0)
    return folder


@pytest.mark.parametrize(("stride", "num_clips"), [(1, 7), (2, 3)])
def test_references_are_spread_over_the_whole_video(videos, tmp_path, stride, num_clips):
    changes = {"frame_stride": stride, "clip_frames": 32, "min_clip_frames": 8, "validation_fraction": 0.0}
    prepare(videos_recipe(tmp_path / "data", videos, crop_letterbox=False, **changes), tmp_path / "run")
    clips = stored_clips(tmp_path / "data", "train")
    assert len(clips) == num_clips
    for number, clip in enumerate(clips):
        first = 32 * stride * number
        assert counters(clip.frames("rgb")[:2]) == [first, first + stride]
        shown = counters(clip.frames("rgb", subject="references"))
        assert shown == [first + position for position in clip.reference_positions]
        assert counters(clip.frames("pose", subject="references")) == shown
        assert (np.diff(shown) > 14).all()
        assert (shown[0] < 15, shown[-1] > 185, len(shown)) == (True, True, 12)
        assert clip.frame_step == stride


def test_no_reference_of_training_shows_the_part_for_validation(videos, tmp_path):
    changes = {"split_by": "time", "validation_fraction": 0.25, "clip_frames": 32, "references": 5}
    prepare(videos_recipe(tmp_path / "data", videos, crop_letterbox=False, **changes), tmp_path / "run")
    for split, frames in (("train", range(150)), ("validation", range(150, 200))):
        for clip in stored_clips(tmp_path / "data", split):
            shown = counters(clip.frames("rgb", subject="references"))
            assert set(shown) < set(frames)
            own = counters(clip.frames("rgb", [0]))[0]
            assert [position + own for position in clip.reference_positions] == shown
    manifest = (tmp_path / "data" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line).get("reference_frame") for line in manifest] == [None, None]


def test_without_references_the_example_is_the_last_frame(videos, tmp_path):
    changes = {"split_by": "time", "validation_fraction": 0.25, "clip_frames": 32, "references": 0}
    prepare(videos_recipe(tmp_path / "data", videos, crop_letterbox=False, **changes), tmp_path / "run")
    manifest = (tmp_path / "data" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["reference_frame"] for line in manifest] == [31, 17]
    assert all(not clip.reference_positions for clip in stored_clips(tmp_path / "data", "train"))


def test_references_of_a_dancer_are_its_frames_at_other_times():
    """Frames at 0, 1, ..., 5 seconds are those of one rendering of six frames; both have the same camera."""
    size = {"width": 16, "height": 24}
    whole = render_clip(7, num_frames=6, fps=1.0, **size)
    clip = render_clip(7, num_frames=2, fps=1.0, further_times=[2.0, 3.0, 4.0, 5.0], **size)
    for name in ("rgb", "normal", "depth", "mask", "keypoints", "joints"):
        np.testing.assert_array_equal(getattr(clip, name), getattr(whole, name))
    source = DancersSource(num_train_clips=1, num_validation_clips=1, num_frames=3, fps=12.0, references=4, **size)
    record = render_record(7, source)
    assert record.references.positions == [45, 135, 225, 315]
    assert {name: len(frames) for name, frames in record.references.maps.items()} == dict.fromkeys(record.maps, 4)
    drawn = draw_poses(record.references.keypoints, **size)
    np.testing.assert_array_equal(record.references.maps["pose"], drawn)
    assert all(len(frames) == 3 for frames in record.maps.values())


def test_a_short_video_gives_each_frame_once():
    assert spread_over(3, 12) == [0, 1, 2]
    assert spread_over(360, 12) == list(range(15, 360, 30))
    assert spread_over(10, 0) == []
