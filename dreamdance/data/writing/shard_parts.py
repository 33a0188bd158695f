"""Writes the parts of a folder of shards, in worker processes of this rank.

A part gets its final name when it is complete. Its note records the files that it was made from. This module does not
know how the clips of a part are made.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dreamdance.annotators.axes import AxesError
from dreamdance.annotators.heartbeats import heartbeats_to
from dreamdance.data.shards.frame_codecs import Codec
from dreamdance.data.shards.mds import INDEX_FILE, MDSWriter
from dreamdance.data.shards.tracks import TRACK_COLUMNS
from dreamdance.data.writing.clip_record import RGB_QUALITY, ClipRecord, NoClips
from dreamdance.data.writing.part_notes import NOTE_FILE, PartNote
from dreamdance.errors import LostWorkerError, MissingInputError, UserError, is_transient
from dreamdance.runs.file_states import read_state
from dreamdance.runs.files import replace_atomically
from dreamdance.runs.finished_clips import PARTS_FOLDER
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.warnings_once import collect_warnings, warn_once
from dreamdance.runtime.worker_processes import start_worker, worker_context

HASHES = ["sha1", "xxh64"]
POLL_SECONDS = 1.0
HEARTBEAT_SECONDS = 0.5  # shortest time between two heartbeats of a part
HEARTBEAT_CHECK_SECONDS = 5.0

OnError = Literal["stop", "skip"]
# These errors are about the recipe's annotators, not about one video.
NOT_DAMAGE = (MissingInputError, AxesError)


@dataclass(frozen=True)
class PartSource:
    """The source of a part.

    Attributes:
        name: the name that the user knows.
        clip_id: the beginning of the ids of its clips.
        files: the files that the clips are made from, with different names; empty if the files of a skipped part were
            removed.
    """

    name: str
    clip_id: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Part:
    """Clips that one worker writes together. The worker calls `make`, which must be picklable.

    `make` yields clips, or the columns of a sample, and None as a heartbeat while it works on one. If a sound source
    has no clips, it yields the reason instead.
    """

    name: str
    make: Callable[[], Iterator[ClipRecord | NoClips | dict[str, Any] | None]]
    source: PartSource | None = None


# A part to write, and the folder of shards that it belongs to.
Target = tuple[Path, Part]


@dataclass(frozen=True)
class ShardFormat:
    """Size and compression of the files of a folder, and the form of the frames in them.

    Attributes:
        shard_size_mib: largest size of a file before compression.
        compression: of whole files. PNG, JPEG and WebP do not compress further.
        rgb_format, rgb_quality, smaller_sizes: see `ClipRecord.to_sample`.
    """

    shard_size_mib: int = 64
    compression: Literal["none", "zstd"] = "none"
    rgb_format: Codec = "png"
    rgb_quality: int = RGB_QUALITY
    smaller_sizes: tuple[tuple[int, int], ...] = ()

    def settings(self) -> dict[str, Any]:
        """What decides the content of the frames, without what has always been so (JSON-able)."""
        settings: dict[str, Any] = {"compression": self.compression}
        if self.rgb_format != "png":
            settings |= {"rgb_format": self.rgb_format, "rgb_quality": self.rgb_quality}
        if self.smaller_sizes:
            settings["smaller_sizes"] = [list(size) for size in self.smaller_sizes]
        return settings

    def to_sample(self, record: ClipRecord) -> dict[str, Any]:
        """A clip as the columns of a shard."""
        return record.to_sample(
            rgb_format=self.rgb_format, rgb_quality=self.rgb_quality, smaller_sizes=self.smaller_sizes
        )


def part_folder(folder: Path, part: Part) -> Path:
    return folder / PARTS_FOLDER / part.name


def write_part(
    folder: Path,
    part: Part,
    shard_format: ShardFormat,
    *,
    on_error: OnError = "stop",
    on_clip: Callable[[], None] = lambda: None,
    on_heartbeat: Callable[[], None] = lambda: None,
) -> str | None:
    """Writes one part under a temporary name and renames it.

    Args:
        folder: the folder of the shards.
        part: the part to write.
        shard_format: size and compression.
        on_error: the result for a damaged source: with `stop` nothing is written, with `skip` a part without clips
            whose note records the damage.
        on_clip: called after each clip, for the watchdog.
        on_heartbeat: called every `HEARTBEAT_SECONDS` or less often while files are read and no clip is ready.

    Returns:
        The damage, or None.
    """
    target = part_folder(folder, part)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(target) as temporary:
        temporary.mkdir()
        damage = _write_part(temporary, part, shard_format, on_clip, _heartbeat(temporary, on_heartbeat))
        # A worker of a killed run may have finished the same part in the meantime.
        if target.exists() or (damage is not None and on_error == "stop"):
            shutil.rmtree(temporary)
    return damage


def _write_part(
    folder: Path, part: Part, shard_format: ShardFormat, on_clip: Callable[[], None], beat: Callable[[], None]
) -> str | None:
    """Writes a part's clips and its note, or only the note if the source is damaged. Returns the damage."""
    files = () if part.source is None else part.source.files
    states = {path.name: read_state(path, on_block=beat) for path in files}
    damage, no_clips = _write_clips(folder, part, shard_format, on_clip, beat)
    if damage is None:
        now = {path.name: read_state(path, states[path.name], on_block=beat) for path in files}
        changed = [name for name, state in now.items() if state != states[name]]
        damage = f"{', '.join(changed)} changed while it was read" if changed else None
    if damage is not None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / INDEX_FILE).write_text(json.dumps({"version": 2, "shards": []}), encoding="utf-8")
    if part.source is not None:
        note = PartNote(part.source.name, part.source.clip_id, states, damage, no_clips)
        (folder / NOTE_FILE).write_text(json.dumps(note.to_json(), indent=1), encoding="utf-8")
    return damage


