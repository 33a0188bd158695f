"""A training on two nodes with many faults: it resumes by itself after each, and computes the same losses."""

import os
import signal
import time
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.slurm_jobs import Cluster, Recovery, Run, measure_recovery, wait_until, write_training

EVERY_STEPS = 10
STOP_SECONDS = 30
STEP_TIMEOUT_SECONDS = 8


@pytest.fixture(scope="module")
def run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, shards: Path):
    """An endless training that takes steps."""
    folder = tmp_path_factory.mktemp("work")
    changes = {
        "data.num_workers": 1,
        "max_steps": 100_000,
        "batch_size": 2,
        "checkpoint.every_steps": EVERY_STEPS,
        "cluster.nodes": 2,
        "cluster.time_minutes": 60,
        "cluster.stop_seconds": STOP_SECONDS,
        "cluster.step_timeout_seconds": STEP_TIMEOUT_SECONDS,
        "cluster.partition": "low",
    }
    run = Run(cluster, folder, write_training(folder, shards, changes), "faulty")
    submitted = run.launch()
    assert submitted.returncode == 0, submitted.stderr
    yield run
    cluster.slurm("scancel", run.job.job_id)
    wait_until(lambda: not run.rank_pids(), "the cancelled job's end", 30)


@pytest.fixture(autouse=True)
def running(run: Run) -> None:
    """Each test begins while the run takes steps, some steps after a checkpoint of the current start."""
    run.wait_for_steps(EVERY_STEPS // 2)
    newest = run.complete_steps()[-1]  # a run that fails twice without progress ends for good
    wait_until(lambda: run.complete_steps()[-1] > newest, "a newer checkpoint")
    wait_until(lambda: run.steps()[-1].number > run.complete_steps()[-1], "a step past the checkpoint")


def assert_resumed_without_a_difference(run: Run, recovery: Recovery) -> None:
    """Checks that only the steps since the newest checkpoint are done again, and that they give the same losses."""
    assert recovery.first_step - 1 in (*run.complete_steps(), 0)
    losses: dict[int, set[float]] = {}
    for step in run.steps():
        losses.setdefault(step.number, set()).add(step.loss)
    assert sorted(losses) == list(range(1, max(losses) + 1)), "no step is left out"
    assert [number for number, found in losses.items() if len(found) > 1] == []


def record(fault: str, how: str, promised: str, recovery: Recovery) -> None:
    record_fault(
        fault,
        how=how,
        promised=promised,
        happened="the job was requeued by itself and resumed with the same losses",
        detected_seconds=recovery.detected_seconds,
        resumed_seconds=recovery.resumed_seconds,
        steps_lost=recovery.steps_lost,
    )


def test_a_time_limit_that_comes_while_a_rank_waits_in_a_collective_costs_no_step(run, cluster):
    """Rank 1 is stopped, so that rank 0 waits in a collective when Slurm's warning arrives; then rank 1 continues."""
    job_id = run.job.job_id
    held = run.rank_pids()[1]

    def reach_the_limit() -> None:
        minutes = int(_run_seconds(cluster, job_id) // 60) + 1
        cluster.slurm("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")
        wait_until(lambda: "SIGUSR2" in run.log(0), "the warning", 70)

    # Rank 0 waits for rank 1 when the signal arrives, for less time than its watchdog allows.
    def warn() -> None:
        os.kill(held, signal.SIGSTOP)
        try:
            time.sleep(1.0)
            cluster.slurm("scancel", "--signal=USR2", job_id)
            wait_until(lambda: "SIGUSR2: saving" in run.log(0), "rank 0's word on the warning", 5)
        finally:
            os.kill(held, signal.SIGCONT)

    recovery = measure_recovery(run, warn)
    assert recovery.steps_lost == 0
    assert_resumed_without_a_difference(run, recovery)
    record(
        "the warning before the time limit, in a collective",
        "USR2 to the job while rank 0 waits for rank 1",
        "all ranks save at the end of a step, the job resumes",
        recovery,
    )

    recovery = measure_recovery(run, reach_the_limit)
    assert recovery.steps_lost == 0
    record("time limit", "TimeLimit of the running job lowered", "as above", recovery)
    cluster.slurm("scontrol", "update", f"JobId={job_id}", "TimeLimit=120")


def _run_seconds(cluster: Cluster, job_id: str) -> int:
    hours, minutes, seconds = cluster.show(job_id)["RunTime"].split(":")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def test_a_rank_that_hangs_ends_the_job_within_the_step_time_out_and_the_job_resumes(run, cluster):
    held = run.rank_pids()[1]

    def hang() -> None:
        os.kill(held, signal.SIGSTOP)

    recovery = measure_recovery(run, hang)
    assert recovery.detected_seconds < STEP_TIMEOUT_SECONDS + 20
    assert recovery.steps_lost <= EVERY_STEPS + 3
    assert_resumed_without_a_difference(run, recovery)
    assert "hangs" in run.log(0)
    record("rank stopped", "SIGSTOP to one rank", "the watchdog ends the job", recovery)


def test_a_killed_rank_ends_the_others_and_the_job_resumes(run):
    recovery = measure_recovery(run, lambda: run.signal_rank(1, signal.SIGKILL))
    assert recovery.detected_seconds < 20
    assert_resumed_without_a_difference(run, recovery)
    record("rank killed", "SIGKILL to one rank", "the others end, the job resumes", recovery)


def test_a_requeue_without_warning_resumes_from_the_newest_checkpoint(run, cluster):
    recovery = measure_recovery(run, lambda: cluster.slurm("scontrol", "requeue", run.job.job_id))
    assert_resumed_without_a_difference(run, recovery)
    record("requeued by somebody", "scontrol requeue", "resumes from the newest checkpoint", recovery)


def test_a_job_of_a_higher_partition_preempts_the_run_which_resumes_later(run, cluster):
    def take_all_nodes() -> None:
        cluster.slurm(
            "sbatch", "--partition=high", "--nodes=4", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 3"
        )

    recovery = measure_recovery(run, take_all_nodes)
    assert recovery.steps_lost == 0, "it was warned, so it saved"
    assert_resumed_without_a_difference(run, recovery)
    record("pre-emption", "a job of a higher partition wants all nodes", "saves, ends, resumes later", recovery)


def test_a_lost_node_is_replaced_by_another(run, cluster):
    lost = cluster.show(run.job.job_id)["BatchHost"]
    recovery = lose(run, cluster, "kill-node", lost)
    assert lost not in run.run_verb("status").partition("nodes")[2].splitlines()[0]
    assert_resumed_without_a_difference(run, recovery)
    record("node lost", "all processes of the batch host's node killed", "requeued on other nodes", recovery)


def test_a_lost_daemon_is_handled_like_a_lost_node(run, cluster):
    lost = cluster.show(run.job.job_id)["BatchHost"]
    recovery = lose(run, cluster, "kill-daemon", lost)
    assert_resumed_without_a_difference(run, recovery)
    record("slurmd lost", "SIGKILL to the slurmd of the batch host", "requeued", recovery)


@pytest.mark.parametrize("verb", ["kill-node", "kill-daemon"])
def test_a_lost_node_without_the_first_rank_ends_the_job_which_resumes(run, cluster, verb):
    """The batch script runs on the first node, and must not requeue a job that Slurm has requeued already."""
    lost, restarts, newest = other_node(run), run.restarts(), run.complete_steps()[-1]
    recovery = lose(run, cluster, verb, lost)
    assert recovery.first_step > newest, "no step before the checkpoint is done again"
    assert_resumed_without_a_difference(run, recovery)
    assert run.restarts() == restarts + 1, run.logs()
    record(
        f"{'node' if verb == 'kill-node' else 'slurmd'} lost that is not the batch host",
        "all processes of rank 1's node killed" if verb == "kill-node" else "SIGKILL to the slurmd under rank 1",
        "requeued once, on other nodes",
        recovery,
    )


def lose(run: Run, cluster: Cluster, verb: str, node: str) -> Recovery:
    """Loses a node, and brings it back whatever the run does: later tests need all nodes."""
    number = node.removeprefix("node")
    try:
        return measure_recovery(run, lambda: cluster.control(verb, number))
    finally:
        cluster.control("start-node", number)
        wait_until(lambda: cluster.node_states()[node] != "down", "the node's return", 30)


def other_node(run: Run) -> str:
    """A node of the job other than that of its batch script."""
    job = run.cluster.show(run.job.job_id)
    (other,) = set(run.cluster.slurm("scontrol", "show", "hostnames", job["NodeList"]).split()) - {job["BatchHost"]}
    return other


def test_a_cancelled_job_saves_and_is_not_requeued(run, cluster):
    before = run.restarts()
    cancelled = time.time()
    assert "cancelled slurm job" in run.run_verb("cancel")
    wait_until(lambda: not run.rank_pids(), "the ranks' end", 30)
    ended = time.time() - cancelled
    time.sleep(3)
    assert run.state() == "CANCELLED"
    assert run.restarts() == before
    assert "cancelled" in run.run_verb("status")
    assert run.complete_steps()[-1] == run.steps()[-1].number, "it had time to save"
    record_fault(
        "scancel",
        how="launchers/slurm.py cancel RUN",
        promised="saves if Slurm leaves the time, and is not requeued",
        happened="saved, not requeued",
        detected_seconds=ended,
        steps_lost=0,
    )
