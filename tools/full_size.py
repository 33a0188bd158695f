"""Runs the networks of the paper's size on a processor, piece by piece, and measures each piece.

    python tools/full_size.py runs/full_size runs/full_size/full_size.csv [PIECE...]
    python tools/full_size.py --list

Called by tools/full_size.sh, after tools/published_weights.py has written the weights. A piece that is done is skipped,
one that exceeds its minutes is ended and fails. Peak memory is that of the process' own pages (RssAnon), sampled five
times a second; files of weights that are mapped into memory do not count. Exit codes: 0 done, 1 a piece failed.
"""

import argparse
import csv
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path

import torch
from measure_memory import own_bytes

ROOT = Path(__file__).parents[1]
GIB = 2**30
# Seconds between two looks at a process' memory.
SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """What one piece gave, as a line of the table."""

    date: str
    commit: str
    machine: str
    torch: str
    piece: str
    seconds: float
    peak_gib: float
    planned_gib: str
    result: str


@dataclass(frozen=True)
class Measured:
    """A command that ended, or was killed on purpose: its time, its memory, its output."""

    code: int
    seconds: float
    peak_gib: float
    output: str


@dataclass(frozen=True)
class Piece:
    """One step of the whole, at most `minutes` long on two cores; it may use what the pieces before it left."""

    name: str
    minutes: int
    run: "Callable[[Piece, Path], Row]"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="data, runs and results")
    parser.add_argument("table", type=Path, nargs="?", help="a CSV file that gets a line for each piece")
    parser.add_argument("pieces", nargs="*", help="names of pieces; all of them by default")
    parser.add_argument("--list", action="store_true", help="print the names of the pieces and end")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{piece.name:<28} at most {piece.minutes} minutes" for piece in PIECES))
        return 0
    if options.folder is None or options.table is None:
        parser.error("FOLDER and TABLE are needed")
    if unknown := set(options.pieces) - {piece.name for piece in PIECES}:
        parser.error(f"no piece is named {', '.join(sorted(unknown))}; see --list")
    folder, table = options.folder.absolute(), options.table.absolute()
    for piece in PIECES:
        stamp = folder / "done" / piece.name
        if (options.pieces and piece.name not in options.pieces) or stamp.exists():
            continue
        print(f"\n== {piece.name} (at most {piece.minutes} minutes)", flush=True)
        row = piece.run(piece, folder)
        print(f"== {piece.name}: {row.seconds:.0f} s, peak {row.peak_gib:.1f} GiB, {row.result}", flush=True)
        _append(table, row)
        if row.result.startswith("FAILED"):
            return 1
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    return 0


def _data(piece: Piece, folder: Path) -> Row:
    """Renders one training clip and one held-out clip of 16 frames at 512x768."""
    recipe = ["recipes/demo/prepare.yaml", f"output={folder / 'data'}", "num_workers=1", "shard_size_mib=64"]
    sizes = {"num_train_clips": 1, "num_validation_clips": 1, "num_frames": 16, "width": 512, "height": 768}
    recipe += [f"dancers.{key}={value}" for key, value in sizes.items()]
    return _row(piece, _launch(piece, folder, recipe))


def _encode(piece: Piece, folder: Path) -> Row:
    """Stores the latents and embeddings of the training clip for stage 2."""
    svd = ROOT / "weights/stable-video-diffusion-img2vid-xt-1-1"
    recipe = ["recipes/encode.yaml", "stage=stage2", f"shards.local={folder / 'data/train'}"]
    recipe += [f"output={folder / 'latents'}", "width=512", "height=768", "flip=false", *_ONE_PROCESS]
    recipe += [f"model.autoencoder.path={svd}", f"model.image_encoder.path={svd}"]
    recipe += ["model.image_encoder.subfolder=image_encoder"]
    return _row(piece, _launch(piece, folder, recipe))


_ONE_PROCESS = [
    "cluster.tasks_per_node=1",
    "cluster.gpus_per_node=0",
    "cluster.cpus_per_task=2",
    "cluster.memory_gib=24",
]
_SHORT = [
    *("batch_size=1", "micro_batch_size=1", "precision=bf16", "optimizer.warmup_steps=0"),
    *("checkpoint.every_steps=1", "checkpoint.keep_last=2", "data.num_workers=0", "logging.every_steps=1"),
    "data.flip_probability=0",
    # the last step is always validated: one noise level, one frame, one denoising step without guidance
    *("validation.noise_levels=1", "validation.num_frames=1", "sampling.num_inference_steps=1"),
]
# Recipe -> what differs from it, beside `_SHORT`. The trainings before them do not fit in 24 GB.
_UNGUIDED = "sampling.guidance_scales={rgb: 0, normal: 0, depth: 0}"
TRAININGS = {
    "stage1_geometry": ["init_from=null", _UNGUIDED],
    "stage1_temporal": ["init_from=full_stage1_geometry", "data.num_frames=8", _UNGUIDED],
    # All of stage 2's optimizer takes more than 22 GB. Here it covers the controller, the first down block, and the
    # zero convolutions, without which the others get no gradient.
    "stage2": [
        "optimizer.only=[controller.*,controlnet.down_blocks.0.*,controlnet.*zero_convolution*]",
        "optimizer.ema_decay=0",
        *("checkpoint.copy_in_memory=false", "sharding.gradient_checkpointing=transformers"),
        "sampling.guidance_scale=1",
    ],
}


