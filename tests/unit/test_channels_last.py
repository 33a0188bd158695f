"""`model.channels_last`: the same training up to rounding, and channels innermost in every layer."""

import pytest
import torch
from support.recipes import perturb, tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe
from torch import nn

from dreamdance.models.fused_group_norm import FusedGroupNorm
from dreamdance.runtime.process_group import process_group
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.engine import Engine
from dreamdance.training.networks.build import exportable
from dreamdance.training.stages.training_stage import stage_of

RECIPES = {
    "stage 1": lambda changes: tiny_stage1_recipe("temporal", changes),
    "stage 2": tiny_stage2_recipe,
}


def objective_of(stage, *, channels_last):
    return perturb(stage_of(RECIPES[stage]({"model.channels_last": channels_last})).build())


def loss_and_gradients(objective):
    loss = objective(tiny_clip_batch(num_clips=2, num_frames=4)).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in objective.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("stage", RECIPES)
def test_training_is_the_same_to_rounding(stage):
    plain_loss, plain = loss_and_gradients(objective_of(stage, channels_last=False))
    loss, gradients = loss_and_gradients(objective_of(stage, channels_last=True))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == plain.keys()
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in plain.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=rounding, msg=name)


@pytest.mark.parametrize("stage", RECIPES)
def test_every_fused_norm_sees_channels_innermost_even_where_sharding_has_flattened_the_weights(stage):
    objective = objective_of(stage, channels_last=True)
    for weight in objective.parameters():
        weight.data = weight.data.contiguous()  # as a view of a flat buffer is
    layouts = {}

    def note(name):
        def hook(module, inputs):
            layout = {4: torch.channels_last, 5: torch.channels_last_3d}[inputs[0].dim()]
            if inputs[0].shape[1] > 1 and inputs[0].shape[2:].numel() > 1:
                layouts[name] = inputs[0].is_contiguous(memory_format=layout)

        return hook

    for network_name, network in exportable(objective).items():
        for name, module in network.named_modules():
            if isinstance(module, FusedGroupNorm):
                module.register_forward_pre_hook(note(f"{network_name}.{name}"))
    objective(tiny_clip_batch(num_clips=2, num_frames=4))
    assert layouts
    assert [name for name, innermost in layouts.items() if not innermost] == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("stage", "zero_stage", "precision"),
    [("stage 1", 2, "fp32"), ("stage 1", 2, "bf16"), ("stage 2", 1, "fp32"), ("stage 2", 0, "fp32")],
)
def test_deepspeed_trains_as_without(stage, zero_stage, precision):
    changes = {"precision": precision, "sharding.zero_stage": zero_stage, "batch_size": 2, "micro_batch_size": 2}
    changes |= {} if stage == "stage 1" else {"model.unfreeze": "none"}
    batch, losses = tiny_clip_batch(num_clips=2, num_frames=4), {}
    for channels_last in (False, True):
        recipe = RECIPES[stage](changes | {"model.channels_last": channels_last})
        objective = perturb(stage_of(recipe).build())
        stage_of(recipe).set_trainable(objective)
        with process_group(Ranks(), timeout_seconds=60):
            engine = Engine(objective, recipe, Ranks(), deterministic=False)
            frozen = [
                weight for weight in objective.unet.parameters() if weight.dim() == 4 and not weight.requires_grad
            ]
            assert frozen
            if channels_last:
                assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in frozen)
            losses[channels_last] = []
            for _ in range(3):
                output = engine.forward(batch)
                engine.backward(output.loss)
                assert engine.update(1e-3).applied
                losses[channels_last].append(output.loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4 if precision == "fp32" else 2e-2)
    assert losses[True][2] < losses[True][0]


def test_names_of_weights_do_not_change():
    names = [
        [name for name, _ in objective_of("stage 1", channels_last=flag).named_parameters()] for flag in (False, True)
    ]
    assert names[0] == names[1]


def test_without_the_key_nothing_is_fused():
    objective = objective_of("stage 1", channels_last=False)
    assert any(type(module) is nn.GroupNorm for module in objective.unet.modules())
    assert not any(isinstance(module, FusedGroupNorm) for module in objective.unet.modules())
