"""Measures our kernels and every rival on one GPU, in one process, on the same random inputs, in under ten minutes.

    python kernels/benchmarks/measure.py                    measure everything; writes attention.csv beside this file
    python kernels/benchmarks/measure.py --resume           continue a run that was cut off
    python kernels/benchmarks/measure.py --write-dispatch   derive the library's dispatch table from attention.csv
    python kernels/benchmarks/measure.py --table            print attention.csv as a Markdown table
    python kernels/benchmarks/measure.py --tiny             test the whole path on a CPU; its times mean nothing

It needs torch, triton, einops and this repository. It writes each result at once. Inputs are bfloat16; several sets of
them take turns, so that they do not stay in the cache. Forward and backward are timed separately, in the order of
`workloads.workloads`, with compiled rivals last. Each contestant's result is compared with float64.
"""

import argparse
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; deterministic products need it
if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the repository need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))  # as Python itself does, unless PYTHONSAFEPATH is set

import tables
import torch
import torch._functorch.config
import triton
from clock import Timing, time_calls
from contestants import Contestant, contestants
from records import Environment, Measurement, describe, dispatch_cases, is_rival, read_rows, write_rows
from torch import Tensor
from workloads import Inputs, Workload, checked_part, expected, random_inputs, tiny_workloads, workloads

from dreamdance.runs.provenance import code_version
from dreamdance_kernels import dispatch_table

RESULTS = Path(__file__).with_name("attention.csv")
MIN_SETS, MAX_SETS = 2, 12
SHORT_COMMIT = 12
WARM_UP_SECONDS = 150.0


@dataclass(frozen=True)
class Machine:
    """The device and dtype of all contestants, and how long one measurement may take."""

    device: torch.device
    dtype: torch.dtype
    seconds_per_timing: float
    cache_bytes: int


@dataclass(frozen=True)
class Trial:
    """The output or every gradient of one call, by name, and the MiB that its forward kept for its backward."""

    found: Inputs
    saved_mib: float


def find_machine(*, tiny: bool) -> Machine:
    if tiny:
        return Machine(torch.device("cpu"), torch.float32, 0.02, 0)
    properties = torch.cuda.get_device_properties(0)
    return Machine(torch.device("cuda"), torch.bfloat16, 0.15, getattr(properties, "L2_cache_size", 64 * 2**20))


def find_environment(machine: Machine) -> Environment:
    gpu, capability = "none (CPU)", ""
    if machine.device.type == "cuda":
        gpu, capability = torch.cuda.get_device_name(0), "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    driver = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    code = code_version()
    return Environment(
        date=datetime.now(UTC).date().isoformat(),
        commit=code["commit"][:SHORT_COMMIT] + ("-modified" if code.get("diff_sha256") else ""),
        gpu=gpu,
        capability=capability,
        driver=driver[0] if driver else "none",
        torch=torch.__version__,
        triton=triton.__version__,
    )


def _ask(*command: str) -> str:
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def try_once(workload: Workload, contestant: Contestant, machine: Machine, *, backward: bool) -> Trial:
    """Run a contestant once: its forward, and its backward if asked."""
    inputs = random_inputs(workload, seed=0, device=machine.device, dtype=machine.dtype)
    leaves = {name: x.requires_grad_() for name, x in _detached(inputs).items()}
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    prepared = contestant.prepare(leaves)
    with contestant.context():
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            output = contestant.run(prepared)[0]
        found = {"output": output.detach()}
        if backward:
            gradients = torch.autograd.grad(output, list(leaves.values()), _grad_like(output))
            found = dict(zip(leaves, gradients, strict=True))
    return Trial(found, sum(saved.values()) / 2**20)


def exact_results(workload: Workload, machine: Machine) -> Inputs:
    """The checked part of the output and the gradients of `try_once`, in float64."""
    inputs = random_inputs(workload, seed=0, device=machine.device, dtype=machine.dtype)
    return expected(workload, inputs, _grad_like(next(iter(inputs.values()))))  # the output is of the first one's shape


def find_error(workload: Workload, trial: Trial, exact: Inputs) -> float:
    """The largest difference of a trial's results, relative to the largest value; of several results, the worst."""
    worst = 0.0
    for name in trial.found.keys() & exact.keys():
        found = checked_part(workload, name, trial.found[name])
        assert found is not None
        error = ((found.double() - exact[name]).abs().max() / exact[name].abs().max()).item()
        worst = error if math.isnan(error) else max(error, worst)
    return worst


def _detached(inputs: Inputs) -> Inputs:
    """The same memory and strides, as tensors of their own."""
    return {name: x.detach() for name, x in inputs.items()}


