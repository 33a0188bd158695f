"""Running diffusers' SVD UNet in two halves changes nothing except the requested changes."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from support.tiny_svd import tiny_svd_inputs, tiny_svd_unet
from torch import Tensor, nn

from dreamdance.models import SpatioTemporalControlNetModel, run_svd_unet
from dreamdance.models.svd_unet import (
    DECODER_HALF,
    ENCODER_HALF,
    encoder_half_parameters,
    is_encoder_half_frozen,
    run_encoder_half,
)


def freeze_encoder_half(unet: UNetSpatioTemporalConditionModel) -> None:
    for _, parameter in encoder_half_parameters(unet):
        parameter.requires_grad_(False)


def perturbed_controlnet(unet: UNetSpatioTemporalConditionModel) -> SpatioTemporalControlNetModel:
    controlnet = SpatioTemporalControlNetModel.from_unet(unet)
    torch.manual_seed(5)
    for convolution in [*controlnet.down_zero_convolutions, controlnet.mid_zero_convolution]:
        nn.init.normal_(convolution.weight, std=0.05)
        nn.init.normal_(convolution.bias, std=0.05)
    return controlnet


def controlled_prediction(
    unet: UNetSpatioTemporalConditionModel, controlnet: SpatioTemporalControlNetModel, *, encoder_without_grad: bool
) -> Tensor:
    inputs = tiny_svd_inputs()
    features = torch.randn(6, 32, 8, 12, generator=torch.Generator().manual_seed(6))
    residuals = controlnet(**inputs, control_features=features)
    return run_svd_unet(
        unet,
        **inputs,
        down_residuals=residuals.down,
        mid_residual=residuals.mid,
        encoder_without_grad=encoder_without_grad,
    )


def gradients(*networks: nn.Module, loss: Callable[[], Tensor]) -> dict[tuple[int, str], Tensor]:
    for network in networks:
        network.zero_grad()
    loss().backward()
    return {
        (index, name): parameter.grad.clone()
        for index, network in enumerate(networks)
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 5)])
def test_without_residuals_the_output_is_that_of_diffusers_bit_for_bit(size):
    unet = tiny_svd_unet()
    inputs = tiny_svd_inputs(height=size[0], width=size[1])
    with torch.no_grad():
        assert torch.equal(run_svd_unet(unet, **inputs), unet(**inputs).sample)


@pytest.mark.parametrize("timestep", [0.3, torch.tensor(0.3), torch.tensor([0.3, 0.3])])
def test_a_timestep_may_be_a_number_or_a_tensor_as_in_diffusers(timestep):
    unet = tiny_svd_unet()
    inputs = tiny_svd_inputs() | {"timestep": timestep}
    with torch.no_grad():
        assert torch.equal(run_svd_unet(unet, **inputs), unet(**inputs).sample)


def test_half_precision_weights_give_the_output_of_diffusers_bit_for_bit():
    unet = tiny_svd_unet().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in tiny_svd_inputs().items()}
    with torch.no_grad():
        assert torch.equal(run_svd_unet(unet, **inputs), unet(**inputs).sample)


def test_each_clip_is_predicted_for_itself():
    unet = tiny_svd_unet()
    inputs = tiny_svd_inputs()
    with torch.no_grad():
        together = run_svd_unet(unet, **inputs)
        alone = run_svd_unet(unet, **{name: value[1:] for name, value in inputs.items()})
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_residuals_are_added_to_the_skip_connections_and_to_the_mid_block():
    unet = tiny_svd_unet()
    inputs = tiny_svd_inputs()
    with torch.no_grad():
        plain = run_svd_unet(unet, **inputs)
        encoded = run_encoder_half(unet, **inputs)
        generator = torch.Generator().manual_seed(2)
        for index in range(len(encoded.skips) + 1):
            down = [torch.zeros_like(skip) for skip in encoded.skips]
            mid = torch.zeros_like(encoded.mid)
            assert torch.equal(run_svd_unet(unet, **inputs, down_residuals=down, mid_residual=mid), plain)
            # not a constant: group norm would remove it
            [*down, mid][index].normal_(generator=generator)
            changed = run_svd_unet(unet, **inputs, down_residuals=down, mid_residual=mid)
            assert (changed - plain).abs().max() > 1e-3 * plain.abs().max(), f"residual {index} has no effect"


def test_a_residual_that_cancels_a_skip_connection_removes_it():
    unet = tiny_svd_unet()
    inputs = tiny_svd_inputs()
    other = tiny_svd_inputs(seed=9)
    with torch.no_grad():
        given = run_encoder_half(unet, **inputs)
        conditions = {name: inputs[name] for name in ("timestep", "encoder_hidden_states", "added_time_ids")}
        # everything that reaches the decoder from `sample` is replaced by that of the other sample
        wanted = run_encoder_half(unet, other["sample"], **conditions)
        residuals = [new - old for new, old in zip(wanted.skips, given.skips, strict=True)]
        moved = run_svd_unet(unet, **inputs, down_residuals=residuals, mid_residual=wanted.mid - given.mid)
        expected = unet(other["sample"], **conditions).sample
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_gradients_equal_those_of_the_plain_form_when_the_frozen_encoder_runs_without_grad():
    unet = tiny_svd_unet()
    controlnet = perturbed_controlnet(unet)
    freeze_encoder_half(unet)

    def loss(encoder_without_grad: bool) -> Tensor:
        return controlled_prediction(unet, controlnet, encoder_without_grad=encoder_without_grad).square().mean()

    plain = gradients(unet, controlnet, loss=lambda: loss(False))
    lean = gradients(unet, controlnet, loss=lambda: loss(True))
    trainable = {
        (index, name)
        for index, network in enumerate((unet, controlnet))
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    assert set(lean) == set(plain) == trainable
    for name in trainable:
        assert torch.equal(lean[name], plain[name]), name
    # attention to a single token ignores its query and key; all other weights must have changed
    without = {name for name in trainable if not lean[name].any()}
    assert all(any(part in name for part in ("attn2.to_q", "attn2.to_k", "norm2")) for _, name in without)


def test_gradients_reach_the_controlnet_through_a_wholly_frozen_unet():
    unet = tiny_svd_unet().requires_grad_(False)
    controlnet = perturbed_controlnet(unet)
    plain = gradients(
        controlnet, loss=lambda: controlled_prediction(unet, controlnet, encoder_without_grad=False).square().mean()
    )
    lean = gradients(
        controlnet, loss=lambda: controlled_prediction(unet, controlnet, encoder_without_grad=True).square().mean()
    )
    assert set(lean) == set(plain) == {(0, name) for name, _ in controlnet.named_parameters()}
    assert all(torch.equal(lean[name], plain[name]) for name in plain)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_frozen_encoder_keeps_no_activations():
    unet = tiny_svd_unet()
    freeze_encoder_half(unet)
    inputs = tiny_svd_inputs()
    # with an input that requires grad even a frozen encoder would be recorded
    inputs["sample"].requires_grad_()
    inputs["encoder_hidden_states"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        run_svd_unet(unet, **inputs, encoder_without_grad=True)
        lean = sum(kept)
        kept.clear()
        run_svd_unet(unet, **inputs)
        plain = sum(kept)
        kept.clear()
        with torch.no_grad():
            encoded = run_encoder_half(unet, **inputs)
        assert not kept
    assert all(not tensor.requires_grad for tensor in [encoded.mid, *encoded.skips])
    assert lean < 0.7 * plain


def test_withholding_the_gradient_of_a_trainable_encoder_is_refused():
    unet = tiny_svd_unet()
    assert not is_encoder_half_frozen(unet)
    with pytest.raises(ValueError, match=r"conv_in\.weight.*model\.unfreeze"):
        run_svd_unet(unet, **tiny_svd_inputs(), encoder_without_grad=True)
    with torch.no_grad():  # where nothing is trained there is no gradient to withhold
        run_svd_unet(unet, **tiny_svd_inputs(), encoder_without_grad=True)
    freeze_encoder_half(unet)
    assert is_encoder_half_frozen(unet)
    unet.time_embedding.linear_1.bias.requires_grad_()
    assert not is_encoder_half_frozen(unet)


def test_residuals_that_do_not_fit_are_refused():
    unet = tiny_svd_unet()
    inputs = tiny_svd_inputs()
    with torch.no_grad():
        encoded = run_encoder_half(unet, **inputs)
        with pytest.raises(ValueError, match="down_residuals have the shapes"):
            run_svd_unet(unet, **inputs, down_residuals=encoded.skips[1:])
        with pytest.raises(ValueError, match="mid_residual has the shape"):
            run_svd_unet(unet, **inputs, mid_residual=encoded.mid[:1])


def test_gradient_checkpointing_changes_neither_output_nor_gradients():
    unet = tiny_svd_unet()
    controlnet = perturbed_controlnet(unet)
    freeze_encoder_half(unet)

    def loss() -> Tensor:
        return controlled_prediction(unet, controlnet, encoder_without_grad=True).square().mean()

    plain_loss, plain = loss(), gradients(unet, controlnet, loss=loss)
    unet.enable_gradient_checkpointing()
    controlnet.enable_gradient_checkpointing()
    assert torch.equal(loss(), plain_loss)
    checkpointed = gradients(unet, controlnet, loss=loss)
    assert set(checkpointed) == set(plain)
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_both_halves_together_are_the_whole_unet():
    parameters = dict(tiny_svd_unet().named_parameters())
    halves = {name: name.split(".")[0] for name in parameters}
    assert set(halves.values()) == {*ENCODER_HALF, *DECODER_HALF}
