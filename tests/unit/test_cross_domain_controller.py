"""The cross-domain controller (Eq. 7): zero before training, independent of the order of controls, frame by frame."""

import pytest
import torch
from torch import Tensor, nn

from dreamdance.errors import UserError
from dreamdance.models import CrossDomainControllerModel
from dreamdance.models.cross_domain_controller import split_into_strides

SETTINGS = {"out_channels": 24, "channels": (8, 16, 32), "head_width": 16, "downscale_factor": 4}


def controller(*, perturbed: bool = True, **changes: object) -> CrossDomainControllerModel:
    torch.manual_seed(0)
    network = CrossDomainControllerModel(**{**SETTINGS, **changes})
    if perturbed:
        nn.init.normal_(network.zero_convolution.weight)
    return network


def maps(*, num_frames: int = 4, height: int = 16, width: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(num_frames, 3, height, width, generator=generator) for name in ("pose", "depth", "normal")}


@pytest.mark.parametrize("geometry_attention", [True, False])
def test_before_training_the_guidance_feature_is_zero(geometry_attention):
    feature = controller(perturbed=False, geometry_attention=geometry_attention)(maps())
    assert feature.shape == (4, 24, 4, 6)
    assert not feature.any()


def test_the_order_of_the_controls_does_not_matter():
    first = controller()
    second = controller(controls=("normal", "pose", "depth"))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(second(maps()), first(maps()), rtol=1e-4, atol=1e-5)
        assert torch.equal(first(dict(reversed(maps().items()))), first(maps()))


def test_without_attention_the_feature_is_the_mean_of_the_encoders():
    network = controller(geometry_attention=False)
    with torch.no_grad():
        encoded = torch.stack([network.encoders[name](each) for name, each in maps().items()])
        torch.testing.assert_close(network(maps()), network.zero_convolution(encoded.mean(dim=0)))


def test_attention_is_a_residual_branch_over_the_modalities():
    network = controller()
    nn.init.zeros_(network.attention.to_out.weight)
    nn.init.zeros_(network.attention.to_out.bias)
    without = controller(geometry_attention=False)
    without.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("attention.")})
    with torch.no_grad():
        torch.testing.assert_close(network(maps()), without(maps()), rtol=1e-5, atol=1e-6)


def test_with_attention_one_modality_changes_the_contribution_of_another():
    for geometry_attention in (True, False):
        network = controller(geometry_attention=geometry_attention)
        inputs, other = maps(), {name: each.flip(0) for name, each in maps().items()}

        def difference(name: str, rest: dict[str, Tensor], network=network, inputs=inputs, other=other) -> Tensor:
            with torch.no_grad():
                return network({**rest, name: other[name]}) - network({**rest, name: inputs[name]})

        alone = difference("pose", inputs)
        beside_others = difference("pose", other)
        interaction = (alone - beside_others).abs().max() / alone.abs().max()
        assert (interaction > 1e-3) == geometry_attention


def test_frames_do_not_see_one_another():
    network = controller()
    inputs = maps()
    with torch.no_grad():
        alone = network({name: each[1:2] for name, each in inputs.items()})
        torch.testing.assert_close(network(inputs)[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_single_modality_is_enough():
    network = controller(controls=("pose",))
    with torch.no_grad():
        assert network({"pose": maps()["pose"]}).std() > 0


def test_backends_of_attention_agree():
    first, second = controller(attention_backend="reference"), controller(attention_backend="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(first(maps()), second(maps()), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns_once_the_zero_convolution_has_moved():
    network = controller()
    network(maps()).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_gradient_checkpointing_changes_neither_output_nor_gradients():
    network = controller()
    plain = network(maps())
    plain.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    network.enable_gradient_checkpointing()
    checkpointed = network(maps())
    checkpointed.square().mean().backward()
    assert torch.equal(checkpointed, plain)
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in network.named_parameters())


def test_saving_and_loading_gives_the_same_feature(tmp_path):
    network = controller()
    network.save_pretrained(tmp_path)
    loaded, report = CrossDomainControllerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(maps()), network(maps()))


@pytest.mark.parametrize(
    ("factor", "channels", "strides"),
    [(8, 4, [2, 2, 2]), (2, 4, [2, 1, 1]), (1, 2, [1]), (4, 2, [4]), (16, 4, [4, 2, 2]), (6, 3, [3, 2]), (3, 2, [3])],
)
def test_any_downscale_factor_is_reached(factor, channels, strides):
    assert split_into_strides(factor, channels - 1) == strides
    network = controller(downscale_factor=factor, channels=(8, 8, 8, 16)[-channels:])
    assert network(maps(height=48, width=96)).shape == (4, 24, 48 // factor, 96 // factor)


@pytest.mark.parametrize(("factor", "channels"), [(2, (8, 16)), (4, (8, 16)), (8, (8, 8, 8, 16)), (3, (8, 16))])
def test_every_pixel_contributes_to_the_feature(factor, channels):
    network = controller(downscale_factor=factor, channels=channels)
    inputs = {name: each.requires_grad_() for name, each in maps(num_frames=1, height=24, width=24).items()}
    network(inputs).square().sum().backward()
    assert all(each.grad.abs().sum(dim=1).min() > 0 for each in inputs.values())


def test_bad_settings_are_refused_by_name():
    with pytest.raises(UserError, match=r"32 channels.*width 20.*controller_head_width"):
        controller(head_width=20)
    controller(head_width=20, geometry_attention=False)  # without attention there are no heads
    for controls in ((), ("pose", "pose")):
        with pytest.raises(UserError, match="each modality once"):
            controller(controls=controls)
    with pytest.raises(UserError, match="two widths or more"):
        controller(channels=(16,))


def test_maps_that_do_not_fit_are_refused():
    network = controller()
    with pytest.raises(ValueError, match=r"model\.controls"):
        network({"pose": maps()["pose"]})
    with pytest.raises(ValueError, match="multiple of 4"):
        network(maps(height=18))
    with pytest.raises(ValueError, match="one size"):
        network({**maps(), "pose": maps(height=32)["pose"]})