def _grad_like(output: Tensor) -> Tensor:
    """Random values, the same for every contestant, dense in the order of the model's next layer."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


def time_contestant(workload: Workload, contestant: Contestant, machine: Machine, *, direction: str) -> Timing:
    """Time a contestant on several sets of inputs that take turns."""
    first = random_inputs(workload, seed=0, device=machine.device, dtype=machine.dtype)
    set_bytes = sum(x.nbytes for x in first.values())
    num_sets = min(max(-(-3 * machine.cache_bytes // set_bytes), MIN_SETS), MAX_SETS)
    make_call = _forward_call if direction == "forward" else _backward_call
    with contestant.context():
        calls = []
        for seed in range(num_sets):
            inputs = random_inputs(workload, seed=seed, device=machine.device, dtype=machine.dtype)
            prepared = {name: x.requires_grad_() for name, x in _detached(contestant.prepare(inputs)).items()}
            calls.append(make_call(contestant, prepared))
        return time_calls(calls, device=machine.device, seconds=machine.seconds_per_timing)


def _forward_call(contestant: Contestant, inputs: Inputs) -> Callable[[], object]:
    return lambda: contestant.run(inputs)


def _backward_call(contestant: Contestant, inputs: Inputs) -> Callable[[], object]:
    outputs = contestant.run(inputs)
    gradients = [_grad_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, list(inputs.values()), gradients, retain_graph=True)


def measure(
    workload: Workload, contestant: Contestant, machine: Machine, exact: Inputs, environment: Environment
) -> list[Measurement]:
    """The rows of one contestant at one workload; a row without a result has the reason."""
    found = []
    for direction in ("backward",) if contestant.differs_backward_only else ("forward", "backward"):
        row = describe(workload, backend=contestant.name, direction=direction, environment=environment)
        if contestant.why_not is not None:
            found.append(replace(row, why_not=contestant.why_not))
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trial = try_once(workload, contestant, machine, backward=direction == "backward")
                error = find_error(workload, trial, exact)
                timing = time_contestant(workload, contestant, machine, direction=direction)
            except Exception as problem:  # noqa: BLE001 - whatever a contestant raises is its result
                reason = _reason(problem, [str(warning.message) for warning in caught])
                found.append(replace(row, why_not=reason))
                continue
        found.append(_with_result(row, workload, timing, error=error, saved_mib=trial.saved_mib, machine=machine))
    return found


def _with_result(
    row: Measurement, workload: Workload, timing: Timing, *, error: float, saved_mib: float, machine: Machine
) -> Measurement:
    flops = workload.useful_flops(row.direction)
    size = workload.fewest_bytes(row.direction, machine.dtype.itemsize)
    return replace(
        row,
        ms=timing.median_ms,
        lower_ms=timing.lower_ms,
        upper_ms=timing.upper_ms,
        host_ms=timing.host_ms,
        tflops=flops / timing.median_ms / 1e9 if flops else None,
        gb_per_s=size / timing.median_ms / 1e6,
        saved_mib=saved_mib,
        error=error,
    )


def _reason(error: Exception, warned: Sequence[str]) -> str:
    """An error in one line; torch warns about the reasons why none of its kernels runs."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    if "No available kernel" in text:
        causes = [line.split(" (Triggered")[0] for line in warned if "not " in line or "requires" in line]
        text = "; ".join(dict.fromkeys(causes)) or text
    return text[:300]


