"""Convolutions over frames computed as 2D ones: the same values and gradients, no copies, the same weights."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from support.recipes import perturb, tiny_stage2_recipe
from support.tiny_pipelines import tiny_animation_pipeline
from support.tiny_svd import tiny_svd_inputs, tiny_svd_unet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreamdance.models import SpatioTemporalControlNetModel
from dreamdance.models.channels_last import use_channels_last
from dreamdance.models.svd_unet import run_svd_unet
from dreamdance.models.temporal_convolution import FoldedConv3d, fold_temporal_convolutions
from dreamdance.pipelines import AnimationPipeline
from dreamdance.training.stages.training_stage import stage_of

CONVOLUTIONS = [
    nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)),  # SVD's
    nn.Conv3d(8, 8, (3, 1, 1), stride=(2, 1, 1), bias=False),
    nn.Conv3d(8, 12, (5, 1, 1), padding=(4, 0, 0), dilation=(2, 1, 1), groups=2),
    nn.Conv3d(8, 4, 1),
]
OTHERS = [
    nn.Conv3d(4, 4, 3, padding=1),
    nn.Conv3d(4, 4, (3, 1, 1), stride=(1, 2, 2)),
    nn.Conv3d(4, 4, (3, 1, 1), padding=1),
    nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), padding_mode="replicate"),
    nn.Conv3d(4, 4, (3, 1, 1), padding="same"),
    nn.Conv2d(4, 4, 3),
]
# `n c f h w` as it lies in memory: plain, as frames of pictures one after the other, and with channels innermost
LAYOUTS = {"plain": "ncfhw", "frames outside": "nfchw", "channels inside": "nfhwc"}


def clip(layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random `2 8 6 7 9` with the given memory layout."""
    sizes = dict(zip("ncfhw", (2, 8, 6, 7, 9), strict=True))
    order = LAYOUTS[layout]
    values = torch.randn([sizes[axis] for axis in order], generator=torch.Generator().manual_seed(0), dtype=dtype)
    return values.permute([order.index(axis) for axis in "ncfhw"])


