"""Measures how fast training reads its samples: samples per second of one core, and bytes read per sample.

    python tools/measure_loading.py
    git worktree add --detach ../before 5194bb1 && python tools/measure_loading.py --before ../before

Rendered dancers are stored once by each tree, in the form that its `prepare` gives to videos, and are read with the
settings of the four training recipes. This commit's tree also reads them from latents, which `task: encode` stores with
an autoencoder and an image encoder whose weights are random and whose latents and embeddings have the size of the
published ones. The bytes are those that the process asks the kernel for (`rchar` of
/proc/self/io), whether or not they are in the page cache. The seconds are CPU time of one thread. Nothing is hashed or
unpacked while the command measures, and no decoded clip is kept: a set of thousands of clips does not fit.
"""

import argparse
import json
import os
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


def main(arguments: list[str] | None = None) -> int:
    """Renders the dancers, lets each tree store and read them in a process of its own, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a work tree of another commit, measured in the same run")
    parser.add_argument("--width", type=int, default=FULL_SIZE[0], help="width of the stored clips (512)")
    parser.add_argument("--height", type=int, default=FULL_SIZE[1], help="height of the stored clips (768)")
    parser.add_argument("--num-frames", type=int, default=64, help="frames of a stored clip (64)")
    parser.add_argument("--clips", type=int, default=2, help="number of stored clips (2)")
    parser.add_argument("--samples", type=int, default=12, help="samples to read with each recipe (12)")
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
    print_table(measured, options)
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
        dataset = tree.ClipDataset(shards, **window, verify="size", cache_bytes=0)
        measure_samples(tree, dataset, len(dataset))  # unpacks and compares every shard
        measured[name] = measure_samples(tree, dataset, settings["samples"])
        if settings["name"] == "now":
            stored = open_latents(folder, shards, name, window)
            dataset = tree.ClipDataset(shards, **window, verify="size", cache_bytes=0, **stored)
            measure_samples(tree, dataset, len(dataset))
            measured[f"{name} from latents"] = measure_samples(tree, dataset, settings["samples"])
    return measured


def open_latents(folder: Path, shards: Any, name: str, window: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a dataset that reads latents, which are encoded first if no recipe of the stage needed them."""
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

    from dreamdance.data.loading.dataset import StoredClips
    from dreamdance.recipe.encode_recipe import EncodeRecipe
    from dreamdance.recipe.parse import load_recipe
    from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
    from dreamdance.training.encoding.encode import encode
    from dreamdance.training.stages.training_stage import stage_of

    recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
    assert isinstance(recipe, Stage1Recipe | Stage2Recipe), "all four train"
    stage, is_video = recipe.task, recipe.task == "stage2"
    vae, output = folder / f"vae_{stage}", folder / f"latents_{stage}"
    if not output.exists():
        shape = {"down_block_types": ("DownEncoderBlock2D",) * 4, "latent_channels": 4, "layers_per_block": 1}
        if is_video:
            AutoencoderKLTemporalDecoder(block_out_channels=(32,) * 4, **shape).save_pretrained(vae)
        else:
            shape.update(up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4)
            AutoencoderKL(block_out_channels=(8,) * 4, **shape).save_pretrained(vae)
        values = {
            "task": "encode",
            "name": "measured",
            "shards": {"local": shards.local},
            "output": str(output),
            "stage": stage,
            "model": {
                "autoencoder": {"path": str(vae)},
                "image_encoder": {"stand_in_width": EMBEDDING_WIDTHS[stage]},
            },
            "width": window["width"],
            "height": window["height"],
            "flip": window["flip_probability"] > 0,
            "verify_samples": 0,
        }
        encode(EncodeRecipe.model_validate(values), folder / f"run_{stage}")
    return {"latents": StoredClips(type(shards)(local=str(output))), "latent_names": stage_of(recipe).latent_names}


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
    for number in range(count):
        key = tree.SampleKey(number // len(dataset), number % len(dataset))
        before, start = bytes_read(), time.process_time()
        dataset.training_sample(key)
        seconds.append(time.process_time() - start)
        sizes.append(bytes_read() - before)
    return {"seconds": statistics.median(seconds), "mean": statistics.mean(sizes), "most": max(sizes)}


def bytes_read() -> int:
    """The bytes that this process has asked the kernel for, less those of this very file."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.split()[1])


def print_table(measured: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Prints a table with one row per recipe and tree, and the ratios to the tree before."""
    print(f"{options.clips} clips of {options.num_frames} frames of {options.width}x{options.height}")
    print("| recipe | tree | CPU ms per sample | samples/s per core | MB per sample | most MB | faster | fewer bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in RECIPES:
        first = next(iter(measured.values()))[recipe]
        rows = {tree: values[recipe] for tree, values in measured.items()}
        rows["now, from latents"] = measured["now"][f"{recipe} from latents"]
        for tree, row in rows.items():
            cells = (
                recipe,
                tree,
                f"{row['seconds'] * 1e3:.1f}",
                f"{1 / row['seconds']:.2f}",
                f"{row['mean'] / 1e6:.3f}",
                f"{row['most'] / 1e6:.3f}",
                f"{first['seconds'] / row['seconds']:.1f} x",
                f"{first['mean'] / row['mean']:.1f} x",
            )
            print(f"| {' | '.join(cells)} |")
    for tree, values in measured.items():
        print(f"{tree}: {values['bytes'] / 1e6:.1f} MB of shard files")


if __name__ == "__main__":
    sys.exit(main())
