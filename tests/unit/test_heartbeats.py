"""Annotators show that they work while one call goes over a whole clip or video, and the watchdog of a job sees it."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.networks import require_blazepose
from support.onnx_graphs import require_onnx, save_david
from support.random_shards import random_clip
from support.tiny_annotators import save_depth_anything, save_marigold

from dreamdance.annotators.blazepose import BlazePose
from dreamdance.annotators.body import Body
from dreamdance.annotators.david import MULTI_TASK, David
from dreamdance.annotators.depth_anything import DepthAnything
from dreamdance.annotators.exact_poses import exact_poses
from dreamdance.annotators.heartbeats import beat, heartbeats_to
from dreamdance.annotators.marigold import Marigold
from dreamdance.annotators.protocols import PersonPoses
from dreamdance.dancers.render import DancerClip, render_clip
from dreamdance.data.curation.shots import HistogramDetector, shrink_frames
from dreamdance.data.writing import shard_parts
from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.data.writing.shard_parts import Part, ShardFormat, write_part

NUM_FRAMES = 6


@pytest.fixture(scope="module")
def clip() -> DancerClip:
    return render_clip(3, num_frames=NUM_FRAMES, width=70, height=105)


def count(work: Callable[[], object]) -> int:
    beats: list[None] = []
    with heartbeats_to(lambda: beats.append(None)):
        work()
    num_beats = len(beats)
    beat()
    assert len(beats) == num_beats, "after the block nobody listens"
    return num_beats


@pytest.mark.usefixtures("one_thread")
def test_depth_and_normals_beat_through_a_clip(clip, tmp_path):
    poses, mask = exact_poses(clip), clip.mask.astype(np.float32)
    depth = DepthAnything(save_depth_anything(tmp_path / "depth"), frames_at_once=2)
    normal = Marigold(save_marigold(tmp_path / "normal"), num_steps=1)
    assert count(lambda: depth.annotate_depth(clip.rgb, poses, mask)) >= NUM_FRAMES // 2
    assert count(lambda: normal.annotate_normal(clip.rgb, poses, mask)) >= NUM_FRAMES
    assert count(lambda: Body().annotate_depth(clip.rgb, poses, mask)) >= 1
    require_onnx()
    save_david(tmp_path / MULTI_TASK.file, ("depth", "normal", "foreground"), near_is_large=False)
    david = David(tmp_path, num_threads=1)
    assert count(lambda: david.annotate_mask(clip.rgb, poses)) >= NUM_FRAMES


def test_blazepose_beats_through_a_clip(clip):
    folder = require_blazepose()
    network = BlazePose(folder)
    assert count(lambda: network.find_people(clip.rgb)) >= NUM_FRAMES
    assert count(lambda: network.annotate_pose(clip.rgb, [None] * NUM_FRAMES)) >= NUM_FRAMES
    assert count(lambda: network.annotate_mask(clip.rgb, PersonPoses(clip.keypoints))) >= NUM_FRAMES


def test_one_long_call_is_seen_by_the_watchdog_of_a_job(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_parts, "HEARTBEAT_SECONDS", 0.0)
    small, seen, during = shrink_frames(clip.rgb), list[None](), list[int]()

    def make() -> Iterator[ClipRecord | None]:
        before = len(seen)
        HistogramDetector().cut_probabilities(small)  # yields nothing
        during.append(len(seen) - before)
        yield random_clip(0)

    (tmp_path / ".parts").mkdir()
    assert write_part(tmp_path, Part("a", make), ShardFormat(), on_heartbeat=lambda: seen.append(None)) is None
    assert during[0] >= NUM_FRAMES
