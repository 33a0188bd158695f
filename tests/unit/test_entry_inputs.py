"""Inputs of a manifest's entry: upright, cut to the aspect of the result, drawn and resized from the original."""

import hashlib
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.fault_log import record_fault

from dreamdance.inference import entry_inputs
from dreamdance.inference.entry_inputs import EntryError, Size, load_inputs, read_entry_states
from dreamdance.inference.manifest import Alignment, ManifestEntry
from dreamdance.media import pictures
from dreamdance.media.keypoints import NUM_KEYPOINTS, KeypointSequence, write_keypoint_file
from dreamdance.media.pictures import PictureError
from dreamdance.media.pose_drawing import draw_pose
from dreamdance.media.video import write_video

SQUARE = Size(16, 16)
ORIENTATION = 0x0112


def sequence(num_frames: int = 3, *, width: int = 40, height: int = 60, fps: float = 7.5) -> KeypointSequence:
    points = np.random.default_rng(0).uniform(0.2, 0.8, (num_frames, NUM_KEYPOINTS, 3)).astype(np.float32)
    points[..., 2] = 1.0
    return KeypointSequence(points.round(6), width, height, fps)


@pytest.fixture
def entry(tmp_path: Path) -> ManifestEntry:
    """A reference of 40x60 pixels, upper half red, and key points of three frames of that size."""
    picture = np.zeros((60, 40, 3), dtype=np.uint8)
    picture[:30, :, 0] = 255
    Image.fromarray(picture).save(tmp_path / "reference.png")
    write_keypoint_file(tmp_path / "keypoints.json", sequence())
    return ManifestEntry(id="a", image=tmp_path / "reference.png", keypoints=tmp_path / "keypoints.json")


def changed(entry: ManifestEntry, **changes: object) -> ManifestEntry:
    return ManifestEntry(**{**entry.__dict__, **changes})


def test_margins_go_evenly_and_only_the_proportion_of_the_aspect_counts(entry: ManifestEntry) -> None:
    for aspect in (SQUARE, Size(1000, 1000)):
        loaded = load_inputs(entry, aspect=aspect, pose_sizes=set())
        assert loaded.reference.shape == (3, 40, 40)
        assert (loaded.reference[0, :20] == 1).all()  # ten rows went above, ten below
        assert (loaded.reference[0, 20:] == 0).all()
    assert load_inputs(entry, aspect=Size(2, 3), pose_sizes=set()).reference.shape == (3, 60, 40)
    assert load_inputs(entry, aspect=Size(1, 3), pose_sizes=set()).reference.shape == (3, 60, 20)


@pytest.mark.parametrize(
    ("drawn", "trained", "words"),
    [
        (
            (40, 60),
            Size(20, 30),
            "have 40x60 pixels, and {} were trained at 20x30. {} 2.0 times thinner {} Draw at 20x30",
        ),
        (
            (12, 18),
            Size(20, 30),
            "have 12x18 pixels, and {} were trained at 20x30. {} 1.7 times thicker {} Draw at 20x30",
        ),
        ((20, 30), Size(20, 30), None),
        ((40, 60), Size(40, 60), None),  # the size of the frames does not count
        (
            (20, 30),
            Size(40, 60),
            "have 20x30 pixels, and {} were trained at 40x60. {} 2.0 times thicker {} Draw at 40x60",
        ),
        # the short side of the part that is shown counts
        (
            (90, 60),
            Size(30, 20),
            "have 90x60 pixels, of which 40x60 are shown, and {} 2.0 times thinner {} Draw at 45x30",
        ),
        ((40, 60), None, "the frames have 20x30 (the export is older and lacks {} 2.0 times thinner {} at 20x30"),
        ((20, 30), None, None),
    ],
)
def test_drawings_much_larger_or_smaller_than_those_of_the_training_give_a_warning(
    entry, tmp_path, caplog, drawn, trained, words
) -> None:
    """Limbs of 4 pixels on a picture of 40 that is reduced to 20 are 2 pixels wide: half of those drawn at 20."""
    write_video(tmp_path / "pose.mkv", np.zeros((2, drawn[1], drawn[0], 3), np.uint8), fps=8.0, lossless=True)
    options = {"aspect": Size(20, 30), "pose_sizes": {SQUARE}, "trained": trained}
    load_inputs(changed(entry, keypoints=None, pose=tmp_path / "pose.mkv"), **options)
    assert len(caplog.messages) == (words is not None)
    if words is not None:
        assert caplog.messages[0].startswith(f"'a': the drawings of {tmp_path / 'pose.mkv'} have ")
        assert re.search(".*".join(map(re.escape, words.split(" {} "))), caplog.messages[0])
    load_inputs(entry, **{**options, "aspect": Size(10, 15)})  # key points are drawn to scale
    assert len(caplog.messages) == (words is not None)


