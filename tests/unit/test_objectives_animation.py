"""The objective of stage 2 is that of SVD, as in dreamdance/README.md ("The method"); draws depend on the sample."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from support.recipes import perturb, record_inputs, select_clips, tiny_clip_batch, tiny_stage2_recipe, without
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.diffusion.noise import draw_log_normal, draw_noise
from dreamdance.errors import UserError
from dreamdance.media.transforms import pass_through, resize_map
from dreamdance.modalities import MODALITIES
from dreamdance.models.autoencoding import encode_latents
from dreamdance.models.image_embedding import embed_images
from dreamdance.training.objectives.animation import AnimationObjective
from dreamdance.training.planning.activation_memory import LiveBytes
from dreamdance.training.stages.training_stage import stage_of

NOTHING_DROPPED = {
    "objective.latents_dropout": 0.0,
    "objective.embedding_dropout": 0.0,
    "objective.both_dropout": 0.0,
    "objective.frame_control_dropout": 0.0,
    "objective.modality_control_dropout": 0.0,
}


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return tiny_clip_batch(num_clips=2, num_frames=4)


def make_objective(changes: dict[str, Any] | None = None, *, perturbed: bool = True) -> AnimationObjective:
    recipe = tiny_stage2_recipe({**NOTHING_DROPPED, **(changes or {})})
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    return perturb(objective) if perturbed else objective


def target_latents(objective: AnimationObjective, batch: ClipBatch) -> Tensor:
    latents = encode_latents(objective.vae, rearrange(batch.rgb, "b f c h w -> (b f) c h w"), scaled=True)
    return rearrange(latents, "(b f) c h w -> b f c h w", f=batch.rgb.shape[1])


def drawn_sigmas(batch: ClipBatch) -> Tensor:
    return rearrange(draw_log_normal(batch.keys.tolist(), 0.7, 1.6, purpose="sigma"), "b -> b 1 1 1 1")


def test_loss_is_the_weighted_error_of_the_denoised_latents(batch):
    objective = make_objective()
    outputs: list[Tensor] = []
    objective.unet.conv_out.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    loss = objective(batch).loss

    latents, sigmas = target_latents(objective, batch), drawn_sigmas(batch)
    noisy = latents + sigmas * draw_noise(batch.keys.tolist(), latents.shape[1:])
    raw = rearrange(outputs[0], "(b f) c h w -> b f c h w", f=4)
    denoised = noisy / (sigmas**2 + 1) - raw * sigmas / (sigmas**2 + 1).sqrt()
    expected = ((sigmas**2 + 1) / sigmas**2 * (denoised - latents) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_at_a_quantile_all_clips_have_its_sigma(batch):
    objective = make_objective().eval()
    calls = record_inputs(objective.controlnet)
    with torch.no_grad():
        objective(batch, noise_quantile=0.5)
    timestep = calls[0][0][1]
    torch.testing.assert_close(timestep, torch.full((2,), 0.7 / 4), rtol=1e-6, atol=0)  # the median: ln(sigma) is 0.7
    assert objective.describe_noise(0.5) == "sigma_2.01"


def test_networks_read_scaled_noise_beside_unscaled_conditioning_at_a_quarter_of_log_sigma(batch):
    objective = make_objective()
    calls = record_inputs(objective.controlnet)
    objective(batch)
    sample, timestep, embeddings, added_time_ids, _ = calls[0][0]
    keys = batch.keys.tolist()
    latents, sigmas = target_latents(objective, batch), drawn_sigmas(batch)
    noisy = latents + sigmas * draw_noise(keys, latents.shape[1:])
    strength = draw_log_normal(keys, -3.0, 0.5, purpose="augmentation")

    preconditioned, conditioning = sample.chunk(2, dim=2)
    torch.testing.assert_close(preconditioned, noisy / (sigmas**2 + 1).sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(timestep, sigmas.flatten().log() / 4, rtol=1e-6, atol=1e-7)
    assert torch.equal(embeddings, embed_images(objective.image_encoder, batch.reference))
    assert torch.equal(added_time_ids, torch.stack([batch.fps - 1, torch.full((2,), 127.0), strength], dim=1))

    assert torch.equal(conditioning[:, 0], conditioning[:, -1])
    clean = encode_latents(objective.vae, batch.reference, scaled=False)
    added = conditioning[:, 0] - clean
    # noise of the drawn strength in pixels of [-1, 1], and the patch autoencoder keeps pixels as they are
    torch.testing.assert_close(added.std(dim=(1, 2, 3)), strength, rtol=0.1, atol=0)
    assert not torch.isclose(*strength)


def test_conditioning_noise_is_independent_of_the_targets_noise(batch):
    objective = make_objective()
    calls = record_inputs(objective.controlnet)
    objective(batch)
    conditioning = calls[0][0][0].chunk(2, dim=2)[1][:, 0]
    added = (conditioning - encode_latents(objective.vae, batch.reference, scaled=False)).flatten(1)
    latents = target_latents(objective, batch)
    noise = draw_noise(batch.keys.tolist(), latents.shape[1:]).flatten(2)
    for clip in range(2):
        rows = torch.corrcoef(torch.cat([added[clip : clip + 1], noise[clip]]))[0, 1:]
        # 1,152 numbers in each: independent ones correlate by about 0.03
        assert rows.abs().max() < 0.15


def test_normal_and_depth_pass_through_the_size_of_stage_1_and_the_pose_does_not(batch):
    objective = make_objective()
    calls = record_inputs(objective.controller)
    objective(batch)
    (maps,) = calls[0][0]
    flat = {name: rearrange(frames, "(b f) c h w -> b f c h w", f=4) for name, frames in maps.items()}
    assert torch.equal(flat["pose"], batch.pose)
    assert torch.equal(flat["normal"], pass_through(batch.maps["normal"], 12, 8, kind="normals"))
    assert torch.equal(flat["depth"], pass_through(batch.maps["depth"], 12, 8))
    assert not torch.equal(flat["depth"], batch.maps["depth"])
    lengths = (2 * flat["normal"] - 1).norm(dim=2)
    assert (lengths - 1).abs().max() < 0.2  # resized back up after renormalising, they only nearly keep unit length


def test_maps_that_the_loader_delivers_at_the_size_of_stage_1_give_the_same_loss(batch):
    objective = make_objective()
    sizes = stage_of(tiny_stage2_recipe(NOTHING_DROPPED)).map_sizes
    assert sizes == {"normal": (8, 12), "depth": (8, 12)}
    assert stage_of(tiny_stage2_recipe({"objective.geometry_height": 16})).map_sizes == {}  # another aspect
    smaller = {
        name: resize_map(batch.maps[name], height, width, kind=MODALITIES[name].kind)
        for name, (width, height) in sizes.items()
    }
    whole, reduced = (objective(each).loss for each in (batch, replace(batch, maps={**batch.maps, **smaller})))
    assert torch.equal(whole, reduced)


@pytest.mark.parametrize(
    ("dropped", "latents_kept", "embedding_kept"),
    [("latents_dropout", False, True), ("embedding_dropout", True, False), ("both_dropout", False, False)],
)
def test_dropped_conditions_are_zeros_in_training_and_maps_stay(batch, dropped, latents_kept, embedding_kept):
    objective = make_objective({f"objective.{dropped}": 1.0})
    calls, map_calls = record_inputs(objective.controlnet), record_inputs(objective.controller)
    objective(batch)
    sample, _, embeddings, added_time_ids, _ = calls[0][0]
    assert sample.chunk(2, dim=2)[1].any().item() is latents_kept
    assert embeddings.any().item() is embedding_kept
    assert added_time_ids.all()
    assert all(frames.any() for frames in map_calls[0][0][0].values())

    objective.eval()
    objective(batch)
    assert calls[1][0][0].chunk(2, dim=2)[1].any()
    assert calls[1][0][2].any()


def test_control_maps_are_dropped_by_frame_and_modality_in_training_alone(batch):
    rates = {"objective.frame_control_dropout": 0.4, "objective.modality_control_dropout": 0.4}
    objective = make_objective(rates)
    calls = record_inputs(objective.controller)
    objective(batch)
    objective.eval()
    objective(batch)
    in_training, in_evaluation = (
        torch.stack([rearrange(frames, "(b f) c h w -> b f (c h w)", f=4).any(dim=-1) for frames in maps.values()])
        for (maps,), _ in calls
    )
    assert in_evaluation.all()
    assert not in_training.all()
    assert in_training.any(dim=2).any(dim=0).all()


def test_loss_of_a_clip_does_not_depend_on_its_batch(batch):
    objective = make_objective({"objective.modality_control_dropout": 0.4, "objective.both_dropout": 0.5})
    together = objective(batch).sample_losses
    alone = torch.cat([objective(select_clips(batch, index)).sample_losses for index in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)


def test_at_initialisation_the_maps_change_nothing(batch):
    objective = make_objective(perturbed=False)
    expected = objective(batch).loss
    zeros = {name: torch.zeros_like(batch.rgb) for name in ("pose", "normal", "depth")}
    without_maps = replace(batch, maps={**batch.maps, **zeros})
    assert torch.equal(objective(without_maps).loss, expected)
    assert not torch.equal(make_objective()(without_maps).loss, make_objective()(batch).loss)


@pytest.mark.parametrize("unfreeze", ["none", "decoder"])
def test_gradients_with_the_encoder_under_no_grad_equal_those_of_the_plain_form(batch, unfreeze):
    objective = make_objective({"model.unfreeze": unfreeze})
    lean_bytes = saved_bytes(objective, batch)
    lean = {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}
    objective.zero_grad()
    objective.unet.requires_grad_(True)
    plain_bytes = saved_bytes(objective, batch)
    plain = dict(objective.named_parameters())
    assert any(name.startswith("controller.") for name in lean)
    for name, gradient in lean.items():
        assert torch.equal(gradient, plain[name].grad), name
    assert lean_bytes < 0.8 * plain_bytes


def saved_bytes(objective: AnimationObjective, batch: ClipBatch) -> int:
    """Runs forward and backward; returns the bytes of all tensors kept in between, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(batch).loss
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return total


