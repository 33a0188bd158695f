"""Hands a run folder's job to this machine or to Slurm through submitit, and tells how a submitted job is doing."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor

from dreamdance.errors import UserError
from dreamdance.launch.finished import is_finished
from dreamdance.launch.job import Job
from dreamdance.launch.local_controller import CANCELLED, MAX_REQUEUES_VARIABLE, status_file
from dreamdance.recipe import Recipe

ClusterName = Literal["slurm", "local", "debug"]
State = Literal["pending", "running", "finished", "failed", "cancelled"]
SIGNAL_DELAY_SECONDS = 120
CANCEL_TIMEOUT_SECONDS = 20.0
# Without -P, `python -m` would put the working directory on sys.path, where a checkout has a folder `kernels/`.
PYTHON = f"{shlex.quote(sys.executable)} -P"


@dataclass(frozen=True)
class SubmittedJob:
    """What is remembered of a submission, in `logs/job.json`."""

    cluster: ClusterName
    job_id: str
    num_tasks: int
    host: str
    submitted: float
    launcher_pid: int
    process_start: str | None  # tells a local job from a later process of the same number

    @property
    def pid(self) -> int:
        """The process that stands for the job on its host: the controller, or the launcher itself."""
        return self.launcher_pid if self.cluster == "debug" else int(self.job_id)

    def log_file(self, run_folder: Path, rank: int = 0) -> Path:
        return run_folder / "logs" / f"{self.job_id}_{rank}_log.out"


@dataclass(frozen=True)
class JobStatus:
    """Where a job stands; `detail` in the cluster's words."""

    state: State
    detail: str
    failed_rank: int | None = None


def choose_cluster(wanted: str) -> ClusterName:
    """`auto` takes Slurm where a cluster answers, else this machine."""
    if wanted == "auto":
        return "slurm" if _slurm_answers() else "local"
    if wanted == "slurm" and not _slurm_answers():
        raise UserError("no Slurm cluster answers here (`sinfo` failed or is missing); use --cluster local")
    return wanted  # type: ignore[return-value]  # argparse has checked the choice


def _slurm_answers() -> bool:
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        return False
    try:
        answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=15, check=False)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0 and bool(answer.stdout.strip())


# ------------------------------------------------------------------------------------------ submitting


def submit(recipe: Recipe, run_folder: Path, cluster: ClusterName) -> SubmittedJob:
    """Submits the run's job and remembers it in the run folder; `debug` is only remembered, the caller runs it."""
    start: str | None = None
    if cluster == "debug":
        job_id, start = "debug", _process_start(os.getpid())
    elif cluster == "slurm":
        job_id = slurm_executor(recipe, run_folder).submit(Job(run_folder)).job_id
    else:
        job_id = _local_executor(recipe, run_folder).submit(Job(run_folder)).job_id
        start = _process_start(int(job_id))
    tasks = recipe.cluster.world_size
    job = SubmittedJob(cluster, job_id, tasks, socket.gethostname(), time.time(), os.getpid(), start)
    (run_folder / "logs" / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    return job


def last_job(run_folder: Path) -> SubmittedJob | None:
    """The job that was submitted last for this run."""
    path = run_folder / "logs" / "job.json"
    return SubmittedJob(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


class _SlurmExecutor(SlurmExecutor):
    """Renders batch scripts on machines without Slurm too; `choose_cluster` guards submission."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def slurm_executor(recipe: Recipe, run_folder: Path) -> SlurmExecutor:
    """submitit's executor with everything that the recipe's `cluster` section asks for."""
    cluster = recipe.cluster
    executor = _SlurmExecutor(run_folder / "logs", max_num_timeout=cluster.max_requeues, python=PYTHON)
    srun = ["--kill-on-bad-exit=1", "--wait=60", f"--cpus-per-task={cluster.cpus_per_task}", *cluster.srun_arguments]
    if cluster.container_image:
        srun.append(f"--container-image={cluster.container_image}")
    environment = {"PYTHONSAFEPATH": "1", **cluster.environment}
    optional = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mail_user": cluster.mail_user,
        "mem": None if cluster.memory_gib is None else f"{cluster.memory_gib}G",
        "gpus_per_node": cluster.gpus_per_node or None,
    }
    reservation = {"reservation": cluster.reservation} if cluster.reservation else {}
    executor.update_parameters(
        job_name=recipe.name,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.tasks_per_node,
        cpus_per_task=cluster.cpus_per_task,
        time=cluster.time_minutes,
        signal_delay_s=SIGNAL_DELAY_SECONDS,
        stderr_to_stdout=True,
        srun_args=srun,
        setup=[*(f"export {name}={shlex.quote(value)}" for name, value in environment.items()), *cluster.setup],
        additional_parameters={**reservation, **cluster.sbatch_arguments},
        **{name: value for name, value in optional.items() if value is not None},
    )
    return executor


def batch_script(recipe: Recipe, run_folder: Path) -> str:
    """The text that `sbatch` would be given."""
    executor = slurm_executor(recipe, run_folder)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


class _LocalExecutor(LocalExecutor):
    """submitit's local executor under our own controller, in a session of its own."""

    def __init__(self, run_folder: Path, recipe: Recipe) -> None:
        super().__init__(run_folder / "logs", max_num_timeout=recipe.cluster.max_requeues, python=PYTHON)
        self.run_folder = run_folder
        self.recipe = recipe

    def _submit_command(self, command: str) -> LocalJob[Any]:
        cluster = self.recipe.cluster
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cluster.gpus_per_node))))
        environment = inherited | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(cluster.tasks_per_node),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * cluster.time_minutes),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(SIGNAL_DELAY_SECONDS),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "CUDA_VISIBLE_DEVICES": visible if cluster.gpus_per_node else "",
            MAX_REQUEUES_VARIABLE: str(cluster.max_requeues),
        }
        words = [sys.executable, "-P", "-m", "dreamdance.launch.local_controller", str(self.run_folder)]
        with (self.run_folder / "logs" / "controller.log").open("ab") as log:
            process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        tasks = list(range(cluster.tasks_per_node))
        return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=tasks)


