"""Reports how far the writing of shards is: parts, videos per hour, and videos that could not be used."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from dreamdance.data.prepare_notes import write_damaged
from dreamdance.data.writing.shard_writer import ShardFolder, newly_damaged
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import PrepareRecipe
from dreamdance.runs.damaged_videos import read_damaged
from dreamdance.runs.layout import ProgressLog
from dreamdance.runs.work_queue import Share
from dreamdance.runtime.ranks import Ranks

COUNT_SECONDS = 3.0  # the main rank counts the finished parts at most this often
# It reads the results of all parts at most this often, to count those that failed.
FAILURES_SECONDS = 30.0


def count_failed(recipe: PrepareRecipe, count: int) -> dict[str, int]:
    """The number of videos that cannot be used, under the name that the progress shows; empty if there are none."""
    if recipe.videos is None or not count:
        return {}
    return {"videos_left_out" if recipe.videos.on_error == "skip" else "videos_unusable": count}


class WritingReport:
    """Writes a line to the progress log when more parts are done; only the main rank does so."""

    def __init__(
        self, recipe: PrepareRecipe, folders: Sequence[ShardFolder], share: Share, progress: ProgressLog, ranks: Ranks
    ) -> None:
        self._recipe, self._folders, self._share, self._progress = recipe, folders, share, progress
        self._is_off = not ranks.is_main
        self._total = sum(len(folder.parts) for folder in folders)
        # With `split_by: time` a video has a part in each split.
        by_time = recipe.videos is not None and recipe.videos.split_by == "time"
        self._parts_per_video = len(folders) if by_time else 1
        self._failed = 0
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
            numbers |= count_failed(self._recipe, self._failed)
        self._progress.write(
            done=done, total=self._total, unit="parts", message=f"writing {self._recipe.output}", **numbers
        )

    def _count_failures(self) -> None:
        """Adds the videos that failed since the last look to the table, where `status` finds their reasons."""
        output = Path(self._recipe.output)
        found = {printable(name): reason for name, reason in newly_damaged(self._folders, self._share).items()}
        known = read_damaged(output)
        if not found.keys() <= known.keys():
            write_damaged(output, known | found)
        self._failed = len(known | found)
        self._looked = time.monotonic()
