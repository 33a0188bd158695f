"""Jobs are submitted to Slurm with the resources of the recipe, and their states are found."""

import json
import os
import shlex
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dreamdance.errors import UserError
from dreamdance.launch.job import PORTS, free_port, record_failure, set_environment, slurm_port
from dreamdance.launch.local.controller import status_file
from dreamdance.launch.local.heartbeat import SILENT_SECONDS, Heartbeat, heartbeat_file, job_file
from dreamdance.launch.requeue import read_failures
from dreamdance.launch.slurm_cluster import ask, batch_script
from dreamdance.launch.submission import SubmittedJob, cancel, choose_cluster, last_job, status_of, submit
from dreamdance.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PREPARE = load_recipe(RECIPES / "demo" / "prepare.yaml")
SLURM_JOB = SubmittedJob("slurm", "12", 8, "login", time.time(), 1, None, "/s.sh")


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def wait_for(path):
    give_up = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def age(path, seconds):
    """Sets the time of a file to the given number of seconds ago."""
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, time.time_ns() - int(seconds * 1e9)))


def fake_tool(folder, name, script):
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_the_batch_script_requests_the_resources_of_the_cluster_section(tmp_path):
    words = ["cluster.nodes=2", "cluster.partition=gpu", "cluster.account=lab", "cluster.qos=high"]
    words += ["cluster.constraint=a100", "cluster.reservation=week", "cluster.setup=[module load cuda]"]
    words += ["cluster.environment={NCCL_DEBUG: 'WARN it'}"]
    words += ["cluster.sbatch_arguments={exclusive: user, mail-type: END, overcommit: ''}", "cluster.mail_user=me@lab"]
    words += ["cluster.srun_arguments=[--cpu-bind=cores]", "cluster.container_image=image.sqsh", "batch_size=16"]
    script = batch_script(load_recipe(RECIPES / "stage2.yaml", words), tmp_path)
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {
        *("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=720G", "--time=1440"),
        *("--partition=gpu", "--account=lab", "--qos=high", "--constraint=a100", "--reservation=week"),
        *("--job-name=stage2", "--exclusive=user", "--signal=USR2@120", "--open-mode=append", "--requeue"),
        *("--mail-user=me@lab", "--mail-type=END", "--overcommit"),
    } <= set(options)
    assert len([option for option in options if option.startswith("--mail-type")]) == 1, (
        "the option of the recipe is used"
    )
    lines = script.splitlines()
    assert "module load cuda" in lines
    assert "export NCCL_DEBUG='WARN it'" in lines
    (srun,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    wanted = {"--kill-on-bad-exit=1", "--wait=60", "--cpus-per-task=12", "--cpu-bind=cores"}
    assert wanted | {"--container-image=image.sqsh"} <= set(srun)
    assert srun[-5:] == ["-P", "-u", "-m", "dreamdance.launch.rank", str(tmp_path / "logs")]
    (asking,) = [shlex.split(line.rpartition("&&")[2]) for line in lines if "launch.requeue" in line]
    assert asking[0] == "srun", "if the project is in a container, the decision runs there too"
    assert {"--container-image=image.sqsh", "--overlap", "--ntasks=1"} <= set(asking)


def test_ranks_that_share_work_may_end_at_different_times(tmp_path):
    assert "--wait=0" in batch_script(PREPARE, tmp_path)


def test_without_a_container_the_batch_script_decides_by_itself(tmp_path):
    (asking,) = [line for line in batch_script(PREPARE, tmp_path).splitlines() if "launch.requeue" in line]
    assert "srun" not in asking


def test_a_job_without_gpus_requests_none(tmp_path):
    assert "--gpus" not in batch_script(PREPARE, tmp_path)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("{gpus-per-node: 'h100:8'}", "--gpus-per-node=h100:8"),
        ("{gpus_per_node: 'h100:8'}", "--gpus-per-node=h100:8"),
        ("{gres: 'gpu:a800:8,nvme:1'}", "--gres=gpu:a800:8,nvme:1"),
    ],
)
def test_gpus_of_one_kind_are_requested_once(tmp_path, asked, line):
    recipe = load_recipe(RECIPES / "stage2.yaml", [f"cluster.sbatch_arguments={asked}"])
    options = [text for text in batch_script(recipe, tmp_path).splitlines() if text.startswith("#SBATCH")]
    assert [option for option in options if "--gpu" in option or "--gres" in option] == [f"#SBATCH {line}"]


