"""Videos: frame-exact reading by time stamps, writing with and without loss, and files that are no videos."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.fault_log import record_fault

from dreamdance.media import video_container
from dreamdance.media.video import VideoError, iterate_frames, probe_video, read_frames, write_video


def numbered_frames(num_frames: int = 40, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames whose grey value is their number, and whose left half is darker than the right."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames += (40 + 4 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None]
    frames[:, :, : width // 2] -= 20
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    right = frames[:, :, frames.shape[2] // 2 + 4 :].astype(np.float64).mean(axis=(1, 2, 3))
    return [round((value - 40) / 4) for value in right]


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(), fps=8)
    return path


def write_with_stamps(path: Path, frames: np.ndarray, stamps: list[int]) -> None:
    """A video of varying rate, stamps in 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for frame, stamp in zip(frames, stamps, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def rotate_header(path: Path, quarter_turns: int) -> None:
    """Writes a rotation into the track header of an mp4, like phones."""
    content = bytearray(path.read_bytes())
    cosine, sine = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns]
    start = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    one = 1 << 16
    content[start : start + 20] = struct.pack(">5i", cosine * one, sine * one, 0, -sine * one, cosine * one)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (31, 47), (1, 1)])
def test_a_lossless_video_gives_back_exactly_its_frames(tmp_path, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (7, height, width, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mkv", frames, fps=8, lossless=True)
    np.testing.assert_array_equal(read_frames(tmp_path / "clip.mkv"), frames)


def test_an_mp4_looks_like_its_frames(video):
    info, frames = probe_video(video), read_frames(video)
    assert (info.num_frames, info.width, info.height) == (40, 48, 32)
    assert info.fps == pytest.approx(8.0)
    assert np.abs(frames.astype(int) - numbered_frames().astype(int)).mean() < 1.5


def test_odd_sizes_grow_to_even_ones_by_repeating_the_edge(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered_frames(5, 31, 47), fps=8)
    frames = read_frames(tmp_path / "clip.mp4")
    assert frames.shape == (5, 32, 48, 3)
    assert np.abs(frames[:, 31].astype(int) - frames[:, 30].astype(int)).max() <= 6


def test_any_frames_are_found_wherever_key_frames_lie(tmp_path):
    path = tmp_path / "long.mp4"
    write_video(path, numbered_frames(50), fps=25)  # x264 puts one key frame, at the start, and frames out of order
    for wanted in ([0], [49], [17, 18, 19], [3, 3, 30], list(range(0, 50, 7))):
        assert numbers_of(read_frames(path, wanted)) == wanted


def test_frames_are_decoded_one_at_a_time_in_the_order_of_the_video(video):
    info = probe_video(video)
    iterator = iterate_frames(info, [2, 5])
    assert numbers_of(next(iterator)[None]) == [2]
    with pytest.raises(ValueError, match="must not decrease"):
        next(iterate_frames(info, [5, 2]))
    assert list(iterate_frames(info, [])) == []


def test_frames_of_a_constant_rate_are_read_one_by_one(video):
    assert probe_video(video).constant_rate_frames() == list(range(40))


def test_a_varying_rate_is_evened_out_by_time_stamps(tmp_path):
    stamps = [0, 100, 200, 300, 400, 900, 1000, 1100, 1200, 1300]  # nothing was recorded for half a second
    write_with_stamps(tmp_path / "clip.mp4", numbered_frames(10), stamps)
    info = probe_video(tmp_path / "clip.mp4")
    chosen = info.constant_rate_frames()
    ticks = np.linspace(0, 1300, 10)
    assert chosen == [int(np.abs(np.array(stamps) - tick).argmin()) for tick in ticks]
    assert info.fps == pytest.approx(9 / 1.3)
    assert numbers_of(read_frames(info, chosen)) == chosen


def test_videos_of_constant_and_varying_rate_are_sampled_at_equal_times(tmp_path):
    stamps = [0, 100, 200, 300, 400, 900, 1000, 1100, 1200, 1300]
    write_with_stamps(tmp_path / "varying.mp4", numbered_frames(10), stamps)
    write_with_stamps(tmp_path / "constant.mp4", numbered_frames(14), [700 + 100 * tick for tick in range(14)])
    varying, constant = probe_video(tmp_path / "varying.mp4"), probe_video(tmp_path / "constant.mp4")
    assert varying.times(range(10)) == pytest.approx([stamp / 1000 for stamp in stamps])
    assert constant.times([0, 13]) == pytest.approx([0.0, 1.3])  # after its first frame, which lies at 0.7 s
    assert constant.frames_at(varying.times(range(10))) == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13]
    assert varying.frames_at(constant.times(range(14))) == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7, 8, 9]
    assert varying.frames_at([-1.0, 0.05, 0.051, 0.65, 0.651, 99.0]) == [0, 0, 1, 4, 5, 9]


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_rotated_videos_are_turned_upright(tmp_path, quarter_turns):
    path = tmp_path / "phone.mp4"
    write_video(path, numbered_frames(4), fps=8)
    lying = read_frames(path)
    rotate_header(path, quarter_turns)
    upright = read_frames(path)
    # The matrix (cos, sin, -sin, cos) turns the picture clockwise on screen, where y points down.
    np.testing.assert_array_equal(upright, np.rot90(lying, k=-quarter_turns, axes=(1, 2)))
    info = probe_video(path)
    assert (info.height, info.width) == upright.shape[1:3]