def _heartbeat(incoming: Path, on_heartbeat: Callable[[], None]) -> Callable[[], None]:
    """A function that shows this and other processes that a part is being written; it may be called at any rate."""
    last = -math.inf

    def beat() -> None:
        nonlocal last
        if (now := time.monotonic()) - last > HEARTBEAT_SECONDS:
            last = now
            os.utime(incoming)
            on_heartbeat()

    return beat


def _write_clips(
    incoming: Path, part: Part, shard_format: ShardFormat, on_clip: Callable[[], None], beat: Callable[[], None]
) -> tuple[str | None, str | None]:
    """Writes a part's clips; returns the damage of its source, and the reason why a sound source has no clips."""
    writer = MDSWriter(
        columns=TRACK_COLUMNS,
        out=str(incoming),
        compression=None if shard_format.compression == "none" else shard_format.compression,
        hashes=HASHES,
        size_limit=shard_format.shard_size_mib << 20,
    )
    damage = no_clips = None
    try:
        with heartbeats_to(beat):
            for record in part.make():
                if record is None:
                    beat()
                    continue
                if isinstance(record, NoClips):
                    no_clips = record.reason
                    continue
                writer.write(record if isinstance(record, dict) else shard_format.to_sample(record))
                os.utime(incoming)  # the heartbeat that the parent process watches
                on_clip()
    except UserError as error:
        if part.source is None or is_transient(error) or isinstance(error, NOT_DAMAGE):
            raise
        damage = str(error)
    writer.finish()
    return damage, no_clips


