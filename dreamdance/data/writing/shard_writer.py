"""Writes a folder of shards in parallel parts; after a kill at any time, the next start gives the same folder.

Each part is written under a temporary name and renamed; existing parts are not written again. When all parts exist,
their shards get their final names, and the index is written last, so a folder with an index is complete. If shards of a
complete folder were removed, or videos that were skipped have been repaired, only those parts are written and added.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.data.writing.part_notes import read_note
from dreamdance.data.writing.shard_folder import ShardFolder, Survey
from dreamdance.data.writing.shard_parts import Part, PartSource, ShardFormat, part_folder, write_parts
from dreamdance.media.video_names import printable
from dreamdance.runs.work_queue import Share, WorkQueue
from dreamdance.runtime.ranks import Ranks

__all__ = ["ClipRecord", "Part", "PartSource", "ShardFolder", "ShardFormat", "Survey", "write_shards"]

logger = logging.getLogger(__name__)


def share_missing(queue: WorkQueue, missing: Mapping[ShardFolder, Sequence[str]]) -> Share:
    """Returns the parts to write as a share of the queue; `missing` has their names, the same on every rank."""
    return queue.share("write", [_item(folder.folder, name) for folder, names in missing.items() for name in names])


def write_shared(
    folders: Sequence[ShardFolder], share: Share, num_workers: int, queue: WorkQueue, on_part: Callable[[], None]
) -> None:
    """Writes missing parts with all other ranks; a damaged part stops the work unless it is skipped.

    Args:
        folders: the folders of the parts, all with the same format and `on_error`.
        share: from `share_missing`; the result of a part is why it has no clips, as JSON.
        num_workers: number of processes on this rank; with 1 this process writes.
        queue: the queue of the share.
        on_part: called before the first part, after each, and when other ranks have written more.

    Raises:
        LostWorkerError: a worker died or hangs.
    """
    by_item = {_item(folder.folder, part.name): (folder, part) for folder in folders for part in folder.parts}

    def claimed() -> Iterator[tuple[Path, Part] | None]:
        for item in share.take():
            if item is None:
                on_part()
                yield None
                continue
            shards, part = by_item[item]
            shards.begin()  # not before: another rank may have completed the folder
            if part_folder(shards.folder, part).exists():
                share.finish(item, json.dumps(_result(shards.folder, part)))  # by a worker of a killed rank
            else:
                yield shards.folder, part

    on_part()
    on_error, num_workers = folders[0].on_error, min(num_workers, len(share.items))
    made = write_parts(claimed(), folders[0].shard_format, num_workers=num_workers, on_error=on_error, queue=queue)
    for (folder, part), damage in made:
        if damage is not None and part.source is not None:
            logger.warning("%s cannot be used: %s", printable(part.source.name), printable(damage))
        result = _result(folder, part, damage)
        if part.source is not None and result.get("no_clips"):
            logger.warning("%s", printable(f"{part.source.name} gives no {folder.name} clip: {result['no_clips']}"))
        item, is_made = _item(folder, part.name), damage is None or on_error == "skip"
        share.finish(item, json.dumps(result), made=item if is_made else None)
        if not is_made:
            queue.stop("")
        on_part()


def newly_damaged(folders: Sequence[ShardFolder], share: Share) -> dict[str, str]:
    """The sources that any rank found damaged while it wrote: name -> damage."""
    return {name: reason for found in newly_empty(folders, share).damaged.values() for name, reason in found.items()}


@dataclass(frozen=True)
class EmptyParts:
    """The sources of parts without clips: the folder's name -> the source's name -> damage, or reason."""

    damaged: Mapping[str, Mapping[str, str]]
    without_clips: Mapping[str, Mapping[str, str]]


def newly_empty(folders: Sequence[ShardFolder], share: Share) -> EmptyParts:
    """The parts without clips that any rank has written, or has tried to write."""
    results = {item: json.loads(text) for item, text in share.results().items()}

    def of_kind(kind: str) -> dict[str, dict[str, str]]:
        return {
            folder.folder.name: {
                part.source.name: reason
                for part in folder.parts
                if part.source is not None
                and (reason := results.get(_item(folder.folder, part.name), {}).get(kind)) is not None
            }
            for folder in folders
        }

    return EmptyParts(of_kind("damage"), of_kind("no_clips"))


def _result(folder: Path, part: Part, damage: str | None = None) -> dict[str, str | None]:
    """Why a part that was written has no clips."""
    note = read_note(part_folder(folder, part)) if damage is None else None
    return {"damage": damage} if note is None else note.why_empty()


def _item(folder: Path, part_name: str) -> str:
    return f"{folder.name}/{part_name}"


def write_shards(
    folder: Path,
    parts: Sequence[Part],
    *,
    settings: Mapping[str, Any],
    shard_format: ShardFormat,
    num_workers: int = 1,
    queue: WorkQueue | None = None,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes all parts into `folder`; the ranks share them, and one rank completes the folder when all are written.

    Args:
        folder: the folder of the shards; an incomplete one is continued, a complete one is not changed.
        parts: the parts, the same list on every rank, with unique names; no source may be damaged.
        settings: everything that decides the content (JSON-able); a folder with other settings is refused.
        shard_format: size and compression of the files.
        num_workers: number of processes on this rank; with 1 this process writes.
        queue: the entered work queue of the ranks that share the work; by default this process works alone.
        on_part: called with the number of parts that all ranks have finished, and the number of all parts.

    Raises:
        ShardError: the folder was begun with other settings (the error names them), or there are no clips to write.
        LostWorkerError: a worker died or hangs.
    """
    with ExitStack() as entered:
        queue = queue or entered.enter_context(WorkQueue(Ranks()))
        shards = ShardFolder(folder, parts, settings=settings, shard_format=shard_format, queue=queue)
        surveyed = queue.agree("survey", json.dumps(shards.survey(parts, {}).missing))
        share = share_missing(queue, {shards: json.loads(surveyed)})

        def report() -> None:
            on_part(len(parts) - len(share.items) + share.num_done(), len(parts))

        write_shared([shards], share, num_workers, queue, report)
        report()
        queue.once("complete", partial(shards.complete, {}))
