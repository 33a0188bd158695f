"""Submits the jobs of run folders to this machine or to Slurm; finds out the status of a job, and cancels it."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dreamdance.errors import UserError
from dreamdance.launch import slurm_cluster
from dreamdance.launch.finished import is_finished
from dreamdance.launch.job import DEBUG_JOB, failure_file
from dreamdance.launch.local.controller import CANCELLED, status_file
from dreamdance.launch.local.heartbeat import SILENT_SECONDS, job_file, silent_seconds
from dreamdance.launch.requeue import requeues_files
from dreamdance.recipe import Recipe
from dreamdance.runs.array_member import all_done_file
from dreamdance.runs.durations import duration
from dreamdance.runs.files import PARTIAL_FILES, remove, write_atomically
from dreamdance.runs.layout import QUEUE_FOLDER, failures_folder
from dreamdance.runs.members import process_start

ClusterName = Literal["slurm", "local", "debug"]
State = Literal["pending", "running", "finished", "failed", "cancelled"]
CANCEL_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class SubmittedJob:
    """The record of a submission, in `logs/job.json`.

    Attributes:
        job_id: the job's id, or that of the array whose members share the run.
        num_tasks: number of processes of a job.
        process_start: distinguishes a local job from a later process with the same number.
        script: path of the batch script; distinguishes jobs when Slurm reuses ids.
        array: the number of jobs that share the run.
    """

    cluster: ClusterName
    job_id: str
    num_tasks: int
    host: str
    submitted: float
    launcher_pid: int
    process_start: str | None
    script: str | None = None
    array: int = 1

    @property
    def pid(self) -> int:
        """The job's main process on its host: the controller, or the launcher itself."""
        return self.launcher_pid if self.cluster == "debug" else int(self.job_id)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the job is a local job of another machine."""
        return self.cluster != "slurm" and self.host != socket.gethostname()

    @property
    def members(self) -> list[str]:
        """The ids of the jobs that share the run."""
        return [self.job_id] if self.array == 1 else [f"{self.job_id}_{number}" for number in range(self.array)]

    def log_file(self, run_folder: Path, rank: int = 0, *, member: str | None = None) -> Path:
        """The log of a rank of one of the `members`, by default of the first."""
        return run_folder / "logs" / f"{member or self.members[0]}_{rank}_log.out"


@dataclass(frozen=True)
class JobStatus:
    """The state of a job; `detail` in the cluster's words."""

    state: State
    detail: str
    failed_rank: int | None = None

    @property
    def is_active(self) -> bool:
        """Whether the job runs, or is queued."""
        return self.state in ("running", "pending")


def choose_cluster(wanted: ClusterName | Literal["auto"]) -> ClusterName:
    """The cluster for `--cluster`: `auto` is Slurm if a cluster answers, else this machine."""
    if wanted == "auto":
        return "slurm" if slurm_cluster.answers() else "local"
    if wanted == "slurm" and not slurm_cluster.answers():
        raise UserError("no Slurm cluster answers here (`sinfo` failed or is missing); use --cluster local")
    return wanted


def submit(recipes: Sequence[Recipe], run_folders: Sequence[Path], cluster: ClusterName) -> list[SubmittedJob]:
    """Submits the jobs of several runs, on Slurm as one array, and records each in its run folder.

    A `debug` job is only recorded; the caller runs it. The caller holds the locks of all runs (`run_folder.locked`),
    none of them has a job, and all have the same `cluster` section.
    """
    for run_folder in run_folders:
        _put_away_leftovers(run_folder)
    if cluster == "slurm":
        if len(recipes) == 1:
            parts = [slurm_cluster.submit(recipes[0], run_folders[0])]
        else:
            parts = slurm_cluster.submit_array(recipes, run_folders)
        known = [_remembered("slurm", part.job_id, recipes[0], script=str(part.script)) for part in parts]
    elif cluster == "debug":
        known = [
            _remembered("debug", DEBUG_JOB, recipe, process_start=process_start(os.getpid())) for recipe in recipes
        ]
    else:
        pids = [_start_controller(*pair) for pair in zip(recipes, run_folders, strict=True)]
        known = [
            _remembered("local", str(pid), recipe, process_start=process_start(pid))
            for pid, recipe in zip(pids, recipes, strict=True)
        ]
    for job, run_folder in zip(known, run_folders, strict=True):
        write_atomically(job_file(run_folder), json.dumps(asdict(job)))
    return known


