"""Inputs of the pipelines: every form of a picture, cut as in `animate`, at the size of the trained networks."""

import json
import logging
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support.recipes import EMBEDDING_WIDTH
from support.tiny_pipelines import random_pictures, tiny_animation_pipeline, tiny_geometry_pipeline
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dreamdance.errors import CheckpointError
from dreamdance.inference.entry_inputs import Size, load_inputs
from dreamdance.inference.manifest import ManifestEntry
from dreamdance.media.keypoints import NUM_KEYPOINTS, KeypointSequence, write_keypoint_file
from dreamdance.media.transforms import encode_normals, resize_images, resize_normals
from dreamdance.pipelines import AnimationPipeline, DreamDancePipeline, GeometryPipeline
from dreamdance.pipelines.drawing_sizes import DrawingSizeWarning
from dreamdance.pipelines.inputs import clip_tensor, cut_to_aspect, image_tensor
from dreamdance.runs.exports import find_export

HEIGHT, WIDTH = 24, 16
NAMES = {GeometryPipeline: tiny_geometry_pipeline, AnimationPipeline: tiny_animation_pipeline}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_arrays_of_bytes_of_16_bits_and_of_floats_are_the_same_reference_as_the_picture():
    shades = pixels(5, 4, 3)
    expected = image_tensor(Image.fromarray(shades))
    for array in (shades, shades.astype(np.uint16) * 257, shades / 255, (shades / 255).astype(np.float32)):
        for image in (array, array[None], [array], (array,)):
            torch.testing.assert_close(image_tensor(image), expected, rtol=0, atol=1e-7)
    stacked = pixels(2, 5, 4, 3)
    assert torch.equal(image_tensor(stacked), image_tensor([Image.fromarray(shades) for shades in stacked]))
    assert torch.equal(image_tensor(list(image_tensor(stacked))), image_tensor(stacked)), "a list of tensors"


def test_arrays_of_frames_and_of_clips_are_the_same_poses_as_the_pictures():
    clips = pixels(2, 3, 5, 4, 3)
    pictures = [[Image.fromarray(frame) for frame in clip] for clip in clips]
    expected = clip_tensor(pictures, "poses")
    for poses in (clips, list(clips), [list(clip) for clip in clips], clips / 255):
        torch.testing.assert_close(clip_tensor(poses, "poses"), expected, rtol=0, atol=1e-7)
    assert torch.equal(clip_tensor(clips[0], "poses"), expected[:1])
    assert torch.equal(clip_tensor(list(clips[0]), "poses"), expected[:1])
    gray = clip_tensor(clips[..., :1], "depths")
    assert torch.equal(gray, expected[:, :, :1].expand(-1, -1, 3, -1, -1))


def test_stage_2_accepts_the_results_of_stage_1_as_arrays_or_pictures():
    image, poses = random_pictures(3, HEIGHT, WIDTH, seed=1), random_pictures(2, 3, HEIGHT, WIDTH, seed=2)
    frames = {}
    for kind in ("np", "pil", "pt"):
        maps = tiny_geometry_pipeline()(image, poses, num_inference_steps=1, generator=seeded(), output_type=kind)
        normals = maps.normals if kind == "pil" else encode_normals(maps.normals)
        frames[kind] = tiny_animation_pipeline()(
            image, poses, normals, maps.depths, num_inference_steps=1, generator=seeded(), output_type="pt"
        ).frames
    torch.testing.assert_close(frames["np"], frames["pt"], rtol=0, atol=1e-5)
    assert (frames["pil"] - frames["pt"]).abs().mean() < 2e-2, "except for rounding to bytes"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pixels(5, 4), r"image: an array must be of shape H W 3 .*not \(5, 4\)"),
        (pixels(5, 4, 4), r"not \(5, 4, 4\); give others as PIL pictures"),
        (pixels(5, 4, 3).astype(np.int64), "image: an array must hold uint8, uint16, or floats in .*, not int64"),
        (pixels(5, 4, 3).astype(np.float32), r"image must lie in \[0, 1\], but its values are from 4 to 248"),
        (np.full((5, 4, 3), -0.5), r"image must lie in \[0, 1\], but its values are from -0.5"),
        (np.full((5, 4, 3), np.nan), "but its values are from nan to nan"),
        ([pixels(5, 4, 3), pixels(4, 4, 3)], r"image must all be of one size .* are \(3, 4, 4\), \(3, 5, 4\)"),
        ([], "image is empty: at least one picture is needed"),
        ("a.png", r"image must be pictures \(PIL\), arrays or tensors, or lists of them, not <class 'str'>"),
        (Image.fromarray(np.full((5, 4), 7.0, np.float32)), r"a picture given as image holds floats from 7 to 7"),
    ],
)  # fmt: skip
def test_an_input_that_is_no_picture_is_refused_by_name(image, message):
    with pytest.raises(ValueError, match=message):
        image_tensor(image)