def _training(name: str, folder: Path, *, max_steps: int) -> list[str]:
    recipe = [f"recipes/{name}.yaml", f"name=full_{name}", f"max_steps={max_steps}", *_SHORT, *_ONE_PROCESS]
    recipe += TRAININGS[name]
    recipe += [f"data.train.local={folder / 'data/train'}", f"data.validation.local={folder / 'data/validation'}"]
    return recipe + ([f"data.latents.local={folder / 'latents'}"] if name == "stage2" else [])


def _first_step(name: str) -> Callable[[Piece, Path], Row]:
    def run(piece: Piece, folder: Path) -> Row:
        """Trains one step; the process is killed as soon as the checkpoint of that step counts, before the export."""
        recipe = _training(name, folder, max_steps=1)  # of two, the second would be trained before the first counts
        _launch(replace(piece, name=f"{name} plan"), folder, [*recipe, "--dry-run"])
        complete = folder / f"runs/full_{name}/checkpoints/step_00000001/COMPLETE"
        row = _row(
            piece,
            _launch(piece, folder, recipe, kill_when=complete.exists),
            planned=_planned(name, folder),
            wanted=-signal.SIGKILL,
            losses=folder / f"runs/full_{name}",
        )
        return row if complete.exists() else replace(row, result="FAILED: killed before its checkpoint was complete")

    return run


def _planned(name: str, folder: Path) -> str:
    """The plan's memory in GiB, as the dry run of the first step printed it."""
    printed = _log(f"{name} plan", folder).read_text(encoding="utf-8")
    found = re.search(r"together +([0-9.]+) GiB", printed)
    return found[1] if found else ""


def _second_step(name: str) -> Callable[[Piece, Path], Row]:
    def run(piece: Piece, folder: Path) -> Row:
        """Resumes from the checkpoint, trains the second step, and exports."""
        training = _launch(piece, folder, _training(name, folder, max_steps=2))
        return _row(piece, training, planned=_planned(name, folder), losses=folder / f"runs/full_{name}")

    return run


def _check(name: str) -> Callable[[Piece, Path], Row]:
    def run(piece: Piece, folder: Path) -> Row:
        command = [sys.executable, str(Path(__file__).with_name("full_size_checks.py")), name, str(folder)]
        return _row(piece, _measure(piece, folder, command))

    return run


PIECES = [
    Piece("data", 5, _data),
    *(
        piece
        for name in ("stage1_geometry", "stage1_temporal")
        for piece in (
            Piece(f"{name} step 1, kill", 25, _first_step(name)),
            Piece(f"{name} resume, step 2", 25, _second_step(name)),
        )
    ),
    Piece("encode", 25, _encode),
    Piece("stage2 step 1, kill", 25, _first_step("stage2")),
    Piece("stage2 resume, step 2", 25, _second_step("stage2")),
    *(Piece(name, 25, _check(name)) for name in ("geometry pipeline", "animation pipeline", "zero convolutions")),
]


def _launch(piece: Piece, folder: Path, recipe: list[str], *, kill_when: Callable[[], bool] | None = None) -> Measured:
    path, *overrides = recipe
    command = [sys.executable, "launchers/slurm.py", path, *overrides, "--runs", str(folder / "runs")]
    return _measure(piece, folder, [*command, "--cluster", "debug"], kill_when=kill_when)


def _measure(
    piece: Piece, folder: Path, command: list[str], *, kill_when: Callable[[], bool] | None = None
) -> Measured:
    """Runs a command to its end, or kills it when `kill_when` says so or its minutes are over."""
    log = _log(piece.name, folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(len(os.sched_getaffinity(0)))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    started, peak = time.perf_counter(), 0
    print(f"   output: {log}", flush=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            peak = max(peak, own_bytes(process.pid))
            if kill_when is not None and kill_when():
                process.kill()
            elif time.perf_counter() - started > 60 * piece.minutes:
                process.terminate()
            time.sleep(SAMPLE_SECONDS)
    return Measured(process.returncode, time.perf_counter() - started, peak / GIB, log.read_text(encoding="utf-8"))


def _log(name: str, folder: Path) -> Path:
    """The file with a piece's output."""
    return folder / "logs" / f"{re.sub(r'[^a-z0-9]+', '_', name)}.txt"


def _row(piece: Piece, measured: Measured, *, planned: str = "", wanted: int = 0, losses: Path | None = None) -> Row:
    result = "done"
    if measured.code != wanted:
        result = f"FAILED with exit code {measured.code}, not {wanted}"
    elif lines := re.findall(r"^RESULT (.*)$", measured.output, re.MULTILINE):
        result = "; ".join(lines)
    elif losses is not None:
        result = _losses(losses / "logs/progress.jsonl")
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True, capture_output=True, check=True
    )
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    return Row(
        date=date.today().isoformat(),
        commit=commit.stdout.strip(),
        machine=machine,
        torch=torch.__version__,
        piece=piece.name,
        seconds=round(measured.seconds, 1),
        peak_gib=round(measured.peak_gib, 2),
        planned_gib=planned,
        result=result,
    )


def _losses(log: Path) -> str:
    """The losses of a training's log by step, in words; they must be finite numbers."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = {line["done"]: line["loss"] for line in lines if line.get("loss") is not None}
    if not losses or not all(map(math.isfinite, losses.values())):
        return f"FAILED: losses {losses}"
    if warnings := [line["message"] for line in lines if "nothing is learned" in line.get("message", "")]:
        return f"FAILED: {warnings[0]}"
    return ", ".join(f"loss {loss:.4f} at step {step}" for step, loss in sorted(losses.items()))


def _append(table: Path, row: Row) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    is_new = not table.exists()
    with table.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


if __name__ == "__main__":
    sys.exit(main())
