"""A run that cannot start names everything that is missing at once, with the searched places and how to get it."""

import ast
from pathlib import Path

import pytest

from dreamdance.launch import preflight
from dreamdance.launch.job import ENTRIES
from dreamdance.launch.requirements import EXTRAS
from dreamdance.recipe import load_recipe
from dreamdance.runs.layout import checkpoint_folder, export_folder

RECIPES = Path("recipes")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """A checkout's recipes with nothing beside them, and no GPU."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))


def found(name, *overrides, check_gpu=True):
    recipe = load_recipe(RECIPES / name, overrides)
    return recipe, preflight.missing(recipe, RECIPES / name, Path("runs"), check_gpu=check_gpu)


def make(*files):
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")


def test_stage_2_names_weights_data_and_gpus_with_the_way_to_each_and_the_demo():
    recipe, problems = found("stage2.yaml")
    report = preflight.report(recipe, RECIPES / "stage2.yaml", Path("runs"), problems)
    folder = "weights/stable-video-diffusion-img2vid-xt-1-1"
    assert f"hf download stabilityai/stable-video-diffusion-img2vid-xt-1-1 --local-dir {folder}" in report
    assert f"{folder}/unet, {folder}/vae, {folder}/image_encoder" in report
    assert "data/dance/train/index.json" in report
    assert "python launchers/slurm.py recipes/prepare.yaml" in report
    assert "8 GPUs" in report
    assert report.endswith("python launchers/slurm.py recipes/demo/stage2.yaml --follow")


def test_a_base_model_of_the_repository_is_named_where_the_command_runs_elsewhere(monkeypatch):
    """The demo's: its recipes name it from the repository's folder."""
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    name = ROOT / "recipes/demo/stage2.yaml"
    problems = preflight.missing(load_recipe(name), name, Path("runs"), check_gpu=False)
    assert f"model.unet.path={ROOT / 'recipes/base/video'}" in str(problems[0])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("prepare.yaml", "videos"),
        ("stage1_domains.yaml", "weights for model.image_encoder"),
        ("stage1_geometry.yaml", "run 'stage1_domains' does not exist (init_from)"),
        ("animate.yaml", "run 'stage1_temporal' does not exist (geometry_from)"),
        ("evaluate.yaml", "results to score"),
    ],
)
def test_every_full_recipe_names_its_missing_parts_on_an_empty_machine(name, what):
    _, problems = found(name)
    assert what in [problem.what for problem in problems]


def test_a_missing_run_names_the_recipe_that_makes_it():
    remedies = [problem.remedy for problem in found("demo/stage1_geometry.yaml")[1]]
    assert "python launchers/slurm.py recipes/demo/stage1_domains.yaml (or give init_step)" in remedies
    remedies = [problem.remedy for problem in found("ablations/stage1_temporal_without_geometry.yaml")[1]]
    assert "python launchers/slurm.py recipes/stage1_domains.yaml (or give init_step)" in remedies
    remedies = [problem.remedy for problem in found("footage/animate.yaml")[1]]
    assert "python launchers/slurm.py recipes/footage/stage2.yaml" in remedies


def test_the_demo_needs_nothing_but_its_data():
    assert found("demo/prepare.yaml")[1] == []
    make("data/demo/train/index.json", "data/demo/validation/index.json")
    assert found("demo/stage1_domains.yaml")[1] == []
    assert found("demo/stage2.yaml")[1] == []


def test_weights_count_only_with_their_config_and_safetensors():
    make("weights/clip-vit-large-patch14/config.json", "weights/clip-vit-large-patch14/pytorch_model.bin")
    assert "weights for model.image_encoder" in [problem.what for problem in found("stage1_domains.yaml")[1]]
    make("weights/clip-vit-large-patch14/model.safetensors")
    assert "weights for model.image_encoder" not in [problem.what for problem in found("stage1_domains.yaml")[1]]


def test_an_unfinished_run_is_refused_unless_a_step_of_it_is_named():
    make("data/demo/train/index.json", "data/demo/validation/index.json", "runs/demo_stage1_domains/recipe.yaml")
    assert found("demo/stage1_geometry.yaml")[1][0].what == "run 'demo_stage1_domains' is not finished (init_from)"
    (problem,) = found("demo/stage1_geometry.yaml", "init_step=500")[1]
    assert problem.what == "step 500 of run 'demo_stage1_domains'"
    checkpoint_folder(Path("runs/demo_stage1_domains"), 500).mkdir(parents=True)
    assert found("demo/stage1_geometry.yaml", "init_step=500")[1] == []
    assert "step_00000500" in found("demo/stage1_geometry.yaml", "init_step=501")[1][0].remedy


def test_a_run_that_was_started_again_for_more_steps_is_unfinished_until_it_has_their_export():
    run = Path("runs/demo_stage1_domains")
    make("data/demo/train/index.json", "data/demo/validation/index.json", run / "FINISHED")
    export_folder(run, 100).mkdir(parents=True)
    (run / "recipe.yaml").write_text("max_steps: 100\n")
    assert found("demo/stage1_geometry.yaml")[1] == []
    (run / "recipe.yaml").write_text("max_steps: 200\n")
    assert found("demo/stage1_geometry.yaml")[1][0].what == "run 'demo_stage1_domains' is not finished (init_from)"
    export_folder(run, 200).mkdir()
    assert found("demo/stage1_geometry.yaml")[1] == []


def test_exports_given_as_folders_need_no_run():
    make("manifest.jsonl", "weights/geometry/model_index.json", "weights/animation/model_index.json")
    words = ["manifest=manifest.jsonl", "geometry_from=weights/geometry", "animation_from=weights/animation"]
    assert found("demo/animate.yaml", *words)[1] == []
    whats = [problem.what for problem in found("demo/animate.yaml", *words[:2], "animation_from=weights")[1]]
    assert whats == ["run 'weights' does not exist (animation_from)"]


def test_a_manifest_with_a_video_needs_the_networks_that_find_its_person():
    make("manifest.jsonl", "weights/geometry/model_index.json", "weights/animation/model_index.json")
    words = ["manifest=manifest.jsonl", "geometry_from=weights/geometry", "animation_from=weights/animation"]
    Path("manifest.jsonl").write_text('{"id": "a", "image": "a.png", "video": "a.mp4"}\n')
    (missing,) = found("demo/animate.yaml", *words)[1]
    assert "weights/networks/mediapipe (annotators.weights)" in str(missing)
    assert "bash tools/networks.sh" in str(missing)
    make("weights/networks/mediapipe/pose_detection.tflite")
    assert found("demo/animate.yaml", *words)[1] == []


def test_commands_that_get_missing_parts_keep_the_folder_of_runs():
    recipe = load_recipe(RECIPES / "stage1_geometry.yaml")
    problems = preflight.missing(recipe, RECIPES / "stage1_geometry.yaml", Path("/my runs"), check_gpu=False)
    report = preflight.report(recipe, RECIPES / "stage1_geometry.yaml", Path("/my runs"), problems)
    commands = [line for line in report.splitlines() if "python launchers/slurm.py" in line]
    assert len(commands) == 3
    assert all("--runs '/my runs'" in command for command in commands)


def imported_modules(file):
    """All imports of a file, also within functions; `from a import b` counts as `a` and `a.b`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_packages(module):
    """Packages that one of our modules imports, itself or through others of our modules."""
    packages, known, left = set(), set(), [module]
    while left:
        path = ROOT / left.pop().replace(".", "/")
        file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
        if file is not None and file not in known:
            known.add(file)
            names = list(imported_modules(file))
            packages |= {name.partition(".")[0] for name in names}
            left += [name for name in names if name.startswith("dreamdance.")]
    return packages


