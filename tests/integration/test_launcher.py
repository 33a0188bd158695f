"""The command as a user runs it: real processes, from another folder, killed and interrupted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from support.fault_log import record_fault

from dreamdance.launch.submission import last_job
from dreamdance.runs.layout import complete_steps, progress_file

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, str(ROOT / "launchers" / "slurm.py")]
DEMO = ROOT / "recipes" / "demo"
FEW = ["dancers.num_train_clips=6", "dancers.num_validation_clips=2", "clips_per_part=4"]
# Long enough to be killed in the middle, independent of the demo's own numbers.
ENDLESS = [
    "max_steps=100000",
    "batch_size=4",
    "micro_batch_size=2",
    "optimizer.warmup_steps=5",
    "logging.every_steps=1",
]
ENDLESS += ["checkpoint.every_steps=5", "validation.loss_every_steps=100000", "validation.sample_every_steps=100000"]
ENDLESS += ["validation.num_loss_clips=2", "validation.num_sample_clips=1", "cluster.tasks_per_node=2"]
ENDLESS += ["cluster.gpus_per_node=0", "precision=fp32", f"model.unet.path={ROOT / 'recipes/base/image'}"]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a few clips, prepared by the command itself."""
    folder = tmp_path_factory.mktemp("work")
    done = launch(folder, DEMO / "prepare.yaml", *FEW, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder
    for run in (folder / "runs").iterdir():
        assert processes_of(run) == [], "the test left processes running"


def environment():
    """The environment of a user, without variables of other tests or of a surrounding job."""
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
    """All processes of a run: controller, ranks, and the processes that they started."""
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


def processes_state(pid):
    """The state letter of a process: T is stopped, Z is ended and not yet collected; None if there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


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
    """Starts an endless training and returns after it has taken steps and has a checkpoint."""
    run_folder = folder / "runs" / name
    before = steps_shown(run_folder)
    started = launch(folder, DEMO / "stage1_domains.yaml", f"name={name}", *ENDLESS, "--cluster", "local")
    assert started.returncode == 0, started.stdout + started.stderr
    wait_until(lambda: steps_shown(run_folder) > before + 6, 120, "steps of the training")
    wait_until(lambda: complete_steps(run_folder), 60, "a checkpoint")  # it is finished in the background
    return run_folder


def test_a_finished_run_is_reported_with_its_clips_and_a_changed_one_is_refused(folder):
    again = launch(folder, DEMO / "prepare.yaml", *FEW)
    assert again.returncode == 0
    first, *output = again.stdout.splitlines()
    assert "is finished" in first
    assert [line.split(":")[0].strip() for line in output] == ["clips", "page", "next"]
    assert "6 for training, 2 for validation" in output[0]
    changed = launch(folder, DEMO / "prepare.yaml", *FEW, "seed=1")
    assert changed.returncode == 3
    assert "seed: 0 -> 1" in changed.stderr
    assert "demo_prepare  prepare  finished" in launch(folder, "status").stdout


def test_an_error_of_the_user_in_the_job_is_shown_with_its_text_and_ends_with_1(folder):
    (folder / "videos").mkdir()
    for name in ("a.rgb.mp4", "a.pose.mp4"):
        (folder / "videos" / name).write_bytes(b"no video")
    words = ["videos.folder=videos", "output=data/videos", "num_workers=1", "--follow", "--cluster", "local"]
    done = launch(folder, ROOT / "recipes" / "prepare.yaml", *words)
    assert done.returncode == 1
    assert "set `videos.split_by` to time" in done.stderr
    assert "Traceback" not in done.stderr
    assert "_log.out" in done.stderr


def test_a_killed_rank_ends_the_others_within_seconds_and_the_same_command_resumes(folder):
    run_folder = start_training(folder, "killed")  # its launcher has ended: the job runs on
    assert len(ranks_of(run_folder)) == 2
    again = launch(folder, DEMO / "stage1_domains.yaml", "name=killed", *ENDLESS, "--cluster", "local")
    assert again.returncode == 4
    job = last_job(run_folder)
    assert f"killed: not submitted again, local job {job.job_id} is already running" in again.stdout
    fault_time = time.monotonic()
    os.kill(ranks_of(run_folder)[1], signal.SIGKILL)
    wait_until(lambda: processes_of(run_folder) == [], 15, "the other rank's end")
    detected = time.monotonic() - fault_time
    shown = launch(folder, "status", "killed").stdout
    assert "rank 1 was killed by SIGKILL" in shown

    words = ["name=killed", *ENDLESS, "--follow", "--cluster", "local"]
    command = [*LAUNCHER, str(DEMO / "stage1_domains.yaml"), *words]
    before = steps_shown(run_folder)
    follower = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: steps_shown(run_folder) > before, 120, "a step of the resumed training")
    record_fault(
        "rank killed, on one machine",
        how="SIGKILL of rank 1 of 2; then the same command again",
        promised="the other rank ends within seconds, status names the rank; the same command resumes",
        happened="ended by the controller; 'rank 1 was killed by SIGKILL'; resumed",
        detected_seconds=detected,
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


def test_a_killed_controller_ends_its_ranks_and_cancel_ends_a_job(folder):
    run_folder = start_training(folder, "cancelled")
    fault_time = time.monotonic()
    os.kill(last_job(run_folder).pid, signal.SIGKILL)
    wait_until(lambda: processes_of(run_folder) == [], 10, "the ranks' end")
    detected = time.monotonic() - fault_time
    assert "failed" in launch(folder, "status").stdout.split("cancelled", 1)[1].splitlines()[0]

    run_folder = start_training(folder, "cancelled")
    record_fault(
        "controller of a local job killed",
        how="SIGKILL of the process that controls two ranks; then the same command again",
        promised="its ranks end too, status shows failed; the same command resumes",
        happened="no process left; started again, it took further steps and saved",
        detected_seconds=detected,
    )
    assert launch(folder, "cancel", "cancelled").returncode == 0
    assert processes_of(run_folder) == []
    assert "cancelled (local job" in launch(folder, "status").stdout


def test_a_run_whose_folder_was_removed_ends_with_a_message_and_does_not_recreate_it(folder):
    run_folder = start_training(folder, "removed")
    command = [*LAUNCHER, str(DEMO / "stage1_domains.yaml"), "name=removed", *ENDLESS, "--cluster", "local", "--follow"]
    follower = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    assert "not submitted again" in follower.stdout.readline()
    before = steps_shown(run_folder)
    wait_until(lambda: steps_shown(run_folder) > before + 1, 60, "steps while it is followed")
    removed = time.monotonic()
    while run_folder.exists():  # a checkpoint may be written at this moment
        shutil.rmtree(run_folder, ignore_errors=True)
    wait_until(lambda: processes_of(run_folder) == [], 90, "the end of the job")  # a minute, if nothing is saved before
    detected = time.monotonic() - removed
    _, errors = follower.communicate(timeout=30)
    assert follower.returncode == 1
    assert f"{run_folder} is gone: it was removed while the job ran" in errors
    assert "Traceback" not in errors
    assert not run_folder.exists(), sorted(run_folder.rglob("*"))
    record_fault(
        "run folder removed while the job runs",
        how="rm -rf of the folder of a training on two ranks under --follow",
        promised="the job ends within a minute, not with 0; the folder is named and not created again",
        happened=errors.strip().replace(str(folder), ""),
        detected_seconds=detected,
    )


MANY = ["dancers.num_train_clips=500", "cluster.tasks_per_node=2", "--cluster", "local"]


def test_a_run_of_a_machine_that_is_gone_is_taken_over_and_only_one_start_continues(folder):
    """The machine is only unreachable: the worst case, because its processes still write."""
    run_folder = folder / "runs" / "distant"
    words = [DEMO / "prepare.yaml", "name=distant", "output=data/distant", *MANY]
    assert launch(folder, *words).returncode == 0
    wait_until(progress_file(run_folder).is_file, 60, "the first start's progress")
    lost = last_job(run_folder)
    old = processes_of(run_folder)
    record = run_folder / "logs" / "job.json"
    record.write_text(json.dumps(asdict(lost) | {"host": "gone-host"}))
    again = launch(folder, *words)
    assert again.returncode == 4
    assert f"not submitted again, local job {lost.job_id} is already running" in again.stdout
    assert "running (local job" in launch(folder, "status", "distant").stdout
    refused = launch(folder, "cancel", "distant")
    assert refused.returncode == 2
    assert "on gone-host cannot be cancelled from this machine" in refused.stderr

    os.kill(lost.pid, signal.SIGSTOP)  # its heartbeat stops, and its ranks continue
    past = time.time() - 61
    wait_until(lambda: processes_state(lost.pid) == "T", 10, "the stop")
    for path in (record, run_folder / "logs" / "heartbeat"):
        os.utime(path, (past, past))
    assert "no heartbeat for 1m 0" in launch(folder, "status", "distant").stdout
    assert "nothing to cancel" in launch(folder, "cancel", "distant").stdout
    fault_time = time.monotonic()
    taken = launch(folder, *words)
    assert taken.returncode == 0, taken.stdout + taken.stderr
    # The rank of the old start that owns the run ends itself; its controller, continued, ends the other rank.
    ranks = [pid for pid, line in old if "dreamdance.launch.rank" in line]
    wait_until(lambda: any(processes_state(pid) in (None, "Z") for pid in ranks), 60, "the old main rank's end")
    detected = time.monotonic() - fault_time
    os.kill(lost.pid, signal.SIGCONT)
    wait_until(lambda: all(processes_state(pid) in (None, "Z") for pid, _ in old), 30, "the old start's end")
    new = last_job(run_folder)
    assert new.host == socket.gethostname()
    assert "already running" in launch(folder, *words).stdout, "the end of the old start is not that of the new one"
    assert not (run_folder / "logs" / f"{lost.job_id}_status.json").exists()
    assert launch(folder, "cancel", "distant").returncode == 0
    assert processes_of(run_folder) == []
    record_fault(
        "machine of a local job gone, or only unreachable",
        how="another host's name in the job's record, its controller stopped, its heartbeat 61 s old; its ranks live",
        promised="the run can be started again after 60 s without a heartbeat; the older start ends itself",
        happened="taken over; the older start ended by itself and wrote nothing into the newer one's folder",
        detected_seconds=detected,
    )


def test_concurrent_launchers_of_one_run_start_one_job_and_the_others_show_its_id(folder):
    words = [*LAUNCHER, str(DEMO / "prepare.yaml"), "name=twice", "output=data/twice", *MANY]
    started = [
        subprocess.Popen(
            words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    job_id = last_job(folder / "runs" / "twice").job_id
    assert sorted(process.returncode for process in started) == [0, 4, 4], outputs
    for process, (output, _) in zip(started, outputs, strict=True):
        refusal = f"twice: not submitted again, local job {job_id} is already running"
        assert (f"twice: local job {job_id}, 2 processes" if process.returncode == 0 else refusal) in output
    assert launch(folder, "cancel", "twice").returncode == 0
    record_fault(
        "two runs of one name, on one machine",
        how="three launchers of one run at once, on this machine",
        promised="one job; the others are refused with its id",
        happened="one job; the others ended with code 4 and its id",
    )


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
