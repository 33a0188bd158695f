"""The SVD ControlNet starts as an exact copy that adds nothing, and has the published size."""

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from support.tiny_svd import tiny_svd_inputs, tiny_svd_unet

from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel, run_svd_unet
from dreamdance.models.base_configs import STABLE_VIDEO_DIFFUSION_UNET
from dreamdance.models.svd_unet import run_encoder_half


def control_features(seed: int = 3) -> torch.Tensor:
    return torch.randn(6, 32, 8, 12, generator=torch.Generator().manual_seed(seed))


def test_at_initialisation_the_output_of_svd_is_unchanged_bit_for_bit():
    unet = tiny_svd_unet()
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    inputs = tiny_svd_inputs()
    with torch.no_grad():
        residuals = controlnet(**inputs, control_features=control_features())
        controlled = run_svd_unet(unet, **inputs, down_residuals=residuals.down, mid_residual=residuals.mid)
        assert torch.equal(controlled, unet(**inputs).sample)
    assert all(not residual.any() for residual in [*residuals.down, residuals.mid])


def test_the_identity_holds_for_a_base_saved_and_loaded_in_the_real_format(tmp_path):
    tiny_svd_unet().save_pretrained(tmp_path / "unet")
    unet = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet")
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    inputs = tiny_svd_inputs()
    with torch.no_grad():
        residuals = controlnet(**inputs, control_features=control_features())
        controlled = run_svd_unet(unet, **inputs, down_residuals=residuals.down, mid_residual=residuals.mid)
        assert torch.equal(controlled, unet(**inputs).sample)


def test_the_copy_computes_the_result_of_svd_s_encoder_half():
    unet = tiny_svd_unet()
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    for convolution in [*controlnet.down_zero_convolutions, controlnet.mid_zero_convolution]:
        torch.nn.init.dirac_(convolution.weight)  # returns its arguments
    inputs = tiny_svd_inputs()
    with torch.no_grad():
        residuals = controlnet(**inputs, control_features=torch.zeros(6, 32, 8, 12))
        encoded = run_encoder_half(unet, **inputs)
    assert len(residuals.down) == len(encoded.skips)
    assert all(torch.equal(given, skip) for given, skip in zip(residuals.down, encoded.skips, strict=True))
    assert torch.equal(residuals.mid, encoded.mid)


def test_control_features_are_added_after_conv_in():
    controlnet = SpatioTemporalControlNetModel.from_unet(tiny_svd_unet())
    torch.nn.init.dirac_(controlnet.down_zero_convolutions[0].weight)
    inputs, features = tiny_svd_inputs(), control_features()
    with torch.no_grad():
        without = controlnet(**inputs, control_features=torch.zeros_like(features)).down[0]
        assert torch.equal(controlnet(**inputs, control_features=features).down[0], without + features)


def test_the_copy_is_trainable_and_shares_no_weight_with_a_frozen_base():
    unet = tiny_svd_unet().requires_grad_(False)
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    assert all(parameter.requires_grad for parameter in controlnet.parameters())
    before = unet.conv_in.weight.clone()
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.add_(1)
    assert torch.equal(unet.conv_in.weight, before)


def test_type_and_mode_are_those_of_the_base():
    unet = tiny_svd_unet().to(torch.bfloat16).train()
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    assert {parameter.dtype for parameter in controlnet.parameters()} == {torch.bfloat16}
    assert controlnet.training


def test_only_the_listed_weights_of_the_base_are_unused():
    unet = tiny_svd_unet()
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    unused = set(unet.state_dict()) - set(controlnet.state_dict())
    added = set(controlnet.state_dict()) - set(unet.state_dict())
    assert all(name.startswith(controlnet.unused_unet_weights) for name in unused)
    assert all(name.startswith(controlnet.added_weights) for name in added)
    assert {name.split(".")[0] for name in unused} == {"up_blocks", "conv_norm_out", "conv_out"}


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_base_whose_weights_do_not_fit_its_config_is_refused(change):
    unet = tiny_svd_unet()
    if change == "missing":
        unet.add_embedding.linear_2 = torch.nn.Identity()
    else:
        unet.mid_block.surplus = torch.nn.Linear(2, 2)
    name = "add_embedding.linear_2" if change == "missing" else "mid_block.surplus"
    with pytest.raises(ValueError, match=name):
        SpatioTemporalControlNetModel.from_unet(unet)


def test_saving_and_loading_gives_the_same_residuals(tmp_path):
    controlnet = SpatioTemporalControlNetModel.from_unet(tiny_svd_unet())
    torch.manual_seed(0)
    for convolution in [*controlnet.down_zero_convolutions, controlnet.mid_zero_convolution]:
        torch.nn.init.normal_(convolution.weight)
    controlnet.save_pretrained(tmp_path)
    loaded, report = SpatioTemporalControlNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs, features = tiny_svd_inputs(), control_features()
    with torch.no_grad():
        expected, found = (network(**inputs, control_features=features) for network in (controlnet, loaded))
    assert all(torch.equal(a, b) for a, b in zip(expected.down, found.down, strict=True))
    assert torch.equal(expected.mid, found.mid)


def test_every_parameter_moves_within_three_steps_of_training():
    unet = tiny_svd_unet().requires_grad_(False)
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    before = {name: parameter.detach().clone() for name, parameter in controlnet.named_parameters()}
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-2, weight_decay=0)
    target = torch.randn(2, 3, 4, 8, 12, generator=torch.Generator().manual_seed(4))
    for _ in range(3):  # at first zero convolutions block the gradients of all layers before them
        inputs = tiny_svd_inputs()
        residuals = controlnet(**inputs, control_features=control_features())
        output = run_svd_unet(
            unet, **inputs, down_residuals=residuals.down, mid_residual=residuals.mid, encoder_without_grad=True
        )
        (output - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, parameter in controlnet.named_parameters() if torch.equal(parameter, before[name])]
    # cross-attention to a single token: its softmax is 1 whatever query and key are
    assert all("attn2.to_q" in name or "attn2.to_k" in name or "norm2" in name for name in still), still


def test_control_features_of_another_size_are_refused():
    controlnet = SpatioTemporalControlNetModel.from_unet(tiny_svd_unet())
    with pytest.raises(ValueError, match="downscale_factor"):
        controlnet(**tiny_svd_inputs(), control_features=torch.zeros(6, 32, 4, 6))


def test_the_full_size_networks_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(**STABLE_VIDEO_DIFFUSION_UNET)
        controlnet = SpatioTemporalControlNetModel.from_unet(unet)
        controller = CrossDomainControllerModel()
        controller_alone = CrossDomainControllerModel(geometry_attention=False)

    def count(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(unet) == 1_524_623_082
    assert count(controlnet) == 680_935_057
    # 12 skip connections and the mid block, each with a 1x1 convolution
    zero_convolutions = sum(width**2 + width for width in [320] * 4 + [640] * 3 + [1280] * 6)
    assert count(controlnet.down_zero_convolutions) + count(controlnet.mid_zero_convolution) == zero_convolutions
    assert count(controller) == 7_532_800
    assert count(controller) - count(controller_alone) == 320 * 3 * 320 + 320 * 320 + 320 + 2 * 320
