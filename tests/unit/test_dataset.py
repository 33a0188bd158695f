"""Stored clips and training windows: clips are read as written, and windows depend on the key of the sample alone."""

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.older_shards import older_sample, write_older_shards
from support.random_shards import HEIGHT, WIDTH, random_clip, stored_clip, write_random_shards

from dreamdance.data.loading.batch import collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.fixed_clips import fixed_clips
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder, SampleKey
from dreamdance.data.loading.stored_clip import ReferenceFrame, StoredClip, draw_window
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.columns import ColumnClip
from dreamdance.data.shards.mds import StreamingDataset
from dreamdance.errors import ShardError
from dreamdance.media.keypoints import flip_keypoints
from dreamdance.media.pose_drawing import draw_poses
from dreamdance.media.transforms import decode_normals
from dreamdance.runtime.ranks import Ranks

NUM_FRAMES = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_random_shards(tmp_path_factory.mktemp("clips") / "shards", compression="zstd")


def dataset(shards, **changes) -> ClipDataset:
    settings = {"width": WIDTH, "height": HEIGHT, "num_frames": NUM_FRAMES, "maps": ("normal", "depth", "mask")}
    return ClipDataset(shards, **{**settings, **changes})


def stored(num_frames: int = 6, **options) -> StoredClip:
    return stored_clip(random_clip(3, num_frames=num_frames, **options))


def frame_numbers(pictures: torch.Tensor) -> list[int]:
    """`random_clip` writes a frame's number into its top left corner."""
    return (pictures[..., 0, 0, 0] * 255).round().int().tolist()


def test_stored_clips_are_read_as_they_were_written(shards):
    clips = StoredClips(shards)
    assert isinstance(clips, StreamingDataset)
    assert len(clips) == 12
    for number in (0, 5, 11):
        clip, written = clips.clip(number), random_clip(number)
        assert (clip.clip_id, clip.num_frames, clip.fps, clip.metadata) == (written.clip_id, 6, 8.0, {"seed": number})
        for name in ("rgb", "pose", "normal", "depth", "mask"):
            np.testing.assert_array_equal(clip.frames(name), written.maps[name])
        np.testing.assert_array_equal(clip.keypoints, written.keypoints)


def test_iterating_gives_every_stored_sample_once(shards):
    assert [sample["clip_id"] for sample in StoredClips(shards)] == [f"clip_{number:04d}" for number in range(12)]


def test_a_sample_holds_the_frames_of_its_window(shards):
    clips = dataset(shards)
    sample = clips.training_sample(SampleKey(epoch=2, sample_id=7))
    written = random_clip(7)
    numbers = frame_numbers(sample.maps["rgb"])
    assert numbers == list(range(numbers[0], numbers[0] + NUM_FRAMES))
    for name in ("rgb", "pose", "normal"):
        expected = torch.from_numpy(written.maps[name][numbers]).movedim(-1, 1) / 255.0
        torch.testing.assert_close(sample.maps[name], expected, rtol=0, atol=1e-6)
    expected_depth = torch.from_numpy(written.maps["depth"][numbers].astype(np.float32) / 65535.0)
    for channel in range(3):
        torch.testing.assert_close(sample.maps["depth"][:, channel], expected_depth, rtol=0, atol=1e-6)
    assert torch.equal(
        sample.maps["mask"][:, 0], torch.from_numpy((written.maps["mask"][numbers] > 0).astype(np.float32))
    )
    (reference,) = frame_numbers(sample.reference[None])
    torch.testing.assert_close(
        sample.reference, torch.from_numpy(written.maps["rgb"][reference]).movedim(-1, 0) / 255.0
    )
    assert (sample.key, sample.clip_id, sample.fps) == ((0, 2, 7), "clip_0007", 8.0)


def test_a_sample_depends_on_its_key_alone(shards):
    first, second = dataset(shards, seed=4, flip_probability=0.5), dataset(shards, seed=4, flip_probability=0.5)
    keys = [SampleKey(epoch, sample) for epoch in range(3) for sample in (1, 8)]
    forwards = [first.training_sample(key) for key in keys]
    backwards = [second.training_sample(key) for key in reversed(keys)][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one.maps["rgb"], other.maps["rgb"])
        assert torch.equal(one.maps["pose"], other.maps["pose"])
        assert torch.equal(one.reference, other.reference)


