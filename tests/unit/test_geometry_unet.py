"""Stage 1's denoiser as a diffusers model: its folder format, strict loading of weights, its size, refused inputs."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from dreamdance.errors import CheckpointError, UserError
from dreamdance.modalities import DOMAINS
from dreamdance.models import GeometryUNetModel
from dreamdance.models.base_configs import STABLE_DIFFUSION_1_5_UNET
from dreamdance.models.diffusers_unet import load_base_weights
from dreamdance.models.domain_embedding import DomainEmbedding
from dreamdance.models.temporal_attention import TemporalAttention

SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
NUM_SMALL_BLOCKS = 4  # one down, one middle, two up


def make_base(**overrides):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **overrides})


def make_inputs(batch=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 8, 8, generator=generator), 5, torch.randn(1, 1, 16, generator=generator)


def num_parameters(parameters):
    return sum(parameter.numel() for parameter in parameters.values())


def test_a_saved_model_loads_with_the_same_branches_weights_and_output(tmp_path):
    unet = GeometryUNetModel.from_unet2d(
        make_base(), geometry_attention=True, temporal_attention=True, max_frames=7, attention_backend="reference"
    ).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    unet.save_pretrained(tmp_path)
    loaded = GeometryUNetModel.from_pretrained(tmp_path)

    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert {key: loaded.config[key] for key in ("max_frames", "attention_backend")} == {
        "max_frames": 7,
        "attention_backend": "reference",
    }
    counts = {"num_frames": 2, "num_domains": 3, "domains": torch.arange(3).repeat(2)}
    with torch.no_grad():
        assert torch.equal(loaded(*make_inputs(), **counts), unet(*make_inputs(), **counts))


def test_loading_a_saved_model_gives_no_warning_about_its_configuration(tmp_path, caplog):
    GeometryUNetModel.from_unet2d(make_base(use_linear_projection=True)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "GeometryUNetModel"
    with caplog.at_level("WARNING"):
        loaded = GeometryUNetModel.from_pretrained(tmp_path)
    assert "config attributes" not in caplog.text
    assert loaded.config["use_linear_projection"] is True


def test_a_configuration_alone_builds_the_same_network():
    unet = GeometryUNetModel.from_unet2d(make_base(), geometry_attention=True, domain_embedding=False)
    again = GeometryUNetModel.from_config(unet.config)
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in unet.state_dict().items()}


def test_the_configuration_names_the_existing_branches():
    for geometry, temporal, domain in ((True, False, True), (False, True, False), (False, False, True)):
        unet = GeometryUNetModel.from_unet2d(
            make_base(), geometry_attention=geometry, temporal_attention=temporal, domain_embedding=domain
        )
        assert bool(unet.geometry_parameters()) is geometry
        assert bool(unet.temporal_parameters()) is temporal
        assert bool(unet.domain_parameters()) is domain


def test_every_transformer_block_has_one_branch_of_each_kind_whose_output_projection_is_zero():
    unet = GeometryUNetModel.from_unet2d(make_base(), geometry_attention=True, temporal_attention=True)
    for parameters in (unet.geometry_parameters(), unet.temporal_parameters()):
        blocks = {name.rsplit(".to_out.", 1)[0] for name in parameters if name.endswith(".to_out.weight")}
        assert len(blocks) == NUM_SMALL_BLOCKS == len(unet.block_names)
        for name, parameter in parameters.items():
            assert (".to_out." in name) == (not parameter.any()) or name.endswith("norm.bias")


def test_weights_may_be_reused_instead_of_copied():
    torch.manual_seed(0)
    base = make_base()
    models = []
    for reuse in (False, True):
        torch.manual_seed(1)  # the added branches have random weights
        models.append(GeometryUNetModel.from_unet2d(base, geometry_attention=True, reuse_weights=reuse))
    own = {value.data_ptr() for value in base.parameters()}
    assert not own & {value.data_ptr() for value in models[0].parameters()}
    assert own <= {value.data_ptr() for value in models[1].parameters()}
    copied, reused = (model.state_dict() for model in models)
    assert copied.keys() == reused.keys()
    assert all(torch.equal(value, reused[name]) for name, value in copied.items())
    assert all(value.requires_grad for value in models[1].parameters())


def test_the_added_parameters_are_exactly_those_that_the_base_lacks():
    base = make_base()
    unet = GeometryUNetModel.from_unet2d(base, geometry_attention=True, temporal_attention=True)
    added = {**unet.domain_parameters(), **unet.geometry_parameters(), **unet.temporal_parameters()}
    assert set(unet.state_dict()) - set(base.state_dict()) == set(added)
    assert set(base.state_dict()) <= set(unet.state_dict())


def test_the_domain_embedding_is_a_sine_and_cosine_code_through_an_mlp_that_is_not_zero():
    torch.manual_seed(0)
    embedding = DomainEmbedding(16)
    output = embedding(torch.tensor([0, 1, 2, 1]))
    one_hot = torch.eye(len(DOMAINS))[[0, 1, 2, 1]]
    torch.testing.assert_close(output, embedding.mlp(torch.cat([torch.sin(one_hot), torch.cos(one_hot)], dim=-1)))
    assert torch.pdist(output[:3]).min() > 0.1
    assert torch.equal(output[1], output[3])


def test_an_index_that_is_no_domain_is_refused():
    for index in (3, -1):
        with pytest.raises(IndexError):
            DomainEmbedding(16)(torch.tensor([index]))


def test_weights_that_are_missing_or_left_over_are_refused_by_name():
    unet = GeometryUNetModel.from_unet2d(make_base())
    added = set(unet.domain_parameters())
    lacking = make_base()
    del lacking.conv_norm_out
    with pytest.raises(CheckpointError, match=r"missing \['conv_norm_out.bias', 'conv_norm_out.weight'\]"):
        load_base_weights(unet, lacking, added=added, unused=())
    abundant = make_base()
    abundant.extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError, match=r"left over \['extra.weight'\]"):
        load_base_weights(unet, abundant, added=added, unused=())
    load_base_weights(unet, abundant, added=added, unused=("extra",))
    with pytest.raises(CheckpointError, match="domain_embedder"):
        load_base_weights(unet, make_base(), added=(), unused=())


def test_the_base_is_copied_not_shared():
    base = make_base()
    unet = GeometryUNetModel.from_unet2d(base)
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    assert base.conv_in.weight.any()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("only_cross_attention", True),
        ("addition_embed_type", "text"),
        ("mid_block_type", "UNetMidBlock2D"),
        ("down_block_types", ("DownBlock2D", "AttnDownBlock2D")),
    ],
)
def test_variants_that_stable_diffusion_does_not_use_are_refused_by_name(key, value):
    named = value[-1] if isinstance(value, tuple) else str(value)
    with pytest.raises(UserError, match=named):
        GeometryUNetModel.from_unet2d(make_base(**{key: value}, addition_embed_type_num_heads=8))


def test_more_frames_than_positions_name_the_key_to_change():
    unet = GeometryUNetModel.from_unet2d(make_base(), temporal_attention=True, max_frames=2)
    with pytest.raises(UserError, match=r"3 frames at once.* positions for 2 \(model.max_frames\)"):
        unet(*make_inputs(3), num_frames=3)


def test_without_temporal_attention_any_number_of_frames_passes():
    unet = GeometryUNetModel.from_unet2d(make_base(), max_frames=2)
    assert unet(*make_inputs(3), num_frames=3).shape == (3, 4, 8, 8)


def test_frame_positions_differ_from_one_another():
    """With equal tokens in every frame only the position distinguishes the frames."""
    torch.manual_seed(0)
    temporal = TemporalAttention(8, 2, max_frames=16)
    torch.nn.init.normal_(temporal.to_out.weight)
    output = temporal(torch.ones(16, 1, 8) * torch.arange(8.0), num_frames=16)[:, 0]
    assert torch.pdist(output).min() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 4}, "a batch of 6 is not whole clips of 4 frames x 1 domains"),
        ({"num_domains": 0}, "a batch of 6 is not whole clips"),
        ({"domains": torch.arange(3)}, r"one index per sample, \(6,\); got \(3,\)"),
        ({"num_domains": 3, "pose_features": torch.zeros(3, 32, 8, 8)}, "3 frames, but the batch has 2"),
        ({"reference_features": {"mid_block": torch.zeros(1, 1, 64)}}, "one entry per transformer block"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(arguments, message):
    unet = GeometryUNetModel.from_unet2d(make_base())
    with pytest.raises(ValueError, match=message):
        unet(*make_inputs(), **arguments)


def test_conditioning_that_cannot_be_shared_out_to_the_clips_is_refused():
    unet = GeometryUNetModel.from_unet2d(make_base())
    sample, timestep, _ = make_inputs()
    with pytest.raises(ValueError, match="encoder_hidden_states: 4 rows"):
        unet(sample, timestep, torch.zeros(4, 1, 16))
    with pytest.raises(ValueError, match="timestep: 4 rows"):
        unet(sample, torch.zeros(4), torch.zeros(1, 1, 16))


def test_domains_for_a_model_without_their_embedding_are_refused():
    unet = GeometryUNetModel.from_unet2d(make_base(), domain_embedding=False)
    with pytest.raises(ValueError, match="no domain embedding"):
        unet(*make_inputs(), domains=torch.zeros(6, dtype=torch.long))


def test_at_full_size_every_module_has_the_parameters_it_should():
    with torch.device("meta"):
        base = UNet2DConditionModel(**STABLE_DIFFUSION_1_5_UNET)
    unet = GeometryUNetModel.from_unet2d(base, geometry_attention=True, temporal_attention=True)
    added = [unet.domain_parameters(), unet.geometry_parameters(), unet.temporal_parameters()]
    assert len(unet.block_names) == 16
    widths = 5 * [320] + 5 * [640] + 6 * [1280]
    one_branch = sum(3 * width**2 + width**2 + 3 * width for width in widths)  # qkv, output with bias, LayerNorm
    assert one_branch == 49_599_040
    assert [num_parameters(group) for group in added] == [1_648_640, one_branch, one_branch]
    assert num_parameters(dict(base.named_parameters())) == 859_520_964
    total = num_parameters(dict(unet.named_parameters()))
    assert total == 859_520_964 + sum(num_parameters(group) for group in added)


def test_at_full_size_the_network_runs_on_the_meta_device():
    with torch.device("meta"):
        unet = GeometryUNetModel(**STABLE_DIFFUSION_1_5_UNET, geometry_attention=True, temporal_attention=True)
        output = unet(
            torch.zeros(12, 4, 48, 32),
            torch.zeros(2, dtype=torch.long),
            torch.zeros(2, 1, 768),
            num_frames=2,
            num_domains=3,
            domains=torch.zeros(12, dtype=torch.long),
            pose_features=torch.zeros(4, 320, 48, 32),
        )
    assert output.shape == (12, 4, 48, 32)
