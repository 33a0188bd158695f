"""DWPose's two networks, replaced by graphs of the same form that find coloured rectangles and dots."""

from dataclasses import replace

import numpy as np
import pytest
from support.onnx_graphs import require_onnx, save_detector, save_pose_network

from dreamdance.annotators.dwpose import DETECTOR, POSE_NETWORK, DWPose
from dreamdance.annotators.protocols import Person, PoseAnnotator
from dreamdance.errors import MissingInputError
from dreamdance.media.keypoints import BODY_NAMES, FACE, LEFT_HAND, RIGHT_HAND

# COCO-WholeBody's order (S. Jin et al. 2020): body, feet, face, left hand, right hand.
COCO_NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
COCO_FACE, COCO_LEFT_HAND, COCO_RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)
PEOPLE_COLOURS = [(200, 40, 90), (40, 210, 160)]
BACKGROUND = 128


def sphere_colours(count: int) -> np.ndarray:
    """Colours of equal distance from the background, far from each other."""
    index = np.arange(count) + 0.5
    polar, turn = np.arccos(1 - 2 * index / count), np.pi * (1 + 5**0.5) * index
    directions = np.stack([np.cos(turn) * np.sin(polar), np.sin(turn) * np.sin(polar), np.cos(polar)], axis=-1)
    return np.round(BACKGROUND + 120 * directions)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> DWPose:
    require_onnx()
    folder = tmp_path_factory.mktemp("dwpose")
    save_detector(folder / DETECTOR.file, PEOPLE_COLOURS)
    save_pose_network(folder / POSE_NETWORK.file, sphere_colours(133))
    return DWPose(folder, num_threads=1, files=(replace(DETECTOR, sha256=None), replace(POSE_NETWORK, sha256=None)))


def draw_people(height: int, width: int, boxes: dict[int, tuple[int, int, int, int]]) -> np.ndarray:
    frame = np.full((height, width, 3), 90, np.uint8)
    for number, (left, top, right, bottom) in boxes.items():
        frame[top:bottom, left:right] = PEOPLE_COLOURS[number]
    return frame


def draw_dots(height: int, width: int, centres: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Cones of colour; a centre is in pixels from the frame's left and upper edge, so that pixel 0 has its at .5."""
    frame = np.full((height, width, 3), float(BACKGROUND))
    for (x, y), colour in zip(centres, colours, strict=True):
        rows, columns = np.mgrid[int(y) - 12 : int(y) + 13, int(x) - 12 : int(x) + 13]
        weight = np.maximum(1 - np.hypot(columns + 0.5 - x, rows + 0.5 - y) / 11, 0)
        frame[rows, columns] += weight[..., None] * (colour - BACKGROUND)
    return np.round(frame).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(320, 240), (240, 320), (331, 197), (1200, 900)])