def test_decoded_clips_of_schema_1_in_memory_change_nothing(tmp_path):
    shards = write_older_shards(tmp_path / "older")
    cached, read_anew = dataset(shards, flip_probability=0.5), dataset(shards, flip_probability=0.5, cache_bytes=0)
    for epoch in range(3):
        for sample in range(12):
            one, other = (clips.training_sample(SampleKey(epoch, sample)) for clips in (cached, read_anew))
            for name in ("rgb", "pose", "normal", "depth", "mask"):
                assert torch.equal(one.maps[name], other.maps[name]), name
            assert torch.equal(one.reference, other.reference)
    assert cached.clip(3) is cached.clip(3)
    assert read_anew.clip(3) is not read_anew.clip(3)


def test_of_schema_2_nothing_is_decoded_but_what_a_sample_uses(shards):
    clips = dataset(shards)
    assert clips.clip(3) is not clips.clip(3)


def test_memory_for_decoded_clips_is_bounded(tmp_path):
    shards = write_older_shards(tmp_path / "older")
    one_clip = dataset(shards).clip(0).decoded_bytes
    clips = dataset(shards, cache_bytes=2 * one_clip)
    kept = [clips.clip(number) is clips.clip(number) for number in range(12)]
    assert kept == [True, True, *[False] * 10]


def test_windows_and_references_cover_the_whole_clip():
    windows = [
        draw_window(stored(), (0, epoch, 3), num_frames=3, stride=(1, 2), flip_probability=0.5) for epoch in range(200)
    ]
    assert {tuple(window.frames) for window in windows} == {
        (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 2, 4), (1, 3, 5),
    }  # fmt: skip
    assert {window.reference for window in windows} == {ReferenceFrame(number) for number in range(6)}
    assert 60 < sum(window.flip for window in windows) < 140


def test_a_stride_that_does_not_fit_shrinks():
    windows = [
        draw_window(stored(5), (0, epoch, 3), num_frames=3, stride=(4, 4), flip_probability=0.0) for epoch in range(9)
    ]
    assert {(tuple(window.frames), window.stride) for window in windows} == {((0, 2, 4), 2)}


def test_the_rate_is_that_of_the_window(shards):
    batch = collate_clips([dataset(shards, stride=(2, 2)).training_sample(SampleKey(0, number)) for number in range(3)])
    assert batch.fps.tolist() == [4.0] * 3


def test_a_clip_shorter_than_the_window_is_an_error_that_names_it(shards):
    with pytest.raises(ShardError, match=r"clip_0002.*6 frames, fewer than the window of 7.*num_frames"):
        dataset(shards, num_frames=7).training_sample(SampleKey(0, 2))


def test_a_mirrored_sample_mirrors_pictures_and_normals_and_redraws_the_pose(shards):
    plain = dataset(shards, flip_probability=0.0).training_sample(SampleKey(0, 4))
    mirrored = dataset(shards, flip_probability=1.0).training_sample(SampleKey(0, 4))
    for name in ("rgb", "depth", "mask"):
        assert torch.equal(mirrored.maps[name], plain.maps[name].flip(-1)), name
    assert torch.equal(mirrored.reference, plain.reference.flip(-1))
    flipped_normals = decode_normals(plain.maps["normal"]).flip(-1)
    flipped_normals[:, 0] *= -1
    torch.testing.assert_close(decode_normals(mirrored.maps["normal"]), flipped_normals, rtol=0, atol=1e-5)
    keypoints = flip_keypoints(random_clip(4).keypoints[frame_numbers(plain.maps["rgb"])])
    drawn = draw_poses(keypoints, width=WIDTH, height=HEIGHT)
    torch.testing.assert_close(mirrored.maps["pose"], torch.from_numpy(drawn).movedim(-1, 1) / 255.0, rtol=0, atol=1e-6)


def test_clips_without_key_points_are_never_mirrored():
    clip = stored(with_keypoints=False)
    windows = [
        draw_window(clip, (0, epoch, 3), num_frames=3, stride=(1, 1), flip_probability=1.0) for epoch in range(20)
    ]
    assert not any(window.flip for window in windows)


