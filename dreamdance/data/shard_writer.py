"""Writes a folder of shards in parallel parts: killed at any time and started again, it ends in the same folder.

Each part is written under a temporary name and renamed; what is there is not written again. When all parts are there,
their shards get their final names and the index is written last, so that a folder with an index is complete.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dreamdance.crew import Crew
from dreamdance.data.schema import COLUMNS, SCHEMA_VERSION, pack_frames, pack_keypoints
from dreamdance.data.shard_index import DETAILS_KEY, read_index
from dreamdance.data.streaming_compat import INDEX_FILE, MDSWriter
from dreamdance.data.worker_processes import start_worker, worker_context
from dreamdance.errors import LostWorkerError, ShardError
from dreamdance.ranks import Ranks

logger = logging.getLogger(__name__)

PARTS_FOLDER = ".parts"
SETTINGS_FILE = "settings.json"
HASHES = ["sha1", "xxh64"]
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ClipRecord:
    """A clip to be stored.

    rgb, pose, normal: `(f, H, W, 3)` uint8; depth `(f, H, W)` uint16; mask `(f, H, W)` uint8, 255 on the body;
    keypoints `(f, 128, 3)` float32. Encodings are those of `data.schema`.
    """

    clip_id: str
    fps: float
    rgb: np.ndarray
    pose: np.ndarray | None = None
    normal: np.ndarray | None = None
    depth: np.ndarray | None = None
    mask: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_sample(self) -> dict[str, Any]:
        """The clip as the columns of a shard."""
        num_frames, height, width = self.rgb.shape[:3]
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
        for name in ("rgb", "pose", "normal", "depth", "mask"):
            frames = getattr(self, name)
            sample[name] = b"" if frames is None else pack_frames(frames)
        return sample


@dataclass(frozen=True)
class Part:
    """Clips that one worker writes together: `make` is called there, and must be picklable."""

    name: str
    make: Callable[[], Iterator[ClipRecord]]


@dataclass(frozen=True)
class ShardFormat:
    """How the files of a folder are made."""

    shard_size_mib: int = 64
    compression: Literal["none", "zstd"] = "zstd"


def write_shards(
    folder: Path,
    parts: Sequence[Part],
    *,
    settings: Mapping[str, Any],
    shard_format: ShardFormat,
    num_workers: int = 1,
    ranks: Ranks | None = None,
    crew: Crew | None = None,
    on_part: Callable[[int, int], None] | None = None,
) -> None:
    """Writes all parts into `folder`; ranks divide them, and the first rank completes the folder when all are there.

    Args:
        folder: an existing one is continued, or left as it is if complete.
        parts: the same list on every rank, with different names.
        settings: all that decides the content (JSON-able); a folder of other settings is refused.
        shard_format: size and compression of the files.
        num_workers: processes on this rank; 1 writes in this one.
        ranks: this process; by default the crew's, or from the environment.
        crew: the ranks that share the work; without one, the first rank does not wait for parts of others.
        on_part: called on the first rank with the number of finished parts, of all ranks, and of all parts.

    Raises:
        ShardError: the folder was begun with other settings (naming them), or there is nothing to write.
        LostWorkerError: a worker died or hangs, or another rank is lost.
    """
    crew = crew or Crew(ranks or Ranks.from_environment())
    ranks = crew.ranks
    settings = json.loads(json.dumps({**settings, "compression": shard_format.compression, "hashes": HASHES}))
    if (folder / INDEX_FILE).exists():
        _check_settings(folder, read_index(folder / INDEX_FILE).details.get("settings", {}), settings)
        logger.info("%s is complete already, with the same settings: nothing to write", folder)
        if ranks.is_main:
            shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)
        return
    _begin(folder, settings, ranks)
    own = [part for part in parts[ranks.rank :: ranks.world_size] if not _part_folder(folder, part).exists()]

    def report() -> int:
        done = sum(_part_folder(folder, part).exists() for part in parts)
        if on_part is not None and ranks.is_main:
            on_part(done, len(parts))
        return done

    report()
    for part in _write_parts(folder, own, shard_format, num_workers, crew):
        crew.finish(f"{folder.name}/{part.name}")
        report()
    if ranks.is_main:
        while missing := len(parts) - report():
            crew.pause(f"{missing} parts of {folder} are still missing")
        crew.watchdog.enter("completing a folder of shards", str(folder))
        _complete(folder, parts, settings)


def _begin(folder: Path, settings: Mapping[str, Any], ranks: Ranks) -> None:
    """Notes the settings at the first start; at a later one compares them."""
    noted = folder / PARTS_FOLDER / SETTINGS_FILE
    if noted.exists():
        _check_settings(folder, _read_object(noted), settings)
        return
    noted.parent.mkdir(parents=True, exist_ok=True)
    # Ranks in containers of their own may all have the same process id.
    incoming = noted.with_name(f".{SETTINGS_FILE}.{ranks.rank}.{os.getpid()}")
    incoming.write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(incoming, noted)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged ({error}); delete {path.parent}, what it holds is made anew") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path} is damaged: no JSON object; delete {path.parent}, what it holds is made anew")
    return content


def _check_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [
        f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ShardError(
            f"{folder} was made with other settings: {'; '.join(differing)}. Give another `output`, or delete it"
        )


def _part_folder(folder: Path, part: Part) -> Path:
    return folder / PARTS_FOLDER / part.name


def _write_parts(
    folder: Path, parts: Sequence[Part], shard_format: ShardFormat, num_workers: int, crew: Crew
) -> Iterator[Part]:
    """Writes the parts; yields each when it is written."""
    if num_workers == 1 or len(parts) < 2:
        for part in parts:
            crew.watchdog.enter("making a clip", f"the first of {part.name}", is_measured=True)
            write_part(
                folder,
                part,
                shard_format,
                on_clip=partial(crew.watchdog.enter, "making a clip", f"of {part.name}", is_measured=True),
            )
            yield part
        return
    context = worker_context(__name__)
    with ProcessPoolExecutor(min(num_workers, len(parts)), mp_context=context, initializer=start_worker) as pool:
        planned = {pool.submit(write_part, folder, part, shard_format): part for part in parts}
        waiting = set(planned)
        sign, since = 0, time.monotonic()
        try:
            while waiting:
                crew.watchdog.enter("waiting for its own processes", f"{len(waiting)} parts are missing")
                done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                newest = max(_signs_of_life(folder, parts), default=0)
                if done or newest != sign:
                    sign, since = newest, time.monotonic()
                elif time.monotonic() - since > crew.stall_seconds:
                    raise LostWorkerError(
                        f"{len(waiting)} parts of {folder} are missing and not one clip was made for "
                        f"{crew.stall_seconds:.0f} s (`cluster.collective_timeout_seconds`): a process or the storage "
                        "hangs, or a clip is too large"
                    )
                crew.check()
                for future in done:
                    future.result()
                    yield planned[future]
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


def _signs_of_life(folder: Path, parts: Sequence[Part]) -> Iterator[int]:
    """When the last clip of each part in hand was written; nanoseconds since 1970."""
    own = {part.name for part in parts}
    for entry in os.scandir(folder / PARTS_FOLDER):
        if entry.name.startswith(".") and entry.name.split(".")[1] in own:
            with contextlib.suppress(FileNotFoundError):  # it just got its final name
                yield entry.stat().st_mtime_ns


def write_part(
    folder: Path, part: Part, shard_format: ShardFormat, *, on_clip: Callable[[], None] | None = None
) -> None:
    """Writes one part under a temporary name and renames it; what it says after each clip is for the watchdog."""
    target = _part_folder(folder, part)
    incoming = target.with_name(f".{part.name}.{os.getpid()}")
    shutil.rmtree(incoming, ignore_errors=True)
    writer = MDSWriter(
        columns=COLUMNS,
        out=str(incoming),
        compression=None if shard_format.compression == "none" else shard_format.compression,
        hashes=HASHES,
        size_limit=shard_format.shard_size_mib << 20,
    )
    for record in part.make():
        writer.write(record.to_sample())
        os.utime(incoming)  # for who watches from another process
        if on_clip is not None:
            on_clip()
    writer.finish()
    if target.exists():  # by the worker of a killed run that had this part in hand
        shutil.rmtree(incoming)
    else:
        os.replace(incoming, target)


def _complete(folder: Path, parts: Sequence[Part], settings: Mapping[str, Any]) -> None:
    """Gives the parts' shards their final names, writes the index, and lets go of the parts."""
    shards = []
    for part in parts:
        part_folder = _part_folder(folder, part)
        for shard in _read_object(part_folder / INDEX_FILE)["shards"]:
            if not shard["samples"]:  # the library begins with an empty one where the first clip exceeds the size
                continue
            stored = shard["zip_data"] or shard["raw_data"]
            _link(part_folder / stored["basename"], folder / f"{part.name}.{stored['basename']}")
            for file in (shard["raw_data"], shard["zip_data"]):
                if file is not None:
                    file["basename"] = f"{part.name}.{file['basename']}"
            shards.append(shard)
    if not shards:
        raise ShardError(f"there are no clips to write into {folder}; are all shorter than `videos.min_clip_frames`?")
    num_samples = sum(shard["samples"] for shard in shards)
    details = {"schema_version": SCHEMA_VERSION, "num_samples": num_samples, "settings": settings}
    incoming = folder / f".{INDEX_FILE}.incoming"
    incoming.write_text(
        json.dumps({"version": 2, "shards": shards, DETAILS_KEY: details}, sort_keys=True), encoding="utf-8"
    )
    read_index(incoming)
    os.replace(incoming, folder / INDEX_FILE)
    shutil.rmtree(folder / PARTS_FOLDER)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, so that a start after a kill finds its part whole; else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