def test_temporal_layers_of_both_halves_get_gradients(batch):
    objective = make_objective({"model.unfreeze": "temporal"})
    objective(batch).loss.backward()
    reached = {name.split(".")[0] for name, p in objective.unet.named_parameters() if p.grad is not None}
    assert reached == {"down_blocks", "mid_block", "up_blocks"}


@pytest.mark.parametrize("controls", [["pose"], ["depth"], ["normal", "pose"], ["pose", "depth", "normal"]])
@pytest.mark.parametrize("geometry_attention", [True, False])
def test_every_ablation_of_the_controller_trains(batch, controls, geometry_attention):
    objective = make_objective({"model.controls": controls, "model.geometry_attention": geometry_attention})
    calls = record_inputs(objective.controller)
    objective(batch).loss.backward()
    assert set(calls[0][0][0]) == set(controls)
    # with a single modality geometry attention is self-attention
    assert all(parameter.grad is not None for parameter in objective.controller.parameters())


def test_maps_that_no_control_names_may_be_missing(batch):
    objective = make_objective({"model.controls": ["pose"]})
    lacking = without(batch, "normal", "depth")
    assert torch.equal(objective(lacking).loss, objective(batch).loss)


def test_a_missing_control_is_refused_by_name(batch):
    lacking = without(batch, "normal")
    with pytest.raises(UserError, match=r"model\.controls names 'normal'"):
        make_objective()(lacking)