def test_clips_of_unequal_length_are_refused():
    frames = [Image.new("RGB", (4, 5))] * 3
    with pytest.raises(
        ValueError, match=r"poses must all be of one size and length; .* \(2, 3, 5, 4\), \(3, 3, 5, 4\)"
    ):
        clip_tensor([frames, frames[:2]], "poses")


def test_a_sideways_photograph_and_a_cut_out_mean_the_same_as_in_a_file(tmp_path):
    shades = pixels(6, 4, 4)
    shades[..., 3] = np.where(pixels(6, 4) > 127, 255, 0)
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(shades).save(tmp_path / "a.png", exif=tags)
    write_keypoint_file(tmp_path / "a.json", KeypointSequence(np.full((1, NUM_KEYPOINTS, 3), 0.5), 6, 4, 8.0))
    entry = ManifestEntry(id="a", image=tmp_path / "a.png", keypoints=tmp_path / "a.json")
    file = load_inputs(entry, aspect=Size(6, 4), pose_sizes=set()).reference
    with Image.open(tmp_path / "a.png") as picture:
        assert torch.equal(image_tensor(picture)[0], file)
    assert file.shape == (3, 4, 6)
    upright = np.rot90(shades, -1)
    assert (file.permute(1, 2, 0)[torch.from_numpy(upright[..., 3] == 0)] == 1).all(), (
        "white, whatever the hidden colour"
    )


def test_transparent_parts_of_maps_get_the_background_of_an_empty_map():
    nothing = Image.new("RGBA", (4, 5), (255, 0, 255, 0))
    for name, colour in (("poses", (0, 0, 0)), ("depths", (0, 0, 0)), ("normals", (128, 128, 255))):
        found = clip_tensor([nothing], name)[0, 0, :, 0, 0] * 255
        torch.testing.assert_close(found, torch.tensor(colour, dtype=torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [GeometryPipeline, AnimationPipeline])
@pytest.mark.parametrize(("height", "width"), [(48, 50), (50, 24)])
def test_pictures_of_another_aspect_are_cut_and_never_squeezed(kind, height, width):
    """The result equals that for the middle of the pictures: 48 x 32 of 48 x 50, 36 x 24 of 50 x 24."""
    top, left = ((0, 9), (7, 0))[width == 24]
    middle = (..., slice(top, height - top), slice(left, width - left))
    image = random_pictures(3, height, width, seed=1)
    maps = [random_pictures(2, 3, height, width, seed=seed) for seed in range(1 if kind is GeometryPipeline else 3)]
    pipeline = NAMES[kind]()
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "output_type": "latent"}
    whole = pipeline(image, *maps, generator=seeded(), **options)
    cut = pipeline(image[middle], *(frames[middle] for frames in maps), generator=seeded(), **options)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_cut_is_the_one_that_animate_makes(tmp_path):
    write_keypoint_file(tmp_path / "a.json", KeypointSequence(np.full((1, NUM_KEYPOINTS, 3), 0.5), 8, 8, 8.0))
    for height, width in ((31, 47), (101, 67), (47, 31), (50, 33), (33, 50), (40, 60)):
        shades = pixels(height, width, 3)
        Image.fromarray(shades).save(tmp_path / "a.png")
        entry = ManifestEntry(id="a", image=tmp_path / "a.png", keypoints=tmp_path / "a.json")
        command = load_inputs(entry, aspect=Size(WIDTH, HEIGHT), pose_sizes=set()).reference
        assert torch.equal(cut_to_aspect(image_tensor(shades), HEIGHT, WIDTH)[0], command)
        assert torch.equal(cut_to_aspect(command, HEIGHT, WIDTH), command), "a second cut changes nothing"


