"""Ranks of `prepare` that are all killed when one of them has kept the first new result of a stage."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dreamdance.data.annotation.side_files import SideFiles, StageKey
from dreamdance.data.prepare import prepare
from dreamdance.recipe.schema import PrepareRecipe
from dreamdance.runtime.ranks import Ranks


def prepare_in(
    ranks: Ranks, *, work: str, recipe: str, deadly_stage: str | None, environment: Mapping[str, str]
) -> None:
    """Runs `prepare` on one rank, in `work`. The rank that keeps a result of `deadly_stage` dies at once, and the
    others wherever they are."""
    os.environ.update(environment)
    os.chdir(work)
    numbers = Path(work) / f"processes_{ranks.start}"
    numbers.mkdir(exist_ok=True)
    (numbers / f"{ranks.rank}.{os.getpid()}").touch()
    keep = SideFiles.keep

    def keep_and_die(self: SideFiles, key: StageKey, arrays: Mapping[str, NDArray[Any]]) -> None:
        keep(self, key, arrays)
        if key.stage != deadly_stage:
            return
        while len(found := list(numbers.iterdir())) < ranks.world_size:
            time.sleep(0.01)
        for number in sorted((int(path.suffix[1:]) for path in found), key=os.getpid().__eq__):
            os.kill(number, signal.SIGKILL)

    SideFiles.keep = keep_and_die  # type: ignore[method-assign]
    prepare(PrepareRecipe.model_validate_json(recipe), Path("killed"))
