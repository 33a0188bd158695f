"""`model.channels_last`: the same training up to rounding, and channels innermost in every layer."""

import pytest
import torch
from support.recipes import perturb, tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe
from torch import nn

from dreamdance.models.fused_group_norm import FusedGroupNorm
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


def test_names_of_weights_do_not_change():
    names = [
        [name for name, _ in objective_of("stage 1", channels_last=flag).named_parameters()] for flag in (False, True)
    ]
    assert names[0] == names[1]


def test_without_the_key_nothing_is_fused():
    objective = objective_of("stage 1", channels_last=False)
    assert any(type(module) is nn.GroupNorm for module in objective.unet.modules())
    assert not any(isinstance(module, FusedGroupNorm) for module in objective.unet.modules())
