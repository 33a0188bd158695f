"""The objective of stage 1 is Eq. 3 with the conditions of dreamdance/README.md ("The method")."""

from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from support.random_shards import write_random_shards
from support.recipes import perturb, record_inputs, select_clips, tiny_clip_batch, tiny_stage1_recipe, without
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch, collate_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import SampleKey
from dreamdance.diffusion.noise import draw_noise, draw_timesteps, min_snr_weights
from dreamdance.errors import UserError
from dreamdance.models.autoencoding import encode_latents
from dreamdance.models.image_embedding import embed_images
from dreamdance.training.objectives.geometry import GeometryObjective
from dreamdance.training.planning.activation_memory import LiveBytes
from dreamdance.training.stages.training_stage import stage_of


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return tiny_clip_batch(num_clips=2, num_frames=4)


def make_objective(train: str = "geometry", changes: dict[str, Any] | None = None) -> GeometryObjective:
    recipe = tiny_stage1_recipe(train, changes)
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    return perturb(objective)


def all_latents(objective: GeometryObjective, batch: ClipBatch) -> Tensor:
    images = torch.stack([batch.rgb, batch.maps["normal"], batch.maps["depth"]], dim=2)
    return encode_latents(objective.vae, rearrange(images, "b f m c h w -> (b f m) c h w"))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_mean_squared_error_of_the_unified_diffusion(batch, prediction_type):
    changes = {"objective.prediction_type": prediction_type, "objective.zero_terminal_snr": False}
    objective = make_objective("geometry", changes).eval()
    predictions: list[Tensor] = []
    objective.unet.register_forward_hook(lambda module, arguments, output: predictions.append(output))
    output = objective(batch)

    keys = batch.keys.tolist()
    latents = all_latents(objective, batch)
    noise = rearrange(draw_noise(keys, (4, 3, *latents.shape[1:])), "b f m c h w -> (b f m) c h w")
    alpha = objective.noise_scheduler.alphas_cumprod[draw_timesteps(keys, 1000)]
    alpha = repeat(alpha, "b -> (b f m) 1 1 1", f=4, m=3)
    target = {
        "epsilon": noise,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,
        "sample": latents,
    }[prediction_type]
    expected = (predictions[0] - target).square().mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)


def test_at_a_quantile_all_clips_have_its_timestep_and_the_same_noise(batch):
    objective = make_objective("geometry").eval()
    calls = record_inputs(objective.unet)
    with torch.no_grad():
        drawn, fixed = objective(batch), objective(batch, noise_quantile=0.3125)
    assert calls[1][0][1].tolist() == [312, 312]
    assert objective.describe_noise(0.3125) == "timestep_312"
    noise = []
    for (noisy, timesteps, _), _ in calls:
        alpha = repeat(objective.noise_scheduler.alphas_cumprod[timesteps], "b -> (b f m) 1 1 1", f=4, m=3)
        noise.append((noisy - alpha.sqrt() * all_latents(objective, batch)) / (1 - alpha).sqrt())
    torch.testing.assert_close(*noise, rtol=0, atol=1e-4)
    assert not torch.equal(drawn.sample_losses, fixed.sample_losses)


def test_denoiser_sees_independent_noise_for_each_frame_and_domain_at_one_timestep_per_clip(batch):
    objective = make_objective("geometry")
    calls = record_inputs(objective.unet)
    objective(batch)
    (noisy, timesteps, _), _ = calls[0]
    assert timesteps.shape == (2,)
    alpha = repeat(objective.noise_scheduler.alphas_cumprod[timesteps], "b -> (b f m) 1 1 1", f=4, m=3)
    noise = (noisy - alpha.sqrt() * all_latents(objective, batch)) / (1 - alpha).sqrt()
    rows = rearrange(noise, "n c h w -> n (c h w)")
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    # 1,152 numbers in each: independent ones correlate by about 0.03, and 0.15 is five times that
    assert correlation.abs().max() < 0.15


def test_domains_are_innermost_and_named_to_the_denoiser(batch):
    objective = make_objective("geometry")
    calls = record_inputs(objective.unet)
    objective(batch)
    _, named = calls[0]
    assert named["domains"].tolist() == [0, 1, 2] * 8
    assert (named["num_frames"], named["num_domains"]) == (4, 3)


