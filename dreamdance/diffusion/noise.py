"""Noise, targets and weights of both stages: DDPM as Stable Diffusion was trained, EDM as Stable Video Diffusion was.

Every random draw for a sample depends on the sample's key alone and happens on the CPU (C8), so that it is the same on
any device, in any batch and on any number of ranks. The schedules are those of diffusers.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from dreamdance.errors import UserError
from dreamdance.runtime.sample_random import sample_generator

Keys = Sequence[Sequence[int]]


def draw_noise(keys: Keys, shape: Sequence[int], *, offset: float = 0.0, purpose: str = "noise") -> Tensor:
    """Draws standard normal noise for each sample.

    Args:
        keys: `b` keys (seed, epoch, sample id).
        shape: shape of one sample, ending in `c h w`; `f ... c h w` for videos.
        offset: strength of an added noise that is constant over `h w` and over the frames (noise offset; 0 gives
            Eq. 3). An offset per frame would be flicker, which a network that sees all frames averages away.
        purpose: name of the noise's use; noises of different purposes are independent.

    Returns:
        `b *shape`, float32 on the CPU.
    """
    noise = torch.stack([torch.randn(*shape, generator=sample_generator(key, purpose)) for key in keys])
    if offset == 0:
        return noise
    frames = (1,) if len(shape) > 3 else ()
    constant_shape = (*frames, *shape[len(frames) : -2], 1, 1)
    constant = [torch.randn(*constant_shape, generator=sample_generator(key, f"{purpose} offset")) for key in keys]
    return noise + offset * torch.stack(constant)


def draw_timesteps(keys: Keys, num_train_timesteps: int, *, purpose: str = "timestep") -> Tensor:
    """Draws one DDPM timestep per sample, uniformly from 0 to `num_train_timesteps` - 1; `b`, int64 on the CPU."""
    draws = [torch.randint(num_train_timesteps, (), generator=sample_generator(key, purpose)) for key in keys]
    return torch.stack(draws)


def level_quantiles(count: int) -> list[float]:
    """The quantiles of a distribution of noise levels at which validation measures: the middles of `count` parts."""
    return [(number + 0.5) / count for number in range(count)]


def timestep_at(quantile: float, num_train_timesteps: int) -> int:
    """The DDPM timestep at a quantile, in (0, 1), of the distribution of `draw_timesteps`."""
    return int(quantile * num_train_timesteps)


def log_normal_at(quantile: float, mean: float, std: float) -> float:
    """The value at a quantile, in (0, 1), of the distribution of `draw_log_normal`."""
    return math.exp(NormalDist(mean, std).inv_cdf(quantile))


def draw_log_normal(keys: Keys, mean: float, std: float, *, purpose: str) -> Tensor:
    """Draws exp(normal(mean, std)) once per sample, for SVD's sigmas and for the strengths of its conditioning noise.

    Args:
        keys: `b` keys.
        mean: mean of the logarithm.
        std: standard deviation of the logarithm.
        purpose: `"sigma"` or `"augmentation"`.

    Returns:
        `b`, float32 on the CPU.
    """
    normal = torch.stack([torch.randn((), generator=sample_generator(key, purpose)) for key in keys])
    return torch.exp(mean + std * normal)


def make_ddpm_scheduler(
    *,
    prediction_type: str = "epsilon",
    num_train_timesteps: int = 1000,
    beta_schedule: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> DDPMScheduler:
    """Builds the scheduler of training; the defaults are Stable Diffusion 1.5's.

    Raises:
        UserError: `zero_terminal_snr` with noise prediction: the last timestep is pure noise, so that a predicted
            noise contains no information about the picture.
    """
    if zero_terminal_snr and prediction_type == "epsilon":
        raise UserError(
            "objective.zero_terminal_snr needs objective.prediction_type: v_prediction or sample, not epsilon, "
            "which at the last timestep contains nothing about the picture"
        )
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        clip_sample=False,
    )


def make_ddim_scheduler(ddpm_scheduler: DDPMScheduler) -> DDIMScheduler:
    """Builds the sampler that belongs to a training scheduler.

    With zero terminal SNR the sampler spaces its steps from the last timestep down ("trailing"), where sampling from
    pure noise begins, and ends at the clean picture. Otherwise it takes the steps of Stable Diffusion 1.5.
    """
    if ddpm_scheduler.config.rescale_betas_zero_snr:
        spacing = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
    else:
        spacing = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(ddpm_scheduler.config, **spacing)


def ddpm_target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Returns the network's target, by the scheduler's `prediction_type`.

    Args:
        scheduler: the scheduler of training.
        latents: `n c h w`, clean, float32 (diffusers would round its tables to a narrower type).
        noise: as `latents`.
        timesteps: `n`.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    if prediction_type == "sample":
        return latents
    raise UserError(f"objective.prediction_type is {prediction_type!r}; epsilon, v_prediction and sample are accepted")


def min_snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma loss weights: min(SNR, gamma) on the error of the clean picture, for every prediction type.

    With zero terminal SNR the weight is min(SNR + 1, gamma): min(SNR, gamma) is 0 at the last timestep and almost 0
    at the first few that sampling visits, so that the network would not learn them. Without zero terminal SNR the
    weights are the paper's, which are also diffusers'.

    Args:
        scheduler: the scheduler of training.
        timesteps: `n`.
        gamma: the bound, 5 in the paper that proposed it (arXiv 2303.09556).

    Returns:
        `n`, float32: that weight divided by SNR for noise, by SNR + 1 for v prediction.
    """
    snr = compute_snr(scheduler, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    bounded = (snr + 1 if scheduler.config.rescale_betas_zero_snr else snr).clamp(max=gamma)
    weights: Tensor = bounded / divisor[scheduler.config.prediction_type]
    return weights


class EdmPreconditioning(NamedTuple):
    """Coefficients around SVD's network: denoised = c_skip * noisy + c_out * network(c_in * noisy, timestep)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    timestep: Tensor


def edm_preconditioning(sigmas: Tensor) -> EdmPreconditioning:
    """SVD's preconditioning (EDM's for v prediction, unit data variance).

    Args:
        sigmas: positive float32 of any shape.

    Returns:
        Tensors of the shape of `sigmas`: 1 / (s^2 + 1), -s / sqrt(s^2 + 1), 1 / sqrt(s^2 + 1) and ln(s) / 4.
    """
    variance = sigmas.square() + 1
    return EdmPreconditioning(
        c_skip=1 / variance,
        c_out=-sigmas * variance.rsqrt(),
        c_in=variance.rsqrt(),
        timestep=0.25 * sigmas.log(),
    )


def edm_denoised(
    output: Tensor, noisy: Tensor, sigmas: Tensor, prediction_type: str, reference: Tensor | None = None
) -> Tensor:
    """The clean latents that a network's output means, of the shape of `noisy`.

    Args:
        output: `b f c h w` float32, what the network computed from `c_in * noisy`; to blend, with one channel more.
        noisy: `b f c h w` float32.
        sigmas: positive float32 that broadcast against `noisy`.
        prediction_type: `"v_prediction"`, SVD's; `"sample"`: the output itself; `"blend"`: see `blend_reference`.
        reference: scaled latents of the reference, with the noise that the network saw; needed to blend.
    """
    if prediction_type == "sample":
        return output
    if prediction_type == "blend":
        assert reference is not None
        return blend_reference(output, reference)
    c_skip, c_out, _, _ = edm_preconditioning(sigmas)
    return c_skip * noisy + c_out * output


def blend_reference(output: Tensor, reference: Tensor) -> Tensor:
    """What stands still from the reference, the rest from the network: `s * reference + (1 - s) * own`.

    Args:
        output: `... c+1 h w` float32: the network's own clean latents, then the logit of the share s, any number.
        reference: `... c h w` float32, its scaled latents; they broadcast against the own ones.

    Returns:
        Clean latents `... c h w`.
    """
    own, logit = output[..., :-1, :, :], output[..., -1:, :, :]
    return own + logit.sigmoid() * (reference - own)


def edm_weight(sigmas: Tensor, prediction_type: str = "v_prediction") -> Tensor:
    """Weight of the denoised latents' squared error: the network output's error then has weight 1.

    For velocities it is (s^2 + 1) / s^2, for samples 1.

    Args:
        sigmas: positive float32 of any shape.
        prediction_type: as in `edm_denoised`.
    """
    return (sigmas.square() + 1) / sigmas.square() if prediction_type == "v_prediction" else torch.ones_like(sigmas)


def edm_velocity(sample: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
    """The velocity that a predicted sample means: (sqrt(s^2 + 1) sample - scaled) / -s, for SVD's sampler.

    Args:
        sample: `b f c h w` float32, predicted clean latents.
        scaled: `b f c h w` float32, noisy latents times `c_in`, the network's input.
        timestep: ln(s) / 4, a scalar.

    Returns:
        `b f c h w`: `edm_denoised` makes the sample of it again.
    """
    sigma = (4 * timestep.float()).exp().to(sample)
    return (scaled - (sigma.square() + 1).sqrt() * sample) / sigma


def make_svd_scheduler() -> EulerDiscreteScheduler:
    """Builds the sampler of Stable Video Diffusion, with its published configuration."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        interpolation_type="linear",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )
