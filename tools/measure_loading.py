"""Measures how fast training reads its samples: samples per second of one core, and bytes read per sample.

    python tools/measure_loading.py
    git worktree add --detach ../before 5194bb1
    python tools/measure_loading.py --before ../before --csv tools/measure_loading.csv

Rendered dancers are stored once by each tree, in the form that its `prepare` gives to videos, and are read with the
settings of the four training recipes. This commit's tree also reads them from latents, which `task: encode` stores as
fp32 and as bf16; these are random numbers of the size that published networks give. The bytes are those that the
process asks the kernel for (`rchar` of /proc/self/io), whether or not they are in the page cache. The seconds are CPU
time of one thread for what a data worker does: those of 5194bb1 deliver floats, those of now deliver numbers as stored,
which the training's device scales. Nothing is hashed or unpacked while the command measures, and no decoded clip is
kept: a set of thousands of clips does not fit.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = ("stage1_domains", "stage1_geometry", "stage1_temporal", "stage2")
FULL_SIZE = (512, 768)
# The seed that the dancers begin with; any will do.
FIRST_SEED = 40
MAPS = ("rgb", "pose", "normal", "depth", "mask")
NUM_REFERENCES = 12
# Width of the published image encoders' embeddings: CLIP ViT-L/14 in stage 1, ViT-H/14 in stage 2.
EMBEDDING_WIDTHS = {"stage1": 768, "stage2": 1024}
PRECISIONS = ("fp32", "bf16")


def main(arguments: list[str] | None = None) -> int:
    """Renders the dancers, lets each tree store and read them in a process of its own, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a work tree of another commit, measured in the same run")
    parser.add_argument("--width", type=int, default=FULL_SIZE[0], help="width of the stored clips (512)")
    parser.add_argument("--height", type=int, default=FULL_SIZE[1], help="height of the stored clips (768)")
    parser.add_argument("--num-frames", type=int, default=64, help="frames of a stored clip (64)")
    parser.add_argument("--clips", type=int, default=2, help="number of stored clips (2)")
    parser.add_argument("--samples", type=int, default=12, help="samples to read with each recipe (12)")
    parser.add_argument("--csv", type=Path, help="a file that the results are written to as well")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.reader is not None:
        print(json.dumps(store_and_read(json.loads(options.reader))))
        return 0
    trees = {"now": REPOSITORY} if options.before is None else {"before": options.before, "now": REPOSITORY}
    with tempfile.TemporaryDirectory() as folder:
        render_dancers(Path(folder), options)
        settings = {"folder": folder, "samples": options.samples, "recipes": read_recipes(options)}
        measured = {name: run_reader(tree, {**settings, "name": name}) for name, tree in trees.items()}
    rows = list_rows(measured)
    print_table(measured, rows, options)
    if options.csv is not None:
        write_csv(options.csv, rows, options)
    return 0


def read_recipes(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The window of each training recipe, scaled if the clips are stored smaller than at full size."""
    from dreamdance.recipe.parse import load_recipe
    from dreamdance.recipe.schema import TrainingRecipe

    windows = {}
    for name in RECIPES:
        recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
        assert isinstance(recipe, TrainingRecipe), "all four train"
        data, controls = recipe.data, getattr(recipe.model, "controls", ("normal", "depth"))
        windows[name] = {
            "width": data.width * options.width // FULL_SIZE[0],
            "height": data.height * options.height // FULL_SIZE[1],
            "num_frames": min(data.num_frames, options.num_frames),
            "stride": list(data.stride),
            "flip_probability": data.flip_probability,
            "maps": [control for control in controls if control != "pose"],
        }
    return windows


def render_dancers(folder: Path, options: argparse.Namespace) -> None:
    """Renders the clips and their references into .npy files, which every tree can read."""
    from dreamdance.data.writing.dancer_clips import render_record
    from dreamdance.recipe.schema import DancersSource

    source = DancersSource(
        num_train_clips=options.clips,
        num_validation_clips=1,
        num_frames=options.num_frames,
        width=options.width,
        height=options.height,
        fps=25.0,
        references=NUM_REFERENCES,
    )
    for number in range(options.clips):
        record = render_record(FIRST_SEED + number, source)
        assert record.references is not None, "the source asks for them"
        for part, maps, keypoints in (
            ("clip", record.maps, record.keypoints),
            ("references", record.references.maps, record.references.keypoints),
        ):
            for name, values in {**maps, "keypoints": keypoints}.items():
                np.save(folder / f"{number}.{part}.{name}.npy", np.asarray(values))
        np.save(folder / f"{number}.positions.npy", record.references.positions)


def run_reader(tree: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs `store_and_read` on the code of a tree; returns its result."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--reader", json.dumps(settings)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def store_and_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stores the clips and reads samples with each recipe; runs in a process that imports another tree's package."""
    tree, folder = import_tree(), Path(settings["folder"])
    shards = tree.Shards(local=str(folder / settings["name"]))
    parts = [tree.Part("part_00000", lambda: read_records(tree, folder))]
    tree.write_shards(Path(shards.local), parts, settings={}, shard_format=tree.shard_format(settings))
    measured: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in Path(shards.local).glob("*.mds*"))}
    for name, window in settings["recipes"].items():
        window = {**window, "stride": tuple(window["stride"])}
        forms: dict[str, dict[str, Any]] = {"": {}}
        if settings["name"] == "now":
            read = read_by_stage(name, window)
            forms = {"": read}
            for precision in PRECISIONS:
                forms[f"latents {precision}"] = {**read, **open_latents(folder, shards, name, window, precision)}
        measured[name] = {}
        for form, more in forms.items():
            dataset = tree.ClipDataset(shards, **window, verify="size", cache_bytes=0, **more)
            measure_samples(tree, dataset, len(dataset))  # unpacks and compares every shard
            measured[name][form] = measure_samples(tree, dataset, settings["samples"])
    return measured


