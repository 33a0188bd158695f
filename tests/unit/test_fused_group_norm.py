"""Fused normalisation in diffusers' UNets: the same values on CPU, the same parameters under the same names."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dreamdance.models.fused_group_norm import ActivatedLinear, FusedGroupNorm, fuse_group_norms


def unet(**changes: object) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    torch.manual_seed(0)
    network = UNet2DConditionModel(**{**settings, **changes})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)  # weights other than one and biases other than zero
    return network


def denoise(network: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator).contiguous(memory_format=layout)
    return network(latents, 7, torch.randn(2, 3, 8, generator=generator)).sample


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("changes", [{}, {"resnet_time_scale_shift": "scale_shift"}, {"act_fn": "gelu"}], ids=str)
def test_a_unet_computes_the_same_bits_with_fused_norms(changes, layout):
    plain = unet(**changes).to(memory_format=layout)
    fused = copy.deepcopy(plain)
    fuse_group_norms(fused)
    with torch.no_grad():
        assert torch.equal(denoise(fused, layout), denoise(plain, layout))


def test_every_norm_of_a_unet_is_fused_and_silu_with_those_it_follows():
    network = unet()
    norms = [name for name, module in network.named_modules() if type(module) is nn.GroupNorm]
    fuse_group_norms(network)
    fused = {name: module.activation for name, module in network.named_modules() if isinstance(module, FusedGroupNorm)}
    assert list(fused) == norms
    of_attention = {name for name in norms if "attentions" in name}
    assert {name for name, activation in fused.items() if not activation} == of_attention != set()
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    assert all(isinstance(block.time_emb_proj, ActivatedLinear) for block in blocks)
    assert not any(isinstance(block.nonlinearity, nn.SiLU) for block in blocks)


def test_the_parameters_are_the_same_objects_under_the_same_names():
    network = unet()
    before = dict(network.named_parameters())
    names = list(network.state_dict())
    fuse_group_norms(network)
    assert list(network.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in network.named_parameters())


def test_weights_saved_from_fused_norms_load_into_plain_ones(tmp_path):
    network = unet()
    fuse_group_norms(network)
    network.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert not any(isinstance(module, FusedGroupNorm) for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(denoise(loaded), denoise(network))


def test_every_parameter_gets_the_gradient_that_plain_norms_give_it():
    plain = unet().double()
    fused = copy.deepcopy(plain)
    fuse_group_norms(fused)
    generator = torch.Generator().manual_seed(1)
    latents, tokens = (torch.randn(s, generator=generator).double() for s in ((2, 4, 8, 8), (2, 3, 8)))
    for network in (plain, fused):
        network(latents, 7, tokens).sample.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-9 * float(one.grad.abs().max()))


def test_a_block_that_scales_and_shifts_between_norm_and_activation_keeps_its_activation():
    network = unet(resnet_time_scale_shift="scale_shift")
    fuse_group_norms(network)
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    assert all(isinstance(block.nonlinearity, nn.SiLU) for block in blocks)
    assert not any(block.norm1.activation or block.norm2.activation for block in blocks)
    assert network.conv_norm_out.activation


def test_norms_without_weights_are_left_alone():
    norms = nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False)).eval()
    fuse_group_norms(norms)
    assert isinstance(norms[0], FusedGroupNorm)
    assert not norms[0].training
    assert type(norms[1]) is nn.GroupNorm
    assert "activation=False" in repr(norms[0])
