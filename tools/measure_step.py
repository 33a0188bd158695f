"""Measures a training step of every stage: ours, plain diffusers with DeepSpeed, and ours of commit 5194bb1.

    python tools/measure_step.py                          # networks of a fifth of the width, on one core
    python tools/measure_step.py --gains                  # also ours with each gain switched off
    python tools/measure_step.py --size full --minutes 9  # full width, on a GPU; the same command continues

The plain trainer (`tools/plain_trainer.py`) is shown with gradient checkpointing, as public repositories train, and
with its best settings: without, and with frozen weights in channels_last. Networks, weights, clips, noise and the
parameters that train are the same, and so is the first loss (float32: an error if not; `Contestant.tolerance` says how
far). Clips come from memory (`tools/measure_loading.py` measures reading them), as pictures, which all encode in each
step; ours is also shown from stored latents (`task: encode`). The plain data set has resized, blurred and drawn
everything before the clock starts; ours does so within. One rank, ZeRO-2, one micro batch, latents at the mode of their
distribution, clips' own frame rate. In bf16 the plain trainer's autoencoder is bf16 too, as usual, which is faster than
our float32.

Each contestant is a process. On a CPU ours and up to four others take a step in turn, so that what else the machine
does hits all alike, and seconds are CPU time of one thread; memory is the whole process's. On a GPU they run one after
another, in bf16, and the rest of the time is `kernels/benchmarks/measure.py`'s, which then writes the dispatch table;
this part has not run on a GPU yet. Each result is written to the CSV file at once; what it has for this commit, machine
and size is not measured again. Operations are those of a whole step with its optimizer; MFU is the share of the GPU's
peak rate that the operations of ours make in the seconds of each. Exit codes: 0 done, 1 something failed, 3 the time is
up: call again.
"""

import argparse
import csv
import datetime
import json
import os
import select
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from step_contestants import CONTESTANTS, GAINS, OURS, REPOSITORY, SIZES, STAGES, Contestant, write_configs

BEFORE = "5194bb1"
TABLE = Path(__file__).with_suffix(".csv")
KERNELS = REPOSITORY / "kernels" / "benchmarks" / "measure.py"
# Seconds that a contestant of full size is given to start, and the share of the time that the kernels have at least.
LAST_START_SECONDS, KERNEL_SHARE = 60.0, 0.3
# Contestants that are in memory beside ours on a CPU.
MOST_BESIDE = 4
# An answer that takes longer will not come.
LONGEST_WAIT_SECONDS = 3600.0
COLUMNS = (
    *("date", "commit", "machine", "versions", "size", "stage", "contestant"),
    *("seconds median", "seconds min", "seconds max", "peak GiB", "TF", "operators", "MFU", "loss"),
    *("ratio median", "ratio min", "ratio max", "rounds"),
)
Row = dict[str, str]


class OutOfTimeError(Exception):
    """The minutes are up."""