def _remembered(
    cluster: ClusterName, job_id: str, recipe: Recipe, *, process_start: str | None = None, script: str | None = None
) -> SubmittedJob:
    return SubmittedJob(
        cluster=cluster,
        job_id=job_id,
        num_tasks=recipe.cluster.world_size,
        host=socket.gethostname(),
        submitted=time.time(),
        launcher_pid=os.getpid(),
        process_start=process_start,
        script=script,
        array=recipe.cluster.array,
    )


def _put_away_leftovers(run_folder: Path) -> None:
    """Moves the files of earlier jobs into `logs/earlier`: a new job may have the same id or process number.

    The work queue is removed: a process that was lost on another machine would still count as at work in it.
    """
    remove(run_folder / QUEUE_FOLDER)
    logs = run_folder / "logs"
    for path in (*run_folder.glob(PARTIAL_FILES), *logs.glob(PARTIAL_FILES)):
        path.unlink(missing_ok=True)
    left = [path for pattern in ("*_log.out", "*_status.json", "*_submission.sh") for path in logs.glob(pattern)]
    all_done_file(run_folder).unlink(missing_ok=True)
    left += [path for path in (failures_folder(run_folder), *requeues_files(run_folder)) if path.exists()]
    if not left:
        return
    earlier = logs / "earlier" / f"{len(list((logs / 'earlier').glob('*'))):04d}"
    earlier.mkdir(parents=True)
    for path in left:
        path.rename(earlier / path.name)
    for link in logs.glob(".submission_file_*.sh"):
        link.unlink()


def last_job(run_folder: Path) -> SubmittedJob | None:
    """The job that was submitted last for this run; None if none was."""
    path = job_file(run_folder)
    return SubmittedJob(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _start_controller(recipe: Recipe, run_folder: Path) -> int:
    """Starts our subclass of submitit's local controller in its own session; returns the process number."""
    cluster, logs = recipe.cluster, run_folder / "logs"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cluster.gpus_per_node))))
    environment = inherited | {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": str(cluster.tasks_per_node),
        "SUBMITIT_LOCAL_COMMAND": shlex.join([*slurm_cluster.PYTHON, "-m", "dreamdance.launch.rank", str(logs)]),
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * cluster.time_minutes),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(cluster.stop_seconds),
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "1",
        "CUDA_VISIBLE_DEVICES": visible if cluster.gpus_per_node else "",
    }
    words = [sys.executable, "-P", "-m", "dreamdance.launch.local.controller", str(run_folder)]
    with (logs / "controller.log").open("ab") as log:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return process.pid


def status_of(job: SubmittedJob, recipe: Recipe, run_folder: Path) -> JobStatus:
    """The present status of a job."""
    if job.cluster == "slurm":
        return _slurm_status(job, recipe, run_folder)
    ending = status_file(run_folder, job.job_id)
    if ending.is_file():
        return _local_ending(json.loads(ending.read_text(encoding="utf-8")))
    if job.is_elsewhere:
        return _distant_status(job, run_folder)
    if job.process_start is not None and process_start(job.pid) == job.process_start:
        return JobStatus("running", f"process {job.pid}")
    if ending.is_file():  # the job ended between the two checks
        return _local_ending(json.loads(ending.read_text(encoding="utf-8")))
    if is_finished(recipe, run_folder):
        return JobStatus("finished", "exit code 0")
    if job.cluster == "debug" and failure_file(run_folder, DEBUG_JOB, 0).is_file():  # it has no controller
        return JobStatus("failed", "ended with an error")
    return JobStatus("failed", "its process is gone (killed, or the machine was restarted)")


