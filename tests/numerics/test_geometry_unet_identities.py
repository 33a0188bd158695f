"""Identities of stage 1's denoiser: Stable Diffusion until its branches move (C3), then the paper's."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from dreamdance.models import GeometryUNetModel, PoseEncoderModel, ReferenceUNetModel

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {
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
STABLE_DIFFUSION_SHAPED = {
    "block_out_channels": (32, 40, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}
CONFIGS = {
    "attention at both levels": {},
    "attention at the lower level": LOWER_LEVEL_ONLY,
    "two layers per block": {**LOWER_LEVEL_ONLY, "layers_per_block": 2},
    "linear projections": {"use_linear_projection": True, "attention_head_dim": (4, 8)},
    "two transformer blocks in a row": {**LOWER_LEVEL_ONLY, "transformer_layers_per_block": 2},
    "no middle block": {"mid_block_type": None},
    "shaped as Stable Diffusion 1.5": STABLE_DIFFUSION_SHAPED,
}
NUM_CLIPS, NUM_FRAMES, NUM_DOMAINS = 2, 2, 3
BATCH = NUM_CLIPS * NUM_FRAMES * NUM_DOMAINS
COUNTS = {"num_frames": NUM_FRAMES, "num_domains": NUM_DOMAINS}


def make_base(**overrides):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**BASE, **overrides}).eval()


def make_unet(base=None, *, moved=(), **branches):
    """A denoiser in float64 on a small base; the output projections of the branches in `moved` are no longer zero."""
    base = make_base(**LOWER_LEVEL_ONLY) if base is None else base
    unet = GeometryUNetModel.from_unet2d(base, **branches).double().eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in unet.named_parameters():
        if any(f".{branch}.to_out." in name for branch in moved):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return unet


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_inputs(dtype=torch.float64, height=6, width=4):
    return (
        draw(BATCH, 4, height, width, dtype=dtype),
        torch.tensor([3, 700]),
        draw(NUM_CLIPS, 1, 16, seed=2, dtype=dtype),
    )


def run(unet, *inputs, **arguments):
    with torch.no_grad():
        return unet(*inputs, **{**COUNTS, **arguments})


def domain_indices(frames=NUM_CLIPS * NUM_FRAMES):
    return torch.arange(NUM_DOMAINS).repeat(frames)


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_at_initialisation_the_denoiser_is_bit_for_bit_the_unet_it_was_made_from(overrides, tmp_path):
    make_base(**overrides).save_pretrained(tmp_path / "unet")
    base = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    unet = GeometryUNetModel.from_unet2d(
        base, geometry_attention=True, temporal_attention=True, attention_backend="sdpa"
    ).eval()
    sample, timesteps, conditioning = make_inputs(torch.float32, height=16, width=8)
    per_clip = NUM_FRAMES * NUM_DOMAINS
    with torch.no_grad():
        expected = base(
            sample, timesteps.repeat_interleave(per_clip), conditioning.repeat_interleave(per_clip, dim=0)
        ).sample
    assert torch.equal(run(unet, sample, timesteps, conditioning), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_holds_for_odd_latents_scalar_timesteps_and_rows_per_sample(dtype):
    base = make_base().to(dtype)
    unet = GeometryUNetModel.from_unet2d(base, geometry_attention=True, temporal_attention=True).eval()
    sample, _, _ = make_inputs(dtype, height=7, width=5)
    conditioning = draw(BATCH, 3, 16, dtype=dtype)
    with torch.no_grad():
        expected = base(sample, 17, conditioning).sample
    assert unet.dtype == dtype
    assert torch.equal(run(unet, sample, 17, conditioning), expected)
    assert torch.equal(run(unet, sample, torch.full((BATCH,), 17), conditioning), expected)


def test_at_initialisation_the_gradients_of_the_base_weights_are_the_base_s_own():
    base = make_base(**LOWER_LEVEL_ONLY).double()
    unet = make_unet(base, geometry_attention=True, temporal_attention=True)
    sample, _, conditioning = make_inputs()
    unet(sample, 9, conditioning, **COUNTS).square().sum().backward()
    base(sample, 9, conditioning.repeat_interleave(6, dim=0)).sample.square().sum().backward()
    ours = dict(unet.named_parameters())
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name)


def test_an_untrained_pose_encoder_changes_nothing():
    unet, inputs = make_unet(), make_inputs()
    pose_encoder = PoseEncoderModel(32, channels=(4, 8), downscale_factor=2).double()
    with torch.no_grad():
        features = pose_encoder(draw(NUM_CLIPS * NUM_FRAMES, 3, 12, 8))
    assert torch.equal(run(unet, *inputs, pose_features=features), run(unet, *inputs))


def test_the_branches_matter_once_their_projections_have_moved():
    inputs = make_inputs()
    untouched = run(make_unet(), *inputs)
    for branch in ("geometry", "temporal"):
        moved = make_unet(moved=[branch], **{f"{branch}_attention": True})
        assert not torch.allclose(run(moved, *inputs), untouched, rtol=1e-3)


def test_the_domain_embedding_distinguishes_domains_from_the_first_step():
    unet = make_unet()
    one_latent = draw(1, 4, 6, 4).expand(BATCH, -1, -1, -1)
    _, _, conditioning = make_inputs()
    output = run(unet, one_latent, 9, conditioning[:1], domains=domain_indices())
    rgb, normal, depth = output[:NUM_DOMAINS]
    scale = output.std()
    assert min((rgb - normal).std(), (normal - depth).std(), (rgb - depth).std()) > 0.01 * scale
    torch.testing.assert_close(output[:NUM_DOMAINS], output[NUM_DOMAINS : 2 * NUM_DOMAINS])


def test_permuting_the_domains_permutes_the_outputs():
    unet = make_unet(moved=["geometry", "temporal"], geometry_attention=True, temporal_attention=True)
    sample, timesteps, conditioning = make_inputs()
    order = torch.cat([torch.tensor([2, 0, 1]) + 3 * frame for frame in range(NUM_CLIPS * NUM_FRAMES)])
    domains = domain_indices()
    output = run(unet, sample, timesteps, conditioning, domains=domains)
    permuted = run(unet, sample[order], timesteps, conditioning, domains=domains[order])
    torch.testing.assert_close(permuted, output[order])


def test_geometry_attention_lets_domains_of_a_frame_and_nothing_else_see_one_another():
    unet = make_unet(moved=["geometry"], geometry_attention=True)
    sample, timesteps, conditioning = make_inputs()
    changed = sample.clone()
    changed[2] += 1.0  # depth of the first frame of the first clip
    output, other = (run(unet, x, timesteps, conditioning) for x in (sample, changed))
    assert not torch.allclose(output[0], other[0], rtol=1e-4)
    assert not torch.allclose(output[1], other[1], rtol=1e-4)
    torch.testing.assert_close(output[3:], other[3:])


def test_with_one_domain_geometry_attention_is_self_attention_of_each_sample():
    unet = make_unet(moved=["geometry"], geometry_attention=True)
    sample, _, conditioning = make_inputs()
    together = run(unet, sample, 9, conditioning, num_frames=6, num_domains=1)
    alone = run(unet, sample[:1], 9, conditioning[:1], num_frames=1, num_domains=1)
    torch.testing.assert_close(together[:1], alone)
    assert not torch.allclose(alone, run(make_unet(), sample[:1], 9, conditioning[:1], num_frames=1, num_domains=1))


def reversed_frames(x, num_domains):
    clips = x.unflatten(0, (-1, NUM_FRAMES, num_domains))
    return clips.flip(1).flatten(0, 2)


def test_temporal_attention_knows_the_order_of_frames():
    sample, timesteps, conditioning = make_inputs()
    differences = []
    for moved in ([], ["temporal"]):
        unet = make_unet(moved=moved, temporal_attention=True)
        output = run(unet, sample, timesteps, conditioning)
        backwards = run(unet, reversed_frames(sample, NUM_DOMAINS), timesteps, conditioning)
        differences.append((backwards - reversed_frames(output, NUM_DOMAINS)).norm() / output.norm())
    untrained, trained = differences
    assert untrained < 1e-12
    assert trained > 0.01


def test_temporal_attention_mixes_the_frames_of_a_clip_within_each_domain_only():
    unet = make_unet(moved=["temporal"], temporal_attention=True)
    sample, timesteps, conditioning = make_inputs()
    changed = sample.clone()
    changed[2] += 1.0  # depth of the first frame of the first clip
    output, other = (run(unet, x, timesteps, conditioning) for x in (sample, changed))
    assert not torch.allclose(output[5], other[5], rtol=1e-4)  # depth of the second frame
    untouched = [0, 1, 3, 4, *range(6, BATCH)]
    torch.testing.assert_close(output[untouched], other[untouched])


def reference_features(unet, num_clips=NUM_CLIPS, seed=3):
    """Random features with the numbers of tokens of the reference UNet at each block for 6 x 4 latents."""
    base = make_base(**LOWER_LEVEL_ONLY).double()
    reference_unet = ReferenceUNetModel.from_unet2d(base)
    assert reference_unet.block_names == unet.block_names
    with torch.no_grad():
        return reference_unet(draw(num_clips, 4, 6, 4, seed=seed), 0, draw(num_clips, 1, 16, seed=seed + 1))


def test_every_frame_and_domain_of_a_clip_sees_its_own_reference_and_no_other():
    unet, inputs = make_unet(), make_inputs()
    features = reference_features(unet)
    changed = {name: torch.cat([feature[:1], feature[1:] + 1.0]) for name, feature in features.items()}
    output = run(unet, *inputs, reference_features=features)
    other = run(unet, *inputs, reference_features=changed)
    torch.testing.assert_close(output[:6], other[:6])
    for sample in range(6, BATCH):
        assert not torch.allclose(output[sample], other[sample], rtol=1e-4)


def test_an_empty_reference_is_no_reference():
    unet, inputs = make_unet(), make_inputs()
    empty = {name: feature[:, :0] for name, feature in reference_features(unet).items()}
    assert torch.equal(run(unet, *inputs, reference_features=empty), run(unet, *inputs))


def test_doubling_the_clips_for_guidance_leaves_each_half_as_it_was():
    unet = make_unet(moved=["geometry", "temporal"], geometry_attention=True, temporal_attention=True)
    sample, timesteps, conditioning = make_inputs()
    features = reference_features(unet)
    dropped = reference_features(unet, seed=8)
    pose = draw(NUM_CLIPS * NUM_FRAMES, 32, 6, 4, seed=9)
    halves = [
        run(unet, sample, timesteps, c, domains=domain_indices(), pose_features=pose, reference_features=f)
        for c, f in ((conditioning, features), (0 * conditioning, dropped))
    ]
    doubled = run(
        unet,
        torch.cat([sample, sample]),
        timesteps.repeat(2),
        torch.cat([conditioning, 0 * conditioning]),
        domains=domain_indices().repeat(2),
        pose_features=torch.cat([pose, pose]),
        reference_features={name: torch.cat([features[name], dropped[name]]) for name in features},
    )
    torch.testing.assert_close(doubled, torch.cat(halves))


def test_the_pose_of_a_frame_reaches_all_its_domains_and_no_other_frame():
    unet, inputs = make_unet(), make_inputs()
    pose = torch.zeros(NUM_CLIPS * NUM_FRAMES, 32, 6, 4, dtype=torch.float64)
    pose[1] = draw(32, 6, 4)
    moved = (run(unet, *inputs, pose_features=pose) - run(unet, *inputs)).abs().amax(dim=(1, 2, 3)) > 0
    assert moved.tolist() == [3 <= sample < 6 for sample in range(BATCH)]


def test_the_backends_agree():
    inputs, branches = make_inputs(), {"geometry_attention": True, "temporal_attention": True}
    outputs = []
    for backend in ("reference", "sdpa"):
        unet = make_unet(moved=["geometry", "temporal"], attention_backend=backend, **branches)
        outputs.append(run(unet, *inputs, reference_features=reference_features(unet)))
    torch.testing.assert_close(*outputs)


def test_in_bfloat16_by_autocast_or_by_weights_the_result_is_that_of_float32_to_rounding():
    branches = {"geometry_attention": True, "temporal_attention": True}
    unet = make_unet(moved=["geometry", "temporal"], **branches).float()
    features = {name: feature.float() for name, feature in reference_features(unet).items()}
    arguments = {"domains": domain_indices(), "reference_features": features}
    exact = run(unet, *make_inputs(torch.float32), **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = run(unet, *make_inputs(torch.float32), **arguments)
    by_weights = run(unet.bfloat16(), *make_inputs(torch.bfloat16), **arguments)
    for rounded in (by_autocast, by_weights):
        assert rounded.dtype == torch.bfloat16
        assert (rounded - exact).norm() < 4 * torch.finfo(torch.bfloat16).eps * exact.norm()


def all_gradients(*, checkpointing):
    """Gradients of all three networks of steps 1 to 3 in one backward pass."""
    base = make_base(**LOWER_LEVEL_ONLY).double()
    unet = make_unet(base, moved=["geometry", "temporal"], geometry_attention=True, temporal_attention=True)
    reference_unet = ReferenceUNetModel.from_unet2d(base)
    torch.manual_seed(1)
    pose_encoder = PoseEncoderModel(32, channels=(4, 8), downscale_factor=2).double()
    networks = {"unet": unet, "reference_unet": reference_unet, "pose_encoder": pose_encoder}
    if checkpointing:
        unet.enable_gradient_checkpointing()
        reference_unet.enable_gradient_checkpointing()
    for network in networks.values():
        network.train()
    output = unet(
        *make_inputs(),
        **COUNTS,
        domains=domain_indices(),
        pose_features=pose_encoder(draw(NUM_CLIPS * NUM_FRAMES, 3, 12, 8)),
        reference_features=reference_unet(draw(NUM_CLIPS, 4, 6, 4), 0, draw(NUM_CLIPS, 1, 16)),
    )
    output.square().mean().backward()
    return {
        f"{key}.{name}": parameter.grad
        for key, network in networks.items()
        for name, parameter in network.named_parameters()
    }


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = all_gradients(checkpointing=False), all_gradients(checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient is not None, name
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_gradient_checkpointing_keeps_fewer_activations():
    saved = []
    for checkpointing in (False, True):
        base = make_base(**LOWER_LEVEL_ONLY).double()
        unet = make_unet(base, geometry_attention=True, temporal_attention=True).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
        kept = {}

        def keep(x, weights=weights, kept=kept):
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            unet(*make_inputs(), **COUNTS).sum()
        saved.append(sum(kept.values()))
    assert saved[1] < 0.5 * saved[0]
