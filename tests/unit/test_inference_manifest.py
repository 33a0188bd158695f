"""The manifest of `animate` is checked as a whole with all problems named; driving skeletons are fitted to a body."""

import json
import os

import numpy as np
import pytest
from support.fault_log import record_fault

from dreamdance.errors import ManifestError
from dreamdance.inference.manifest import ManifestEntry, read_entries
from dreamdance.media.alignment import AlignmentError, align_keypoints
from dreamdance.media.keypoints import NUM_KEYPOINTS, KeypointSequence


def write(tmp_path, *lines):
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def entry(**changes):
    values = {"id": "a", "image": "a.png", "keypoints": "a.json", **changes}
    return {name: value for name, value in values.items() if value is not None}


def problems(tmp_path, *lines) -> str:
    with pytest.raises(ManifestError) as caught:
        read_entries(write(tmp_path, *lines))
    return str(caught.value)


def test_an_entry_is_read_with_its_paths_beside_the_manifest(tmp_path):
    full = entry(
        id="clip_1.b",
        align=True,
        reference_keypoints="r.json",
        seed=7,
        fps=25,
        reference_frame=3,
        image="examples/clip/reference.png",
    )
    (read,) = read_entries(write(tmp_path, full))
    assert read == ManifestEntry(
        id="clip_1.b",
        image=tmp_path / "examples/clip/reference.png",
        keypoints=tmp_path / "a.json",
        seed=7,
        align="scale",
        reference_keypoints=tmp_path / "r.json",
        fps=25,
        reference_frame=3,
    )
    assert set(read.files) == {"image", "keypoints", "reference_keypoints"}


def test_missing_fields_have_defaults_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path, entry(), "", "   ", entry(id="b", keypoints=None, pose="b.mp4"))
    first, second = read_entries(path, default_seed=5)
    assert (first.seed, first.align, first.fps, first.reference_frame) == (5, None, None, None)
    assert (second.pose, second.keypoints, second.line) == (tmp_path / "b.mp4", None, 4)


def test_reference_keypoints_are_no_input_of_an_entry_that_is_not_aligned(tmp_path):
    (read,) = read_entries(write(tmp_path, entry(reference_keypoints="r.json")))
    assert set(read.files) == {"image", "keypoints"}


@pytest.mark.parametrize(("written", "read"), [(True, "scale"), ("scale", "scale"), ("bones", "bones"), (False, None)])
def test_a_skeleton_is_aligned_by_one_scale_or_by_its_bones(tmp_path, written, read):
    (found,) = read_entries(write(tmp_path, entry(align=written, reference_keypoints="r.json")))
    assert found.align == read


@pytest.mark.parametrize(
    "bad_id", ["", ".", "..", "a/b", "a\\b", "../a", ".hidden", "-rf", "a b", "a\n", "x" * 201, 7, None]
)
def test_ids_that_are_no_plain_folder_names_are_refused(tmp_path, bad_id):
    line = {"id": bad_id, "image": "a.png", "keypoints": "a.json"}
    assert "must be 1 to 200 letters" in problems(tmp_path, line)


@pytest.mark.parametrize("name", ["image", "keypoints", "reference_keypoints"])
@pytest.mark.parametrize("path", ["", "a\0b", 3, "\ud83d.png"])
def test_a_string_that_cannot_be_a_path_is_refused(tmp_path, name, path):
    text = problems(tmp_path, entry(**{name: path}))
    assert f"{name} {path!r} must be a path" in text
    record_fault(
        "manifest with a string that cannot be a path",
        how=f"{name}: {path!r}",
        promised="refused before anything is opened, with line, field and what is accepted",
        happened=text,
    )


@pytest.mark.parametrize("path", ["../other/a.png", "a/../../b.png", "/data/dance/a.png"])
def test_paths_in_a_manifest_may_lead_anywhere(tmp_path, path):
    (read,) = read_entries(write(tmp_path, entry(image=path)))
    assert os.path.normpath(read.image) == os.path.normpath(os.path.join(tmp_path, path))


