"""Virtual environments that hold chosen packages only, like that of a user who installed only some extras.

Packages are links to those of this environment, chosen by their declared requirements, so nothing is downloaded. A
package that was left out cannot be imported.
"""

import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = ("dreamdance", "kernels", "launchers", "recipes", "tests", "tools")
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of the project from a copy of the checkout; the checkout does not change."""
    tree = folder / "tree"
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*words, "-w", folder, tree], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def declared(requirements: Iterable[str]) -> set[str]:
    """The names of the installed distributions that these requirements need, directly or indirectly."""
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    left = [(requirement, "") for requirement in requirements]
    while left:
        text, extra = left.pop()
        requirement = Requirement(text)
        if (text, extra) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add((text, extra))
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:  # such as the cloud SDKs, which no module of ours uses
            continue
        names.add(canonicalize_name(requirement.name))
        left += [(inner, wanted) for inner in found.requires or () for wanted in ("", *requirement.extras)]
    return names


def make_environment(folder: Path, distributions: Iterable[str]) -> Path:
    """Makes a virtual environment of these distributions alone, without the project.

    Returns:
        The interpreter of the environment.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = site_packages(python)
    for name in distributions:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return python


def site_packages(python: Path) -> Path:
    """The folder in which an environment keeps its packages."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    return site


def install(python: Path, wheel: Path) -> None:
    """Installs the wheel of the project into an environment with pip, without its requirements."""
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
