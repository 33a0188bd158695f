"""The note of a part of a folder of shards: the files that it was made from, and why it has no clips."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamdance.errors import ShardError
from dreamdance.runs.file_states import FileState

NOTE_FILE = "source.json"


@dataclass(frozen=True)
class PartNote:
    """The files that a part was made from, and the damage or the reason because of which it has no clips."""

    name: str
    clip_id: str
    files: Mapping[str, FileState | None]
    damage: str | None = None
    no_clips: str | None = None

    def hashes(self) -> dict[str, str | None]:
        return {name: None if state is None else state.sha256 for name, state in self.files.items()}

    def to_json(self) -> dict[str, Any]:
        files = {name: None if state is None else state.to_json() for name, state in self.files.items()}
        return {"name": self.name, "clip_id": self.clip_id, "files": files, **self.why_empty()}

    def why_empty(self) -> dict[str, str | None]:
        """The damage, and the reason why a sound video gave no clips, where there is one (older notes have none)."""
        reason = {} if self.no_clips is None else {"no_clips": self.no_clips}
        return {"damage": self.damage, **reason}


def same_files(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> bool:
    """Whether two notes have the same hashes. A missing file and a file that a note omits both count as None."""
    return all(one.get(name) == other.get(name) for name in {*one, *other})


def read_note(folder: Path) -> PartNote | None:
    """The note in a part's folder; None if there is none.

    Raises:
        ShardError: the note is damaged.
    """
    path = folder / NOTE_FILE
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        files = {str(name): FileState.from_json(state) for name, state in content["files"].items()}
        return PartNote(content["name"], content["clip_id"], files, content["damage"], content.get("no_clips"))
    except (KeyError, AttributeError) as error:
        raise ShardError(f"{path} is damaged; delete {folder}, `prepare` then makes its clips again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file in a folder of parts.

    Raises:
        ShardError: the file contains no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged ({error}); delete {path.parent}, `prepare` then makes it again") from error
    if not isinstance(content, dict):
        raise ShardError(f"{path} is damaged: no JSON object; delete {path.parent}, `prepare` then makes it again")
    return content


class OtherSettingsError(ShardError):
    """A folder was made with other settings.

    Attributes:
        folder: the folder.
        differing: key -> (value that the folder was made with, value now); None where the key is absent.
    """

    def __init__(self, folder: Path, differing: Mapping[str, tuple[Any, Any]]) -> None:
        self.folder, self.differing = folder, differing
        changes = "; ".join(f"{name} was {was!r}, is {now!r}" for name, (was, now) in differing.items())
        super().__init__(
            f"{folder} was made with other settings: {changes}. Set another `output` or delete that folder"
        )


def check_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises an OtherSettingsError that names the differences if a folder was made with other settings."""
    differing = {
        name: (found.get(name), wanted.get(name))
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    }
    if differing:
        raise OtherSettingsError(folder, differing)