@pytest.mark.slow
@pytest.mark.parametrize("unfreeze", ["none", "all"])
def test_gradients_are_the_same_at_every_level_of_checkpointing(batch, unfreeze):
    gradients, kept = [], {}
    for level in ("none", "blocks", "keep_attention", "transformers"):
        objective = make_objective({"sharding.gradient_checkpointing": level, "model.unfreeze": unfreeze})
        with LiveBytes(beside=objective.parameters()) as live:
            loss = objective(batch).loss
            kept[level] = live.current
            loss.backward()
        gradients.append([parameter.grad for parameter in objective.parameters() if parameter.grad is not None])
    assert all(torch.equal(first, other) for first, *others in zip(*gradients, strict=True) for other in others)
    assert kept["none"] > kept["keep_attention"] > kept["blocks"] > kept["transformers"]


def test_report_names_the_loss_as_that_of_rgb(batch):
    output = make_objective()(batch)
    assert output.domain_counts.tolist() == [2, 0, 0]
    assert output.domain_sums[1:].tolist() == [0, 0]
    torch.testing.assert_close(output.domain_sums[0], output.sample_losses.sum())
    torch.testing.assert_close(output.loss.detach(), output.sample_losses.mean())


def test_bfloat16_networks_give_nearly_the_same_loss(batch):
    objective = make_objective()
    expected = objective(batch).loss
    loss = objective.bfloat16()(batch).loss
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(loss, expected, rtol=2**-5, atol=0)