@pytest.mark.parametrize("train", ["domains", "geometry", "temporal"])
def test_loss_of_a_clip_does_not_depend_on_its_batch(batch, train):
    objective = make_objective(train)
    together = objective(batch).sample_losses
    alone = torch.cat([objective(select_clips(batch, index)).sample_losses for index in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert not torch.isclose(*together)


def test_first_step_denoises_one_drawn_domain_of_each_clip(batch):
    objective = make_objective("domains")
    calls = record_inputs(objective.unet)
    output = objective(batch)
    (noisy, *_), named = calls[0]
    assert noisy.shape[0] == 2 * 4
    assert output.domain_counts.sum() == 2
    drawn = named["domains"][::4]
    for clip, domain in enumerate(drawn.tolist()):
        assert (named["domains"][4 * clip : 4 * clip + 4] == domain).all()
    for domain in range(3):
        expected = output.sample_losses[drawn == domain].sum()
        torch.testing.assert_close(output.domain_sums[domain], expected, rtol=1e-6, atol=0)


def test_first_step_is_the_same_to_the_bit_if_the_loader_reads_the_drawn_domain_alone(tmp_path):
    """Stored frames of uint8 and uint16, with one and three channels, mirrored or not, in one batch."""
    shards = write_random_shards(tmp_path / "shards", 8, width=32, height=48)
    weights = stage_of(tiny_stage1_recipe("domains")).domain_weights
    window = {"width": 32, "height": 48, "num_frames": 2, "maps": ("normal", "depth"), "flip_probability": 0.5}
    whole, alone = ClipDataset(shards, **window), ClipDataset(shards, **window, domain_weights=weights)
    keys = [SampleKey(0, number) for number in range(8)]
    samples = [alone.stored_sample(key) for key in keys]
    assert {name for sample in samples for name in sample.maps} == {"pose", "target"}
    assert len({(sample.maps["target"].dtype, sample.maps["target"].shape) for sample in samples}) > 2
    objective = make_objective("domains").eval()
    expected = objective(collate_clips([whole.stored_sample(key) for key in keys]))
    found = objective(collate_clips(samples))
    assert (expected.domain_counts > 0).all()
    assert torch.equal(found.sample_losses, expected.sample_losses)


def test_domains_are_drawn_as_often_as_the_recipe_weighs_them():
    changes = {"objective.domain_draw": {"rgb": 1.0, "normal": 3.0, "depth": 0.0}}
    objective = make_objective("domains", changes)
    drawn = objective._choose_domains([[0, 0, index] for index in range(1000)])
    counts = torch.bincount(drawn.flatten(), minlength=3)
    assert counts[2] == 0
    # a binomial of 1,000 draws at 1/4 has a standard deviation of 14
    assert abs(counts[0].item() - 250) < 60


def test_weights_of_the_domains_are_normalised_and_weigh_the_loss(batch):
    equal = make_objective("geometry")(batch)
    doubled = make_objective("geometry", {"objective.domain_loss": {"rgb": 2.0, "normal": 2.0, "depth": 2.0}})(batch)
    assert torch.equal(equal.sample_losses, doubled.sample_losses)
    torch.testing.assert_close(equal.loss.detach(), equal.domain_sums.sum() / 6, rtol=1e-6, atol=0)
    depth_only = make_objective("geometry", {"objective.domain_loss": {"rgb": 0.0, "normal": 0.0, "depth": 1.0}})(batch)
    torch.testing.assert_close(depth_only.loss.detach(), equal.domain_sums[2] / 2, rtol=1e-6, atol=0)
    assert torch.equal(equal.domain_sums, depth_only.domain_sums)


def test_reference_unet_sees_clean_scaled_latents_at_timestep_zero(batch):
    objective = make_objective("geometry", {"objective.reference_dropout": 0.0})
    calls = record_inputs(objective.reference_unet)
    objective(batch)
    (latents, timestep, embeddings), _ = calls[0]
    assert torch.equal(latents, encode_latents(objective.vae, batch.reference, scaled=True))
    assert torch.equal(timestep, torch.zeros(2))
    assert torch.equal(embeddings, embed_images(objective.image_encoder, batch.reference))


def test_dropped_reference_is_zeros_through_both_unets_and_only_in_training(batch):
    objective = make_objective("geometry", {"objective.reference_dropout": 1.0})
    calls, denoiser_calls = record_inputs(objective.reference_unet), record_inputs(objective.unet)
    objective(batch)
    (latents, _, embeddings), _ = calls[0]
    assert not latents.any()
    assert not embeddings.any()
    assert not denoiser_calls[0][0][2].any()
    # the features of zeros are not zeros: they are used like those of any other reference
    assert all(feature.any() for feature in denoiser_calls[0][1]["reference_features"].values())

    objective.eval()
    objective(batch)
    assert calls[1][0][0].any()


def test_poses_are_encoded_once_for_all_domains(batch):
    objective = make_objective("geometry")
    calls = record_inputs(objective.pose_encoder)
    objective(batch)
    assert len(calls) == 1
    assert torch.equal(calls[0][0][0], rearrange(batch.pose, "b f c h w -> (b f) c h w"))


@pytest.mark.parametrize(("train", "recorded"), [("domains", True), ("geometry", False), ("temporal", False)])
def test_reference_and_pose_record_a_graph_only_where_they_train(batch, train, recorded):
    objective = make_objective(train)
    calls = record_inputs(objective.unet)
    objective(batch)
    _, named = calls[0]
    assert named["pose_features"].requires_grad is recorded
    assert {feature.requires_grad for feature in named["reference_features"].values()} == {recorded}


@pytest.mark.parametrize("train", ["geometry", "temporal"])
def test_gradients_equal_those_of_the_plain_form_that_records_everything(batch, train):
    objective = make_objective(train)
    objective(batch).loss.backward()
    lean = {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}
    objective.requires_grad_(True)
    objective.zero_grad()
    objective(batch).loss.backward()
    plain = dict(objective.named_parameters())
    assert lean
    for name, gradient in lean.items():
        assert torch.equal(gradient, plain[name].grad), name


def test_min_snr_weighs_each_clip_by_its_timestep(batch):
    plain = make_objective("geometry", {"objective.zero_terminal_snr": False})
    weighted = make_objective("geometry", {"objective.zero_terminal_snr": False, "objective.min_snr_gamma": 5.0})
    weights = min_snr_weights(plain.noise_scheduler, draw_timesteps(batch.keys.tolist(), 1000), 5.0)
    torch.testing.assert_close(weighted(batch).sample_losses, plain(batch).sample_losses * weights, rtol=1e-6, atol=0)


def test_noise_offset_shifts_whole_pictures(batch):
    objective = make_objective("geometry", {"objective.noise_offset": 0.5})
    plain = make_objective("geometry")
    calls, plain_calls = record_inputs(objective.unet), record_inputs(plain.unet)
    objective(batch)
    plain(batch)
    difference = calls[0][0][0] - plain_calls[0][0][0]
    spread = difference.std(dim=(2, 3))
    assert difference.abs().max() > 0.01
    assert spread.max() < 1e-6


@pytest.mark.parametrize("step", ["domains", "temporal"])
def test_loss_and_gradients_are_the_same_at_every_level_of_checkpointing(batch, step):
    losses, gradients, kept = [], [], {}
    for level in ("none", "blocks", "keep_attention", "transformers"):
        objective = make_objective(step, {"sharding.gradient_checkpointing": level})
        assert objective.unet.is_gradient_checkpointing is (level != "none")
        with LiveBytes(beside=objective.parameters()) as live:
            loss = objective(batch).loss
            kept[level] = live.current
            loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in objective.parameters() if p.grad is not None])
    assert len({loss.item() for loss in losses}) == 1
    assert all(torch.equal(first, other) for first, *others in zip(*gradients, strict=True) for other in others)
    assert kept["none"] > kept["keep_attention"] > kept["blocks"] > kept["transformers"]


