"""Videos are read and written as players show them: upright, with square pixels, in the right colours."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from support.known_videos import (
    CORNERS,
    HEIGHT,
    WIDTH,
    corners,
    counters,
    decode_by_ffmpeg,
    describe_stream,
    known_frame,
    known_frames,
    require_ffmpeg,
    run_ffmpeg,
    write_by_ffmpeg,
    write_matrix,
)

from dreamdance.media import video_display
from dreamdance.media.video import VideoError, probe_video, read_frames, write_video

X264 = "-c:v libx264 -crf 10"
TURNS = {
    # (a, b, c, d) of the display matrix, x' = a x + c y, y' = b x + d y, and what it does to an array (H, W, 3).
    "upright": ((1, 0, 0, 1), lambda picture: picture),
    "a quarter clockwise": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "upside down": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "a quarter counterclockwise": ((0, -1, 1, 0), lambda picture: np.rot90(picture, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda picture: picture[::-1]),
    "rows for columns": ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
    "rows for columns, from the far corner": ((0, -1, -1, 0), lambda picture: np.rot90(picture, 2).transpose(1, 0, 2)),
}


@pytest.fixture(autouse=True)
def ffmpeg() -> None:
    require_ffmpeg()


@pytest.mark.parametrize("turn", TURNS)
def test_every_display_matrix_is_applied_whole(tmp_path, turn):
    matrix, turned = TURNS[turn]
    path = write_by_ffmpeg(tmp_path / "phone.mp4", known_frames(2), f"{X264} -pix_fmt yuv420p")
    stored = read_frames(path)
    write_matrix(path, matrix)
    shown = read_frames(path)
    np.testing.assert_array_equal(shown, np.stack([turned(frame) for frame in stored]))
    np.testing.assert_array_equal(shown, decode_by_ffmpeg(path, width=shown.shape[2], height=shown.shape[1]))
    video = probe_video(path)
    assert (video.height, video.width) == shown.shape[1:3]


def test_a_rotation_by_other_than_quarter_turns_is_refused_with_the_command_to_run(tmp_path):
    path = write_by_ffmpeg(tmp_path / "phone.mp4", known_frames(1), f"{X264} -pix_fmt yuv420p")
    write_matrix(path, (0.5**0.5, 0.5**0.5, -(0.5**0.5), 0.5**0.5))
    with pytest.raises(VideoError, match=r"phone\.mp4 has a rotation tag of 45 degrees.*ffmpeg -i"):
        probe_video(path)


@pytest.mark.parametrize(
    ("shape", "width", "height"), [("2/1", 128, 96), ("1/2", 64, 192), ("4/3", 85, 96), ("1/1", 64, 96)]
)
def test_oblong_pixels_become_square_ones(tmp_path, shape, width, height):
    path = write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(20), f"-vf setsar={shape} {X264} -pix_fmt yuv420p")
    frames = read_frames(path)
    assert frames.shape == (20, height, width, 3)
    assert counters(frames) == list(range(20))
    reference = decode_by_ffmpeg(path, width=width, height=height, filters=f"scale={width}:{height}")
    assert np.abs(frames.astype(int) - reference).max() <= 2


def test_oblong_pixels_are_stretched_before_the_picture_is_turned(tmp_path):
    path = write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(2), f"-vf setsar=2/1 {X264} -pix_fmt yuv420p")
    lying = read_frames(path)
    write_matrix(path, (0, 1, -1, 0))
    np.testing.assert_array_equal(read_frames(path), np.rot90(lying, -1, axes=(1, 2)))


def test_pixels_so_oblong_that_frames_become_huge_are_refused(tmp_path, monkeypatch):
    path = write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(1), f"-vf setsar=100/1 {X264} -pix_fmt yuv420p")
    monkeypatch.setattr(video_display, "MAX_FRAME_PIXELS", 100_000)
    with pytest.raises(VideoError, match=r"64x96 would be shown as 6400x96; up to 100000 pixels are accepted"):
        probe_video(path)


def join(first: Path, second: Path, path: Path) -> None:
    """Joins frames of different sizes in one stream, like a recorded call whose picture grows."""
    raw = [
        run_ffmpeg(["-i", str(part), "-c", "copy", "-bsf:v", "h264_mp4toannexb", "-f", "h264", "-"])
        for part in (first, second)
    ]
    run_ffmpeg(["-f", "h264", "-r", "10", "-i", "-", "-c", "copy", str(path)], b"".join(raw))


def test_frames_of_a_changed_size_are_resized_to_the_first_and_another_aspect_is_refused(tmp_path):
    options = f"{X264} -bf 0 -pix_fmt yuv420p"
    first = write_by_ffmpeg(tmp_path / "first.mp4", known_frames(10), options)
    small = write_by_ffmpeg(tmp_path / "small.mp4", known_frames(20, 32, 48)[10:], options)
    wide = write_by_ffmpeg(tmp_path / "wide.mp4", known_frames(20, 96, 48)[10:], options)
    join(first, small, tmp_path / "shrinks.mp4")
    frames = read_frames(tmp_path / "shrinks.mp4")
    assert frames.shape == (20, HEIGHT, WIDTH, 3)
    assert counters(frames) == list(range(20))
    for name, colour in corners(frames[15]).items():
        assert colour == pytest.approx(CORNERS[name], abs=8)
    join(first, wide, tmp_path / "widens.mp4")
    with pytest.raises(VideoError, match=r"widens\.mp4: frame 10 is stored as 96x48, the first as 64x96"):
        read_frames(tmp_path / "widens.mp4")


COLOURS = {
    "untagged": "-pix_fmt yuv420p",
    "BT.601": "-pix_fmt yuv420p -colorspace smpte170m -color_range tv",
    "BT.709": "-vf scale=out_color_matrix=bt709 -pix_fmt yuv420p -colorspace bt709",
    "BT.709, full range": (
        "-vf scale=out_color_matrix=bt709:out_range=full -pix_fmt yuv420p -colorspace bt709 -color_range pc"
    ),
    "BT.601, full range": "-vf scale=out_range=full -pix_fmt yuv420p -color_range pc",
    "BT.709, 10 bits": "-vf scale=out_color_matrix=bt709 -pix_fmt yuv420p10le -colorspace bt709",
    "BT.2020's matrix": "-vf scale=out_color_matrix=bt2020 -pix_fmt yuv420p10le -colorspace bt2020nc",
    "SMPTE 240M": "-vf scale=out_color_matrix=smpte240m -pix_fmt yuv420p -colorspace smpte240m",
    "4:4:4": "-pix_fmt yuv444p",
    "4:2:2, 10 bits": "-pix_fmt yuv422p10le",
}


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_follow_the_tags_and_without_tags_the_defaults_of_ffmpeg(tmp_path, kind):
    path = write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(2), f"{COLOURS[kind]} {X264}")
    frames = read_frames(path)
    reference = decode_by_ffmpeg(path, width=WIDTH, height=HEIGHT)
    assert np.abs(frames.astype(int) - reference).max() <= 2
    for name, colour in corners(frames[0]).items():
        assert colour == pytest.approx(CORNERS[name], abs=4)


@pytest.mark.parametrize(("transfer", "kind"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_high_dynamic_range_is_refused_with_the_command_that_tone_maps_it(tmp_path, transfer, kind):
    tags = f"-colorspace bt2020nc -color_primaries bt2020 -color_trc {transfer}"
    path = write_by_ffmpeg(tmp_path / "hdr.mp4", known_frames(2), f"-pix_fmt yuv420p10le {X264} {tags}")
    with pytest.raises(
        VideoError, match=rf"hdr\.mp4 is of high dynamic range \({kind}\).*Tone-map it: ffmpeg -i IN"
    ) as error:
        probe_video(path)
    command = (
        str(error.value)
        .partition("Tone-map it: ffmpeg ")[2]
        .replace("IN", str(path))
        .replace("OUT", str(tmp_path / "cured"))
    )
    run_ffmpeg(command.split())
    assert read_frames(tmp_path / "cured.mp4").shape == (2, HEIGHT, WIDTH, 3)


def test_colours_that_ffmpegs_scaler_does_not_know_are_refused(tmp_path):
    path = write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(2), f"-pix_fmt yuv444p {X264} -colorspace ycgco")
    with pytest.raises(VideoError, match=r"clip\.mp4 stores its colours as YCgCo; RGB and YUV of BT\.601, .* accepted"):
        probe_video(path)


def test_the_cover_picture_of_a_video_is_not_read_as_the_video(tmp_path):
    video = write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(5), f"{X264} -pix_fmt yuv420p")
    cover = write_by_ffmpeg(tmp_path / "cover.png", known_frames(1, 200, 200), "-frames:v 1")
    both = tmp_path / "both.mp4"
    inputs = ["-i", str(cover), "-i", str(video)]
    run_ffmpeg([*inputs, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic", str(both)])
    np.testing.assert_array_equal(read_frames(both), read_frames(video))


@pytest.mark.parametrize("primaries", ["bt2020", "smpte432"])
def test_wider_gamuts_are_converted(tmp_path, primaries):
    """Compared with zimg, which also uses BT.709's curve as that of screens."""
    tags = f"-colorspace bt709 -color_primaries {primaries} -color_trc bt709 -color_range tv"
    muted = (known_frames(2) // 2 + 60).astype(np.uint8)  # colours that BT.709 can show
    options = f"-vf scale=out_color_matrix=bt709 -pix_fmt yuv444p {X264} {tags}"
    path = write_by_ffmpeg(tmp_path / "wide.mp4", muted, options)
    to_rgb = "zscale=min=bt709:m=gbr:r=pc,format=gbrp"
    filters = f"zscale=pin={primaries}:tin=bt709:min=bt709:rin=tv:p=bt709:t=bt709:m=gbr:r=pc,format=gbrp"
    reference = decode_by_ffmpeg(path, width=WIDTH, height=HEIGHT, filters=filters)
    stored = decode_by_ffmpeg(path, width=WIDTH, height=HEIGHT, filters=to_rgb)
    frames = read_frames(path)
    assert np.abs(stored.astype(int) - reference).max() > 20  # a missing conversion would be visible
    assert np.abs(frames.astype(int) - reference).max() <= 3


def test_interlaced_videos_are_named_once_with_the_command_to_run(tmp_path, caplog):
    options = f"{X264} -pix_fmt yuv420p -flags +ildct+ilme -x264-params tff=1"
    path = write_by_ffmpeg(tmp_path / "tv.mp4", known_frames(4), options)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read_frames(path)
    warnings = [record.getMessage() for record in caplog.records if "interlaced" in record.getMessage()]
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    run_ffmpeg(
        warnings[0]
        .partition("Deinterlace it: ffmpeg ")[2]
        .replace("IN", str(path))
        .replace("OUT", str(tmp_path / "cured"))
        .split()
    )
    caplog.clear()
    assert counters(read_frames(tmp_path / "cured.mp4")) == [0, 1, 2, 3]
    assert not caplog.records


@pytest.mark.parametrize(("width", "height"), [(64, 96), (1280, 720)])
def test_written_videos_have_tags_that_give_the_right_colours(tmp_path, width, height):
    path = tmp_path / "clip.mp4"
    write_video(path, known_frames(2, width, height), fps=10)
    stream = describe_stream(path)
    assert [stream[tag] for tag in ("color_space", "color_transfer", "color_primaries")] == ["bt709"] * 3
    assert stream["color_range"] == "tv"
    for decoded in (decode_by_ffmpeg(path, width=width, height=height), read_frames(path)):
        for name, colour in corners(decoded[0]).items():
            assert colour == pytest.approx(CORNERS[name], abs=3)
    untagged = tmp_path / "untagged.mp4"
    run_ffmpeg(["-i", str(path), "-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=2", str(untagged)])
    by_size = decode_by_ffmpeg(untagged, width=width, height=height, filters="scale=in_color_matrix=bt709")
    for name, colour in corners(by_size[0]).items():
        assert colour == pytest.approx(CORNERS[name], abs=3)


def test_written_files_have_the_mode_of_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_video(tmp_path / "clip.mp4", [known_frame(0)], fps=10)
        write_video(tmp_path / "clip.mkv", [known_frame(0)], fps=10, lossless=True)
    finally:
        os.umask(previous)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "clip.mp4": 0o640,
        "clip.mkv": 0o640,
    }


def test_a_video_that_is_interlaced_after_its_beginning_is_named(tmp_path, caplog):
    coded = b""
    for name, options in (("film", ""), ("tv", "-flags +ildct+ilme -x264-params tff=1")):
        write_by_ffmpeg(tmp_path / f"{name}.h264", known_frames(4), f"{X264} -bf 0 -pix_fmt yuv420p {options}")
        coded += (tmp_path / f"{name}.h264").read_bytes()
    (tmp_path / "both.h264").write_bytes(coded)
    path = tmp_path / "both.mp4"
    run_ffmpeg(["-f", "h264", "-i", str(tmp_path / "both.h264"), "-c", "copy", str(path)])
    assert counters(read_frames(path, [0, 1, 2])) == [0, 1, 2]
    assert "interlaced" not in caplog.text
    assert counters(read_frames(path)) == [0, 1, 2, 3] * 2
    assert f"{path} is interlaced" in caplog.text
