"""The average of the weights: its recursion and its warm-up."""

import pytest
import torch

from dreamdance.training.ema import ShardedEma


def random_masters(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, generator=generator), torch.randn(3, generator=generator)]


def test_average_starts_at_the_weights_and_is_a_copy():
    masters = random_masters(0)
    ema = ShardedEma(masters, decay=0.9)
    assert all(torch.equal(shard, master) for shard, master in zip(ema.shards, masters, strict=True))
    masters[0].add_(1)
    assert not torch.equal(ema.shards[0], masters[0])


def test_average_follows_the_recursion_with_the_rising_decay_of_diffusers():
    from diffusers.training_utils import EMAModel

    parameters = [torch.nn.Parameter(master) for master in random_masters(0)]
    theirs = EMAModel(parameters, decay=0.7)
    ours = ShardedEma([parameter.data for parameter in parameters], decay=0.7)
    for seed in range(1, 25):
        with torch.no_grad():
            for parameter, value in zip(parameters, random_masters(seed), strict=True):
                parameter.copy_(value)
        theirs.step(parameters)
        ours.update([parameter.data for parameter in parameters])
        if seed == 1:
            # diffusers copies the weights at its first step; our average starts with the first step
            theirs.shadow_params = [shard.clone() for shard in ours.shards]
        assert ours.num_updates == seed
    for our, their in zip(ours.shards, theirs.shadow_params, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)


def test_decay_rises_to_the_recipes_and_no_further():
    ema = ShardedEma(random_masters(0), decay=0.5)
    decays = []
    for _ in range(12):
        decays.append(ema.current_decay)
        ema.update(random_masters(1))
    assert decays[0] == pytest.approx(0.1)
    assert decays == sorted(decays)
    assert decays[-1] == 0.5


def test_decay_of_zero_makes_the_average_equal_to_the_weights():
    ema = ShardedEma(random_masters(0), decay=0.0)
    ema.update(random_masters(1))
    assert all(torch.equal(shard, master) for shard, master in zip(ema.shards, random_masters(1), strict=True))


def test_with_a_decay_of_zero_the_average_takes_no_memory():
    masters = random_masters(0)
    ema = ShardedEma(masters, decay=0.0)
    assert [shard.data_ptr() for shard in ema.shards] == [master.data_ptr() for master in masters]
    ema.update(masters)
    assert [shard.data_ptr() for shard in ema.shards] == [master.data_ptr() for master in masters]


def test_an_update_far_below_bf16s_resolution_is_not_rounded_away():
    start = [torch.ones(4)]
    ema = ShardedEma(start, decay=0.9999)
    ema.num_updates = 10**9
    for _ in range(10):
        ema.update([torch.full((4,), 1.01)])
    expected = 1.01 - 0.01 * 0.9999**10
    assert ema.shards[0].dtype == torch.float32
    torch.testing.assert_close(ema.shards[0], torch.full((4,), expected), rtol=1e-6, atol=0)
