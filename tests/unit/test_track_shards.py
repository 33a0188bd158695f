"""Shards of schema 2: a sample reads the frames that it needs and no others, and each frame is checked on its own."""

import io
import json
import os
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.older_shards import write_older_records, write_older_shards
from support.random_shards import HEIGHT, WIDTH, flip_byte, random_clip, stored_clip, write_random_shards

from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.fixed_clips import fixed_clips
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.loading.stored_clip import ReferenceFrame, draw_window, far_references, fixed_reference, own_frame
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.frame_codecs import decode_frame, encode_frame, frame_format
from dreamdance.data.shards.range_reads import read_sample_head
from dreamdance.data.shards.tracks import ClipHead, TrackWriter, choose_size, read_head
from dreamdance.data.writing.clip_record import ClipRecord, References, spread_over
from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards
from dreamdance.errors import ShardError
from dreamdance.media.cropping import centred_crop
from dreamdance.media.transforms import pictures_to_tensor, resize_map
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.sections import Shards
from dreamdance.recipe.stored_sizes import smaller_sizes_problem

MAPS = ("rgb", "pose", "normal", "depth", "mask")
# First frame, stride and reference of the windows that commit 5194bb1 drew for epochs 0 to 7 of the clip below.
DRAWN_BEFORE = [(2, 1, 1), (1, 2, 1), (3, 1, 0), (0, 2, 1), (1, 2, 3), (0, 2, 2), (2, 1, 5), (3, 1, 4)]


