"""The counted cost of a step: exact for known operators, equal to torch's own counter for whole objectives."""

import pytest
import torch
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dreamdance.training.planning.operator_count import MORE_FORMULAS, OperatorCount
from dreamdance.training.planning.simulated_batch import simulated_batch
from dreamdance.training.planning.step_cost import count_recipe
from dreamdance.training.stages.training_stage import stage_of
from dreamdance_kernels import geometry_attention, segmented_attention

LATENTS = {"data.latents": {"local": "latents"}}


def built(recipe, device="meta"):
    objective = stage_of(recipe).build(device=device)
    stage_of(recipe).set_trainable(objective)
    return objective


def forward_and_backward(function, *inputs):
    """The counted work of both passes."""
    with OperatorCount() as counter:
        loss = function(*inputs)
        counter.phase = "backward"
        loss.sum().backward()
    return counter.work


def test_a_linear_layer_has_two_operations_for_each_product_and_twice_as_many_backwards():
    layer, rows = nn.Linear(8, 16, bias=False), torch.randn(32, 8, requires_grad=True)
    work = forward_and_backward(layer, rows)
    assert work["forward"].flops == {torch.float32: 2 * 32 * 8 * 16}
    assert work["backward"].total_flops == 2 * 2 * 32 * 8 * 16
    assert work["recomputation"].num_operators == 0


def test_checkpointing_repeats_exactly_the_forward_pass():
    layer, rows = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)), torch.randn(32, 8)
    plain = forward_and_backward(layer, rows)
    repeated = forward_and_backward(lambda inputs: checkpoint(layer, inputs, use_reentrant=False), rows)
    assert repeated["forward"] == plain["forward"]
    assert repeated["backward"].flops == plain["backward"].flops
    # The last layer is not needed again: torch stops as soon as all kept values are there.
    assert repeated["recomputation"].flops == {torch.float32: 2 * 32 * 8 * 16}


def test_bytes_are_those_of_inputs_and_outputs_and_views_move_none():
    a, b = torch.ones(64, 32), torch.ones(64, 32, dtype=torch.bfloat16)
    with OperatorCount() as counter:
        (a.t().reshape(32, 8, 8)[1:], a.expand(3, 64, 32), torch.empty(1000))
    assert counter.work["forward"].num_operators == 0
    with OperatorCount() as counter:
        torch.add(a, b)
        torch.add(a, torch.ones(1, 1).expand(64, 32))  # of which one number is read
    ones = 4
    assert counter.work["forward"].num_bytes == 64 * 32 * (4 + 2 + 4) + ones + 64 * 32 * (4 + 4) + 4
    assert counter.work["forward"].num_operators == 3
    with OperatorCount() as counter:
        a @ a.t()
    assert counter.work["forward"].product_bytes == counter.work["forward"].num_bytes == 4 * (2 * 64 * 32 + 64 * 64)


def test_a_given_output_is_written_once_and_not_read():
    a, out = torch.ones(64, 32), torch.empty(64, 32)
    with OperatorCount() as counter:
        torch.mul(a, 2 * a, out=out)
        out.add_(a)  # in place: read and written
        torch.mul(out, a, out=out)  # the same
    assert counter.work["forward"].num_bytes == 64 * 32 * 4 * (2 + 3 + 3 + 3)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "operator"])
def test_attention_counts_the_same_through_each_backend(backend):
    """The operator is the one under the backend `triton`, which needs a GPU."""
    query, key, value = (torch.randn(2 * 3, 8, 32, requires_grad=True) for _ in range(3))

    def attend(*inputs):
        if backend == "operator":
            merged = (tensor.reshape(2, 1, 3 * 8, 32) for tensor in inputs)
            return segmented_attention(*merged, num_heads=2, implementation="torch")
        return geometry_attention(*inputs, num_domains=3, num_heads=2, backend=backend)

    work = forward_and_backward(attend, query, key, value)
    forward = 4 * 2 * 24 * 24 * 32  # two products of each query and key, of two operations, in each of 2 frames
    assert work["forward"].total_flops == forward
    # A fused backward computes the scores again: five products instead of four.
    assert work["backward"].total_flops == (2 if backend == "reference" else 2.5) * forward


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        tiny_stage1_recipe("temporal", {"sharding.gradient_checkpointing": True}),
        tiny_stage2_recipe({"model.unfreeze": "decoder", "precision": "bf16"}),
    ],
    ids=["stage 1", "stage 2"],
)
def test_the_count_equals_that_of_torch_s_counter(recipe):
    objective = built(recipe).to(torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    objective.training = False
    batch = simulated_batch(stage_of(recipe), objective)
    attention, attention_backward = MORE_FORMULAS
    formulas = {
        attention: lambda query, key, value, *_, out_shape=None, **__: sdpa_flop_count(query, key, value),
        attention_backward: lambda *shapes, out_shape=None, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            objective(batch).loss.backward()
    assert count_recipe(recipe).total.total_flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_a_backend_that_needs_a_gpu_is_counted_without_one(backend):
    changes = {"model.attention_backend": backend}
    assert count_recipe(tiny_stage1_recipe("geometry", changes)) == count_recipe(tiny_stage1_recipe("geometry"))


@pytest.mark.slow
@pytest.mark.parametrize("train", ["domains", "geometry"])
def test_stored_latents_save_the_encoders_and_nothing_else(train):
    changes = {
        "data.width": 64,
        "data.height": 64,
        "model.autoencoder": {"path": "absent"},
        "model.pose_channels": [8, 8, 8, 16],
        "model.unet.config.in_channels": 4,
        "model.unet.config.out_channels": 4,
    }
    pictures, latents = (count_recipe(tiny_stage1_recipe(train, changes | more)) for more in ({}, LATENTS))
    assert pictures.work["encoders"].total_flops > 1e9
    assert latents.work["encoders"].num_operators == 0
    assert latents.peak_bytes < pictures.peak_bytes
    for phase in ("forward", "backward"):
        assert latents.work[phase].total_flops == pictures.work[phase].total_flops


@pytest.mark.slow
def test_checkpointing_costs_operations_and_saves_memory():
    plain, repeated = (
        count_recipe(tiny_stage2_recipe({"sharding.gradient_checkpointing": value})) for value in (False, True)
    )
    assert plain.work["recomputation"].num_operators == 0
    assert repeated.work["recomputation"].total_flops > 0.2 * plain.work["forward"].total_flops
    assert repeated.model_flops == plain.model_flops == plain.total.total_flops
    assert repeated.peak_bytes < plain.peak_bytes