class Process:
    """A contestant at work; a context manager that ends it."""

    def __init__(self, name: str, stage: str, size: str, networks: Path, tree: Path, deadline: float) -> None:
        """Starts to build it; `ready` waits."""
        self.name, self._deadline = name, deadline
        environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
        if not on_gpu():
            environment["OMP_NUM_THREADS"] = "1"
        script = Path(__file__).with_name("step_contestants.py")
        command = [sys.executable, str(script), stage, size, str(networks), name]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=self._log, text=True, cwd=REPOSITORY
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, word: str | None = None) -> dict[str, Any]:
        """The next answer, after a word if one is given.

        Raises:
            RuntimeError: the process failed; the text has the end of its log.
            OutOfTimeError: the minutes are up.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if word is not None:
                print(word, file=self._process.stdin, flush=True)
            left = self._deadline - time.monotonic()
            if not select.select([self._process.stdout], [], [], min(max(left, 0.0), LONGEST_WAIT_SECONDS))[0]:
                raise OutOfTimeError
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._log.seek(0)
            raise RuntimeError(f"{self.name} failed:\n{self._log.read()[-2000:]}") from None
        return answer


def on_gpu() -> bool:
    """Whether the steps run on a GPU."""
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="reduced", help="widths and pictures (reduced)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="all four by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contestant (5)")
    parser.add_argument("--gains", action="store_true", help="also ours with each gain switched off")
    parser.add_argument("--only", nargs="+", choices=[*CONTESTANTS, *GAINS], metavar="NAME", help="beside ours")
    parser.add_argument("--before", type=Path, help=f"the tree of {BEFORE}, if git cannot give it")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so long; 0 is no limit")
    parser.add_argument("--csv", type=Path, default=TABLE, help="the file of the results (tools/measure_step.csv)")
    options = parser.parse_args(arguments)
    names = options.only or [*CONTESTANTS, *(GAINS if options.gains else ())]
    contestants = {name: {**CONTESTANTS, **GAINS}[name] for name in (OURS, *names)}
    started, budget = time.monotonic(), options.minutes * 60 or float("inf")
    share = 1 - KERNEL_SHARE if on_gpu() else 1.0
    code = 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            failed = measure_stages(options, contestants, Path(folder), started + share * budget)
        print("".join(f"{text}\n" for text in failed), end="", file=sys.stderr)
        code = 1 if failed else 0
    except OutOfTimeError:
        code = 3
    if on_gpu():
        code = measure_kernels(started + budget - time.monotonic()) or code
    print(markdown([row for row in read_rows(options.csv) if row["size"] == options.size]))
    return code


def measure_stages(
    options: argparse.Namespace, contestants: Mapping[str, Contestant], folder: Path, deadline: float
) -> list[str]:
    """Measures what the file lacks and writes it; returns the failures as texts."""
    networks = write_configs(folder / "networks", SIZES[options.size])
    trees, failed = {"now": REPOSITORY, "plain": REPOSITORY}, []
    if any(one.kind == "before" for one in contestants.values()):
        trees["before"] = options.before or extract_tree(folder / "before")
    identity = identify(options.size)
    for stage in options.stages:
        rows, here = read_rows(options.csv), {**identity, "stage": stage}
        for group in groups(missing(rows, here, contestants)):
            if deadline - time.monotonic() < (LAST_START_SECONDS if on_gpu() else 0.0):
                raise OutOfTimeError
            with processes(group, contestants, stage, options.size, networks, trees, deadline) as running:
                found, problems = measure_group(running, options.rounds)
            failed += [f"{stage}: {problem}" for problem in problems]
            stored = [of_row(row) for row in find(rows, {**here, "contestant": OURS})]
            for ours in [found[OURS]] if OURS in found else stored:
                new = [make_row({**here, "contestant": name}, found[name], ours) for name in found]
                failed += list(other_losses(new, ours["loss"]))
                rows += [row for row in new if not find(rows, {**here, "contestant": row["contestant"]})]
                write_rows(options.csv, rows)
    return failed


def identify(size: str) -> Row:
    """What results of one call have in common."""
    from step_contestants import versions

    from dreamdance.runs.provenance import code_version

    commit, found = code_version()["commit"][:12], versions()
    # Not the files that a call writes: it would not find its own results again.
    ask = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!*.csv"]
    if commit != "unknown" and subprocess.run(ask, cwd=REPOSITORY).returncode:
        commit += "-modified"
    return {"commit": commit, "machine": found["device"], "versions": found["versions"], "size": size}


def groups(names: Sequence[str]) -> list[list[str]]:
    """Which contestants run beside one another: on a CPU a few, with ours; on a GPU each alone."""
    if on_gpu():
        return [[name] for name in names]
    others = [name for name in names if name != OURS]
    return [[OURS, *others[at : at + MOST_BESIDE]] for at in range(0, max(len(others), len(names[:1])), MOST_BESIDE)]


def find(rows: Sequence[Row], wanted: Mapping[str, str]) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def missing(rows: Sequence[Row], wanted: Mapping[str, str], contestants: Mapping[str, Contestant]) -> list[str]:
    """The contestants that have no row of these values."""
    return [name for name in contestants if not find(rows, {**wanted, "contestant": name})]


def extract_tree(folder: Path) -> Path:
    """Writes the files of 5194bb1 to a folder."""
    command = ["git", "archive", BEFORE, "dreamdance", "kernels", "recipes"]
    with tarfile.open(fileobj=BytesIO(subprocess.check_output(command, cwd=REPOSITORY))) as archive:
        archive.extractall(folder, filter="data")
    return folder


@contextmanager
def processes(
    names: Sequence[str],
    contestants: Mapping[str, Contestant],
    stage: str,
    size: str,
    networks: Path,
    trees: Mapping[str, Path],
    deadline: float,
) -> Iterator[list[Process]]:
    """The contestants of a group; all are ended after the block."""
    with ExitStack() as held:
        yield [
            held.enter_context(Process(name, stage, size, networks, trees[contestants[name].kind], deadline))
            for name in names
        ]


def measure_group(running: Sequence[Process], rounds: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Counts a step of each, which warms up, then takes steps in turn; returns what was found, and the failures."""
    found: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    left = list(running)
    # On a GPU a second step to warm up: the first one chose kernels while it was counted.
    for word in (None, "count", *["warm up"] * on_gpu(), *["step"] * rounds):
        for process in list(left):
            try:
                answer = process.ask(word)
            except RuntimeError as error:
                problems.append(str(error))
                left.remove(process)
                found.pop(process.name, None)
                continue
            own = found.setdefault(process.name, {"rounds": []})
            if word == "count":
                own |= answer
            elif word == "step":
                own["rounds"].append(answer["seconds"])
                own["peak_gib"] = answer["peak_gib"]
                print(f"  {process.name}: {answer['seconds']:.3f} s", file=sys.stderr, flush=True)
    return found, problems


