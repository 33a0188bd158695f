"""Writers of shards that die, hang, share a file or find it damaged: a clear error, and the same folder later."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.faulty_shares import STEP_TIMEOUT_SECONDS, FaultInShare, fail_and_start_again
from support.random_shards import random_clips, random_parts
from support.video_folders import videos_recipe, write_videos

from dreamdance.data.prepare import prepare
from dreamdance.data.writing import shard_folder
from dreamdance.data.writing.shard_writer import ClipRecord, Part, PartSource, ShardFolder, ShardFormat, write_shards
from dreamdance.data.writing.video_clips import VideoPart
from dreamdance.errors import LostWorkerError, ShardError
from dreamdance.recipe.schema import PrepareRecipe
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.file_states import read_state
from dreamdance.runs.folder_lock import OutputError, lock_folder
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.ranks import Ranks

SMALL = ShardFormat(shard_size_mib=1, compression="zstd")


def content(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def write(folder: Path, parts: list[Part], **options) -> None:
    write_shards(folder, parts, **{"settings": {"clips": 12}, "shard_format": SMALL, **options})


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected") / "shards"
    write(folder, random_parts(12))
    return content(folder)


@dataclass(frozen=True)
class Disturbed:
    """Clips in whose middle the process that makes them gets a signal, once; it records its number before."""

    flag: Path
    signal: signal.Signals

    def __call__(self) -> Iterator[ClipRecord]:
        yield from random_clips(range(4, 6))
        if not self.flag.exists():
            self.flag.write_text(str(os.getpid()))
            os.kill(os.getpid(), self.signal)
        yield from random_clips(range(6, 8))


def queue_with_time_out(stall_seconds: float) -> WorkQueue:
    """A queue with a time-out for writers; this process has a longer one, enough on a busy machine too."""
    queue = WorkQueue(Ranks())
    queue.stall_seconds = stall_seconds
    return queue


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "a process that wrote parts of .* died"),
        (signal.SIGSTOP, r"no clip was written for 5 s .*: a process or the storage hangs"),
    ],
)
def test_a_writer_that_dies_or_hangs_is_an_error_and_the_next_start_completes(tmp_path, expected, number, message):
    folder, flag, parts = tmp_path / "shards", tmp_path / "flag", random_parts(12)
    disturbed = [parts[0], Part(parts[1].name, Disturbed(flag, number)), parts[2]]
    start = time.monotonic()
    with pytest.raises(LostWorkerError, match=message) as raised, queue_with_time_out(5.0) as queue:
        write(folder, disturbed, num_workers=2, queue=queue)
    detected = time.monotonic() - start
    assert not Path(f"/proc/{flag.read_text()}").exists()
    assert not (folder / "index.json").exists()
    write(folder, disturbed)
    assert content(folder) == expected
    record_fault(
        f"process of prepare {'killed' if number == signal.SIGKILL else 'hangs'}",
        how=f"{number.name} of one of two in the middle of a part; time-out 5 s",
        promised="an error, no process is left; the next start makes the same folder",
        happened=str(raised.value),
        detected_seconds=detected,
    )


def test_ranks_with_one_process_id_begin_one_folder_together(tmp_path, expected, monkeypatch):
    """As in containers, where every rank is process 7: the second starts while the first records the settings."""
    folder, replace, met = tmp_path / "shards", os.replace, []

    def meet(source: Path, target: Path) -> None:
        if target.name == shard_folder.SETTINGS_FILE and not met:
            met.append(target)
            with WorkQueue(Ranks()) as queue:
                settings = {"settings": {"clips": 12}, "shard_format": SMALL}
                ShardFolder(folder, random_parts(12), **settings, queue=queue).begin()
        replace(source, target)

    monkeypatch.setattr(shard_folder.os, "replace", meet)
    write(folder, random_parts(12))
    assert met
    assert content(folder) == expected


@pytest.mark.parametrize("text", ["", '{"clips": 1', "[]", "[" * 100_000])
@pytest.mark.parametrize("damaged", ["settings.json", "part_00004/index.json"])
def test_notes_damaged_by_a_crash_of_the_machine_are_named_with_what_to_do(tmp_path, text, damaged):
    folder = tmp_path / "shards"
    parts = random_parts(12)
    with pytest.raises(RuntimeError, match="the machine crashed"):
        write(folder, [*parts[:2], Part(parts[2].name, crash)])
    assert (folder / ".parts" / damaged).is_file()
    (folder / ".parts" / damaged).write_text(text)
    with pytest.raises(ShardError, match=rf"{damaged} is damaged.*; delete .*, `prepare` then makes it again"):
        write(folder, random_parts(12))
    assert not (folder / "index.json").exists()


def crash() -> Iterator[ClipRecord]:
    raise RuntimeError("the machine crashed")


def make_recipe(output: Path, *, num_clips: int) -> PrepareRecipe:
    values = {
        "task": "prepare",
        "name": "tiny_prepare",
        "output": str(output),
        "num_workers": 1,
        "clips_per_part": 1,
        "dancers": {
            "num_train_clips": num_clips,
            "num_validation_clips": num_clips,
            "num_frames": 2,
            "width": 16,
            "height": 24,
        },
    }
    return PrepareRecipe.model_validate_json(json.dumps(values))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_share_of_a_stopped_rank_is_written_by_the_other(tmp_path):
    alone, output = tmp_path / "alone", tmp_path / "data"
    prepare(make_recipe(alone, num_clips=4), tmp_path / "alone_run")
    fault = FaultInShare(1, signal.SIGSTOP, 2, tmp_path / "faulty")
    manifest = output / "manifest.jsonl"
    detection = fail_and_start_again(make_recipe(output, num_clips=4), tmp_path, fault, manifest.is_file)
    assert "LostWorkerError: rank 1 has given no sign for" in detection.output
    for split in ("train", "validation"):
        assert content(output / split) == content(alone / split)
    assert manifest.read_bytes() == (alone / "manifest.jsonl").read_bytes()
    record_fault(
        "rank of prepare stopped (SIGSTOP)",
        how=f"at its second part, on 2 ranks; cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}",
        promised="the other writes its parts and ends; the next start finds all done",
        happened="as promised; no part was written twice, and all files equal those of a single rank",
        detected_seconds=detection.seconds,
    )


def test_an_output_that_another_run_prepares_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dreamdance.runs.folder_lock.WAIT_SECONDS", 0.1)
    recipe = make_recipe(tmp_path / "data", num_clips=1)
    with (
        lock_folder(tmp_path / "data", key="output"),
        pytest.raises(OutputError, match=r"another run is writing into .*data now.*another `output`"),
    ):
        prepare(recipe, tmp_path / "run")
    prepare(recipe, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "contact_sheets",
        "examples",
        "manifest.jsonl",
        "train",
        "validation",
    ]


@dataclass(frozen=True)
class LongSearch:
    """Like a long video whose frames are all searched for black bars: its clip takes longer than the time-out."""

    seconds: float
    first: int

    def __call__(self) -> Iterator[ClipRecord | None]:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.02)
            yield None
        yield from random_clips(range(self.first, self.first + 1))


def long_searches(folder: Path, *, seconds: float) -> list[Part]:
    files = [folder / f"{name}.rgb.mp4" for name in "ab"]
    for file in files:
        file.write_bytes(b"a video")
    return [
        Part(file.name[0], LongSearch(seconds, number), PartSource(file.name[0], file.name[0], (file,)))
        for number, file in enumerate(files)
    ]


def test_a_long_search_is_no_hang_in_this_process(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(
        "dreamdance.runtime.watchdog.exit_process", lambda logger, text, *rest, **options: ends.append(rest)
    )
    cluster = Cluster(step_timeout_seconds=1, collective_timeout_seconds=1)
    with WorkQueue(Ranks(), limits=cluster) as queue:
        write(tmp_path / "shards", long_searches(tmp_path, seconds=2.2), queue=queue)
    assert ends == []
    assert (tmp_path / "shards" / "index.json").is_file()


@pytest.mark.slow
def test_a_long_search_is_no_hang_in_workers(tmp_path):
    with queue_with_time_out(5.0) as queue:
        write(tmp_path / "shards", long_searches(tmp_path, seconds=8.0), num_workers=2, queue=queue)
    assert (tmp_path / "shards" / "index.json").is_file()


def test_the_search_for_bars_reports_progress_at_every_frame(tmp_path):
    write_videos(tmp_path, "a", num_frames=20)
    made = list(VideoPart(videos_recipe(tmp_path / "data", tmp_path).videos, "a", "a", "train")())
    assert [one is None for one in made] == [True] * 20 + [False] * 3


def test_hashing_a_large_file_reports_progress(tmp_path):
    (tmp_path / "large").write_bytes(bytes(5 << 20))
    signs = []
    state = read_state(tmp_path / "large", on_block=lambda: signs.append(1))
    assert len(signs) >= 5
    assert state.sha256 == sha256(bytes(5 << 20)).hexdigest()
    assert read_state(tmp_path / "large", state, on_block=lambda: signs.append(1)) is state
