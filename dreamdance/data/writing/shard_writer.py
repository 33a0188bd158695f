"""Writes a folder of shards in parallel parts: killed at any time and started again, it ends in the same folder.

Each part is written under a temporary name and renamed; what is there is not written again. When all parts are there,
their shards get their final names and the index is written last, so that a folder with an index is complete. A complete
folder is completed again when shards were removed, or when videos that had been skipped are repaired: with new parts
beside the shards that it has.
"""

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamdance.data.shards.columns import SCHEMA_VERSION
from dreamdance.data.shards.index import DETAILS_KEY, read_index
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.data.writing.shard_parts import (
    HASHES,
    PARTS_FOLDER,
    ClipRecord,
    OnError,
    Part,
    PartNote,
    PartSource,
    ShardFormat,
    check_settings,
    part_folder,
    read_note,
    read_object,
    same_files,
    write_parts,
)
from dreamdance.errors import ShardError
from dreamdance.media.video_names import printable
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.files import replace_atomically, write_atomically
from dreamdance.runs.work_queue import Share, WorkQueue
from dreamdance.runtime.ranks import Ranks

__all__ = ["ClipRecord", "Part", "PartSource", "ShardFolder", "ShardFormat", "Survey", "write_shards"]

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
# Under this name the writing of all splits is called off.
WRITE = "write"
# In an index's details: by part, the name and the id of what it was made from, its files' hashes, its damage.
SOURCES_KEY = "sources"


@dataclass
class Survey:
    """What a start finds of its parts.

    Attributes:
        missing: names of the parts that are to be made.
        changed: of a complete folder, the files that are no longer those that it was made from.
        added: names of sources that a complete folder was made without.
        states: of the files that were read, by name.
    """

    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    states: dict[str, FileState] = field(default_factory=dict)


