"""Rewritten networks compute what diffusers' own modules compute, forward and backward, with the same weights."""

import copy
from collections import Counter
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, SpatioTemporalResBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from support.recipes import perturb, tiny_stage1_recipe, tiny_stage2_recipe, tiny_unet_config
from support.tiny_pipelines import tiny_animation_pipeline, tiny_geometry_pipeline
from support.tiny_svd import tiny_svd_inputs, tiny_svd_unet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreamdance.models import GeometryUNetModel, ReferenceUNetModel, SpatioTemporalControlNetModel
from dreamdance.models.equal_rewrites import EQUAL_REWRITES, apply_equal_rewrites
from dreamdance.models.temporal_convolution import FoldedConv3d
from dreamdance.training.stages.training_stage import stage_of

pytestmark = pytest.mark.usefixtures("one_thread")

REWRITES = {**{name: frozenset({name}) for name in sorted(EQUAL_REWRITES)}, "all": EQUAL_REWRITES}
NO_GRADIENT = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
AUTOENCODER = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2}


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unet_2d():
    return UNet2DConditionModel(**tiny_unet_config() | {"up_block_types": ["CrossAttnUpBlock2D"] * 2})


def run_geometry(unet, sample, context):
    features = {name: draw(2, 6, unet.get_submodule(name).attn1.to_k.in_features, seed=4) for name in unet.block_names}
    features = {name: feature.to(sample.dtype) for name, feature in features.items()}
    domains = torch.arange(3).repeat(4)
    counts = {"num_frames": 2, "num_domains": 3}
    return [unet(sample, torch.tensor([3, 700]), context, domains=domains, reference_features=features, **counts)]


def run_svd(network, sample, context, **others):
    inputs = {**tiny_svd_inputs(), "sample": sample, "encoder_hidden_states": context, **others}
    floats = {name: value.to(sample.dtype) for name, value in inputs.items()}
    if isinstance(network, SpatioTemporalControlNetModel):
        residuals = network(**floats)
        return [*residuals.down, residuals.mid]
    return [network(**floats).sample]


# By name: makes the network, runs it on the inputs, and their shapes; all contexts have one token.
BLOCKS = {
    "SVD's transformer": (
        lambda: TransformerSpatioTemporalModel(2, 16, 32, cross_attention_dim=16),
        lambda block, frames, context: [block(frames, context, torch.zeros(2, 3), return_dict=False)[0]],
        ((6, 32, 4, 6), (6, 1, 16)),
    ),
    "SVD's residual block": (
        lambda: SpatioTemporalResBlock(32, 64, temb_channels=16),
        lambda block, frames, embedding: [block(frames, embedding, torch.zeros(2, 3))],
        ((6, 32, 4, 6), (6, 16)),
    ),
    "transformer": (
        lambda: Transformer2DModel(2, 16, 32, norm_num_groups=8, cross_attention_dim=16),
        lambda block, pictures, context: [block(pictures, context).sample],
        ((2, 32, 4, 6), (2, 1, 16)),
    ),
    "residual block": (
        lambda: ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=16),
        lambda block, pictures, embedding: [block(pictures, embedding)],
        ((2, 32, 4, 6), (2, 16)),
    ),
}
NETWORKS = BLOCKS | {
    "diffusers' 2D UNet": (
        unet_2d,
        lambda unet, sample, context: [unet(sample, torch.tensor([3, 700]), context).sample],
        ((2, 12, 8, 6), (2, 1, 24)),
    ),
    "geometry UNet": (
        lambda: GeometryUNetModel.from_unet2d(unet_2d(), geometry_attention=True, temporal_attention=True),
        run_geometry,
        ((12, 12, 8, 6), (2, 1, 24)),
    ),
    "reference UNet": (
        lambda: ReferenceUNetModel.from_unet2d(unet_2d()),
        lambda unet, sample, context: list(unet(sample, 0, context).values()),
        ((2, 12, 8, 6), (2, 1, 24)),
    ),
    "SVD's UNet": (tiny_svd_unet, run_svd, ((2, 3, 8, 8, 12), (2, 1, 16))),
    "ControlNet": (
        lambda: SpatioTemporalControlNetModel.from_unet(tiny_svd_unet()),
        lambda network, *inputs: run_svd(network, *inputs, control_features=draw(6, 32, 8, 12)),
        ((2, 3, 8, 8, 12), (2, 1, 16)),
    ),
    "autoencoder": (
        lambda: AutoencoderKL(**AUTOENCODER, up_block_types=("UpDecoderBlock2D",) * 2),
        lambda vae, pictures: [vae(pictures).sample],
        ((2, 3, 12, 8),),
    ),
    "video autoencoder": (
        lambda: AutoencoderKLTemporalDecoder(**AUTOENCODER),
        lambda vae, latents: [vae.decode(latents, num_frames=3).sample],
        ((6, 4, 6, 4),),
    ),
}


