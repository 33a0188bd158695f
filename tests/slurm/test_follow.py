"""The output of `--follow` for a training on several nodes: progress of rank 0, problems of all ranks, the end."""

import os
import signal
import socket
import subprocess
from pathlib import Path

from support.fault_log import record_fault
from support.slurm_jobs import Cluster, Run, measure_recovery, wait_until, write_training

from dreamdance.launch.job import slurm_port
from dreamdance.launch.submission import last_job

STOP_SECONDS = 10
# Steps take less than 0.1 s, and lines are shown every 5 s: the last start must outlast that.
EVERY_STEPS, MAX_STEPS = 10, 200


def test_a_training_of_two_by_two_ranks_is_followed_over_a_busy_port_and_a_hanging_rank_to_its_end(
    cluster: Cluster, tmp_path: Path, shards: Path
):
    """The port of the first start is taken; the second is warned while a rank is stopped; the third reaches the end."""
    changes = {
        "max_steps": MAX_STEPS,
        "batch_size": 4,
        "checkpoint.every_steps": EVERY_STEPS,
        "cluster.stop_seconds": STOP_SECONDS,
        "cluster.sbatch_arguments": {"begin": "now+1hour"},
    }
    recipe = write_training(tmp_path, shards, changes)
    run = Run(cluster, tmp_path, recipe, "followed", "cluster.nodes=2", "cluster.tasks_per_node=2")
    with (
        subprocess.Popen(
            run.command("--follow"),
            cwd=tmp_path,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as follower,
        socket.socket() as stranger,
    ):
        try:
            port = occupy_port_of_first_start(run, stranger)
            start_on_a_taken_port(run, port)
            hang_when_warned(run)
            shown, _ = follower.communicate(timeout=180)
        finally:
            follower.kill()
            run.run_verb("cancel")
    assert follower.returncode == 0, shown + run.logs()
    assert run.restarts() == 2
    assert run.state() == "COMPLETED"
    lines = shown.splitlines()
    assert lines[0].startswith(f"followed: slurm job {run.job.job_id}, 4 processes, log ")
    assert lines[-1].startswith("followed finished in ")
    assert any(line.startswith("step ") and "  loss " in line for line in lines), shown
    assert any(line.startswith(f"step {MAX_STEPS}/{MAX_STEPS}") for line in lines), shown
    assert f"[rank 0] ERROR dreamdance.launch.job: port {port} of " in shown, shown
    for rank in range(3):  # rank 3 was stopped and cannot write anything
        assert any(f"[rank {rank}] WARNING" in line and "SIGUSR2: saving and stopping" in line for line in lines), shown
        assert any(f"[rank {rank}] " in line and "not saved within 8 s of SIGUSR2" in line for line in lines), shown
    for reason in ("it failed", "it was asked to stop"):
        assert f"back into the queue: {reason}" in shown, shown


def occupy_port_of_first_start(run: Run, stranger: socket.socket) -> int:
    """Listens on the port that the waiting job has chosen; the nodes of this cluster share the ports of the machine."""
    wait_until(lambda: last_job(run.run_folder), "the submission", 60)
    port = slurm_port(run.job.job_id, 0)
    stranger.bind(("", port))
    stranger.listen()
    return port


def start_on_a_taken_port(run: Run, port: int) -> None:
    """Lets the job start; it must be requeued by itself, and choose another port."""
    run.cluster.slurm("scontrol", "update", f"JobId={run.job.job_id}", "StartTime=now")
    ended = wait_until(lambda: run.restarts() == 1, "the first start's end")
    assert slurm_port(run.job.job_id, 1) != port
    assert run.steps() == []
    record_fault(
        "MASTER_PORT taken",
        how="another process listens on the port that the job has chosen",
        promised="rank 0 names the port; requeued, on another one",
        happened="named the port and continued on another one",
        detected_seconds=ended,
    )


def hang_when_warned(run: Run) -> None:
    """The others cannot save without the stopped rank: they end in time for the job to be requeued."""
    wait_until(run.complete_steps, "the first checkpoint")

    def warn_with_a_rank_stopped() -> None:
        os.kill(run.rank_pids()[3], signal.SIGSTOP)
        run.warn("USR2")

    recovery = measure_recovery(run, warn_with_a_rank_stopped)
    assert recovery.first_step - 1 in run.complete_steps()
    assert recovery.steps_lost <= 2 * EVERY_STEPS
    assert 0.8 * STOP_SECONDS - 1 < recovery.detected_seconds < 0.8 * STOP_SECONDS + 20
    record_fault(
        "the warning before the time limit, and a rank that hangs",
        how="SIGSTOP to one of four ranks, then USR2 to all",
        promised="the others end unsaved after 0.8 x cluster.stop_seconds; requeued",
        happened="resumed from the newest complete checkpoint",
        detected_seconds=recovery.detected_seconds,
        resumed_seconds=recovery.resumed_seconds,
        steps_lost=recovery.steps_lost,
    )
