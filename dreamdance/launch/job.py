"""The job that every cluster runs: one object that gets the path of the run folder and nothing else.

It sets the rank's environment, resolves the task's entry point by name and calls it. Heavy imports happen only there.
"""

import contextlib
import ctypes
import io
import json
import logging
import os
import pkgutil
import random
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dreamdance.errors import UserError, is_transient
from dreamdance.launch.finished import digest_inputs, mark_finished
from dreamdance.launch.requirements import refuse_missing
from dreamdance.launch.run_folder import record_job, stored_recipe
from dreamdance.launch.run_ownership import RunOwnership
from dreamdance.recipe import Recipe
from dreamdance.runs.array_member import array_member, is_all_done, mark_all_done
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import failures_folder, note_signal
from dreamdance.runtime.exits import LAST_LINE_SECONDS, exit_process
from dreamdance.runtime.ranks import RESTART, START, Ranks
from dreamdance.runtime.signals import SignalListener

ENTRIES = {
    "prepare": "dreamdance.data.prepare:prepare",
    "encode": "dreamdance.training.encoding.encode:encode",
    "stage1": "dreamdance.training.train:train",
    "stage2": "dreamdance.training.train:train",
    "animate": "dreamdance.inference.animate:animate",
    "evaluate": "dreamdance.evaluation.evaluate:evaluate",
}
FAILED = 1
DEBUG_JOB = "debug"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the only one before torch 2.9
PORTS = range(20_000, 32_000)  # below the range from which Linux assigns ports itself
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One process of a run. Calling it does the work; another call on the same folder resumes where that stopped."""

    run_folder: Path

    def __call__(self) -> None:
        recipe = stored_recipe(self.run_folder)
        job_id = set_environment(recipe, logs=self.run_folder / "logs")
        rank = int(os.environ["RANK"])
        _log_to_console(rank, int(os.environ["WORLD_SIZE"]))
        _keep_working_directory_off_the_path()
        if is_all_done(self.run_folder):
            logger.info("the other jobs of this array have done everything: this one ends")
            return
        try:
            if rank == 0:
                record_job(self.run_folder, job_id, job_hosts())
            # Training receives signals itself and saves first. All other tasks, and training that has not begun, can
            # end at once.
            with contextlib.ExitStack() as watching:
                if job_id != DEBUG_JOB:
                    watching.enter_context(SignalListener(partial(_end_at_once, self.run_folder)))
                if rank == 0:
                    watching.enter_context(RunOwnership(self.run_folder))
                if recipe.cluster.gpus_per_node > 0:
                    Ranks.from_environment().take_gpu()
                    _set_float32_products(tf32=recipe.tf32)
                refuse_missing(recipe)
                # Before the task reads its inputs: files that arrive later must not count as done.
                inputs = digest_inputs(recipe, self.run_folder.parent) if rank == 0 else ""
                entry = pkgutil.resolve_name(ENTRIES[recipe.task])
                entry(recipe, self.run_folder)
        except UserError as error:
            logger.error("%s", error)
            record_failure(self.run_folder, job_id, rank, str(error), user_error=not is_transient(error))
            raise SystemExit(FAILED) from None
        except Exception:  # outermost: recorded so that the launcher can show it, then raised again
            record_failure(self.run_folder, job_id, rank, traceback.format_exc(), user_error=False)
            raise
        # Inputs of a member that began later may be newer than those that the others have worked on.
        if rank == 0 and not is_all_done(self.run_folder):
            mark_finished(recipe, self.run_folder, inputs)
            if array_member() is not None:
                mark_all_done(self.run_folder)


def set_environment(recipe: Recipe, *, logs: Path | None = None) -> str:
    """Sets RANK, WORLD_SIZE and similar variables, and defaults for variables that the user has not set.

    Args:
        recipe: its `cluster.environment` takes precedence over the defaults.
        logs: where NCCL writes the last collectives of each rank after a time-out.

    Returns:
        the job's id; `debug` if the job runs in the launcher's own process.
    """
    os.environ.update(recipe.cluster.environment)
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    job_id = DEBUG_JOB
    if executor in ("local", "slurm"):
        from submitit.core.job_environment import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job_id = JobEnvironment().job_id
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        os.environ[START] = f"{executor} {job_id}{RESTART}{restarts}"
        if executor == "slurm":
            os.environ["MASTER_PORT"] = str(slurm_port(job_id, restarts))
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if executor == "local":
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            # A local job starts again under the same number, each time with another port.
            os.environ[START] += f" port {os.environ['MASTER_PORT']}"
            _end_with_parent()
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if recipe.cluster.gpus_per_node == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, so that it finds no GPU
    for name, value in default_environment(recipe, local_rank=int(os.environ["LOCAL_RANK"]), logs=logs).items():
        os.environ.setdefault(name, value)
    return job_id


def default_environment(recipe: Recipe, *, local_rank: int, logs: Path | None) -> dict[str, str]:
    """Variables of a rank that neither the user's environment nor `cluster.environment` sets."""
    defaults = {
        "OMP_NUM_THREADS": str(recipe.cluster.cpus_per_task),
        # Two Python environments that share the default folder would rebuild each other's compiled ops.
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        # NCCL keeps the last collectives of each rank, and writes them to files when one reaches its time-out.
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "PYTHONFAULTHANDLER": "1",
        # Compute nodes may have no network, and a job must not wait for it: weights are checked before the start.
        "HF_HUB_OFFLINE": "1",
    }
    if logs is not None:
        defaults["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(logs / "nccl_trace_rank_")
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        # Training, validation and decoding alternate between shapes: segments that can grow leave fewer gaps.
        defaults |= dict.fromkeys(ALLOCATOR_SETTINGS, "expandable_segments:True")
    with contextlib.suppress(OSError):  # without a temporary folder, the libraries' default folders are used
        caches = private_folder() / f"local_rank_{local_rank}"
        defaults |= {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    return defaults


def private_folder() -> Path:
    """This user's folder on this node for compiled kernels; no other user can read or write it. All jobs share it.

    All ranks of all nodes would write to a home directory on the network at once. Files that other users can write must
    not be loaded as code.
    """
    folder = Path(tempfile.gettempdir()) / f"dreamdance_{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=stat.S_IRWXU)
    found = folder.lstat()
    others_may = found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others_may:
        return folder
    return Path(tempfile.mkdtemp(prefix="dreamdance_"))  # another user owns that name: a new folder for this start


def _set_float32_products(*, tf32: bool) -> None:
    """Exact products, or factors rounded to 10 bits (TF32). torch's default is a mixture: TF32 only in convolutions."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def job_hosts() -> list[str]:
    """The machines of this job; the first one runs the main process."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return [socket.gethostname()]
    from submitit.core.job_environment import JobEnvironment

    return list(JobEnvironment().hostnames)


def slurm_port(job_id: str, restarts: int) -> int:
    """A port that all ranks compute from the job's id, and another one after each requeue."""
    return random.Random(f"{job_id}/{restarts}").choice(PORTS)


def free_port() -> int:
    """A TCP port of this machine that no process listens on."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"no free TCP port found between {PORTS.start} and {PORTS.stop}")


def failure_file(run_folder: Path, job_id: str, rank: int) -> Path:
    return failures_folder(run_folder) / f"{job_id}_{rank}.json"


def record_failure(run_folder: Path, job_id: str, rank: int, text: str, *, user_error: bool) -> None:
    """Records an error's text, which `--follow` and `status` show."""
    path = failure_file(run_folder, job_id, rank)
    content = json.dumps({"time": time.time(), "rank": rank, "user_error": user_error, "text": text})
    try:
        path.parent.mkdir(exist_ok=True)  # without parents: a run folder that was removed must not reappear
        # Atomically: when one rank fails, the others are killed, perhaps while they write this file.
        write_atomically(path, content)
    except OSError as error:  # only logged: the failure itself is raised by the caller
        logger.error("the failure cannot be recorded in %s (removed, or out of reach): %s", run_folder, error)


def _end_at_once(run_folder: Path, number: signal.Signals) -> None:
    """Ends this process with exit code 0: finished work is on the disk, and `requeue` decides about another start."""
    signal.setitimer(signal.ITIMER_REAL, LAST_LINE_SECONDS)  # first: the disk may be what hangs
    with contextlib.suppress(OSError):
        note_signal(run_folder, number)
    exit_process(
        logger,
        "%s: this process ends; the next start resumes from what is done",
        number.name,
        exit_code=0,
        level=logging.WARNING,
    )


def _log_to_console(rank: int, world_size: int) -> None:
    name = f"[rank {rank}] " if world_size > 1 else ""
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.getLogger("submitit").propagate = False  # it has a handler of its own
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be valid text
    logging.basicConfig(
        level=level, stream=sys.stdout, force=True, format=f"%(asctime)s {name}%(levelname)s %(name)s: %(message)s"
    )


def _keep_working_directory_off_the_path() -> None:
    """Removes it from sys.path: in a checkout, the folder `kernels/` would hide Hugging Face's package `kernels`."""
    here = Path.cwd()
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]


def _end_with_parent() -> None:
    """Makes the kernel kill this process when its controller dies, so that no process survives a killed controller."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