class ShardFolder:
    """A folder of shards in the making. The ranks share the work on its parts."""

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Part],
        *,
        settings: Mapping[str, Any],
        shard_format: ShardFormat,
        queue: WorkQueue,
        on_error: OnError = "stop",
    ) -> None:
        """Looks at what is there; nothing is written yet.

        Args:
            folder: of the shards.
            parts: the same list on every rank, with different names without dots.
            settings: all that decides the content (JSON-able) but the content of sources.
            shard_format: size and compression of the files.
            queue: of the ranks that share the work.
            on_error: what becomes of a part whose source is damaged.

        Raises:
            ShardError: the folder was begun with other settings; names them.
        """
        self.folder, self.parts, self._format, self._queue = folder, parts, shard_format, queue
        self._on_error = on_error
        whole = {**settings, "compression": shard_format.compression, "hashes": HASHES}
        self._settings: dict[str, Any] = json.loads(json.dumps(whole))
        self.is_complete = (folder / INDEX_FILE).exists()
        self._sources: dict[str, dict[str, Any]] = {}
        self._shards: dict[str, list[dict[str, Any]]] = {}
        if self.is_complete:
            self._read_complete()
        elif (noted := folder / PARTS_FOLDER / SETTINGS_FILE).exists():
            check_settings(folder, read_object(noted), self._settings)

    def _read_complete(self) -> None:
        index = read_index(self.folder / INDEX_FILE, may_be_empty=True)
        check_settings(self.folder, index.details.get("settings", {}), self._settings)
        self._sources = index.details.get(SOURCES_KEY, {})
        for shard in read_object(self.folder / INDEX_FILE)["shards"]:
            self._shards.setdefault(_stored(shard)["basename"].partition(".")[0], []).append(shard)

    def survey(self, parts: Iterable[Part], known: Mapping[str, FileState]) -> Survey:
        """Looks which parts are to be made; what was made from other files is removed.

        Args:
            parts: of this folder.
            known: states of source files that need not be read again while size and times are the same.

        Raises:
            ShardError: a note is damaged.
        """
        found = Survey()
        for part in parts:
            self._queue.watchdog.enter("looking at what is there", f"{self.folder.name}/{part.name}")
            states = {} if part.source is None else self._states(part, part.source, known)
            read = {name: state for name, state in states.items() if state is not known.get(name)}
            found.states.update((name, state) for name, state in read.items() if state is not None)
            if part_folder(self.folder, part).exists():
                is_made = self._is_noted(part, states)
            elif self.is_complete:
                is_made = self._is_recorded(part, states, found)
            else:
                is_made = False
            if not is_made:
                found.missing.append(part.name)
        return found

    def _states(self, part: Part, source: PartSource, known: Mapping[str, FileState]) -> dict[str, FileState | None]:
        """The states of a part's files, which are read only if there is something to compare them with."""
        note = read_note(part_folder(self.folder, part))
        if note is None and part.name not in self._sources:
            return {}
        noted = known if note is None else note.files
        return {path.name: read_state(path, noted.get(path.name)) for path in source.files}

    def _is_noted(self, part: Part, states: Mapping[str, FileState | None]) -> bool:
        """Whether a part that waits for completion was made from what is there now."""
        if part.source is None:
            return True
        made = part_folder(self.folder, part)
        note, now = read_note(made), PartNote(part.source.name, part.source.clip_id, states)
        if (
            note is not None
            and (note.name, note.clip_id) == (now.name, now.clip_id)
            and same_files(note.hashes(), now.hashes())
        ):
            if note.damage is None or self._on_error == "skip":
                return True
        else:
            logger.warning("%s has changed since its clips were made; they are made again", printable(part.source.name))
        shutil.rmtree(made)
        return False

    def _is_recorded(self, part: Part, states: Mapping[str, FileState | None], found: Survey) -> bool:
        """Whether a complete folder holds a part, made from what is there now."""
        record = self._sources.get(part.name)
        if part.source is None or record is None:
            if part.source is not None:
                found.added.append(part.source.name)
            return self._has_shards(part)
        if record["damage"] is not None and not part.source.files:
            return True  # it was removed, after it had been skipped
        now = PartNote(part.source.name, part.source.clip_id, states)
        if record["clip_id"] == now.clip_id and same_files(record["files"], now.hashes()):
            return self._on_error == "skip" if record["damage"] is not None else self._has_shards(part)
        if record["damage"] is None:
            before, after = record["files"], now.hashes()
            found.changed += [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        return False

    def _has_shards(self, part: Part) -> bool:
        files = [_stored(shard) for shard in self._shards.get(part.name, [])]
        paths = [(self.folder / file["basename"], file["bytes"]) for file in files]
        lost = [path for path, size in paths if not path.is_file() or path.stat().st_size != size]
        if lost:
            logger.warning("%s is missing, or is not whole; it is written again", ", ".join(map(str, lost)))
        return not lost

    def removed(self) -> list[str]:
        """Names of sources that a complete folder was made from and that are not planned any more."""
        planned = {part.name for part in self.parts}
        return [record["name"] for name, record in self._sources.items() if name not in planned]

    def expect(self, missing: Sequence[str]) -> Share:
        """Takes the names of the parts that are to be made, the same on every rank; returns them to be shared."""
        if missing:
            self._begin()
        return self._queue.share(f"write {self.folder.name}", missing, stop=WRITE)

    def _begin(self) -> None:
        """Makes the place for parts, and notes their settings if it is new."""
        noted = self.folder / PARTS_FOLDER / SETTINGS_FILE
        noted.parent.mkdir(parents=True, exist_ok=True)
        if noted.exists():
            return
        write_atomically(noted, json.dumps(self._settings, indent=1, sort_keys=True))

    def write(self, share: Share, num_workers: int, on_part: Callable[[], None]) -> None:
        """Writes missing parts until no more can be claimed; a damaged one may call the work off.

        Args:
            share: of `expect`; what comes of a part is its damage, if there is any.
            num_workers: processes on this rank; 1 writes in this one.
            on_part: called before the first part, and after each.

        Raises:
            LostWorkerError: a worker died or hangs.
        """
        by_name = {part.name: part for part in self.parts}

        def next_part() -> Part | None:
            while (name := share.claim()) is not None:
                if not part_folder(self.folder, by_name[name]).exists():
                    return by_name[name]
                share.finish(name)  # by a worker of a killed rank, which had it in hand
            return None

        on_part()
        for part, damage in write_parts(
            self.folder,
            next_part,
            self._format,
            num_workers=min(num_workers, len(share.items)),
            on_error=self._on_error,
            queue=self._queue,
        ):
            if damage is not None and part.source is not None:
                logger.warning("%s cannot be used: %s", printable(part.source.name), printable(damage))
            is_made = damage is None or self._on_error == "skip"
            share.finish(part.name, damage or "", made=f"{self.folder.name}/{part.name}" if is_made else None)
            if not is_made:
                self._queue.call_off(WRITE)
            on_part()

    def found_damaged(self, share: Share) -> dict[str, str]:
        """What all ranks found damaged while they wrote: name -> damage."""
        sources = {part.name: part.source for part in self.parts}
        found = {sources[name]: damage for name, damage in share.results().items() if damage}
        return {source.name: damage for source, damage in found.items() if source is not None}

    @functools.cached_property
    def notes(self) -> dict[str, PartNote]:
        """The notes of all parts that wait for completion, by the parts' names; to be asked for when all are there."""
        notes = {part.name: read_note(part_folder(self.folder, part)) for part in self.parts}
        return {name: note for name, note in notes.items() if note is not None}

    def damaged(self) -> dict[str, str]:
        """What nothing is written of, though it is there: name -> damage."""
        names = {part.source.name for part in self.parts if part.source is not None and part.source.files}
        damages = {record["name"]: record["damage"] for record in self._sources.values()}
        damages.update({note.name: note.damage for note in self.notes.values()})
        return {name: damage for name, damage in damages.items() if damage is not None and name in names}

    def complete(self, left_out: Mapping[str, str], *, may_be_empty: bool = False) -> None:
        """Gives the parts' shards their final names and writes the index: by one rank, when all parts are there.

        Args:
            left_out: name -> damage of what nothing is written of, though its part in this folder may have clips.
            may_be_empty: whether an index without clips is written where damage has left none.

        Raises:
            ShardError: there is nothing to write.
        """
        remains = self.folder / f"{PARTS_FOLDER}.done"
        shutil.rmtree(remains, ignore_errors=True)
        if self.is_complete and not any(part_folder(self.folder, part).exists() for part in self.parts):
            logger.info("%s is complete already, with the same settings: nothing to write", self.folder)
        else:
            self._queue.watchdog.enter("completing a folder of shards", str(self.folder))
            self._complete(left_out, may_be_empty)
        if (self.folder / PARTS_FOLDER).exists():
            os.replace(self.folder / PARTS_FOLDER, remains)  # at once: what is half removed must not be taken for parts
            shutil.rmtree(remains)

    def _complete(self, left_out: Mapping[str, str], may_be_empty: bool) -> None:
        notes, shards = self.notes, list[dict[str, Any]]()
        sources: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            if part.source is not None:
                sources[part.name] = self._record(part.source, part.name, notes.get(part.name), left_out)
            if part.source is None or sources[part.name]["damage"] is None:
                shards += self._take(part)
        if not shards:
            why = f"are all shorter than `videos.min_clip_frames`{', or damaged' if left_out else ''}?"
            if not may_be_empty or not any(record["damage"] for record in sources.values()):
                raise ShardError(f"there are no clips to write into {self.folder}; {why}")
            logger.warning("%s is left without clips; %s The same command adds what was repaired", self.folder, why)
        num_samples = sum(shard["samples"] for shard in shards)
        details = {"schema_version": SCHEMA_VERSION, "num_samples": num_samples, "settings": self._settings}
        if sources:
            details[SOURCES_KEY] = sources
        content = json.dumps({"version": 2, "shards": shards, DETAILS_KEY: details}, sort_keys=True)
        with replace_atomically(self.folder / INDEX_FILE, is_only_writer=True) as temporary:
            temporary.write_text(content, encoding="utf-8")
            read_index(temporary, may_be_empty=not shards)

    def _record(
        self, source: PartSource, part_name: str, note: PartNote | None, left_out: Mapping[str, str]
    ) -> dict[str, Any]:
        if note is None:
            return self._sources[part_name]
        damage = note.damage or left_out.get(source.name)
        return {"name": note.name, "clip_id": note.clip_id, "files": note.hashes(), "damage": damage}

    def _take(self, part: Part) -> Iterator[dict[str, Any]]:
        """The entries of a part's shards, which get their final names here if they are new."""
        made = part_folder(self.folder, part)
        if not made.exists():
            yield from self._shards.get(part.name, [])
            return
        for shard in read_object(made / INDEX_FILE)["shards"]:
            if not shard["samples"]:  # the library begins with an empty one where the first clip exceeds the size
                continue
            stored = _stored(shard)
            _link(made / stored["basename"], self.folder / f"{part.name}.{stored['basename']}")
            for file in (shard["raw_data"], shard["zip_data"]):
                if file is not None:
                    file["basename"] = f"{part.name}.{file['basename']}"
            yield shard


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
    """Writes all parts into `folder`; ranks share them, and one of them completes the folder when all are there.

    Args:
        folder: an existing one is continued, or left as it is if complete.
        parts: the same list on every rank, with different names; none has a source that may be damaged.
        settings: all that decides the content (JSON-able); a folder of other settings is refused.
        shard_format: size and compression of the files.
        num_workers: processes on this rank; 1 writes in this one.
        queue: of the ranks that share the work, entered; by default this process works alone.
        on_part: called with the number of finished parts, of all ranks, and of all parts.

    Raises:
        ShardError: the folder was begun with other settings (naming them), or there is nothing to write.
        LostWorkerError: a worker died or hangs.
    """
    with ExitStack() as entered:
        queue = queue or entered.enter_context(WorkQueue(Ranks()))
        shards = ShardFolder(folder, parts, settings=settings, shard_format=shard_format, queue=queue)
        surveyed = queue.agree("survey", json.dumps(shards.survey(parts, {}).missing))
        share = shards.expect(json.loads(surveyed))

        def report() -> None:
            on_part(len(parts) - len(share.items) + share.num_done(), len(parts))

        while not share.is_over():
            shards.write(share, num_workers, report)
            if not share.is_over():
                queue.pause("parts of other ranks are missing")
        report()
        last = queue.share("complete", ["the folder"])
        for item in last.take():
            shards.complete({})
            last.finish(item)


def _stored(shard: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file of a shard that a complete folder holds."""
    stored: Mapping[str, Any] = shard["zip_data"] or shard["raw_data"]
    return stored


def _link(source: Path, target: Path) -> None:
    """A second name for a file, so that a start after a kill finds its part whole; else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
