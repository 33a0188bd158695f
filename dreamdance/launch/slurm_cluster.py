"""Talks to Slurm: writes the batch script, submits a job or an array, queries and cancels. Needs no accounting.

An array is either one job for each of several runs, or several jobs that share the items of one run (`cluster.array`).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from dreamdance.errors import UserError
from dreamdance.recipe import Recipe, TrainingRecipe
from dreamdance.recipe.sections import Cluster
from dreamdance.runs.array_member import MEMBER
from dreamdance.runs.layout import FAILURES_FOLDER

ASK_TIMEOUT_SECONDS = 60
# How often the batch script repeats a request to Slurm's controller, which may be restarting: for a minute.
NUM_REQUESTS, REQUEST_SECONDS = 12, 5
# Without -P, `python -m` would put the working directory on sys.path, where a checkout has a folder `kernels/`.
PYTHON = (sys.executable, "-P", "-u")


@dataclass(frozen=True)
class SlurmRecord:
    """A job in Slurm; `state` in Slurm's words, `nodes` as Slurm abbreviates them, empty before the job runs."""

    state: str
    reason: str
    nodes: str
    restarts: int


class SlurmUnavailableError(Exception):
    """The controller did not answer; the state of the job is unknown."""


def answers() -> bool:
    """Whether a Slurm cluster answers here."""
    if shutil.which("sinfo") is None or shutil.which("sbatch") is None:
        return False
    try:
        answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=15, check=False)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0 and bool(answer.stdout.strip())


class _Executor(SlurmExecutor):
    """Renders and submits the batch script of one run, or of an array of runs.

    The ranks get only the path of the run folder. So submitit writes no pickles, and cannot read the result of another
    job that had the same id.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, num_runs: int | None) -> None:
        """Sets submitit's parameters.

        Args:
            folder: the run's `logs`; for an array, a folder with a link 0, 1, ... to the `logs` of each run.
            recipe: its `cluster` section is what the job requests; all runs of an array have the same section.
            num_runs: the number of runs in the array; None for one run, whose `cluster.array` may be an array, too.
        """
        super().__init__(folder)
        self.script: Path | None = None
        self._num_runs = num_runs
        has_members = num_runs is None and recipe.cluster.array > 1
        size = recipe.cluster.array if has_members else num_runs
        self._logs = shlex.quote(str(self.folder)) + ("" if num_runs is None else '/"$SLURM_ARRAY_TASK_ID"')
        # In the last task of an array, $SLURM_JOB_ID is the array's id; a command with it would act on all tasks.
        self._job = "$SLURM_JOB_ID" if size is None else "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
        asked = _parameters(recipe)
        # Removed before any rank starts: after a requeue by hand, too, only failures of the present start count.
        failures = f"{self._logs}/{FAILURES_FOLDER}" + ('/"$SLURM_ARRAY_TASK_ID"' if has_members else "")
        member = [f'export {MEMBER}="{self._job}"'] if has_members else []
        setup = [f"rm -rf {failures}", *member, *asked.pop("setup")]
        self.update_parameters(**asked, setup=setup, teardown=self._ending(recipe))
        if size is not None:
            self.parameters["map_count"] = size

    @classmethod
    def affinity(cls) -> int:
        return 2  # so that a machine without Slurm can render the script; `choose_cluster` guards submission

    @property
    def _submitit_command_str(self) -> str:
        return f"{shlex.join([*PYTHON, '-m', 'dreamdance.launch.rank'])} {self._logs}"

    def _ending(self, recipe: Recipe) -> list[str]:
        """The script's last lines: put the job back into the queue, unless it was cancelled or is back already.

        The requeued job may run on another node by now, if Slurm gave this node up; the number of restarts shows that.
        A controller that is being restarted does not answer; the script repeats its request for a minute.
        """
        cluster = recipe.cluster
        words = [*PYTHON, "-m", "dreamdance.launch.requeue"]
        if cluster.container_image:
            inside = ["--nodes=1", "--ntasks=1", "--overlap", *cluster.srun_arguments]
            words = ["srun", *inside, f"--container-image={cluster.container_image}", *words]
        return [
            "code=$?",
            f'answers() {{ state=$(echo $(squeue --noheader --jobs="{self._job}" --Format=State:20,RestartCnt:20)); '
            '[ -n "$state" ]; }',
            'is_running() { [ "$state" = "RUNNING ${SLURM_RESTART_COUNT:-0}" ]; }',
            # Slurm may have received a request whose answer was lost: so each request checks the state first.
            f'put_back() {{ answers && {{ ! is_running || scontrol requeue "{self._job}"; }}; }}',
            f'retry() {{ for attempt in {{1..{NUM_REQUESTS}}}; do "$@" && return; sleep {REQUEST_SECONDS}; done; '
            'echo "Slurm did not answer, or refused, for a minute; is this job back in the queue?" >&2; '
            "return 1; }",
            f'if retry answers && is_running && {shlex.join(words)} {self._logs} "$code"; then',
            "    retry put_back",
            "fi",
            'exit "$code"',
        ]

    def text(self) -> str:
        """The batch script."""
        text: str = super()._make_submission_file_text(self._submitit_command_str, "")
        # Each run of an array logs to its own folder. submitit has no parameter for that path.
        return text if self._num_runs is None else text.replace(f"{self.folder}/%A_", f"{self.folder}/%a/%A_")

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.text()

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self.script = submission_file_path
        # A job may submit another job, which must not inherit this job's settings.
        foreign = ("SLURM_", "SUBMITIT_", MEMBER)
        inherited = [name for name in os.environ if name.startswith(foreign) and name != "SLURM_CONF"]
        return ["env", *(f"--unset={name}" for name in inherited), "sbatch", str(submission_file_path)]

    def submit_script(self) -> str:
        """Submits the script and returns the job's id.

        Raises:
            UserError: Slurm refuses; the text is Slurm's own.
        """
        try:
            return str(self._submit_command(self._submitit_command_str).job_id)
        except FailedJobError as error:
            raise UserError(f"sbatch refuses the job: {str(error).strip()}") from None


def _parameters(recipe: Recipe) -> dict[str, Any]:
    """The recipe's `cluster` section as submitit's parameters."""
    cluster = recipe.cluster
    # Ranks that train end together. Where ranks share work, one rank may have much more left than the others.
    wait = 60 if isinstance(recipe, TrainingRecipe) else 0
    srun = ["--kill-on-bad-exit=1", f"--wait={wait}", f"--cpus-per-task={cluster.cpus_per_task}"]
    if cluster.gpus_per_node > 1 and not _has_distribution(cluster):
        # A node's GPUs are assigned to its sockets in blocks. Slurm's default assigns ranks to the sockets in turn, so
        # that half of the ranks would be far from their GPU.
        srun.append("--distribution=block:block")
    srun += cluster.srun_arguments
    if cluster.container_image:
        srun.append(f"--container-image={cluster.container_image}")
    environment = {"PYTHONSAFEPATH": "1", **cluster.environment}
    optional = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": None if cluster.memory_gib is None else f"{cluster.memory_gib}G",
        # If the recipe names the kind of GPU (sbatch_arguments), the number is in that argument.
        "gpus_per_node": None if cluster.gpus_by_kind else cluster.gpus_per_node or None,
        "mail_user": cluster.mail_user,
        "mail_type": cluster.mail_user and "END,FAIL,REQUEUE,TIME_LIMIT",
    }
    more: dict[str, object] = {"requeue": True}
    if cluster.reservation:
        more["reservation"] = cluster.reservation
    more |= {name.replace("-", "_"): value or True for name, value in cluster.sbatch_arguments.items()}
    return {
        "job_name": recipe.name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "time": cluster.time_minutes,
        "signal_delay_s": cluster.stop_seconds,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "setup": [*(f"export {name}={shlex.quote(value)}" for name, value in environment.items()), *cluster.setup],
        "additional_parameters": more,
        "wckey": None,  # submitit's default is `submitit`, which clusters that check such keys refuse
        **{name: value for name, value in optional.items() if value is not None},
    }


def _has_distribution(cluster: Cluster) -> bool:
    """Whether the recipe itself sets how ranks are distributed over nodes and sockets."""
    words = [*cluster.sbatch_arguments, *(word.removeprefix("--") for word in cluster.srun_arguments)]
    return any(word == "m" or word.startswith(("distribution", "-m")) for word in words)


@dataclass(frozen=True)
class Submission:
    """A job's id, and the path of its batch script, which distinguishes jobs when Slurm reuses ids."""

    job_id: str
    script: Path


