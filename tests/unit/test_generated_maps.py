"""Maps of a trained stage 1: made once by `task: encode`, read by the training of stage 2 in place of the true ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.dancer_shards import NUM_FRAMES, write_dancer_shards
from support.recipes import HEIGHT, WIDTH, record_inputs, tiny_stage2_recipe
from support.tiny_pipelines import tiny_geometry_pipeline

from dreamdance.data.loading.batch import collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import SampleKey
from dreamdance.data.loading.stored_clip import ReferenceFrame, Window, fixed_reference
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.errors import RecipeError, ShardError, UserError
from dreamdance.media.cropping import Crop, PartialCrop
from dreamdance.media.transforms import flip_map
from dreamdance.pipelines import GeometryPipeline
from dreamdance.recipe import rules
from dreamdance.recipe.encode_recipe import EncodeRecipe
from dreamdance.recipe.sections import Shards
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.sample_random import sample_generator
from dreamdance.training.encoding.encode import encode
from dreamdance.training.encoding.fit import require_fitting_maps
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import make_loader

SIZE = {"width": WIDTH // 2, "height": HEIGHT // 2}
SAMPLING = {"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1}
REFERENCES = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three clips with two references each, and an export of stage 1."""
    folder = tmp_path_factory.mktemp("data")
    write_dancer_shards(folder, num_train=3, num_validation=1, references=REFERENCES)
    tiny_geometry_pipeline().save_pretrained(folder / "runs" / "geometry" / "exports" / "step_00000004")
    return folder


def maps_recipe(data: Path, output: Path, **changes) -> EncodeRecipe:
    values = {
        "task": "encode",
        "name": "maps",
        "shards": {"local": str(data / "train")},
        "output": str(output),
        "geometry_from": "geometry",
        "geometry": SAMPLING,
        "precision": "fp32",
        "clips_per_part": 1,
        **SIZE,
        **changes,
    }
    return EncodeRecipe.model_validate_json(json.dumps(values))


@pytest.fixture(scope="module")
def maps(data) -> Path:
    encode(maps_recipe(data, data / "maps"), data / "runs" / "maps")
    return data / "maps"


def training(data: Path, maps: Path, changes: dict | None = None):
    shards = {f"data.{name}": {"local": str(data / name)} for name in ("train", "validation")}
    return tiny_stage2_recipe(
        {**shards, "data.maps": {"local": str(maps)}, "objective.reference_first": True, **(changes or {})}
    )


def test_stored_maps_are_those_of_the_pipeline_on_poses_and_the_farthest_reference(data, maps):
    pipeline = GeometryPipeline.from_pretrained(data / "runs" / "geometry" / "exports" / "step_00000004")
    pipeline.set_progress_bar_config(disable=True)
    clips = ClipDataset(Shards(local=str(data / "train")), num_frames=1, **SIZE)
    stored, clip = StoredClips(Shards(local=str(maps))).generated(2), clips.clip(2)
    assert (stored.clip_id, stored.num_frames) == (clip.clip_id, NUM_FRAMES)
    cases = [("clip", "generated maps", range(NUM_FRAMES), fixed_reference(clip))]
    cases += [
        ("references", f"generated maps of reference {n}", [n], ReferenceFrame(n, "references")) for n in range(2)
    ]
    for subject, purpose, indices, reference in cases:
        frames = list(range(NUM_FRAMES)) if subject == "clip" else []
        window = Window(frames=frames, stride=1, reference=reference, flip=False, reference_first=subject != "clip")
        batch = collate_clips([clips.cut(clip, window, (0, 0, 2))]).to("cpu")
        expected = pipeline(
            batch.reference,
            batch.pose,
            guidance_scales=(2.5, 1.0, 1.5),
            generator=sample_generator((0, 0, 2), purpose),
            output_type="pt",
            **SIZE,
            **SAMPLING,
        )
        normals = stored.pictures("normal", list(indices), subject=subject).astype(np.float64) / 127.5 - 1
        depths = stored.pictures("depth", list(indices), subject=subject).astype(np.float64) / 65535
        np.testing.assert_allclose(normals, expected.normals[0].permute(0, 2, 3, 1), rtol=0, atol=0.51 / 127.5)
        np.testing.assert_allclose(depths, expected.depths[0].permute(0, 2, 3, 1), rtol=0, atol=0.51 / 65535)


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_reads_them_in_place_of_the_true_maps(data, maps, flip):
    recipe = training(data, maps, {"data.flip_probability": float(flip)})
    require_fitting_maps(recipe)
    dataset = make_loader(stage_of(recipe), Ranks()).dataset
    key = SampleKey(0, 1)
    sample, true = dataset.training_sample(key), make_loader(stage_of(without_maps(recipe)), Ranks()).dataset
    other = true.training_sample(key)
    assert torch.equal(sample.maps["pose"], other.maps["pose"])
    stored = dataset._generated.generated(1)
    for name, kind, largest in (("normal", "normals", 255), ("depth", "values", 65535)):
        assert sample.maps[name].shape == (recipe.data.num_frames, 3, *reversed(SIZE.values()))
        candidates = [
            torch.from_numpy(stored.pictures(name, [n], subject="references").astype(np.float32) / largest)
            .permute(0, 3, 1, 2)
            .expand(1, 3, -1, -1)[0]
            for n in range(REFERENCES)
        ]
        candidates = [flip_map(each, kind=kind) if flip else each for each in candidates]
        assert min((sample.maps[name][0] - each).abs().max() for each in candidates) < 1e-2
    objective = stage_of(recipe).build()
    seen = record_inputs(objective.controller)
    objective(collate_clips([sample]))
    objective(collate_clips([other]))
    (first, *_), (second, *_) = (arguments for arguments, _ in seen)
    assert not torch.equal(first["depth"], second["depth"])


