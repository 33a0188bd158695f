"""Random draws depend on the sample alone (contract C8)."""

import torch

from dreamdance.runtime.sample_random import sample_generator


def noise(key, purpose="noise"):
    return torch.randn(64, generator=sample_generator(key, purpose))


def test_the_same_sample_draws_the_same_numbers():
    assert torch.equal(noise((3, 1, 7)), noise((3, 1, 7)))
    assert torch.equal(noise(torch.tensor([3, 1, 7])), noise((3, 1, 7)))


def test_seed_epoch_sample_and_purpose_each_change_the_draw():
    others = [noise((4, 1, 7)), noise((3, 2, 7)), noise((3, 1, 8)), noise((3, 1, 7), "timestep")]
    assert all(not torch.equal(noise((3, 1, 7)), other) for other in others)


def test_numbers_of_a_key_are_separated():
    assert not torch.equal(noise((1, 11, 1)), noise((11, 1, 1)))
    assert not torch.equal(noise((1, 1, 11)), noise((1, 11, 1)))


def test_first_draws_of_many_samples_are_uniform():
    first = torch.stack([torch.rand((), generator=sample_generator((0, 0, i), "timestep")) for i in range(2000)])
    # The mean of 2,000 uniform numbers has a standard deviation of 0.0065.
    assert abs(first.mean() - 0.5) < 5 * 0.0065
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 5 / 2000**0.5