def make(name):
    torch.manual_seed(0)
    return perturb(NETWORKS[name][0]()).train()


def rewritten(network, rewrites=EQUAL_REWRITES):
    network = copy.deepcopy(network)
    apply_equal_rewrites(network, rewrites)
    return network


def results(name, network, dtype):
    """Outputs, and the gradients of the inputs and of all weights, of one network in `NETWORKS`."""
    _, run, shapes = NETWORKS[name]
    network = network.to(dtype)
    network.zero_grad()
    inputs = [draw(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    outputs = run(network, *inputs)
    torch.autograd.backward(outputs, [draw(*output.shape, seed=9).to(dtype) for output in outputs])
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    named |= {f"input {index}": value.grad for index, value in enumerate(inputs)}
    return named | {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


@cache
def plain_results(name, dtype):
    return results(name, make(name), dtype)


def error(found, expected):
    """The error relative to the norm of all values together."""
    difference, whole = (torch.cat([value.double().flatten() for value in values]) for values in (found, expected))
    return ((difference - whole).norm() / whole.norm()).item()


# blocks with each rewrite alone, whole networks with all of them
CASES = [(name, rewrites) for name in NETWORKS for rewrites in REWRITES if name in BLOCKS or rewrites == "all"]


@pytest.mark.parametrize(("name", "rewrites"), CASES)
def test_outputs_and_all_gradients_are_those_of_diffusers(name, rewrites):
    network = rewritten(make(name), REWRITES[rewrites])
    found, expected = results(name, network, torch.float32), plain_results(name, torch.float32)
    outputs, gradients = ([key for key in found if key.startswith("output") is flag] for flag in (True, False))
    difference, rounding = (
        [error([value[key] for key in keys], [other[key] for key in keys]) for keys in (outputs, gradients)]
        for value, other in ((found, expected), (expected, plain_results(name, torch.float64)))
    )
    assert difference[0] < 1e-6
    # in a whole network rounding adds up, in diffusers' own gradients as well
    assert difference[1] < (1e-6 if name in BLOCKS else min(2 * rounding[1], 5e-6))
    # in float64 each tensor alone, also those whose sums cancel
    expected = plain_results(name, torch.float64)
    found = results(name, network, torch.float64)
    largest = max(value.abs().max().item() for value in expected.values())
    for each, value in expected.items():
        if each not in found:
            assert each.endswith(NO_GRADIENT)
            assert value.abs().max() <= 1e-13 * largest
        else:
            torch.testing.assert_close(found[each], value, rtol=1e-10, atol=1e-13 * largest, msg=each)
    assert ("one_token_attention" in REWRITES[rewrites] and not name.endswith(("autoencoder", "residual block"))) == (
        found.keys() != expected.keys()
    )


@pytest.mark.parametrize("rewrite", ["no_division", "gate_gradients"])
@pytest.mark.parametrize("name", NETWORKS)
def test_some_rewrites_change_no_bit(name, rewrite):
    expected = plain_results(name, torch.float32)
    found = results(name, rewritten(make(name), {rewrite}), torch.float32)
    assert found.keys() == expected.keys()
    assert [each for each in expected if not torch.equal(found[each], expected[each])] == []


class CountedOperations(TorchDispatchMode):
    """Counts operations by their names in ATen."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(name, network):
    with CountedOperations() as operations:
        results(name, network, torch.float32)
    return operations.counts


@pytest.mark.parametrize("name", ["geometry UNet", "reference UNet", "SVD's UNet"])
def test_neither_divisions_nor_softmax_over_one_token_nor_its_norm_run(name):
    plain, found = operations(name, make(name)), operations(name, rewritten(make(name)))
    blocks = sum(type(module) is Attention for module in make(name).modules()) // 2
    softmax = "_scaled_dot_product_flash_attention_for_cpu"
    assert blocks > 0
    assert plain["div"] - found["div"] >= 2 * (2 * blocks - (name == "geometry UNet") * blocks)
    assert plain[softmax] - found[softmax] == blocks
    assert plain["native_layer_norm"] - found["native_layer_norm"] == blocks


@pytest.mark.parametrize("name", ["geometry UNet", "SVD's UNet"])
def test_gradients_of_values_and_gates_are_written_once(name):
    network = make(name)
    plain, found = operations(name, network), operations(name, rewritten(network, {"gate_gradients"}))
    blocks = sum(type(module) is GEGLU for module in network.modules())
    assert blocks > 0
    assert plain["cat"] - found["cat"] == blocks
    assert all(plain[each] == found[each] for each in ("mul", "gelu", "gelu_backward", "clone", "copy_"))


def test_with_more_tokens_attention_and_its_gradients_are_bit_for_bit_those_of_diffusers():
    network = make("diffusers' 2D UNet")
    inputs = [draw(2, 12, 8, 6).float(), torch.tensor([3, 700]), draw(2, 5, 24).float()]
    found = []
    for each in (network, rewritten(network)):
        each(*inputs).sample.square().sum().backward()
        found.append({name: weight.grad for name, weight in each.named_parameters()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert all(found[1][name].any() for name in found[1] if name.endswith("attn2.to_q.weight"))


def test_a_clip_whose_embedding_was_dropped_is_computed_as_such_beside_one_that_has_it():
    network = make("SVD's UNet").double()
    inputs = {name: value.double() for name, value in tiny_svd_inputs().items()}
    inputs["encoder_hidden_states"][0] = 0
    with torch.no_grad():
        expected, found = network(**inputs).sample, rewritten(network)(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(found[0], found[1])


def test_another_attention_processor_is_called_as_before():
    class Recorder(AttnProcessor2_0):
        queries = []

        def __call__(self, attention, hidden_states, *inputs, **arguments):
            self.queries.append(hidden_states)
            return super().__call__(attention, hidden_states, *inputs, **arguments)

    recorded = []
    network = make("SVD's UNet").double()
    inputs = {name: value.double() for name, value in tiny_svd_inputs().items()}
    for each in (network, rewritten(network)):
        each.set_attn_processor(Recorder())
        Recorder.queries = []
        each(**inputs)
        recorded.append(Recorder.queries)
    assert len(recorded[0]) == len(recorded[1]) > 0
    for plain, found in zip(*recorded, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_keep_names_and_order_and_a_second_call_changes_nothing(name):
    network = make(name)
    before = list(network.named_parameters())
    state = list(network.state_dict())
    apply_equal_rewrites(network)
    classes = [type(module) for module in network.modules()]
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    apply_equal_rewrites(network)
    assert [type(module) for module in network.modules()] == classes
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    assert [each for each, _ in network.named_parameters()] == [each for each, _ in before]
    assert all(found is weight for (_, found), (_, weight) in zip(network.named_parameters(), before, strict=True))
    assert list(network.state_dict()) == state


def test_a_saved_network_loads_as_diffusers_own_and_a_copy_uses_its_own_norm(tmp_path):
    unet = rewritten(make("SVD's UNet"))
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    assert_plain(loaded)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in unet.state_dict().items())
    copied = copy.deepcopy(unet)
    blocks = [module for module in copied.modules() if isinstance(module, BasicTransformerBlock)]
    assert blocks
    assert all(block.attn2.query_norm is block.norm2 for block in blocks)


REWRITTEN = (Attention, AlphaBlender, GEGLU, ResnetBlock2D)


def assert_plain(network):
    found = [type(module) for module in network.modules() if isinstance(module, REWRITTEN)]
    assert found
    assert set(found) <= set(REWRITTEN)
    assert not any(isinstance(module, FoldedConv3d) for module in network.modules())


def assert_rewritten(network):
    found = [type(module) for module in network.modules() if isinstance(module, REWRITTEN)]
    assert found
    assert not set(found) & set(REWRITTEN)
    temporal = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    assert all(isinstance(module, FoldedConv3d) for module in temporal)


def test_trainers_and_pipelines_rewrite_their_networks_and_constructors_and_loaders_do_not(tmp_path):
    for recipe, names in (
        (tiny_stage1_recipe("temporal"), ("unet", "reference_unet")),
        (tiny_stage2_recipe(), ("unet", "controlnet")),
    ):
        objective, plain = stage_of(recipe).build(), stage_of(recipe).build(rewrites=())
        for name in names:
            assert_plain(getattr(plain, name))
            assert_rewritten(getattr(objective, name))
            own = getattr(objective, name)
            own.save_pretrained(tmp_path / recipe.name / name)
            assert_plain(type(own).from_pretrained(tmp_path / recipe.name / name))
    for pipeline, names in (
        (tiny_geometry_pipeline(), ("unet", "reference_unet")),
        (tiny_animation_pipeline(), ("unet", "controlnet")),
    ):
        folder = tmp_path / type(pipeline).__name__
        pipeline.save_pretrained(folder)
        for opened in (pipeline, type(pipeline).from_pretrained(folder)):
            for name in names:
                assert_rewritten(getattr(opened, name))


def test_an_unknown_rewrite_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"\['magic'\]; accepted: one_token_attention, no_division"):
        apply_equal_rewrites(nn.Identity(), {"magic"})
