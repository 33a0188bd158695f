"""The command as a user runs it: real processes, from another folder, killed and interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamdance.launch.submission import last_job
from dreamdance.run_layout import complete_steps, progress_file

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, str(ROOT / "launchers" / "slurm.py")]
DEMO = ROOT / "recipes" / "demo"
FEW = ["dancers.num_train_clips=6", "dancers.num_validation_clips=2", "clips_per_part=4"]
# Long enough to be killed in the middle, whatever the demo's own numbers are.
ENDLESS = [
    "max_steps=100000",
    "batch_size=4",
    "micro_batch_size=2",
    "optimizer.warmup_steps=5",
    "logging.every_steps=1",
]
ENDLESS += ["checkpoint.every_steps=5", "validation.loss_every_steps=100000", "validation.sample_every_steps=100000"]
ENDLESS += ["validation.num_loss_clips=2", "validation.num_sample_clips=1", "cluster.tasks_per_node=2"]
ENDLESS += ["cluster.gpus_per_node=0", "precision=fp32"]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a few clips, prepared by the command itself."""
    folder = tmp_path_factory.mktemp("work")
    done = launch(folder, DEMO / "prepare.yaml", *FEW, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder
    for run in (folder / "runs").iterdir():
        assert processes_of(run) == [], "a test left processes behind"


def environment():
    """The user's, without what another test or a surrounding job may have set."""
    names = ("SUBMITIT", "SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return kept | {"OMP_NUM_THREADS": "1"}


def launch(folder, *words):
    return subprocess.run(
        [*LAUNCHER, *map(str, words)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def processes_of(run_folder):
    """Everything that runs for a run: controller, ranks, and what they started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        mine = any(word.startswith(str(run_folder)) for word in words)
        if mine and state != "Z":
            found.append((int(entry.name), words))
    return sorted(found)


def ranks_of(run_folder):
    return [pid for pid, words in processes_of(run_folder) if "dreamdance.launch.rank" in words]


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def steps_shown(run_folder):
    log = progress_file(run_folder)
    return log.read_text().count('"loss"') if log.is_file() else 0


def start_training(folder, name):
    """Starts an endless training and returns once it has taken steps and has a checkpoint."""
    run_folder = folder / "runs" / name
    before = steps_shown(run_folder)
    started = launch(folder, DEMO / "stage1_domains.yaml", f"name={name}", *ENDLESS, "--cluster", "local")
    assert started.returncode == 0, started.stdout + started.stderr
    wait_until(lambda: steps_shown(run_folder) > before + 6, 120, "steps of the training")
    wait_until(lambda: complete_steps(run_folder), 60, "a checkpoint")  # it is finished in the background
    return run_folder


def test_a_finished_run_says_so_in_one_line_and_a_changed_one_is_refused(folder):
    again = launch(folder, DEMO / "prepare.yaml", *FEW)
    assert (again.returncode, again.stdout.count("\n")) == (0, 1)
    assert "is finished" in again.stdout
    changed = launch(folder, DEMO / "prepare.yaml", *FEW, "seed=1")
    assert changed.returncode == 3
    assert "seed: 0 -> 1" in changed.stderr
    assert "demo_prepare  prepare  finished" in launch(folder, "status").stdout


def test_a_users_error_in_the_job_is_shown_in_its_own_words_and_ends_with_1(folder):
    (folder / "videos").mkdir()
    for name in ("a.rgb.mp4", "a.pose.mp4"):
        (folder / "videos" / name).write_bytes(b"no video")
    words = ["videos.folder=videos", "output=data/videos", "num_workers=1", "--follow", "--cluster", "local"]
    done = launch(folder, ROOT / "recipes" / "prepare.yaml", *words)
    assert done.returncode == 1
    assert "set `videos.split_by` to time" in done.stderr
    assert "Traceback" not in done.stderr
    assert "_log.out" in done.stderr


def test_a_killed_rank_ends_the_others_within_seconds_and_the_same_command_goes_on(folder):
    run_folder = start_training(folder, "killed")  # its launcher has ended: the job outlived it
    assert len(ranks_of(run_folder)) == 2
    again = launch(folder, DEMO / "stage1_domains.yaml", "name=killed", *ENDLESS, "--cluster", "local")
    assert again.returncode == 0
    assert "already running" in again.stdout
    os.kill(ranks_of(run_folder)[1], signal.SIGKILL)
    wait_until(lambda: processes_of(run_folder) == [], 15, "the other rank's end")
    shown = launch(folder, "status", "killed").stdout
    assert "rank 1 was killed by SIGKILL" in shown

    words = ["name=killed", *ENDLESS, "--follow", "--cluster", "local"]
    command = [*LAUNCHER, str(DEMO / "stage1_domains.yaml"), *words]
    before = steps_shown(run_folder)
    follower = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: steps_shown(run_folder) > before + 3, 120, "steps of the resumed training")
    follower.send_signal(signal.SIGINT)
    output, errors = follower.communicate(timeout=30)
    assert processes_of(run_folder) == [], "Ctrl-C with --follow leaves nothing running"
    assert "resuming" in output
    assert "Traceback" not in errors
    assert follower.returncode == 130


def test_an_interrupted_sweep_starts_none_of_its_other_runs(folder):
    words = ["name=swept", "output=data/swept", "dancers.num_train_clips=500", "--sweep", "seed=1,2"]
    sweep = subprocess.Popen(
        [*LAUNCHER, str(DEMO / "prepare.yaml"), *words, "--cluster", "local"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(progress_file(folder / "runs" / "swept_seed_1").is_file, 60, "the first run's progress")
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate(timeout=30)
    assert sweep.returncode == 130
    assert "Traceback" not in errors
    assert not (folder / "runs" / "swept_seed_2").exists()


def test_a_killed_controller_takes_its_ranks_along_and_cancel_ends_a_job(folder):
    run_folder = start_training(folder, "cancelled")
    os.kill(last_job(run_folder).pid, signal.SIGKILL)
    wait_until(lambda: processes_of(run_folder) == [], 10, "the ranks' end")
    assert "failed" in launch(folder, "status").stdout.split("cancelled", 1)[1].splitlines()[0]

    run_folder = start_training(folder, "cancelled")
    assert launch(folder, "cancel", "cancelled").returncode == 0
    assert processes_of(run_folder) == []
    assert "cancelled (local job" in launch(folder, "status").stdout


def test_the_launcher_loads_no_torch_and_keeps_its_own_folder_off_the_path(folder):
    program = f"""
import runpy, sys
sys.argv = [{LAUNCHER[1]!r}, "status"]
sys.path.insert(0, {str(ROOT / "launchers")!r})  # as Python itself does for a script
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules
assert {str(ROOT / "launchers")!r} not in sys.path
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