def test_a_byte_order_mark_is_no_part_of_a_manifest(tmp_path):
    lines = [json.dumps(entry(id=name)) for name in "ab"]
    path = tmp_path / "manifest.jsonl"
    path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert [read.id for read in read_entries(path)] == ["a", "b"]
    path.write_bytes(b"".join(line.encode("utf-8-sig") + b"\n" for line in lines))
    assert [read.id for read in read_entries(path)] == ["a", "b"], "joined files have one mark each"
    path.write_text("\n".join(lines), encoding="utf-16")
    with pytest.raises(ManifestError, match=r"is not UTF-8 text: .* at byte 0; save it as UTF-8"):
        read_entries(path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line_of_a_manifest(tmp_path, character):
    first = json.dumps(entry(image=f"a{character}b.png"), ensure_ascii=False)
    read = read_entries(write(tmp_path, first, entry(id="b")))
    assert [(one.line, one.image.name) for one in read] == [(1, f"a{character}b.png"), (2, "a.png")]


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x1e", "\r"])
def test_a_control_character_in_a_string_is_one_problem_of_one_line(tmp_path, character):
    text = problems(tmp_path, entry(), f'{{"id": "b", "image": "a{character}b.png", "keypoints": "a.json"}}')
    (line,) = text.splitlines()
    assert ":2: not valid JSON: Invalid control character" in line


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"imgae": "a.png"}, "unknown field 'imgae'; did you mean 'image'?"),
        ({"prompt": "dance"}, "unknown field 'prompt'; accepted are id, image"),
        ({"keypoints": None}, "a video of a person) must be given; this entry has none"),
        ({"pose": "a.mp4"}, "must be given; this entry has pose and keypoints"),
        ({"video": "a.mp4"}, "must be given; this entry has keypoints and video"),
        ({"video": "a.mp4", "pose": "b.mp4", "keypoints": None}, "must be given; this entry has pose and video"),
        ({"image": None}, "'image' is missing"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.0}, "seed 1.0"),
        ({"seed": True}, "seed True"),
        ({"seed": 1 << 63}, "seed 9223372036854775808"),
        ({"align": 1}, 'align 1 must be "scale" (the same as true), "bones" or false'),
        ({"align": "bone"}, "align 'bone' must be"),
        ({"align": "bones"}, "needs 'reference_keypoints'"),
        ({"align": True}, "needs 'reference_keypoints'"),
        ({"align": True, "pose": "a.mp4", "keypoints": None}, "the drawings of a pose video cannot be rescaled"),
        ({"fps": 0}, "fps 0"),
        ({"fps": "8"}, "fps '8'"),
        ({"reference_frame": -1}, "reference_frame -1"),
        ({"person": -1}, "person -1 must be a whole number from 0"),
        ({"person": [0.5, 0, 0.4, 1], "video": "a.mp4", "keypoints": None}, "must be a whole number from 0, or a box"),
        ({"person": [0, 0, 0.5, 1]}, "'person' can be a box only for 'video'"),
        ({"keypoints_size": [512]}, "keypoints_size [512] must be [width, height]"),
        ({"keypoints_size": [512, 0]}, "keypoints_size [512, 0] must be [width, height]"),
        (
            {"person": 1, "pose": "a.mp4", "keypoints": None},
            "'person' describes 'keypoints' or 'video', which are",
        ),
    ],
)
def test_a_wrong_value_is_named_with_the_accepted_values(tmp_path, line, named):
    text = problems(tmp_path, entry(**line))
    assert named in text
    assert "manifest.jsonl:1:" in text


def test_all_problems_are_reported_at_once_with_their_lines(tmp_path):
    text = problems(
        tmp_path,
        entry(),
        "{broken",
        entry(),
        '["a list"]',
        entry(id="b", seed="x", fps=-1),
        '{"id": "c", "id": "d", "image": "a.png", "keypoints": "a.json"}',
    )
    found = text.splitlines()
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in found] == ["2", "3", "4", "5", "5", "6"]
    assert "line 1 already has the id" in text
    assert "field 'id' is given twice" in text


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_holds_nothing_usable_is_refused(tmp_path, content):
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="manifest"):
        read_entries(path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"nowhere\.jsonl cannot be read"):
        read_entries(tmp_path / "nowhere.jsonl")


