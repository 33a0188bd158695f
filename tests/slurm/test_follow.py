"""What a user sees who follows a training on several nodes: rank 0's progress, every rank's trouble, and its end."""

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
EVERY_STEPS, MAX_STEPS = 10, 60


def test_a_training_of_two_by_two_is_followed_past_a_busy_port_and_a_rank_that_hangs_to_its_end(
    cluster: Cluster, tmp_path: Path, shards: Path
):
    """The first start finds its port taken; the second is warned while a rank is stopped; the third gets to the end."""
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
            meet_stranger(run, port)
            hang_when_warned(run)
            shown, _ = follower.communicate(timeout=180)
        finally:
            follower.kill()
            run.say("cancel")
    assert follower.returncode == 0, shown + run.logs()
    assert run.restarts() == 2
    assert run.state() == "COMPLETED"
    lines = shown.splitlines()
    assert lines[0].startswith(f"followed: slurm job {run.job.job_id}, 4 processes, log ")
    assert lines[-1].startswith("followed finished in ")
    assert any(line.startswith("step ") and "  loss " in line for line in lines), shown
    assert any(line.startswith(f"step {MAX_STEPS}/{MAX_STEPS}") for line in lines), shown
    assert f"[rank 0] ERROR dreamdance.launch.job: port {port} of " in shown, shown
    for rank in range(3):  # rank 3 was stopped, and cannot say anything
        assert any(f"[rank {rank}] WARNING" in line and "SIGUSR2: saving and stopping" in line for line in lines), shown
        assert any(f"[rank {rank}] " in line and "not saved within 8 s of SIGUSR2" in line for line in lines), shown
    for reason in ("it failed", "it was asked to stop"):
        assert f"back into the queue: {reason}" in shown, shown


def occupy_port_of_first_start(run: Run, stranger: socket.socket) -> int:
    """Listens on the port that the waiting job has drawn; the nodes of this cluster share a machine's ports."""
    wait_until(lambda: last_job(run.run_folder), "the submission", 60)
    port = slurm_port(run.job.job_id, 0)
    stranger.bind(("", port))
    stranger.listen()
    return port


def meet_stranger(run: Run, port: int) -> None:
    """Lets the job start; it must come back into the queue by itself, and draw another port."""
    run.cluster.slurm("scontrol", "update", f"JobId={run.job.job_id}", "StartTime=now")
    ended = wait_until(lambda: run.restarts() == 1, "the first start's end")
    assert slurm_port(run.job.job_id, 1) != port
    assert run.steps() == []
    record_fault(
        "MASTER_PORT taken",
        how="something listens on the port that the job has drawn",
        promised="rank 0 names the port; requeued, on another one",
        happened="said so and went on at another port",
        detected_seconds=ended,
    )


def hang_when_warned(run: Run) -> None:
    """The others cannot save without the rank that is stopped: they leave in time for the job to be requeued."""
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
        happened="went on from the newest complete checkpoint",
        detected_seconds=recovery.detected_seconds,
        resumed_seconds=recovery.resumed_seconds,
        steps_lost=recovery.steps_lost,
    )
