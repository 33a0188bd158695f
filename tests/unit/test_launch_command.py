"""The command: overrides for the recipe, options for the launcher, and an exit code for each outcome."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.fault_log import record_fault

from dreamdance.console import main as console_main
from dreamdance.launch.command import main
from dreamdance.launch.run_folder import create_or_check
from dreamdance.launch.submission import submit
from dreamdance.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PREPARE, STAGE1 = "recipes/demo/prepare.yaml", "recipes/demo/stage1_domains.yaml"


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys):
    def run(*words):
        code = main(words, lambda recipe, gpu_memory_gib, gpu: f"plan of {recipe.name} on {gpu.name}")
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def job_environment(monkeypatch):
    """A job in this process sets these; monkeypatch restores them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([STAGE1, "--folow"], "unknown option '--folow'; did you mean '--follow'?"),
        ([STAGE1, "--dryrun"], "unknown option '--dryrun'; did you mean '--dry-run'?"),
        (
            [STAGE1, "--max_steps=3"],
            "unknown option '--max_steps=3'; a recipe key has no dashes: max_steps=",
        ),
        ([STAGE1, "--cluster", "pbs"], "invalid choice: 'pbs'"),
        ([STAGE1, "--dry"], "unknown option '--dry'"),
        ([], "no recipe given"),
        (["max_steps=3"], "the first word is the recipe's file"),
        (["recipes/demo/stage1_domain.yaml"], "did you mean 'recipes/demo/stage1_domains.yaml'?"),
        ([STAGE1, "max_step=3"], "command line: unknown key 'max_step'; did you mean 'max_steps'?"),
        ([STAGE1, "--sweep", "optimizer.lr"], "--sweep expects key=v1,v2"),
        ([STAGE1, "--cluster", "local", "cluster.nodes=2", "cluster.tasks_per_node=1"], "add cluster.nodes=1"),
        ([STAGE1, "cluster.array=2"], "cluster.array is 2, but stage1 is trained by one job"),
        (["recipes/demo/prepare.yaml", "--cluster", "local", "cluster.array=2"], "add cluster.array=1"),
        ([STAGE1, "--sweep", "seed=1,1"], "seed=1 and seed=1 would have the same name 'demo_stage1_domains_seed_1'"),
        ([STAGE1], "shards for data.train, data.validation"),
        ([STAGE1, "--runs", "my runs"], "python launchers/slurm.py recipes/demo/prepare.yaml --runs 'my runs'"),
        (["status", "nothing"], "no run 'nothing'"),
        ([STAGE1, "--dry-run", "--gpu", "b300"], "argument --gpu: invalid choice: 'b300'"),
        ([STAGE1, "--gpu", "a800"], "--gpu a800 chooses the GPU of an estimate: add --dry-run, or leave it out"),
        (["cancel"], "cancel needs the name of one run"),
        (["cancel", "nothing"], "no run 'nothing'"),
    ],
)
def test_an_error_of_the_user_ends_with_2_and_its_reason_without_a_traceback(command, words, message):
    code, _, errors = command(*words)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_overrides_and_options_may_be_mixed(command):
    code, output, _ = command("--dry-run", STAGE1, "seed=1", "--runs", "elsewhere", "max_steps=300")
    assert code == 0
    assert "seed: 1  # <- command line" in output
    assert "max_steps: 300  # <- command line" in output
    assert "elsewhere/demo_stage1_domains" in output


def test_a_dry_run_shows_recipe_plan_and_batch_script_with_warnings_and_makes_nothing(command, checkout):
    code, output, _ = command(STAGE1, "--dry-run", "batch_size=32", "micro_batch_size=4", "cluster.tasks_per_node=2")
    assert code == 0
    assert "batch: 4 (micro batch) x 4 (accumulation) x 2 (processes) = 32 samples" in output
    assert "plan of demo_stage1_domains" in output
    assert "#SBATCH --ntasks-per-node=2" in output
    assert "shards for data.train" in output
    assert output.count("# <- command line") == 3
    assert not (checkout / "runs").exists()


