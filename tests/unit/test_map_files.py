"""Maps without loss beside the pictures of a clip: FFV1 in 16-bit grey as ffmpeg writes it, and arrays."""

import io
import logging
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from support.known_videos import require_ffmpeg, run_ffmpeg
from support.video_folders import stored_clips, videos_recipe, write_videos

from dreamdance.dancers.render import render_clip
from dreamdance.data.prepare import prepare
from dreamdance.data.shards.columns import metric_disparity
from dreamdance.media.archive_entry import ArchiveEntry
from dreamdance.media.map_arrays import iterate_map_array, open_map_array
from dreamdance.media.video import VideoError, iterate_grey16, probe_video, read_frames, write_video

WIDTH, HEIGHT, NUM_FRAMES, FPS = 64, 96, 12, 8


@pytest.fixture(scope="module")
def clip():
    return render_clip(3, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=FPS)


def grey_by_ffmpeg(path, values, pixel_format="gray16le", options=()):
    """Writes `(f, H, W)` uint16 as FFV1 with the program ffmpeg."""
    size = f"{values.shape[2]}x{values.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "gray16le", "-s", size, "-r", str(FPS), "-i", "-"]
    run_ffmpeg([*source, "-c:v", "ffv1", *options, "-pix_fmt", pixel_format, str(path)], values.astype("<u2").tobytes())
    return path


def random_values(height=HEIGHT, width=WIDTH):
    values = np.random.default_rng(0).integers(0, 1 << 16, (NUM_FRAMES, height, width), dtype=np.uint16)
    values[0, 0, :4] = [0, 1, 65534, 65535]
    return values


@pytest.mark.parametrize("options", [(), ("-level", "3", "-slicecrc", "1", "-g", "1"), ("-color_range", "tv")])
def test_16_bit_grey_of_ffmpeg_is_read_exactly(tmp_path, options):
    require_ffmpeg()
    values = random_values()
    video = probe_video(grey_by_ffmpeg(tmp_path / "a.mkv", values, options=options))
    assert (video.display.is_grey16, video.codec, video.num_frames) == (True, "ffv1", NUM_FRAMES)
    found = list(iterate_grey16(video))
    assert found[0].dtype == np.uint16
    np.testing.assert_array_equal(np.stack(found), values)
    np.testing.assert_array_equal(np.stack(list(iterate_grey16(video, [3, 3, 7]))), values[[3, 3, 7]])
    np.testing.assert_allclose(read_frames(video)[..., 1], values / 257, atol=2.0)  # as a player shows it


def test_ffmpeg_reads_our_16_bit_grey_exactly(tmp_path):
    require_ffmpeg()
    values = random_values(35, 21)
    write_video(tmp_path / "a.mkv", values, fps=FPS, lossless=True)
    content = run_ffmpeg(["-i", str(tmp_path / "a.mkv"), "-f", "rawvideo", "-pix_fmt", "gray16le", "-"])
    np.testing.assert_array_equal(np.frombuffer(content, "<u2").reshape(values.shape), values)
    np.testing.assert_array_equal(np.stack(list(iterate_grey16(probe_video(tmp_path / "a.mkv")))), values)
    with pytest.raises(VideoError, match=r"\(35, 21\) uint16; expected \(H, W, 3\) uint8"):
        write_video(tmp_path / "a.mp4", values, fps=FPS)


def test_a_video_of_8_bits_gives_no_16_bit_grey(tmp_path):
    write_video(tmp_path / "a.mkv", np.zeros((2, 8, 8, 3), np.uint8), fps=FPS, lossless=True)
    with pytest.raises(VideoError, match=r"a\.mkv is no video of 16-bit grey; write one with: -c:v ffv1"):
        iterate_grey16(probe_video(tmp_path / "a.mkv"))


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_frames_of_an_array_are_read_one_after_the_other(tmp_path, clip):
    array = open_map_array(save(tmp_path / "a.npz", depth=clip.depth, intrinsics=clip.intrinsics), "depth")
    assert (array.key, array.num_frames, array.height, array.width) == ("depth", NUM_FRAMES, HEIGHT, WIDTH)
    found = list(iterate_map_array(array, [0, 4, 4, 9]))
    np.testing.assert_array_equal(np.stack(found), clip.depth[[0, 4, 4, 9]])
    with pytest.raises(IndexError, match="12 frames; 3 to 12"):
        list(iterate_map_array(array, [3, 12]))