def test_boxes_come_back_in_pixels_of_the_frame(networks, height, width):
    boxes = {0: (width // 8, height // 6, width // 2, height - 7), 1: (5 * width // 8, 11, width - 9, height // 2)}
    (found,) = networks.find_people(draw_people(height, width, boxes)[None])
    assert len(found) == 2  # the less sure box beside each, the unsure one and the other class are dropped
    by_left = sorted(found, key=lambda person: person.box[0])
    tolerance = max(1.0, 1.5 * max(height, width) / 640)
    for person, box in zip(by_left, boxes.values(), strict=True):
        assert person.score == pytest.approx(0.9, abs=1e-5)
        np.testing.assert_allclose(person.box, box, atol=tolerance)
        centre_x, centre_y, side, rotation = person.region
        np.testing.assert_allclose((centre_x, centre_y), ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), atol=tolerance)
        assert side == pytest.approx(1.25 * max(box[2] - box[0], box[3] - box[1]), abs=3 * tolerance)
        assert rotation == 0.0


def test_a_frame_without_people_and_a_frame_with_one(networks):
    empty, one = draw_people(320, 240, {}), draw_people(320, 240, {1: (20, 30, 120, 300)})
    assert [len(people) for people in networks.find_people(np.stack([empty, one]))] == [0, 1]


def scattered_dots(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """133 centres, one in each cell of a grid over the box, in no order."""
    generator = np.random.default_rng(0)
    left, top, right, bottom = box
    rows, columns = np.divmod(generator.permutation(144)[:133], 12)
    jitter = generator.uniform(0.45, 0.55, (2, 133))
    return np.stack(
        [left + (columns + jitter[0]) * (right - left) / 12, top + (rows + jitter[1]) * (bottom - top) / 12], axis=-1
    )


@pytest.mark.parametrize("box", [(60, 50, 360, 370), (40, 90, 400, 380)])
def test_every_point_is_found_where_its_dot_is_and_has_its_name(networks, box):
    height, width = 460, 440
    centres = scattered_dots(height, width, box)
    frame = draw_dots(height, width, centres, sphere_colours(133))
    person = Person(tuple(map(float, box)), 1.0, (0.0, 0.0, 1.0, 0.0))
    poses = networks.annotate_pose(np.stack([frame, frame]), [None, person])
    assert poses.keypoints.shape == (2, 128, 3)
    assert not poses.keypoints[0].any()

    found = poses.keypoints[1, :, :2] * [width, height]
    expected = np.empty((128, 2))
    for index, name in enumerate(BODY_NAMES):
        expected[index] = centres[COCO_NAMES.index(name)] if name in COCO_NAMES else np.nan
    shoulders = [COCO_NAMES.index("left_shoulder"), COCO_NAMES.index("right_shoulder")]
    expected[BODY_NAMES.index("neck")] = centres[shoulders].mean(axis=0)
    expected[FACE], expected[LEFT_HAND] = centres[COCO_FACE], centres[COCO_LEFT_HAND]
    expected[RIGHT_HAND] = centres[COCO_RIGHT_HAND]
    pixel = 1.25 * max(box[3] - box[1], (box[2] - box[0]) * 4 / 3) / 384  # of the network's input
    errors = found - expected
    assert np.abs(errors).max() < 1.0 * pixel
    assert np.abs(errors.mean(axis=0)).max() < 0.15 * pixel
    assert poses.keypoints[1, :, 2].min() > 0.5
    assert poses.keypoints[1, :, 2].max() <= 1.0


def test_a_missing_dot_has_no_confidence_and_the_neck_that_of_the_less_sure_shoulder(networks):
    box = (60, 50, 360, 370)
    centres, colours = scattered_dots(460, 440, box), sphere_colours(133)
    shown = np.delete(np.arange(133), COCO_NAMES.index("left_shoulder"))
    frame = draw_dots(460, 440, centres[shown], colours[shown])
    person = Person(tuple(map(float, box)), 1.0, (0.0, 0.0, 1.0, 0.0))
    (keypoints,) = networks.annotate_pose(frame[None], [person]).keypoints
    by_name = dict(zip(BODY_NAMES, keypoints[:, 2], strict=False))
    assert by_name["left_shoulder"] < 0.3
    assert by_name["neck"] == by_name["left_shoulder"]
    assert by_name["right_shoulder"] > 0.5


def test_the_files_are_those_that_the_authors_published(networks, tmp_path):
    assert isinstance(networks, PoseAnnotator)
    assert [file.licence for file in networks.networks] == ["Apache-2.0", "Apache-2.0"]
    assert all(len(file.sha256) == 64 for file in networks.networks)
    with pytest.raises(MissingInputError, match=r"yolox_l.onnx: the weights .* Apache-2.0.*https://huggingface.co"):
        DWPose(tmp_path)
    save_detector(tmp_path / DETECTOR.file, PEOPLE_COLOURS)
    with pytest.raises(MissingInputError, match=f"have {DETECTOR.sha256}"):
        DWPose(tmp_path)