def test_the_plan_is_for_the_named_gpu_the_one_at_hand_or_the_default(command, checkout, monkeypatch):
    def planned(*words):
        (line,) = (line for line in command(STAGE1, "--dry-run", *words)[1].splitlines() if line.startswith("plan of"))
        return line.rpartition(" ")[2]

    assert planned() == "h200"
    assert planned("--gpu", "a800") == "a800"
    for name, expected in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L40S", "h200")):
        program = checkout / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncase $1 in *name) echo '{name}';; *) echo 81559;; esac\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(checkout), prepend=":")
        assert planned() == expected
        assert planned("--gpu", "a800") == "a800"


def test_a_dry_run_of_a_task_that_trains_nothing_has_no_plan_of_networks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dreamdance", PREPARE, "--dry-run", "cluster.tasks_per_node=1"])
    assert console_main() == 0
    plan = capsys.readouterr().out.partition("# Plan\n")[2].partition("\n# Batch script")[0]
    assert plan.strip() == "processes: 1 node x 1 = 1, cluster: local"


def test_a_sweep_is_one_run_for_each_combination_with_names_of_their_own(command):
    words = ["--sweep", "optimizer.lr=1e-4,3e-4", "--sweep", "model.pose_channels=[8,16,32],[16,32,64]"]
    _, output, _ = command(STAGE1, "--dry-run", *words)
    names = [line.removeprefix("name: ").split()[0] for line in output.splitlines() if line.startswith("name: ")]
    assert names == [
        "demo_stage1_domains_lr_1e_4_pose_channels_8_16_32",
        "demo_stage1_domains_lr_1e_4_pose_channels_16_32_64",
        "demo_stage1_domains_lr_3e_4_pose_channels_8_16_32",
        "demo_stage1_domains_lr_3e_4_pose_channels_16_32_64",
    ]


def test_values_that_differ_by_their_sign_alone_make_two_runs(command):
    _, output, _ = command(
        "recipes/demo/stage2.yaml", "--dry-run", "--sweep", "objective.sigma_log_mean=-1,1,-0.5,1e-4"
    )
    names = [line.removeprefix("name: ").split()[0] for line in output.splitlines() if line.startswith("name: ")]
    shared = "demo_stage2_sigma_log_mean"
    assert names == [f"{shared}_minus_1", f"{shared}_1", f"{shared}_minus_0_5", f"{shared}_1e_4"]


def test_a_debug_run_has_one_process_whatever_the_recipe_sets(command):
    _, output, _ = command("recipes/stage2.yaml", "--dry-run", "--cluster", "debug")
    assert "processes: 1 node x 1 = 1, cluster: debug" in output
    assert "1 (micro batch) x 8 (accumulation) x 1 (processes) = 8 samples" in output


def test_a_debug_run_is_checked_for_its_single_process(command):
    """The eight processes of the file could not divide four samples."""
    words = ["recipes/stage2.yaml", "--dry-run", "batch_size=4", "micro_batch_size=1"]
    assert command(*words)[0] == 2
    code, output, _ = command(*words, "--cluster", "debug")
    assert code == 0
    assert "1 (micro batch) x 4 (accumulation) x 1 (processes) = 4 samples" in output
    assert "  gpus_per_node: 1  # <- command line" in output


def test_status_without_runs_reports_that_there_are_none(command):
    assert command("status") == (0, "no runs in runs\n", "")


SMALL = ("dancers.num_train_clips=2", "dancers.num_validation_clips=1", "dancers.num_frames=2", "num_workers=1")