def test_a_photograph_with_an_orientation_is_turned_upright(entry: ManifestEntry, tmp_path: Path) -> None:
    with Image.open(entry.image) as upright:
        tags = Image.Exif()
        tags[ORIENTATION] = 6  # must be turned by 90 degrees clockwise
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=tags)
    straight = load_inputs(entry, aspect=Size(2, 3), pose_sizes=set()).reference
    turned = load_inputs(changed(entry, image=tmp_path / "sideways.png"), aspect=Size(2, 3), pose_sizes=set()).reference
    assert torch.equal(turned, straight)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_references_of_any_mode_have_three_channels(entry: ManifestEntry, tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("other.jpg" if mode == "CMYK" else "other.png")
    Image.new("RGB", (40, 60), (255, 255, 255)).convert(mode).save(path)
    reference = load_inputs(changed(entry, image=path), aspect=Size(2, 3), pose_sizes=set()).reference
    assert reference.shape == (3, 60, 40)
    assert reference.min() > 0.98


def test_pictures_that_cannot_be_read_or_are_too_large_are_named(
    entry: ManifestEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(entry.image.read_bytes()[:-30])
    for path in (text, cut, tmp_path / "nothing.png"):
        with pytest.raises(
            PictureError, match=rf"{path.name} is no picture that can be read \(PNG, JPEG, WEBP, BMP, TIFF are\)"
        ):
            load_inputs(changed(entry, image=path), aspect=SQUARE, pose_sizes=set())
    monkeypatch.setattr(pictures, "MAX_PICTURE_PIXELS", 2399)
    with pytest.raises(PictureError, match=r"reference\.png is 40x60: pictures of up to 2399 pixels are accepted"):
        load_inputs(entry, aspect=SQUARE, pose_sizes=set())


def claim_size(path: Path, side: int) -> None:
    """Writes a width and height into the header of a PNG or JPEG."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".png":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", min(side, 65_500), min(side, 65_500))
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("side", [9_000, 100_000])
def test_a_decompression_bomb_is_refused_by_its_header(
    entry: ManifestEntry, tmp_path: Path, suffix: str, side: int
) -> None:
    path = tmp_path / f"bomb{suffix}"
    Image.new("RGB", (40, 60)).save(path)
    claim_size(path, side)
    with pytest.raises(
        PictureError, match=rf"bomb\{suffix}.*(pictures of up to 67108864 pixels|pixels\) exceeds)"
    ) as raised:
        load_inputs(changed(entry, image=path), aspect=SQUARE, pose_sizes=set())
    record_fault(
        "reference picture is a decompression bomb",
        how=f"the header of a small {suffix[1:]} claims {side}x{side}",
        promised="refused because of the header alone; the other entries continue",
        happened=str(raised.value),
    )


def test_a_picture_that_is_a_program_is_not_run(entry: ManifestEntry, tmp_path: Path) -> None:
    """EPS is a programming language; Pillow would hand it to Ghostscript."""
    path = tmp_path / "program.png"
    Image.new("RGB", (40, 60)).save(path, format="EPS")
    with Image.open(path) as picture:
        assert picture.format == "EPS"
    with pytest.raises(
        PictureError, match=r"program\.png is no picture that can be read \(PNG, JPEG.*cannot identify image file"
    ):
        load_inputs(changed(entry, image=path), aspect=SQUARE, pose_sizes=set())


def test_key_points_are_drawn_at_their_own_size_then_cut_and_resized_for_each_stage(entry: ManifestEntry) -> None:
    whole, half = Size(40, 60), Size(20, 30)
    loaded = load_inputs(entry, aspect=whole, pose_sizes={whole, half})
    assert loaded.fps == 7.5
    assert set(loaded.poses) == {whole, half}
    assert loaded.poses[half].shape == (3, 3, 30, 20)
    for frame, points in zip(loaded.poses[whole], sequence().keypoints, strict=True):
        drawing = torch.from_numpy(draw_pose(points, width=40, height=60)).permute(2, 0, 1) / 255
        torch.testing.assert_close(frame, drawing, rtol=0, atol=1e-6)
    # Halved with antialiasing: about the mean of each block of four pixels.
    blocks = loaded.poses[whole].unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
    assert (loaded.poses[half] - blocks).abs().mean() < 0.02
    square = load_inputs(entry, aspect=SQUARE, pose_sizes={Size(40, 40)}).poses[Size(40, 40)]
    torch.testing.assert_close(square, loaded.poses[whole][:, :, 10:50], rtol=0, atol=1e-6)


def test_the_frame_rate_of_an_entry_overrides_that_of_the_sequence(entry: ManifestEntry) -> None:
    assert load_inputs(changed(entry, fps=30.0), aspect=SQUARE, pose_sizes={SQUARE}).fps == 30.0


def test_a_pose_video_gives_its_frames_and_its_rate(entry: ManifestEntry, tmp_path: Path) -> None:
    shades = [40, 120, 200]
    write_video(tmp_path / "pose.mp4", [np.full((64, 64, 3), shade, np.uint8) for shade in shades], fps=10.0)
    loaded = load_inputs(changed(entry, keypoints=None, pose=tmp_path / "pose.mp4"), aspect=SQUARE, pose_sizes={SQUARE})
    assert loaded.fps == pytest.approx(10.0)
    means = loaded.poses[SQUARE].mean(dim=(1, 2, 3)) * 255
    assert means.tolist() == pytest.approx(shades, abs=6)  # the error of the codec


def test_too_long_videos_and_too_large_drawings_are_refused_before_they_fill_the_memory(
    entry: ManifestEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "pose.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3, fps=10.0)
    monkeypatch.setattr(entry_inputs, "MAX_FRAMES", 2)
    with pytest.raises(EntryError, match=r"pose\.mp4 has 3 frames; accepted are up to 2"):
        load_inputs(changed(entry, keypoints=None, pose=tmp_path / "pose.mp4"), aspect=SQUARE, pose_sizes={SQUARE})
    monkeypatch.setattr(entry_inputs, "MAX_PICTURE_PIXELS", 2400)
    write_keypoint_file(tmp_path / "large.json", sequence(width=41))
    with pytest.raises(EntryError, match=r"large\.json: frames of 41x60; accepted are up to 2400 pixels"):
        load_inputs(changed(entry, keypoints=tmp_path / "large.json"), aspect=SQUARE, pose_sizes={SQUARE})


def test_entries_that_need_more_than_the_free_memory_are_refused_before_anything_is_drawn(
    entry: ManifestEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three frames take 3 x 3 x 4 bytes for each pixel of both sizes of drawings and of the results."""
    write_video(tmp_path / "pose.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3, fps=10.0)
    needed = 36 * (16 * 16 + 16 * 16 + 8 * 8)
    asked = {"aspect": SQUARE, "pose_sizes": {SQUARE, Size(8, 8)}}
    poses = [entry, changed(entry, keypoints=None, pose=tmp_path / "pose.mp4")]
    monkeypatch.setattr(entry_inputs, "available_memory", lambda: needed)
    for given in poses:
        assert len(load_inputs(given, **asked).poses[SQUARE]) == 3
    monkeypatch.setattr(entry_inputs, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(entry_inputs, "draw_pose", None)
    for given, name in zip(poses, ("keypoints.json", "pose.mp4"), strict=True):
        with pytest.raises(EntryError, match=rf"{name}: .* 3 frames take at least .* GiB are free; divide it"):
            load_inputs(given, **asked)
    video = changed(entry, keypoints=None, video=tmp_path / "pose.mp4")  # there is no finder: it is not searched
    with pytest.raises(EntryError, match=r"of 3 frames .*; lower 'fps', or cut the video"):
        load_inputs(video, **asked)
    monkeypatch.setattr(entry_inputs, "available_memory", lambda: 0)
    with pytest.raises(EntryError, match=r"of 2 frames"):
        load_inputs(changed(video, fps=5.0), **asked)


@pytest.mark.parametrize("align", ["scale", "bones"])
def test_aligned_key_points_are_drawn_in_the_references_frame(
    entry: ManifestEntry, tmp_path: Path, align: Alignment
) -> None:
    """The same person twice as large in a frame twice as large: the aligned drawings equal those of the reference."""
    body, size = sequence(num_frames=1), Size(80, 120)
    doubled = KeypointSequence(body.keypoints, size.width, size.height, body.fps)
    write_keypoint_file(tmp_path / "body.json", doubled)
    write_keypoint_file(tmp_path / "keypoints.json", body)
    asked = changed(entry, align=align, reference_keypoints=tmp_path / "body.json")
    aligned = load_inputs(asked, aspect=size, pose_sizes={size}).poses[size]
    drawing = torch.from_numpy(draw_pose(body.keypoints[0], width=80, height=120)).permute(2, 0, 1) / 255
    assert (aligned[0] - drawing).abs().mean() < 2e-3
    unasked = load_inputs(changed(asked, align=None), aspect=size, pose_sizes={size}).poses[size]
    assert (unasked[0] - drawing).abs().mean() > 1e-2, "enlarged lines, not lines drawn at the larger size"


def test_a_folder_of_openpose_is_drawn_like_our_own_file_and_each_of_its_files_counts(
    entry: ManifestEntry, tmp_path: Path
) -> None:
    ours = sequence()
    write_keypoint_file(tmp_path / "keypoints.json", ours)
    folder = tmp_path / "openpose"
    folder.mkdir()
    for number, points in enumerate(ours.keypoints.astype(np.float64) * [ours.width, ours.height, 1]):
        left, right, face = (points[part].ravel().tolist() for part in (slice(18, 39), slice(39, 60), slice(60, 128)))
        one = {"pose_keypoints_2d": points[:18].ravel().tolist(), "hand_left_keypoints_2d": left}
        one |= {"hand_right_keypoints_2d": right, "face_keypoints_2d": face}
        (folder / f"{number:04d}_keypoints.json").write_text(json.dumps({"people": [one]}))
    size = Size(ours.width, ours.height)
    expected = load_inputs(entry, aspect=size, pose_sizes={size})
    theirs = changed(entry, keypoints=folder, keypoints_size=(ours.width, ours.height), fps=ours.fps)
    found = load_inputs(theirs, aspect=size, pose_sizes={size})
    assert torch.equal(found.poses[size], expected.poses[size])
    states = read_entry_states(theirs)
    assert set(states) == {
        "image",
        *(f"keypoints/{number:04d}_keypoints.json" for number in range(len(ours.keypoints))),
    }


def test_hashes_name_every_file_that_counts_and_change_with_its_content(entry: ManifestEntry, tmp_path: Path) -> None:
    first = {name: state.sha256 for name, state in read_entry_states(entry).items()}
    assert set(first) == {"image", "keypoints"}
    assert first["image"] == hashlib.sha256(entry.image.read_bytes()).hexdigest()
    entry.image.write_bytes(entry.image.read_bytes() + b"\0")
    second = {name: state.sha256 for name, state in read_entry_states(entry).items()}
    assert second["image"] != first["image"]
    assert second["keypoints"] == first["keypoints"]
    missing = changed(entry, image=tmp_path / "nothing")
    with pytest.raises(EntryError, match="nothing cannot be read: No such file or directory"):
        read_entry_states(missing)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EntryError, match="pipe cannot be read: it is not a regular file"):
        read_entry_states(changed(entry, image=tmp_path / "pipe"))
