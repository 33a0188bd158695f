"""Whether `prepare` has finished clips of an output, also of one that is not complete. No torch here."""

import json
from pathlib import Path

# In a folder of shards: the parts that have no place in its index yet.
PARTS_FOLDER = ".parts"
INDEX_FILE = "index.json"
SPLITS = ("train", "validation")


def has_clips(output: Path) -> bool:
    """Whether a folder that holds a folder of shards for each split has a finished clip."""
    return any(has_clips_of_split(output / split) for split in SPLITS)


def has_clips_of_split(folder: Path) -> bool:
    """Whether a folder of shards has a finished clip. A file that cannot be read counts as clips."""
    return any(map(_lists_clips, (folder / INDEX_FILE, *(folder / PARTS_FOLDER).glob(f"[!.]*/{INDEX_FILE}"))))


def _lists_clips(index: Path) -> bool:
    try:
        return any(shard["samples"] for shard in json.loads(index.read_text(encoding="utf-8"))["shards"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError):
        return True