def _distant_status(job: SubmittedJob, run_folder: Path) -> JobStatus:
    """The status of a local job on another machine, which may be gone, from the job's heartbeat."""
    try:
        silent = silent_seconds(run_folder)
    except OSError as error:
        return JobStatus("running", f"on {job.host}; its heartbeat cannot be read: {error}")
    if silent <= SILENT_SECONDS:
        return JobStatus("running", f"on {job.host}, last heartbeat {duration(silent)} ago")
    how_long = "" if silent == float("inf") else f" for {duration(silent)}"
    return JobStatus("failed", f"no heartbeat{how_long}: {job.host}, or the job there, is gone")


def _local_ending(status: dict[str, Any]) -> JobStatus:
    if status["exit_code"] == 0:
        return JobStatus("finished", "exit code 0")
    rank, codes = status["first_failed_rank"], status["rank_exit_codes"]
    if status["ended_by"] == CANCELLED:
        return JobStatus("cancelled", "by a signal to its controller")
    if status["ended_by"]:
        return JobStatus("failed", str(status["ended_by"]), rank)
    if rank is None or not codes:
        return JobStatus("failed", "it could not start")
    code = codes[rank]
    name = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        name += " (out of memory? see `dmesg`)"
    return JobStatus("failed", f"rank {rank} {name}", rank)


def _slurm_status(job: SubmittedJob, recipe: Recipe, run_folder: Path) -> JobStatus:
    """Queries Slurm, without accounting; if Slurm has forgotten the job, the run folder decides.

    An array runs while one of its members does. It has finished when the run has and no member runs: members that wait
    in the queue have nothing left to do.
    """
    try:
        records = [slurm_cluster.ask(member, job.script) for member in job.members]
    except slurm_cluster.SlurmUnavailableError:
        return JobStatus("running", "Slurm does not answer")
    found = [_record_status(record) for record in records if record is not None]
    if job.array == 1 and found:
        return found[0]
    running = [status for status in found if status.state == "running"]
    if not running and is_finished(recipe, run_folder):
        return JobStatus("finished", "completed")
    for state in ("running", "pending", "failed", "cancelled"):
        if alike := [status for status in found if status.state == state]:
            return JobStatus(alike[0].state, f"{len(alike)} of {job.array} jobs: {alike[0].detail}")
    return JobStatus("failed", "gone from the queue without finishing")


def _record_status(record: slurm_cluster.SlurmRecord) -> JobStatus:
    detail = record.state.lower()
    if record.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"):
        why = "" if record.reason in ("", "None") else f": {record.reason}"
        return JobStatus("pending", detail + why)
    if record.state in ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"):
        return JobStatus("running", f"{detail} on {record.nodes}" if record.nodes else detail)
    if record.state == "COMPLETED":
        return JobStatus("finished", detail)
    if record.state == "CANCELLED":
        return JobStatus("cancelled", "by scancel")
    return JobStatus("failed", detail)


def cancel(job: SubmittedJob) -> None:
    """Ends a job. A local job has ended, with all processes that it started, when this returns."""
    if job.cluster == "slurm":
        slurm_cluster.cancel(job.job_id, job.script)
        return
    if job.is_elsewhere:
        raise UserError(
            f"a {job.cluster} job on {job.host} cannot be cancelled from this machine: do that there. If that machine "
            f"is gone, the run can be started again {SILENT_SECONDS:.0f} s after the job's last heartbeat"
        )
    if job.cluster == "debug":
        raise UserError(f"a debug job runs in its launcher: end process {job.pid}")
    pid = job.pid
    if process_start(pid) != job.process_start:
        return
    os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + CANCEL_TIMEOUT_SECONDS
    while process_start(pid) == job.process_start:
        if time.monotonic() > give_up:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.05)
