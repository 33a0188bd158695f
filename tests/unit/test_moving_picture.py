"""The README's moving picture: every frame of every video, at the videos' pace, below the limit."""

import numpy as np
import pytest
from PIL import Image
from support.tool_modules import load_tool

from dreamdance.media.video import write_video

tool = load_tool("moving_picture")


@pytest.fixture
def videos(tmp_path):
    """Two videos of one size, of 6 and 4 frames, each frame of one grey level."""
    paths = []
    for number, length in enumerate((6, 4)):
        levels = 40 * number + 30 * np.arange(length) + 20
        frames = np.broadcast_to(levels[:, None, None, None], (length, 32, 48, 3)).astype(np.uint8)
        paths.append(tmp_path / f"{number}.mp4")
        write_video(paths[-1], list(frames), fps=8.0)
    return paths


def test_videos_lie_one_below_the_other_and_short_ones_wait(videos, tmp_path, capsys):
    assert tool.main([str(tmp_path / "out.webp"), *map(str, videos)]) == 0
    assert "out.webp" in capsys.readouterr().out
    with Image.open(tmp_path / "out.webp") as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (6, (48, 64), 0)
        for number in range(6):
            picture.seek(number)
            picture.load()
            assert picture.info["duration"] == 125
            shown = np.asarray(picture.convert("RGB")).astype(int)
            expected = 20 + 30 * number, 60 + 30 * min(number, 3)
            assert abs(shown[16, 24].mean() - expected[0]) < 6
            assert abs(shown[48, 24].mean() - expected[1]) < 6


def test_a_file_above_the_limit_or_other_sizes_are_refused(videos, tmp_path, capsys):
    assert tool.main([str(tmp_path / "out.webp"), *map(str, videos), "--max-kilobytes", "0"]) == 1
    assert "--max-kilobytes 0" in capsys.readouterr().err
    other = tmp_path / "other.mp4"
    write_video(other, [np.zeros((64, 48, 3), np.uint8)] * 2, fps=8.0)
    assert tool.main([str(tmp_path / "out.webp"), str(videos[0]), str(other)]) == 1
    assert "[(32, 48), (64, 48)]" in capsys.readouterr().err
    write_video(other, [np.zeros((32, 48, 3), np.uint8)] * 2, fps=10.0)
    assert tool.main([str(tmp_path / "out.webp"), str(videos[0]), str(other)]) == 1
    assert "different frame rates: [8.0, 10.0]" in capsys.readouterr().err
    assert not (tmp_path / "out.webp").exists()
