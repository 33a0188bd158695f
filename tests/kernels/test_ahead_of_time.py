"""Every kernel compiles for A100 and H100/H200 without a GPU, within the limits of the committed table."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ahead_of_time
import pytest
import torch

from dreamdance_kernels.triton_kernels.tiles import architecture_of

MATRIX_PRODUCT = """
import triton
import triton.language as tl
from dreamdance_kernels.triton_kernels.builds import KernelBuild


@triton.jit
def multiply(left, right, output, stride, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    inner = tl.arange(0, 32)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, 1024, 32):
        a = tl.load(left + rows[:, None] * stride + start + inner[None, :])
        b = tl.load(right + (start + inner)[:, None] * stride + rows[None, :])
        total = tl.dot(a, b, total)
    tl.store(output + rows[:, None] * stride + rows[None, :], total.to(tl.bfloat16))


def builds(architecture):
    signature = {"left": "*bf16", "right": "*bf16", "output": "*bf16", "stride": "i32"}
    return [
        KernelBuild("multiply", multiply, architecture, signature, {"SIZE": SIZE_HERE}, 4, 2, frozenset(signature))
    ]
"""


def run(*arguments, folder=None):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        environment |= {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, ahead_of_time.__file__, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A kernel that fits its registers, the same one with tiles so large that it spills, and the first one's table."""
    folder = tmp_path_factory.mktemp("kernels")
    for name, size in (("thrifty", 64), ("wasteful", 256)):
        (folder / f"{name}.py").write_text(MATRIX_PRODUCT.replace("SIZE_HERE", str(size)), encoding="utf-8")
    written = run("--kernels", "thrifty", "--write", "--table", folder / "table.csv", folder=folder)
    assert written.returncode == 0, written.stderr
    return folder


@pytest.fixture(scope="module")
def table(folder):
    return ahead_of_time.read_table(folder / "table.csv")


@pytest.mark.slow
def test_every_kernel_compiles_for_both_architectures_within_the_committed_table():
    checked = run("--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "resources.csv holds" in checked.stdout


@pytest.mark.slow
def test_the_table_distinguishes_the_matrix_instructions_of_the_architectures(table):
    assert {row.architecture: row.instruction for row in table} == {"sm_80": "mma.sync", "sm_90": "wgmma"}
    assert all(0 < row.registers < 255 and row.shared_bytes > 0 and row.spill_stores_bytes == 0 for row in table)
    assert ahead_of_time.violations(table, table) == []


@pytest.mark.slow
def test_a_change_that_spills_fails_the_check(folder):
    checked = run("--kernels", "wasteful", "--check", "--table", folder / "table.csv", folder=folder)
    assert checked.returncode == 1, checked.stderr
    for architecture in ("sm_80", "sm_90"):
        found = [line for line in checked.stdout.splitlines() if line.startswith(f"violation: multiply {architecture}")]
        assert any("spill_stores_bytes, above the table's 0" in line for line in found), checked.stdout
        assert any("255 registers, above the table's" in line for line in found)
    assert "instruction 'wgmma (serialized)', not the table's 'wgmma'" in checked.stdout


@pytest.mark.slow
def test_unchanged_kernels_are_not_compiled_again(folder):
    compiled = {path.name for path in (folder / "cache").iterdir()}
    again = run("--kernels", "thrifty", "--check", "--table", folder / "table.csv", folder=folder)
    assert again.returncode == 0, again.stdout
    assert {path.name for path in (folder / "cache").iterdir()} == compiled


@pytest.mark.slow
def test_the_interpreter_is_refused_because_it_compiles_nothing(folder):
    command = [sys.executable, ahead_of_time.__file__, "--check"]
    checked = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 2
    assert "TRITON_INTERPRET is set" in checked.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 32}, "registers, above the table's 32"),
        ({"instruction": "wgmma+mma.sync"}, "instruction 'mma.sync', not the table's 'wgmma+mma.sync'"),
        ({"name": "divide"}, "divide sm_80: in the table, but no longer built"),
        ({"name": "divide"}, "multiply sm_80: not in the table"),
    ],
)
@pytest.mark.slow
def test_a_row_of_the_table_that_no_longer_holds_is_a_violation(table, change, complaint):
    changed = [replace(row, **change) if row.architecture == "sm_80" else row for row in table]
    found = ahead_of_time.violations(table, changed)
    assert any(complaint in line for line in found), found
    assert not any("sm_90" in line for line in found)


@pytest.mark.parametrize(("architecture", "most"), [("sm_80", 163), ("sm_90", 227)])
def test_more_shared_memory_than_the_architecture_has_is_a_violation_whatever_the_table_says(architecture, most):
    fits = ahead_of_time.Resources("tile", architecture, 64, 0, 0, 0, most * 1024, "mma.sync", 4, 2, "3.7.1")
    too_large = replace(fits, shared_bytes=most * 1024 + 1)
    assert ahead_of_time.violations([fits], [fits]) == []
    assert ahead_of_time.violations([too_large], [too_large]) == [
        f"tile {architecture}: {most * 1024 + 1} shared_bytes, above the {most * 1024} of the architecture"
    ]


def test_less_of_everything_is_no_violation():
    known = ahead_of_time.Resources("tile", "sm_90", 64, 8, 8, 16, 1024, "wgmma (serialized)", 4, 2, "3.7.1")
    better = replace(known, registers=60, spill_stores_bytes=0, spill_loads_bytes=0, stack_bytes=0, instruction="wgmma")
    assert ahead_of_time.violations([better], [known]) == []


@pytest.mark.parametrize(
    ("capability", "tiles"), [((8, 0), (8, 0)), ((8, 9), (8, 9)), ((9, 0), (9, 0)), ((12, 0), (8, 0))]
)
def test_workstation_blackwell_uses_the_tiles_of_an_a100(capability, tiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert architecture_of(torch.device("cuda")) == tiles


def test_the_tiles_of_an_a100_fit_the_smaller_gpus_that_also_use_them():
    """8.6, 8.9 and 12.x: 99 KB for a program."""
    table = ahead_of_time.read_table(Path(ahead_of_time.__file__).with_name("resources.csv"))
    assert all(row.shared_bytes <= 99 * 1024 for row in table if row.architecture == "sm_80")


def test_the_committed_table_states_the_compiler_it_was_made_with():
    table = ahead_of_time.read_table(Path(ahead_of_time.__file__).with_name("resources.csv"))
    assert len({row.triton for row in table}) == 1
    assert {row.architecture for row in table} == {"sm_80", "sm_90"}
