"""`data.verify: hash` on two ranks: shared work, allowed to take longer than a collective, errors named on both."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.fault_log import record_fault
from support.interruptions import output, run_settings, start_and_wait
from support.random_shards import flip_byte, write_random_shards
from support.ranks import StartedRanks, run_ranks
from support.recipes import tiny_stage1_recipe
from torch.distributed import HashStore

from dreamdance.data.shards import verify
from dreamdance.recipe.sections import Shards
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.layout import export_folder
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE
from dreamdance.runtime.process_group import common_store, process_group
from dreamdance.runtime.ranks import Ranks
from dreamdance.runtime.watchdog import Watchdog
from dreamdance.training.shard_check import verify_by_hash

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@dataclass(frozen=True)
class SlowHash:
    """Slow storage: every hash takes so many seconds longer."""

    seconds: float

    def prepare(self, ranks: Ranks) -> None:
        compare = verify.compare_file

        def compare_slowly(*arguments: Any, **options: Any) -> FileStamp:
            if options["by_hash"]:
                time.sleep(self.seconds)
            return compare(*arguments, **options)

        verify.compare_file = compare_slowly


def bytes_read() -> int:
    """The bytes that this process has read, from any file."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def check(
    ranks: Ranks, *, folders: list[str], slow: SlowHash, timeout_seconds: int, slow_rank: int | None = None
) -> dict[str, Any]:
    """Checks a folder on each rank, under a watchdog with the time limit of a collective."""
    if slow_rank in (None, ranks.rank):
        slow.prepare(ranks)
    shards, begun, before = Shards(local=folders[ranks.rank]), time.monotonic(), bytes_read()
    watchdog = Watchdog(least_seconds=1, unmeasured_seconds=timeout_seconds)
    with watchdog, process_group(ranks, timeout_seconds=timeout_seconds):
        watchdog.enter("starting", "a rank")
        seen: list[str] = []

        def note(what: str) -> None:
            watchdog.enter("checking a shard", what)
            seen.append(what)

        verify_by_hash([shards], ranks, common_store(), on_progress=note)
        return {"seconds": time.monotonic() - begun, "bytes": bytes_read() - before, "seen": seen}


def test_two_ranks_of_one_folder_read_each_shard_once(tmp_path):
    folder = tmp_path / "shards"
    write_random_shards(folder, 8, clips_per_part=1)
    total = sum(path.stat().st_size for path in folder.glob("*.mds"))
    arguments = {"folders": [str(folder)] * 2, "slow": SlowHash(0.2), "timeout_seconds": 30}
    results = run_ranks(check, 2, tmp_path / "ranks", **arguments)
    read = [[text for text in result["seen"] if text.startswith("shard ")] for result in results]
    in_folder = f"of 8 in {folder}"
    taken = [{int(text.split()[1]) for text in texts if text.endswith(in_folder)} for texts in read]
    assert taken[0] | taken[1] == set(range(1, 9))
    assert not taken[0] & taken[1]
    assert min(map(len, taken)) >= 2
    assert total < sum(result["bytes"] for result in results) < 1.5 * total + 100_000


def test_a_finished_rank_waits_longer_than_a_collective_may_take_for_one_that_makes_progress(tmp_path):
    """Each rank has its own folder, as on two nodes: one has a single shard to hash, the other eight slow ones."""
    folders = [tmp_path / "eight", tmp_path / "one"]
    for folder, num_shards in zip(folders, (8, 1), strict=True):
        write_random_shards(folder, num_shards, clips_per_part=1)
    timeout = 2
    arguments = {"folders": list(map(str, folders)), "slow": SlowHash(0.7), "timeout_seconds": timeout}
    slow, waiting = run_ranks(check, 2, tmp_path / "ranks", **arguments)
    assert slow["seconds"] > 2 * timeout
    assert abs(waiting["seconds"] - slow["seconds"]) < 2
    assert sum("waiting for the other ranks" in text for text in waiting["seen"]) >= 4


