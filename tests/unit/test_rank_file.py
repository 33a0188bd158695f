"""The file of a rank in a checkpoint: the safetensors format, read by pieces on any number of ranks."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from support.ranks import run_ranks

from dreamdance.errors import CheckpointError
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.checkpointing.rank_file import (
    Piece,
    RankFile,
    generator_states,
    rank_path,
    read_pieces,
    read_rank_file,
)

MIB = 1 << 20
SHARD_MIB = 192


def write(folder: Path, rank: int, pieces: dict[str, Piece], *, average_updates: int = 0) -> Path:
    path = rank_path(folder, rank)
    with path.open("wb") as file:
        RankFile.of(pieces, average_updates=average_updates, generators=generator_states()).write(file)
    return path


def divided(values: torch.Tensor, num_ranks: int) -> Iterator[Piece]:
    """The pieces of each rank, divided evenly over that many ranks; the last one has fewer elements."""
    bounds = [*range(0, len(values), -(-len(values) // num_ranks)), len(values)]
    for first, last in pairwise(bounds):
        yield Piece(first, {"master": values[first:last], "average": -values[first:last]}, 3.0)


def test_a_file_equals_one_written_by_safetensors_and_is_read_by_it(tmp_path):
    pieces = {
        "a": Piece(4, {"master": torch.arange(6.0).reshape(2, 3).t()}, 2.0),
        "b": Piece(0, {"master": torch.ones(1)}),
    }
    path = write(tmp_path, 0, pieces, average_updates=7)
    stored = load_file(path)
    assert {name: value.tolist() for name, value in stored.items()} == {
        "master/a": [0.0, 3.0, 1.0, 4.0, 2.0, 5.0],
        "master/b": [1.0],
    }
    assert path.stat().st_size % 4 == 0
    assert path.read_bytes().endswith(save(stored)[-28:]), "the tensors are contiguous, in their order"
    content = read_rank_file(tmp_path, 0)
    assert (content.pieces, content.average_updates) == ({"a": (4, 2.0), "b": (0, 0.0)}, 7)


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(writers, readers, tmp_path):
    values = torch.arange(1.0, 24.0)
    for rank, piece in enumerate(divided(values, writers)):
        write(tmp_path, rank, {"weight": piece})
    for expected in divided(values, readers):
        kinds = {kind: torch.zeros_like(value) for kind, value in expected.values.items()}
        assert read_pieces(tmp_path, writers, {"weight": Piece(expected.start, kinds)}) == {"weight": 3.0}
        assert all(torch.equal(kinds[kind], value) for kind, value in expected.values.items())


def test_a_parameter_that_lies_channels_last_is_read_into_its_own_order(tmp_path):
    values = torch.randn(4, 3, 2, 2)
    for rank, piece in enumerate(divided(values.flatten(), 2)):
        write(tmp_path, rank, {"weight": piece})
    target = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    read_pieces(tmp_path, 2, {"weight": Piece(0, {"master": target})})
    assert torch.equal(target, values)
    assert not target.is_contiguous()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_elements_missing_in_all_files_are_an_error_that_names_the_parameter(lost, tmp_path):
    for rank, piece in enumerate(divided(torch.arange(12.0), 3)):
        write(tmp_path, rank, {} if rank == lost else {"weight": piece})
    missing = r"holds 8 of 12 elements of weight" if lost == 2 else r"master/weight starts at element \d, not at [04]"
    with pytest.raises(CheckpointError, match=missing):
        read_pieces(tmp_path, 3, {"weight": Piece(0, {"master": torch.zeros(12)})})


def memory_mib() -> float:
    """The resident memory of this process, its own and that of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024


def read_a_piece(ranks: Ranks, *, checkpoint: str) -> dict[str, float]:
    """Reads the files of an old run like one rank of a new run."""
    del ranks
    folder, target = Path(checkpoint), torch.zeros(MIB // 4)
    read_pieces(folder, 1, {"other": Piece(0, {"average": torch.zeros(4)})})  # imports the modules that loading needs
    before = memory_mib()
    read_pieces(folder, 1, {"weight": Piece(100 * MIB // 4, {"average": target})})
    return {"copied": memory_mib() - before, "first": target[0].item(), "last": target[-1].item()}


@pytest.mark.distributed
def test_a_rank_that_needs_a_piece_of_another_ranks_average_does_not_read_the_rest(tmp_path):
    """192 MiB of average, of which one is needed."""
    values = torch.arange(SHARD_MIB * MIB // 4, dtype=torch.float32)
    other = Piece(0, {"average": torch.zeros(4)})
    write(tmp_path, 0, {"weight": Piece(0, {"average": values}), "other": other})
    (read,) = run_ranks(read_a_piece, 1, tmp_path / "ranks", checkpoint=str(tmp_path))
    assert (read["first"], read["last"]) == (values[100 * MIB // 4].item(), values[101 * MIB // 4 - 1].item())
    assert read["copied"] < 24
