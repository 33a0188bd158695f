"""Dropped conditions: with the right probabilities, disjoint where required, dependent on the sample alone."""

import math

import pytest
import torch

from dreamdance.diffusion.condition_dropout import (
    blank_controls,
    draw_kept_controls,
    drop_conditions,
    drop_references,
)
from dreamdance.errors import UserError

NUM_KEYS = 4000
KEYS = [[0, 0, sample] for sample in range(NUM_KEYS)]


def drop_controls(maps, keys, *, frame_rate, modality_rate):
    num_frames = next(iter(maps.values())).shape[:-3].numel() // len(keys)
    kept = draw_kept_controls(keys, list(maps), num_frames, frame_rate=frame_rate, modality_rate=modality_rate)
    return blank_controls(maps, kept)


def assert_share(happened: torch.Tensor, probability: float) -> None:
    """Checks a binomial share within 4 standard deviations: draws are fixed, and 1 in 16,000 right ones would fail."""
    bound = 4 * math.sqrt(probability * (1 - probability) / happened.numel())
    assert abs(happened.double().mean().item() - probability) <= bound


def maps(
    num_clips: int, num_frames: int, names: tuple[str, ...] = ("pose", "depth", "normal")
) -> dict[str, torch.Tensor]:
    return {name: torch.ones(num_clips, num_frames, 3, 2, 2) for name in names}


def dropped(names: tuple[str, ...], *, num_frames: int, frame_rate: float, modality_rate: float) -> torch.Tensor:
    """`m b f` booleans over all keys."""
    given = maps(NUM_KEYS, num_frames, names)
    result = drop_controls(given, KEYS, frame_rate=frame_rate, modality_rate=modality_rate)
    return torch.stack([~result[name].flatten(2).any(dim=2) for name in names])


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_references_are_dropped_with_the_given_probability(probability):
    assert_share(drop_references(KEYS, probability), probability)


def test_latents_and_embedding_are_dropped_alone_or_together_each_with_its_own_probability():
    drops = drop_conditions(KEYS, latents=0.05, embedding=0.1, both=0.2)
    assert_share(drops.latents & ~drops.embedding, 0.05)
    assert_share(drops.embedding & ~drops.latents, 0.1)
    assert_share(drops.latents & drops.embedding, 0.2)
    assert_share(~drops.latents & ~drops.embedding, 0.65)


def test_certain_and_impossible_drops_are_exact():
    latents, embedding = drop_conditions(KEYS, latents=0.0, embedding=0.0, both=1.0)
    assert latents.all()
    assert embedding.all()
    latents, embedding = drop_conditions(KEYS, latents=1.0, embedding=0.0, both=0.0)
    assert latents.all()
    assert not embedding.any()
    assert not any(flags.any() for flags in drop_conditions(KEYS, latents=0.0, embedding=0.0, both=0.0))