def compile_ahead(
    tasks: Sequence[tuple[Workload, Contestant]], *, processes: int, tiny: bool
) -> dict[tuple[str, str], str]:
    """Run everything that compiles once, in other processes, to fill the caches on disk; one process takes minutes.

    Returns:
        The errors of contestants that broke CUDA, by workload and contestant; such a process cannot measure any more.
    """
    deadline = time.monotonic() + WARM_UP_SECONDS
    broke = {}
    with get_context("spawn").Pool(processes) as pool:  # its end stops the processes, also those that are late
        results = {(x.name, y.name): pool.apply_async(_compile_one, (x.name, y.name, tiny)) for x, y in tasks}
        for names, result in results.items():
            try:
                reason = result.get(timeout=max(deadline - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                continue  # late, or its process died: the measurement will show the reason
            if reason is not None and "CUDA error" in reason:
                broke[names] = reason
    return broke


def _compile_one(workload_name: str, contestant_name: str, tiny: bool) -> str | None:
    """Run in a separate process: the error of a contestant in one line, or None."""
    machine = find_machine(tiny=tiny)
    workload = next(x for x in (tiny_workloads() if tiny else workloads()) if x.name == workload_name)
    contestant = next(x for x in contestants(workload, on_gpu=not tiny) if x.name == contestant_name)
    try:
        _wait_for(machine)
    except RuntimeError:
        return None  # an earlier contestant broke CUDA and reported it
    try:
        try_once(workload, contestant, machine, backward=True)
        _wait_for(machine)
    except Exception as error:  # noqa: BLE001 - whatever a contestant raises is its result
        return _reason(error, [])
    return None


def _wait_for(machine: Machine) -> None:
    if machine.device.type == "cuda":
        torch.cuda.synchronize()


def run(tasks: Sequence[tuple[Workload, Contestant]], rows: list[Measurement], options: argparse.Namespace) -> int:
    """Measure everything that the rows lack, until the time is up; return 0, or 3 if CUDA broke."""
    started = time.monotonic()
    machine = find_machine(tiny=options.tiny)
    environment = find_environment(machine)
    done = {(row.workload, row.backend) for row in rows}
    tasks = [(workload, x) for workload, x in tasks if (workload.name, x.name) not in done]
    broke: dict[tuple[str, str], str] = {}
    if options.processes:
        compiling = [(w, x) for w, x in tasks if x.why_not is None and (x.compiled or not is_rival(x.name))]
        broke = compile_ahead(compiling, processes=options.processes, tiny=options.tiny)
        print(f"{time.monotonic() - started:5.0f} s  compiled in {options.processes} processes", flush=True)
    exact: dict[str, Inputs] = {}
    for workload, contestant in tasks:
        if time.monotonic() - started > options.seconds:
            print(f"{options.seconds:.0f} seconds are up; continue with --resume")
            break
        if workload.name not in exact:
            exact[workload.name] = exact_results(workload, machine)
        reason = broke.get((workload.name, contestant.name), contestant.why_not)
        found = measure(workload, replace(contestant, why_not=reason), machine, exact[workload.name], environment)
        rows.extend(found)
        if options.output is not None:
            write_rows(rows, options.output)
        print(f"{time.monotonic() - started:5.0f} s  {tables.one_line(found)}", flush=True)
        if contestant.compiled:
            torch.compiler.reset()
        try:
            torch.cuda.empty_cache()
            _wait_for(machine)
        except RuntimeError as error:
            print(f"CUDA broke, and this process cannot measure any more; continue with --resume: {error}")
            return 3
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: tests the path, measures nothing")
    parser.add_argument("--table", action="store_true", help="print a Markdown table of the results")
    parser.add_argument("--write-dispatch", action="store_true", help="write the dispatch table from the results")
    parser.add_argument(
        "--dispatch-table", type=Path, default=dispatch_table.TABLE, help="the file that --write-dispatch writes"
    )
    parser.add_argument("--resume", action="store_true", help="keep the results and measure what is missing")
    parser.add_argument("--only", default="", help="regular expression; measure the workloads whose name matches")
    parser.add_argument("--seconds", type=float, default=520.0, help="start no measurement after so long")
    parser.add_argument(
        "--processes", type=int, help="processes that compile before the measurement; default: 8, with --tiny 0"
    )
    parser.add_argument("--output", type=Path, help="file of the results; default: attention.csv, with --tiny none")
    options = parser.parse_args(arguments)
    if options.processes is None:
        options.processes = 0 if options.tiny else 8
    if options.output is None and not options.tiny:
        options.output = RESULTS
    if options.tiny and options.output is not None and options.output.resolve() == RESULTS.resolve():
        parser.error("--tiny measures nothing; its output does not belong in attention.csv")
    if (options.resume or options.table or options.write_dispatch) and not (options.output and options.output.exists()):
        parser.error(f"there are no results in {options.output}; measure first")
    return options


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> int:
    options = parse_arguments(arguments)
    shapes = [x for x in (tiny_workloads() if options.tiny else workloads()) if re.search(options.only, x.name)]
    if options.table or options.write_dispatch:
        rows = read_rows(options.output)
        if options.write_dispatch:
            dispatch_table.write_table(dispatch_cases(rows), options.dispatch_table)
        if options.table:
            print(tables.markdown(rows, shapes))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        print("no GPU to measure on; --tiny tests the path on a CPU", file=sys.stderr)
        return 2
    torch.set_warn_always(True)  # torch otherwise warns only once about kernels that do not run
    torch._functorch.config.donated_buffer = False  # one graph's backward is timed many times
    every = [(workload, x) for workload in shapes for x in contestants(workload, on_gpu=not options.tiny)]
    rows = read_rows(options.output) if options.resume else []
    code = run(sorted(every, key=lambda task: task[1].compiled), rows, options)
    print(tables.targets(rows, shapes))
    if options.tiny:
        print("tiny shapes on a CPU, our kernels interpreted: these times mean nothing")
    return code


if __name__ == "__main__":
    sys.exit(main())
