"""Reports how far the writing of shards is: parts, videos per hour, and videos that could not be used."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from dreamdance.data.planning import part_names
from dreamdance.data.prepare_notes import join_reasons, write_damaged, write_without_clips
from dreamdance.data.writing.shard_writer import ShardFolder, newly_empty
from dreamdance.data.writing.video_clips import Split
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import PrepareRecipe
from dreamdance.runs.damaged_videos import read_damaged
from dreamdance.runs.layout import ProgressLog
from dreamdance.runs.work_queue import Share
from dreamdance.runtime.ranks import Ranks

COUNT_SECONDS = 3.0  # the main rank counts the finished parts at most this often
# It reads the results of all parts at most this often, to count those that failed.
FAILURES_SECONDS = 30.0


def count_failed(recipe: PrepareRecipe, num_damaged: int, num_without_clips: int) -> dict[str, int]:
    """The numbers of videos without clips, under the names that the progress shows; only those that are not 0."""
    if recipe.videos is None:
        return {}
    of_damaged = "videos_left_out" if recipe.videos.on_error == "skip" else "videos_unusable"
    counts = {of_damaged: num_damaged, "videos_without_clips": num_without_clips}
    return {name: count for name, count in counts.items() if count}


class WritingReport:
    """Writes a line to the progress log when more parts are done; only the main rank does so."""

    def __init__(
        self,
        recipe: PrepareRecipe,
        folders: Mapping[Split, ShardFolder],
        share: Share,
        progress: ProgressLog,
        ranks: Ranks,
        *,
        without_clips: Mapping[str, Mapping[str, str]],
    ) -> None:
        """Counts nothing yet.

        Args:
            recipe: names the output, and what happens to damaged videos.
            folders: the folders of the parts.
            share: the parts to write.
            progress: the log.
            ranks: this process.
            without_clips: split -> name -> why a video whose part is kept gave this split no clip.
        """
        self._recipe, self._folders, self._share, self._progress = recipe, list(folders.values()), share, progress
        self._kept, self._planned = without_clips, {str(split): part_names(one.parts) for split, one in folders.items()}
        self._is_off = not ranks.is_main
        self._total = sum(len(folder.parts) for folder in self._folders)
        # With `split_by: time` a video has a part in each split.
        by_time = recipe.videos is not None and recipe.videos.split_by == "time"
        self._parts_per_video = len(folders) if by_time else 1
        self._num_damaged = self._num_without_clips = 0
        self._last, self._counted, self._looked = -1, -math.inf, time.monotonic()
        self._started: tuple[float, int] | None = None

    def __call__(self) -> None:
        """Counts, if the last count is old enough, and reports a change."""
        now = time.monotonic()
        if self._is_off or now - self._counted < COUNT_SECONDS:
            return
        self._counted = now
        done = self._total - len(self._share.items) + self._share.num_done()
        if done == self._last:
            return
        self._last = done
        self._started = self._started or (now, done)
        numbers: dict[str, float] = {}
        if self._recipe.videos is not None:
            if done > self._started[1]:
                pace = (done - self._started[1]) / (now - self._started[0])
                numbers["videos_per_hour"] = 3600 * pace / self._parts_per_video
            if now - self._looked >= FAILURES_SECONDS:
                self._count_failures()
            numbers |= count_failed(self._recipe, self._num_damaged, self._num_without_clips)
        self._progress.write(
            done=done, total=self._total, unit="parts", message=f"writing {self._recipe.output}", **numbers
        )

    def _count_failures(self) -> None:
        """Adds the videos without clips since the last look to the tables, where `status` finds their reasons."""
        output, empty = Path(self._recipe.output), newly_empty(self._folders, self._share)
        without = {split: {**kept, **empty.without_clips[split]} for split, kept in self._kept.items()}
        if any(empty.without_clips.values()):
            write_without_clips(output, joined := join_reasons(without, self._planned))
            self._num_without_clips = len(joined)
        found = {printable(name): reason for one in empty.damaged.values() for name, reason in one.items()}
        known = read_damaged(output)
        if not found.keys() <= known.keys():
            write_damaged(output, known | found)
        self._num_damaged = len(known | found)
        self._looked = time.monotonic()
