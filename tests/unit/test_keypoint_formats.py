"""Key-point files of OpenPose and of ControlNet's DWPose, written from dancers in the documented order."""

import json
from functools import cache

import numpy as np
import pytest

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.media.keypoint_formats import read_any_keypoints
from dreamdance.media.keypoints import (
    BODY_NAMES,
    FACE,
    LEFT_HAND,
    RIGHT_HAND,
    KeypointFileError,
    KeypointSequence,
    write_keypoint_file,
)
from dreamdance.runtime.warnings_once import warn_once

WIDTH, HEIGHT, NUM_FRAMES = 256, 384, 5
# The lists of OpenPose's documentation ("Pose Output Format").
_ARMS = ["Nose", "Neck", "RShoulder", "RElbow", "RWrist", "LShoulder", "LElbow", "LWrist"]
_LEGS = ["RHip", "RKnee", "RAnkle", "LHip", "LKnee", "LAnkle", "REye", "LEye", "REar", "LEar"]
_FEET = ["LBigToe", "LSmallToe", "LHeel", "RBigToe", "RSmallToe", "RHeel"]
BODY_25 = [*_ARMS, "MidHip", *_LEGS, *_FEET]
COCO = [*_ARMS, *_LEGS]


@cache
def dancer(number=0):
    points = render_clip(HELD_OUT_SEEDS[40 + number], num_frames=NUM_FRAMES, width=24, height=36).keypoints
    points[..., 2] = np.linspace(0.2, 1.0, 128)
    points.setflags(write=False)
    return points


def flat(points):
    return [float(value) for value in np.asarray(points, dtype=np.float64).reshape(-1)]


def person(points, names, *, face=70, scale=(WIDTH, HEIGHT)):
    """One person of a JSON file; points `(128, 3)` of ours."""
    points = points.astype(np.float64) * [*scale, 1.0]
    by_name = {
        (
            "Nose"
            if name == "nose"
            else "Neck"
            if name == "neck"
            else name[0].upper() + name.split("_")[1].capitalize()
        ): at
        for name, at in zip(BODY_NAMES, points, strict=False)
    }
    body = [by_name.get(name, [1.0, 2.0, 0.5]) for name in names]  # toes and the middle of the hips are not ours
    faces = np.concatenate([points[FACE], np.full((face - 68, 3), 0.7)])
    return {
        "person_id": [-1],
        "pose_keypoints_2d": flat(body),
        "face_keypoints_2d": flat(faces),
        "hand_left_keypoints_2d": flat(points[LEFT_HAND]),
        "hand_right_keypoints_2d": flat(points[RIGHT_HAND]),
        "pose_keypoints_3d": [],
    }


def openpose_folder(folder, frames, *, first=0):
    folder.mkdir()
    for number, people in enumerate(frames, start=first):
        content = {"version": 1.3, "people": people}
        (folder / f"dance_{number:012d}_keypoints.json").write_text(json.dumps(content))
    return folder


def dwpose_file(path, frames):
    path.write_text(
        json.dumps([{"people": people, "canvas_width": WIDTH, "canvas_height": HEIGHT} for people in frames])
    )
    return path


@pytest.mark.parametrize("names", [BODY_25, COCO], ids=["BODY_25", "COCO 18"])
def test_a_folder_of_openpose_is_read_point_by_point(tmp_path, names):
    folder = openpose_folder(tmp_path / "json", [[person(frame, names)] for frame in dancer()], first=98)
    found = read_any_keypoints(folder, size=(WIDTH, HEIGHT), fps=25)
    assert (found.width, found.height, found.fps) == (WIDTH, HEIGHT, 25.0)
    np.testing.assert_allclose(found.keypoints, dancer(), atol=1e-6)


@pytest.mark.parametrize("scale", [(WIDTH, HEIGHT), (1, 1)], ids=["pixels", "fractions"])
def test_a_list_of_dwpose_is_read_with_its_canvas(tmp_path, scale):
    frames = [[person(frame, COCO, face=68, scale=scale)] for frame in dancer()]
    found = read_any_keypoints(dwpose_file(tmp_path / "pose.json", frames), fps=8.0)
    assert (found.width, found.height, found.fps) == (WIDTH, HEIGHT, 8.0)
    np.testing.assert_allclose(found.keypoints, dancer(), atol=1e-6)


def test_one_object_is_one_frame_and_our_own_files_are_read_as_before(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"people": [person(dancer()[0], BODY_25)]}))
    found = read_any_keypoints(tmp_path / "one.json", size=(WIDTH, HEIGHT), fps=1.0)
    np.testing.assert_allclose(found.keypoints, dancer()[:1], atol=1e-6)
    write_keypoint_file(tmp_path / "ours.json", KeypointSequence(dancer(), 20, 30, 12.0))
    ours = read_any_keypoints(tmp_path / "ours.json", size=(1, 1), fps=1.0)
    assert (ours.width, ours.height, ours.fps) == (20, 30, 12.0)
    np.testing.assert_allclose(ours.keypoints, dancer(), atol=1e-6)
    with pytest.raises(KeypointFileError, match="person 1: a file of this kind has one person"):
        read_any_keypoints(tmp_path / "ours.json", person=1)


def test_what_a_network_did_not_detect_is_missing(tmp_path):
    one = person(dancer()[0], COCO, face=68) | {"hand_left_keypoints_2d": None, "face_keypoints_2d": []}
    one["pose_keypoints_2d"][9:12] = [0, 0, 0]
    one["pose_keypoints_2d"][2] = 1.02  # confidences a little above 1 occur
    del one["hand_right_keypoints_2d"]
    found = read_any_keypoints(dwpose_file(tmp_path / "pose.json", [[one]]), fps=8.0).keypoints[0]
    assert found[0, 2] == 1.0
    np.testing.assert_array_equal(found[3], 0)
    np.testing.assert_array_equal(found[18:], 0)
    assert (found[[1, 2, 4], 2] > 0).all()