def without_maps(recipe):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"maps": None})})


def test_a_killed_job_continues_with_the_same_maps_and_another_stage_1_is_refused(data, maps, tmp_path):
    before = {path.name: path.read_bytes() for path in maps.iterdir() if path.is_file()}
    (shard,) = [name for name in before if name.endswith(".mds")][-1:]
    (maps / shard).unlink()
    encode(maps_recipe(data, maps), data / "runs" / "maps")
    assert {path.name: path.read_bytes() for path in maps.iterdir() if path.is_file()} == before
    tiny_geometry_pipeline(seed=1).save_pretrained(data / "runs" / "other" / "exports" / "step_00000004")
    with pytest.raises(ShardError, match="geometry"):
        encode(maps_recipe(data, maps, geometry_from="other"), data / "runs" / "maps")


def test_maps_of_other_shards_or_sizes_and_sets_without_maps_are_refused_by_name(data, maps, tmp_path):
    with pytest.raises(
        UserError, match=r"objective.geometry_width is 16, the maps are of 8.*encode_maps.yaml output=..."
    ):
        require_fitting_maps(training(data, maps, {"objective.geometry_width": 16, "objective.geometry_height": 24}))
    with pytest.raises(UserError, match=r"the shards data.train.local is \w+, the maps are of \w+"):
        require_fitting_maps(
            training(
                data,
                maps,
                {"data.train": {"local": str(data / "validation")}, "data.validation": {"local": str(data / "train")}},
            )
        )
    with pytest.raises(ShardError, match=r"lists no generated maps; a recipe with `task: encode` and geometry_from"):
        require_fitting_maps(training(data, data / "validation"))


def test_crops_are_refused_because_they_would_shift_maps_against_pictures(data, maps):
    part = PartialCrop(0.95, x=0.5, y=0.0)
    # 512 x 0.95**0.5 = 499.03 and (512 - 499 + 1) / 2 = 7; 256 x 0.95**0.5 = 249.5 and (256 - 250 + 1) / 2 = 3.5
    picture, smaller = part.of(Crop(0, 0, 512, 768)), part.of(Crop(0, 0, 256, 384))
    assert (picture.left, picture.width, 2 * smaller.left, 2 * smaller.width) == (7, 499, 6, 500)
    recipe = training(data, maps)
    cropping = recipe.model_copy(update={"data": recipe.data.model_copy(update={"crop_scale": (0.9, 1.0)})})
    (problem,) = rules.problems(cropping)
    assert problem.message.startswith("data.crop_scale [0.9, 1] would shift data.maps against the pictures")
    assert list(rules.problems(recipe)) == list(rules.problems(without_maps(cropping))) == []


def test_recipes_that_mix_latents_and_maps_are_refused(data, tmp_path):
    (problem,) = rules.problems(maps_recipe(data, tmp_path, stage="stage2"))
    assert "stage describes latents, but with geometry_from maps are stored" in problem.message
    (problem,) = rules.problems(maps_recipe(data, tmp_path, flip=True))
    assert "flip describes latents" in problem.message
    (problem,) = rules.problems(maps_recipe(data, tmp_path, geometry_from=None))
    assert problem.message.startswith("stage and model missing, for latents; or geometry_from")
    with pytest.raises(RecipeError, match=r"geometry.window_frames 17 is more than the 16 frames"):
        encode(maps_recipe(data, tmp_path, geometry={**SAMPLING, "window_frames": 17}), data / "runs" / "maps")
