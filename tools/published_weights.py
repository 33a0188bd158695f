"""Writes random weights in exactly the published formats: names, shapes, types and file names of the real networks.

    python tools/published_weights.py weights            # 15 GB: every network that a full-size recipe reads
    python tools/published_weights.py weights --only stable-diffusion-v1-5/unet clip-vit-large-patch14

The recipes then find them under `weights/`, as they would find the real ones. Pictures made from them mean nothing;
what loads, casts, trains, saves and exports them does the work of the real size. A file that is complete is kept, so
that a killed call continues. Every tensor depends on its name alone. Exit codes: 0 done, 1 error.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PUBLISHED = Path(__file__).parent / "published"
# Files of more than this number of bytes are divided in the sharded form, as diffusers' `max_shard_size` does.
SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Form:
    """One form in which a network is published: `folder` as under `published/`, to be written to `target`."""

    folder: str
    stem: str
    dtype: torch.dtype
    variant: str = ""
    sharded: bool = False
    target: str = ""

    @property
    def path(self) -> str:
        """The folder to write, relative to the folder of all weights."""
        return self.target or self.folder


_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
_SVD = "stable-video-diffusion-img2vid-xt-1-1"
FORMS = [
    Form("stable-diffusion-v1-5/unet", _DIFFUSERS, torch.float16, variant="fp16"),
    Form("stable-diffusion-v1-5/unet", _DIFFUSERS, torch.float32),
    Form(
        "stable-diffusion-v1-5/unet",
        _DIFFUSERS,
        torch.float32,
        sharded=True,
        target="stable-diffusion-v1-5-sharded/unet",
    ),
    Form("stable-diffusion-v1-5/vae", _DIFFUSERS, torch.float16, variant="fp16"),
    Form("clip-vit-large-patch14", _TRANSFORMERS, torch.float16),
    Form(f"{_SVD}/unet", _DIFFUSERS, torch.float16, variant="fp16"),
    Form(f"{_SVD}/vae", _DIFFUSERS, torch.float16, variant="fp16"),
    Form(f"{_SVD}/image_encoder", _TRANSFORMERS, torch.float16, variant="fp16"),
]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="the folder of all weights; the recipes read `weights`")
    names = sorted({form.path for form in FORMS})
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NETWORK", help=", ".join(names))
    options = parser.parse_args(arguments)
    try:
        for form in FORMS:
            if form.path in options.only:
                print(f"{options.weights / form.path}: {write(form, options.weights)}", flush=True)
    except OSError as error:
        print(f"published_weights: {error}", file=sys.stderr)
        return 1
    return 0


def published_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one published network, in the order of its file."""
    lines = (PUBLISHED / folder / "tensors.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines)
    return {name: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for name, shape in pairs}


def write(form: Form, weights: Path) -> str:
    """Writes one form of a network unless its files are complete; returns a text that describes the result."""
    folder, shapes = weights / form.path, published_shapes(form.folder)
    parts = _parts(shapes, form)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PUBLISHED / form.folder / "config.json", folder / "config.json")
    written = 0
    for name, tensors in parts.items():
        file = folder / name
        if not _is_complete(file, tensors):
            partial = file.with_name(f".{name}.partial")
            save_file({one: random_tensor(one, shapes[one], form.dtype) for one in tensors}, partial, {"format": "pt"})
            partial.replace(file)
            written += file.stat().st_size
    if form.sharded:
        _write_index(folder / f"{form.stem}.safetensors.index.json", parts, shapes, form.dtype)
    elements = sum(math.prod(shape) for shape in shapes.values())
    state = f"{written / 1e9:.2f} GB written" if written else "complete before"
    return f"{', '.join(parts)}: {len(shapes)} tensors, {elements:,} elements, {state}"


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The values of one tensor, which keep activations of the network at the size of 1.

    Args:
        name: the tensor's name; it determines all values.
        shape: its shape.
        dtype: its type; positions are integers in every form.
    """
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(shape).contiguous()
    if name.endswith("mix_factor"):
        return torch.full(shape, 0.5, dtype=dtype)
    if name == "logit_scale":
        return torch.tensor(2.6592, dtype=dtype)
    if len(shape) == 1 and name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1 and not name.endswith("embedding"):  # the gain of a norm
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    is_table = name.endswith(("embedding", "embedding.weight"))
    scale = 0.02 if is_table else 1 / math.sqrt(math.prod(shape[1:]))
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def _parts(shapes: dict[str, tuple[int, ...]], form: Form) -> dict[str, list[str]]:
    """File name -> names of its tensors."""
    if not form.sharded:
        variant = f".{form.variant}" if form.variant else ""
        return {f"{form.stem}{variant}.safetensors": list(shapes)}
    groups = list(_groups(shapes, form.dtype.itemsize))
    count = len(groups)
    return {f"{form.stem}-{index:05d}-of-{count:05d}.safetensors": group for index, group in enumerate(groups, start=1)}


def _groups(shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    """Names in their order, in groups of at most `SHARD_BYTES`."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = math.prod(shape) * itemsize
        if group and size + own > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    yield group


def _write_index(
    path: Path, parts: dict[str, list[str]], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    weight_map = {name: file for file, names in parts.items() for name in names}
    path.write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2), encoding="utf-8"
    )


def _is_complete(file: Path, names: list[str]) -> bool:
    """Whether a file is there, can be opened (its length fits its header), and has the tensors of these names."""
    try:
        with safe_open(file, framework="pt") as opened:
            return sorted(opened.keys()) == sorted(names)
    except (FileNotFoundError, SafetensorError):
        return False


if __name__ == "__main__":
    sys.exit(main())
