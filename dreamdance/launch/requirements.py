"""What a task needs from the Python that runs it: optional packages, its attention backend, and Triton's tools.

The launcher checks this before it submits, and each job on its own machine before it begins.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys

from dreamdance.errors import MissingInputError
from dreamdance.recipe import Recipe, TrainingRecipe

# By task: each optional package that its modules import -> our extra that installs it. By hand, because the launcher
# must not import those modules, and a checkout has no package metadata.
EXTRAS = {
    "stage1": {"deepspeed": "train", "streaming": "train", "tensorboard": "train", "cv2": "train"},
    "stage2": {"deepspeed": "train", "streaming": "train", "tensorboard": "train", "cv2": "train"},
    "prepare": {"streaming": "train", "av": "video", "cv2": "video"},
    "encode": {"streaming": "train", "cv2": "train"},
    "animate": {"av": "video", "cv2": "video"},
    "evaluate": {"streaming": "train", "av": "video", "cv2": "video"},
}

BACKEND_KEY = "model.attention_backend"
CHANNELS_LAST_KEY = "model.channels_last"
COMPILE_KEY = "model.compile"
_ASK_SECONDS = 120


def missing_packages(recipe: Recipe) -> dict[str, str]:
    """Packages that the task imports and this Python lacks -> our extra that installs each."""
    extras = EXTRAS.get(recipe.task, {})
    return {package: extra for package, extra in extras.items() if importlib.util.find_spec(package) is None}


def installation(extras: set[str]) -> str:
    """The command that installs these extras."""
    return f"pip install 'dreamdance[{','.join(sorted(extras))}]'"


def refuse_missing(recipe: Recipe) -> None:
    """Checks that the job that calls this can run in this process.

    Raises:
        MissingInputError: a package is not installed, the attention backend that the recipe names cannot run, or
            Triton cannot start the kernels for channels_last, or torch.compile lacks a compiler.
    """
    here = f"this Python ({sys.executable} on {socket.gethostname()})"
    if missing := missing_packages(recipe):
        raise MissingInputError(f"{here} lacks {', '.join(missing)}: {installation(set(missing.values()))}")
    backend = named_backend(recipe)
    if backend is not None and (reason := why_backend_cannot_run(backend)):
        raise MissingInputError(f"attention backend '{backend}' ({BACKEND_KEY}) cannot run in {here}: {reason}")
    if wants_fused_norms(recipe) and (reason := why_kernels_cannot_start()):
        raise MissingInputError(f"{CHANNELS_LAST_KEY} needs Triton's group norm, which {here} cannot start: {reason}")
    on_gpus = recipe.cluster.gpus_per_node > 0
    if wants_compiled_blocks(recipe) and (reason := why_blocks_cannot_compile(on_gpus=on_gpus)):
        raise MissingInputError(f"{COMPILE_KEY} needs torch.compile, which cannot run in {here}: {reason}")


def named_backend(recipe: Recipe) -> str | None:
    """The attention backend that the recipe names; None if the library chooses."""
    return recipe.model.attention_backend if isinstance(recipe, TrainingRecipe) else None


def wants_fused_norms(recipe: Recipe) -> bool:
    """Whether the recipe needs group norms that Triton runs: channels_last, on GPUs."""
    if not isinstance(recipe, TrainingRecipe):
        return False
    return recipe.model.channels_last and recipe.cluster.gpus_per_node > 0


def wants_compiled_blocks(recipe: Recipe) -> bool:
    """Whether the recipe compiles the networks' blocks."""
    return isinstance(recipe, TrainingRecipe) and recipe.model.compile == "blocks"


def why_blocks_cannot_compile(*, on_gpus: bool) -> str:
    """What this machine lacks to build the code that torch.compile generates; empty if it lacks nothing."""
    from dreamdance_kernels import triton_package

    if on_gpus:  # torch generates kernels for Triton
        return triton_package.why_unusable() or triton_package.why_unable_to_start() or ""
    compiler = os.environ.get("CXX", "g++")  # torch/_inductor/config.py
    if shutil.which(compiler) is None:
        return (
            f"it needs a C++ compiler, and there is no {compiler!r} on PATH "
            "(apt-get install g++, or name one in the environment's CXX)"
        )
    return triton_package.why_no_headers() or ""


def why_kernels_cannot_start() -> str:
    """What this machine lacks to start Triton's kernels, a compiler or headers; empty if it lacks nothing."""
    from dreamdance_kernels import triton_package

    return triton_package.why_unable_to_start() or "" if triton_package.why_unusable() is None else ""


def why_backend_cannot_run(name: str) -> str:
    """Why an attention backend cannot run in this process; empty if it can. Loads torch."""
    from dreamdance_kernels import available_backends

    backends = available_backends()
    if name in backends:
        return backends[name] or ""
    return f"no such backend; known are {', '.join(map(repr, backends))}, or null to let the library choose"


def why_backend_cannot_run_in_a_job(recipe: Recipe, name: str) -> str:
    """As `why_backend_cannot_run`, for a job on this machine."""
    return _ask_in_a_job(recipe, f"why_backend_cannot_run({name!r})")


def why_kernels_cannot_start_in_a_job(recipe: Recipe) -> str:
    """As `why_kernels_cannot_start`, for a job on this machine."""
    return _ask_in_a_job(recipe, "why_kernels_cannot_start()")


def why_blocks_cannot_compile_in_a_job(recipe: Recipe) -> str:
    """As `why_blocks_cannot_compile`, for a job on this machine."""
    return _ask_in_a_job(recipe, f"why_blocks_cannot_compile(on_gpus={recipe.cluster.gpus_per_node > 0})")


def _ask_in_a_job(recipe: Recipe, question: str) -> str:
    """Calls a function of this module in a new process with the job's environment: the launcher loads no torch."""
    environment = os.environ | recipe.cluster.environment
    if recipe.cluster.gpus_per_node == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    program = f"import {__name__} as requirements; print(requirements.{question})"
    words = [sys.executable, "-P", "-c", program]
    try:
        asked = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the check did not end within {_ASK_SECONDS} s"
    if asked.returncode:
        return (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
    return asked.stdout.strip()
