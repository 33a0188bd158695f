"""A result names the code that made it, and never the commit of another project."""

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import dreamdance
from dreamdance.runs import provenance
from dreamdance.runs.provenance import PROJECT_FILES, code_version, package_versions

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b")


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout


def make_repository(folder: Path, *, tracked: bool = True) -> str:
    """Commits the content of the folder, or nothing of it; returns the commit."""
    git(folder, "init", "--quiet")
    if tracked:
        git(folder, "add", ".")
    git(folder, *IDENTITY, "commit", "--quiet", "--allow-empty", "-m", "first")
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def project(tmp_path):
    """A folder that contains the package as in a checkout."""
    folder = tmp_path / "user" / "packages"
    for name in PROJECT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first\n")
    return folder


def test_a_checkout_has_its_commit_and_a_digest_of_its_changes(project):
    commit = make_repository(project)
    assert code_version(project) == {"commit": commit, "diff_sha256": None}
    code_version.cache_clear()
    (project / PROJECT_FILES[0]).write_text("second\n")
    diff = subprocess.check_output(["git", "-C", project, "diff", "HEAD"])
    assert b"+second" in diff
    assert code_version(project) == {"commit": commit, "diff_sha256": hashlib.sha256(diff).hexdigest()}


@pytest.mark.parametrize("tracked", [True, False])
def test_a_repository_around_an_installed_package_does_not_count_as_this_project(project, tracked):
    make_repository(project.parent, tracked=tracked)
    assert code_version(project) == {"commit": "unknown"}


def test_a_package_that_lies_untracked_at_the_top_of_another_project_has_no_commit(project):
    make_repository(project, tracked=False)
    assert code_version(project) == {"commit": "unknown"}


def test_a_repository_that_the_environment_names_does_not_count_as_this_project(project, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    make_repository(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(project))
    assert code_version(project) == {"commit": "unknown"}
    monkeypatch.undo()
    commit = make_repository(project)
    code_version.cache_clear()
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert code_version(project)["commit"] == commit


def test_without_git_or_a_repository_the_commit_is_unknown_and_nothing_fails(project, tmp_path, monkeypatch):
    assert code_version(project) == {"commit": "unknown"}
    code_version.cache_clear()
    make_repository(project)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(project) == {"commit": "unknown"}


def test_this_checkout_is_known_as_such():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("the tests do not run in a checkout")
    head = subprocess.check_output(
        ["git", "-C", root, "rev-parse", "HEAD"], text=True, env={"PATH": os.environ["PATH"]}
    )
    assert code_version()["commit"] == head.strip()


def test_a_package_that_is_not_installed_is_named_so(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    versions = {"dreamdance": dreamdance.__version__, "numpy": np.__version__, "no-such-package": "not installed"}
    assert package_versions() == versions