def write_parts(
    parts: Iterator[Target | None],
    shard_format: ShardFormat,
    *,
    num_workers: int,
    on_error: OnError,
    queue: WorkQueue,
) -> Iterator[tuple[Target, str | None]]:
    """Writes parts until the iterator ends, which it does only when the yielded parts are finished.

    Args:
        parts: claims parts for this process, and yields None if there is none to claim now.
        shard_format: size and compression.
        num_workers: number of processes; with 1 this process writes.
        on_error: the result for a damaged source, see `write_part`.
        queue: the work queue; gives the watchdog and the time limit.

    Yields:
        Each finished part and its damage.

    Raises:
        LostWorkerError: a worker died or hangs.
    """
    if num_workers > 1:
        yield from _write_in_processes(parts, shard_format, num_workers, on_error, queue)
        return
    for target in parts:
        if target is None:
            continue
        folder, part = target
        on_clip = partial(queue.watchdog.enter, "making a clip", f"of {part.name}", is_measured=True)
        # Not "making a clip": the watchdog measures that, and the work before a video's first clip may take any time.
        on_heartbeat = partial(queue.watchdog.enter, "reading files up to their first clip", part.name)
        if part.source is None:
            on_clip()
        else:
            on_heartbeat()
        damage = write_part(folder, part, shard_format, on_error=on_error, on_clip=on_clip, on_heartbeat=on_heartbeat)
        yield target, damage


def _write_in_processes(
    parts: Iterator[Target | None], shard_format: ShardFormat, num_workers: int, on_error: OnError, queue: WorkQueue
) -> Iterator[tuple[Target, str | None]]:
    context = worker_context(__name__)
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker) as pool:
        in_progress: dict[Future[tuple[str | None, list[str]]], Target] = {}
        heartbeat, since = 0, time.monotonic()
        checked, check_seconds = since, min(HEARTBEAT_CHECK_SECONDS, queue.stall_seconds / 4)
        try:
            for target in parts:
                if target is not None:
                    since = since if in_progress else time.monotonic()
                    in_progress[pool.submit(_write_in_worker, *target, shard_format, on_error)] = target
                    if len(in_progress) < num_workers:
                        continue
                done = set[Future[tuple[str | None, list[str]]]]()
                while in_progress and not done:
                    queue.watchdog.enter("waiting for its own processes", f"which write {len(in_progress)} parts")
                    done, _ = wait(in_progress, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                    now = time.monotonic()
                    if done:
                        since = now
                    elif now - checked > check_seconds:
                        checked, newest = now, max(_last_heartbeats(in_progress.values()), default=0)
                        if newest != heartbeat:
                            heartbeat, since = newest, now
                        elif now - since > queue.stall_seconds:
                            raise LostWorkerError(
                                f"no clip was written for {queue.stall_seconds:.0f} s of {len(in_progress)} parts of "
                                f"{_folders(in_progress.values())} (`cluster.collective_timeout_seconds`): a process "
                                "or the storage hangs, or a clip is too large"
                            )
                    if target is None:
                        break  # another rank may have left items
                for future in done:
                    damage, warnings = future.result()
                    for text in warnings:
                        warn_once(text)
                    yield in_progress.pop(future), damage
        except (LostWorkerError, GeneratorExit):
            for process in pool._processes.values():  # else the pool would wait for their parts
                process.kill()
            raise
        except BrokenProcessPool as error:
            raise LostWorkerError(
                f"a process that wrote parts of {_folders(in_progress.values())} died, perhaps out of memory; lower "
                "`num_workers`"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_in_worker(
    folder: Path, part: Part, shard_format: ShardFormat, on_error: OnError
) -> tuple[str | None, list[str]]:
    """Runs in a worker: returns the damage and the warnings; the parent logs each different warning once."""
    with collect_warnings() as warnings:
        return write_part(folder, part, shard_format, on_error=on_error), warnings


def _folders(targets: Iterable[Target]) -> str:
    return " and ".join(sorted({str(folder) for folder, _ in targets}))


def _last_heartbeats(targets: Iterable[Target]) -> Iterator[int]:
    """The time of the last clip or heartbeat of each part in progress, in nanoseconds since 1970."""
    own = {(folder, part.name) for folder, part in targets}
    for folder in {folder for folder, _ in own}:
        for entry in os.scandir(folder / PARTS_FOLDER):
            if entry.name.startswith(".") and (folder, entry.name.split(".")[1]) in own:
                with contextlib.suppress(FileNotFoundError):  # the part just got its final name
                    yield entry.stat().st_mtime_ns
