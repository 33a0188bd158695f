"""Draws keyed by the sample; DDPM targets and weights that agree with diffusers' sampler; EDM as SVD was trained."""

import math

import pytest
import torch

from dreamdance.diffusion.noise import (
    ddpm_target,
    draw_log_normal,
    draw_noise,
    draw_timesteps,
    edm_preconditioning,
    edm_weight,
    level_quantiles,
    log_normal_at,
    make_ddim_scheduler,
    make_ddpm_scheduler,
    min_snr_weights,
    timestep_at,
)
from dreamdance.errors import UserError

KEYS = [[0, 0, sample] for sample in range(2000)]


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 3, 5, 6, generator=generator) for _ in range(2))
    return latents, noise


def test_draws_depend_on_the_sample_and_not_on_its_batch():
    for draw in (
        lambda keys: draw_noise(keys, (2, 3, 4, 4)),
        lambda keys: draw_noise(keys, (2, 3, 4, 4), offset=0.1),
        lambda keys: draw_timesteps(keys, 1000),
        lambda keys: draw_log_normal(keys, 0.7, 1.6, purpose="sigma"),
    ):
        together = draw(KEYS[:4])
        assert torch.equal(draw([KEYS[2]]), together[2:3])
        assert torch.equal(draw(KEYS[3::-1]), together.flip(0))
        assert not torch.equal(draw([[0, 1, 2]]), together[2:3])


def test_noises_of_different_purposes_are_independent():
    first, second = draw_noise(KEYS[:1], (100_000, 1, 1)), draw_noise(KEYS[:1], (100_000, 1, 1), purpose="reference")
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(100_000)


def test_noise_is_standard_normal_and_independent_between_frames_and_domains():
    noise = draw_noise(KEYS[:1], (2, 3, 1, 100, 100)).reshape(6, -1)
    assert torch.all(noise.mean(dim=1).abs() < 4 / 100)
    assert torch.all((noise.var(dim=1) - 1).abs() < 4 * math.sqrt(2) / 100)
    correlations = torch.corrcoef(noise) - torch.eye(6)
    assert correlations.abs().max() < 5 / 100


@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 2, 4, 4), (3, 2, 1, 4, 4)], ids=["image", "video", "domains"])
def test_noise_offset_adds_one_constant_to_each_channel_of_a_clip(shape):
    plain, shifted = draw_noise(KEYS, shape), draw_noise(KEYS, shape, offset=0.1)
    offset = (shifted - plain) / 0.1
    if len(shape) > 3:  # the same in all frames: a video has one level
        assert torch.allclose(offset, offset[:, :1].expand_as(offset), rtol=0, atol=1e-4)
        offset = offset[:, 0]
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), rtol=0, atol=1e-4)
    first, second = offset[..., 0, 0].flatten(1).T  # of two channels, or of two domains
    for constants in (first, second):
        assert abs(constants.mean()) < 4 / math.sqrt(len(KEYS))
        assert abs(constants.var() - 1) < 4 * math.sqrt(2 / len(KEYS))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / math.sqrt(len(KEYS))


def test_timesteps_are_uniform():
    timesteps = draw_timesteps(KEYS, 10)
    assert timesteps.dtype == torch.int64
    shares = torch.bincount(timesteps, minlength=10) / len(KEYS)
    assert len(shares) == 10
    assert torch.all((shares - 0.1).abs() < 4 * math.sqrt(0.09 / len(KEYS)))


def test_quantiles_of_noise_levels_are_those_of_the_draws():
    assert level_quantiles(4) == [0.125, 0.375, 0.625, 0.875]
    assert [timestep_at(quantile, 1000) for quantile in level_quantiles(8)] == [62, 187, 312, 437, 562, 687, 812, 937]
    assert timestep_at(level_quantiles(1000)[-1], 1000) == 999
    drawn = draw_log_normal(KEYS, 0.7, 1.6, purpose="sigma")
    for quantile in level_quantiles(8):
        share = (drawn <= log_normal_at(quantile, 0.7, 1.6)).double().mean()
        assert abs(share - quantile) < 4 * math.sqrt(quantile * (1 - quantile) / len(KEYS))


