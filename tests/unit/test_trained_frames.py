"""Windows longer than those of the training of temporal layers are refused (stage 1) or give a warning (stage 2)."""

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from support.recipes import HEIGHT, WIDTH, tiny_stage1_recipe, tiny_stage2_recipe
from support.tiny_pipelines import random_pictures

from dreamdance.errors import RecipeError
from dreamdance.inference.stages import load_stages
from dreamdance.models import SpatioTemporalControlNetModel
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.training.stages.training_stage import stage_of

IMAGE = random_pictures(3, HEIGHT, WIDTH)
ONE_STEP = {"num_inference_steps": 1, "output_type": "latent"}


def poses(num_frames: int) -> torch.Tensor:
    return random_pictures(num_frames, 3, HEIGHT, WIDTH, seed=1)


def trained(stage: int, num_frames: int) -> GeometryPipeline | AnimationPipeline:
    """The pipeline of a run with `data.num_frames`."""
    changes = {"data.num_frames": num_frames, "sampling.window_frames": 2}
    if stage == 2:
        changes["model.controls"] = ["pose"]
    recipe = tiny_stage1_recipe("temporal", changes) if stage == 1 else tiny_stage2_recipe(changes)
    pipeline = stage_of(recipe).build().make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of both stages, trained on 4 frames."""
    folder = tmp_path_factory.mktemp("exports")
    for stage in (1, 2):
        trained(stage, 4).save_pretrained(folder / f"stage{stage}")
    return folder


def remove_trained_frames(export: Path, network: str) -> None:
    """Changes an export to one of an earlier version, without the number."""
    path = export / network / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("trained_frames") == 4
    path.write_text(json.dumps(values))


def animate_recipe(exports: Path, *, geometry_frames: int = 4, animation_frames: int = 4) -> AnimateRecipe:
    return AnimateRecipe(
        task="animate",
        name="animate",
        manifest="manifest.jsonl",
        output="results",
        geometry_from=str(exports / "stage1"),
        animation_from=str(exports / "stage2"),
        geometry_width=WIDTH,
        geometry_height=HEIGHT,
        width=WIDTH,
        height=HEIGHT,
        geometry={"window_frames": geometry_frames, "window_overlap": 1},
        animation={"window_frames": animation_frames, "window_overlap": 1},
    )


def test_the_configs_contain_the_number_of_trained_frames_and_an_export_keeps_it(exports):
    geometry = GeometryPipeline.from_pretrained(exports / "stage1")
    animation = AnimationPipeline.from_pretrained(exports / "stage2")
    assert geometry.unet.config.trained_frames == animation.controlnet.config.trained_frames == 4


@pytest.mark.parametrize("train", ["domains", "geometry"])
def test_without_trained_temporal_attention_any_window_is_accepted(train):
    pipeline = stage_of(tiny_stage1_recipe(train)).build().make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.trained_frames is None
    assert pipeline(IMAGE, poses(9), window_frames=9, **ONE_STEP).normals.shape[1] == 9


def test_stage_1_refuses_longer_windows_and_accepts_longer_clips():
    pipeline = trained(1, 4)
    with pytest.raises(ValueError, match=r"windows of 5 frames .* the 4 \(data.num_frames\).*lower window_frames to 4"):
        pipeline(IMAGE, poses(5), window_frames=16, **ONE_STEP)
    assert pipeline(IMAGE, poses(4), window_frames=16, **ONE_STEP).normals.shape[1] == 4  # a short clip is one window
    assert pipeline(IMAGE, poses(9), window_frames=4, window_overlap=1, **ONE_STEP).normals.shape[1] == 9


def test_stage_2_warns_of_longer_windows_and_names_the_frames_of_svd():
    pipeline = trained(2, 2)
    with pytest.warns(UserWarning, match=r"window_frames 3 .* the 2 frames \(data.num_frames\).*SVD was made for 4"):
        pipeline(IMAGE, poses(3), window_frames=3, window_overlap=1, **ONE_STEP)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert pipeline(IMAGE, poses(3), window_frames=2, window_overlap=1, **ONE_STEP).frames.shape[1] == 3


def test_animate_refuses_or_warns_before_it_begins(exports, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "dreamdance")
    load_stages(animate_recipe(exports), tmp_path, torch.device("cpu"))
    assert not caplog.messages
    with pytest.raises(RecipeError, match=r"geometry.window_frames 5 .* 4 frames \(data.num_frames.*set geometry.win"):
        load_stages(animate_recipe(exports, geometry_frames=5), tmp_path, torch.device("cpu"))
    load_stages(animate_recipe(exports, animation_frames=6), tmp_path, torch.device("cpu"))
    (text,) = caplog.messages
    assert text.startswith("animation.window_frames 6 is more than the 4 frames (data.num_frames)")


def test_older_exports_load_and_unknown_numbers_of_frames_are_reported(exports, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "dreamdance")
    for stage, network in ((1, "unet"), (2, "controlnet")):
        trained(stage, 4).save_pretrained(tmp_path / f"stage{stage}")
        remove_trained_frames(tmp_path / f"stage{stage}", network)
    stages = load_stages(animate_recipe(tmp_path, geometry_frames=6), tmp_path, torch.device("cpu"))
    assert stages.geometry.unet.config.trained_frames is None
    assert [text.split()[0] for text in caplog.messages] == ["animation_from:", "geometry_from:"]
    assert "geometry.window_frames 6 is at most data.num_frames" in caplog.messages[1]


def test_a_controlnet_has_the_config_of_its_unet_and_the_number_of_trained_frames():
    objective = stage_of(tiny_stage2_recipe()).build()
    own, base = dict(objective.controlnet.config), dict(objective.unet.config)
    facts = ("trained_frames", "reference_first", "trained_fps", "prediction_type")
    assert [own.pop(name) for name in facts] == [4, False, None, "v_prediction"]
    hidden = ("_class_name", "_diffusers_version", "_use_default_values")
    assert {k: v for k, v in own.items() if k not in hidden} == {k: v for k, v in base.items() if k not in hidden}
    assert SpatioTemporalControlNetModel.from_unet(objective.unet).config.trained_frames is None