def test_maps_of_nearly_the_result_s_aspect_are_kept_whole():
    """Stage 1's size is a multiple of its autoencoder's factor, so its aspect may differ a little."""
    pipeline, image = tiny_animation_pipeline(), random_pictures(3, HEIGHT, WIDTH, seed=1)
    poses, normals, depths = (random_pictures(2, 3, HEIGHT, WIDTH, seed=seed) for seed in range(3))
    narrow = [resize_images(frames, 100, 65) for frames in (normals, depths)]
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "output_type": "latent"}
    by_pipeline = pipeline(image, poses, *narrow, generator=seeded(), **options).frames
    whole = resize_normals(narrow[0], HEIGHT, WIDTH), resize_images(narrow[1], HEIGHT, WIDTH)
    by_hand = pipeline(image, poses, *whole, generator=seeded(), **options).frames
    assert torch.equal(by_pipeline, by_hand)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One export of each stage, trained at 24x16 pixels."""
    folders = {}
    for kind, make in NAMES.items():
        folders[kind] = tmp_path_factory.mktemp("exports") / kind.__name__
        pipeline = make()
        pipeline.register_to_config(default_height=HEIGHT, default_width=WIDTH)
        pipeline.save_pretrained(folders[kind])
    return folders


def test_the_size_by_default_is_the_one_the_export_was_trained_at(exports, caplog):
    image, poses = random_pictures(3, 60, 60, seed=1), random_pictures(2, 3, 48, 32, seed=2)
    with caplog.at_level(logging.WARNING):
        geometry = GeometryPipeline.from_pretrained(exports[GeometryPipeline])
        animation = AnimationPipeline.from_pretrained(exports[AnimationPipeline])
    assert "default_height" not in caplog.text
    for pipeline in (geometry, animation):
        assert (pipeline.config.default_height, pipeline.config.default_width) == (HEIGHT, WIDTH)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    maps = geometry(image, poses, **options)
    assert maps.depths.shape == (1, 2, 1, HEIGHT, WIDTH)
    assert animation(image, poses, encode_normals(maps.normals), maps.depths, **options).frames.shape[-2:] == (24, 16)
    assert geometry(image, poses, height=16, width=16, **options).depths.shape[-2:] == (16, 16)


def test_both_stages_joined_saved_and_loaded_know_both_sizes(exports, tmp_path):
    geometry = GeometryPipeline.from_pretrained(exports[GeometryPipeline])
    animation = AnimationPipeline.from_pretrained(exports[AnimationPipeline])
    animation.register_to_config(default_height=48, default_width=32)
    DreamDancePipeline.from_stages(geometry, animation).save_pretrained(tmp_path)
    joined = DreamDancePipeline.from_pretrained(tmp_path)
    image, poses = random_pictures(3, 48, 48, seed=1), random_pictures(2, 3, 48, 48, seed=2)
    output = joined(image, poses, num_inference_steps=1, output_type="pt", generator=seeded())
    assert output.frames.shape[-2:] == (48, 32)
    assert output.normals.shape[-2:] == output.depths.shape[-2:] == (24, 16)
    # Stage 1 used the same part of the picture as stage 2.
    middle = (slice(None), slice(None), slice(None), slice(8, 40))
    alone = geometry(image[None][middle], poses[middle], num_inference_steps=1, output_type="pt", generator=seeded())
    assert torch.equal(alone.depths, output.depths)
    with pytest.raises(
        ValueError, match=r"geometry_width x geometry_height 24x24 has another aspect ratio than .* 32x48"
    ):
        joined(image, poses, geometry_height=24, geometry_width=24)


def test_without_a_recorded_size_the_stages_take_the_reference_s_and_both_together_ask_for_stage_1_s(exports, tmp_path):
    """Changes an export to the form of earlier versions: a class without its module, and no size."""
    image, poses = random_pictures(3, HEIGHT, WIDTH, seed=1), random_pictures(2, 3, 48, 32, seed=2)
    stages = []
    for kind, folder in exports.items():
        older = tmp_path / kind.__name__
        older.mkdir()
        index = json.loads((folder / "model_index.json").read_text())
        del index["default_height"], index["default_width"]
        (older / "model_index.json").write_text(json.dumps({**index, "_class_name": kind.__name__}))
        for part in folder.iterdir():
            if part.is_dir():
                (older / part.name).symlink_to(part)
        stages.append(kind.from_pretrained(older))
        assert find_export(str(older), tmp_path, kind, key="from") == older
        assert type(DiffusionPipeline.from_pretrained(older)) is kind
    maps = stages[0](image, poses, num_inference_steps=1, output_type="pt")
    assert maps.depths.shape[-2:] == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="does not contain the size at which it was trained: give geometry_height and"):
        DreamDancePipeline.from_stages(*stages)(image, poses)


def test_a_recorded_size_that_is_no_number_is_refused_as_a_component_would_be(exports, tmp_path):
    folder = exports[GeometryPipeline]
    assert find_export(str(folder), tmp_path, GeometryPipeline, key="geometry_from") == folder
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "default_height": ["os", "system"]}))
    with pytest.raises(CheckpointError, match=r"geometry_from: .* takes 'default_height' from \['os', 'system'\]"):
        find_export(str(tmp_path), tmp_path, GeometryPipeline, key="geometry_from")


def test_pose_drawings_of_another_resolution_than_the_training_s_give_one_warning(exports):
    geometry = GeometryPipeline.from_pretrained(exports[GeometryPipeline])
    animation = AnimationPipeline.from_pretrained(exports[AnimationPipeline])
    joined = DreamDancePipeline.from_stages(geometry, animation)
    image, maps = random_pictures(3, HEIGHT, WIDTH, seed=1), random_pictures(2, 3, HEIGHT, WIDTH, seed=2)

    def warnings_of(pipeline, drawn_height, drawn_width, *others, **size) -> list[str]:
        poses = random_pictures(2, 3, drawn_height, drawn_width, seed=3)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            pipeline(image, poses, *others, num_inference_steps=1, output_type="pt", **size)
        own = [entry for entry in given if entry.category is DrawingSizeWarning]
        assert all(entry.filename == __file__ for entry in own), "the warning is one of the user's line"
        return [str(entry.message) for entry in own]

    expected = (
        "the pose drawings have 32x48 pixels, and the networks were trained at 16x24. Limbs that a program draws with "
        "a constant width in pixels, as DWPose's does, are then 2.0 times thinner than in drawings of that size, and "
        "the networks may not know them. Draw at 16x24 pixels, or let this project draw key points ('keypoints' of a "
        "manifest, or `dreamdance.media.pose_drawing.draw_poses`)"
    )
    assert warnings_of(animation, 48, 32, maps, maps) == warnings_of(joined, 48, 32) == [expected]
    # the size of the result does not count
    assert warnings_of(animation, 48, 32, maps, maps, height=48, width=32) == [expected]
    for pipeline, others in [(animation, (maps, maps)), (geometry, ()), (joined, ())]:
        assert warnings_of(pipeline, HEIGHT, WIDTH, *others) == []
        (smaller,) = warnings_of(pipeline, 12, 8, *others)
        assert smaller == expected.replace("32x48", "8x12").replace("thinner", "thicker")
    assert warnings_of(geometry, 48, 32) == []  # stage 1 was trained on drawings of stage 2's size, reduced
    animation.register_to_config(default_height=None, default_width=None)
    assert warnings_of(animation, 48, 32, maps, maps, height=HEIGHT, width=WIDTH) == []  # an older export


def test_an_image_encoder_whose_file_is_of_half_precision_is_in_float32_by_default(tmp_path):
    """Where transformers 5 is installed, it would have the type of the file."""
    saved = tiny_geometry_pipeline()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, projection_dim=EMBEDDING_WIDTH
    )
    saved.register_modules(image_encoder=CLIPVisionModelWithProjection(vision).half())
    saved.save_pretrained(tmp_path)
    for asked, expected in [({}, torch.float32), ({"torch_dtype": torch.bfloat16}, torch.bfloat16)]:
        loaded = GeometryPipeline.from_pretrained(tmp_path, **asked)
        assert (loaded.image_encoder.dtype, loaded.unet.dtype) == (expected, expected)


@pytest.mark.parametrize("kind", [GeometryPipeline, AnimationPipeline])
def test_diffusers_own_entry_loads_an_export(exports, kind, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = DiffusionPipeline.from_pretrained(exports[kind])
    assert type(loaded) is kind
    assert loaded.config.default_height == HEIGHT
    own = kind.from_pretrained(exports[kind])
    assert set(loaded.components) == set(own.components)
    assert all(torch.equal(value, own.unet.state_dict()[name]) for name, value in loaded.unet.state_dict().items())


@pytest.mark.parametrize("kind", [GeometryPipeline, AnimationPipeline])
def test_where_this_package_is_not_imported_diffusers_error_names_the_class_to_use(exports, kind, monkeypatch):
    for name in (f"dreamdance.pipelines.{kind.__name__}", kind.__name__):
        monkeypatch.delattr(diffusers, name)
    with pytest.raises(AttributeError, match=rf"has no attribute dreamdance\.pipelines\.{kind.__name__}$"):
        DiffusionPipeline.from_pretrained(exports[kind])
