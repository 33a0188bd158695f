"""Compiles every Triton kernel for A100 and H100/H200 without a GPU, and compares the result with a table.

    python kernels/benchmarks/ahead_of_time.py            print registers, spills, memory, instruction of each build
    python kernels/benchmarks/ahead_of_time.py --check    compare with resources.csv; exit 1 with a line per violation
    python kernels/benchmarks/ahead_of_time.py --write    rewrite resources.csv

`--only REGEX` takes the builds whose name matches, for use while working on a kernel. Triton's cache
(`TRITON_CACHE_DIR`) keeps the results, so that only changed builds are compiled again.
"""

import argparse
import csv
import importlib
import io
import pkgutil
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("resources.csv")
ARCHITECTURES = ((8, 0), (9, 0))
# Shared memory of one program at most, from NVIDIA's tuning guide of each architecture.
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
SERIALIZED = " (serialized)"  # ptxas waits after every wgmma if the registers do not suffice for several in flight


@dataclass(frozen=True)
class Resources:
    """One build's resources, per thread (registers, spills, stack) or per program (shared memory): a row of the table.

    Args:
        name: of the build, `KernelBuild.name`.
        architecture: such as `sm_90`.
        registers: per thread; the hardware's limit is 255.
        spill_stores_bytes: bytes written to local memory for lack of registers.
        spill_loads_bytes: bytes read back from there.
        stack_bytes: of local memory.
        shared_bytes: of shared memory.
        instruction: matrix instruction in the code: `mma.sync`, `wgmma`, `wgmma (serialized)` or `none`.
        num_warps: as the launcher passes it.
        num_stages: as the launcher passes it.
        triton: version of the compiler.
    """

    name: str
    architecture: str
    registers: int
    spill_stores_bytes: int
    spill_loads_bytes: int
    stack_bytes: int
    shared_bytes: int
    instruction: str
    num_warps: int
    num_stages: int
    triton: str


NUMBERS = [field.name for field in fields(Resources) if field.type is int]


@dataclass(frozen=True)
class Compilation:
    """One build to compile, by name, because a `triton.jit` function cannot be sent to another process."""

    module: str
    architecture: tuple[int, int]
    name: str


def kernel_modules() -> list[str]:
    """Every module of the package that defines `builds`."""
    package = importlib.import_module("dreamdance_kernels.triton_kernels")
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if callable(getattr(importlib.import_module(name), "builds", None))]


def list_jobs(modules: Sequence[str], *, only: str) -> list[Compilation]:
    """The builds of these modules, for every architecture, whose name matches `only`.

    Raises:
        ValueError: two builds for one architecture share a name.
    """
    jobs = [
        Compilation(module, architecture, build.name)
        for module in modules
        for architecture in ARCHITECTURES
        for build in importlib.import_module(module).builds(architecture)
        if re.search(only, build.name)
    ]
    counts = Counter((job.name, job.architecture) for job in jobs)
    twice = sorted({name for (name, _), count in counts.items() if count > 1})
    if twice:
        raise ValueError(f"builds that share a name: {', '.join(twice)}; each needs its own (KernelBuild.name)")
    return jobs


