"""A folder of shards that is being written: which of its parts exist, and how they become a complete folder.

A part is written under a temporary name and renamed. When all parts exist, their shards get their final names, and the
index is written last, so a folder with an index is complete.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dreamdance.data.shards.clip_facts import list_facts
from dreamdance.data.shards.columns import SCHEMA_VERSION
from dreamdance.data.shards.index import DETAILS_KEY, read_index
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.data.writing.part_notes import (
    OtherSettingsError,
    PartNote,
    check_settings,
    read_note,
    read_object,
    same_files,
)
from dreamdance.data.writing.shard_parts import (
    HASHES,
    OnError,
    Part,
    PartSource,
    ShardFormat,
    part_folder,
)
from dreamdance.errors import ShardError
from dreamdance.media.video_names import printable
from dreamdance.runs.damaged_videos import list_reasons
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.files import replace_atomically, write_atomically
from dreamdance.runs.finished_clips import PARTS_FOLDER, has_clips_of_split
from dreamdance.runs.work_queue import WorkQueue

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
# Key in an index's details: for each part the name and id of its source, the hashes of its files, and its damage.
SOURCES_KEY = "sources"
# Follows the reasons why a validation set would be empty.
NO_VALIDATION = (
    "\nLower `videos.min_clip_frames`, raise `videos.validation_fraction`, or set videos.validation_fraction=0, which "
    "makes no validation set"
)


@dataclass
class Survey:
    """The state of the parts at a start.

    Attributes:
        missing: names of the parts to write.
        changed: names of source files that changed since a complete folder was made.
        added: names of sources that a complete folder was made without.
        states: states of the files that were read, by name.
        damaged: the sources whose parts are kept without clips because they are damaged: name -> damage.
        without_clips: the sound sources whose parts are kept without clips: name -> reason.
    """

    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    states: dict[str, FileState] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    without_clips: dict[str, str] = field(default_factory=dict)

    def keep(self, record: Mapping[str, Any]) -> None:
        """Notes why a kept part has no clips; `record` is its note, or its record in an index."""
        if record["damage"] is not None:
            self.damaged[record["name"]] = record["damage"]
        elif record.get("no_clips") is not None:
            self.without_clips[record["name"]] = record["no_clips"]


class ShardFolder:
    """A folder of shards that is being written. The ranks share the work on its parts."""

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
        """Reads the index or the settings of an existing folder; writes nothing yet.

        Args:
            folder: the folder of the shards.
            parts: the parts, the same list on every rank; their names are unique and contain no dots.
            settings: everything except the sources that decides the content (JSON-able).
            shard_format: size and compression of the files.
            queue: the work queue of the ranks that share the work.
            on_error: the result for a damaged source, see `shard_parts.write_part`.

        Raises:
            OtherSettingsError: the folder has clips that were made with other settings.
        """
        self.folder, self.parts, self._queue = folder, parts, queue
        self.shard_format, self.on_error = shard_format, on_error
        whole = {**settings, **shard_format.settings(), "hashes": HASHES}
        self._settings: dict[str, Any] = json.loads(json.dumps(whole))
        self.is_complete = (folder / INDEX_FILE).exists()
        self.is_stale = False  # begun with other settings, without any clip
        self._sources: dict[str, dict[str, Any]] = {}
        self._shards: dict[str, list[dict[str, Any]]] = {}
        if self.is_complete:
            self._read_complete()
        else:
            self._check_begun()

    def _check_begun(self) -> None:
        """Compares the settings of a folder that was begun; without any clip it may be begun again with others."""
        with contextlib.suppress(FileNotFoundError):  # it is new, or another rank has just discarded it
            noted = read_object(self.folder / PARTS_FOLDER / SETTINGS_FILE)
            try:
                check_settings(self.folder, noted, self._settings)
            except OtherSettingsError:
                if has_clips_of_split(self.folder):
                    raise
                self.is_stale = True

    def discard_stale(self) -> None:
        """Removes what was begun with other settings and has no clip; one rank calls this before any part is written.

        Renamed first, so that another rank finds the settings, or nothing.
        """
        if self.is_stale:
            self._remove_parts()

    def _remove_parts(self) -> None:
        """Removes the parts: renamed first, since a kill must not leave half of the parts under their names."""
        used_parts = self.folder / f"{PARTS_FOLDER}.done"
        shutil.rmtree(used_parts, ignore_errors=True)
        if (self.folder / PARTS_FOLDER).exists():
            os.replace(self.folder / PARTS_FOLDER, used_parts)
            shutil.rmtree(used_parts)

    def _read_complete(self) -> None:
        index = read_index(self.folder / INDEX_FILE, may_be_empty=True)
        check_settings(self.folder, index.details.get("settings", {}), self._settings)
        self._sources = index.details.get(SOURCES_KEY, {})
        for shard in read_object(self.folder / INDEX_FILE)["shards"]:
            self._shards.setdefault(_stored(shard)["basename"].partition(".")[0], []).append(shard)

    def survey(self, parts: Iterable[Part], known: Mapping[str, FileState]) -> Survey:
        """Finds the parts to write; removes parts that were made from other files.

        Args:
            parts: parts of this folder.
            known: states of source files; a file with the same size and times is not read again.

        Raises:
            ShardError: a note is damaged.
        """
        found = Survey()
        for part in parts:
            self._queue.watchdog.enter("comparing existing parts", f"{self.folder.name}/{part.name}")
            states = {} if part.source is None else self._states(part, part.source, known)
            read = {name: state for name, state in states.items() if state is not known.get(name)}
            found.states.update((name, state) for name, state in read.items() if state is not None)
            if part_folder(self.folder, part).exists():
                is_made = self._is_noted(part, states, found)
            elif self.is_complete:
                is_made = self._is_recorded(part, states, found)
            else:
                is_made = False
            if not is_made:
                found.missing.append(part.name)
        return found

    def _states(self, part: Part, source: PartSource, known: Mapping[str, FileState]) -> dict[str, FileState | None]:
        """The states of a part's files; empty, without reading them, if there is nothing to compare them with."""
        note = read_note(part_folder(self.folder, part))
        if note is None and part.name not in self._sources:
            return {}
        noted = known if note is None else note.files
        return {path.name: read_state(path, noted.get(path.name)) for path in source.files}

    def _is_noted(self, part: Part, states: Mapping[str, FileState | None], found: Survey) -> bool:
        """Whether a written part can be kept because it was made from the present files; removes it if not."""
        if part.source is None:
            return True
        made = part_folder(self.folder, part)
        note, now = read_note(made), PartNote(part.source.name, part.source.clip_id, states)
        if (
            note is not None
            and (note.name, note.clip_id) == (now.name, now.clip_id)
            and same_files(note.hashes(), now.hashes())
        ):
            if note.damage is None or self.on_error == "skip":
                found.keep(note.to_json())
                return True
        else:
            logger.warning(
                "%s has changed since its clips were made; they will be replaced", printable(part.source.name)
            )
        shutil.rmtree(made)
        return False

    def _is_recorded(self, part: Part, states: Mapping[str, FileState | None], found: Survey) -> bool:
        """Whether a complete folder contains a part that was made from the present files."""
        record = self._sources.get(part.name)
        if part.source is None or record is None:
            if part.source is not None:
                found.added.append(part.source.name)
            return self._has_shards(part)
        if record["damage"] is not None and not part.source.files:
            return True  # the source was skipped, and then its files were removed
        now = PartNote(part.source.name, part.source.clip_id, states)
        if record["clip_id"] == now.clip_id and same_files(record["files"], now.hashes()):
            is_made = self.on_error == "skip" if record["damage"] is not None else self._has_shards(part)
            if is_made:
                found.keep(record)
            return is_made
        if record["damage"] is None:
            before, after = record["files"], now.hashes()
            found.changed += [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        return False

    def _has_shards(self, part: Part) -> bool:
        files = [_stored(shard) for shard in self._shards.get(part.name, [])]
        paths = [(self.folder / file["basename"], file["bytes"]) for file in files]
        lost = [path for path, size in paths if not path.is_file() or path.stat().st_size != size]
        if lost:
            logger.warning("%s is missing or incomplete; `prepare` writes it again", ", ".join(map(str, lost)))
        return not lost

    def removed_sources(self) -> list[str]:
        """The names of sources that a complete folder was made from and that are not in the plan any more."""
        planned = {part.name for part in self.parts}
        return [record["name"] for name, record in self._sources.items() if name not in planned]

    def begin(self) -> None:
        """Creates the folder for parts, and writes the settings into a new one."""
        noted = self.folder / PARTS_FOLDER / SETTINGS_FILE
        noted.parent.mkdir(parents=True, exist_ok=True)
        if not noted.exists():
            write_atomically(noted, json.dumps(self._settings, indent=1, sort_keys=True))

    @cached_property
    def notes(self) -> dict[str, PartNote]:
        """The notes of all written parts that the index does not list yet, by part name; valid when all are written."""
        notes = {part.name: read_note(part_folder(self.folder, part)) for part in self.parts}
        return {name: note for name, note in notes.items() if note is not None}

    def damaged_sources(self) -> dict[str, str]:
        """The existing sources without clips in this folder because they are damaged: name -> damage."""
        return self._reasons("damage")

    def sources_without_clips(self) -> dict[str, str]:
        """The sound sources that gave no clips in this folder: name -> reason."""
        return self._reasons("no_clips")

    def _reasons(self, kind: Literal["damage", "no_clips"]) -> dict[str, str]:
        names = {part.source.name for part in self.parts if part.source is not None and part.source.files}
        reasons = {record["name"]: record.get(kind) for record in self._sources.values()}
        reasons.update({note.name: note.why_empty().get(kind) for note in self.notes.values()})
        return {name: reason for name, reason in reasons.items() if reason is not None and name in names}

    def complete(self, left_out: Mapping[str, str], *, may_be_empty: bool = False) -> None:
        """Gives the parts' shards their final names and writes the index; one rank calls this when all parts exist.

        Args:
            left_out: name -> damage of the sources to leave out, although their parts in this folder may have clips.
            may_be_empty: whether to write an index without clips if all sources are damaged.

        Raises:
            ShardError: there are no clips to write.
        """
        shutil.rmtree(self.folder / f"{PARTS_FOLDER}.done", ignore_errors=True)
        if self.is_complete and not any(part_folder(self.folder, part).exists() for part in self.parts):
            logger.info("%s is already complete and has the same settings: nothing to write", self.folder)
        else:
            self._queue.watchdog.enter("completing a folder of shards", str(self.folder))
            self._complete(left_out, may_be_empty)
        self._remove_parts()

    def _complete(self, left_out: Mapping[str, str], may_be_empty: bool) -> None:
        notes, shards = self.notes, list[dict[str, Any]]()
        sources: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            if part.source is not None:
                sources[part.name] = self._record(part.source, part.name, notes.get(part.name), left_out)
            if part.source is None or sources[part.name]["damage"] is None:
                shards += self._publish(part)
        if not shards:
            reasons = {
                printable(record["name"]): printable(record["damage"] or record.get("no_clips") or "it gave no clip")
                for record in sources.values()
            }
            reason = list_reasons(reasons)
            if not may_be_empty or not any(record["damage"] for record in sources.values()):
                advice = NO_VALIDATION if may_be_empty else ""
                raise ShardError(f"there are no clips to write into {self.folder}:\n{reason}{advice}")
            logger.warning("%s has no clips. The same command adds videos once repaired:\n%s", self.folder, reason)
        num_samples = sum(shard["samples"] for shard in shards)
        details = {"schema_version": SCHEMA_VERSION, "num_samples": num_samples, "settings": self._settings}
        details |= ({SOURCES_KEY: sources} if sources else {}) | list_facts(self.folder, shards)
        content = json.dumps({"version": 2, "shards": shards, DETAILS_KEY: details}, sort_keys=True)
        with replace_atomically(self.folder / INDEX_FILE, is_only_writer=True) as temporary:
            temporary.write_text(content, encoding="utf-8")
            read_index(temporary, may_be_empty=not shards)

    def _record(
        self, source: PartSource, part_name: str, note: PartNote | None, left_out: Mapping[str, str]
    ) -> dict[str, Any]:
        if note is None:
            return self._sources[part_name]
        why_empty = note.why_empty()
        if source.name in left_out:
            why_empty["damage"] = note.damage or left_out[source.name]
        return {"name": note.name, "clip_id": note.clip_id, "files": note.hashes(), **why_empty}

    def _publish(self, part: Part) -> Iterator[dict[str, Any]]:
        """Gives a part's new shards their final names; yields the index entries of all its shards."""
        made = part_folder(self.folder, part)
        if not made.exists():
            yield from self._shards.get(part.name, [])
            return
        for shard in read_object(made / INDEX_FILE)["shards"]:
            if not shard["samples"]:  # the library writes an empty shard first if the first clip exceeds the size
                continue
            stored = _stored(shard)
            _link(made / stored["basename"], self.folder / f"{part.name}.{stored['basename']}")
            for file in (shard["raw_data"], shard["zip_data"]):
                if file is not None:
                    file["basename"] = f"{part.name}.{file['basename']}"
            yield shard


def _stored(shard: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file of a shard that a complete folder contains."""
    stored: Mapping[str, Any] = shard["zip_data"] or shard["raw_data"]
    return stored


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it; the part stays complete, in case this process is killed."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
