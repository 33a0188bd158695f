"""`prepare` on two ranks that find different problems: one error of the main rank, and the others succeed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.video_folders import damage_video, videos_recipe, write_videos

from dreamdance.data.prepare import prepare
from dreamdance.runtime.ranks import START

MAIN_RANK = """
import sys, time
from pathlib import Path
from dreamdance.data import prepare
from dreamdance.errors import UserError
from dreamdance.recipe.schema import PrepareRecipe

check_shares = prepare.check_shares

def wait_and_check_shares(*arguments):
    until = time.monotonic() + 60
    while time.monotonic() < until and not list(Path(sys.argv[2]).glob("queue/stopped")):
        time.sleep(0.1)
    return check_shares(*arguments)

prepare.check_shares = wait_and_check_shares
try:
    prepare.prepare(PrepareRecipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
except UserError as error:
    sys.exit(str(error))
"""


class TwoRanks:
    """The main rank in a process of its own, the other one in this."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes) -> None:
        self.folder, self.output = tmp_path / "videos", tmp_path / "data"
        for seed, name in enumerate("bd"):
            write_videos(self.folder, name, seed=seed)
        self.recipe = videos_recipe(self.output, self.folder, validation_fraction=0.0, **changes)
        self.run = tmp_path / "run"
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", START: "this one"}
        for name, value in place.items():
            monkeypatch.setenv(name, value)

    def start_main(self) -> "subprocess.Popen[str]":
        """Starts the main rank, and returns when it has listed the folder; it continues when the work is stopped."""
        recipe = self.run.with_name("recipe.json")
        recipe.write_text(self.recipe.model_dump_json())
        environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0"}
        command = [sys.executable, "-c", MAIN_RANK, recipe, self.run]
        main = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while time.monotonic() < until and main.poll() is None and not list(self.run.glob("queue/plan")):
            time.sleep(0.1)
        return main


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_look_into_a_folder_before_and_after_a_video_was_added_name_it(tmp_path, monkeypatch, caplog):
    ranks = TwoRanks(tmp_path, monkeypatch)
    shutil.copy(ranks.folder / "b.rgb.mp4", ranks.folder / "c.rgb.mp4")  # without a pose
    main = ranks.start_main()
    write_videos(ranks.folder, "a")
    prepare(ranks.recipe, ranks.run)
    _, text = main.communicate(timeout=60)
    assert main.returncode == 1
    first, *lines = text[text.index("the ranks found different videos in") :].splitlines()
    assert first.endswith("Start it again when the folder (`videos.folder`) does not change any more")
    assert lines == ["  a: not on rank 0"]
    assert not list(ranks.output.glob("*/index.json"))
    assert text.count("c.rgb.mp4 is left out") == 1
    assert "is left out" not in caplog.text, "one rank reports it for all"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_finds_damage_succeeds_and_the_main_rank_fails_with_the_list(tmp_path, monkeypatch, caplog):
    """If it ended with the error too, Slurm might stop the main rank before the list is written."""
    ranks = TwoRanks(tmp_path, monkeypatch)
    damage_video(ranks.folder / "d.rgb.mp4")
    main = ranks.start_main()
    prepare(ranks.recipe, ranks.run)
    assert "d cannot be used: " in caplog.text, "this rank found it"
    _, text = main.communicate(timeout=60)
    assert main.returncode == 1
    assert "1 of the videos are damaged" in text
    assert (ranks.output / "damaged_videos.tsv").read_text().splitlines()[1].startswith("d\t")
