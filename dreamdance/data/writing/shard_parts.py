"""Writes the parts of a folder of shards: each under a temporary name, renamed when it is whole, with a note of the
files that it was made from. Parts are made by processes of this rank; what is in them is their makers' matter.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.columns import COLUMNS, SCHEMA_VERSION, pack_frames, pack_keypoints
from dreamdance.data.shards.mds import INDEX_FILE, MDSWriter
from dreamdance.errors import LostWorkerError, ShardError, UserError, is_transient
from dreamdance.modalities import MODALITIES
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.files import replace_atomically
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.warnings_once import held_warnings, warn_once
from dreamdance.runtime.worker_processes import start_worker, worker_context

PARTS_FOLDER = ".parts"
NOTE_FILE = "source.json"
HASHES = ["sha1", "xxh64"]
POLL_SECONDS = 0.2
BEAT_SECONDS = 0.5
LOOK_SECONDS = 5.0

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class ClipRecord:
    """A clip to be stored.

    Attributes:
        clip_id: unique in its set.
        fps: frames per second.
        maps: by modality, in the encodings of `data.shards.columns`: rgb, pose, normal `(f, H, W, 3)` uint8; depth
            `(f, H, W)` uint16; mask `(f, H, W)` uint8, 255 on the body. rgb must be there.
        keypoints: `(f, 128, 3)` float32.
        metadata: what else is known, as JSON.
    """

    clip_id: str
    fps: float
    maps: Mapping[str, NDArray[Any]]
    keypoints: NDArray[np.float32] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_sample(self) -> dict[str, Any]:
        """The clip as the columns of a shard."""
        num_frames, height, width = self.maps["rgb"].shape[:3]
        sample: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "clip_id": self.clip_id,
            "num_frames": num_frames,
            "width": width,
            "height": height,
            "fps": float(self.fps),
            "metadata": json.dumps(self.metadata, sort_keys=True),
            "keypoints": b"" if self.keypoints is None else pack_keypoints(self.keypoints),
        }
        maps = {name: pack_frames(list(self.maps[name])) if name in self.maps else b"" for name in MODALITIES}
        return {**sample, **maps}


@dataclass(frozen=True)
class PartSource:
    """What a part is made of.

    Attributes:
        name: by which the user knows it.
        clip_id: with which its clips' ids begin.
        files: whose content decides the clips, of different names; none if they were removed after a part was skipped.
    """

    name: str
    clip_id: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Part:
    """Clips that one worker writes together: `make` is called there, and must be picklable.

    What it yields as None is no clip, but a sign that it works on one, however long that takes.
    """

    name: str
    make: Callable[[], Iterator[ClipRecord | None]]
    source: PartSource | None = None


@dataclass(frozen=True)
class PartNote:
    """What a part was made from, and the damage for which nothing of it was written."""

    name: str
    clip_id: str
    files: Mapping[str, FileState | None]
    damage: str | None = None

    def hashes(self) -> dict[str, str | None]:
        return {name: None if state is None else state.sha256 for name, state in self.files.items()}

    def to_json(self) -> dict[str, Any]:
        files = {name: None if state is None else state.to_json() for name, state in self.files.items()}
        return {"name": self.name, "clip_id": self.clip_id, "files": files, "damage": self.damage}


def same_files(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> bool:
    """Whether two notes have the same hashes. A missing file counts as None, whether or not a note names it."""
    return all(one.get(name) == other.get(name) for name in {*one, *other})


@dataclass(frozen=True)
class ShardFormat:
    """How the files of a folder are made."""

    shard_size_mib: int = 64
    compression: Literal["none", "zstd"] = "zstd"


def part_folder(folder: Path, part: Part) -> Path:
    return folder / PARTS_FOLDER / part.name


def read_note(folder: Path) -> PartNote | None:
    """The note in a part's folder; None where it has none.

    Raises:
        ShardError: it is damaged.
    """
    path = folder / NOTE_FILE
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        files = {str(name): FileState.from_json(state) for name, state in content["files"].items()}
        return PartNote(content["name"], content["clip_id"], files, content["damage"])
    except (KeyError, AttributeError) as error:
        raise ShardError(f"{path} is damaged; delete {folder}, its clips are made again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a folder of parts.

    Raises:
        ShardError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged ({error}); delete {path.parent}, what it holds is made again") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path} is damaged: no JSON object; delete {path.parent}, what it holds is made again")
    return content


def check_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ShardError where a folder was made with other settings; names them."""
    differing = [
        f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ShardError(
            f"{folder} was made with other settings: {'; '.join(differing)}. Give another `output`, or delete it"
        )


def write_part(
    folder: Path,
    part: Part,
    shard_format: ShardFormat,
    *,
    on_error: OnError = "stop",
    on_clip: Callable[[], None] = lambda: None,
    on_sign: Callable[[], None] = lambda: None,
) -> str | None:
    """Writes one part under a temporary name and renames it.

    Args:
        folder: of the shards.
        part: what to write.
        shard_format: size and compression.
        on_error: what becomes of a part whose source is damaged: with `stop` nothing is left of it, with `skip` a part
            without clips that notes the damage.
        on_clip: called after each clip, for the watchdog.
        on_sign: called now and then while files are read and no clip comes.

    Returns:
        The damage, or None.
    """
    target = part_folder(folder, part)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(target) as temporary:
        temporary.mkdir()
        damage = _write_part(temporary, part, shard_format, on_clip, _beat(temporary, on_sign))
        # The worker of a killed run that had this part in hand may have written it meanwhile.
        if target.exists() or (damage is not None and on_error == "stop"):
            shutil.rmtree(temporary)
    return damage


def _write_part(
    folder: Path, part: Part, shard_format: ShardFormat, on_clip: Callable[[], None], beat: Callable[[], None]
) -> str | None:
    """Writes a part's clips and its note; of a damaged source only the note. Returns the damage."""
    files = () if part.source is None else part.source.files
    states = {path.name: read_state(path, on_block=beat) for path in files}
    damage = _write_clips(folder, part, shard_format, on_clip, beat)
    if damage is None:
        now = {path.name: read_state(path, states[path.name], on_block=beat) for path in files}
        changed = [name for name, state in now.items() if state != states[name]]
        damage = f"{', '.join(changed)} changed while it was read" if changed else None
    if damage is not None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / INDEX_FILE).write_text(json.dumps({"version": 2, "shards": []}), encoding="utf-8")
    if part.source is not None:
        note = PartNote(part.source.name, part.source.clip_id, states, damage)
        (folder / NOTE_FILE).write_text(json.dumps(note.to_json(), indent=1), encoding="utf-8")
    return damage