def _local_executor(recipe: Recipe, run_folder: Path) -> LocalExecutor:
    executor = _LocalExecutor(run_folder, recipe)
    executor.update_parameters(timeout_min=recipe.cluster.time_minutes)
    return executor


# ------------------------------------------------------------------------------------------ watching and ending


def status_of(job: SubmittedJob, recipe: Recipe, run_folder: Path) -> JobStatus:
    """Where a job stands now."""
    if job.cluster == "slurm":
        return _slurm_status(job, recipe, run_folder)
    ending = status_file(run_folder, job.job_id)
    if ending.is_file():
        return _local_ending(json.loads(ending.read_text(encoding="utf-8")))
    if job.host != socket.gethostname():
        return JobStatus("running", f"on {job.host}, which cannot be asked from here")
    if job.process_start is not None and _process_start(job.pid) == job.process_start:
        return JobStatus("running", f"process {job.pid}")
    if ending.is_file():  # it ended between the two looks
        return _local_ending(json.loads(ending.read_text(encoding="utf-8")))
    if is_finished(recipe, run_folder):
        return JobStatus("finished", "exit code 0")
    return JobStatus("failed", "its process is gone (killed, or the machine was restarted)")


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
        name += " (out of memory? `dmesg` knows)"
    return JobStatus("failed", f"rank {rank} {name}", rank)


def _slurm_status(job: SubmittedJob, recipe: Recipe, run_folder: Path) -> JobStatus:
    """Asks squeue, which needs no accounting; a job that it has forgotten is judged by what it left behind."""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={job.job_id}", "--format=%T"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    lines = answer.stdout.split()
    word = lines[0] if answer.returncode == 0 and lines else ""
    if word in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"):
        return JobStatus("pending", word.lower())
    if word in ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"):
        return JobStatus("running", word.lower())
    if word == "" and answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        return JobStatus("running", "squeue does not answer")
    if word == "COMPLETED" or (word == "" and is_finished(recipe, run_folder)):
        return JobStatus("finished", "completed")
    if word == "CANCELLED":
        return JobStatus("cancelled", "by scancel")
    return JobStatus("failed", word.lower() or "gone from the queue without finishing")


def cancel(job: SubmittedJob) -> None:
    """Ends a job; a local one with everything that it started, before this returns."""
    if job.cluster == "slurm":
        subprocess.run(["scancel", job.job_id], check=True, timeout=60)
        return
    if job.cluster == "debug" or job.host != socket.gethostname():
        raise UserError(f"a {job.cluster} job on {job.host} cannot be cancelled from here")
    pid = job.pid
    if _process_start(pid) != job.process_start:
        return
    os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + CANCEL_TIMEOUT_SECONDS
    while _process_start(pid) == job.process_start:
        if time.monotonic() > give_up:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.05)


def _process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
