"""Frame k of a video is the same alone and in sequence, and equals the one that ffmpeg decodes, in all containers."""

from pathlib import Path

import numpy as np
import pytest
from support.known_videos import (
    HEIGHT,
    WIDTH,
    counters,
    decode_by_ffmpeg,
    known_frames,
    require_ffmpeg,
    run_ffmpeg,
    write_by_ffmpeg,
)

from dreamdance.media.video import VideoError, iterate_frames, probe_video, read_frames

NUM_FRAMES = 30
X264 = "-c:v libx264 -bf 3 -g 10 -pix_fmt yuv420p"
X265 = "-c:v libx265 -pix_fmt yuv420p -x265-params log-level=error:keyint=10:min-keyint=10:scenecut=0:bframes=4"
KINDS = {
    "h264 with B frames": ("clip.mp4", X264),
    "h264, open groups": ("clip.mp4", f"{X264} -x264-params open-gop=1:scenecut=0"),
    "h264, open groups, matroska": ("clip.mkv", f"{X264} -x264-params open-gop=1:scenecut=0"),
    "h264 without key frames": ("clip.mp4", "-c:v libx264 -pix_fmt yuv420p -x264-params intra-refresh=1:keyint=10"),
    "h264, fragmented": ("clip.mp4", f"{X264} -movflags frag_keyframe+empty_moov"),
    "h264 in avi": ("clip.avi", X264),
    "hevc, open groups": ("clip.mp4", f"{X265}:open-gop=1 -tag:v hvc1"),
    "hevc, open groups, matroska": ("clip.mkv", f"{X265}:open-gop=1"),
    "mpeg4 with B frames": ("clip.mp4", "-c:v mpeg4 -bf 2 -g 10 -q:v 3"),
    "mpeg4 with B frames in avi": ("clip.avi", "-c:v mpeg4 -bf 2 -g 10 -q:v 3"),
    "mpeg4 of xvid in avi": ("clip.avi", "-c:v libxvid -bf 2 -g 10 -q:v 3"),
    "mpeg2 with B frames": ("clip.mkv", "-c:v mpeg2video -bf 2 -g 10 -q:v 3 -r 25"),
    "vp9": ("clip.webm", "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 10 -b:v 1M"),
    "motion jpeg in avi": ("clip.avi", "-c:v mjpeg -q:v 2"),
    "interlaced": ("clip.mp4", f"{X264} -flags +ildct+ilme -x264-params tff=1"),
    "varying rate": ("clip.mp4", f"-vf select='not(mod(n,3))+not(mod(n,5))' -fps_mode vfr {X264}"),
    "varying rate in avi": (
        "clip.avi",
        "-vf select='not(mod(n,3))+not(mod(n,5))' -fps_mode vfr -c:v mpeg4 -bf 2 -g 10",
    ),
}


@pytest.fixture(autouse=True)
def ffmpeg() -> None:
    require_ffmpeg()


def assert_frames_are_right(path: Path) -> np.ndarray:
    video = probe_video(path)
    frames = read_frames(video)
    reference = decode_by_ffmpeg(path, width=WIDTH, height=HEIGHT)
    assert frames.shape == reference.shape
    assert np.abs(frames.astype(int) - reference).max() <= 2
    for number in range(video.num_frames):
        np.testing.assert_array_equal(read_frames(video, [number])[0], frames[number])
    some = sorted(np.random.default_rng(0).integers(0, video.num_frames, 12).tolist())
    np.testing.assert_array_equal(read_frames(video, some), frames[some])
    return frames


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_read_alone_equals_the_one_read_in_sequence_and_that_of_ffmpeg(tmp_path, kind):
    name, options = KINDS[kind]
    path = write_by_ffmpeg(tmp_path / name, known_frames(NUM_FRAMES), options)
    numbers = counters(assert_frames_are_right(path))
    if "varying" in kind:
        assert numbers == [number for number in range(NUM_FRAMES) if number % 3 == 0 or number % 5 == 0]
    elif "mpeg2" not in kind and "xvid" not in kind:  # these repeat or leave out frames as they write
        assert numbers == list(range(NUM_FRAMES))


@pytest.mark.parametrize(
    ("kind", "name", "seek_first"),
    [
        ("h264, open groups", "cut.mp4", False),
        ("h264, open groups", "cut.mp4", True),
        ("h264 without key frames", "cut.mp4", True),
        ("hevc, open groups", "cut.mp4", False),
        ("hevc, open groups", "cut.mp4", True),
        ("hevc, open groups, matroska", "cut.mkv", False),
        ("hevc, open groups, matroska", "cut.mkv", True),
    ],
)
def test_a_video_cut_out_of_another_is_read_from_its_first_whole_frame(tmp_path, kind, name, seek_first):
    """The frames before it depend on frames that were cut away: players skip them, and they are no damage."""
    full = write_by_ffmpeg(tmp_path / f"full{Path(name).suffix}", known_frames(NUM_FRAMES), KINDS[kind][1])
    seek, source = ["-ss", "1.25"], ["-i", str(full)]
    run_ffmpeg([*(seek + source if seek_first else source + seek), "-c", "copy", str(tmp_path / name)])
    numbers = counters(assert_frames_are_right(tmp_path / name))
    assert numbers == list(range(numbers[0], NUM_FRAMES))
    assert numbers[0] > 0


def test_pieces_of_a_long_video_do_not_decode_it_from_its_beginning(tmp_path):
    """If every read began at the start, preparing a video would take the square of its length."""
    path = write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(NUM_FRAMES), X264)
    content = bytearray(path.read_bytes())
    video = probe_video(path)
    start = content.index(b"mdat") + 4
    content[start + 800 : start + 1000] = bytes(200)  # in the first group of frames
    path.write_bytes(bytes(content))
    assert counters(read_frames(video, [25, 29])) == [25, 29]
    with pytest.raises(VideoError, match=r"frame \d of 30 cannot be decoded"):
        read_frames(video, [5])


def test_numbers_outside_of_the_video_are_refused(tmp_path):
    video = probe_video(write_by_ffmpeg(tmp_path / "clip.mp4", known_frames(4), X264))
    for wanted in ([4], [-1, 2]):
        with pytest.raises(IndexError, match=r"clip\.mp4 has 4 frames"):
            next(iterate_frames(video, wanted))


def test_a_transport_stream_is_refused_with_the_accepted_formats(tmp_path):
    path = write_by_ffmpeg(tmp_path / "clip.ts", known_frames(4), X264)
    with pytest.raises(VideoError, match=r"clip\.ts cannot be read: .*mp4, mov, mkv, webm and avi"):
        probe_video(path)