def compile_job(job: Compilation) -> Resources:
    """Compile one build and read the assembler's report."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    builds = importlib.import_module(job.module).builds(job.architecture)
    build = next(build for build in builds if build.name == job.name)
    names = build.function.arg_names
    source = ASTSource(
        build.function,
        {name: build.signature.get(name, "constexpr") for name in names},
        dict(build.constants),
        # In the order of the arguments: the cache's key depends on it, and a set's order changes from run to run.
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in build.divisible_by_16},
    )
    target = GPUTarget("cuda", job.architecture[0] * 10 + job.architecture[1], 32)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}

    knobs.nvidia.dump_ptxas_log = True  # printed when compiled; stored beside the kernel in the cache for later calls
    log_name = "ptxas.log"
    with redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=target, options=options)
        cache = get_cache_manager(compiled.hash)
        if not printed.getvalue() and cache.get_file(log_name) is None:  # cached earlier, without a log
            with knobs.compilation.scope():
                knobs.compilation.always_compile = True
                compiled = triton.compile(source, target=target, options=options)
    if printed.getvalue():
        cache.put(printed.getvalue(), log_name, binary=False)
    log = printed.getvalue() or Path(cache.get_file(log_name)).read_text(encoding="utf-8")

    return Resources(
        name=build.name,
        architecture=f"sm_{target.arch}",
        registers=_number(r"Used (\d+) registers", log),
        spill_stores_bytes=_number(r"(\d+) bytes spill stores", log),
        spill_loads_bytes=_number(r"(\d+) bytes spill loads", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_bytes=compiled.metadata.shared,
        instruction=_instruction(compiled.asm["ptx"], log),
        num_warps=build.num_warps,
        num_stages=build.num_stages,
        triton=triton.__version__,
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise ValueError(f"ptxas's report has no line like {pattern!r}; the report is:\n{log}")
    return int(found.group(1))


def _instruction(ptx: str, log: str) -> str:
    names = {"wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
    found = "+".join(name for name, opcode in names.items() if opcode in ptx) or "none"
    return found + (SERIALIZED if "wgmma.mma_async instructions are serialized" in log else "")


def read_table(path: Path) -> list[Resources]:
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [
            {**row, **{name: int(row[name]) for name in NUMBERS}} for row in csv.DictReader(file)
        ]
    return [Resources(**row) for row in rows]


def write_table(rows: Sequence[Resources], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def violations(rows: Sequence[Resources], table: Sequence[Resources]) -> list[str]:
    """One line for each value that is worse than the table's; a better value is no violation."""
    expected: Mapping[tuple[str, str], Resources] = {(row.name, row.architecture): row for row in table}
    found = [f"{row.name} {row.architecture}: in the table, but no longer built" for row in not_built(rows, table)]
    for row in rows:
        where = f"{row.name} {row.architecture}"
        if row.shared_bytes > MAX_SHARED_BYTES[row.architecture]:
            found.append(
                f"{where}: {row.shared_bytes} shared_bytes, above the {MAX_SHARED_BYTES[row.architecture]}"
                " of the architecture"
            )
        known = expected.get((row.name, row.architecture))
        if known is None:
            found.append(f"{where}: not in the table")
            continue
        for name in ("registers", "spill_stores_bytes", "spill_loads_bytes", "stack_bytes"):
            if getattr(row, name) > getattr(known, name):
                found.append(f"{where}: {getattr(row, name)} {name}, above the table's {getattr(known, name)}")
        if row.instruction not in (known.instruction, known.instruction.removesuffix(SERIALIZED)):
            found.append(f"{where}: instruction {row.instruction!r}, not the table's {known.instruction!r}")
    return found


def not_built(rows: Sequence[Resources], table: Sequence[Resources]) -> list[Resources]:
    built = {(row.name, row.architecture) for row in rows}
    return [row for row in table if (row.name, row.architecture) not in built]


def print_rows(rows: Sequence[Resources]) -> None:
    width = max([len(row.name) for row in rows] + [4])
    print(f"{'name':{width}} arch  regs spill st/ld B stack B  shared B warps stages instruction")
    for row in rows:
        spills = f"{row.spill_stores_bytes}/{row.spill_loads_bytes}"
        print(
            f"{row.name:{width}} {row.architecture} {row.registers:4} {spills:>13} {row.stack_bytes:7} "
            f"{row.shared_bytes:9} {row.num_warps:5} {row.num_stages:6} {row.instruction}"
        )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the table; exit 1 if anything is worse")
    action.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--only", default="", help="regular expression that a build's name must contain")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to compare with or to write")
    parser.add_argument("--kernels", nargs="+", metavar="MODULE", help="modules with builds(); default: the package's")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write writes the whole table, and --only would leave out the other builds; give one of the two")
    return options


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> int:
    options = parse_arguments(arguments)
    from triton import knobs

    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing would be compiled; run this without it", file=sys.stderr)
        return 2
    started = time.monotonic()
    jobs = list_jobs(options.kernels or kernel_modules(), only=options.only)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        rows = sorted(pool.map(compile_job, jobs), key=lambda row: (row.name, row.architecture))
    print_rows(rows)
    print(f"{len(rows)} builds in {time.monotonic() - started:.0f} s")
    if options.write:
        write_table(rows, options.table)
    if not options.check:
        return 0

    table = [row for row in read_table(options.table) if re.search(options.only, row.name)]
    found = violations(rows, table)
    made_with, running = sorted({row.triton for row in table}), sorted({row.triton for row in rows})
    if found and made_with != running:
        print(f"the table was made with triton {', '.join(made_with)}; this is {', '.join(running)}")
    for line in found:
        print(f"violation: {line}")
    print(f"{len(found)} violations of {options.table.name}" if found else f"{options.table.name} holds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
