"""`--dry-run`: the whole recipe with overridden lines marked, the arithmetic of a batch, the batch script."""

from pathlib import Path

import pytest

from dreamdance.launch.dry_run import MARK, batch_arithmetic, resolved_recipe, script
from dreamdance.recipe import LoadedRecipe, load, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def loaded(name: str, *words: str) -> LoadedRecipe:
    return load(RECIPES / name, words)


def marked(recipe: LoadedRecipe) -> list[str]:
    """The marked lines, without mark and indentation."""
    lines = resolved_recipe(recipe).splitlines()
    return [line.removesuffix(MARK).strip() for line in lines if line.endswith(MARK)]


def test_only_lines_that_the_command_line_decided_are_marked() -> None:
    assert marked(loaded("demo/stage2.yaml")) == []
    words = ("max_steps=70", "optimizer.lr=2e-4", "data.train.local=elsewhere", "name=mine")
    assert marked(loaded("demo/stage2.yaml", *words)) == [
        "name: mine", "max_steps: 70", "train: {local: elsewhere, remote: null}", "lr: 0.0002"
    ]  # fmt: skip


def test_only_the_given_one_of_several_keys_with_the_same_name_is_marked() -> None:
    """`width` and `num_frames` occur in several sections, `every_steps` in two."""
    assert marked(loaded("demo/stage2.yaml", "checkpoint.every_steps=3")) == ["every_steps: 3"]
    assert marked(loaded("demo/stage2.yaml", "logging.every_steps=3")) == ["logging: {every_steps: 3}"]


def test_a_section_that_takes_two_lines_is_marked_where_the_value_stands() -> None:
    (line,) = marked(loaded("demo/stage2.yaml", "sampling.noise_augmentation=0.5"))
    assert "noise_augmentation: 0.5" in line


@pytest.mark.parametrize("name", ["demo/stage1_domains.yaml", "stage2.yaml", "animate.yaml", "demo/prepare.yaml"])
def test_the_shown_recipe_loads_to_the_same_recipe(name: str, tmp_path: Path) -> None:
    words = ("seed=5",)
    shown = tmp_path / "recipe.yaml"
    shown.write_text(resolved_recipe(loaded(name, *words)))  # the marks are comments
    assert load_recipe(shown) == load_recipe(RECIPES / name, words)


def test_defaults_are_written_out() -> None:
    text = (RECIPES / "demo/stage2.yaml").read_text()
    assert "max_nonfinite_steps" not in text
    assert "max_nonfinite_steps:" in resolved_recipe(loaded("demo/stage2.yaml"))


def test_the_arithmetic_multiplies_to_the_batch_and_counts_in_the_singular() -> None:
    words = ("cluster.nodes=2", "cluster.tasks_per_node=2", "batch_size=16", "micro_batch_size=2", "max_steps=5000")
    recipe = loaded("demo/stage1_temporal.yaml", *words, "data.num_frames=8")
    processes, batch, training = batch_arithmetic(recipe, "slurm").splitlines()
    assert processes == "processes: 2 nodes x 2 = 4, cluster: slurm"
    assert batch == "batch: 2 (micro batch) x 2 (accumulation) x 4 (processes) = 16 samples per optimizer step"
    assert training == "training: 5,000 steps = 80,000 samples of 8 frames at 64x96"
    single = loaded("stage1_domains.yaml")
    assert "samples of 1 frame at 256x384" in batch_arithmetic(single, "local")
    assert batch_arithmetic(single, "local").startswith("processes: 1 node x 8 = 8, cluster: local")


def test_a_task_that_trains_nothing_has_processes_only() -> None:
    assert batch_arithmetic(loaded("demo/prepare.yaml"), "local").count("\n") == 0


def test_the_script_names_the_cluster_that_does_not_use_it(tmp_path: Path) -> None:
    recipe = loaded("demo/stage2.yaml")
    local, slurm = (script(recipe, tmp_path / "runs" / "x", cluster) for cluster in ("local", "slurm"))
    assert local == f"# (cluster local does not use this script; Slurm would)\n{slurm}"
    assert slurm.startswith("#!")
    assert str(tmp_path / "runs" / "x") in slurm
    assert not (tmp_path / "runs").exists()