def test_bfloat16_networks_give_nearly_the_same_loss(batch):
    objective = make_objective("geometry")
    expected = objective(batch).loss
    loss = objective.bfloat16()(batch).loss
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(loss, expected, rtol=2**-6, atol=0)


def test_temporal_attention_knows_the_order_of_frames(batch):
    def predict(objective: GeometryObjective, order: list[int]) -> Tensor:
        """Prediction for frames given in `order`, put back into their own order; noise and all else are unchanged."""
        ordered = [
            objective.unet.register_forward_pre_hook(lambda m, a, k: (a, _reordered(k, order)), with_kwargs=True)
        ]
        ordered.append(objective.unet.register_forward_pre_hook(lambda m, a: (_frames(a[0], order), *a[1:])))
        outputs: list[Tensor] = []
        ordered.append(
            objective.unet.register_forward_hook(lambda m, a, output: outputs.append(_frames(output, order)))
        )
        objective(batch)
        for handle in ordered:
            handle.remove()
        return outputs[0]

    backwards, forwards = [3, 2, 1, 0], [0, 1, 2, 3]
    without = make_objective("geometry").eval()
    with_temporal = make_objective("temporal").eval()
    with torch.no_grad():
        torch.testing.assert_close(predict(without, backwards), predict(without, forwards), rtol=1e-4, atol=1e-5)
        difference = predict(with_temporal, backwards) - predict(with_temporal, forwards)
    assert difference.abs().max() > 1e-2


def _frames(batch: Tensor, order: list[int]) -> Tensor:
    frames = rearrange(batch, "(b f m) c h w -> b f m c h w", f=4, m=3)
    return rearrange(frames[:, order], "b f m c h w -> (b f m) c h w")


def _reordered(named: dict[str, Any], order: list[int]) -> dict[str, Any]:
    poses = rearrange(named["pose_features"], "(b f) c h w -> b f c h w", f=4)
    return named | {"pose_features": rearrange(poses[:, order], "b f c h w -> (b f) c h w")}


def test_temporal_step_runs_without_geometry_attention(batch):
    objective = make_objective("temporal", {"model.geometry_attention": False})
    assert not objective.unet.geometry_parameters()
    output = objective(batch)
    output.loss.backward()
    assert output.domain_counts.tolist() == [2, 2, 2]


def test_clips_without_maps_are_refused_by_name(batch):
    objective = make_objective("domains")
    lacking = without(batch, "depth")
    with pytest.raises(UserError, match=r"no depth.*data\.train"):
        objective(lacking)
