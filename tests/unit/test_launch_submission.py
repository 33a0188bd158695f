"""Jobs are handed to Slurm with what the recipe asks for, and asked how they stand."""

import json
import os
import shlex
import socket
import time
from pathlib import Path

import pytest

from dreamdance.errors import UserError
from dreamdance.launch.job import PORTS, Job, free_port, set_environment, slurm_port
from dreamdance.launch.local_controller import status_file
from dreamdance.launch.submission import SubmittedJob, batch_script, cancel, choose_cluster, last_job, status_of, submit
from dreamdance.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PREPARE = load_recipe(RECIPES / "demo" / "prepare.yaml")


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def fake_tool(folder, name, script):
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_the_batch_script_asks_for_what_the_cluster_section_says(tmp_path):
    words = ["cluster.nodes=2", "cluster.partition=gpu", "cluster.account=lab", "cluster.qos=high"]
    words += ["cluster.constraint=a100", "cluster.reservation=week", "cluster.setup=[module load cuda]"]
    words += ["cluster.environment={NCCL_DEBUG: 'WARN it'}", "cluster.sbatch_arguments={exclusive: user}"]
    words += ["cluster.srun_arguments=[--cpu-bind=cores]", "cluster.container_image=image.sqsh", "batch_size=16"]
    script = batch_script(load_recipe(RECIPES / "stage2.yaml", words), tmp_path)
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {
        *("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=720G", "--time=1440"),
        *("--partition=gpu", "--account=lab", "--qos=high", "--constraint=a100", "--reservation=week"),
        *("--job-name=stage2", "--exclusive=user", "--signal=USR2@120", "--open-mode=append"),
    } <= set(options)
    lines = script.splitlines()
    assert "module load cuda" in lines
    assert "export NCCL_DEBUG='WARN it'" in lines
    (srun,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=12", "--cpu-bind=cores", "--container-image=image.sqsh"} <= set(
        srun
    )
    assert srun[-5:-1] == ["-P", "-u", "-m", "submitit.core._submit"]
    assert srun[-1] == str(tmp_path / "logs")


def test_a_job_without_gpus_asks_for_none(tmp_path):
    assert "--gpus" not in batch_script(PREPARE, tmp_path)


def test_auto_takes_slurm_only_where_a_cluster_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake_tool(tmp_path, "sbatch", "exit 1")
    fake_tool(tmp_path, "sinfo", "echo 'debug up'")
    assert choose_cluster("auto") == "slurm"
    fake_tool(tmp_path, "sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert choose_cluster("auto") == "local"
    with pytest.raises(UserError, match="--cluster local"):
        choose_cluster("slurm")
    assert choose_cluster("debug") == "debug"


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("echo PENDING", "pending"),
        ("echo RUNNING", "running"),
        ("echo COMPLETED", "finished"),
        ("echo FAILED", "failed"),
        ("echo NODE_FAIL", "failed"),
        ("echo CANCELLED", "cancelled"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "failed"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "running"),
    ],
)
def test_a_slurm_job_is_judged_by_squeue_without_accounting(tmp_path, run_folder, monkeypatch, answer, state):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake_tool(tmp_path, "squeue", answer)
    job = SubmittedJob("slurm", "12", 8, "login", time.time(), 1, None)
    assert status_of(job, PREPARE, run_folder).state == state


@pytest.mark.parametrize(
    ("status", "state", "detail"),
    [
        ({"exit_code": 0}, "finished", "exit code 0"),
        ({"first_failed_rank": 1, "rank_exit_codes": [-9, -9]}, "failed", "rank 1 was killed by SIGKILL"),
        ({"first_failed_rank": 0, "rank_exit_codes": [3, -9]}, "failed", "rank 0 ended with exit code 3"),
        ({"ended_by": "timed out", "rank_exit_codes": [-2, -2]}, "failed", "timed out"),
        ({"ended_by": "cancelled"}, "cancelled", "signal"),
        ({"rank_exit_codes": []}, "failed", "could not start"),
    ],
)
def test_a_local_job_is_judged_by_what_its_controller_left(run_folder, status, state, detail):
    defaults = {"exit_code": 1, "first_failed_rank": None, "rank_exit_codes": [0, 0], "ended_by": None}
    status_file(run_folder, "4194300").write_text(json.dumps(defaults | status))
    found = status_of(SubmittedJob("local", "4194300", 2, "elsewhere", 0.0, 1, "1"), PREPARE, run_folder)
    assert found.state == state
    assert detail in found.detail


def test_a_job_whose_process_number_now_belongs_to_another_process_is_gone(run_folder):
    job = SubmittedJob("local", str(os.getpid()), 1, socket.gethostname(), time.time(), os.getpid(), "12345")
    assert status_of(job, PREPARE, run_folder).state == "failed"
    cancel(job)  # and is not the one that a cancel would hit


def test_a_job_on_another_machine_is_neither_declared_dead_nor_cancelled(run_folder):
    job = SubmittedJob("local", "1", 1, "another-host", time.time(), 1, "1")
    assert status_of(job, PREPARE, run_folder).state == "running"
    with pytest.raises(UserError, match="another-host"):
        cancel(job)


def test_a_debug_job_is_remembered_as_this_process(run_folder):
    job = submit(PREPARE, run_folder, "debug")
    assert last_job(run_folder) == job
    assert job.pid == os.getpid()
    assert status_of(job, PREPARE, run_folder).state == "running"


def test_ranks_of_a_slurm_job_agree_on_a_port_that_changes_with_every_restart():
    ports = [slurm_port("1234", restart) for restart in range(20)]
    assert ports == [slurm_port("1234", restart) for restart in range(20)]
    assert len(set(ports)) > 15
    assert all(port in PORTS for port in ports)


def test_a_free_port_is_one_that_can_be_bound():
    port = free_port()
    with socket.socket() as server:
        server.bind(("", port))
        assert server.getsockname()[1] == port


def test_a_debug_run_is_one_rank_with_defaults_that_the_user_can_overrule(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")
    for name in ("SUBMITIT_EXECUTOR", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONFAULTHANDLER", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("EXTRA", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words = ["cluster.environment={EXTRA: from the recipe}"]
    assert set_environment(load_recipe(RECIPES / "demo" / "prepare.yaml", words)) == "debug"
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == [
        "0",
        "1",
        "0",
        "1",
    ]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["PYTHONFAULTHANDLER"] == "0"
    assert os.environ["EXTRA"] == "from the recipe"
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).name == "torch_extensions"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "its recipe wants no GPU"


def test_a_job_sees_the_gpus_of_its_machine_unless_its_recipe_wants_none(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    words = ["cluster.gpus_per_node=1", "cluster.tasks_per_node=1"]
    set_environment(load_recipe(RECIPES / "demo" / "prepare.yaml", words))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    words = ["cluster.gpus_per_node=0", "cluster.environment={CUDA_VISIBLE_DEVICES: '1'}"]
    set_environment(load_recipe(RECIPES / "demo" / "prepare.yaml", words))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_requeued_job_is_the_same_job(tmp_path):
    job = Job(tmp_path)
    assert job.checkpoint().function == job