def test_no_accounting_option_is_sent_unless_the_recipe_sets_one(tmp_path):
    assert "--wckey" not in batch_script(PREPARE, tmp_path)
    recipe = load_recipe(RECIPES / "stage2.yaml", ["cluster.sbatch_arguments={wckey: dance}"])
    assert "#SBATCH --wckey=dance" in batch_script(recipe, tmp_path).splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["--distribution=block:block"]),
        (["cluster.srun_arguments=['--distribution=cyclic']"], ["--distribution=cyclic"]),
        (["cluster.srun_arguments=['-mcyclic']"], []),
        (["cluster.sbatch_arguments={distribution: cyclic}"], []),
        (["cluster.gpus_per_node=0"], []),
    ],
)
def test_ranks_are_distributed_to_sockets_like_gpus_unless_the_recipe_sets_it(tmp_path, words, expected):
    script = batch_script(load_recipe(RECIPES / "stage2.yaml", words), tmp_path)
    (srun,) = [shlex.split(line) for line in script.splitlines() if line.startswith("srun")]
    assert [word for word in srun if word.startswith("--distribution")] == expected


def test_auto_chooses_slurm_only_where_a_cluster_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake_tool(tmp_path, "sbatch", "exit 1")
    fake_tool(tmp_path, "sinfo", "echo 'debug up'")
    assert choose_cluster("auto") == "slurm"
    fake_tool(tmp_path, "sinfo", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert choose_cluster("auto") == "local"
    with pytest.raises(UserError, match="--cluster local"):
        choose_cluster("slurm")
    assert choose_cluster("debug") == "debug"


SHOWN = "JobId=12 JobName=x y UserId=a(1) JobState={state} Reason={reason} Restarts=3 NodeList={nodes} Command={script}"


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        (SHOWN.format(state="PENDING", reason="Priority", nodes="(null)", script="/s.sh"), "pending", "priority"),
        (SHOWN.format(state="RUNNING", reason="None", nodes="a[1-8]", script="/s.sh"), "running", "running on a[1-8]"),
        (SHOWN.format(state="COMPLETED", reason="None", nodes="a", script="/s.sh"), "finished", "completed"),
        (SHOWN.format(state="FAILED", reason="NonZeroExitCode", nodes="a", script="/s.sh"), "failed", "failed"),
        (SHOWN.format(state="NODE_FAIL", reason="None", nodes="a", script="/s.sh"), "failed", "node_fail"),
        (SHOWN.format(state="CANCELLED", reason="None", nodes="a", script="/s.sh"), "cancelled", "scancel"),
        (SHOWN.format(state="RUNNING", reason="None", nodes="a", script="/another.sh"), "failed", "gone"),
    ],
)
def test_the_state_of_a_slurm_job_is_found_without_accounting(tmp_path, run_folder, monkeypatch, answer, state, detail):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake_tool(tmp_path, "scontrol", f"echo '{answer}'")
    found = status_of(SLURM_JOB, PREPARE, run_folder)
    assert found.state == state
    assert detail in found.detail.lower()


@pytest.mark.parametrize(
    ("states", "state", "detail"),
    [
        (("RUNNING", "PENDING"), "running", "1 of 2 jobs: running"),
        (("FAILED", "RUNNING"), "running", "1 of 2 jobs: running"),
        (("FAILED", "PENDING"), "pending", "1 of 2 jobs: pending"),
        (("COMPLETED", "FAILED"), "failed", "1 of 2 jobs: failed"),
        (("CANCELLED", "CANCELLED"), "cancelled", "2 of 2 jobs: by scancel"),
    ],
)
def test_an_array_that_shares_a_run_is_active_while_one_of_its_jobs_is(
    tmp_path, run_folder, monkeypatch, states, state, detail
):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    answers = [SHOWN.format(state=one, reason="None", nodes="a", script="/s.sh") for one in states]
    cases = " ".join(f"12_{number}) echo '{answer}';;" for number, answer in enumerate(answers))
    fake_tool(tmp_path, "scontrol", f"case $4 in {cases} esac")
    found = status_of(replace(SLURM_JOB, array=2), PREPARE, run_folder)
    assert (found.state, found.detail.removesuffix(" on a")) == (state, detail)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "failed"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "running"),
    ],
)
def test_a_job_that_slurm_no_longer_knows_is_distinguished_from_a_slurm_that_does_not_answer(
    tmp_path, run_folder, monkeypatch, answer, state
):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake_tool(tmp_path, "scontrol", answer)
    assert status_of(SLURM_JOB, PREPARE, run_folder).state == state


