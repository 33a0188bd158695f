"""Divides a checkpoint anew among another number of ranks, while it is read: no second copy of it is ever written.

Every rank's file says which run of which parameter lies where in its partitions, so that each rank of the new run picks
its own pieces out of all old files. Values are only copied: weights, moments and average come back bit for bit.
DeepSpeed's universal checkpoints do the same in a separate conversion, which does not know our average.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dreamdance.training.checkpointing.rank_state import read_rank_state
from dreamdance.training.ema import ShardedEma
from dreamdance.training.engine import Engine, Fragment


def load_divided_anew(engine: Engine, ema: ShardedEma, folder: Path, *, saved_world_size: int) -> None:
    """Restores weights, optimizer state and average from a complete checkpoint of another number of ranks.

    Args:
        engine: of this run; the same parameters train as in the checkpoint.
        ema: of this run.
        folder: the checkpoint.
        saved_world_size: how many ranks saved it.
    """
    if not engine.sharded:  # then every rank has everything
        engine.load(folder)
        ema.load_state_dict(read_rank_state(folder, 0).ema)
        return
    own = engine.fragments()
    moments = [[torch.zeros_like(master) for master in engine.masters] for _ in engine.MOMENTS]
    step = 0.0
    with torch.no_grad():
        for rank in range(saved_world_size):
            state = read_rank_state(folder, rank)
            saved = engine.read_optimizer(folder, rank)
            ema.num_updates = int(state.ema["num_updates"])
            pairs = [(engine.masters, saved.masters), (ema.shards, state.ema["shards"])]
            if saved.moments:  # there are none before the first step that was applied
                step = saved.step
                pairs += zip(moments, saved.moments, strict=True)
            for shards, saved_shards in pairs:
                _copy_common(own, shards, state.fragments, saved_shards)
    engine.set_optimizer(moments, step=step)


def _copy_common(
    own: Sequence[Fragment], shards: Sequence[Tensor], saved: Sequence[Fragment], saved_shards: Sequence[Tensor]
) -> None:
    """Copies the elements which both partitions hold."""
    sources = {fragment.name: fragment for fragment in saved}
    for target in own:
        source = sources.get(target.name)
        if source is None:
            continue
        start = max(target.start, source.start)
        length = min(target.start + target.length, source.start + source.length) - start
        if length > 0:
            values = saved_shards[source.shard].flatten().narrow(0, source.offset + start - source.start, length)
            shards[target.shard].flatten().narrow(0, target.offset + start - target.start, length).copy_(values)
