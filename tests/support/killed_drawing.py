"""Ranks of `prepare` that draw contact sheets, some of which are killed in the middle of one."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from dreamdance.data import contact_sheets
from dreamdance.data.curation.contact_sheet import draw_tile
from dreamdance.data.prepare import prepare
from dreamdance.recipe.schema import PrepareRecipe
from dreamdance.runtime.ranks import Ranks


def draw_in(ranks: Ranks, *, recipe: str, run_folder: str, last_clips: tuple[int, int]) -> None:
    """Dies when it begins to draw its n-th clip; with 0 it waits at its first clip until another rank has died."""
    last, death, drawn = last_clips[ranks.rank], Path(run_folder) / f"death_{ranks.start}", 0

    def draw_or_die(clip: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == last:
            death.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + 60
        while last == 0 and time.monotonic() < until and not death.exists():
            time.sleep(0.05)
        return draw_tile(clip)

    vars(contact_sheets).update(CLIPS_PER_SHEET=1, draw_tile=draw_or_die)
    prepare(PrepareRecipe.model_validate_json(recipe), Path(run_folder))
