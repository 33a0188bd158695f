"""The command on a real cluster: a job on four nodes, an array, shared work, and runs that are not submitted twice."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.slurm_jobs import ROOT, Cluster, Run, wait_until, write_training

from dreamdance.launch.requeue import read_failures
from dreamdance.runs.finished_clips import PARTS_FOLDER

PREPARE = ROOT / "recipes" / "demo" / "prepare.yaml"
SMALL = ("dancers.num_validation_clips=4", "clips_per_part=2", "num_workers=1", "cluster.cpus_per_task=1")
NEVER = "cluster.sbatch_arguments={begin: now+1hour}"


@pytest.fixture
def short_training(cluster: Cluster, tmp_path: Path, shards: Path):
    """A training of a few steps, with as many ranks as samples in a batch."""
    recipe = write_training(tmp_path, shards, {"max_steps": 6, "batch_size": 4, "validation.loss_every_steps": 6})
    return Run(cluster, tmp_path, recipe, "short")


def test_a_training_on_four_nodes_is_followed_to_its_end_without_accounting(short_training, capsys):
    run = short_training
    run.words = ("cluster.nodes=4",)
    done = run.launch("--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"short: slurm job {run.job.job_id}, 4 processes, log ")
    assert any(line.startswith("step 6/6") for line in lines), done.stdout
    assert lines[-1].startswith("short finished in ")
    assert [step.number for step in run.steps()] == [1, 2, 3, 4, 5, 6]
    with capsys.disabled():  # for readers of CI's output
        sys.stdout.write(f"\n{done.stdout}\nlog of rank 0 of 4:\n{run.log()}\n")
    again = run.launch()
    assert (again.returncode, again.stdout.count("\n")) == (0, 1)
    shown = run.run_verb("status")
    assert "(stage1): finished" in shown
    assert "nodes        node1, node2, node3, node4" in shown
    assert "restarts     0" in shown
    assert "checkpoint   step_00000006, complete since " in shown


def test_every_rank_sees_all_gpus_of_its_node_and_the_error_names_them_if_torch_finds_none(short_training):
    """DeepSpeed and torch use the GPU with the number of the local rank."""
    run = short_training
    run.words = ("cluster.nodes=2", "cluster.tasks_per_node=2", "cluster.gpus_per_node=2", "cluster.max_requeues=0")
    done = run.launch("--follow")
    assert done.returncode == 1, done.stdout + done.stderr
    failures = read_failures(run.run_folder)
    assert failures, done.stderr
    for failure in failures:
        rank = int(failure["rank"])
        host, wanted = f"node{1 + rank // 2}", rank % 2
        assert failure["text"].startswith(f"rank {rank} on {host} needs GPU {wanted}, but torch finds 0 ")
        assert "(CUDA_VISIBLE_DEVICES '0,1')" in failure["text"]
    assert "needs GPU" in done.stderr
    assert "it was requeued 0 times already, see cluster.max_requeues" in run.log() + done.stdout
    record_fault(
        "GPUs that the job asked for are not there",
        how="2 nodes x 2 tasks with 2 stand-ins each that Slurm allocates as GPUs",
        promised="no rank computes on the CPU silently: it names host, GPU and visible GPUs; may be tried again",
        happened=failures[0]["text"],
    )


def test_a_sweep_is_one_array_with_a_run_folder_each_even_on_one_node(short_training):
    run = short_training
    run.words = ("cluster.tasks_per_node=2", "cluster.sbatch_arguments={nodelist: node1}")
    done = run.launch("--sweep", "optimizer.lr=1e-3,2e-3", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [Run(run.cluster, run.folder, run.recipe, f"short_lr_{value}") for value in ("1e_3", "2e_3")]
    ids = [one.job.job_id for one in runs]
    assert [part.partition("_")[2] for part in ids] == ["0", "1"]
    assert len({part.partition("_")[0] for part in ids}) == 1, "one array"
    for one in runs:
        assert f"{one.name} finished in " in done.stdout
        assert one.steps()[-1].number == 6
        assert "step 6/6" in one.log(), "its log is in its own folder"
        assert run.cluster.show(one.job.job_id)["NodeList"] == "node1"
    shared = [run.cluster.show(one.job.job_id) for one in runs]
    assert min(job["EndTime"] for job in shared) > max(job["StartTime"] for job in shared), "at the same time"
    assert runs[0].steps()[-1].loss != runs[1].steps()[-1].loss
    record_fault(
        "two jobs on one node",
        how="an array of two runs of two ranks on one node, at the same time",
        promised="the runs do not disturb each other",
        happened="both finished",
    )


def test_a_rank_that_slurm_lost_ends_when_its_successor_starts(short_training, cluster):
    """Nothing else would end it: no other rank waits for it, and no slurmd can get a request."""
    run = short_training
    run.words = ("max_steps=100000", "checkpoint.every_steps=20", "cluster.partition=low")
    assert run.launch().returncode == 0
    run.wait_for_steps(3)
    lost, fault_time = cluster.show(run.job.job_id)["BatchHost"], time.time()
    (orphan,) = run.rank_pids().values()
    cluster.control("kill-daemon", lost.removeprefix("node"))
    wait_until(lambda: cluster.show(run.job.job_id).get("BatchHost") not in (lost, None), "another node")
    assert Path(f"/proc/{orphan}").exists(), "Slurm did not end it"
    wait_until(lambda: not Path(f"/proc/{orphan}").exists(), "the orphan's end")
    ended = time.time()
    assert "another start owns this run now" in run.log()
    before = len(run.steps())
    wait_until(lambda: len(run.steps()) > before + 3, "the successor's steps")
    assert run.restarts() == 1, "the batch script of the lost start must not requeue its successor"
    assert "resuming" in run.log()
    record_fault(
        "slurmd lost under a job of one node",
        how="SIGKILL to the slurmd; its rank continues unnoticed",
        promised="the rank ends when its successor has begun",
        happened="ended by itself, without saving",
        detected_seconds=ended - fault_time,
        resumed_seconds=run.steps()[before].time - fault_time,
    )
    run.run_verb("cancel")
    cluster.control("start-node", lost.removeprefix("node"))
    wait_until(lambda: cluster.node_states()[lost] == "idle", "the node's return", 60)


def test_a_lost_ranks_share_of_the_clips_is_made_by_the_next_attempt(cluster, tmp_path):
    words = ("dancers.num_train_clips=60", *SMALL, "cluster.nodes=4", "cluster.partition=low")
    run = Run(cluster, tmp_path, PREPARE, "shares", *words)
    assert run.launch().returncode == 0
    parts = tmp_path / "data" / "demo" / "train" / PARTS_FOLDER
    wait_until(lambda: len(list(parts.glob("part_*"))) >= 4, "the first parts")
    fault_time = time.time()
    pids = set(run.rank_pids().values())
    run.signal_rank(2, signal.SIGKILL)
    wait_until(lambda: not pids & set(run.rank_pids().values()), "the others' end")
    detected = time.time() - fault_time
    done = run.launch("--follow")
    assert "not submitted again, slurm job" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr + run.logs()
    assert run.restarts() == 1
    assert len((tmp_path / "data" / "demo" / "manifest.jsonl").read_text().splitlines()) == 4
    record_fault(
        "rank killed that makes shards",
        how="SIGKILL to one of four ranks",
        promised="the job is requeued, finished shards are kept",
        happened="all shards made by the second attempt",
        detected_seconds=detected,
    )


def test_an_error_of_the_user_is_shown_and_not_tried_again(cluster, tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a.rgb.mp4", "a.pose.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"no video")
    words = ("videos.folder=videos", "output=data/videos", "num_workers=1", "cluster.nodes=2", "cluster.memory_gib=1")
    run = Run(cluster, tmp_path, ROOT / "recipes" / "prepare.yaml", "hopeless", *words, "cluster.cpus_per_task=1")
    done = run.launch("--follow")
    assert done.returncode == 1
    assert "set `videos.split_by` to time" in done.stderr
    assert "Traceback" not in done.stderr
    assert run.restarts() == 0
    assert "names what to change" in run.log()


def test_a_queued_run_is_not_submitted_again_and_can_be_cancelled(cluster, tmp_path):
    run = Run(cluster, tmp_path, PREPARE, "queued", NEVER)
    assert run.launch().returncode == 0
    job_id = run.job.job_id
    again = run.launch()
    assert again.returncode == 4
    assert f"queued: not submitted again, slurm job {job_id} is already pending" in again.stdout
    assert "pending: BeginTime" in run.run_verb("status")
    changed = Run(cluster, tmp_path, PREPARE, "queued", NEVER, "seed=1").launch()
    assert changed.returncode == 3
    assert "seed: 0 -> 1" in changed.stderr
    assert len(cluster.slurm("squeue", "--noheader", "--name=queued").splitlines()) == 1
    assert f"cancelled slurm job {job_id}" in run.run_verb("cancel")
    assert run.state() == "CANCELLED"
    assert "nothing to cancel" in run.run_verb("cancel")


def test_two_launchers_at_once_submit_one_job(cluster, tmp_path):
    run = Run(cluster, tmp_path, PREPARE, "twice", NEVER)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: run.launch(), range(4)))
    assert len(cluster.slurm("squeue", "--noheader", "--name=twice").splitlines()) == 1
    assert sorted(one.returncode for one in done) == [0, 4, 4, 4]
    job_id = run.job.job_id
    for one in done:
        refusal = f"twice: not submitted again, slurm job {job_id} is already "
        assert (f"twice: slurm job {job_id}" if one.returncode == 0 else refusal) in one.stdout
    run.run_verb("cancel")
    record_fault(
        "two runs of one name",
        how="four launchers of one run at once",
        promised="one job; another recipe of that name is refused",
        happened="one job, the others ended with code 4 and its id",
    )


def test_a_job_of_the_same_number_in_a_new_cluster_does_not_belong_to_the_run(small_cluster, tmp_path):
    run = Run(small_cluster, tmp_path, PREPARE, "wiped", NEVER)
    assert run.launch().returncode == 0
    number = run.job.job_id
    small_cluster.stop()
    assert "Slurm does not answer" in run.run_verb("status")
    small_cluster.start()
    small_cluster.slurm("sbatch", "--begin=now+1hour", "--output=/dev/null", "--wrap=true")
    assert small_cluster.show(number)["JobState"] == "PENDING", "the same number, the job of another user"
    assert "gone from the queue without finishing" in run.run_verb("status")
    assert "nothing to cancel" in run.run_verb("cancel")
    assert small_cluster.show(number)["JobState"] == "PENDING"
    # Files of a job with that number do not count for the next job either.
    small_cluster.stop()
    logs = run.run_folder / "logs"
    (logs / f"{number}_0_log.out").write_text("2026-11-22 17:00:00,123 WARNING old: old news\n")
    (logs / "requeues.jsonl").write_text("old news\n")
    small_cluster.start()
    assert run.launch().returncode == 0
    assert run.job.job_id == number
    assert "old news" not in run.log() + run.run_verb("status")
    assert "old news" in (logs / "earlier" / "0000" / f"{number}_0_log.out").read_text()
    record_fault(
        "job ids reused by a new cluster",
        how="the controller's state deleted, another job given the number",
        promised="neither the other job nor old files count as those of the run",
        happened="distinguished by the script, old files moved away",
    )


def test_the_error_of_slurm_is_shown(cluster, tmp_path):
    done = Run(cluster, tmp_path, PREPARE, "refused", "cluster.partition=nowhere").launch()
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_options_of_a_site_are_accepted_by_sbatch(cluster, tmp_path):
    words = [
        "account=lab",
        "memory_gib=2",
        "mail_user=me@lab",
        "setup=['ulimit -c 0']",
        "environment={A: 'b c'}",
        "nodes=2",
    ]
    words += ["time_minutes=30", "stop_seconds=60", "partition=high", "srun_arguments=[--cpu-bind=none]"]
    words += ["sbatch_arguments={comment: 'a word', exclusive: '', begin: now+1hour}"]
    run = Run(cluster, tmp_path, PREPARE, "wanted", *(f"cluster.{word}" for word in words))
    done = run.launch()
    assert done.returncode == 0, done.stderr
    job = cluster.show(run.job.job_id)
    assert (job["Account"], job["Partition"], job["TimeLimit"]) == ("lab", "high", "00:30:00")
    assert job["NumNodes"].startswith("2")
    assert job["MinMemoryNode"] == "2G"
    assert job["MailUser"] == "me@lab"
    assert job["Requeue"] == "1"
    run.run_verb("cancel")


def test_a_cluster_can_be_started_and_stopped_again_in_seconds(small_cluster):
    small_cluster.stop()
    started = time.monotonic()
    small_cluster.start()
    assert time.monotonic() - started < 10
    assert small_cluster.slurm("srun", "hostname") == "node1"
    small_cluster.stop()
    left = subprocess.run(["pgrep", "-f", str(small_cluster.folder)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
