"""The DeepSpeed configuration that a recipe means, and what the engine refuses."""

import os

import pytest
import torch
from recipes_for_tests import tiny_stage1_recipe

from dreamdance.errors import RecipeError
from dreamdance.ranks import Ranks
from dreamdance.training.engine import Engine, _weights_only_loading, accumulation_steps, deepspeed_config


def config(*, world_size: int = 2, num_trainable: int = 1000, deterministic: bool = False, **changes: object) -> dict:
    recipe = tiny_stage1_recipe(changes={"batch_size": 8, "cluster.tasks_per_node": world_size, **changes})
    return deepspeed_config(recipe, world_size=world_size, num_trainable=num_trainable, deterministic=deterministic)


@pytest.mark.parametrize(("world_size", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_sees_the_recipes_batch_on_any_number_of_ranks(world_size, steps):
    found = config(world_size=world_size)
    assert found["gradient_accumulation_steps"] == steps
    product = found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"] * world_size
    assert product == found["train_batch_size"] == 8


@pytest.mark.parametrize("world_size", [3, 8])
def test_ranks_that_do_not_divide_the_batch_are_refused_naming_those_that_do(world_size):
    recipe = tiny_stage1_recipe(changes={"batch_size": 8})
    with pytest.raises(RecipeError, match=rf"batch_size=8 .* on {world_size} ranks; world sizes that can: 1, 2, 4\."):
        accumulation_steps(recipe, world_size)


def test_clipping_is_always_written_because_deepspeeds_default_is_not_off():
    assert config(**{"optimizer.gradient_clipping": 0.0})["gradient_clipping"] == 0.0
    assert config(**{"optimizer.gradient_clipping": 0.7})["gradient_clipping"] == 0.7


def test_precision_comes_from_the_recipe_and_gradients_add_up_in_fp32():
    assert config(precision="fp32")["bf16"] == {"enabled": False}
    found = config(precision="bf16")
    assert found["bf16"] == {"enabled": True}
    assert found["data_types"]["grad_accum_dtype"] == "fp32"


def test_communication_overlaps_unless_bits_must_repeat():
    assert config()["zero_optimization"]["overlap_comm"] is True
    assert config(deterministic=True)["zero_optimization"]["overlap_comm"] is False
    assert config(**{"sharding.overlap_communication": False})["zero_optimization"]["overlap_comm"] is False


def test_buckets_are_no_larger_than_what_trains():
    assert config(num_trainable=10)["zero_optimization"]["reduce_bucket_size"] == 10
    found = config(num_trainable=10**9, **{"sharding.reduce_bucket_elements": 50})
    assert found["zero_optimization"]["reduce_bucket_size"] == 50
    assert found["zero_optimization"]["stage"] == 2


def test_unsharded_bf16_is_refused_with_the_way_out():
    recipe = tiny_stage1_recipe(changes={"sharding.zero_stage": 0, "precision": "bf16"})
    with pytest.raises(RecipeError, match="use zero_stage 1 or 2"):
        Engine(torch.nn.Linear(2, 2), recipe, Ranks(), deterministic=True)


def test_a_run_in_which_nothing_trains_is_refused():
    network = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing to train"):
        Engine(network, tiny_stage1_recipe(), Ranks(), deterministic=True)


def test_the_loading_switch_is_put_back_as_the_user_had_it(monkeypatch):
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        with _weights_only_loading():
            assert os.environ[name] == "1"
        assert os.environ.get(name) == before
