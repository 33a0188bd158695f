"""Whether the output of `prepare`, or of `encode`, is complete and matches its inputs. No torch here."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dreamdance.media.picture_names import find_picture_folders, list_pictures, packed_names
from dreamdance.media.video_names import VIDEO_SUFFIXES
from dreamdance.modalities import ADDED_TO_DANCERS
from dreamdance.recipe import PrepareRecipe
from dreamdance.recipe.schema import VideosSource
from dreamdance.runs.file_states import FileStamp, FileState
from dreamdance.runs.finished_clips import INDEX_FILE, SPLITS
from dreamdance.runs.layout import EXAMPLE_FIELDS, INPUTS_FILE, PAIRS_FILE

MANIFEST_FILE = "manifest.jsonl"
KEYPOINTS_SUFFIX = ".keypoints.json"  # of key points that are given beside a video


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
        if recipe.videos is not None and not _are_as_noted(recipe.videos, output / INPUTS_FILE):
            return False
        manifests = [MANIFEST_FILE] if has_validation else []
        manifests += [PAIRS_FILE] if recipe.dancers is not None and recipe.dancers.pairs else []
        return all(path.is_file() for name in manifests for path in _examples(output / name))
    except (OSError, ValueError, TypeError, KeyError):  # a file is missing or damaged
        return False


def is_encoded(output: Path) -> bool:
    """Whether a folder of latents has every file that its index names."""
    try:
        index = json.loads((output / INDEX_FILE).read_text(encoding="utf-8"))
        return {entry.name for entry in os.scandir(output)}.issuperset(_shards(index))
    except (OSError, ValueError, TypeError, KeyError):  # a file is missing or damaged
        return False


def describe_videos(source: VideosSource) -> list[str]:
    """A line for each file that `prepare` may read, which changes when it is replaced. Hidden files do not count."""
    folder = Path(source.folder)
    suffixes = (".npz", *VIDEO_SUFFIXES, *((KEYPOINTS_SUFFIX,) if source.annotators is not None else ()))
    paths = sorted(path for path in folder.glob("*.*") if path.name.lower().endswith(suffixes) and path.name[0] != ".")
    for name in _picture_folders(source):
        for kind in ("images", "masks"):
            paths += list_pictures(folder / name / kind)
    found = [(path, FileStamp.from_stat(path.stat() if path.exists() else path.lstat())) for path in paths]
    return [f"{path.relative_to(folder)} {stamp.size} {stamp.mtime_ns} {stamp.ctime_ns}" for path, stamp in found]


def _picture_folders(source: VideosSource) -> list[str]:
    return find_picture_folders(source.folder) if source.annotators is not None else []


def _are_as_noted(source: VideosSource, note: Path) -> bool:
    """Compares size and times: a video may have been replaced while `prepare` was still reading others.

    Videos that were made of pictures are left out: each start compares the pictures before it takes such a video, and
    `describe_videos` lists the pictures. So these videos may be deleted.
    """
    packed = {file for name in _picture_folders(source) for file in packed_names(source.folder, name)}
    for name, values in json.loads(note.read_text(encoding="utf-8")).items():
        noted = FileState.from_json(values)
        if name not in packed and (noted is None or noted.stamp != FileStamp.of(Path(source.folder) / name)):
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
