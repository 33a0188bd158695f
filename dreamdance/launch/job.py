"""The job that every cluster runs: one picklable object that is handed the run folder and nothing else.

It sets the ranks' environment, resolves the task's entry point by name and calls it. Heavy imports happen only there.
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
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import failures_folder, note_signal
from dreamdance.runtime.exits import LAST_WORDS_SECONDS, exit_process
from dreamdance.runtime.ranks import START, Ranks
from dreamdance.runtime.signals import SignalListener

ENTRIES = {
    "prepare": "dreamdance.data.prepare:prepare",
    "stage1": "dreamdance.training.train:train",
    "stage2": "dreamdance.training.train:train",
    "animate": "dreamdance.inference.animate:animate",
    "evaluate": "dreamdance.evaluation.evaluate:evaluate",
}
FAILED = 1
DEBUG_JOB = "debug"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the old name: torch before 2.9 knows no other
PORTS = range(20_000, 32_000)  # below the range from which Linux hands out ports by itself
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One process of a run. Calling it does the work; called again on the same folder it goes on where it stopped."""

    run_folder: Path

    def __call__(self) -> None:
        recipe = stored_recipe(self.run_folder)
        job_id = set_environment(recipe, logs=self.run_folder / "logs")
        rank = int(os.environ["RANK"])
        _log_to_console(rank, int(os.environ["WORLD_SIZE"]))
        _keep_working_directory_off_the_path()
        try:
            if rank == 0:
                record_job(self.run_folder, job_id, job_hosts())
            # Training listens itself and saves first; all else, and training that has not begun, can end at once.
            with contextlib.ExitStack() as watching:
                if job_id != DEBUG_JOB:
                    watching.enter_context(SignalListener(partial(_end_at_once, self.run_folder)))
                if rank == 0:
                    watching.enter_context(RunOwnership(self.run_folder))
                if recipe.cluster.gpus_per_node > 0:
                    Ranks.from_environment().take_gpu()
                    _set_float32_products(tf32=recipe.tf32)
                refuse_missing(recipe)
                # Before the entry looks at any of them: what comes later is not taken for done.
                inputs = digest_inputs(recipe, self.run_folder.parent) if rank == 0 else ""
                entry = pkgutil.resolve_name(ENTRIES[recipe.task])
                entry(recipe, self.run_folder)
        except UserError as error:
            logger.error("%s", error)
            record_failure(self.run_folder, job_id, rank, str(error), user_error=not is_transient(error))
            raise SystemExit(FAILED) from None
        except Exception:  # outermost: the launcher must be able to show whatever it was; raised again as it is
            record_failure(self.run_folder, job_id, rank, traceback.format_exc(), user_error=False)
            raise
        if rank == 0:
            mark_finished(recipe, self.run_folder, inputs)


def set_environment(recipe: Recipe, *, logs: Path | None = None) -> str:
    """Sets RANK, WORLD_SIZE and their like, and defaults for what the user's environment leaves open.

    Args:
        recipe: whose `cluster.environment` goes before the defaults.
        logs: takes what NCCL's ranks were at when one of them timed out.

    Returns:
        the job's id; `debug` where the job runs in the launcher's own process.
    """
    os.environ.update(recipe.cluster.environment)
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    job_id = DEBUG_JOB
    if executor in ("local", "slurm"):
        from submitit.core.job_environment import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job_id = JobEnvironment().job_id
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        os.environ[START] = f"{executor} {job_id} restart {restarts}"
        if executor == "slurm":
            os.environ["MASTER_PORT"] = str(slurm_port(job_id, restarts))
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if executor == "local":
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            _end_with_parent()
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if recipe.cluster.gpus_per_node == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: what runs on the CPU here runs there everywhere
    for name, value in default_environment(recipe, local_rank=int(os.environ["LOCAL_RANK"]), logs=logs).items():
        os.environ.setdefault(name, value)
    return job_id


