"""Writing shards: the same folder for any number of workers, ranks, and kills."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
from support.random_shards import random_clip, random_clips, random_parts, stored_clip, write_random_shards
from support.ranks import run_ranks

from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.verify import verify_shards
from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards
from dreamdance.errors import ShardError
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.sections import Shards
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.ranks import Ranks

SMALL = ShardFormat(shard_size_mib=1, compression="zstd")


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(folder: Path, parts: list[Part], **options) -> None:
    write_shards(folder, parts, **{"settings": {"clips": 12}, "shard_format": SMALL, **options})


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected") / "shards"
    write(folder, random_parts(12))
    return content(folder)


def test_a_finished_folder_holds_shards_with_plain_names_and_an_index_and_nothing_else(expected):
    assert set(expected) == {"index.json", *(f"part_0000{first}.shard.00000.mds.zstd" for first in (0, 4, 8))}


def test_workers_change_nothing(tmp_path, expected):
    write(tmp_path / "shards", random_parts(12), num_workers=3)
    assert content(tmp_path / "shards") == expected


@pytest.mark.distributed
def test_ranks_divide_the_parts_and_change_nothing(tmp_path, expected):
    folder = tmp_path / "shards"
    counted = run_ranks(share, 3, tmp_path / "ranks", shards=str(folder))
    assert content(folder) == expected
    assert counted == [[3, 3]] * 3, "the parts of all ranks"


def share(ranks: Ranks, *, shards: str) -> list[int]:
    counted: list[tuple[int, int]] = []
    with WorkQueue(ranks, run_folder=Path(shards).parent / "run") as queue:
        write(Path(shards), random_parts(12), queue=queue, on_part=lambda *counts: counted.append(counts))
    return list(counted[-1])


def crash() -> Iterator[ClipRecord]:
    raise RuntimeError("the machine crashed")


def crash_at_the_last_part(folder: Path) -> None:
    parts = random_parts(12)
    with pytest.raises(RuntimeError, match="the machine crashed"):
        write(folder, [*parts[:2], Part(parts[2].name, crash)])


@dataclass(frozen=True)
class FailOnce:
    """Clips that end in an error until a file exists."""

    flag: Path

    def __call__(self) -> Iterator[ClipRecord]:
        yield from random_clips(range(4, 6))
        if not self.flag.exists():
            self.flag.touch()
            raise RuntimeError("the disk went away")
        yield from random_clips(range(6, 8))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_failed_part_is_written_again_and_finished_ones_are_not(tmp_path, expected, num_workers):
    folder, parts = tmp_path / "shards", random_parts(12)
    failing = [parts[0], Part(parts[1].name, FailOnce(tmp_path / "flag")), parts[2]]
    with pytest.raises(RuntimeError, match="the disk went away"):
        write(folder, failing, num_workers=num_workers)
    assert not (folder / "index.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob(".parts/part_*")}
    write(folder, failing, num_workers=num_workers)
    assert content(folder) == expected
    assert finished


KILLED = """
import sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.random_shards import random_clip, random_parts
from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards

def slowly(make):
    for clip in make():
        time.sleep(0.3)
        yield clip

if __name__ == "__main__":
    parts = [Part(part.name, partial(slowly, part.make)) for part in random_parts(12)]
    write_shards(Path(sys.argv[1]), parts, settings={"clips": 12}, shard_format=ShardFormat(1, "zstd"),
                 num_workers=int(sys.argv[3]), on_part=lambda done, total: print(done, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_writer_killed_and_started_again_makes_the_same_folder(tmp_path, expected, num_workers):
    folder, script = tmp_path / "shards", tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(folder), str(Path(__file__).parents[1]), str(num_workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as writer:
        for line in writer.stdout:
            if int(line) >= 1:
                break
        time.sleep(0.4)  # into the next part
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert not (folder / "index.json").exists()
    deadline = time.monotonic() + 10
    while _session_members(writer.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _session_members(writer.pid)  # its workers end with it
    written = list(folder.glob(".parts/part_*"))
    assert 0 < len(written) < 3
    write(folder, random_parts(12))
    assert content(folder) == expected


def _session_members(session: int) -> list[int]:
    """The processes that still run in a session."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry.name))
    return members


def test_a_folder_whose_completion_was_killed_is_completed_later(tmp_path, expected, monkeypatch):
    folder = tmp_path / "shards"

    def die(source: Path, target: Path) -> None:
        if Path(target).name == "index.json":
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("dreamdance.runs.files.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            write(folder, random_parts(12))
    assert not (folder / "index.json").exists()
    write(folder, random_parts(12))
    assert content(folder) == expected


def test_a_complete_folder_is_left_unchanged_with_a_line_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_random_shards(tmp_path / "shards", 8)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    write_random_shards(tmp_path / "shards", 8)
    assert "is already complete" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before


@pytest.mark.parametrize("finish", [False, True])
def test_other_settings_are_refused_by_name(tmp_path, finish):
    folder = tmp_path / "shards"
    if finish:
        write(folder, random_parts(12))
    else:
        crash_at_the_last_part(folder)
    with pytest.raises(ShardError, match=r"clips was 12, is 13; compression was 'zstd', is 'none'.*`output`"):
        write(folder, random_parts(13), settings={"clips": 13}, shard_format=ShardFormat(1, "none"))


def test_progress_counts_the_parts_of_all_starts(tmp_path):
    seen: list[tuple[int, int]] = []
    crash_at_the_last_part(tmp_path / "shards")
    write(tmp_path / "shards", random_parts(12), on_part=lambda *counts: seen.append(counts))
    assert seen[0] == (2, 3)
    assert seen[-1] == (3, 3)


def test_large_parts_are_cut_into_shards_of_the_requested_size(tmp_path):
    big = partial(random_clips, range(6), width=64, height=96, num_frames=16)
    write(tmp_path / "shards", [Part("part_00000", big)], shard_format=ShardFormat(1, "none"))
    index = read_index(tmp_path / "shards" / "index.json")
    assert len(index.shards) == 6
    assert index.num_samples == 6
    verify_shards(index, how="hash")
    assert [clip["clip_id"] for clip in StoredClips(Shards(local=str(tmp_path / "shards")))] == [
        f"clip_{number:04d}" for number in range(6)
    ]


def test_parts_without_clips_are_fine_as_long_as_one_has_some(tmp_path):
    parts = [Part("part_00000", partial(random_clips, range(0))), Part("part_00001", partial(random_clips, range(3)))]
    write(tmp_path / "shards", parts)
    assert read_index(tmp_path / "shards" / "index.json").num_samples == 3
    with pytest.raises(ShardError, match="no clips to write"):
        write(tmp_path / "empty", parts[:1])


def test_both_hashes_are_in_the_index(tmp_path):
    write_random_shards(tmp_path / "shards", 4)
    shard = json.loads((tmp_path / "shards" / "index.json").read_text())["shards"][0]
    assert set(shard["raw_data"]["hashes"]) == {"sha1", "xxh64"}


def test_maps_that_a_clip_lacks_are_not_stored():
    clip = stored_clip(ClipRecord(clip_id="bare", fps=8.0, maps={"rgb": random_clip(0).maps["rgb"]}))
    assert [name for name in MODALITIES if clip.has(name)] == ["rgb"]
    assert clip.keypoints is None
