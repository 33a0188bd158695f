"""What `prepare` shows before it works (`--dry-run`) and when it is done: videos, machine, clips, page, next."""

import os
from pathlib import Path

import numpy as np
from support.video_folders import videos_recipe, write_videos

from dreamdance.data import source_report
from dreamdance.data.contact_sheets import show_output
from dreamdance.data.prepare import prepare
from dreamdance.data.source_report import describe_videos
from dreamdance.launch.preflight import oversize
from dreamdance.launch.prepared_output import describe_clips, next_command
from dreamdance.launch.status import details
from dreamdance.media.video import write_video
from dreamdance.recipe import dump_recipe, load_recipe
from dreamdance.runs.layout import RECIPE_FILE
from dreamdance.runs.work_queue import WorkQueue
from dreamdance.runtime.ranks import Ranks

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_plan_counts_videos_sizes_and_seconds_and_names_annotators(tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    for name, frames, height in (("a", 16, 32), ("b", 40, 32), ("c", 8, 64)):
        write_video(folder / f"{name}.mp4", np.zeros((frames, height, 48, 3), np.uint8), fps=8)
    write_video(folder / "b.mask.mp4", np.zeros((40, 32, 48, 3), np.uint8), fps=8)
    (folder / "d.mp4").write_bytes(b"no video")
    recipe = videos_recipe(tmp_path / "data", folder, annotators={"weights": str(tmp_path / "nowhere")})
    lines = describe_videos(recipe).splitlines()
    assert lines[0] == f"videos: 4 in {folder}"
    assert lines[1] == "  about 11 s in all (11s)", "4 x the mean of 2, 5 and 1 seconds, for the fourth is not known"
    assert "  sizes: 2 x 48x32, 1 x 48x64" in lines
    assert "  frames per second: 3 x 8" in lines
    assert "  given beside them: 1 x mask" in lines
    assert "  cannot be read: 1 of 4" in lines
    assert "d.mp4" in lines[lines.index("  cannot be read: 1 of 4") + 1]
    assert lines[-1] == (
        "  annotators: pose blazepose, mask blazepose, depth body, normal body, cuts histogram; weights in "
        f"{tmp_path / 'nowhere'}, which does not exist, on cpu"
    )
    monkeypatch.setattr(source_report, "MAX_PROBED", 2)  # a and c
    lines = describe_videos(recipe).splitlines()
    assert lines[1] == "  about 6 s in all (6s) (from the headers of 2 of them)", "4 x the mean of 2 and 1 seconds"


def test_the_plan_states_what_is_wrong_with_the_folder(tmp_path):
    text = describe_videos(videos_recipe(tmp_path / "data", tmp_path))
    assert text.startswith("videos: no videos in ")
    assert "videos.folder" in text
    dancers = load_recipe(RECIPES / "demo" / "prepare.yaml")
    assert describe_videos(dancers) == ""


def test_more_processes_and_memory_than_the_machine_has_are_a_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    large = load_recipe(RECIPES / "prepare.yaml", ["cluster.memory_gib=999999"])
    processes, memory = oversize(large).splitlines()
    assert processes.startswith("warning: 32 processes would work on 2 cores (num_workers x cluster.tasks_per_node)")
    assert processes.endswith("num_workers=2 fits this machine")
    assert memory.startswith("warning: the recipe is written for 999999 GiB (cluster.memory_gib), this machine has ")
    small = load_recipe(RECIPES / "prepare.yaml", ["num_workers=2", "cluster.memory_gib=1"])
    assert oversize(small) == ""


def test_the_end_names_clips_page_and_the_next_command(tmp_path):
    for name in "abcd":
        write_videos(tmp_path / "videos", name, with_maps=True)
    recipe = videos_recipe(tmp_path / "data", tmp_path / "videos", validation_fraction=0.25)
    assert describe_clips(recipe) == {}
    prepare(recipe, tmp_path / "run")
    page = tmp_path / "data" / "contact_sheets" / "index.html"
    assert page.is_file()
    assert describe_clips(recipe) == {"clips": "9 for training, 3 for validation", "page": str(page)}
    command = next_command(recipe, RECIPES / "prepare.yaml", Path("runs"))
    assert command is not None
    assert command.endswith(
        f"{RECIPES / 'stage1_domains.yaml'} data.train.local={tmp_path / 'data' / 'train'} "
        f"data.validation.local={tmp_path / 'data' / 'validation'}"
    )
    assert next_command(recipe, tmp_path / "mine.yaml", Path("runs")) is None, "no such recipe is beside it"
    (tmp_path / "run" / RECIPE_FILE).write_text(dump_recipe(recipe))
    assert details(tmp_path / "run").splitlines()[-2:] == [
        "  clips        9 for training, 3 for validation",
        f"  page         {page}",
    ]
    for path in (tmp_path / "videos").glob("*.normal.mp4"):
        path.unlink()
    assert next_command(recipe, RECIPES / "prepare.yaml", Path("runs")) is None, "stage 1 needs normals"


def test_a_rank_that_joins_after_an_error_shows_nothing(tmp_path):
    with WorkQueue(Ranks()) as queue:
        show_output(tmp_path / "data", queue, num_played=3)
    assert not (tmp_path / "data").exists()