def test_log_normal_draws_have_the_mean_and_deviation_of_their_logarithm():
    logarithms = draw_log_normal(KEYS, -3.0, 0.5, purpose="augmentation").log()
    assert abs(logarithms.mean() + 3.0) < 4 * 0.5 / math.sqrt(len(KEYS))
    assert abs(logarithms.std() - 0.5) < 4 * 0.5 / math.sqrt(2 * len(KEYS))


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
def test_a_network_that_meets_its_target_gives_the_clean_latents_back(prediction_type, zero_terminal_snr):
    scheduler = make_ddpm_scheduler(prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    sampler = make_ddim_scheduler(scheduler)
    sampler.set_timesteps(25)
    latents, noise = latents_and_noise()
    for timestep in sampler.timesteps[[0, 10, -1]]:
        timesteps = timestep.expand(4)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = ddpm_target(scheduler, latents, noise, timesteps)
        found = sampler.step(target, timestep, noisy).pred_original_sample
        # at high noise 1 / alpha enlarges float32's rounding
        alpha = scheduler.alphas_cumprod[timestep].sqrt().item()
        tolerance = 1e-5 / alpha if prediction_type == "epsilon" else 1e-5
        torch.testing.assert_close(found, latents, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_with_zero_terminal_snr_training_ends_and_sampling_begins_at_pure_noise(prediction_type):
    scheduler = make_ddpm_scheduler(prediction_type=prediction_type, zero_terminal_snr=True)
    latents, noise = latents_and_noise()
    assert scheduler.alphas_cumprod[-1] == 0
    assert torch.equal(scheduler.add_noise(latents, noise, torch.full((4,), 999)), noise)
    sampler = make_ddim_scheduler(scheduler)
    for num_steps in (1, 4, 25):
        sampler.set_timesteps(num_steps)
        assert sampler.timesteps[0] == 999
        assert len(sampler.timesteps) == num_steps
    # one step with the right prediction gives the right result
    sampler.set_timesteps(1)
    target = ddpm_target(scheduler, latents, noise, torch.full((4,), 999))
    torch.testing.assert_close(sampler.step(target, 999, noise).prev_sample, latents, rtol=0, atol=1e-6)


def test_without_it_schedules_are_those_of_stable_diffusion():
    scheduler = make_ddpm_scheduler()
    torch.testing.assert_close(scheduler.alphas_cumprod[-1], torch.tensor(0.0047), rtol=0, atol=5e-5)
    sampler = make_ddim_scheduler(scheduler)
    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    sampler.set_timesteps(25)
    assert sampler.timesteps[0] == 961
    assert sampler.timesteps[-1] == 1
    assert not sampler.config.clip_sample


def test_noise_prediction_with_zero_terminal_snr_is_refused():
    with pytest.raises(UserError, match=r"objective\.prediction_type"):
        make_ddpm_scheduler(prediction_type="epsilon", zero_terminal_snr=True)


def test_an_unknown_prediction_type_is_refused():
    scheduler = make_ddpm_scheduler(prediction_type="flow")
    with pytest.raises(UserError, match="'flow'"):
        ddpm_target(scheduler, *latents_and_noise(), torch.arange(4))


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
def test_min_snr_weighs_the_error_of_the_clean_latents_alike_whatever_is_predicted(prediction_type, zero_terminal_snr):
    scheduler = make_ddpm_scheduler(prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    sampler = make_ddim_scheduler(scheduler)
    sampler.set_timesteps(1000)
    latents, noise = latents_and_noise()
    latents, noise = latents.double(), noise.double()
    scheduler.alphas_cumprod = sampler.alphas_cumprod = scheduler.alphas_cumprod.double()
    for timestep in (20, 400, 900, 999):
        timesteps = torch.full((4,), timestep)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = ddpm_target(scheduler, latents, noise, timesteps) + 0.01
        clean = sampler.step(prediction, timestep, noisy).pred_original_sample
        alpha = scheduler.alphas_cumprod[timestep].item()
        snr = alpha / (1 - alpha)
        weighted = min_snr_weights(scheduler, timesteps, 5.0).double() * 0.01**2
        expected = min(snr + 1 if zero_terminal_snr else snr, 5.0) * (clean - latents).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=0)


def test_without_zero_terminal_snr_weights_are_those_of_the_min_snr_paper():
    scheduler = make_ddpm_scheduler(prediction_type="v_prediction")
    alphas = scheduler.alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    found = min_snr_weights(scheduler, torch.arange(1000), 5.0).double()
    torch.testing.assert_close(found, snr.clamp(max=5.0) / (snr + 1), rtol=1e-4, atol=0)


def test_weights_of_v_with_zero_terminal_snr_are_those_of_the_peers_in_float64():
    """Moore and Champ: min(SNR + 1, 5) / (SNR + 1), with the betas of arXiv 2305.08891, Algorithm 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    roots = (1 - betas).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    signal = roots.square()
    expected = (5 * (1 - signal)).clamp(max=1.0)  # min(SNR + 1, 5) / (SNR + 1), as SNR + 1 = 1 / (1 - signal)
    scheduler = make_ddpm_scheduler(prediction_type="v_prediction", zero_terminal_snr=True)
    found = min_snr_weights(scheduler, torch.arange(1000), 5.0)
    assert found[-1] == 1.0
    # the schedule is in float32: 1 - signal is small at the first timesteps
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("prediction_type", "share"), [("v_prediction", 0.1), ("sample", 0.04)])
def test_the_timesteps_where_sampling_begins_at_pure_noise_are_trained(prediction_type, share):
    scheduler = make_ddpm_scheduler(prediction_type=prediction_type, zero_terminal_snr=True)
    weights = min_snr_weights(scheduler, torch.arange(1000), 5.0).double()
    sampler = make_ddim_scheduler(scheduler)
    sampler.set_timesteps(25)
    first = sampler.timesteps[:3]
    assert first.tolist() == [999, 959, 919]
    # min(SNR, 5) gave them 0 to 0.002
    torch.testing.assert_close(weights[first], torch.ones(3).double(), rtol=0, atol=0.02)
    # a tenth of all timesteps; the easy ones weigh the error of the clean latents up to 5 times as much
    assert weights[900:].sum() / weights.sum() > share


SIGMAS = torch.tensor([0.002, 0.1, 1.0, 7.3, 700.0], dtype=torch.float64)


def test_preconditioned_input_and_target_have_unit_variance_for_unit_data():
    c_skip, c_out, c_in, _ = edm_preconditioning(SIGMAS)
    # the network's input c_in (x + s n), and its target (x - c_skip (x + s n)) / c_out, for unit x and n
    torch.testing.assert_close(c_in**2 * (1 + SIGMAS**2), torch.ones_like(SIGMAS))
    target_variance = ((1 - c_skip) ** 2 + (c_skip * SIGMAS) ** 2) / c_out**2
    torch.testing.assert_close(target_variance, torch.ones_like(SIGMAS))


def test_the_loss_weight_makes_the_error_of_the_network_s_own_output_count_once():
    c_out = edm_preconditioning(SIGMAS).c_out
    torch.testing.assert_close(edm_weight(SIGMAS) * c_out**2, torch.ones_like(SIGMAS))


def test_the_network_s_target_is_v_of_the_normalised_noisy_latents():
    data, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c_skip, c_out, c_in, _ = edm_preconditioning(SIGMAS)
    noisy = data + SIGMAS * noise
    target = (data - c_skip * noisy) / c_out
    # alpha = c_in and sigma = s c_in are the variance-preserving form: v = alpha noise - sigma data
    torch.testing.assert_close(target, c_in * noise - SIGMAS * c_in * data)


def test_preconditioning_is_finite_and_exact_over_svd_s_range_in_float32():
    for narrow, exact in zip(edm_preconditioning(SIGMAS.float()), edm_preconditioning(SIGMAS), strict=True):
        torch.testing.assert_close(narrow.double(), exact, rtol=1e-6, atol=1e-9)