def test_frames_have_the_requested_size_and_normals_unit_length(shards):
    sample = dataset(shards, width=WIDTH // 2, height=HEIGHT // 2).training_sample(SampleKey(0, 1))
    assert sample.maps["rgb"].shape == (NUM_FRAMES, 3, HEIGHT // 2, WIDTH // 2)
    assert sample.maps["mask"].unique().tolist() == [0.0, 1.0]
    lengths = (sample.maps["normal"] * 2 - 1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-5)


def test_clips_of_another_aspect_are_cropped_to_the_centre(shards):
    square = dataset(shards, width=WIDTH, height=WIDTH).training_sample(SampleKey(0, 1))
    whole = dataset(shards).training_sample(SampleKey(0, 1))
    margin = (HEIGHT - WIDTH) // 2
    assert torch.equal(square.maps["rgb"], whole.maps["rgb"][..., margin:-margin, :])


def test_maps_that_are_not_requested_are_not_read(shards):
    sample = dataset(shards, maps=()).training_sample(SampleKey(0, 1))
    assert list(sample.maps) == ["rgb", "pose"]


def test_a_map_that_a_clip_lacks_is_an_error_that_names_both(tmp_path):
    whole = random_clip(0)
    record = replace(whole, maps={name: frames for name, frames in whole.maps.items() if name != "normal"})
    clip = stored_clip(record, where="sample 0 of shard x")
    with pytest.raises(ShardError, match=r"sample 0 of shard x \(clip 'clip_0000'\) has no normal"):
        clip.frames("normal", [0])


def test_columns_that_contradict_one_another_are_refused():
    sample = older_sample(random_clip(0))
    with pytest.raises(ShardError, match=r"rgb has 6 frames of 8x12, but the clip has 5 of 8x12"):
        ColumnClip({**sample, "num_frames": 5}, where="sample 0")
    with pytest.raises(ShardError, match="no rgb frames"):
        ColumnClip({**sample, "rgb": b""}, where="sample 0")
    with pytest.raises(ShardError, match="metadata is not JSON"):
        ColumnClip({**sample, "metadata": "{"}, where="sample 0")
    with pytest.raises(ShardError, match="schema version 99"):
        ColumnClip({**sample, "schema_version": 99}, where="sample 0")


def test_fixed_clips_are_the_first_ones_with_their_last_frame_as_reference(shards):
    batch = collate_clips(fixed_clips(shards, width=WIDTH, height=HEIGHT, num_frames=4, count=5))
    assert batch.maps["rgb"].shape == (5, 4, 3, HEIGHT, WIDTH)
    assert batch.clip_ids == [f"clip_{number:04d}" for number in range(5)]
    assert [frame_numbers(clip) for clip in batch.maps["rgb"]] == [[0, 1, 2, 3]] * 5
    assert frame_numbers(batch.reference) == [5] * 5
    assert batch.keys.tolist() == [[0, 0, number] for number in range(5)]
    assert list(batch.maps) == ["rgb", "pose", "normal", "depth", "mask"]


def test_fixed_clips_of_a_small_set_are_all_of_it(shards):
    assert len(fixed_clips(shards, width=WIDTH, height=HEIGHT, num_frames=1, count=99)) == 12


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_shares_of_all_ranks_are_the_fixed_clips_each_of_them_once(shards, world_size):
    settings = {"width": WIDTH, "height": HEIGHT, "num_frames": 2, "count": 5}
    whole = fixed_clips(shards, **settings)
    shares = [fixed_clips(shards, **settings, share_of=Ranks(rank, world_size)) for rank in range(world_size)]
    assert max(map(len, shares)) == -(-5 // world_size)
    found = sorted((sample for share in shares for sample in share), key=lambda sample: sample.key)
    assert [sample.key for sample in found] == [sample.key for sample in whole]
    assert all(
        torch.equal(mine.maps["rgb"], all_of_it.maps["rgb"]) for mine, all_of_it in zip(found, whole, strict=True)
    )


def test_a_batch_that_moves_to_a_device_keeps_its_names_and_keys(shards):
    batch = collate_clips(fixed_clips(shards, width=WIDTH, height=HEIGHT, num_frames=2, count=5))
    moved = batch.to("cpu")
    assert moved.clip_ids == batch.clip_ids
    assert torch.equal(moved.keys, batch.keys)
    assert torch.equal(moved.maps["rgb"], batch.maps["rgb"])


def test_a_dataset_travels_to_a_worker(shards):
    clips = dataset(shards)
    travelled = pickle.loads(pickle.dumps(clips))
    key = SampleKey(1, 9)
    assert torch.equal(travelled.training_sample(key).maps["rgb"], clips.training_sample(key).maps["rgb"])


def test_one_process_can_open_training_and_validation_sets_and_one_node_several_ranks(shards, tmp_path):
    other = write_random_shards(tmp_path / "validation", 4)
    before = set(os.listdir("/dev/shm"))
    train = [dataset(shards, ranks=Ranks(rank, 2, rank)) for rank in range(2)]
    validation = [dataset(other, ranks=Ranks(rank, 2, rank)) for rank in range(2)]
    assert [len(clips) for clips in (*train, *validation)] == [12, 12, 4, 4]
    assert validation[1].training_sample(SampleKey(0, 0)).clip_id == "clip_0000"
    assert set(os.listdir("/dev/shm")) <= before  # nothing is shared, so nothing can be left


HOLD = """
import sys
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.recipe.sections import Shards
clips = StoredClips(Shards(local=sys.argv[1], remote=sys.argv[2]))
clips.clip(0)
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_process_that_held_a_dataset_does_not_block_the_next_start(shards, tmp_path):
    local = tmp_path / "cache"
    arguments = [sys.executable, "-c", HOLD, str(local), shards.local]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "holding\n"
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
    from_remote = shards.model_copy(update={"local": str(local), "remote": shards.local})
    assert StoredClips(from_remote).clip(11).clip_id == "clip_0011"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_resumes_in_the_middle_of_an_epoch(shards, num_workers):
    def loader() -> ClipLoader:
        clips = dataset(shards, flip_probability=0.5)
        order = ClipOrder(clips.index.samples_per_shard, batch_size=4, seed=1)
        return ClipLoader(clips, order, micro_batch_size=2, ranks=Ranks(), num_workers=num_workers)

    whole = loader()
    steps = list(islice(whole, 7))
    assert whole.step == 7
    resumed = loader()
    resumed.load_state_dict(whole.order.state_dict(4))
    for expected, step in zip(steps[4:], islice(resumed, 3), strict=True):
        for one, other in zip(expected, step, strict=True):
            assert one.clip_ids == other.clip_ids
            assert torch.equal(one.maps["rgb"], other.maps["rgb"])
            assert torch.equal(one.reference, other.reference)
    assert [len(micro_batches) for micro_batches in steps] == [2] * 7


def test_local_folders_that_cannot_be_read_are_named(tmp_path: Path):
    missing = write_random_shards(tmp_path / "shards").model_copy(update={"local": str(tmp_path / "nowhere")})
    with pytest.raises(ShardError, match=r"no shards in .*nowhere"):
        dataset(missing)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_delivers_pictures_as_stored_and_a_device_gets_exact_floats(tmp_path, num_workers):
    shards = write_random_shards(tmp_path / "set")
    clips = dataset(shards, maps=("normal", "depth"), num_frames=6)
    loader = ClipLoader(
        clips,
        ClipOrder(clips.index.samples_per_shard, batch_size=2, seed=1),
        micro_batch_size=2,
        ranks=Ranks(),
        num_workers=num_workers,
    )
    batches = iter(loader)
    ((batch,),) = islice(batches, 1)
    batches.close()
    types = {name: images.dtype for name, images in batch.maps.items()}
    assert types == {"rgb": torch.uint8, "pose": torch.uint8, "normal": torch.uint8, "depth": torch.uint16}
    assert batch.maps["depth"].shape == (2, 6, 1, HEIGHT, WIDTH)
    floats = batch.to("cpu")
    for row, (_, _, number) in enumerate(batch.keys.tolist()):
        for name, written in random_clip(number).maps.items():
            if name == "mask":
                continue
            largest = np.float32(np.iinfo(written.dtype).max)
            expected = np.moveaxis(written.reshape(6, HEIGHT, WIDTH, -1), -1, 1).astype(np.float32) / largest
            assert np.array_equal(floats.maps[name][row].numpy(), np.broadcast_to(expected, (6, 3, HEIGHT, WIDTH)))


def test_a_batch_with_mirrored_and_other_clips_is_exact_too(shards):
    clips = dataset(shards, flip_probability=0.5)
    keys = [SampleKey(0, number) for number in range(12)]
    stored_samples = [clips.stored_sample(key) for key in keys]
    assert {sample.maps["normal"].dtype for sample in stored_samples} == {torch.uint8, torch.float32}
    batch = collate_clips(stored_samples).to("cpu")
    single = [collate_clips([sample]).to("cpu") for sample in stored_samples]
    for name, images in batch.maps.items():
        assert images.dtype == torch.float32
        assert torch.equal(images, torch.cat([each.maps[name] for each in single]))