def _beat(incoming: Path, on_sign: Callable[[], None]) -> Callable[[], None]:
    """What may be called as often as one likes, to show here and to other processes that a part is in hand."""
    last = -math.inf

    def beat() -> None:
        nonlocal last
        if (now := time.monotonic()) - last > BEAT_SECONDS:
            last = now
            os.utime(incoming)
            on_sign()

    return beat


def _write_clips(
    incoming: Path, part: Part, shard_format: ShardFormat, on_clip: Callable[[], None], beat: Callable[[], None]
) -> str | None:
    """Writes a part's clips; returns what is wrong with its source, if anything."""
    writer = MDSWriter(
        columns=COLUMNS,
        out=str(incoming),
        compression=None if shard_format.compression == "none" else shard_format.compression,
        hashes=HASHES,
        size_limit=shard_format.shard_size_mib << 20,
    )
    damage = None
    try:
        for record in part.make():
            if record is None:
                beat()
                continue
            writer.write(record.to_sample())
            os.utime(incoming)  # for who watches from another process
            on_clip()
    except UserError as error:
        if part.source is None or is_transient(error):
            raise
        damage = str(error)
    writer.finish()
    return damage


def write_parts(
    folder: Path,
    next_part: Callable[[], Part | None],
    shard_format: ShardFormat,
    *,
    num_workers: int,
    on_error: OnError,
    queue: WorkQueue,
) -> Iterator[tuple[Part, str | None]]:
    """Writes parts until there is none to begin; what is in hand then is finished.

    Args:
        folder: of the shards.
        next_part: claims a part for this process; None if there is none to claim now.
        shard_format: size and compression.
        num_workers: processes; 1 writes in this one.
        on_error: what becomes of a part whose source is damaged.
        queue: its watchdog, and how long a process may take.

    Yields:
        each part when it is through, and its damage.

    Raises:
        LostWorkerError: a worker died or hangs.
    """
    if num_workers > 1:
        yield from _write_in_processes(folder, next_part, shard_format, num_workers, on_error, queue)
        return
    while (part := next_part()) is not None:
        on_clip = partial(queue.watchdog.enter, "making a clip", f"of {part.name}", is_measured=True)
        # Not "making a clip": that is measured, and what precedes the first one of a video may take any time.
        on_sign = partial(queue.watchdog.enter, "reading files up to their first clip", part.name)
        if part.source is None:
            on_clip()
        else:
            on_sign()
        yield part, write_part(folder, part, shard_format, on_error=on_error, on_clip=on_clip, on_sign=on_sign)