def two_people():
    """A large dancer and a smaller one beside; their places in the list change in every frame."""
    large, small = dancer(0).copy(), dancer(1).copy()
    large[..., :2] = [0.05, 0.1] + [0.5, 0.8] * large[..., :2]
    small[..., :2] = [0.6, 0.5] + [0.3, 0.4] * small[..., :2]
    frames = [[person(large[number], COCO, face=68), person(small[number], COCO, face=68)] for number in range(5)]
    frames = [people[:: 1 if number % 2 == 0 else -1] for number, people in enumerate(frames)]
    return large, small, frames


def test_the_largest_person_or_the_named_one_is_followed(tmp_path):
    large, small, frames = two_people()
    path = dwpose_file(tmp_path / "pose.json", frames)
    np.testing.assert_allclose(read_any_keypoints(path, fps=8.0).keypoints, large, atol=1e-6)
    np.testing.assert_allclose(read_any_keypoints(path, fps=8.0, person=0).keypoints, large, atol=1e-6)
    np.testing.assert_allclose(read_any_keypoints(path, fps=8.0, person=1).keypoints, small, atol=1e-6)
    with pytest.raises(KeypointFileError, match=r"person 2: the first frame that shows people, 0, has 2, numbered"):
        read_any_keypoints(path, fps=8.0, person=2)


def test_a_person_who_is_missing_for_a_while_is_not_replaced_by_another(tmp_path, caplog):
    large, _, frames = two_people()
    frames[2] = [frames[2][1]]  # the small one alone
    warn_once.cache_clear()
    found = read_any_keypoints(dwpose_file(tmp_path / "pose.json", frames), fps=8.0).keypoints
    np.testing.assert_array_equal(found[2], 0)
    np.testing.assert_allclose(found[[0, 1, 3, 4]], large[[0, 1, 3, 4]], atol=1e-6)
    assert "the person who is followed is missing in 1 of 5 frames" in caplog.text


def test_what_a_file_lacks_must_be_given(tmp_path):
    folder = openpose_folder(tmp_path / "json", [[person(frame, BODY_25)] for frame in dancer()])
    with pytest.raises(KeypointFileError, match=r"contain no size of the frame; .* 'keypoints_size'"):
        read_any_keypoints(folder, fps=8.0)
    with pytest.raises(KeypointFileError, match=r"contain no frame rate; .* 'fps'"):
        read_any_keypoints(folder, size=(WIDTH, HEIGHT))
    with pytest.raises(KeypointFileError, match=r"points lie outside of the frame of 128x96; .* Is its size right"):
        read_any_keypoints(folder, size=(128, 96), fps=8.0)


def test_a_missing_frame_is_named(tmp_path):
    folder = openpose_folder(tmp_path / "json", [[person(frame, BODY_25)] for frame in dancer()])
    (folder / "dance_000000000002_keypoints.json").unlink()
    with pytest.raises(KeypointFileError, match=r"json: the file of frame 2 is missing \(1 in all\)"):
        read_any_keypoints(folder, size=(WIDTH, HEIGHT), fps=8.0)
    (folder / "notes.json").write_text("{}")
    with pytest.raises(KeypointFileError, match="the name has no frame number"):
        read_any_keypoints(folder, size=(WIDTH, HEIGHT), fps=8.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeypointFileError, match="contains no"):
        read_any_keypoints(tmp_path / "empty", size=(WIDTH, HEIGHT), fps=8.0)


def changed(**fields):
    return [{"people": [person(dancer()[0], COCO, face=68) | fields], "canvas_width": WIDTH, "canvas_height": HEIGHT}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            changed(pose_keypoints_2d=[0.0] * 51),
            r"frame 0: people\[0\].pose_keypoints_2d: 51 numbers; accepted are 54, 18",
        ),
        (changed(hand_left_keypoints_2d=[0.0] * 60), r"hand_left_keypoints_2d: 60 numbers; accepted are 63, 21 points"),
        (changed(face_keypoints_2d="x"), r"face_keypoints_2d: str; accepted are 204, 68 points .* or 210, 70 points"),
        (changed(pose_keypoints_2d=None), r"people\[0\]: expected an object with 'pose_keypoints_2d'"),
        (changed(pose_keypoints_2d=["a"] * 54), r"pose_keypoints_2d\[0\] is 'a', not a finite number"),
        (changed(pose_keypoints_2d=[1e12] * 54), r"pose_keypoints_2d\[0\] is 1000000000000.0, not a finite number"),
        (changed(pose_keypoints_2d=[9.0] * 54), r"pose_keypoints_2d\[2\] is 9; a confidence from 0 to 1"),
        ([{"animals": []}], "frame 0: expected an object with 'people'"),
        ([{"people": [], "canvas_width": 5}], "canvas_height is None; a whole number from 1 to 65536"),
        ([{"people": [], "canvas_width": 5, "canvas_height": 7}], "no frame shows a person"),
        ([*changed(), {"people": [], "canvas_width": 5, "canvas_height": 7}], "canvases of different sizes"),
        ([], "0 frames"),
        ({"persons": []}, r"no key-point file of a known kind: .* found \['persons'\]"),
    ],
)
def test_a_wrong_file_is_refused_with_frame_and_field(tmp_path, content, message):
    (tmp_path / "pose.json").write_text(json.dumps(content))
    with pytest.raises(KeypointFileError, match=r"pose\.json.*" + message):
        read_any_keypoints(tmp_path / "pose.json", fps=8.0)