def default_environment(recipe: Recipe, *, local_rank: int, logs: Path | None) -> dict[str, str]:
    """What a rank's environment is to say where neither the user's nor `cluster.environment` says anything."""
    defaults = {
        "OMP_NUM_THREADS": str(recipe.cluster.cpus_per_task),
        # Two environments that share the default folder rebuild each other's compiled ops.
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        # The last collectives of each rank are kept, and written down when one waits longer than its time-out.
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "PYTHONFAULTHANDLER": "1",
        # A job must not wait for a network that compute nodes lack: weights are checked before it starts.
        "HF_HUB_OFFLINE": "1",
    }
    if logs is not None:
        defaults["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(logs / "nccl_trace_rank_")
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        # Training, validation and decoding take turns in shapes: blocks that can grow leave fewer gaps.
        defaults |= dict.fromkeys(ALLOCATOR_SETTINGS, "expandable_segments:True")
    with contextlib.suppress(OSError):  # without a temporary folder of the node, kernels are kept where they always are
        caches = private_folder() / f"local_rank_{local_rank}"
        defaults |= {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    return defaults


def private_folder() -> Path:
    """A folder of this user's on this node, which nobody else can read or write, the same for every job.

    Compiled kernels lie there: a home directory on the network would be written by all ranks of all nodes at once, and
    what others can write must not be loaded as code.
    """
    folder = Path(tempfile.gettempdir()) / f"dreamdance_{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=stat.S_IRWXU)
    found = folder.lstat()
    others_may = found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others_may:
        return folder
    return Path(tempfile.mkdtemp(prefix="dreamdance_"))  # somebody else took the name: one of this start's own


def _set_float32_products(*, tf32: bool) -> None:
    """Exact, or with factors rounded to 10 bits. torch's own default is neither: it rounds in convolutions alone."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def job_hosts() -> list[str]:
    """The machines of this job, the main process's first."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return [socket.gethostname()]
    from submitit.core.job_environment import JobEnvironment

    return list(JobEnvironment().hostnames)


def slurm_port(job_id: str, restarts: int) -> int:
    """A port that all ranks agree on without talking, and another one after each requeue."""
    return random.Random(f"{job_id}/{restarts}").choice(PORTS)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"no free TCP port found between {PORTS.start} and {PORTS.stop}")


def failure_file(run_folder: Path, job_id: str, rank: int) -> Path:
    return failures_folder(run_folder) / f"{job_id}_{rank}.json"


def record_failure(run_folder: Path, job_id: str, rank: int, text: str, *, user_error: bool) -> None:
    """Leaves what `--follow` and `status` show: the error's own words, not a log to search."""
    path = failure_file(run_folder, job_id, rank)
    content = json.dumps({"time": time.time(), "rank": rank, "user_error": user_error, "text": text})
    try:
        path.parent.mkdir(exist_ok=True)  # without its parents: a run folder that was removed does not come back
        # Whole or not at all: the first rank to fail has the others killed, while they may be at this.
        write_atomically(path, content)
    except OSError as error:  # the failure itself is what must be told
        logger.error("the failure cannot be noted in %s, which was removed or cannot be reached: %s", run_folder, error)


def _end_at_once(run_folder: Path, number: signal.Signals) -> None:
    """Ends this process well: what is done is on the disk, and whether the job goes on is decided when it is over."""
    signal.setitimer(signal.ITIMER_REAL, LAST_WORDS_SECONDS)  # first: the disk may be what hangs
    with contextlib.suppress(OSError):
        note_signal(run_folder, number)
    exit_process(
        logger, "%s: ending; the next start goes on from what is done", number.name, exit_code=0, level=logging.WARNING
    )


def _log_to_console(rank: int, world_size: int) -> None:
    name = f"[rank {rank}] " if world_size > 1 else ""
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.getLogger("submitit").propagate = False  # it has a handler of its own
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    logging.basicConfig(
        level=level, stream=sys.stdout, force=True, format=f"%(asctime)s {name}%(levelname)s %(name)s: %(message)s"
    )


def _keep_working_directory_off_the_path() -> None:
    """`python -m` puts the working directory first, where a checkout's folder `kernels/` hides Hugging Face's."""
    here = Path.cwd()
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != here]


def _end_with_parent() -> None:
    """Has the kernel kill this process when its controller dies, so that even `kill -9` there leaves no orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