def batch_script(recipe: Recipe, run_folder: Path) -> str:
    """The batch script, as `sbatch` would get it."""
    return _Executor(run_folder / "logs", recipe, num_runs=None).text()


def submit(recipe: Recipe, run_folder: Path) -> Submission:
    """Submits one run, as one job or as an array of `cluster.array` jobs; the id is then the array's."""
    return _submitted(_Executor(run_folder / "logs", recipe, num_runs=None))


def submit_array(recipes: Sequence[Recipe], run_folders: Sequence[Path]) -> list[Submission]:
    """Submits several runs with the same `cluster` section as one array; returns the task of each run."""
    folder = run_folders[0].parent / ".arrays" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    for number, run_folder in enumerate(run_folders):
        (folder / str(number)).symlink_to(os.path.relpath(run_folder / "logs", folder))
    whole = _submitted(_Executor(folder, recipes[0], num_runs=len(recipes)))
    return [Submission(f"{whole.job_id}_{number}", whole.script) for number in range(len(recipes))]


def _submitted(executor: _Executor) -> Submission:
    job_id = executor.submit_script()
    assert executor.script is not None  # set on the way to sbatch
    return Submission(job_id, executor.script)


def ask(job_id: str, script: str | None) -> SlurmRecord | None:
    """Queries Slurm for a job; None if it knows no job of that id, or only one with another script.

    Raises:
        SlurmUnavailableError: Slurm does not answer.
    """
    words = ["scontrol", "--oneliner", "show", "job", job_id]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=ASK_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError from None
    if answer.returncode != 0:
        if "Invalid job id" in answer.stderr:
            return None
        raise SlurmUnavailableError
    fields = _fields(answer.stdout.partition("\n")[0])
    if script is not None and fields.get("Command") != script:
        return None
    nodes = fields.get("NodeList", "")
    return SlurmRecord(
        state=fields["JobState"],
        reason=fields.get("Reason", ""),
        nodes="" if nodes == "(null)" else nodes,
        restarts=int(fields.get("Restarts", 0)),
    )


def _fields(line: str) -> dict[str, str]:
    """`JobId=1 JobName=a b JobState=RUNNING`, where values may hold spaces."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s[A-Z][\w/:]*=|\s*$)", line))


def cancel(job_id: str, script: str | None) -> None:
    """Ends a job, unless its id belongs to another job by now.

    Raises:
        UserError: Slurm does not answer.
    """
    try:
        if ask(job_id, script) is None:
            return
        subprocess.run(["scancel", job_id], check=True, timeout=ASK_TIMEOUT_SECONDS)
    except (SlurmUnavailableError, subprocess.SubprocessError):
        raise UserError(f"Slurm does not answer, so that job {job_id} could not be cancelled; try again") from None
