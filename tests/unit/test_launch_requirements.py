"""An attention backend that cannot run, and a compiler that Triton lacks, are named before anything starts."""

import contextlib
import subprocess
import sysconfig
from pathlib import Path

import pytest
from triton.runtime import build

from dreamdance.errors import MissingInputError
from dreamdance.launch import preflight
from dreamdance.launch.requirements import refuse_missing, why_backend_cannot_run_in_a_job
from dreamdance.recipe import Recipe, load_recipe
from dreamdance_kernels import available_backends, triton_package

ROOT = Path(__file__).parents[2]
STAGE2 = ROOT / "recipes" / "demo" / "stage2.yaml"


def stage2(*overrides: str) -> Recipe:
    return load_recipe(STAGE2, overrides)


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the only one on PATH; CC is not set."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    return folder


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of Python's headers, with Python.h in it."""
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "Python.h").touch()
    known = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: known | {"include": str(folder)})
    return folder


def triton_builds() -> bool:
    """Whether Triton's builder finds a compiler; it is stopped before it runs the compiler."""
    started: list[object] = []
    with pytest.MonkeyPatch().context() as within, contextlib.suppress(RuntimeError):
        within.setattr(subprocess, "check_call", lambda words, **_: started.append(words))
        build._build("stub", "stub.c", "/nowhere", [], [], [], [])
    return bool(started)


@pytest.mark.parametrize("names", [(), ("gcc",), ("clang",), ("cc",), ("gcc", "clang")])
def test_a_compiler_is_found_where_triton_finds_one(path: Path, headers: Path, names: tuple[str, ...]) -> None:
    for name in names:
        executable(path / name)
    reason = triton_package.why_unable_to_start()
    assert (reason is None) == triton_builds()
    if reason is not None:
        assert "gcc nor clang is on PATH" in reason


def test_the_environments_compiler_must_be_there(path: Path, headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(path / "gcc")
    monkeypatch.setenv("CC", "icx")
    assert "none at 'icx', which the environment's CC names" in str(triton_package.why_unable_to_start())
    monkeypatch.setenv("CC", str(executable(path / "my-compiler")))
    assert triton_package.why_unable_to_start() is None


def test_missing_headers_of_python_are_named_with_their_path(path: Path, headers: Path) -> None:
    executable(path / "gcc")
    (headers / "Python.h").unlink()
    assert f"there is no {headers}/Python.h" in str(triton_package.why_unable_to_start())


def test_a_gpu_node_without_a_compiler_does_not_offer_triton(
    path: Path, headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert "needs a C compiler" in str(available_backends()["triton"])
    executable(path / "gcc")
    assert available_backends()["triton"] is None


@pytest.mark.slow
def test_a_backend_that_cannot_run_here_is_found_before_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    recipe = stage2("model.attention_backend=triton")
    problems = [str(problem) for problem in preflight.missing(recipe, STAGE2, Path("runs"), check_gpu=True)]
    (problem,) = [problem for problem in problems if "attention backend 'triton'" in problem]
    assert "it needs an NVIDIA GPU" in problem
    assert "model.attention_backend=null" in problem
    on_slurm = preflight.missing(recipe, STAGE2, Path("runs"), check_gpu=False)  # there the check runs on the node
    assert not any("attention backend" in str(problem) for problem in on_slurm)


@pytest.mark.slow
def test_the_environment_of_the_recipe_counts_when_a_backend_is_requested() -> None:
    interpreted = stage2("model.attention_backend=triton", "cluster.environment={TRITON_INTERPRET: '1'}")
    assert why_backend_cannot_run_in_a_job(interpreted, "triton") == ""


@pytest.mark.parametrize(("name", "reason"), [("flash", "flash-attn"), ("flsh", "no such backend; known are 'ref")])
def test_a_job_refuses_a_backend_that_cannot_run_by_the_recipes_key(name: str, reason: str) -> None:
    with pytest.raises(MissingInputError, match=rf"'{name}' \(model.attention_backend\) cannot run in .*{reason}"):
        refuse_missing(stage2(f"model.attention_backend={name}"))


def on_gpus(*overrides: str) -> Recipe:
    return stage2("model.channels_last=true", "cluster.tasks_per_node=1", "cluster.gpus_per_node=1", *overrides)


@pytest.mark.slow
def test_channels_last_on_gpus_without_a_compiler_is_found_before_submission(path: Path) -> None:
    def found(recipe: Recipe) -> list[str]:
        problems = preflight.missing(recipe, STAGE2, Path("runs"), check_gpu=True)
        return [str(problem) for problem in problems if "channels_last" in str(problem)]

    (problem,) = found(on_gpus())
    assert "neither gcc nor clang is on PATH" in problem
    assert "model.channels_last=false, which does not need it" in problem
    assert found(stage2("model.channels_last=true")) == []  # on CPU torch's own runs
    assert found(on_gpus("model.channels_last=false")) == []
    (other,) = found(on_gpus("cluster.environment={CC: icx}"))
    assert "none at 'icx'" in other


def test_a_job_refuses_channels_last_on_gpus_without_a_compiler(path: Path, headers: Path) -> None:
    with pytest.raises(MissingInputError, match=r"model\.channels_last .* cannot start: it needs a C compiler"):
        refuse_missing(on_gpus())
    executable(path / "gcc")
    refuse_missing(on_gpus())


@pytest.mark.slow
def test_compiled_blocks_without_a_compiler_are_found_before_submission_and_refused_by_a_job(
    path: Path, headers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    compiled = stage2("model.compile=blocks")
    problems = [str(problem) for problem in preflight.missing(compiled, STAGE2, Path("runs"), check_gpu=True)]
    (problem,) = [problem for problem in problems if "torch.compile" in problem]
    assert "no 'g++' on PATH" in problem
    assert "model.compile=none" in problem
    with pytest.raises(MissingInputError, match=r"model\.compile needs torch.compile, .* needs a C\+\+ compiler"):
        refuse_missing(compiled)
    executable(path / "g++")
    refuse_missing(compiled)
    (headers / "Python.h").unlink()
    with pytest.raises(MissingInputError, match=r"model\.compile .*there is no .*Python\.h"):
        refuse_missing(compiled)
    refuse_missing(stage2())


def test_compiled_blocks_on_gpus_need_what_triton_needs(path: Path, headers: Path) -> None:
    executable(path / "g++")
    with pytest.raises(MissingInputError, match=r"model\.compile .*neither gcc nor clang is on PATH"):
        refuse_missing(on_gpus("model.channels_last=false", "model.compile=blocks"))
    executable(path / "gcc")
    refuse_missing(on_gpus("model.compile=blocks"))
