"""Key points: mirroring, cropping and the key-point file, whose mistakes are named by file, frame and field."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamdance.dancers.render import render_clip
from dreamdance.errors import UserError
from dreamdance.media.keypoints import (
    BODY,
    BODY_NAMES,
    FACE,
    LEFT_HAND,
    MIRROR,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    KeypointFileError,
    KeypointSequence,
    flip_keypoints,
    read_keypoint_file,
    write_keypoint_file,
)


@pytest.fixture
def sequence() -> KeypointSequence:
    return KeypointSequence(np.random.default_rng(0).random((3, 128, 3), dtype=np.float32), 256, 384, 8.0)


@pytest.fixture
def content(sequence: KeypointSequence, tmp_path: Path) -> dict[str, Any]:
    write_keypoint_file(tmp_path / "good.json", sequence)
    return json.loads((tmp_path / "good.json").read_text())


def read(content: Any, tmp_path: Path) -> KeypointSequence:
    path = tmp_path / "points.json"
    path.write_text(json.dumps(content))
    return read_keypoint_file(path)


def test_the_parts_cover_all_points_once() -> None:
    covered = [index for part in (BODY, LEFT_HAND, RIGHT_HAND, FACE) for index in range(part.start, part.stop)]
    assert covered == list(range(NUM_KEYPOINTS))
    assert len(BODY_NAMES) == BODY.stop


def test_flipping_twice_is_no_flip() -> None:
    points = np.random.default_rng(0).random((2, 128, 3))
    np.testing.assert_allclose(flip_keypoints(flip_keypoints(points)), points, rtol=0, atol=1e-15)
    assert sorted(MIRROR) == list(range(NUM_KEYPOINTS))


def test_flipping_swaps_left_and_right_of_body_and_hands() -> None:
    points = np.random.default_rng(0).random((128, 3))
    flipped = flip_keypoints(points)
    for left, name in enumerate(BODY_NAMES):
        mirrored = name.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")
        assert np.array_equal(flipped[left, 1:], points[BODY_NAMES.index(mirrored), 1:]), name
    assert np.array_equal(flipped[LEFT_HAND, 1:], points[RIGHT_HAND, 1:])
    np.testing.assert_allclose(flipped[RIGHT_HAND, 0], 1 - points[LEFT_HAND, 0])


def test_flipping_a_face_that_looks_straight_ahead_leaves_it_in_place() -> None:
    clip = render_clip(3, num_frames=1, width=16, height=24)
    # The 3D face is symmetric: in its own plane of symmetry each point and its partner are mirror images.
    face = clip.joints[0, FACE].astype(np.float64)
    partner = face[MIRROR[FACE] - FACE.start]
    across = face - partner
    normal = across[0] / np.linalg.norm(across[0])
    middle = (face + partner) / 2 @ normal
    np.testing.assert_allclose(middle, middle[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(across, (across @ normal)[:, None] * normal, rtol=0, atol=1e-6)


def test_a_written_file_reads_back(sequence: KeypointSequence, tmp_path: Path) -> None:
    write_keypoint_file(tmp_path / "points.json", sequence)
    found = read_keypoint_file(tmp_path / "points.json")
    assert (found.width, found.height, found.fps) == (256, 384, 8.0)
    np.testing.assert_allclose(found.keypoints, sequence.keypoints, rtol=0, atol=0.6e-6)
    assert found.keypoints.dtype == np.float32


def test_a_byte_order_mark_is_accepted(sequence: KeypointSequence, tmp_path: Path) -> None:
    path = tmp_path / "keypoints.json"
    write_keypoint_file(path, sequence)
    without = read_keypoint_file(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_array_equal(read_keypoint_file(path).keypoints, without.keypoints)


def test_points_beyond_the_edges_are_accepted(content: dict[str, Any], tmp_path: Path) -> None:
    content["frames"][0]["keypoints"][3] = [-0.2, 1.4, 0]
    assert read(content, tmp_path).keypoints[0, 3].tolist() == pytest.approx([-0.2, 1.4, 0.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("fps"), r"expected an object with .*'fps'"),
        (lambda c: c.update(author="x"), r"found .*'author'"),
        (lambda c: c.update(schema_version=2), "schema_version is 2; this code reads 1"),
        (lambda c: c.update(width="256"), "width is '256'; a whole number"),
        (lambda c: c.update(height=0), "height is 0"),
        (lambda c: c.update(width=True), "width is True"),
        (lambda c: c.update(fps=-1), "fps is -1"),
        (lambda c: c.update(frames=[]), "frames is 0 frames"),
        (lambda c: c.update(frames="x"), "frames is str"),
        (lambda c: c["frames"][1].pop("keypoints"), "frame 1: expected an object with the one field 'keypoints'"),
        (lambda c: c["frames"][2]["keypoints"].pop(), "frame 2: keypoints is 127 points; a list of 128"),
        (lambda c: c["frames"][0]["keypoints"][5].pop(), r"frame 0: keypoints\[5\] is not three finite numbers"),
        (lambda c: c["frames"][0]["keypoints"].__setitem__(6, [0.5, "0.5", 1]), r"frame 0: keypoints\[6\]"),
        (
            lambda c: c["frames"][0]["keypoints"].__setitem__(7, [300.0, 0.5, 1]),
            r"keypoints\[7\] .*fractions of the frame",
        ),
        (lambda c: c["frames"][0]["keypoints"].__setitem__(8, [0.5, 0.5, 1.5]), "confidence is from 0 to 1"),
    ],
)
def test_a_mistake_is_named_by_file_frame_and_field(
    change: Any, message: str, content: dict[str, Any], tmp_path: Path
) -> None:
    change(content)
    with pytest.raises(KeypointFileError, match=r"points\.json: .*" + message):
        read(content, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"width": NaN}', "NaN is not a JSON number"),
        ('{"width": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("\x00\x01", "not valid JSON"),
    ],
)
def test_text_that_is_no_key_point_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(KeypointFileError, match=message):
        read_keypoint_file(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(KeypointFileError, match=r"points\.json: not valid JSON"):
        read_keypoint_file(path)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamdance.media.keypoints.MAX_FILE_BYTES", 10)
    path = tmp_path / "points.json"
    path.write_text(" " * 11)
    with pytest.raises(KeypointFileError, match="11 bytes; key-point files up to 10 are read"):
        read_keypoint_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: cannot be read: No such file"):
        read_keypoint_file(tmp_path / "absent.json")


def test_points_that_could_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    for points in (
        np.zeros((2, 18, 3)),
        np.full((1, 128, 3), np.nan),
        np.full((1, 128, 3), 5.0),
        np.zeros((0, 128, 3)),
    ):
        with pytest.raises(ValueError, match=r"key ?points"):
            write_keypoint_file(tmp_path / "points.json", KeypointSequence(points, 4, 6, 8.0))
    assert not (tmp_path / "points.json").exists()