def person(num_frames: int = 6, seed: int = 0) -> KeypointSequence:
    """A standing person whose arms move at random, in a frame of 200x300 pixels."""
    generator = np.random.default_rng(seed)
    keypoints = np.zeros((num_frames, NUM_KEYPOINTS, 3), dtype=np.float32)
    heights = [.2, .3, .3, .42, .5, .3, .42, .5, .55, .7, .85, .55, .7, .85, .18, .18, .19, .19]  # fmt: skip
    columns = [.5, .5, .42, .38, .36, .58, .62, .64, .45, .45, .45, .55, .55, .55, .48, .52, .46, .54]  # fmt: skip
    keypoints[:, :18, 0], keypoints[:, :18, 1] = columns, heights
    keypoints[:, 18:, :2] = generator.uniform(0.3, 0.7, (NUM_KEYPOINTS - 18, 2))
    for joint in (3, 4, 6, 7):
        keypoints[:, joint, :2] += generator.normal(0, 0.05, (num_frames, 2))
    keypoints[..., 2] = 1.0
    return KeypointSequence(keypoints, width=200, height=300, fps=8.0)


def moved(
    sequence: KeypointSequence, scale: float, shift: tuple[float, float], size: tuple[int, int]
) -> KeypointSequence:
    """The same person seen at another scale and place in a frame of another size, in pixels."""
    points = sequence.keypoints.astype(np.float64)
    points[..., :2] = (points[..., :2] * [sequence.width, sequence.height] * scale + shift) / size
    return KeypointSequence(points.astype(np.float32), *size, fps=sequence.fps)


def test_a_sequence_is_fitted_exactly_to_the_same_body_at_another_scale_and_place():
    driving = person()
    reference = moved(driving, 0.6, (35.0, 80.0), (256, 384))
    np.testing.assert_allclose(align_keypoints(driving, reference), reference.keypoints, atol=1e-6)


def test_a_skeleton_that_fits_already_does_not_move():
    driving = person()
    np.testing.assert_allclose(align_keypoints(driving, driving), driving.keypoints, atol=1e-6)


def test_movement_is_kept_and_does_not_reduce_the_scale():
    driving = person()
    bouncing = driving.keypoints.copy()
    bounce = 0.1 * np.sin(np.linspace(0, 2 * np.pi, len(bouncing), endpoint=False)).astype(np.float32)
    bouncing[..., 1] += bounce[:, None]
    aligned = align_keypoints(KeypointSequence(bouncing, 200, 300, 8.0), moved(driving, 0.5, (0, 0), (200, 300)))
    np.testing.assert_allclose(aligned[:, 1, 1] - aligned[:, 1, 1].mean(), 0.5 * bounce, atol=1e-6)


def test_invisible_points_do_not_count():
    driving = person()
    reference = moved(driving, 0.6, (35.0, 80.0), (256, 384))
    broken = reference.keypoints.copy()
    broken[:, [9, 10, 12, 13]] = [9.0, -7.0, 0.1]
    aligned = align_keypoints(driving, KeypointSequence(broken, 256, 384, 8.0))
    np.testing.assert_allclose(aligned, reference.keypoints, atol=1e-6)


def test_a_body_that_cannot_be_compared_is_refused():
    driving = person()
    unseen = driving.keypoints.copy()
    unseen[..., 2] = 0.0
    with pytest.raises(AlignmentError, match="no frame of the driving sequence shows more than 0 of the body joints"):
        align_keypoints(driving, KeypointSequence(unseen, 200, 300, 8.0))
    upside_down = driving.keypoints.copy()
    upside_down[..., 1] = 1 - upside_down[..., 1]
    with pytest.raises(AlignmentError, match="scaled by -"):
        align_keypoints(driving, KeypointSequence(upside_down, 200, 300, 8.0))
