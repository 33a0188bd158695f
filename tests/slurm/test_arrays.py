"""Faults in an array job: only the task with the fault is requeued; the other tasks continue undisturbed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.slurm_jobs import Cluster, Run, measure_recovery, wait_until, write_training


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, shards: Path) -> Iterator[list[Run]]:
    """Two endless trainings as one array, which save only when they are asked to stop."""
    changes = {
        "max_steps": 100_000,
        "batch_size": 1,
        "checkpoint.every_steps": 100_000,
        "cluster.partition": "low",
        "cluster.stop_seconds": 30,
    }
    recipe = write_training(tmp_path, shards, changes)
    submitted = Run(cluster, tmp_path, recipe, "array").launch("--sweep", "optimizer.lr=1e-3,2e-3")
    assert submitted.returncode == 0, submitted.stderr
    runs = [Run(cluster, tmp_path, recipe, f"array_lr_{value}") for value in ("1e_3", "2e_3")]
    yield runs
    for run in runs:
        run.run_verb("cancel")
        wait_until(lambda run=run: not run.rank_pids(), "the cancelled task's end", 30)


@contextmanager
def assert_undisturbed(run: Run) -> Iterator[None]:
    """Checks that this run continues in the same process during the block, and takes one step after the other."""
    ranks, restarts, checkpoints = run.rank_pids(), run.restarts(), run.complete_steps()
    last = run.steps()[-1].number
    yield
    run.wait_for_steps(2, checkpoint=False)
    assert (run.rank_pids(), run.restarts(), run.complete_steps()) == (ranks, restarts, checkpoints)
    numbers = [step.number for step in run.steps() if step.number > last]
    assert numbers == list(range(last + 1, last + 1 + len(numbers)))


def test_a_task_of_an_array_with_a_fault_is_requeued_alone_and_a_cancelled_one_ends_alone(runs: list[Run]):
    first, last = runs
    assert last.job.job_id.endswith("_1"), "the last task, which has the number of the array in Slurm"
    for run in runs:
        run.wait_for_steps(3, checkpoint=False)

    # A task saves once and is requeued once, however often and by whatever signal it is asked to stop.
    for faulty, sibling, signals in ((last, first, ("USR2", "USR2")), (first, last, ("USR2", "TERM"))):
        with assert_undisturbed(sibling):
            recovery = measure_recovery(faulty, lambda faulty=faulty, signals=signals: faulty.warn(*signals))
        assert recovery.steps_lost == 0
        assert faulty.complete_steps() == [recovery.first_step - 1], "one checkpoint"
        assert faulty.restarts() == 1
        assert faulty.log().count("back into the queue: it was asked to stop") == 1
        record_fault(
            f"a task of an array is warned: {' and '.join(signals)}",
            how="scancel --signal to one of two tasks",
            promised="it saves once and is requeued once; the other task continues",
            happened="one checkpoint, one requeue, the other task undisturbed",
            detected_seconds=recovery.detected_seconds,
            resumed_seconds=recovery.resumed_seconds,
            steps_lost=0,
        )

    with assert_undisturbed(first):
        recovery = measure_recovery(last, lambda: last.signal_rank(0, signal.SIGKILL))
    assert recovery.first_step - 1 == last.complete_steps()[-1]
    assert last.restarts() == 2
    assert "back into the queue: it failed" in last.log()

    with assert_undisturbed(first):
        assert f"cancelled slurm job {last.job.job_id} " in last.run_verb("cancel")
        wait_until(lambda: not last.rank_pids(), "the cancelled task's end", 30)
        wait_until(lambda: last.state() == "CANCELLED", "its end in Slurm's eyes", 30)
    assert (last.state(), first.state()) == ("CANCELLED", "RUNNING")
    assert last.restarts() == 2
    record_fault(
        "a task of an array loses its rank, and is cancelled",
        how="SIGKILL to the rank of one of two tasks; then launchers/slurm.py cancel RUN",
        promised="requeued alone, then ended alone",
        happened="resumed from its checkpoint, cancelled; the other task undisturbed",
        detected_seconds=recovery.detected_seconds,
        resumed_seconds=recovery.resumed_seconds,
    )
