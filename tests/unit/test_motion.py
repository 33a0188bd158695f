"""Motion is measured in frame heights per second, whatever the codec, the frame rate and the B frames are."""

import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.known_videos import require_ffmpeg, write_matrix

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.curation.motion import MotionTrack, measure_motion
from dreamdance.media.video import VideoInfo, probe_video, write_video

WIDTH, HEIGHT, FPS, NUM_FRAMES = 256, 192, 20.0, 40


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(HEIGHT, 700, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


def panned(texture: np.ndarray, step: int) -> list[np.ndarray]:
    return [texture[:, step * number : step * number + WIDTH] for number in range(NUM_FRAMES)]


def measured(video: VideoInfo) -> MotionTrack:
    """The motion of a video, whose heartbeats are at least one for each frame."""
    measuring, heartbeats = measure_motion(video), 0
    while True:
        try:
            next(measuring)
            heartbeats += 1
        except StopIteration as end:
            assert heartbeats >= video.num_frames - 1
            track: MotionTrack = end.value
            return track


def encode(source: Path, target: Path, *options: str) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", source, "-threads", "1", *options, target], check=True)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_panned_texture_has_the_speed_of_the_pan(tmp_path, texture, step):
    """H.264 with B frames, as the ffmpeg program makes it."""
    require_ffmpeg()
    write_video(tmp_path / "a.mkv", panned(texture, step), fps=FPS, lossless=True)
    encode(tmp_path / "a.mkv", tmp_path / "a.mp4", "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p")
    track = measured(probe_video(tmp_path / "a.mp4"))
    assert track.source == "codec"
    assert track.mean(0, NUM_FRAMES) == pytest.approx(step / HEIGHT * FPS, rel=0.02, abs=1e-6)
    assert np.isnan(track.speeds[0])


@pytest.mark.parametrize(
    ("name", "options", "source"),
    [
        ("mpeg4.mp4", ["-c:v", "mpeg4", "-q:v", "3"], "codec"),
        ("mpeg4.avi", ["-c:v", "mpeg4", "-q:v", "3", "-bf", "2"], "codec"),
        ("mpeg2.mkv", ["-c:v", "mpeg2video", "-q:v", "3"], "codec"),
        ("hevc.mp4", ["-c:v", "libx265", "-x265-params", "log-level=none"], "flow"),
        ("vp9.webm", ["-c:v", "libvpx-vp9", "-deadline", "realtime"], "flow"),
        ("mjpeg.avi", ["-c:v", "mjpeg", "-q:v", "3"], "flow"),
    ],
)
def test_the_codec_does_not_change_the_speed(tmp_path, texture, name, options, source):
    require_ffmpeg()
    write_video(tmp_path / "a.mp4", panned(texture, 4), fps=FPS)
    encode(tmp_path / "a.mp4", tmp_path / name, *options)
    track = measured(probe_video(tmp_path / name))
    assert track.source == source
    assert track.mean(0, NUM_FRAMES) == pytest.approx(4 / HEIGHT * FPS, rel=0.05)


def test_size_and_frame_rate_do_not_change_the_speed(tmp_path, texture):
    """Every other frame of the pan at half the rate, enlarged."""
    frames = [cv2.resize(frame, (2 * WIDTH, 2 * HEIGHT)) for frame in panned(texture, 3)[::2]]
    write_video(tmp_path / "a.mp4", frames, fps=FPS / 2)
    assert measured(probe_video(tmp_path / "a.mp4")).mean(0, 20) == pytest.approx(3 / HEIGHT * FPS, rel=0.03)


@pytest.mark.parametrize("source", ["codec", "flow"])
def test_a_turned_video_is_measured_in_heights_of_what_is_shown(tmp_path, texture, source):
    """A phone's display matrix turns the frames by a quarter: they are shown WIDTH pixels high."""
    require_ffmpeg()
    write_video(tmp_path / "a.mkv", panned(texture, 4), fps=FPS, lossless=True)
    codec = ("libx264",) if source == "codec" else ("libx265", "-x265-params", "log-level=none")
    encode(tmp_path / "a.mkv", tmp_path / "a.mp4", "-pix_fmt", "yuv420p", "-c:v", *codec)
    write_matrix(tmp_path / "a.mp4", (0, 1, -1, 0))
    video = probe_video(tmp_path / "a.mp4")
    assert (video.width, video.height) == (HEIGHT, WIDTH)
    track = measured(video)
    assert track.source == source
    assert track.mean(0, NUM_FRAMES) == pytest.approx(4 / WIDTH * FPS, rel=0.05)


@pytest.mark.parametrize(("shape", "speed"), [("2/1", 2 * 4 / HEIGHT), ("1/2", 4 / (2 * HEIGHT))])
def test_oblong_pixels_move_as_far_as_they_are_shown(tmp_path, texture, shape, speed):
    require_ffmpeg()
    write_video(tmp_path / "a.mp4", panned(texture, 4), fps=FPS)
    encode(tmp_path / "a.mp4", tmp_path / "b.mp4", "-vf", f"setsar={shape}", "-c:v", "libx264", "-crf", "10")
    track = measured(probe_video(tmp_path / "b.mp4"))
    assert track.source == "codec"
    assert track.mean(0, NUM_FRAMES) == pytest.approx(speed * FPS, rel=0.05)


def test_frames_that_refer_to_the_one_before_the_last_change_the_mean_by_at_most_a_tenth(tmp_path, texture):
    """A file of ours, whose encoder lets some frames at the beginning refer further back; vectors do not say so."""
    write_video(tmp_path / "a.mp4", panned(texture, 4), fps=FPS)
    track = measured(probe_video(tmp_path / "a.mp4"))
    assert track.source == "codec"
    assert track.mean(0, NUM_FRAMES) == pytest.approx(4 / HEIGHT * FPS, rel=0.1)
    assert np.median(track.speeds[1:]) == pytest.approx(4 / HEIGHT * FPS, rel=0.02)


def test_only_the_asked_frames_count(tmp_path, texture):
    frames = panned(texture, 4)
    write_video(tmp_path / "a.mp4", [frames[0]] * 20 + frames[:20], fps=FPS)
    track = measured(probe_video(tmp_path / "a.mp4"))
    assert track.mean(1, 18) == pytest.approx(0.0, abs=1e-3)
    assert track.mean(24, 40) == pytest.approx(4 / HEIGHT * FPS, rel=0.1)
    assert track.mean(0, 1) is None


def test_dancers_who_move_faster_have_more_motion_by_both_sources(tmp_path):
    """The same dance at twice its speed; the sources agree on dancers, whose background does not move."""
    require_ffmpeg()
    clip = render_clip(HELD_OUT_SEEDS[1], num_frames=48, width=128, height=192, fps=32.0)
    means = {}
    for speed in (1, 2):
        write_video(tmp_path / f"{speed}.mp4", clip.rgb[::speed], fps=32.0)
        encode(tmp_path / f"{speed}.mp4", tmp_path / f"{speed}.mkv", "-c:v", "ffv1")
        for suffix in ("mp4", "mkv"):
            video = probe_video(tmp_path / f"{speed}.{suffix}")
            track = measured(video)
            means[track.source, speed] = track.mean(0, video.num_frames)
    assert means["codec", 2] == pytest.approx(2 * means["codec", 1], rel=0.3)
    assert means["flow", 2] == pytest.approx(2 * means["flow", 1], rel=0.15)
    for speed in (1, 2):
        assert means["codec", speed] == pytest.approx(means["flow", speed], rel=0.35)