def test_a_truncated_video_names_the_frame_that_is_lost(tmp_path):
    path = tmp_path / "clip.mkv"
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
    write_video(path, frames, fps=8, lossless=True)
    info = probe_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"clip\.mkv.*(frame \d+ of 20 cannot be decoded|cannot be read)"):
        read_frames(info)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\0" * 4096])
def test_files_that_are_no_videos_are_named(tmp_path, content):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=r"clip\.mp4"):
        probe_video(tmp_path / "clip.mp4")


def test_a_missing_video_is_named(tmp_path):
    with pytest.raises(VideoError, match=r"nowhere\.mp4 cannot be read"):
        probe_video(tmp_path / "nowhere.mp4")


def test_sound_without_pictures_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"song\.mp4 holds no video"):
        probe_video(tmp_path / "song.mp4")


def test_a_video_appears_only_when_it_is_complete(tmp_path):
    frames = [*numbered_frames(3), np.zeros((8, 8, 3), np.uint8)]
    with pytest.raises(VideoError, match=r"frame 3 is \(8, 8, 3\) uint8; expected .*\(32, 48, 3\)"):
        write_video(tmp_path / "clip.mp4", frames, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_names_and_contents_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(VideoError, match=r"ends in \.mkv"):
        write_video(tmp_path / "clip.mp4", numbered_frames(2), fps=8, lossless=True)
    with pytest.raises(VideoError, match="no frames"):
        write_video(tmp_path / "clip.mp4", [], fps=8)
    with pytest.raises(VideoError, match="expected \\(H, W, 3\\) uint8"):
        write_video(tmp_path / "clip.mp4", numbered_frames(2).astype(np.float32), fps=8)


def png_bomb(side: int) -> bytes:
    """A real grey picture of side x side zeros in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes((side + 1) * 100)) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_packets(path: Path, packets: list[bytes]) -> None:
    """A film of the given PNGs under a header of 64x64."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "gray"
        stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64), np.uint8), format="gray"))
        for number, content in enumerate(packets):
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 8), True
            packet.pts = packet.dts = number
            container.mux(packet)


@pytest.mark.parametrize("first", [100, 9000])
def test_a_film_of_decompression_bombs_is_refused_whichever_frame_is_one(tmp_path, first):
    path = tmp_path / "bomb.mov"
    write_packets(path, [png_bomb(first), png_bomb(9000)])
    with pytest.raises(VideoError, match=r"bomb\.mov cannot be read.*up to 67108864 pixels") as raised:
        read_frames(path)
    record_fault(
        "video whose frames are decompression bombs",
        how=f"frames of {first}x{first} and 9000x9000 under a header of 64x64",
        promised="refused before the picture is unpacked",
        happened=str(raised.value),
    )


def test_a_list_of_other_files_is_no_video(tmp_path, video):
    """FFmpeg would open the files that the list names, in any place."""
    for name, text in {
        "list.mp4": f"ffconcat version 1.0\nfile {video.name}\n",
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video.name}\n#EXT-X-ENDLIST\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(VideoError, match=rf"{name} cannot be read"):
            probe_video(tmp_path / name)


def test_implausibly_many_frames_are_refused_before_they_are_listed(video, monkeypatch):
    monkeypatch.setattr(video_container, "MAX_VIDEO_FRAMES", 39)
    with pytest.raises(VideoError, match=r"clip\.mp4 has more than 39 frames; cut it into shorter videos"):
        probe_video(video)


def test_an_absurd_frame_rate_is_refused(tmp_path):
    write_with_stamps(tmp_path / "clip.mp4", numbered_frames(3), [0, 1, 2])
    assert probe_video(tmp_path / "clip.mp4").fps == pytest.approx(1000.0)
    path = tmp_path / "fast.mkv"
    write_video(path, numbered_frames(3), fps=1e-3, lossless=True)
    assert probe_video(path).fps == pytest.approx(1e-3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=20_000)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frames(1)[0], format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"fast\.mkv has .* frames per second; above 0 up to 1000"):
        probe_video(path)
