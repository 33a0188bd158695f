"""Which code runs: versions of packages, and the commit where it is a checkout of this project. No torch here."""

import hashlib
import os
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import dreamdance

UNKNOWN = "unknown"
# The packages that a result may depend on: recorded with each start and each result, compared between ranks.
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "deepspeed",
    "mosaicml-streaming",
    "submitit",
    "numpy",
    "pydantic",
    "safetensors",
)
# Files that are under version control in a checkout of this project, but not where the package is merely installed.
PROJECT_FILES = ("dreamdance/__init__.py", "kernels/dreamdance_kernels/__init__.py", "launchers/slurm.py")
GIT_SECONDS = 60


def package_versions() -> dict[str, str]:
    """Versions by package, or "not installed"; for this package the version of the code that runs."""
    versions = {"dreamdance": dreamdance.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@cache
def code_version(root: Path | None = None) -> dict[str, Any]:
    """The commit of this project's checkout, and a hash of the changes that are not committed.

    The commit is "unknown" without git, outside of a repository, and where the repository around the package is another
    project's (the package lies in a virtual environment in that repository, or was copied into it).

    Args:
        root: the folder that holds the package; by default that of the code that runs.

    Returns:
        `commit`, and where that is known `diff_sha256`: None without changes.
    """
    root = Path(__file__).resolve().parents[2] if root is None else root
    if not _is_checkout(root):
        return {"commit": UNKNOWN}
    commit, diff = _ask_git(root, "rev-parse", "HEAD"), _ask_git(root, "diff", "--no-ext-diff", "--no-color", "HEAD")
    if commit is None or diff is None:
        return {"commit": UNKNOWN}
    return {"commit": commit.decode().strip(), "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None}


def _is_checkout(root: Path) -> bool:
    top = _ask_git(root, "rev-parse", "--show-toplevel")
    if top is None or not os.path.samefile(os.fsdecode(top.removesuffix(b"\n")), root):
        return False
    return _ask_git(root, "ls-files", "--error-unmatch", *PROJECT_FILES) is not None


def _ask_git(root: Path, *words: str) -> bytes | None:
    """Git's output, or None where git is missing, fails or hangs."""
    # Variables such as GIT_DIR, which git sets for its hooks, would direct it to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            timeout=GIT_SECONDS,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