def test_ranks_wait_for_one_that_hangs_at_a_shard_no_longer_than_a_collective_may_take(tmp_path):
    folders = [tmp_path / "waits", tmp_path / "hangs"]
    for folder in folders:
        write_random_shards(folder, 1)
    arguments = {"folders": list(map(str, folders)), "slow": SlowHash(600.0), "slow_rank": 1, "timeout_seconds": 2}
    with StartedRanks(check, 2, tmp_path / "ranks", **arguments) as started:
        assert started.wait() == [TRY_AGAIN_EXIT_CODE] * 2, started.output()
        assert "checking a shard (waiting for the other ranks" in started.output()


def test_one_process_alone_hashes_everything(tmp_path):
    write_random_shards(tmp_path / "shards", 8)
    seen: list[str] = []
    shards = Shards(local=str(tmp_path / "shards"))
    verify_by_hash([shards], Ranks(), HashStore(), on_progress=seen.append)
    assert len([text for text in seen if text.startswith("shard ")]) == 2
    assert len(list((tmp_path / "shards" / ".verified").iterdir())) == 2


def test_a_damaged_shard_is_named_by_all_ranks(tmp_path):
    folder = tmp_path / "shards"
    write_random_shards(folder, 8, clips_per_part=1)
    flip_byte(folder / "part_00005.shard.00000.mds")
    arguments = {"folders": [str(folder)] * 2, "slow": SlowHash(0.1), "timeout_seconds": 30}
    with StartedRanks(check, 2, tmp_path / "ranks", **arguments) as started:
        assert started.wait() == [1, 1]
        texts = [(tmp_path / "ranks" / f"output_{rank}.txt").read_text() for rank in (0, 1)]
    assert all("part_00005.shard.00000.mds is damaged: its sha1 differs from the index" in text for text in texts)


def test_a_training_starts_though_its_verification_takes_longer_than_a_collective_may(shards, tmp_path):
    """Two ranks hash three training shards and one held-out shard; each takes 4.5 s."""
    timeout = 8
    changes = {"data.verify": "hash", "max_steps": 3, "cluster.collective_timeout_seconds": timeout}
    recipe = tiny_stage1_recipe("domains", run_settings(shards, **changes))
    run, begun = tmp_path / "run", time.monotonic()
    assert start_and_wait(recipe, run, SlowHash(4.5)) == [0, 0], output(run)
    seconds = time.monotonic() - begun
    assert export_folder(run, 3).is_dir()
    assert seconds > timeout
    record_fault(
        "verification of all shards takes longer than a collective may",
        how=f"verify: hash, each of 4 shards takes 4.5 s, 2 ranks, collective time-out {timeout} s",
        promised="the training starts, no rank is ended",
        happened=f"trained to its end in {seconds:.0f} s",
    )


def test_a_training_ends_with_the_name_of_a_shard_that_was_damaged_before_it_was_ever_opened(shards, tmp_path):
    """By default each head and frame is checked when it is read, here in a process that reads data."""
    write_random_shards(tmp_path / "shards" / "train", 12, width=16, height=24)
    damaged = tmp_path / "shards" / "train" / "part_00004.shard.00000.mds"
    content = damaged.read_bytes()
    assert content.count(b'"seed": 5') == 1
    damaged.write_bytes(content.replace(b'"seed": 5', b'"seed": 6'))  # the damage shows in no picture
    changes = {"data.num_workers": 1, "data.train.local": str(tmp_path / "shards" / "train")}
    recipe = tiny_stage1_recipe("domains", run_settings(shards, **changes))
    run = tmp_path / "run"
    codes = start_and_wait(recipe, run)
    assert all(codes), codes
    error = f"ShardError: sample 1 of shard {damaged}: the head does not match its checksum"
    assert any(error in output(run, rank) for rank in (0, 1)), output(run)
