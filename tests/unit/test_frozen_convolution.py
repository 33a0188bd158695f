"""A convolution that keeps no input for a frozen weight computes what a plain one computes."""

import copy

import pytest
import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from dreamdance.models.channels_last import use_channels_last
from dreamdance.models.temporal_convolution import FoldedConv3d, fold_temporal_convolutions
from dreamdance.training.networks.frozen_convolution import (
    FrozenConv2d,
    FrozenConv3d,
    FrozenFoldedConv3d,
    replace_convolutions,
)

CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(4, 4, 1),
    nn.Conv2d(4, 8, (3, 5), padding=(1, 2), dilation=(2, 1), groups=2),
    nn.Conv3d(3, 5, (3, 1, 1), padding=(1, 0, 0)),
    nn.Conv3d(2, 4, 3, stride=(1, 2, 2), padding=1),
    FoldedConv3d(3, 5, (3, 1, 1), padding=(1, 0, 0)),
]
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes
DESCRIPTIONS = [str(convolution) for convolution in CONVOLUTIONS]


def make_pair(convolution: nn.Module, *, frozen: bool) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    plain = copy.deepcopy(convolution).requires_grad_(not frozen)
    lean = copy.deepcopy(plain)
    replace_convolutions(lean)
    assert type(lean) is not type(plain)
    sizes = (7, 9) if isinstance(convolution, nn.Conv2d) else (5, 7, 9)
    return plain, lean, torch.randn(2, convolution.in_channels, *sizes)


def run(convolution: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Size]]:
    """Output, gradient of the input, and the shapes of all saved tensors."""
    images = images.clone().requires_grad_()
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = convolution(images)
    output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape))
    return output, images.grad, saved


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=DESCRIPTIONS)
def test_a_frozen_convolution_has_the_same_output_and_input_gradient_and_keeps_only_its_weight(convolution):
    plain, lean, images = make_pair(convolution, frozen=True)
    expected_output, expected_gradient, expected_saved = run(plain, images)
    output, gradient, saved = run(lean, images)
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected_gradient)
    folded = isinstance(plain, FoldedConv3d)
    seen = (images.flatten(3), plain.weight.squeeze(-1)) if folded else (images, plain.weight)
    assert seen[0].shape in expected_saved
    assert saved == [seen[1].shape]


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=DESCRIPTIONS)
def test_a_trainable_convolution_has_the_same_gradients_as_a_plain_one(convolution):
    plain, lean, images = make_pair(convolution, frozen=False)
    expected_output, expected_gradient, _ = run(plain, images)
    output, gradient, _ = run(lean, images)
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected_gradient)
    for (name, parameter), (_, expected) in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name


def test_whether_the_weight_is_frozen_is_checked_at_each_call():
    _, lean, images = make_pair(CONVOLUTIONS[0], frozen=True)
    assert run(lean, images)[2] == [lean.weight.shape]
    lean.requires_grad_(True)
    assert images.shape in run(lean, images)[2]
    assert lean.weight.grad is not None


def test_replacing_keeps_names_parameters_and_modes_and_can_be_repeated():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.SiLU(), nn.Conv3d(4, 4, 1, bias=False)).eval())
    reflecting = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    network.append(reflecting)
    before = dict(network.named_parameters())
    replace_convolutions(network)
    replace_convolutions(network)
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert type(network[0]) is FrozenConv2d
    assert type(network[1][1]) is FrozenConv3d
    assert network[0].training
    assert not network[1][1].training
    # other paddings are not supported by the replacement
    assert network[2] is reflecting


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=DESCRIPTIONS)
def test_the_backward_of_an_input_with_channels_innermost_is_asked_for_in_that_layout(convolution):
    class Backward(TorchDispatchMode):
        layouts = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                self.layouts.append(suggest_memory_format(args[1]))
            return func(*args, **(kwargs or {}))

    plain, lean, images = make_pair(convolution, frozen=True)
    images = images.contiguous(memory_format=LAYOUTS[images.dim()])
    expected_output, expected_gradient, _ = run(plain, images)
    with Backward() as backward:
        output, gradient, _ = run(lean, images)
    assert backward.layouts == [LAYOUTS[4] if isinstance(plain, FoldedConv3d) else LAYOUTS[images.dim()]]
    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_a_folded_convolution_stays_folded():
    network = nn.Sequential(nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)))
    fold_temporal_convolutions(network)
    replace_convolutions(network)
    assert type(network[0]) is FrozenFoldedConv3d


def test_replacing_keeps_the_hooks_by_which_inputs_are_turned_to_channels_last():
    network = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1)).requires_grad_(False)
    use_channels_last(network)
    replace_convolutions(network)
    innermost = []
    for convolution in network:
        convolution.register_forward_pre_hook(
            lambda _, inputs: innermost.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    network(torch.randn(2, 4, 5, 7))
    assert innermost == [True, True]