@pytest.mark.parametrize(
    ("modality", "arrays", "message"),
    [
        ("depth", {"arr_0": np.ones((2, 4, 4))}, r"arrays \['arr_0'\]; exactly one is accepted: 'depth' \(float16"),
        ("depth", {"depth": np.ones((2, 4, 4)), "disparity": np.ones((2, 4, 4))}, "exactly one"),
        ("depth", {"depth": np.ones((2, 4, 4), np.uint16)}, r"'depth' is uint16 of shape \(2, 4, 4\); accepted is"),
        ("depth", {"depth": np.ones((2, 4, 4, 1))}, r"shape \(2, 4, 4, 1\); accepted is \(frames, height, width\) of"),
        ("normal", {"normal": np.ones((2, 4, 4, 4))}, r"\(frames, height, width, 3\) of float16"),
        ("normal", {"normal": np.ones((2, 3, 4, 4))}, r"shape \(2, 3, 4, 4\)"),
        ("mask", {"mask": np.ones((2, 4, 4), np.int64)}, "'mask' is int64"),
        ("mask", {"mask": np.ones((0, 4, 4), bool)}, r"shape \(0, 4, 4\); accepted are up to"),
        ("mask", {"mask": np.array([None])}, "array is of type object"),
        ("rgb", {"rgb": np.ones((2, 4, 4, 3), np.uint8)}, "a map of rgb is read from a video"),
    ],
)
def test_a_wrong_array_is_refused_with_what_is_accepted(tmp_path, modality, arrays, message):
    with pytest.raises(VideoError, match=r"a\.npz.*" + message):
        open_map_array(save(tmp_path / "a.npz", **arrays), modality)


def test_wrong_values_are_named_with_their_frame(tmp_path):
    ones = np.ones((3, 4, 4), np.float32)
    for name, key, values, message in (
        ("depth", "depth", ones * [[[1]], [[0]], [[1]]], "frame 1 of 'depth' has a depth of 0"),
        (
            "depth",
            "disparity",
            ones * [[[1]], [[1]], [[np.nan]]],
            "frame 2 of 'disparity' has values that are not finite",
        ),
        ("normal", "normal", np.zeros((3, 4, 4, 3)), "frame 0 of 'normal' has a vector of length"),
        ("mask", "mask", ones.astype(np.uint8), "frame 0 of 'mask' has the values 0 and 1 as uint8; accepted are bool"),
    ):
        array = open_map_array(save(tmp_path / "a.npz", **{key: values}), name)
        with pytest.raises(VideoError, match=message):
            list(iterate_map_array(array, range(3)))


def test_damaged_and_hostile_files_are_refused(tmp_path, clip):
    path = save(tmp_path / "a.npz", mask=clip.mask)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a\.npz is damaged or no \.npz file"):
        open_map_array(path, "mask")
    path.write_bytes(b"not a zip")
    with pytest.raises(VideoError, match="damaged or no"):
        open_map_array(path, "mask")
    with pytest.raises(VideoError, match="cannot be read: No such file"):
        open_map_array(tmp_path / "absent.npz", "mask")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|b1", "fortran_order": False, "shape": (900, 8000, 8000)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mask.npy", header.getvalue() + b"\0" * 100)
    with pytest.raises(VideoError, match=r"'mask' has \d+ bytes, its shape \(900, 8000, 8000\) needs"):
        open_map_array(path, "mask")


def write_clip(folder, name, clip):
    folder.mkdir(exist_ok=True)
    write_video(folder / f"{name}.rgb.mp4", clip.rgb, fps=FPS)
    write_video(folder / f"{name}.pose.mp4", clip.rgb, fps=FPS)


def prepared(tmp_path, **changes):
    settings = {"clip_frames": 16, "split_by": "time", "validation_fraction": 0.0, "crop_letterbox": False} | changes
    prepare(videos_recipe(tmp_path / "out", tmp_path / "videos", **settings), tmp_path / "run")
    (stored,) = stored_clips(tmp_path / "out", "train")
    return stored


def test_arrays_become_the_maps_of_a_rendered_dancer(tmp_path, clip):
    write_clip(tmp_path / "videos", "a", clip)
    save(tmp_path / "videos" / "a.depth.npz", depth=clip.depth)
    save(tmp_path / "videos" / "a.normal.npz", normal=clip.normal)
    save(tmp_path / "videos" / "a.mask.npz", mask=clip.mask)
    stored = prepared(tmp_path)
    disparity = metric_disparity(stored.frames("depth") / 65535, stored.metadata["depth_range"])
    np.testing.assert_allclose(1 / disparity, clip.depth, rtol=1e-3)
    normals = stored.frames("normal") / 127.5 - 1
    assert np.abs(normals - clip.normal).max() < 0.005
    np.testing.assert_array_equal(stored.frames("mask"), clip.mask * 255)


def test_videos_of_ffmpeg_without_loss_are_stored_exactly(tmp_path, clip, caplog):
    require_ffmpeg()
    folder = tmp_path / "videos"
    write_clip(folder, "a", clip)
    values = random_values()
    normal = np.random.default_rng(1).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    grey_by_ffmpeg(folder / "a.depth.mkv", values)
    write_video(folder / "a.normal.mkv", normal, fps=FPS, lossless=True)
    masks = clip.mask[..., None].repeat(3, axis=-1) * np.uint8(255)
    write_video(folder / "a.mask.mkv", masks, fps=FPS, lossless=True)
    with caplog.at_level(logging.WARNING):
        stored = prepared(tmp_path)
    np.testing.assert_array_equal(stored.frames("depth"), values)
    np.testing.assert_array_equal(stored.frames("normal"), normal)
    np.testing.assert_array_equal(stored.frames("mask"), clip.mask * 255)
    assert "depth_range" not in stored.metadata
    assert "not exact" not in caplog.text