@pytest.mark.parametrize("task", ENTRIES)
def test_every_optional_package_that_a_task_imports_is_looked_for_and_no_other(task):
    optional = {"deepspeed", "streaming", "tensorboard", "av", "cv2"}
    needed = imported_packages(ENTRIES[task].partition(":")[0]) & optional
    assert needed == EXTRAS.get(task, {}).keys()


def test_shards_in_a_bucket_are_not_looked_for_on_this_machine():
    words = ["data.train.remote=s3://bucket/train", "data.validation.remote=s3://bucket/validation"]
    assert found("demo/stage1_domains.yaml", *words)[1] == []


def test_a_slurm_submission_does_not_look_for_gpus_on_the_login_node():
    whats = [problem.what for problem in found("stage2.yaml", check_gpu=False)[1]]
    assert not any("GPU" in what for what in whats)
    assert len(whats) == 2


def test_fewer_gpus_than_wanted_are_met_by_accumulation(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 81559\n")
    tool.chmod(0o755)
    remedies = [problem.remedy for problem in found("stage2.yaml")[1]]
    assert any("cluster.gpus_per_node=2 cluster.tasks_per_node=2" in remedy for remedy in remedies)
    assert preflight.num_gpus() == 2
    assert preflight.gpu_memory_gib() == pytest.approx(79.65, abs=0.01)