def test_restarts_are_read_though_values_hold_spaces(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    answer = SHOWN.format(state="RUNNING", reason="None", nodes="n1", script="/a folder/s.sh")
    fake_tool(tmp_path, "scontrol", f"echo '{answer}'")
    record = ask("12", "/a folder/s.sh")
    assert record is not None
    assert (record.restarts, record.nodes) == (3, "n1")


def test_the_error_of_sbatch_is_shown(tmp_path, run_folder, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    fake_tool(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    with pytest.raises(UserError, match="invalid partition specified: gpuu"):
        submit([PREPARE], [run_folder], "slurm")


def test_files_of_another_job_with_the_same_number_are_moved_away(run_folder):
    logs = run_folder / "logs"
    record_failure(run_folder, "12", 0, "old news", user_error=True)
    for name in ("12_0_log.out", "12_status.json", "requeues.jsonl", "12_submission.sh"):
        (logs / name).write_text("old")
    (logs / "progress.jsonl").write_text("kept")
    for folder in (run_folder, logs):
        (folder / "x.json.partial-0123").write_text("of a writer that was killed")
    submit([PREPARE], [run_folder], "debug")
    submit([PREPARE], [run_folder], "debug")
    assert sorted(path.name for path in logs.iterdir()) == ["earlier", "job.json", "progress.jsonl"]
    assert len(list((logs / "earlier" / "0000").rglob("*"))) == 6
    assert [path.name for path in run_folder.iterdir()] == ["logs"]
    assert read_failures(run_folder) == []


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
def test_the_state_of_a_local_job_follows_from_the_files_of_its_controller(run_folder, status, state, detail):
    defaults = {"exit_code": 1, "first_failed_rank": None, "rank_exit_codes": [0, 0], "ended_by": None}
    status_file(run_folder, "4194300").write_text(json.dumps(defaults | status))
    found = status_of(SubmittedJob("local", "4194300", 2, "elsewhere", 0.0, 1, "1"), PREPARE, run_folder)
    assert found.state == state
    assert detail in found.detail


def test_a_job_whose_process_number_now_belongs_to_another_process_is_gone(run_folder):
    job = SubmittedJob("local", str(os.getpid()), 1, socket.gethostname(), time.time(), os.getpid(), "12345")
    assert status_of(job, PREPARE, run_folder).state == "failed"
    cancel(job)  # a cancel would not end this process


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_a_job_on_another_machine_is_neither_declared_dead_nor_cancelled(run_folder, cluster):
    job = SubmittedJob(cluster, "1", 1, "another-host", time.time(), 1, "1")
    with Heartbeat(run_folder):
        wait_for(heartbeat_file(run_folder))
        found = status_of(job, PREPARE, run_folder)
        assert (found.state, found.detail) == ("running", "on another-host, last heartbeat 0s ago")
    with pytest.raises(UserError, match=r"a .* job on another-host cannot be cancelled from this machine"):
        cancel(job)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_job_of_a_lost_machine_counts_as_lost_by_the_clock_of_the_file_system(run_folder, hours):
    """A heartbeat from the future was written before the clock was set back."""
    job = SubmittedJob("local", "1", 1, "gone-host", time.time() - 3600 * hours, 1, "1")
    for path in (heartbeat_file(run_folder), job_file(run_folder)):
        path.touch()
        age(path, 3600 * hours)
    found = status_of(job, PREPARE, run_folder)
    assert found.state == "failed"
    assert found.detail == "no heartbeat for 1h 00m: gone-host, or the job there, is gone"
    age(job_file(run_folder), SILENT_SECONDS - 5)
    assert status_of(job, PREPARE, run_folder).is_active, "it was submitted recently, so it may not have begun"
    job_file(run_folder).unlink()
    heartbeat_file(run_folder).unlink()
    assert status_of(job, PREPARE, run_folder).state == "failed"


def test_the_state_of_a_job_of_another_machine_is_not_decided_where_nothing_can_be_written(run_folder):
    job = SubmittedJob("local", "1", 1, "another-host", time.time(), 1, "1")
    found = status_of(job, PREPARE, run_folder / "nowhere")
    assert found.state == "running"
    assert "its heartbeat cannot be read" in found.detail


def test_a_heartbeat_survives_storage_errors_and_recreates_no_removed_folder(run_folder, monkeypatch):
    monkeypatch.setattr("dreamdance.launch.local.heartbeat.BEAT_SECONDS", 0.01)
    file = heartbeat_file(run_folder)
    with Heartbeat(run_folder) as heart:
        wait_for(file)
        file.unlink()
        file.parent.rename(run_folder / "away")
        time.sleep(0.1)
        assert not file.parent.exists()
        assert heart._thread.is_alive()
        (run_folder / "away").rename(file.parent)
        wait_for(file)


def test_a_debug_job_is_remembered_as_this_process(run_folder):
    (job,) = submit([PREPARE], [run_folder], "debug")
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


@pytest.mark.usefixtures("own_environment")
def test_a_debug_run_is_one_rank_with_defaults_that_the_user_can_override(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "unset")
    for name in ("SUBMITIT_EXECUTOR", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE"):
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
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "its recipe uses no GPU"


@pytest.mark.usefixtures("own_environment")
def test_a_job_sees_the_gpus_of_its_machine_unless_its_recipe_uses_none(monkeypatch):
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
