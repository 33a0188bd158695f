"""The order of training samples: a pure function of seed and step, for any number of ranks."""

from collections import Counter

import pytest

from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder, SampleKey
from dreamdance.errors import RecipeError, ShardError
from dreamdance.runtime.ranks import Ranks

SHARDS = [7, 5, 6, 7, 7, 3, 7, 7, 7, 4] * 3


def order(**changes) -> ClipOrder:
    return ClipOrder(**{"samples_per_shard": SHARDS, "batch_size": 12, "seed": 5, **changes})


def epoch_of(clip_order: ClipOrder, epoch: int) -> list[list[int]]:
    start = epoch * clip_order.batches_per_epoch
    return [[key.sample_id for key in clip_order.batch(start + batch)] for batch in range(clip_order.batches_per_epoch)]


def rank_batches(clip_order: ClipOrder, step: int, world_size: int, micro_batch_size: int) -> list[list[SampleKey]]:
    loaders = [
        ClipLoader(None, clip_order, micro_batch_size=micro_batch_size, ranks=Ranks(rank, world_size))
        for rank in range(world_size)
    ]
    return [micro_batch for loader in loaders for micro_batch in loader.micro_batch_keys(step)]


def test_an_epoch_holds_every_sample_at_most_once_and_leaves_out_less_than_a_batch():
    clip_order = order()
    samples = Counter(sample for batch in epoch_of(clip_order, 0) for sample in batch)
    assert set(samples.values()) == {1}
    assert 0 <= clip_order.num_samples - len(samples) < clip_order.batch_size


def test_the_samples_that_an_epoch_leaves_out_differ_between_epochs():
    clip_order = order(samples_per_shard=[29])
    left_out = [
        frozenset(range(29)) - {sample for batch in epoch_of(clip_order, epoch) for sample in batch}
        for epoch in range(4)
    ]
    assert all(len(samples) == 5 for samples in left_out)
    assert len(set(left_out)) == 4


def test_every_sample_is_seen_within_a_few_epochs():
    clip_order = order(samples_per_shard=[29])
    seen = {sample for epoch in range(20) for batch in epoch_of(clip_order, epoch) for sample in batch}
    assert seen == set(range(29))


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (1, 4), (2, 6), (2, 2), (3, 4), (4, 3), (12, 1)])
def test_a_step_trains_on_the_same_samples_on_any_number_of_ranks(world_size, micro_batch_size):
    clip_order = order()
    for step in (0, 3, clip_order.batches_per_epoch, 1000):
        parts = rank_batches(clip_order, step, world_size, micro_batch_size)
        assert all(len(part) == micro_batch_size for part in parts)
        assert [key for part in parts for key in part] == clip_order.batch(step)


def test_the_order_depends_on_the_seed_and_the_epoch_and_on_nothing_else():
    assert epoch_of(order(), 1) == epoch_of(order(), 1)
    assert epoch_of(order(), 1) != epoch_of(order(), 2)
    assert epoch_of(order(), 1) != epoch_of(order(seed=6), 1)


def test_steps_can_be_requested_in_any_order():
    forwards, backwards = order(), order()
    steps = range(3 * forwards.batches_per_epoch)
    assert [forwards.batch(step) for step in steps] == [backwards.batch(step) for step in reversed(steps)][::-1]


def test_keys_carry_the_epoch_of_their_step():
    clip_order = order()
    assert {key.epoch for key in clip_order.batch(clip_order.batches_per_epoch - 1)} == {0}
    assert {key.epoch for key in clip_order.batch(clip_order.batches_per_epoch)} == {1}
    assert clip_order.position(2 * clip_order.batches_per_epoch + 3) == (2, 3)


def test_a_rank_keeps_to_its_own_shards():
    shards = [10] * 240
    clip_order = order(samples_per_shard=shards, batch_size=12)
    own = [{key.sample_id // 10 for step in range(100) for key in _share(clip_order, step, rank)} for rank in range(4)]
    for rank, touched in enumerate(own):
        others = set().union(*(other for index, other in enumerate(own) if index != rank))
        assert len(touched & others) <= 16  # a block of 8 shards may cross the border to each neighbour
        assert len(touched) < len(shards) / 3


def _share(clip_order: ClipOrder, step: int, rank: int) -> list[SampleKey]:
    return clip_order.batch(step)[rank * 3 : rank * 3 + 3]


def test_few_shards_are_open_at_a_time():
    clip_order = order(samples_per_shard=[10] * 240, num_canonical_nodes=1)
    for start in range(0, 150, 10):
        shards = {key.sample_id // 10 for step in range(start, start + 5) for key in clip_order.batch(step)}
        assert len(shards) <= 16


def test_the_number_of_lanes_divides_every_batch():
    assert order(batch_size=12).num_lanes == 12
    assert order(batch_size=16).num_lanes == 4
    assert order(batch_size=7).num_lanes == 1


def test_too_few_samples_for_a_batch_are_a_clear_error():
    with pytest.raises(ShardError, match=r"10 training clips are fewer than one batch of 12.*batch_size"):
        order(samples_per_shard=[4, 6])


def test_a_saved_position_is_the_step():
    assert order().resume(order().state_dict(37)) == 37


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"samples_per_shard": [*SHARDS, 5]}, "num_samples"),
        ({"samples_per_shard": SHARDS[::-1]}, "shards_sha256"),
        ({"batch_size": 6}, "batch_size"),
        ({"seed": 6}, "seed"),
        ({"num_canonical_nodes": 4}, "num_canonical_nodes"),
    ],
)
def test_resuming_with_another_training_set_names_the_change(change, named):
    with pytest.raises(ShardError, match=named):
        order(**change).resume(order().state_dict(37))


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(RecipeError, match="micro_batch_size 5 does not divide batch_size 12"):
        ClipLoader(None, order(), micro_batch_size=5, ranks=Ranks())
