"""`tools/demo.sh`: what it refuses, the commands that it starts and their budgets, and what it says.

The script runs as it is, by a link, in a folder that has little else. Where `tools/setup.sh` is missing there, a
command that is not refused ends before anything is made. Elsewhere a file in the launcher's place writes the commands
down, and the real recipes read their words: the trainings themselves take minutes (`tools/claims.sh demo` runs them).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamdance.media.video import write_video
from dreamdance.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "demo.sh"
TOY = "(a toy: these networks know rendered people only)"
IN_ORDER = ["prepare", "stage1_domains", "stage1_geometry", "stage1_temporal", "stage2", "animate", "evaluate"]
STEP = re.compile(r"^step (\w+) (\d+) '[^']+'(.*)$", re.MULTILINE)
LAUNCHER = """
import json, sys, time
with open("commands.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
time.sleep(1.1 * ("slow=true" in sys.argv))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script alone, and a photo and a video of a user in another one."""
    folder = tmp_path / "checkout"
    (folder / "tools").mkdir(parents=True)
    (folder / "tools" / "demo.sh").symlink_to(SCRIPT)
    Image.new("RGB", (32, 48)).save(tmp_path / "photo.png")
    write_video(tmp_path / "dance.mp4", [np.zeros((48, 32, 3), np.uint8)] * 4, fps=8.0)
    return folder


@pytest.fixture
def runnable(checkout: Path) -> Path:
    """The same, with the recipes, an environment that is ready, and a launcher that writes down its words."""
    (checkout / "recipes").symlink_to(ROOT / "recipes")
    (checkout / "tools" / "setup.sh").touch()
    (checkout / "launchers").mkdir()
    (checkout / "launchers" / "slurm.py").write_text(LAUNCHER)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return checkout


def demo(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(checkout / "tools" / "demo.sh"), *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=checkout.parent, env=environment, capture_output=True, text=True, timeout=60)


def contents(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def commands(checkout: Path) -> list[list[str]]:
    return [json.loads(line) for line in (checkout / "commands.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--scratch"], "unknown option --scratch; the options are --from-scratch, --image and --video"),
        (["--image"], "--image needs a file, not ''"),
        (["--video", "absent.mp4"], "--video needs a file, not 'absent.mp4'"),
        (["--image", "photo.png"], "--image and --video belong together"),
        (["--video", "dance.mp4"], "--image and --video belong together"),
        (["one", "seed=1", "two"], "two folders for runs: one and two"),
        (["--image", "photo.png", "--video", "dance.mp4"], "to find people in them, run first: bash tools/networks.sh"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_made(checkout, words, text):
    before = contents(checkout.parent)
    done = demo(checkout, *words)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"demo.sh: {text}\n", "")
    assert contents(checkout.parent) == before


@pytest.mark.parametrize(
    ("words", "runs"), [([], "runs"), (["mine"], "mine"), (["--from-scratch"], "runs/from_scratch")]
)
def test_runs_of_an_older_size_are_refused_with_the_command_that_removes_them(checkout, words, runs):
    stored = checkout / runs / "demo_prepare" / "recipe.yaml"
    stored.parent.mkdir(parents=True)
    stored.write_text("dancers:\n  width: 32\n  height: 48\n")
    before = contents(checkout)
    done = demo(checkout, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        f"{runs} has runs of an older demo, of 32x48 pixels: rm -r {runs}/demo_* data/demo results/demo" in done.stderr
    )
    assert contents(checkout) == before
    stored.write_text("dancers:\n  width: 64\n  height: 96\n")
    assert "tools/setup.sh" in demo(checkout, *words).stderr, "runs of today's size go on"


def test_help_is_the_header_and_names_every_option(checkout):
    for option in ("--help", "-h"):
        done = demo(checkout, option)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Runs the whole method on rendered dancers")
        assert "#" not in done.stdout
        assert "set -euo" not in done.stdout
        for word in ("--from-scratch", "--image", "--video", "RUNS", "KEY=VALUE", "toy"):
            assert word in done.stdout


def test_every_part_has_a_recipe_and_the_budgets_add_up_to_ten_minutes_at_most():
    steps = STEP.findall(SCRIPT.read_text(encoding="utf-8"))
    assert len(steps) == SCRIPT.read_text(encoding="utf-8").count("\nstep "), "the pattern finds all steps"
    own = [step for step in steps if "name=own_animate" in step[2]]
    assert [recipe for recipe, _, _ in steps if (ROOT / f"recipes/demo/{recipe}.yaml").is_file()] == [
        *IN_ORDER,
        "animate",
    ]
    assert len(own) == 1
    assert sum(int(budget) for _, budget, _ in steps) - int(own[0][1]) <= 600


def test_the_demo_starts_all_parts_in_order_with_words_that_the_recipes_accept(runnable):
    done = demo(runnable, "mine", "seed=1")
    assert done.returncode == 0, done.stderr
    started = commands(runnable)
    assert [words[0] for words in started] == [f"recipes/demo/{name}.yaml" for name in IN_ORDER]
    for words in started:
        assert words[1:5] == ["--cluster", "local", "--follow", "--runs"]
        assert words[5] == "mine"
        assert load_recipe(ROOT / words[0], words[6:]).seed == 1
    assert [load_recipe(ROOT / words[0], words[6:]).task for words in started][-2:] == ["animate", "evaluate"]
    animate, evaluate = (load_recipe(ROOT / words[0], words[6:]) for words in started[-2:])
    assert Path(animate.output) == Path(evaluate.results) == Path("results/demo")
    last = done.stdout.rstrip().splitlines()[-2:]
    assert TOY in last[0], "the warning stands beside the command"
    assert last[1] == "  bash tools/networks.sh && bash tools/demo.sh mine seed=1 --image photo.jpg --video dance.mp4"
    for file in (
        "side_by_side.mp4",
        "contact_sheet.png",
        "mine/demo_evaluate/report.html",
        "mine/demo_evaluate/table.md",
    ):
        assert file in done.stdout
    assert "over its budget" not in done.stdout


def test_from_scratch_all_networks_are_random_of_the_base_models_shape(runnable):
    done = demo(runnable, "--from-scratch")
    assert done.returncode == 0, done.stderr
    started = {words[0]: words[5:] for words in commands(runnable)}
    assert {words[0] for words in started.values()} == {"runs/from_scratch"}
    for name, base in (("stage1_domains", "image"), ("stage1_geometry", "image"), ("stage2", "video")):
        words = started[f"recipes/demo/{name}.yaml"][1:]
        recipe = load_recipe(ROOT / f"recipes/demo/{name}.yaml", words)
        stored = json.loads((ROOT / f"recipes/base/{base}/config.json").read_text(encoding="utf-8"))
        assert recipe.model.unet.path is None
        assert recipe.model.unet.config == {key: value for key, value in stored.items() if key[0] != "_"}
    assert recipe.model.unfreeze == "all", "of stage 2: a frozen random network is noise"
    assert "bash tools/demo.sh --from-scratch --image photo.jpg" in done.stdout


def test_your_photo_and_video_become_one_entry_that_is_animated_last(runnable):
    (runnable / "weights" / "networks" / "mediapipe").mkdir(parents=True)
    done = demo(runnable, "--image", "photo.png", "--video", "dance.mp4")
    assert done.returncode == 0, done.stderr
    *parts, own = commands(runnable)
    assert len(parts) == len(IN_ORDER)
    recipe = load_recipe(ROOT / own[0], own[6:])
    assert (recipe.name, str(recipe.output)) == ("own_animate", "results/own")
    (entry,) = [json.loads(line) for line in (runnable / recipe.manifest).read_text().splitlines()]
    image, video = (str(runnable.parent / name) for name in ("photo.png", "dance.mp4"))
    assert entry == {"id": "photo_dance", "image": image, "video": video, "align": "bones"}
    assert "results/own/photo_dance/side_by_side.mp4. It is a toy" in done.stdout


def test_a_part_that_took_longer_than_its_budget_is_marked_in_the_list(runnable):
    function = re.search(r"^step\(\) \{.*?^\}", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert function is not None
    lines = [
        "set -euo pipefail; started=$SECONDS parts=() overrides=() runs=runs",
        function[0],
        "step prepare 0 Slow slow=true; step prepare 60 Quick; printf '%s\\n' \"${parts[@]}\"",
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=runnable, capture_output=True, text=True, timeout=60, check=True
    )
    slow, quick = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r" +[1-9]\d* s of   0 s  Slow  over its budget", slow)
    assert re.fullmatch(r" +\d+ s of  60 s  Quick", quick)
