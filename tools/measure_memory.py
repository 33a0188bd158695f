"""Measures the main memory that a training takes while it starts, in its first step, and while it saves.

    git worktree add --detach ../first 5194bb1
    git worktree add --detach ../before 684735f
    python tools/measure_memory.py --before ../first ../before --csv tools/measure_memory.csv

Each tree trains three steps of stage 1's first step in bf16, with two wider UNets of the demo on rendered dancers, and
saves after each step. `least` is this tree with the settings that save memory (`optimizer.ema_decay: 0`,
`checkpoint.copy_in_memory: false`). The memory is that of the process' own pages (RssAnon), looked at every 10 ms; all
of it lies in main memory here, where a GPU would hold weights, gradients and optimizer state. Bytes per parameter are
the difference of the peaks of two widths, divided by the difference of their numbers of trained parameters.
"""

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.01
NAME = "demo_stage1_domains"
# Channels of the three levels of the UNets: small, so that a training takes less than 1 GiB.
WIDTHS = ((32, 64, 96), (56, 112, 160))
# Pictures and networks of the demo as it was at 5194bb1, so that all trees train the same.
TRAINING = (
    *("model.unet.path=null", "model.autoencoder.patch_size=2", "model.pose_channels=[16,32]"),
    *("data.width=32", "data.height=48"),
    *("data.train.local=data/train", "data.validation.local=data/validation", "precision=bf16", "max_steps=3"),
    *("batch_size=1", "micro_batch_size=1", "cluster.tasks_per_node=1", "checkpoint.every_steps=1"),
    *("optimizer.warmup_steps=0", "logging.every_steps=1", "validation.num_loss_clips=1"),
    "validation.num_sample_clips=1",
)
DANCERS = (
    *("output=data", "dancers.num_train_clips=4", "dancers.num_validation_clips=2", "dancers.num_frames=4"),
    *("num_workers=1", "clips_per_part=4", "dancers.width=32", "dancers.height=48"),
)
LEAST = ("optimizer.ema_decay=0", "checkpoint.copy_in_memory=false")
PHASES = ("starting", "first step", "saving")


@dataclass(frozen=True)
class Row:
    """Medians over the rounds: the peak of the wider networks in MiB, and bytes for each parameter that trains."""

    date: str
    commit: str
    settings: str
    million_parameters: float
    rounds: int
    phase: str
    peak_mib: float
    bytes_per_parameter: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures all trees in turn and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--before", type=Path, nargs="+", default=[], help="work trees of other commits, measured in the same run"
    )
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each width (3)")
    parser.add_argument("--csv", type=Path, help="a file that the results are written to as well")
    options = parser.parse_args(arguments)
    trees = [*(tree.resolve() for tree in options.before), REPOSITORY]
    cases: list[tuple[str, Path, tuple[str, ...]]] = [("as in the recipes", tree, ()) for tree in trees]
    cases.append(("least", REPOSITORY, LEAST))
    rows = [row for settings, tree, words in cases for row in measure(settings, tree, words, options.rounds)]
    if options.csv is not None:
        with options.csv.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    return 0


def measure(settings: str, tree: Path, words: Sequence[str], rounds: int) -> Iterator[Row]:
    """Trains both widths in turn; yields and prints the row of each phase."""
    numbers = [count_parameters(width) for width in WIDTHS]
    peaks_of_rounds = [[train(tree, [unet(width), *words]) for width in WIDTHS] for _ in range(rounds)]
    for phase in PHASES:
        narrow, wide = (statistics.median(one[index][phase] for one in peaks_of_rounds) for index in range(2))
        row = Row(
            date=date.today().isoformat(),
            commit=commit_of(tree),
            settings=settings,
            million_parameters=round(numbers[1] / 1e6, 1),
            rounds=rounds,
            phase=phase,
            peak_mib=round(wide / 2**20, 1),
            bytes_per_parameter=round((wide - narrow) / (numbers[1] - numbers[0]), 1),
        )
        print("  ".join(f"{name} {value}" for name, value in asdict(row).items()), flush=True)
        yield row


def unet(channels: Sequence[int]) -> str:
    """The word that makes the demo's UNets so wide."""
    return (
        f"model.unet.config={{sample_size: 16, in_channels: 12, out_channels: 12, block_out_channels: "
        f"{list(channels)}, layers_per_block: 1, down_block_types: [DownBlock2D, DownBlock2D, CrossAttnDownBlock2D], "
        "up_block_types: [CrossAttnUpBlock2D, UpBlock2D, UpBlock2D], norm_num_groups: 8, cross_attention_dim: 64, "
        "attention_head_dim: 4}"
    )


def count_parameters(channels: Sequence[int]) -> int:
    """The number of parameters that the measured training trains."""
    from dreamdance.recipe import load_recipe
    from dreamdance.recipe.schema import TrainingRecipe
    from dreamdance.training.planning.plan import make_plan
    from dreamdance.training.stages.training_stage import stage_of

    recipe = load_recipe(REPOSITORY / "recipes/demo/stage1_domains.yaml", [*TRAINING, unet(channels)])
    assert isinstance(recipe, TrainingRecipe), "it trains"
    return make_plan(stage_of(recipe)).num_trainable


def train(tree: Path, words: Sequence[str]) -> dict[str, int]:
    """Trains in a process of its own; returns the peak of each phase in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = [sys.executable, str(tree / "launchers/slurm.py")]
        prepare = [*launcher, str(tree / "recipes/demo/prepare.yaml"), *DANCERS, "--cluster", "debug"]
        training = [*launcher, str(tree / "recipes/demo/stage1_domains.yaml"), *TRAINING, *words, "--cluster", "debug"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
        samples: list[tuple[float, int]] = []
        with (folder / "log.txt").open("w+", encoding="utf-8") as log:
            prepared = subprocess.run(prepare, cwd=folder, env=environment, stdout=log, stderr=log, check=False)
            with subprocess.Popen(training, cwd=folder, env=environment, stdout=log, stderr=log) as process:
                while process.poll() is None:
                    samples.append((time.time(), own_bytes(process.pid)))
                    time.sleep(SAMPLE_SECONDS)
            if prepared.returncode or process.returncode:
                log.seek(0)
                raise SystemExit(f"{tree} failed:\n{log.read()}")
        progress = (folder / f"runs/{NAME}/logs/progress.jsonl").read_text(encoding="utf-8")
        return peaks(samples, [json.loads(line) for line in progress.splitlines()])


def peaks(samples: Sequence[tuple[float, int]], progress: Sequence[dict[str, object]]) -> dict[str, int]:
    """The largest sample of each phase, by the times of the run's progress log."""
    begun = _time(progress, "starting at step 0")
    first = next(float(str(line["time"])) for line in progress if "loss" in line)
    bounds = (0.0, begun, first, _time(progress, "saved step_00000003"))  # steps go on while a state is saved
    return {
        phase: max(size for moment, size in samples if low < moment <= high)
        for phase, low, high in zip(PHASES, bounds, bounds[1:], strict=False)
    }


def _time(progress: Sequence[dict[str, object]], text: str) -> float:
    return next(float(str(line["time"])) for line in progress if text in str(line.get("message", "")))


def own_bytes(process: int) -> int:
    """The process' memory without the files that it has mapped, in bytes; 0 if it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def commit_of(tree: Path) -> str:
    """The short name of a work tree's commit."""
    command = ["git", "-C", str(tree), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
