"""A rank's file of a checkpoint is read where it lies: only what is copied out of it comes into memory."""

from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks

from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing.rank_state import (
    RankState,
    generator_states,
    rank_content,
    rank_file,
    read_rank_state,
)
from dreamdance.training.engine import Fragment

MIB = 1 << 20
SHARD_MIB = 192


def memory_mib() -> float:
    """What this process holds in memory, its own and of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024


def read_a_piece(ranks: Ranks, *, checkpoint: str) -> dict[str, float]:
    """As one rank of a new run does with the file of an old one."""
    del ranks
    read_rank_state(Path(checkpoint), 1)  # loads what loading needs
    before = memory_mib()
    state = read_rank_state(Path(checkpoint), 0)
    opened = memory_mib() - before
    piece = state.ema["shards"][0].narrow(0, 100 * MIB // 4, MIB // 4).clone()
    return {"opened": opened, "copied": memory_mib() - before, "first": piece[0].item(), "last": piece[-1].item()}


@pytest.mark.distributed
def test_a_rank_that_needs_a_piece_of_another_ranks_average_does_not_read_the_rest(tmp_path):
    """192 MiB of average, of which one is needed."""
    values = torch.arange(SHARD_MIB * MIB // 4, dtype=torch.float32)
    for rank, shard in enumerate((values, values[:4])):
        fragments = [Fragment("weight", 0, 0, 0, shard.numel())]
        state = RankState({"num_updates": 3, "shards": [shard.clone()]}, fragments, generator_states())
        torch.save(rank_content(state), rank_file(tmp_path, rank))
    (read,) = run_ranks(read_a_piece, 1, tmp_path / "ranks", checkpoint=str(tmp_path))
    assert (read["first"], read["last"]) == (values[100 * MIB // 4].item(), values[101 * MIB // 4 - 1].item())
    assert read["opened"] < 16
    assert read["copied"] < 24
