"""The files that `prepare` writes beside its shards, and its error texts: states of videos, and damaged videos."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.data.writing.part_notes import read_object
from dreamdance.data.writing.shard_folder import SETTINGS_FILE, SOURCES_KEY
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import PrepareRecipe
from dreamdance.runs.damaged_videos import DAMAGED_FILE, HEADERS, WITHOUT_CLIPS_FILE, list_reasons
from dreamdance.runs.file_states import FileState
from dreamdance.runs.files import write_atomically
from dreamdance.runs.finished_clips import PARTS_FOLDER, SPLITS, has_clips_of_split
from dreamdance.runs.layout import INPUTS_FILE

logger = logging.getLogger(__name__)

# An error lists at most this number of videos.
MAX_LINES = 200


def read_inputs(output: Path) -> dict[str, FileState]:
    """The states of the videos when they were last read; empty if the file is missing or damaged."""
    path = output / INPUTS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        states = {name: FileState.from_json(values) for name, values in content.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, AttributeError) as error:
        logger.warning("%s is damaged (%s): `prepare` reads all videos again", path, error)
        return {}
    return {name: state for name, state in states.items() if state is not None}


def write_inputs(output: Path, states: Mapping[str, Any], *, planned: Collection[str]) -> None:
    """Adds states to the recorded ones, and drops the states of files that are not planned any more."""
    before = {name: state.to_json() for name, state in read_inputs(output).items()}
    after = {name: state for name, state in {**before, **states}.items() if name in planned}
    if after != before:
        write_atomically(output / INPUTS_FILE, json.dumps(after, indent=1, sort_keys=True) + "\n")


def read_skipped(output: Path) -> set[str]:
    """The names of the damaged videos that a complete output was made without."""
    indices = [output / split / INDEX_FILE for split in SPLITS]
    sources = [read_index(path, may_be_empty=True).details.get(SOURCES_KEY, {}) for path in indices if path.is_file()]
    return {record["name"] for records in sources for record in records.values() if record["damage"] is not None}


def begun_compression(output: Path) -> Literal["none", "zstd"] | None:
    """The compression of the shards in an output that was begun or completed; None if there is no such output."""
    for split in SPLITS:
        settings: Any = {}
        if (index := output / split / INDEX_FILE).is_file():
            settings = read_index(index, may_be_empty=True).details.get("settings", {})
        elif has_clips_of_split(output / split):  # else it may be begun again in another form
            noted = output / split / PARTS_FOLDER / SETTINGS_FILE
            settings = read_object(noted)
        compression = settings.get("compression") if isinstance(settings, dict) else None
        if compression in ("none", "zstd"):
            return "zstd" if compression == "zstd" else "none"
    return None


def write_damaged(output: Path, damaged: Mapping[str, str]) -> None:
    """Writes the table of the damaged videos, a file of two columns; deletes the file if there are none."""
    _write_reasons(output / DAMAGED_FILE, damaged)


def write_without_clips(output: Path, reasons: Mapping[str, str]) -> None:
    """Writes the table of the sound videos without clips, from `join_reasons`; deletes the file if there are none."""
    _write_reasons(output / WITHOUT_CLIPS_FILE, reasons)


def join_reasons(reasons: Mapping[str, Mapping[str, str]], planned: Mapping[str, Collection[str]]) -> dict[str, str]:
    """One reason for each video that gave no clip, or none for one of its splits: name -> reason.

    Args:
        reasons: split -> name -> why the video gave this split no clip.
        planned: split -> the names of all videos that belong to it.
    """
    joined = {}
    for name in sorted({name for found in reasons.values() for name in found}):
        why = {split: found[name] for split, found in reasons.items() if name in found}
        if len(set(why.values())) == 1 and all(split in why for split, names in planned.items() if name in names):
            joined[name] = f"no clip: {next(iter(why.values()))}"
        else:
            joined[name] = "; ".join(f"no {split} clip: {reason}" for split, reason in why.items())
    return joined


def report_without_clips(output: Path, reasons: Mapping[str, str]) -> None:
    """Writes the table of the sound videos without clips, and counts them by reason in the log."""
    write_without_clips(output, reasons)
    if reasons:
        logger.warning(
            "%d sound videos gave no clip, or none for one split, see %s:\n%s",
            len(reasons),
            output / WITHOUT_CLIPS_FILE,
            list_reasons({printable(name): printable(reason) for name, reason in reasons.items()}),
        )


def _write_reasons(path: Path, reasons: Mapping[str, str]) -> None:
    if not reasons:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [HEADERS[path.name], *sorted(reasons.items())]
    write_atomically(path, "".join("\t".join(map(printable, row)) + "\n" for row in rows))


def damage_table(damaged: Mapping[str, str]) -> str:
    """A line for each damaged video."""
    return _listed([printable(f"{name}: {reason}") for name, reason in sorted(damaged.items())])


def unusable_videos_message(broken: Mapping[str, str], output: Path) -> str:
    """The error text for videos whose headers show that they cannot be used."""
    return (
        f"{len(broken)} of the videos cannot be used; `prepare` has written no clips:\n{damage_table(broken)}\n"
        f"Repair, replace or remove these videos, or set videos.on_error=skip to leave them out. The table is in "
        f"{output / DAMAGED_FILE}"
    )


def damaged_videos_message(damaged: Mapping[str, str], output: Path) -> str:
    """The error text for videos that turned out to be damaged when they were decoded."""
    return (
        f"{len(damaged)} of the videos are damaged; `prepare` has written no clips of them and keeps all other clips:\n"
        f"{damage_table(damaged)}\nRepair, replace or remove these videos, or set videos.on_error=skip to leave them "
        f"out; the same command then continues. The table is in {output / DAMAGED_FILE}"
    )


def other_settings_message(output: Path, differing: Mapping[str, tuple[Any, Any]], *, source: str) -> str:
    """The error text for an output that has clips that were made with other settings.

    Args:
        output: the output folder of the recipe.
        differing: setting -> (value then, value now).
        source: the recipe's section in which settings are that are no keys of the recipe itself.
    """
    lines = []
    for name, (was, now) in differing.items():
        key = name if name in PrepareRecipe.model_fields else f"{source}.{name}"
        lines.append(printable(f"{key} was {was!r}, is {now!r}"))
    kept = "; results of annotators may stay where they are, and are used again" if source == "videos" else ""
    folders = " and ".join(str(output / split) for split in SPLITS if has_clips_of_split(output / split))
    return (
        f"{output} has clips that were made with other settings:\n{_listed(lines)}\nSet another `output`, use these "
        f"values, or delete {folders}{kept}"
    )


def changed_videos_message(output: Path, *, changed: Set[str], added: Set[str], removed: Set[str]) -> str:
    """The error text for videos that differ from the videos that an output was made from; empty if none differ.

    Args:
        output: the output folder of the recipe.
        changed: names of files whose content changed.
        added, removed: names of videos in either split. A video in both was drawn for the other split.
    """
    lines = [f"{printable(name)} has changed" for name in sorted(changed)]
    lines += [f"{printable(name)} was added" for name in sorted(added - removed)]
    lines += [f"{printable(name)} was removed" for name in sorted(removed - added)]
    if not lines:
        return ""
    return (
        f"{output} was made from other videos than `videos.folder` contains now:\n{_listed(lines)}\n"
        "Set another `output`, delete that folder, or put the videos back"
    )


def unequal_ranks_message(folder: str, seen: Mapping[int, Set[str]]) -> str:
    """The error text for ranks that found different videos in a folder.

    Args:
        folder: the folder of the videos.
        seen: names of the videos that each rank found, by rank.
    """
    found = [set(names) for names in seen.values()]
    differing = sorted(set[str]().union(*found).difference(set[str].intersection(*found)))
    lines = [
        f"{printable(name)}: not on rank {', '.join(str(rank) for rank, names in seen.items() if name not in names)}"
        for name in differing
    ]
    return (
        f"the ranks found different videos in {folder}, because videos were added or removed while the job started; "
        f"`prepare` has written no clips. Start it again when the folder (`videos.folder`) does not change any more\n"
        f"{_listed(lines)}"
    ).rstrip()


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:MAX_LINES], *more])
