"""Whether the output of `prepare`, or of `encode`, is complete and matches its inputs. No torch here."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamdance.modalities import ADDED_TO_DANCERS
from dreamdance.recipe import PrepareRecipe
from dreamdance.runs.file_states import FileStamp, FileState
from dreamdance.runs.layout import EXAMPLE_FIELDS, INPUTS_FILE

SPLITS = ("train", "validation")
INDEX_FILE = "index.json"
MANIFEST_FILE = "manifest.jsonl"


def is_prepared(recipe: PrepareRecipe) -> bool:
    """Whether every file exists that the indices and the manifest name, and the videos are those that were read.

    Dancers must have been rendered with all maps that they have today; if not, `prepare` runs and names the maps.

    The content of the shards is checked when they are read.
    """
    output = Path(recipe.output)
    has_validation = recipe.dancers is not None or (recipe.videos is not None and recipe.videos.validation_fraction > 0)
    try:
        for split in SPLITS if has_validation else SPLITS[:1]:
            there = {entry.name for entry in os.scandir(output / split)}
            index = json.loads((output / split / INDEX_FILE).read_text(encoding="utf-8"))
            if not there.issuperset(_shards(index)):
                return False
            if recipe.dancers is not None and _added_maps(index) != list(ADDED_TO_DANCERS):
                return False
        if recipe.videos is not None and not _are_as_noted(Path(recipe.videos.folder), output / INPUTS_FILE):
            return False
        return not has_validation or all(path.is_file() for path in _examples(output / MANIFEST_FILE))
    except (OSError, ValueError, TypeError, KeyError):  # a file is missing or damaged
        return False


def is_encoded(output: Path) -> bool:
    """Whether a folder of latents has every file that its index names."""
    try:
        index = json.loads((output / INDEX_FILE).read_text(encoding="utf-8"))
        return {entry.name for entry in os.scandir(output)}.issuperset(_shards(index))
    except (OSError, ValueError, TypeError, KeyError):  # a file is missing or damaged
        return False


def describe_videos(folder: Path) -> list[str]:
    """A line for each video or array of maps, which changes when it is replaced. Hidden files do not count."""
    kinds = ("*.mp4", "*.mkv", "*.npz")
    paths = sorted(path for kind in kinds for path in folder.glob(kind) if not path.name.startswith("."))
    found = [(path.name, FileStamp.from_stat(path.stat() if path.exists() else path.lstat())) for path in paths]
    return [f"{name} {stamp.size} {stamp.mtime_ns} {stamp.ctime_ns}" for name, stamp in found]


def _are_as_noted(videos: Path, note: Path) -> bool:
    """Compares size and times: a video may have been replaced while `prepare` was still reading others."""
    for name, values in json.loads(note.read_text(encoding="utf-8")).items():
        noted = FileState.from_json(values)
        if noted is None or noted.stamp != FileStamp.of(videos / name):
            return False
    return True


def _shards(index: dict[str, Any]) -> Iterator[str]:
    for shard in index["shards"]:
        yield (shard["zip_data"] or shard["raw_data"])["basename"]


def _added_maps(index: dict[str, Any]) -> Any:
    """The maps of dancers that the folder has beyond those of the first version."""
    return index.get("dreamdance", {}).get("settings", {}).get("added_maps", [])


def _examples(manifest: Path) -> Iterator[Path]:
    for line in manifest.read_text(encoding="utf-8").split("\n"):
        entry = json.loads(line) if line else {}
        yield from (manifest.parent / entry[name] for name in EXAMPLE_FIELDS if name in entry)