def read_by_stage(name: str, window: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a dataset by which a stage reads less: one domain alone, or maps at a smaller size."""
    from dreamdance.recipe.parse import load_recipe
    from dreamdance.training.stages.training_stage import stage_of

    recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
    stage = stage_of(recipe)  # type: ignore[arg-type]  # all four train
    scale = window["width"] / stage.recipe.data.width
    sizes = {key: (round(width * scale), round(height * scale)) for key, (width, height) in stage.map_sizes.items()}
    return {"domain_weights": stage.domain_weights, "map_sizes": sizes}


def open_latents(folder: Path, shards: Any, name: str, window: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The arguments of a dataset that reads latents, which are encoded first if no recipe of the stage needed them."""
    from dreamdance.data.loading.stored_clips import StoredClips
    from dreamdance.recipe.encode_recipe import EncodeRecipe
    from dreamdance.recipe.parse import load_recipe
    from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
    from dreamdance.training.encoding import encode as encoding
    from dreamdance.training.stages.training_stage import stage_of

    recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
    assert isinstance(recipe, Stage1Recipe | Stage2Recipe), "all four train"
    stage, output = recipe.task, folder / f"latents_{recipe.task}_{precision}"
    if not output.exists():
        # The size of what is read does not depend on its values: no network has to run.
        encoding.Encoder.moments = random_moments  # type: ignore[assignment]
        values = {
            "task": "encode",
            "name": "measured",
            "shards": {"local": shards.local},
            "output": str(output),
            "stage": stage,
            "model": {
                "autoencoder": {"patch_size": 8},
                "image_encoder": {"stand_in_width": EMBEDDING_WIDTHS[stage]},
            },
            "width": window["width"],
            "height": window["height"],
            "flip": window["flip_probability"] > 0,
            "precision": precision,
            "verify_samples": 0,
        }
        encoding.encode(EncodeRecipe.model_validate(values), folder / f"run_{stage}_{precision}")
    return {"latents": StoredClips(type(shards)(local=str(output))), "latent_names": stage_of(recipe).latent_names}


def random_moments(_: Any, images: Any) -> Any:
    """In place of `Encoder.moments`: mean and deviation, `n 2 4 h w` for pictures `n 3 8h 8w`."""
    import torch

    return torch.rand(len(images), 2, 4, images.shape[-2] // 8, images.shape[-1] // 8)


def import_tree() -> SimpleNamespace:
    """The names of the package that this process finds, of this commit or of 5194bb1."""
    try:
        from dreamdance.data.loading.dataset import ClipDataset
        from dreamdance.data.loading.order import SampleKey
        from dreamdance.data.writing.clip_record import ClipRecord, References
        from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards
        from dreamdance.recipe.sections import Shards
    except ModuleNotFoundError:
        return import_older_tree()

    def shard_format(settings: Mapping[str, Any]) -> ShardFormat:
        small = settings["recipes"][RECIPES[0]]
        return ShardFormat(rgb_format="jpeg", smaller_sizes=((small["width"], small["height"]),))

    return SimpleNamespace(
        ClipDataset=ClipDataset,
        SampleKey=SampleKey,
        Part=Part,
        write_shards=write_shards,
        Shards=Shards,
        shard_format=shard_format,
        record=lambda maps, keypoints, references, **fields: ClipRecord(
            maps=maps, keypoints=keypoints, references=References(**references), **fields
        ),
    )


def import_older_tree() -> SimpleNamespace:
    """The names of commit 5194bb1, which stores neither references nor a second size."""
    import importlib

    clips, writer = (
        importlib.import_module("dreamdance.data.clips"),
        importlib.import_module("dreamdance.data.shard_writer"),
    )
    return SimpleNamespace(
        ClipDataset=clips.ClipDataset,
        SampleKey=clips.SampleKey,
        Part=writer.Part,
        write_shards=writer.write_shards,
        Shards=clips.Shards,
        shard_format=lambda settings: writer.ShardFormat(),
        record=lambda maps, keypoints, references, **fields: writer.ClipRecord(**maps, keypoints=keypoints, **fields),
    )


def read_records(tree: SimpleNamespace, folder: Path) -> Iterator[Any]:
    """The rendered clips as records of a tree."""
    for number in range(len(list(folder.glob("*.positions.npy")))):
        clip, references = (
            {
                name: np.load(folder / f"{number}.{part}.{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in (*MAPS, "keypoints")
            }
            for part in ("clip", "references")
        )
        positions = np.load(folder / f"{number}.positions.npy", allow_pickle=False).tolist()
        kept = {"positions": positions, "keypoints": references.pop("keypoints"), "maps": references}
        yield tree.record(
            {name: clip[name] for name in MAPS}, clip["keypoints"], kept, clip_id=f"dancer_{number}", fps=25.0
        )


def measure_samples(tree: SimpleNamespace, dataset: Any, count: int) -> dict[str, float]:
    """Reads samples; returns the median CPU seconds, and the mean and largest number of bytes, of one sample."""
    seconds, sizes = [], []
    read = getattr(dataset, "stored_sample", dataset.training_sample)
    for number in range(count):
        key = tree.SampleKey(number // len(dataset), number % len(dataset))
        before, start = bytes_read(), time.process_time()
        read(key)
        seconds.append(time.process_time() - start)
        sizes.append(bytes_read() - before)
    return {"seconds": statistics.median(seconds), "mean": statistics.mean(sizes), "most": max(sizes)}


def bytes_read() -> int:
    """The bytes that this process has asked the kernel for, less those of this very file."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.split()[1])


def list_rows(measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each recipe, tree and form, with the ratios to the first tree's pixels."""
    rows = []
    for recipe in RECIPES:
        first = next(iter(measured.values()))[recipe][""]
        for tree, values in measured.items():
            for form, found in values[recipe].items():
                rows.append(
                    {
                        "recipe": recipe,
                        "tree": tree,
                        "form": form or "pixels",
                        "cpu_ms_per_sample": round(found["seconds"] * 1e3, 2),
                        "samples_per_second_per_core": round(1 / found["seconds"], 2),
                        "mean_bytes_per_sample": round(found["mean"]),
                        "most_bytes_per_sample": found["most"],
                        "times_faster": round(first["seconds"] / found["seconds"], 2),
                        "times_fewer_bytes": round(first["mean"] / found["mean"], 2),
                    }
                )
    return rows


def print_table(
    measured: Mapping[str, Mapping[str, Any]], rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Prints the rows as a table."""
    print(f"{options.clips} clips of {options.num_frames} frames of {options.width}x{options.height}")
    print("| recipe | tree | form | CPU ms per sample | samples/s per core | MB per sample | faster | fewer bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (
            row["recipe"],
            row["tree"],
            row["form"],
            f"{row['cpu_ms_per_sample']:.1f}",
            f"{row['samples_per_second_per_core']:.2f}",
            f"{row['mean_bytes_per_sample'] / 1e6:.3f}",
            f"{row['times_faster']:.1f} x",
            f"{row['times_fewer_bytes']:.1f} x",
        )
        print(f"| {' | '.join(cells)} |")
    for tree, values in measured.items():
        print(f"{tree}: {values['bytes'] / 1e6:.1f} MB of shard files")


def write_csv(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes the rows with what they were measured on; the load is that of the whole machine when the command ends."""
    import torch

    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, text=True).strip()
    facts = {
        "clips": options.clips,
        "frames": options.num_frames,
        "width": options.width,
        "height": options.height,
        "samples": options.samples,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
