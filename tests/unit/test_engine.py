"""The DeepSpeed configuration of a recipe, and the settings that the engine refuses."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from support.recipes import tiny_stage1_recipe

from dreamdance.errors import RecipeError
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.runtime.process_group import process_group
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing.rank_file import Piece, RankFile, rank_path, read_pieces
from dreamdance.training.deepspeed_config import deepspeed_config
from dreamdance.training.engine import Engine


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
    fitting = rf"batch_size 8 .* x {world_size} processes; numbers of processes that fit: 1, 2, 4 "
    with pytest.raises(RecipeError, match=fitting):
        accumulation_steps(8, 2, world_size)


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


def test_buckets_are_no_larger_than_the_trained_weights():
    assert config(num_trainable=10)["zero_optimization"]["reduce_bucket_size"] == 10
    found = config(num_trainable=10**9, **{"sharding.reduce_bucket_elements": 50})
    assert found["zero_optimization"]["reduce_bucket_size"] == 50
    assert found["zero_optimization"]["stage"] == 2
    assert config(num_trainable=11)["zero_optimization"]["allgather_bucket_size"] == 12, "DeepSpeed refuses odd numbers"


def test_unsharded_bf16_is_refused_with_the_way_out():
    recipe = tiny_stage1_recipe(changes={"sharding.zero_stage": 0, "precision": "bf16"})
    with pytest.raises(RecipeError, match="use zero_stage 1 or 2"):
        Engine(torch.nn.Linear(2, 2), recipe, Ranks(), deterministic=True)


def test_a_run_in_which_nothing_trains_is_refused():
    network = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RecipeError, match="nothing to train"):
        Engine(network, tiny_stage1_recipe(), Ranks(), deterministic=True)


class Output(NamedTuple):
    loss: torch.Tensor


class Line(torch.nn.Module):
    """An objective of three weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def forward(self, batch: torch.Tensor) -> Output:
        return Output((self.weight * batch).square().sum())


@pytest.fixture
def group() -> Iterator[None]:
    with process_group(Ranks(), timeout_seconds=60):
        yield


def line_engine(zero_stage: int) -> Engine:
    changes = {"precision": "fp32", "sharding.zero_stage": zero_stage, "batch_size": 2, "micro_batch_size": 1}
    return Engine(Line(), tiny_stage1_recipe(changes=changes), Ranks(), deterministic=True)


def step(engine: Engine) -> None:
    for batch in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -1.0, 2.0])):
        engine.backward(engine.forward(batch).loss)
    assert engine.update(0.1).applied


def pieces(engine: Engine) -> dict[str, Piece]:
    """The content of a checkpoint of an engine with one rank."""
    shares = {"master": engine.masters, **engine.moments()}
    (fragment,) = engine.fragments()
    values = {kind: fragment.of(share) for kind, share in shares.items()}
    return {fragment.name: Piece(fragment.start, values, engine.step_counts()[fragment.shard])}


@pytest.mark.usefixtures("group")
def test_deepspeed_does_not_stop_the_device_to_measure_throughput(monkeypatch):
    engine = line_engine(zero_stage=2)
    for _ in range(3):
        step(engine)  # its timer begins after two steps
    stops = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: stops.append(1))
    for batch in (torch.ones(3), torch.ones(3)):
        engine.backward(engine.forward(batch).loss)
    assert stops == []


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_adamw_computes_as_this_device_does_whatever_the_checkpoint_s_device_did(zero_stage, tmp_path):
    """On a GPU AdamW is fused and keeps its step counts there; a checkpoint stores neither, so results are the same."""
    saving, straight = line_engine(zero_stage), line_engine(zero_stage)
    for engine in (saving, straight):
        step(engine)
    saving._engine.optimizer.param_groups[0]["fused"] = True
    content = RankFile.of(pieces(saving), average_updates=1, generators={})
    with rank_path(tmp_path, 0).open("wb") as file:
        content.write(file)
    resumed = line_engine(zero_stage)
    with torch.no_grad():
        resumed.apply_restored(read_pieces(tmp_path, 1, pieces(resumed)))
    assert resumed._engine.optimizer.param_groups[0]["fused"] is None
    for engine in (resumed, straight):
        step(engine)
    assert resumed.step_counts() == straight.step_counts() == [2.0]
    for found, expected in zip(resumed.masters, straight.masters, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(resumed.trainable["weight"], straight.trainable["weight"])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_an_optimizer_state_that_is_there_before_the_first_step_changes_no_bit(zero_stage):
    """AdamW makes its state at the first step; we make it before, so that every checkpoint contains one."""
    ours, lazy = line_engine(zero_stage), line_engine(zero_stage)
    assert ours.step_counts() == [0.0]
    lazy._adamw.state.clear()
    for engine in (ours, lazy):
        step(engine)
    assert ours.step_counts() == lazy.step_counts() == [1.0]
    for name, moments in ours.moments().items():
        assert all(map(torch.equal, moments, lazy.moments()[name])), name
    assert all(map(torch.equal, ours.masters, lazy.masters))


@pytest.mark.usefixtures("group")
def test_step_counts_are_on_the_device_that_adamw_expects():
    """Step counts lie on the device of the weights if AdamW is fused, otherwise on the CPU, as AdamW makes them."""
    engine, lazy = line_engine(zero_stage=2), line_engine(zero_stage=2)
    lazy._adamw.state.clear()
    step(lazy)
    engine.apply_restored({"weight": 5.0})
    (state,), (own,) = engine._adamw.state.values(), lazy._adamw.state.values()
    assert state["step"].item() == 5
    assert (state["step"].dtype, state["step"].device) == (own["step"].dtype, own["step"].device)
