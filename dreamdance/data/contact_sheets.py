"""Shows the output of `prepare` to people: contact sheets of all clips, and one page that plays some of them.

All pictures are read back from the shards, so that they show what is stored.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dreamdance.data.curation.contact_sheet import CLIPS_PER_SHEET, draw_tile, write_contact_sheet
from dreamdance.data.curation.page import PAGE_FILE, PageEntry, describe_clip, write_clip_video, write_page
from dreamdance.data.curation.scores import Scores
from dreamdance.data.curation.shown_clip import SHOWN_MAPS, ShownClip
from dreamdance.data.loading.stored_clip import StoredClip
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.recipe.sections import Shards
from dreamdance.runs.damaged_videos import by_reason, read_damaged, read_without_clips
from dreamdance.runs.layout import DRIVEN_BY, PAGE_PATH
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.ranks import Ranks

SHEETS_FOLDER = PAGE_PATH.partition("/")[0]

_SPLITS = ("train", "validation")
# Clips that are at least this large are shown reduced, so that the smallest stored size of it is enough to read.
_SHOWN_SIZE = (128, 192)


def show_output(output: Path, queue: WorkQueue, *, num_played: int) -> None:
    """Writes `contact_sheets` below a complete output; all ranks share the work. What exists is not written again.

    Args:
        output: the folder with the finished splits.
        queue: the ranks' queue.
        num_played: the largest number of clips on the page; they are spread evenly over the output.

    Raises:
        ShardError: a stored clip is damaged.
        VideoError: a video cannot be written, such as on a full disk.
    """
    shown = _ShownOutput(output, num_played)
    missing = json.loads(queue.agree("contact_sheets", json.dumps(shown.missing_sheets())))
    share = queue.share("contact_sheets", missing)
    for item in share.take():
        if item is not None:
            shown.write_sheet(item, queue)
            share.finish(item)
    if missing:
        queue.once("page", partial(shown.write_page, queue))


class StoredFrames:
    """The frames of one stored map; each is read when it is asked for."""

    def __init__(self, clip: StoredClip, name: str) -> None:
        self._clip, self._name = clip, name
        first = self[0]
        self.shape = (clip.num_frames, *first.shape)

    def __len__(self) -> int:
        return self._clip.num_frames

    def __getitem__(self, frame: int) -> NDArray[Any]:
        picture: NDArray[Any] = self._clip.frames(self._name, [frame])[0]
        return picture


class _ShownOutput:
    """The plan of the sheets and of the page; every rank makes the same."""

    def __init__(self, output: Path, num_played: int) -> None:
        self._output, self._folder = output, output / SHEETS_FOLDER
        self._indices = {split: output / split / INDEX_FILE for split in _SPLITS}
        self._indices = {split: path for split, path in self._indices.items() if path.is_file()}
        counts = {split: read_index(path, may_be_empty=True).num_samples for split, path in self._indices.items()}
        self._counts = {split: count for split, count in counts.items() if count > 0}
        places = [(split, number) for split, count in self._counts.items() for number in range(count)]
        # A rank that joins when all others have left finds no clips if they ended with an error.
        chosen = {place * len(places) // num_played for place in range(num_played if places else 0)}
        self._played = [places[place] for place in sorted(chosen)]
        self._opened: dict[str, StoredClips] = {}

    def missing_sheets(self) -> list[str]:
        """The names of all sheets, such as `train_0000`; none if the page, which is written last, is new enough."""
        page = self._folder / PAGE_FILE
        if page.is_file() and self._is_new(page):
            return []
        return [
            f"{split}_{number:04d}"
            for split, count in self._counts.items()
            for number in range(-(-count // CLIPS_PER_SHEET))
        ]

    def write_sheet(self, name: str, queue: WorkQueue) -> None:
        """Writes a sheet, and before it the videos of those of its clips that the page plays."""
        path = self._folder / f"{name}.png"
        if path.is_file() and self._is_new(path):
            return  # a killed start has written it
        split, _, sheet = name.rpartition("_")
        start, played = int(sheet) * CLIPS_PER_SHEET, set(self._played)
        tiles = []
        for number in range(start, min(start + CLIPS_PER_SHEET, self._counts[split])):
            queue.watchdog.enter("drawing a contact sheet", f"{split}, clip {number}")
            shown = _describe(self._clip(split, number))
            tiles.append(draw_tile(shown))
            if (split, number) in played:
                write_clip_video(self._folder, shown)
        write_contact_sheet(path, tiles)

    def write_page(self, queue: WorkQueue) -> None:
        """Writes the page over the videos that exist by now."""
        entries: list[PageEntry] = []
        for split, number in self._played:
            queue.watchdog.enter("writing the page of clips", f"{split}, clip {number}")
            entries.append(describe_clip(_describe(self._clip(split, number))))
        total = sum(self._counts.values())
        title = f"{self._output.name}, {len(entries)} of {total} clips"
        failures = by_reason(read_damaged(self._output) | read_without_clips(self._output))
        write_page(self._folder, entries, title=title, failures=failures)

    def _clip(self, split: str, number: int) -> StoredClip:
        if split not in self._opened:
            shards = Shards(local=str(self._output / split))
            self._opened[split] = StoredClips(shards, verify="size", ranks=Ranks(), size=_SHOWN_SIZE)
        return self._opened[split].clip(number)

    def _is_new(self, path: Path) -> bool:
        return path.stat().st_mtime_ns >= max(index.stat().st_mtime_ns for index in self._indices.values())


def _describe(clip: StoredClip) -> ShownClip:
    maps = {name: StoredFrames(clip, name) for name in SHOWN_MAPS if clip.has(name)}
    scores = Scores.from_json(clip.metadata.get("scores", {}))
    return ShownClip(clip.clip_id, _source_text(clip.metadata), clip.fps, maps, scores)


def _source_text(metadata: Mapping[str, Any]) -> str:
    """The video and the time span of a clip, or a dancer's seed."""
    if DRIVEN_BY in metadata:
        return f"rendered dancer, seed {metadata['identity_seed']}, in the motion of {metadata[DRIVEN_BY]}"
    if "seed" in metadata:
        return f"rendered dancer, seed {metadata['seed']}"
    if "source" not in metadata:
        return ""
    span = metadata.get("seconds")
    if span is None:
        return f"{metadata['source']}, from frame {metadata.get('first_frame', 0)}"
    return f"{metadata['source']}, {span[0]:.1f} to {span[1]:.1f} s"
