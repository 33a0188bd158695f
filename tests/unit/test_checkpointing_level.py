"""`gradient_checkpointing: auto` takes the fastest level whose plan fits, and says which; old values keep working."""

from support.recipes import tiny_stage1_recipe

from dreamdance.recipe.same_run import result_json
from dreamdance.training.planning.checkpointing_level import MARGIN, choose_level, describe_with_level
from dreamdance.training.planning.plan import GIB, GPU_RESERVE_GIB, make_plan
from dreamdance.training.stages.training_stage import stage_of


def recipe_with(level, **changes):
    cluster = {"cluster.gpus_per_node": 1, "cluster.tasks_per_node": 1}
    return tiny_stage1_recipe("geometry", {**cluster, "sharding.gradient_checkpointing": level, **changes})


def needed_gib(plan):
    """The smallest memory of a GPU that holds a plan and its margin."""
    return plan.total_bytes / GIB * MARGIN + GPU_RESERVE_GIB


def test_auto_takes_the_fastest_level_that_fits():
    plan_of_none, plan_of_blocks = (make_plan(stage_of(recipe_with(level))) for level in ("none", "blocks"))
    chosen = choose_level(recipe_with("auto"), needed_gib(plan_of_none) + 1e-9)
    assert (chosen.recipe, chosen.plan) == (recipe_with("none"), plan_of_none)
    chosen = choose_level(recipe_with("auto"), (needed_gib(plan_of_none) + needed_gib(plan_of_blocks)) / 2)
    assert (chosen.recipe, chosen.plan) == (recipe_with("blocks"), plan_of_blocks)
    chosen = choose_level(recipe_with("auto"), 1.0)
    assert chosen.recipe == recipe_with("transformers"), "needs the least, even if it is too much"
    assert chosen.plan.total_bytes < plan_of_blocks.total_bytes < plan_of_none.total_bytes
    assert "auto takes transformers on GPUs of 1 GiB" in chosen.reason


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