def test_drops_depend_on_the_sample_and_not_on_its_batch():
    order = torch.randperm(NUM_KEYS, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [KEYS[index] for index in order]
    assert torch.equal(drop_references(shuffled, 0.3), drop_references(KEYS, 0.3)[order])
    rates = {"latents": 0.2, "embedding": 0.2, "both": 0.2}
    for one, other in zip(drop_conditions(shuffled, **rates), drop_conditions(KEYS, **rates), strict=True):
        assert torch.equal(one, other[order])
    alone = drop_controls(maps(1, 8), [KEYS[5]], frame_rate=0.3, modality_rate=0.3)
    batch = drop_controls(maps(10, 8), KEYS[:10], frame_rate=0.3, modality_rate=0.3)
    assert all(torch.equal(alone[name][0], batch[name][5]) for name in alone)


def test_another_epoch_drops_other_samples():
    later = [[0, 1, sample] for sample in range(NUM_KEYS)]
    both = drop_references(KEYS, 0.5) & drop_references(later, 0.5)
    assert_share(both, 0.25)


def test_the_kinds_of_drop_are_independent_of_one_another():
    both = drop_references(KEYS, 0.5) & drop_conditions(KEYS, latents=0.5, embedding=0.0, both=0.0).latents
    assert_share(both, 0.25)


@pytest.mark.parametrize(
    ("names", "num_frames", "frame_rate", "modality_rate"),
    [
        (("pose", "depth", "normal"), 4, 0.1, 0.1),
        (("pose", "depth", "normal"), 1, 0.5, 0.5),
        (("pose", "depth"), 2, 0.4, 0.3),
        (("pose",), 2, 0.5, 0.5),
        (("pose", "depth", "normal"), 3, 0.0, 0.4),
        (("pose", "depth", "normal"), 3, 0.4, 0.0),
    ],
)
def test_control_maps_are_dropped_in_exactly_the_expected_shares(names, num_frames, frame_rate, modality_rate):
    flags = dropped(names, num_frames=num_frames, frame_rate=frame_rate, modality_rate=modality_rate)
    # a map is dropped with its modality or alone, a modality as a whole or by frames, never all: conditional shares
    one_map = 1 - (1 - modality_rate) * (1 - frame_rate)
    one_modality = modality_rate + (1 - modality_rate) * frame_rate**num_frames
    everything = one_modality ** len(names)
    assert not flags.all(dim=2).all(dim=0).any()
    for modality in flags:
        assert_share(modality[:, 0], (one_map - everything) / (1 - everything))
        assert_share(modality.all(dim=1), (one_modality - everything) / (1 - everything))
    untouched = ((1 - modality_rate) * (1 - frame_rate) ** num_frames) ** len(names)
    assert_share(~flags.any(dim=2).any(dim=0), untouched / (1 - everything))


def test_frames_of_a_clip_are_dropped_independently():
    flags = dropped(("pose", "depth"), num_frames=2, frame_rate=0.3, modality_rate=0.0)
    everything = 0.3**4
    assert_share(flags[0].all(dim=1), (0.3**2 - everything) / (1 - everything))
    assert_share(flags[:, :, 0].all(dim=0), (0.3**2 - everything) / (1 - everything))


def test_without_rates_the_maps_are_untouched():
    given = {name: torch.rand(3, 4, 3, 2, 2) for name in ("pose", "normal")}
    result = drop_controls(given, KEYS[:3], frame_rate=0.0, modality_rate=0.0)
    assert all(torch.equal(result[name], given[name]) for name in given)


def test_maps_are_kept_whole_or_become_black_and_the_originals_stay():
    given = {name: torch.rand(6, 5, 3, 4, 2) + 0.1 for name in ("pose", "depth", "normal")}
    before = {name: each.clone() for name, each in given.items()}
    result = drop_controls(given, KEYS[:6], frame_rate=0.4, modality_rate=0.2)
    for name, each in result.items():
        kept = each.flatten(2).any(dim=2)
        assert torch.equal(each[kept], given[name][kept])
        assert not each[~kept].any()
        assert torch.equal(given[name], before[name])


def test_clips_and_frames_may_be_merged_and_the_order_of_the_controls_is_free():
    given = maps(4, 6)
    expected = drop_controls(given, KEYS[:4], frame_rate=0.3, modality_rate=0.3)
    merged = {name: each.flatten(0, 1) for name, each in reversed(given.items())}
    result = drop_controls(merged, KEYS[:4], frame_rate=0.3, modality_rate=0.3)
    assert all(torch.equal(result[name], expected[name].flatten(0, 1)) for name in given)


def test_impossible_probabilities_are_refused_by_name():
    with pytest.raises(UserError, match="both_dropout"):
        drop_conditions(KEYS, latents=0.5, embedding=0.4, both=0.2)
    with pytest.raises(UserError, match=r"frame_control_dropout is 1\.0"):
        drop_controls(maps(1, 2), KEYS[:1], frame_rate=1.0, modality_rate=0.1)
    with pytest.raises(UserError, match=r"modality_control_dropout is 1\.0"):
        drop_controls(maps(1, 2), KEYS[:1], frame_rate=0.1, modality_rate=1.0)