def folded_copy(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    fold_temporal_convolutions(network)
    return network


def plain_temporal_convolutions(network: nn.Module) -> list[str]:
    kernels = {name: module.kernel_size for name, module in network.named_modules() if type(module) is nn.Conv3d}
    return [name for name, kernel in kernels.items() if kernel[1:] == (1, 1)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error relative to the norm of the whole tensor, like the rounding of long sums."""
    return ((found - expected).double().norm() / expected.double().norm()).item()


def gradients(network: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = inputs.detach().requires_grad_()
    output = network(inputs)
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape))
    assert inputs.grad is not None
    return {"output": output.detach(), "input": inputs.grad} | {
        name: weight.grad for name, weight in network.named_parameters()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_output_and_every_gradient_are_those_of_the_3d_convolution(convolution, layout):
    for dtype, rounding in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        plain = copy.deepcopy(convolution).to(dtype)
        folded = folded_copy(plain)
        assert type(folded) is FoldedConv3d
        expected, found = gradients(plain, clip(layout, dtype)), gradients(folded, clip(layout, dtype))
        errors = {name: error(found[name], expected[name]) for name in expected}
        assert {name: size for name, size in errors.items() if size > rounding} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_copied(layout):
    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.copies, self.convolutions = [], 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.convolutions += func is torch.ops.aten.convolution.default
            if not func.is_view and func is not torch.ops.aten.convolution.default:
                self.copies.append(str(func))
            return func(*args, **(kwargs or {}))

    folded, frames = folded_copy(CONVOLUTIONS[0]), clip(layout)
    with Operations() as operations:
        folded(frames)
    assert operations.convolutions == 1
    assert operations.copies == []


@pytest.mark.parametrize("convolution", OTHERS, ids=str)
def test_a_convolution_that_mixes_pixels_or_pads_otherwise_is_not_replaced(convolution):
    assert type(folded_copy(nn.Sequential(convolution))[0]) is type(convolution)


def test_svd_with_its_controlnet_is_as_exact_as_before_in_prediction_and_gradients():
    unet = perturb(tiny_svd_unet())
    controlnet = perturb(SpatioTemporalControlNetModel.from_unet(unet))
    features = torch.randn(6, 32, 8, 12, generator=torch.Generator().manual_seed(3))

    def run(unet, controlnet, dtype):
        unet, controlnet = copy.deepcopy(unet).to(dtype), copy.deepcopy(controlnet).to(dtype)
        inputs = {name: value.to(dtype) for name, value in tiny_svd_inputs().items()}
        residuals = controlnet(**inputs, control_features=features.to(dtype))
        output = run_svd_unet(unet, **inputs, down_residuals=residuals.down, mid_residual=residuals.mid)
        output.square().mean().backward()
        weights = (*unet.parameters(), *controlnet.parameters())
        return output, torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])

    networks, folded = (unet, controlnet), (folded_copy(unet), folded_copy(controlnet))
    assert plain_temporal_convolutions(unet)
    assert plain_temporal_convolutions(folded[0]) == plain_temporal_convolutions(folded[1]) == []
    exact = run(*networks, torch.float64)
    for value, plain, right in zip(run(*folded, torch.float32), run(*networks, torch.float32), exact, strict=True):
        assert error(value, right) < 1.2 * error(plain, right)
        assert error(value, plain) < 2e-6


def test_the_video_decoder_gives_the_same_frames():
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2).eval()
    assert plain_temporal_convolutions(vae)
    folded = folded_copy(vae)
    assert plain_temporal_convolutions(folded) == []
    latents = torch.randn(3, 4, 8, 6)
    with torch.no_grad():
        expected, found = (network.decode(latents, num_frames=3).sample for network in (vae, folded))
    assert error(found, expected) < 1e-6


def test_weights_names_hooks_and_files_do_not_change(tmp_path):
    unet = tiny_svd_unet()
    before = dict(unet.named_parameters())
    calls = []
    convolution = next(module for module in unet.modules() if isinstance(module, nn.Conv3d))
    convolution.register_forward_pre_hook(lambda *_: calls.append(1))
    fold_temporal_convolutions(unet)
    fold_temporal_convolutions(unet)
    after = dict(unet.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    run_svd_unet(unet, **tiny_svd_inputs())
    assert calls == [1]
    unet.save_pretrained(tmp_path)
    read = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path)
    assert plain_temporal_convolutions(read), "loaded convolutions are diffusers' own until they are folded"
    assert all(torch.equal(weight, before[name]) for name, weight in read.state_dict().items())


@pytest.mark.parametrize("order", ["fold first", "turn first"])
def test_folded_convolutions_work_with_channels_innermost(order):
    unet = perturb(tiny_svd_unet())
    expected = run_svd_unet(unet, **tiny_svd_inputs())
    steps = (fold_temporal_convolutions, use_channels_last)
    for step in steps if order == "fold first" else reversed(steps):
        step(unet)
    innermost = []
    for module in unet.modules():
        if isinstance(module, FoldedConv3d):
            module.register_forward_pre_hook(
                lambda _, inputs: innermost.append(inputs[0].is_contiguous(memory_format=torch.channels_last_3d))
            )
    torch.testing.assert_close(run_svd_unet(unet, **tiny_svd_inputs()), expected, rtol=1e-4, atol=1e-5)
    assert innermost
    assert all(innermost)


def test_trainers_and_pipelines_run_them_folded(tmp_path):
    objective = stage_of(tiny_stage2_recipe({"model.unfreeze": "none"})).build()
    stage_of(tiny_stage2_recipe({"model.unfreeze": "none"})).set_trainable(objective)
    pipeline = tiny_animation_pipeline()
    pipeline.save_pretrained(tmp_path)
    read = AnimationPipeline.from_pretrained(tmp_path)
    for holder in (objective, pipeline, read):
        for network in (holder.unet, holder.controlnet):
            folded = [module for module in network.modules() if isinstance(module, FoldedConv3d)]
            assert folded
            assert not [
                module for module in network.modules() if isinstance(module, nn.Conv3d) and module not in folded
            ]