@pytest.mark.usefixtures("job_environment")
def test_a_debug_run_finishes_then_is_reported_as_finished_and_refuses_a_different_recipe(command, tmp_path):
    words = (PREPARE, *SMALL, "--cluster", "debug")
    assert command(*words)[0] == 0
    code, output, _ = command(*words)
    assert code == 0
    finished, *made = output.splitlines()
    assert finished.startswith("demo_prepare is finished: ")
    assert [line.split()[0] for line in made] == ["clips:", "page:", "next:"]
    assert made[0].endswith("2 for training, 1 for validation")
    assert made[2].endswith("recipes/demo/stage1_domains.yaml"), "the output is the one that it reads"
    code, _, errors = command(*words, "seed=1")
    assert code == 3
    assert "seed: 0 -> 1" in errors
    assert "prepare  finished" in command("status")[1]
    details = command("status", "demo_prepare")[1]
    assert "demo_prepare (prepare): finished" in details
    assert "log" not in details, "the log went to the terminal of the launcher"
    (start,) = json.loads((tmp_path / "runs" / "demo_prepare" / "provenance.json").read_text())["starts"]
    assert [(job["job_id"], job["hosts"]) for job in start["jobs"]] == [("debug", [socket.gethostname()])]


@pytest.mark.usefixtures("job_environment")
def test_a_debug_run_that_fails_for_the_users_reason_ends_with_1(command, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.rgb.mp4").write_bytes(b"this is no video")
    (tmp_path / "videos" / "a.pose.mp4").write_bytes(b"nor this")
    words = ("recipes/prepare.yaml", "videos.folder=videos", "num_workers=1", "output=out")
    code, _, _ = command(*words, "--cluster", "debug")
    assert code == 1
    (failure,) = (tmp_path / "runs" / "prepare" / "logs" / "failures").iterdir()
    assert "videos.split_by" in json.loads(failure.read_text())["text"]


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_a_run_that_has_a_job_is_refused_with_its_id_and_a_code_of_its_own(command, tmp_path, cluster):
    recipe, run_folder = load_recipe(PREPARE), tmp_path / "runs" / "demo_prepare"
    create_or_check(recipe, run_folder, [])
    submit([recipe], [run_folder], "debug")  # this process, which is running
    code, output, _ = command(PREPARE, "--cluster", cluster)
    assert code == 4
    assert "demo_prepare: not submitted again, debug job debug is already running" in output
    code, _, errors = command(PREPARE, "--cluster", cluster, "seed=1")
    assert code == 3, "the difference of the recipe is reported first"
    assert "seed: 0 -> 1" in errors


WITHOUT_CAPABILITIES = """
import ctypes, sys
# Of root, whom permissions would not stop: `capset` with nothing effective and nothing permitted.
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
from dreamdance.launch.command import main
sys.exit(main(sys.argv[1:], lambda *_: ""))
"""


@pytest.mark.parametrize("place", [".", "demo_prepare", "demo_prepare/checkpoints", "demo_prepare/logs"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_submitted(place, tmp_path):
    run_folder = tmp_path / "runs" / "demo_prepare"
    if place == ".":
        (tmp_path / "runs").mkdir()
    else:
        create_or_check(load_recipe(PREPARE), run_folder, [])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    closed = tmp_path / "runs" / place
    closed.chmod(0o555)
    words = [sys.executable, "-c", WITHOUT_CAPABILITIES, PREPARE, "--cluster", "local", "--follow"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=os.environ)
    finally:
        closed.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert "the run cannot be started: [Errno 13]" in done.stderr
    assert str(closed) in done.stderr
    assert "give another --runs" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != ".launch_lock") == before
    record_fault(
        f"read-only folder before a start ({place.partition('/')[2] or 'the run itself' if place != '.' else 'runs'})",
        how="mode 0555, and root without its capabilities",
        promised="refused by name, nothing is submitted",
        happened=done.stderr.strip().replace(str(tmp_path), ""),
    )


def test_a_job_is_cancelled_though_this_version_cannot_read_its_recipe(checkout, command):
    folder = checkout / "runs" / "old"
    (folder / "logs").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("task: stage3\n")
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        known = {"cluster": "local", "job_id": str(process.pid), "num_tasks": 1, "host": socket.gethostname()}
        more = {"submitted": 0.0, "launcher_pid": os.getpid(), "process_start": start}
        (folder / "logs" / "job.json").write_text(json.dumps(known | more))
        code, output, _ = command("cancel", "old")
        assert process.wait(10) == -15
    assert code == 0
    assert f"cancelled local job {process.pid} of run 'old'" in output
