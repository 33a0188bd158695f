"""Finds videos of the same footage before the split is drawn, so that none of them lies on both sides of it.

The hashes of all videos are kept in `output`/same_footage.json: a later start hashes only videos that changed.
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from dreamdance.data.annotation.video_stages import small_frames
from dreamdance.data.curation.duplicates import (
    VideoHashes,
    check_leaks,
    find_groups,
    hash_video,
)
from dreamdance.data.writing.map_files import as_video
from dreamdance.data.writing.video_list import listed_videos
from dreamdance.data.writing.video_opening import open_videos
from dreamdance.errors import is_transient
from dreamdance.media.video import VideoError
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import VideosSource
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.files import write_atomically
from dreamdance.runs.work_queue import WorkQueue

logger = logging.getLogger(__name__)

HASHES_FILE = "same_footage.json"
# An error of a log line lists at most this number of groups.
_MAX_GROUPS = 20


def group_footage(
    source: VideosSource, output: Path, queue: WorkQueue, *, skipped: Collection[str] = ()
) -> list[list[str]]:
    """Hashes all videos with the other ranks, and groups those that show the same footage.

    Args:
        source: the folder of the videos.
        output: the folder of the shards.
        queue: the ranks share the videos by it.
        skipped: names of damaged videos of a complete output, whose files may be gone.

    Returns:
        All names in groups, most of one name, in alphabetical order.
    """
    found = listed_videos(source)
    names = sorted({*found, *skipped})
    known = read_hashes(output)
    share = queue.share("hashes", found)
    for name in share.take():
        if name is not None:
            share.finish(name, json.dumps(_hash(source, name, known.get(name), queue)))
    fresh = share.results()
    queue.once("same_footage", lambda: _write(output, {name: json.loads(text) for name, text in fresh.items()}))
    hashes = _named(read_hashes(output), names)
    groups = find_groups(names, hashes, before_video=_comparing(queue))
    same = [group for group in groups if len(group) > 1]
    if same and queue.ranks.is_main:
        lines = "\n".join("  " + ", ".join(map(printable, group)) for group in same[:_MAX_GROUPS])
        logger.info(
            "%d groups of videos show the same footage; each stays on one side of the split:\n%s", len(same), lines
        )
    return groups


def report_leaks(output: Path, splits: Mapping[Any, Collection[str]], queue: WorkQueue) -> None:
    """Logs that no footage is on both sides of the split, after a comparison of all videos of one with the other."""
    entries = read_hashes(output)
    train, validation = (_named(entries, splits.get(split, ())) for split in ("train", "validation"))
    leaks = check_leaks(train, validation, before_video=_comparing(queue))
    if leaks:  # the groups exclude it
        raise ValueError(f"footage on both sides of the split: {leaks[:_MAX_GROUPS]}")
    logger.info(
        "no footage is on both sides of the split: %d training videos were compared with %d validation videos",
        len(train),
        len(validation),
    )


def read_hashes(output: Path) -> dict[str, dict[str, Any]]:
    """What an earlier start found: name -> the file's state and the hashes; empty if there is no sound file."""
    path = output / HASHES_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for entry in content.values():
            VideoHashes.from_json(entry["hashes"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): all videos are hashed again", path, error)
        return {}
    return dict(content)


def _named(entries: Mapping[str, Mapping[str, Any]], names: Collection[str]) -> list[VideoHashes]:
    """The hashes of videos; those that are new since the file was written have none."""
    wanted = set(names)
    return [VideoHashes.from_json(entry["hashes"]) for name, entry in entries.items() if name in wanted]


def _comparing(queue: WorkQueue) -> Callable[[str], None]:
    """Reports to the watchdog, before a video is compared, that this process is at work."""
    return lambda name: queue.watchdog.enter("comparing the footage of videos", printable(name))


def _hash(source: VideosSource, name: str, known: Mapping[str, Any] | None, queue: WorkQueue) -> dict[str, Any]:
    """The state of a video's file and its hashes. A video that cannot be read has none: it is reported later."""
    queue.watchdog.enter("hashing videos", printable(name))
    empty = hash_video(name, [], fps=1.0).to_json()
    try:
        video = as_video(open_videos(source, name)["rgb"])
        before = None if known is None else FileState.from_json(known["state"])
        state = read_state(video.path, before, on_block=lambda: queue.watchdog.enter("hashing videos", printable(name)))
        if known is not None and state is not None and state == before:
            return dict(known)
        frames = []
        for small in small_frames(video):
            queue.watchdog.enter("hashing videos", printable(name))
            frames.append(small)
        return {"state": state and state.to_json(), "hashes": hash_video(name, frames, fps=video.fps).to_json()}
    except VideoError as error:
        if is_transient(error):
            raise
        return {"state": None, "hashes": empty}


def _write(output: Path, entries: Mapping[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / HASHES_FILE, json.dumps(entries))
