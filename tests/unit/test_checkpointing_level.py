"""`gradient_checkpointing: auto` takes the fastest level whose plan fits, and says which; old values keep working."""

import pytest
from support.recipes import tiny_stage1_recipe

from dreamdance.recipe.same_run import result_json
from dreamdance.training.planning.checkpointing_level import choose_level, describe_with_level, fits
from dreamdance.training.planning.plan import make_plan
from dreamdance.training.stages.training_stage import stage_of


def recipe_with(level, **changes):
    cluster = {"cluster.gpus_per_node": 1, "cluster.tasks_per_node": 1}
    return tiny_stage1_recipe("geometry", {**cluster, "sharding.gradient_checkpointing": level, **changes})


def test_a_plan_fits_if_15_percent_and_3_gib_more_would_too():
    sixty = 60 * 2**30  # bytes: 60 x 1.15 + 3 = 72 GiB
    assert fits(sixty, 72.001)
    assert not fits(sixty, 71.999)


@pytest.mark.slow
def test_auto_takes_the_fastest_level_that_fits():
    plans = {level: make_plan(stage_of(recipe_with(level))) for level in ("none", "blocks", "transformers")}
    gib = {level: plan.total_bytes / 2**30 for level, plan in plans.items()}
    assert gib["none"] > 2 * gib["blocks"] > 2 * gib["transformers"]
    for level, memory in [("none", 1.16 * gib["none"] + 3), ("blocks", 1.14 * gib["none"] + 3), ("transformers", 1.0)]:
        chosen = choose_level(recipe_with("auto"), memory)
        assert (chosen.recipe, chosen.plan) == (recipe_with(level), plans[level])
    assert "auto takes transformers on GPUs of 1 GiB" in chosen.reason, "it needs the least, even if it is too much"


def test_a_level_that_the_recipe_names_stays_whatever_the_memory():
    for given, level in [(True, "blocks"), (False, "none"), ("keep_attention", "keep_attention"), ("none", "none")]:
        recipe = recipe_with(given)
        assert recipe.sharding.checkpointing_level == level
        assert choose_level(recipe, 1.0).recipe == recipe


def test_auto_takes_blocks_without_a_gpu():
    on_cpu = recipe_with("auto", **{"cluster.gpus_per_node": 0})
    for recipe, memory in [(on_cpu, 80.0), (on_cpu, None), (recipe_with("auto"), None)]:
        chosen = choose_level(recipe, memory)
        assert chosen.recipe.sharding.checkpointing_level == "blocks"
        assert "auto takes blocks without a GPU" in chosen.reason


def test_the_dry_run_states_the_level_and_shows_its_plan():
    on_cpu = describe_with_level(recipe_with("auto", **{"cluster.gpus_per_node": 0}))
    assert "auto takes blocks without a GPU" in on_cpu
    assert "gradient_checkpointing blocks" in on_cpu
    unknown = describe_with_level(recipe_with("auto"))
    assert "auto takes none, which is planned here, on GPUs that have 15% more memory" in unknown
    assert "gradient_checkpointing none" in unknown
    large = describe_with_level(recipe_with("auto"), gpu_memory_gib=80.0)
    assert "auto takes none on GPUs of 80 GiB" in large
    assert "fits in the 80 GiB" in large


def test_another_level_is_the_same_run():
    assert result_json(recipe_with("auto")) == result_json(recipe_with("transformers"))
