"""The reference UNet: the features that it returns (Eq. 4), and that it has no unused weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from dreamdance.errors import CheckpointError, UserError
from dreamdance.models import GeometryUNetModel, ReferenceUNetModel
from dreamdance.models.base_configs import STABLE_DIFFUSION_1_5_UNET

SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
LOWER_LEVEL_ONLY = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
CONFIGS = {
    "attention at both levels": {},
    "attention at the lower level": LOWER_LEVEL_ONLY,
    "linear projections": {"use_linear_projection": True},
    "two transformer blocks in a row": {**LOWER_LEVEL_ONLY, "transformer_layers_per_block": 2},
}


def make_base(**overrides):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **overrides}).eval()


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 6, 8, generator=generator), 0, torch.randn(2, 1, 16, generator=generator)


def inputs_of_self_attention(base, inputs):
    """The inputs of every `attn1` in diffusers' own network, by the name of its transformer block."""
    read = {}

    def watch(name):
        return lambda module, arguments, keywords: read.__setitem__(name, arguments[0])

    for name, module in base.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_pre_hook(watch(name.removesuffix(".attn1")), with_kwargs=True)
    with torch.no_grad():
        base(*inputs)
    return read


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_features_are_bit_for_bit_the_inputs_of_the_base_s_self_attentions(overrides, tmp_path):
    make_base(**overrides).save_pretrained(tmp_path)
    base = UNet2DConditionModel.from_pretrained(tmp_path)
    features = None
    with torch.no_grad():
        features = ReferenceUNetModel.from_unet2d(base).eval()(*make_inputs())
    expected = inputs_of_self_attention(base, make_inputs())
    assert features.keys() == expected.keys()
    for name, feature in features.items():
        assert torch.equal(feature, expected[name]), name


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_parameter_that_exists_shapes_a_feature(overrides):
    reference_unet = ReferenceUNetModel.from_unet2d(make_base(**overrides))
    generator = torch.Generator().manual_seed(2)
    features = reference_unet(*make_inputs())
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in features.values()).backward()
    without = [name for name, parameter in reference_unet.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_absent_weights_are_those_that_the_class_lists(overrides):
    base = make_base(**overrides)
    reference_unet = ReferenceUNetModel.from_unet2d(base)
    absent = set(base.state_dict()) - set(reference_unet.state_dict())
    assert set(reference_unet.state_dict()) <= set(base.state_dict())
    assert absent == {key for key in base.state_dict() if key.startswith(tuple(reference_unet.removed_modules))}
    assert {"conv_norm_out.weight", "conv_out.weight"} <= absent


def test_the_blocks_have_the_names_of_the_denoiser_s_blocks_in_running_order():
    base = make_base(**LOWER_LEVEL_ONLY)
    names = ReferenceUNetModel.from_unet2d(base).block_names
    assert names == GeometryUNetModel.from_unet2d(base).block_names
    assert names == (
        "down_blocks.1.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.0",
        "up_blocks.0.attentions.0.transformer_blocks.0",
        "up_blocks.0.attentions.1.transformer_blocks.0",
    )


def test_images_of_a_batch_do_not_see_one_another():
    reference_unet = ReferenceUNetModel.from_unet2d(make_base()).double()
    sample, timestep, conditioning = (x.double() if torch.is_tensor(x) else x for x in make_inputs())
    with torch.no_grad():
        together = reference_unet(sample, timestep, conditioning)
        alone = reference_unet(sample[:1], timestep, conditioning[:1])
    for name, feature in alone.items():
        torch.testing.assert_close(together[name][:1], feature)


def test_a_saved_model_loads_without_the_removed_parts(tmp_path, caplog):
    reference_unet = ReferenceUNetModel.from_unet2d(make_base(**LOWER_LEVEL_ONLY)).eval()
    reference_unet.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        loaded = ReferenceUNetModel.from_pretrained(tmp_path)
    assert "config attributes" not in caplog.text
    assert loaded.state_dict().keys() == reference_unet.state_dict().keys()
    with torch.no_grad():
        features, expected = loaded(*make_inputs()), reference_unet(*make_inputs())
    assert all(torch.equal(features[name], expected[name]) for name in expected)


def test_gradient_checkpointing_changes_neither_features_nor_gradients():
    results = []
    for checkpointing in (False, True):
        reference_unet = ReferenceUNetModel.from_unet2d(make_base()).double().train()
        if checkpointing:
            reference_unet.enable_gradient_checkpointing()
        features = reference_unet(*(x.double() if torch.is_tensor(x) else x for x in make_inputs()))
        before = {name: feature.detach().clone() for name, feature in features.items()}
        sum(feature.square().sum() for feature in features.values()).backward()
        assert all(torch.equal(features[name], before[name]) for name in before)
        results.append((before, {name: p.grad for name, p in reference_unet.named_parameters()}))
    torch.testing.assert_close(results[1], results[0])


def test_a_weight_that_is_left_over_without_being_listed_is_refused():
    base = make_base()
    base.extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError, match=r"left over \['extra.weight'\]"):
        ReferenceUNetModel.from_unet2d(base)


def test_a_unet_without_attention_in_its_up_blocks_is_refused():
    base = make_base(up_block_types=("UpBlock2D", "UpBlock2D"))
    with pytest.raises(UserError, match="needs a 'CrossAttnUpBlock2D'"):
        ReferenceUNetModel.from_unet2d(base)


def test_at_full_size_only_the_tail_after_the_last_feature_is_missing():
    with torch.device("meta"):
        base = UNet2DConditionModel(**STABLE_DIFFUSION_1_5_UNET)
    reference_unet = ReferenceUNetModel.from_unet2d(base)
    assert len(reference_unet.block_names) == 16
    assert sum(parameter.numel() for parameter in base.parameters()) == 859_520_964
    assert sum(parameter.numel() for parameter in reference_unet.parameters()) == 857_066_560
    assert {name.split(".")[0] for name in reference_unet.removed_modules} == {
        "up_blocks",
        "conv_norm_out",
        "conv_act",
        "conv_out",
    }