def test_maps_are_cropped_and_resized_like_the_pictures(tmp_path, clip):
    folder = tmp_path / "videos"
    write_clip(folder, "a", clip)
    depth = np.full((NUM_FRAMES, HEIGHT, WIDTH), 4.0)
    depth[:, 32:64, 16:48] = 2.0
    save(folder / "a.depth.npz", depth=depth)
    stored = prepared(tmp_path, crop=(16, 0, 32, 64), width=16, height=32)
    assert stored.metadata["depth_range"] == [0.25, 0.5]
    values = stored.frames("depth")
    assert values.shape == (NUM_FRAMES, 32, 16)
    assert (values[:, :16] == 0).all()
    assert (values[:, 16:] == 65535).all()


def test_one_warning_says_that_mp4_is_not_exact(tmp_path, caplog):
    for name in ("a", "b"):
        write_videos(tmp_path / "videos", name, with_maps=True)
    prepare(videos_recipe(tmp_path / "out", tmp_path / "videos"), tmp_path / "run")
    warned = [record.getMessage() for record in caplog.records if "not exact" in record.getMessage()]
    assert len(warned) == 1
    assert "4 maps of depth or normals are not exact, such as " in warned[0]
    assert "a.depth.mp4 (h264 compresses with loss)" in warned[0]


def test_the_same_map_twice_and_arrays_of_another_length_are_refused(tmp_path, clip):
    folder = tmp_path / "videos"
    write_clip(folder, "a", clip)
    save(folder / "a.mask.npz", mask=clip.mask[1:])
    with pytest.raises(VideoError, match=r"a\.mask\.npz has 11 frames of 64x96, a\.rgb\.mp4 12 of 64x96; an array has"):
        prepared(tmp_path)
    write_video(folder / "a.mask.mkv", clip.rgb, fps=FPS, lossless=True)
    with pytest.raises(VideoError, match=r"has a\.mask\.mkv and a\.mask\.npz: the same map twice"):
        prepared(tmp_path)


def test_a_replaced_array_is_noticed(tmp_path, clip):
    folder = tmp_path / "videos"
    write_clip(folder, "a", clip)
    save(folder / "a.mask.npz", mask=clip.mask)
    prepared(tmp_path)
    save(folder / "a.mask.npz", mask=~clip.mask)
    with pytest.raises(Exception, match=r"a\.mask\.npz"):
        prepared(tmp_path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_frames_in_any_order_of_reads_are_those_of_numpy(tmp_path, write):
    """Noise does not compress, and a constant compresses to nothing: both lie between kept places."""
    values = np.random.default_rng(0).random((40, 64, 512), dtype=np.float32)
    values[10:25] = 3.0
    write(tmp_path / "a.npz", disparity=values)
    with np.load(tmp_path / "a.npz") as content:
        truth = content["disparity"]
    array = open_map_array(tmp_path / "a.npz", "depth")
    for frames in ([39], [0, 1], [20, 20, 33], [5], list(range(40)), [38], [12, 13], [0]):
        np.testing.assert_array_equal(np.stack(list(iterate_map_array(array, frames))), truth[frames])


def test_a_frame_near_the_end_is_read_without_inflating_the_file_again(tmp_path, monkeypatch):
    """Counted in bytes that the decompressor gives."""
    values = np.random.default_rng(0).random((200, 64, 256), dtype=np.float32)
    np.savez_compressed(tmp_path / "a.npz", disparity=values)
    array = open_map_array(tmp_path / "a.npz", "depth")
    list(iterate_map_array(array, range(200)))
    given, inflate = [], ArchiveEntry._inflate

    def count(entry, file, decoder, size):
        given.append(len(part := inflate(entry, file, decoder, size)))
        return part

    monkeypatch.setattr(ArchiveEntry, "_inflate", count)
    for frame in (190, 30, 111):
        given.clear()
        np.testing.assert_array_equal(next(iter(iterate_map_array(array, [frame]))), values[frame])
        assert sum(given) <= 3 << 20, "of 12.5 MiB: up to 1 MiB between kept places, 1 MiB of a block, and the frame"


def test_an_archive_that_was_cut_after_it_was_opened_is_an_error(tmp_path):
    values = np.random.default_rng(0).random((40, 64, 512), dtype=np.float32)
    np.savez_compressed(tmp_path / "a.npz", disparity=values)
    array = open_map_array(tmp_path / "a.npz", "depth")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300_000])
    with pytest.raises(VideoError, match=r"a\.npz changed while it was read: frame 39 is missing"):
        list(iterate_map_array(array, [39]))
    (tmp_path / "a.npz").write_bytes(b"")
    fresh = replace(array, entry=replace(array.entry, _kept=[], _last=None))
    with pytest.raises(VideoError, match=r"a\.npz is damaged or no \.npz file: an entry has no header"):
        list(iterate_map_array(fresh, [0]))