def differs(loss: float, of_ours: float, tolerance: float) -> bool:
    """Whether a first loss is another than ours, by more than this share of ours."""
    return not abs(loss - of_ours) <= tolerance * abs(of_ours)


def other_losses(rows: Sequence[Row], of_ours: float) -> Iterator[str]:
    """A text for each row in float32 whose first loss differs from ours."""
    for row in rows:
        contestant = (CONTESTANTS | GAINS)[row["contestant"]]
        if not on_gpu() and differs(float(row["loss"]), of_ours, contestant.tolerance):
            yield f"{row['stage']}, {row['contestant']}: first loss {row['loss']}, ours {of_ours:.8g}"


def make_row(identity: Row, found: Mapping[str, Any], ours: Mapping[str, Any]) -> Row:
    """A row of the file: seconds, and how many times longer than ours each round took."""
    rounds = found["rounds"]
    ratios = [own / of_ours for own, of_ours in zip(rounds, ours["rounds"], strict=False)]
    row = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **identity}
    for name, values in (("seconds", rounds), ("ratio", ratios)):
        summary = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        row |= {f"{name} {kind}": f"{value:.4g}" for kind, value in summary.items()}
    row["peak GiB"] = f"{found['peak_gib']:.3f}"
    row |= {"TF": f"{found['tf']:.4g}", "operators": str(found["operators"])} if "tf" in found else {}
    peak = peak_flops()
    if peak is not None and "tf" in ours:
        row["MFU"] = f"{float(ours['tf']) * 1e12 / statistics.median(rounds) / peak:.3f}"
    return {**row, "loss": f"{found['loss']:.8g}", "rounds": " ".join(f"{seconds:.5g}" for seconds in rounds)}


def peak_flops() -> float | None:
    """The GPU's peak rate in bf16; None without a known GPU."""
    import torch

    from dreamdance.runtime.gpus import known_gpu

    gpu = known_gpu(torch.cuda.get_device_name(0)) if on_gpu() else None
    return None if gpu is None else gpu.bf16_flops


def of_row(row: Row) -> dict[str, Any]:
    """What `measure_group` found, from a row."""
    counted = {"tf": float(row["TF"])} if row["TF"] else {}
    return {"rounds": [float(word) for word in row["rounds"].split()], "loss": float(row["loss"]), **counted}


def read_rows(path: Path) -> list[Row]:
    """The rows of the file; none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes the file as a whole, under another name first."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table for a README, with what they were measured on."""
    lines = [
        "| stage | contestant | seconds | times ours | peak GiB | TF | operators | MFU |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        spread = {name: f"{row[f'{name} median']} ({row[f'{name} min']} to {row[f'{name} max']})"
                  for name in ("seconds", "ratio")}  # fmt: skip
        cells = [row["stage"], row["contestant"], spread["seconds"], spread["ratio"]]
        cells += [row[name] or "-" for name in ("peak GiB", "TF", "operators", "MFU")]
        lines.append(f"| {' | '.join(cells)} |")
    names = ("date", "commit", "machine", "versions", "size")
    facts = dict.fromkeys(", ".join(row[name] for name in names) for row in rows)
    return "\n".join([*lines, "", *facts])


def measure_kernels(seconds: float) -> int:
    """Measures the kernels in the seconds left, writes the dispatch table, prints the results; 0, or 1 if it failed."""
    results = KERNELS.with_name("attention.csv")
    resume = ["--resume"] if results.exists() else []
    code = subprocess.run(
        [sys.executable, str(KERNELS), *resume, "--seconds", f"{max(seconds - 30, 0):.0f}"]
    ).returncode
    for word in ("--write-dispatch", "--table") if results.exists() else ():
        code = code or subprocess.run([sys.executable, str(KERNELS), word]).returncode
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
