"""Damaged videos: no wrong frame is returned if the decoder can detect it, and no sound file is refused."""

from pathlib import Path

import av
import numpy as np
import pytest
from support.known_videos import HEIGHT, WIDTH, known_frames, require_ffmpeg, run_ffmpeg, write_by_ffmpeg

from dreamdance.media.video import VideoError, iterate_frames, probe_video, read_frames, write_video

NUM_FRAMES = 30
X264 = "-c:v libx264 -bf 3 -g 10 -pix_fmt yuv420p"
X265 = "-c:v libx265 -pix_fmt yuv420p -x265-params log-level=error:keyint=10:bframes=4:hash=1"


def packets(path: Path) -> list[tuple[int, int]]:
    """Place and size of each packet in the file, in the order of the stream."""
    with av.open(str(path)) as container:
        return [(int(packet.pos or 0), packet.size) for packet in container.demux(video=0) if packet.size]


def damage_packet(path: Path, number: int, *, num_bytes: int) -> None:
    """Changes bytes in the second half of packet `number`."""
    place, size = packets(path)[number]
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(number)
    for offset in generator.integers(size // 2, size, num_bytes):
        content[place + offset] ^= int(generator.integers(1, 256))
    path.write_bytes(bytes(content))


def write_clip(folder: Path, kind: str) -> Path:
    if kind == "ffv1":
        write_video(folder / "clip.mkv", known_frames(NUM_FRAMES), fps=10, lossless=True)
        return folder / "clip.mkv"
    if kind == "own h264":
        write_video(folder / "clip.mp4", known_frames(NUM_FRAMES), fps=10)
        return folder / "clip.mp4"
    require_ffmpeg()
    options = {
        "h264": X264,
        "hevc with hashes": X265,
        "mpeg4": "-c:v mpeg4 -bf 2 -g 10",
        "avi": "-c:v mpeg4 -bf 2 -g 10",
    }
    return write_by_ffmpeg(
        folder / ("clip.avi" if kind == "avi" else "clip.mp4"), known_frames(NUM_FRAMES), options[kind]
    )


@pytest.mark.parametrize("kind", ["h264", "own h264", "hevc with hashes", "mpeg4", "avi", "ffv1"])
def test_no_damaged_frame_is_returned_alone_or_in_sequence(tmp_path, kind):
    path = write_clip(tmp_path, kind)
    truth = read_frames(path).astype(int)
    content = path.read_bytes()
    # H.264 has no check sums: of the 30 packets of our own file, damage in 3 (7, 12 and 13) decodes without an error.
    for packet in (0, 1, 14 if kind == "own h264" else 13, 22):
        path.write_bytes(content)
        damage_packet(path, packet, num_bytes=6)
        given = []
        with pytest.raises(VideoError, match=rf"{path.name}: frame \d+ of 30 cannot be decoded: the file is damaged"):
            given.extend(iterate_frames(probe_video(path)))
        assert np.abs(np.array(given, int).reshape(-1, HEIGHT, WIDTH, 3) - truth[: len(given)]).max(initial=0) <= 24
        if kind == "avi":
            continue  # refused as a whole
        video = probe_video(path)
        refused = 0
        for number in range(0, NUM_FRAMES, 3):
            try:
                alone = read_frames(video, [number])[0]
            except VideoError:
                refused += 1
            else:
                assert np.abs(alone - truth[number]).max() <= 24
        assert refused < NUM_FRAMES // 3 or kind == "own h264"  # the undamaged groups of frames are read


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", f"{X264} -movflags faststart"),
        ("clip.mp4", f"{X264} -movflags frag_keyframe+empty_moov"),
        ("clip.mkv", X264),
        ("clip.webm", "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 1M"),
        ("clip.avi", "-c:v mpeg4 -bf 2 -g 10"),
    ],
)
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_file_that_ends_early_is_refused_and_not_read_as_a_shorter_one(tmp_path, name, options, share):
    require_ffmpeg()
    path = write_by_ffmpeg(tmp_path / name, known_frames(NUM_FRAMES), options)
    assert probe_video(path).num_frames == NUM_FRAMES
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(VideoError, match=rf"{name} is not whole: it ends after \d+ frames; copy or record it again"):
        probe_video(path)


def test_matroska_without_a_length_as_written_to_a_pipe_is_read(tmp_path):
    require_ffmpeg()
    whole = write_by_ffmpeg(tmp_path / "whole.mkv", known_frames(4), X264)
    (tmp_path / "clip.mkv").write_bytes(run_ffmpeg(["-i", str(whole), "-c", "copy", "-f", "matroska", "pipe:1"]))
    assert probe_video(tmp_path / "clip.mkv").num_frames == 4