def _write_in_processes(
    folder: Path,
    next_part: Callable[[], Part | None],
    shard_format: ShardFormat,
    num_workers: int,
    on_error: OnError,
    queue: WorkQueue,
) -> Iterator[tuple[Part, str | None]]:
    context = worker_context(__name__)
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker) as pool:
        in_hand: dict[Future[tuple[str | None, list[str]]], Part] = {}
        sign, since = 0, time.monotonic()
        looked, between_looks = since, min(LOOK_SECONDS, queue.stall_seconds / 4)
        try:
            while True:
                while len(in_hand) < num_workers and (part := next_part()) is not None:
                    in_hand[pool.submit(_write_for_another, folder, part, shard_format, on_error)] = part
                if not in_hand:
                    return
                queue.watchdog.enter("waiting for its own processes", f"{len(in_hand)} parts are in hand")
                done, _ = wait(in_hand, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                now = time.monotonic()
                if done:
                    since = now
                elif now - looked > between_looks:
                    looked, newest = now, max(_signs_of_life(folder, in_hand.values()), default=0)
                    if newest != sign:
                        sign, since = newest, now
                    elif now - since > queue.stall_seconds:
                        raise LostWorkerError(
                            f"{len(in_hand)} parts of {folder} are in hand and not one clip was made for "
                            f"{queue.stall_seconds:.0f} s (`cluster.collective_timeout_seconds`): a process or the "
                            "storage hangs, or a clip is too large"
                        )
                for future in done:
                    damage, warnings = future.result()
                    for text in warnings:
                        warn_once(text)
                    yield in_hand.pop(future), damage
        except (LostWorkerError, GeneratorExit):
            for process in pool._processes.values():  # else the pool would wait for what they have in hand
                process.kill()
            raise
        except BrokenProcessPool as error:
            raise LostWorkerError(
                f"a process that wrote parts of {folder} died; out of memory? See `num_workers`"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_for_another(
    folder: Path, part: Part, shard_format: ShardFormat, on_error: OnError
) -> tuple[str | None, list[str]]:
    """What a worker does: returns the damage, and the warnings, which the parent logs: it may have done so before."""
    with held_warnings() as warnings:
        return write_part(folder, part, shard_format, on_error=on_error), warnings


def _signs_of_life(folder: Path, parts: Iterable[Part]) -> Iterator[int]:
    """When each part in hand last got a clip, or a sign that one is made; nanoseconds since 1970."""
    own = {part.name for part in parts}
    for entry in os.scandir(folder / PARTS_FOLDER):
        if entry.name.startswith(".") and entry.name.split(".")[1] in own:
            with contextlib.suppress(FileNotFoundError):  # it just got its final name
                yield entry.stat().st_mtime_ns
