"""Both stages overfit one clip: the loss falls tenfold and the real pipelines show the clip."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.recipes import select_clips, tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.media.transforms import decode_normals
from dreamdance.training.networks.trainability import set_modes
from dreamdance.training.objectives.output import Objective
from dreamdance.training.stages.training_stage import stage_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def one_clip(frames: list[int]) -> ClipBatch:
    """Some frames of one dancer, far enough apart that the person moves; the reference is another frame."""
    whole = tiny_clip_batch(num_clips=1, num_frames=24)
    return replace(whole, maps={name: clips[:, frames] for name, clips in whole.maps.items()})


def with_draws(batch: ClipBatch, *, epoch: int, copies: int) -> ClipBatch:
    """The clip several times, each time with noise, timestep and dropouts of its own."""
    repeated = select_clips(batch, *[0] * copies)
    return replace(repeated, keys=torch.tensor([[0, epoch, index] for index in range(copies)]))


def fixed_loss(objective: Objective, batch: ClipBatch) -> float:
    """The loss over draws that do not occur in training."""
    objective.eval()
    with torch.no_grad():
        loss = objective(with_draws(batch, epoch=10**6, copies=16)).loss.item()
    set_modes(objective)
    return loss


def overfit(objective: Objective, batch: ClipBatch, *, steps: int, copies: int, lr: float) -> float:
    """Trains on one clip; returns the factor by which the loss fell."""
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    before = fixed_loss(objective, batch)
    for step in range(steps):
        warm_up, decay = (step + 1) / 20, (steps - step) / (0.3 * steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, warm_up, decay)
        optimizer.zero_grad()
        objective(with_draws(batch, epoch=step, copies=copies)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    return before / fixed_loss(objective, batch)


def moving_region(batch: ClipBatch) -> Tensor:
    """`b f 1 H W`: all pixels that show the body in some frame, so that a still background does not count."""
    mask = batch.maps["mask"][:, :, :1]
    return (mask.amax(dim=1, keepdim=True) > 0).expand_as(mask)


def psnr(frames: Tensor, truth: Tensor, region: Tensor) -> float:
    error = (frames - truth).square()[region.expand_as(truth)].mean().item()
    return -10 * math.log10(error)


def mean_angle(encoded: Tensor, truth: Tensor, region: Tensor) -> float:
    """Degrees between normals inside the region."""
    cosine = (decode_normals(encoded) * decode_normals(truth)).sum(dim=2, keepdim=True)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))[region].mean().item()


def test_stage_1_overfits_one_clip():
    recipe = tiny_stage1_recipe(
        "domains",
        {
            "data.num_frames": 3,
            "objective.reference_dropout": 0.0,
            # guidance leads away from the overfitted clip
            "sampling.guidance_scales": {"rgb": 0.0, "normal": 0.0, "depth": 0.0},
        },
    )
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    batch = one_clip([0, 7, 14])
    fell = overfit(objective, batch, steps=400, copies=8, lr=3e-3)
    shown = stage_of(recipe).sample(objective, batch).predictions

    region = moving_region(batch)
    still = batch.reference[:, None].expand_as(batch.rgb)
    assert fell > 10
    assert psnr(shown["rgb"], batch.rgb, region) > 24
    assert psnr(shown["rgb"], batch.rgb, region) > psnr(still, batch.rgb, region) + 3
    assert mean_angle(shown["normal"], batch.maps["normal"], region) < 15
    assert (shown["depth"] - batch.maps["depth"][:, :, :1]).abs()[region].mean() < 0.05


def test_stage_2_overfits_one_clip():
    no_dropout: dict[str, Any] = {
        f"objective.{name}_dropout": 0.0
        for name in ("latents", "embedding", "both", "frame_control", "modality_control")
    }
    recipe = tiny_stage2_recipe(
        {
            **no_dropout,
            "data.num_frames": 2,
            # fewer of the lowest noise levels, where overfitting takes longest
            "objective.sigma_log_mean": 1.0,
            "objective.sigma_log_std": 1.2,
            "sampling.guidance_scale": 1.0,
            "sampling.num_inference_steps": 8,
        }
    )
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    batch = one_clip([0, 10])
    fell = overfit(objective, batch, steps=320, copies=4, lr=6e-3)
    shown = stage_of(recipe).sample(objective, batch).predictions

    region = moving_region(batch)
    still = batch.reference[:, None].expand_as(batch.rgb)
    assert fell > 10
    assert psnr(shown["rgb"], batch.rgb, region) > 23
    assert psnr(shown["rgb"], batch.rgb, region) > psnr(still, batch.rgb, region) + 3