def bytes_read() -> int:
    """What this process has asked the kernel for so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def write_records(folder: Path, records: list[ClipRecord], **options) -> Shards:
    write_shards(folder, [Part("part_0", lambda: iter(records))], settings={}, shard_format=ShardFormat(**options))
    return Shards(local=str(folder))


def grainy_clip(num_frames: int, width: int, height: int) -> ClipRecord:
    """A clip whose maps take about as many bytes as those of camera footage: smooth pictures with a little noise."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows / height, columns / width, (rows + columns) / (width + height)], -1) * 200
    noise = generator.integers(0, 6, (num_frames, height, width, 3), dtype=np.uint8)
    rgb = smooth.astype(np.uint8) + noise
    depth = (rows * 40).astype(np.uint16) + noise[..., 0].astype(np.uint16)
    mask = np.where(noise[..., 0] * 0 + (rows > height // 2), 255, 0).astype(np.uint8)
    pose = np.where((rows // 8 % 4 == 0)[..., None], smooth, 0).astype(np.uint8)[None].repeat(num_frames, axis=0)
    keypoints = generator.random((num_frames, 128, 3), dtype=np.float32)
    maps = {"rgb": rgb, "pose": pose, "normal": rgb[..., ::-1], "depth": depth, "mask": mask}
    return ClipRecord("grainy", 25.0, maps, keypoints)


@pytest.mark.slow
def test_a_single_frame_reads_little_and_a_window_hardly_more_than_its_own_bytes(tmp_path):
    record = grainy_clip(16, 512, 768)
    shards = write_records(tmp_path / "shards", [record], rgb_format="jpeg")
    sizes = {"width": 512, "height": 768, "maps": ("normal", "depth"), "flip_probability": 0.5}
    own = {}
    for name in ("rgb", "pose", "normal", "depth"):
        codec = "jpeg" if name == "rgb" else "png"
        own[name] = np.mean([len(encode_frame(frame, codec)) for frame in record.maps[name][:3]])
    for num_frames, most in ((1, 1.5e6), (16, 1.3 * (16 * sum(own.values()) + own["rgb"]))):
        dataset = ClipDataset(shards, **sizes, num_frames=num_frames)
        before = bytes_read()
        sample = dataset.training_sample(SampleKey(0, 0))
        assert num_frames * 100_000 < bytes_read() - before < most
        assert sample.maps["normal"].shape == (num_frames, 3, 768, 512)


def test_a_sample_opens_its_file_once_and_a_file_that_was_replaced_again(tmp_path):
    record, other = random_clip(0), random_clip(1)
    shards = write_records(tmp_path / "shards", [record])
    write_records(tmp_path / "other", [replace(other, clip_id=record.clip_id)])
    (path,) = (tmp_path / "shards").glob("*.mds")
    dataset = ClipDataset(shards, width=WIDTH, height=HEIGHT, num_frames=2, maps=MAPS[2:], flip_probability=1.0)
    opened = list[str]()
    sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
    dataset.stored_sample(SampleKey(0, 0))
    assert opened.count(str(path)) <= 2  # one of the two compares the table of samples with the index
    dataset.stored_sample(SampleKey(1, 0))
    assert opened.count(str(path)) <= 2
    np.testing.assert_array_equal(dataset.clip(0).frames("depth"), record.maps["depth"])
    for file in (tmp_path / "other").glob("*.*"):  # of the same names
        os.replace(file, tmp_path / "shards" / file.name)
    np.testing.assert_array_equal(StoredClips(shards, verify="size").clip(0).frames("depth"), other.maps["depth"])


def test_references_that_clips_share_are_encoded_once_and_stored_with_each(tmp_path):
    other = random_clip(9, num_frames=3)
    references = References([0, 40, 80], other.maps)
    clips = [replace(random_clip(n), references=references.seen_from(10 * n)) for n in range(3)]
    samples = [clip.to_sample(rgb_format="jpeg", smaller_sizes=[(4, 6)]) for clip in clips]
    for number, clip in enumerate(clips):
        alone = replace(clip, references=References([-10 * number, 40 - 10 * number, 80 - 10 * number], other.maps))
        assert samples[number] == alone.to_sample(rgb_format="jpeg", smaller_sizes=[(4, 6)])
    assert clips[0].references.encoded is clips[2].references.encoded
    assert len(references.encoded) == 2 * len(MAPS)


def test_a_start_and_the_first_opening_of_a_large_shard_read_a_few_kilobytes(tmp_path):
    shards = write_records(tmp_path / "shards", [random_clip(0, num_frames=40, width=128, height=192)])
    (path,) = (tmp_path / "shards").glob("*.mds")
    assert path.stat().st_size > 5e6
    before = bytes_read()
    clip = StoredClips(shards).clip(0)
    assert bytes_read() - before < 60_000  # of which 5 kB are the index, and 20 kB are those of /proc
    assert clip.num_frames == 40


@pytest.mark.parametrize("name", [*MAPS, "keypoints"])
def test_a_damaged_frame_is_an_error_that_names_it_and_all_others_are_read(tmp_path, name):
    record = random_clip(1)
    shards = write_records(tmp_path / "shards", [random_clip(0), record])
    (path,) = (tmp_path / "shards").glob("*.mds")
    head = read_sample_head(path, 1, where="here")
    (track,) = (track for track in head.clip.tracks if track.name == name)
    flip_byte(path, head.frames_start + track.extent(3).start + 20)
    clip = StoredClips(shards).clip(1)

    def read(indices: list[int]) -> np.ndarray:
        return clip.keypoints_of(indices) if name == "keypoints" else clip.frames(name, indices)

    expected = record.keypoints if name == "keypoints" else record.maps[name]
    np.testing.assert_array_equal(read([2, 4]), expected[[2, 4]])
    with pytest.raises(ShardError, match=rf"{path.name} \(clip 'clip_0001'\), {name}: frame 3 does not match"):
        read([3])
    for other in set(MAPS) - {name}:
        np.testing.assert_array_equal(clip.frames(other), record.maps[other])


def test_damage_anywhere_in_a_sample_is_detected(tmp_path):
    record = ClipRecord("a", 8.0, {"rgb": random_clip(0, num_frames=2, width=2, height=2).maps["rgb"]})
    shards = write_records(tmp_path / "shards", [record])
    (path,) = (tmp_path / "shards").glob("*.mds")
    sound, clips = path.read_bytes(), StoredClips(shards)
    begin, end = np.frombuffer(sound, "<u4", 2, 4).tolist()
    name_at = begin + 12 + len(record.to_sample()["clip"])
    # The name and the version are repeated for other readers of the format; this one takes them from the head.
    places = [place for place in range(begin, end - 8, 3) if place != name_at]
    for place in places:
        flip_byte(path, place)
        with pytest.raises(ShardError, match=path.name):
            clips.clip(0).frames("rgb")
        path.write_bytes(sound)
    assert len(places) > 100


@pytest.mark.parametrize("kind", ["remote", "zstd"])
def test_a_frame_damaged_in_a_local_copy_is_read_again_from_its_source(tmp_path, kind, caplog):
    source = write_random_shards(tmp_path / "source", 4, compression="none" if kind == "remote" else "zstd")
    shards = Shards(local=str(tmp_path / "copy"), remote=source.local) if kind == "remote" else source
    expected = StoredClips(shards).clip(2).frames("rgb")
    (path,) = Path(shards.local).glob("*.mds")
    head = read_sample_head(path, 2, where="here")
    state = path.stat()
    flip_byte(path, head.frames_start + 40)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    np.testing.assert_array_equal(StoredClips(shards).clip(2).frames("rgb"), expected)
    assert "makes the file again" in caplog.text


def changed_head(data: bytes, old: bytes, new: bytes) -> bytes:
    """A head with another text, whose checksum is right."""
    _, _, size, rows = struct.unpack_from("<4sIII", data)
    text = data[16 : 16 + size].replace(old, new)
    rest = struct.pack("<II", len(text), rows) + text + data[16 + size :]
    return b"DDC2" + struct.pack("<I", zlib.crc32(rest)) + rest


def test_hostile_heads_are_refused_before_memory_is_allocated():
    frames = random_clip(0, num_frames=1).maps["rgb"]
    writer = TrackWriter()
    writer.add("rgb", "clip", replace(frame_format(frames), height=1 << 25, width=1 << 25), [b"x"])
    sample = writer.sample(ClipHead("a", 1, 8.0, {}, ()))
    with pytest.raises(ShardError, match="claims frames of 33554432x33554432"):
        read_head(sample["clip"], frames_bytes=1, where="sample 0")
    with pytest.raises(ShardError, match="begins with b'PK"):
        read_head(b"PK" + bytes(40), frames_bytes=1, where="sample 0")
    for fps in ("1e999", "1" + "0" * 400, "NaN"):
        with pytest.raises(ShardError, match="sample 0"):
            read_head(
                changed_head(sample["clip"], b'"fps": 8.0', f'"fps": {fps}'.encode()), frames_bytes=1, where="sample 0"
            )
    twice = TrackWriter()
    for _ in range(2):
        twice.add("rgb", "clip", frame_format(frames), [b"x"])
    with pytest.raises(ShardError, match="two tracks of rgb of one size"):
        read_head(twice.sample(ClipHead("a", 1, 8.0, {}, ()))["clip"], frames_bytes=2, where="sample 0")
    sound = random_clip(0).to_sample()
    with pytest.raises(ShardError, match="its tracks list"):
        read_head(sound["clip"], frames_bytes=5, where="sample 0")


@pytest.mark.parametrize(("codec", "least"), [("jpeg", 42.0), ("webp", 36.0)])
def test_pictures_of_lossy_codecs_are_close_and_in_the_right_order_of_channels(codec, least):
    rows, columns = np.mgrid[:96, :64]
    picture = np.stack([rows * 2.0, columns * 3.0, 120 + 40 * np.sin(rows / 5)], -1).astype(np.uint8)
    kind = frame_format(picture[None], codec)
    decoded = decode_frame(encode_frame(picture, codec), kind, where="here")
    error = np.mean((decoded.astype(np.float64) - picture) ** 2)
    assert 10 * np.log10(255**2 / error) > least
    with Image.open(io.BytesIO(encode_frame(picture, codec))) as opened:
        shown = np.asarray(opened.convert("RGB"), dtype=np.int16)
    assert np.abs(shown - decoded).max() <= 2  # two decoders of the same file
    with pytest.raises(ShardError, match="is not the 65x96"):
        decode_frame(encode_frame(picture, codec), replace(kind, width=65), where="here")


def test_maps_stay_lossless_beside_lossy_pictures():
    record = random_clip(0, width=32, height=48)
    clip = stored_clip(record, rgb_format="jpeg")
    for name in MAPS[1:]:
        np.testing.assert_array_equal(clip.frames(name), record.maps[name])
    assert (clip.frames("rgb") != record.maps["rgb"]).any()
    with pytest.raises(ValueError, match="jpeg stores pictures"):
        frame_format(record.maps["depth"], "jpeg")


def test_a_set_of_two_sizes_gives_each_recipe_the_size_that_it_trains_at(tmp_path):
    record = grainy_clip(4, 64, 96)
    shards = write_records(tmp_path / "shards", [record], smaller_sizes=((32, 48),))
    small, large, tiny, huge = (
        ClipDataset(shards, width=width, height=width * 3 // 2, num_frames=2, maps=MAPS[2:], cache_bytes=0)
        for width in (32, 64, 16, 128)
    )
    assert [(d.clip(0).width, d.clip(0).height) for d in (small, large, tiny, huge)] == [
        (32, 48), (64, 96), (32, 48), (64, 96),
    ]  # fmt: skip
    key = SampleKey(0, 0)
    stored, resized = small.training_sample(key), large.training_sample(key)
    for name, images in resized.maps.items():
        expected = resize_map(images, 48, 32, kind=MODALITIES[name].kind)
        assert (stored.maps[name] - expected).abs().max() < (0.501 / 255 if name != "depth" else 0.51 / 65535), name
    before = bytes_read()
    small.training_sample(key)
    between = bytes_read()
    large.training_sample(key)
    assert 2 * (between - before) < bytes_read() - between
    assert StoredClips(shards).clip(0).width == 64


def test_maps_that_are_returned_smaller_are_read_at_the_stored_smaller_size(tmp_path):
    """A set without that size gives them like the others."""
    record = grainy_clip(4, 64, 96)
    both = write_records(tmp_path / "both", [record], smaller_sizes=((32, 48),))
    one = write_records(tmp_path / "one", [record])
    window = {"width": 64, "height": 96, "num_frames": 3, "maps": MAPS[2:], "cache_bytes": 0}
    smaller = {"normal": (32, 48), "depth": (32, 48)}
    for flip_probability in (0.0, 1.0):
        drawn = {**window, "flip_probability": flip_probability}
        key = SampleKey(0, 0)
        full = ClipDataset(both, **drawn).training_sample(key)
        without = ClipDataset(one, **drawn, map_sizes=smaller).training_sample(key)
        dataset = ClipDataset(both, **drawn, map_sizes=smaller)
        before = bytes_read()
        stored = dataset.training_sample(key)
        read = bytes_read() - before
        for name in MAPS:
            if name not in smaller:
                assert torch.equal(stored.maps[name], full.maps[name]), name
                continue
            assert torch.equal(without.maps[name], full.maps[name]), name
            expected = resize_map(full.maps[name], 48, 32, kind=MODALITIES[name].kind)
            assert (stored.maps[name] - expected).abs().max() < (0.501 / 255 if name != "depth" else 0.51 / 65535), name
        before = bytes_read()
        ClipDataset(both, **drawn).training_sample(key)
        assert read < 0.75 * (bytes_read() - before)


@pytest.mark.parametrize("size", [(128, 192), (64, 96), (32, 32)])
def test_a_further_size_that_is_larger_or_of_another_aspect_is_refused(size):
    with pytest.raises(ValueError, match=r"`smaller_sizes` .* is not smaller than the frames \(64x96\)"):
        grainy_clip(1, 64, 96).to_sample(smaller_sizes=[size])
    with pytest.raises(ValueError, match="`smaller_sizes` 32x48 is given twice"):
        grainy_clip(1, 64, 96).to_sample(smaller_sizes=[(32, 48), (16, 24), (32, 48)])


def test_a_further_size_is_accepted_where_a_reader_of_that_size_cuts_nothing_off():
    for width, height in ((256, 384), (256, 383), (170, 255), (171, 256), (171, 257), (255, 383), (254, 382)):
        part = centred_crop(512, 768, to_width=width, to_height=height)
        refused = smaller_sizes_problem((512, 768), [(width, height)])
        assert (refused is None) == ((part.width, part.height) == (512, 768)), (width, height)


def test_the_size_that_is_read_is_the_smallest_that_is_large_enough():
    sizes = [(512, 768), (256, 384), (384, 576)]
    assert choose_size(sizes, (256, 384)) == (256, 384)
    assert choose_size(sizes, (257, 384)) == (384, 576)
    assert choose_size(sizes, (1024, 16)) == choose_size(sizes, None) == (512, 768)


def clip_of_a_video(first: int, *, num_frames: int = 64, video_frames: int = 360, count: int = 12, step: int = 1):
    """A clip of a procedural video, frame i of which has the grey value i // 2."""
    greys = (np.arange(video_frames * step) // 2).astype(np.uint8)
    pictures = np.broadcast_to(greys[:, None, None, None], (len(greys), 2, 2, 3))
    chosen = np.array(spread_over(video_frames, count)) * step
    own = first + step * np.arange(num_frames)
    references = References((chosen - first).tolist(), {"rgb": pictures[chosen]})
    return stored_clip(ClipRecord("a", 8.0, {"rgb": pictures[own]}, references=references, frame_step=step))


@pytest.mark.parametrize("num_frames", [1, 16])
def test_references_of_long_videos_are_far_from_their_windows(num_frames):
    gaps = []
    for start in range(0, 360 - 63, 32):
        clip = clip_of_a_video(start)
        for epoch in range(40):
            window = draw_window(
                clip, (0, epoch, start), num_frames=num_frames, stride=(1, 2), flip_probability=0.0, reference_margin=30
            )
            assert window.reference.subject == "references"
            source = 2 * int(clip.reference_picture(window.reference)[0, 0, 0])  # by the picture, not by the positions
            frames = start + np.array(window.frames)
            gaps.append(np.abs(frames - source).min())
    assert min(gaps) >= 29  # the grey value names the frame to two
    assert np.mean(gaps) >= 90


def test_the_margin_counts_frames_of_the_source():
    clip = clip_of_a_video(0, num_frames=16, video_frames=60, count=12, step=2)
    far = far_references(clip, [0, 1], 30)
    assert [clip.reference_positions[reference.number] for reference in far] == [
        position for position in clip.reference_positions if position >= 32
    ]


def test_references_of_a_video_too_short_for_the_margin_are_the_farther_ones():
    clip = clip_of_a_video(0, num_frames=16, video_frames=24)
    far = far_references(clip, list(range(8)), 30)
    assert len(far) > 1
    assert min(clip.reference_positions[reference.number] for reference in far) >= 7 + 16 / 2 - 1
    whole = far_references(clip, list(range(16)), 0)
    assert len(whole) == 12


def test_validation_takes_the_farthest_reference():
    clip = clip_of_a_video(128)
    assert fixed_reference(clip) == ReferenceFrame(11, "references")
    assert fixed_reference(clip_of_a_video(290)) == ReferenceFrame(0, "references")
    assert own_frame(clip, ReferenceFrame(11, "references")) is None
    assert own_frame(clip, ReferenceFrame(7)) == 7


def test_the_reference_of_a_video_that_is_its_own_clip_is_the_latest_and_a_frame_of_the_clip():
    clip = clip_of_a_video(0, num_frames=24, video_frames=24, step=2)
    assert fixed_reference(clip) == ReferenceFrame(11, "references")
    assert own_frame(clip, fixed_reference(clip)) == 23


def test_fixed_clips_show_the_stored_reference(tmp_path):
    record = random_clip(0)
    other = random_clip(9, num_frames=2)
    record = replace(record, references=References([-40, 60], other.maps, other.keypoints))
    shards = write_records(tmp_path / "shards", [record])
    (sample,) = fixed_clips(shards, width=WIDTH, height=HEIGHT, num_frames=2, count=1)
    assert (sample.reference == pictures_to_tensor(other.maps["rgb"])[1]).all()
    clip = StoredClips(shards).clip(0)
    for name in MAPS:
        np.testing.assert_array_equal(clip.frames(name, subject="references"), other.maps[name])


@pytest.mark.parametrize(("margin", "flip"), [(0, 0.0), (30, 0.5)])
def test_without_stored_references_the_draws_are_those_of_before(tmp_path, margin, flip):
    """The windows and references that commit 5194bb1 drew for clips of 6 frames, seed 4, clip 3, epochs 0 to 7."""
    write_older_shards(tmp_path / "older", 4)
    write_random_shards(tmp_path / "now", 4)
    for name in ("older", "now"):
        clip = StoredClips(Shards(local=str(tmp_path / name))).clip(3)
        drawn = [
            draw_window(
                clip, (4, epoch, 3), num_frames=3, stride=(1, 2), flip_probability=flip, reference_margin=margin
            )
            for epoch in range(8)
        ]
        assert [(window.frames[0], window.stride, window.reference.number) for window in drawn] == DRAWN_BEFORE
        assert {window.reference.subject for window in drawn} == {"clip"}


def test_shards_of_schema_1_give_the_same_samples(tmp_path):
    older, now = write_older_shards(tmp_path / "older", 4), write_random_shards(tmp_path / "now", 4)
    settings = {"width": WIDTH // 2, "height": HEIGHT // 2, "num_frames": 2, "maps": MAPS[2:], "flip_probability": 0.5}
    one, other = ClipDataset(older, **settings), ClipDataset(now, **settings, cache_bytes=0)
    for number in range(8):
        samples = [dataset.training_sample(SampleKey(number, number % 4)) for dataset in (one, other)]
        assert (samples[0].reference == samples[1].reference).all()
        for name in MAPS:
            assert (samples[0].maps[name] == samples[1].maps[name]).all()


def test_a_folder_may_contain_shards_of_both_schemas(tmp_path):
    """An output of an older commit, one of whose shards was deleted and then written again."""
    write_older_records(tmp_path / "mixed", [random_clip(0)])
    write_records(tmp_path / "new", [random_clip(1)])
    (path,) = (tmp_path / "new").glob("*.mds")
    path.rename(tmp_path / "mixed" / path.name)
    index = json.loads((tmp_path / "mixed" / "index.json").read_text())
    index["shards"] += json.loads((tmp_path / "new" / "index.json").read_text())["shards"]
    index["dreamdance"]["num_samples"] = 2
    (tmp_path / "mixed" / "index.json").write_text(json.dumps(index))
    clips = StoredClips(Shards(local=str(tmp_path / "mixed")))
    for number in range(2):
        np.testing.assert_array_equal(clips.clip(number).frames("depth"), random_clip(number).maps["depth"])
