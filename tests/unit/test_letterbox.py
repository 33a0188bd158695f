"""Black bars are found in spite of compression noise, and never cut where any frame shows something."""

from collections.abc import Iterable

import numpy as np
import pytest

from dreamdance.errors import UserError
from dreamdance.media.cropping import Crop
from dreamdance.media.letterbox import search_letterbox
from dreamdance.media.video import iterate_frames, probe_video, read_frames, write_video

NUM_FRAMES, HEIGHT, WIDTH = 62, 64, 48
WHOLE = Crop(left=0, top=0, width=WIDTH, height=HEIGHT)
STAGE = Crop(left=8, top=12, width=32, height=40)


def stage_frames(num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Moving texture within `STAGE`, black around it."""
    frames = np.zeros((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    texture = np.random.default_rng(0).integers(60, 256, (STAGE.height, STAGE.width, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        STAGE.cut(frame)[:] = np.roll(texture, number, axis=1)
    return frames


def find_letterbox(frames: Iterable[np.ndarray]) -> Crop:
    """The result of a search that runs to its end."""
    search = search_letterbox(frames, where="the video")
    while True:
        try:
            next(search)
        except StopIteration as found:
            return found.value


def bright_pixels_outside(frames: np.ndarray, crop: Crop) -> int:
    return int((frames > 64).any(axis=-1).sum() - (crop.cut(frames) > 64).any(axis=-1).sum())


def test_bars_are_found_to_the_pixel_and_noise_does_not_keep_them():
    frames = stage_frames(5)
    bars = np.ones((HEIGHT, WIDTH), bool)
    bars[STAGE.top : STAGE.top + STAGE.height, STAGE.left : STAGE.left + STAGE.width] = False
    frames[:, bars] += np.random.default_rng(1).integers(0, 16, (5, int(bars.sum()), 3), dtype=np.uint8)
    frames[2, 3, 5] = 60  # a single grey pixel, as compression makes them
    assert find_letterbox(iter(frames)) == STAGE


@pytest.mark.parametrize("number", range(NUM_FRAMES))
def test_one_bright_frame_is_kept_wherever_in_the_video_it_is(number):
    frames = stage_frames()
    frames[number, 2:60, 1:46] = 90
    assert find_letterbox(frames) == Crop(left=1, top=2, width=45, height=58)


@pytest.mark.parametrize("colour", [(0, 0, 255), (255, 0, 0), (40, 40, 40)], ids=["blue", "red", "grey"])
def test_bright_objects_of_any_colour_are_kept(colour):
    """Blue has very little luma."""
    frames = stage_frames(3)
    frames[1, 0:4, 20:24] = colour
    assert find_letterbox(frames) == Crop(left=8, top=0, width=32, height=52)


def test_the_tip_of_a_finger_is_kept():
    frames = stage_frames(3)
    frames[1, 5, 20] = 255
    assert bright_pixels_outside(frames, find_letterbox(frames)) == 0


@pytest.mark.parametrize("crf", [18, 40])
def test_bars_of_a_compressed_video_are_found_except_for_ringing_beside_the_picture(tmp_path, crf):
    write_video(tmp_path / "clip.mp4", stage_frames(20), fps=8, crf=crf)
    video = probe_video(tmp_path / "clip.mp4")
    crop = find_letterbox(iterate_frames(video))
    assert bright_pixels_outside(read_frames(video), crop) == 0
    assert STAGE.left - 8 <= crop.left <= STAGE.left
    assert STAGE.top - 8 <= crop.top <= STAGE.top
    assert crop.left + crop.width <= STAGE.left + STAGE.width + 8
    assert crop.top + crop.height <= STAGE.top + STAGE.height + 8


def test_a_bright_frame_between_dark_ones_keeps_the_whole_picture():
    frames = np.zeros((5, HEIGHT, WIDTH, 3), np.uint8)
    frames[3] = 90
    assert find_letterbox(frames) == WHOLE


def test_a_video_that_is_nearly_all_bar_is_not_cut_but_named():
    with pytest.raises(UserError, match=r"the video: .* 0x0 of 48x64; .*`videos\.crop_letterbox`"):
        find_letterbox(np.zeros((5, HEIGHT, WIDTH, 3), np.uint8))
