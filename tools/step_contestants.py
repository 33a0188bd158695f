"""Builds one contestant of `tools/measure_step.py` in a process of its own and takes a step whenever it is asked to.

All contestants get the same weights, clips, noise and noise levels. A weight depends on its name alone and is drawn on
the device, so that no file of weights is needed; zero convolutions are random too, so that every branch counts. The
package `dreamdance` is the one that this process finds: this commit's or that of 5194bb1.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_inputs import fill, make_batch, make_maps, make_plain_inputs, store_latents

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = REPOSITORY / "tools" / "published"
STAGES = ("stage1_domains", "stage1_geometry", "stage1_temporal", "stage2")
SD, SVD, CLIP = "stable-diffusion-v1-5", "stable-video-diffusion-img2vid-xt-1-1", "clip-vit-large-patch14"
GIB = 2**30
# What every tree and contestant computes alike: one rank, one micro batch, no warm-up, the clips' own frame rate, as
# 5194bb1 has it. Recipes of now also draw targets from the latents' distribution and put the reference first.
SHARED = ("optimizer.warmup_steps=0", "validation.num_frames=1", "cluster.tasks_per_node=1", "cluster.gpus_per_node=0")
OF_NOW = ("objective.target_latents=mode", "sharding.gradient_checkpointing=none")
OF_STAGE2_NOW = ("objective.reference_first=false", "objective.fps=clip")


@dataclass(frozen=True)
class Contestant:
    """Who takes the steps.

    Attributes:
        kind: `now`, `before` (5194bb1) or `plain`.
        overrides: words of the recipe.
        without: the equal rewrite that is left out, or `"prepared inputs"`, or `"pictures"`: latents are stored.
        checkpointing: of `plain`.
        tolerance: how far its first loss in float32 may be from ours, as a share of ours.
    """

    kind: str = "now"
    overrides: tuple[str, ...] = ()
    without: str = ""
    checkpointing: bool = False
    tolerance: float = 1e-4

    @property
    def is_countable(self) -> bool:
        """Whether operators can be counted: torch would run compiled parts uncompiled."""
        return "model.compile=blocks" not in self.overrides


OURS = "ours"
CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant(),
    "ours, from stored latents": Contestant(without="pictures"),
    "plain, gradient checkpointing": Contestant("plain", checkpointing=True),
    "plain, best settings": Contestant("plain"),
    # It takes no bucket with an odd number of elements, such as all that train at a reduced width.
    # In stage 2 it resized pictures for CLIP as stage 1 does, and not as SVD was trained. With that resizing today's
    # first loss is the same to the last digit; without, it is 8e-4 away at the reduced size and 2e-2 at the tiny one.
    "ours at 5194bb1": Contestant("before", overrides=("sharding.reduce_bucket_elements=10000000",), tolerance=3e-2),
}
# Ours with one gain switched off, or with one setting that the recipes leave off.
GAINS: dict[str, Contestant] = {
    **{
        f"ours without {name}": Contestant(without=name)
        for name in (
            *("one_token_attention", "no_division", "temporal_convolutions", "blending", "gate_gradients"),
            "prepared inputs",
        )
    },
    "ours, blocks computed again": Contestant(overrides=("sharding.gradient_checkpointing=blocks",)),
    "ours, plain attention": Contestant(overrides=("model.attention_backend=reference",)),
    "ours, ZeRO-1": Contestant(overrides=("sharding.zero_stage=1",)),
    # Torch's group norm of a CPU loses digits in channels_last: 1.5e-4 in stage 2, and nothing with contiguous inputs.
    "ours, channels_last": Contestant(overrides=("model.channels_last=true",), tolerance=1e-3),
    "ours, compiled blocks": Contestant(overrides=("model.compile=blocks",)),
}


@dataclass(frozen=True)
class Size:
    """Widths of the networks and sizes of the batches.

    Attributes:
        configs: what differs from the published config.json, by the network's folder; empty is full size.
        overrides: words of the recipe, by stage or for all (`""`).
    """

    configs: Mapping[str, Mapping[str, Any]]
    overrides: Mapping[str, tuple[str, ...]]


def _configs(unet: int, heads: int, vae: int, clip: int, *, layers: int, clip_layers: int) -> dict[str, dict[str, Any]]:
    """Changed entries: channels of the first level of the UNets and autoencoders, width of CLIP, layers per block."""
    widths = [unet, 2 * unet, 4 * unet, 4 * unet]
    autoencoder = {"block_out_channels": [vae, 2 * vae, 4 * vae, 4 * vae], "layers_per_block": layers}
    encoder = {
        "hidden_size": clip,
        "intermediate_size": 4 * clip,
        "num_attention_heads": 4,
        "num_hidden_layers": clip_layers,
        "projection_dim": clip,
    }
    both = {"block_out_channels": widths, "layers_per_block": layers, "cross_attention_dim": clip}
    return {
        f"{SD}/unet": {**both, "attention_head_dim": heads},
        f"{SVD}/unet": {**both, "num_attention_heads": [heads, 2 * heads, 4 * heads, 4 * heads]},
        f"{SD}/vae": autoencoder,
        f"{SVD}/vae": autoencoder,
        CLIP: encoder,
        f"{SVD}/image_encoder": encoder,
    }


def _overrides(
    width: int, height: int, *, channels: int, head_width: int, num_frames: int
) -> dict[str, tuple[str, ...]]:
    convolutions = f"[4, 8, 24, {channels}]"
    one = (f"model.pose_channels={convolutions}",)
    return {
        "": (f"data.width={width}", f"data.height={height}"),
        "stage1_domains": one,
        "stage1_geometry": one,
        "stage1_temporal": (*one, f"data.num_frames={num_frames}"),
        "stage2": (
            f"data.num_frames={num_frames}",
            f"model.controller_channels={convolutions}",
            f"model.controller_head_width={head_width}",
            f"objective.geometry_width={width // 2}",
            f"objective.geometry_height={height // 2}",
        ),
    }


SIZES: dict[str, Size] = {
    "full": Size({}, {"": ()}),
    # A fifth of the UNets' channels, a quarter of the autoencoders' and CLIPs', pictures of 128x192.
    "reduced": Size(
        _configs(64, 1, 32, 256, layers=2, clip_layers=24),
        _overrides(128, 192, channels=64, head_width=64, num_frames=16),
    ),
    "tiny": Size(
        _configs(32, 1, 32, 32, layers=1, clip_layers=2),
        _overrides(64, 64, channels=32, head_width=16, num_frames=3),
    ),
}


def write_configs(folder: Path, size: Size) -> Path:
    """Writes the config.json of every network at a size below a folder; returns where they lie."""
    if not size.configs:
        return PUBLISHED
    for name, changed in size.configs.items():
        values = json.loads((PUBLISHED / name / "config.json").read_text(encoding="utf-8"))
        values.get("vision_config", values).update(changed)
        if "projection_dim" in changed:
            values["projection_dim"] = changed["projection_dim"]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def open_recipe(stage: str, size_name: str, networks: Path, contestant: Contestant, *, precision: str) -> Any:
    """The recipe of a stage in the tree of this process, with the networks' configs of a folder."""
    import dreamdance
    from dreamdance.recipe import load_recipe

    size, base = SIZES[size_name], networks / (SVD if stage == "stage2" else SD)
    words = [*SHARED, *size.overrides[""], *size.overrides.get(stage, ())]
    words += [f"model.unet.path={base}", f"model.autoencoder.path={base}", f"precision={precision}"]
    words += [f"model.image_encoder.path={base if stage == 'stage2' else networks / CLIP}"]
    if contestant.kind != "before":
        words += [*OF_NOW, *(OF_STAGE2_NOW if stage == "stage2" else ())]
    path = Path(str(dreamdance.__file__)).parents[1] / "recipes" / f"{stage}.yaml"
    training: Any = load_recipe(path)
    micro = training.micro_batch_size
    if size_name == "tiny":
        micro = min(micro, 2)
    return load_recipe(path, [*words, f"batch_size={micro}", f"micro_batch_size={micro}", *contestant.overrides])


def build_ours(recipe: Any, contestant: Contestant, device: Any) -> Callable[[], Any]:
    """Our objective, engine and average, as `training/train.py` puts them together; returns a step."""
    import itertools

    from dreamdance.models.compiled_blocks import compile_blocks
    from dreamdance.models.equal_rewrites import EQUAL_REWRITES
    from dreamdance.runtime.ranks import Ranks
    from dreamdance.training.ema import ShardedEma
    from dreamdance.training.engine import Engine
    from dreamdance.training.inputs import PreparedInputs
    from dreamdance.training.networks.build import exportable
    from dreamdance.training.stages.training_stage import stage_of

    stage = stage_of(recipe)
    objective = stage.build(device="meta", rewrites=EQUAL_REWRITES - {contestant.without})
    stage.set_trainable(objective)
    objective.to_empty(device=device).float()
    fill(objective)
    batch = make_batch(recipe, objective.draw(make_batch(recipe, {})))
    if contestant.without == "pictures":
        batch = store_latents(batch, stage.latent_names, objective)
    if recipe.model.compile == "blocks":
        for network in exportable(objective).values():
            compile_blocks(network)
    engine = Engine(objective, recipe, Ranks.from_environment(), deterministic=False)
    average = ShardedEma(engine.masters, decay=recipe.optimizer.ema_decay)
    inputs = PreparedInputs(itertools.repeat([batch]), objective, device)

    def step() -> Any:
        alone = contestant.without == "prepared inputs"
        for one in [batch] if alone else inputs.micro_batches(is_last_step=False):
            loss = engine.forward(one).loss
            engine.backward(loss)
        engine.update(recipe.optimizer.lr)
        average.update(engine.masters)
        return loss.detach()

    return step


def build_older(recipe: Any, device: Any) -> Callable[[], Any]:
    """The same of commit 5194bb1, whose package this process has found."""
    import torch

    load = importlib.import_module
    training = "dreamdance.training"
    objective = load(f"{training}.components").build_objective(recipe, device="meta")
    load(f"{training}.trainability").set_trainable(objective, recipe)
    objective.to_empty(device=device).float()
    fill(objective)
    ranks = load("dreamdance.ranks").Ranks.from_environment()
    engine = load(f"{training}.engine").Engine(objective, recipe, ranks, deterministic=False)
    average = load(f"{training}.ema").ShardedEma(engine.masters, decay=recipe.optimizer.ema_decay)
    maps = make_maps(recipe)
    clips = len(maps["reference"])
    keys = torch.tensor([[0, 0, number] for number in range(clips)])
    names = [str(number) for number in range(clips)]
    batch_class = load("dreamdance.data.collate").ClipBatch
    batch = batch_class(**maps, mask=None, fps=torch.full((clips,), 8.0), keys=keys, clip_ids=names)

    def step() -> Any:
        loss = engine.forward(batch).loss
        engine.backward(loss)
        engine.update(recipe.optimizer.lr)
        average.update(engine.masters)
        return loss.detach()

    return step


def build_plain_model(recipe: Any, networks: Path, device: Any) -> tuple[Any, dict[str, Any]]:
    """The plain model with weights, of which the same train as of ours, and its inputs."""
    import torch
    from plain_trainer import Plain, PlainAnimation, PlainGeometry

    from dreamdance.training.stages.training_stage import stage_of

    stage = stage_of(recipe)
    objective = stage.build(device="meta")  # for its draws and the names of what trains
    trained = {name.replace("domain_embedder.mlp.", "class_embedding.") for name in stage.set_trainable(objective)}
    settings = recipe.model
    with torch.device("meta"):
        model: Plain = (
            PlainGeometry(networks, recipe.train, settings.pose_channels)
            if recipe.task == "stage1"
            else PlainAnimation(
                networks, settings.controls, settings.controller_channels, settings.controller_head_width
            )
        )
    model.to_empty(device=device).float()
    fill(model)
    if missing := trained - {name for name, _ in model.named_parameters()}:
        raise ValueError(f"the plain model has no parameters {sorted(missing)[:3]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model, make_plain_inputs(recipe, objective)


def build(stage: str, size: str, networks: Path, contestant: Contestant) -> Callable[[], Any]:
    """Builds a contestant on the GPU if there is one, else on the CPU; returns a function that takes a step."""
    import torch
    from torch import distributed as dist

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    recipe = open_recipe(stage, size, networks, contestant, precision=precision)
    if contestant.kind == "before":
        return build_older(recipe, device)
    if contestant.kind == "now":
        return build_ours(recipe, contestant, device)
    from plain_trainer import PlainTrainer

    import dreamdance.training.engine  # noqa: F401  # keeps DeepSpeed from compiling at its start

    model, inputs = build_plain_model(recipe, networks, device)
    settings: dict[str, Any] = {"checkpointing": contestant.checkpointing, "bf16": precision == "bf16"}
    trainer = PlainTrainer(model, recipe.optimizer, **settings, device=device)
    return lambda: trainer.step(inputs)


def serve(stage: str, size: str, networks: str, name: str) -> None:
    """Builds a contestant, and takes a step for each line of stdin; answers each with a line of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    contestant = {**CONTESTANTS, **GAINS}[name]
    step = build(stage, size, Path(networks), contestant)
    forget_peak()
    print(json.dumps(versions()), file=answers, flush=True)
    for line in sys.stdin:
        counted = line.strip() == "count" and contestant.is_countable
        answer = count(step) if counted else time_step(step)
        print(json.dumps({**answer, "peak_gib": peak_gib()}), file=answers, flush=True)


def versions() -> dict[str, str]:
    """What the steps ran with."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    names = ("torch", "triton", "diffusers", "transformers", "deepspeed")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    return {"device": device, "versions": ", ".join(f"{name} {installed(name)}" for name in names)}


def time_step(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds and loss of a step; CPU time without a GPU, which other programs on the machine disturb least."""
    import torch

    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    started = clock()
    loss = float(step())
    if on_gpu:
        torch.cuda.synchronize()
    return {"seconds": clock() - started, "loss": loss}


def count(step: Callable[[], Any]) -> dict[str, float]:
    """Loss, operations and operators of a step; those of the optimizer belong to it."""
    file = REPOSITORY / "dreamdance" / "training" / "planning" / "operator_count.py"
    spec = importlib.util.spec_from_file_location("operator_count", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["operator_count"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.OperatorCount() as counter:
        loss = float(step())
    total = sum(counter.work.values(), module.NO_WORK)
    return {"loss": loss, "tf": total.total_flops / 1e12, "operators": total.num_operators}


def forget_peak() -> None:
    """Begins the measurement of the largest memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_gib() -> float:
    """Largest memory since then: on a GPU what torch has allocated, else the process's resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / GIB
    return math.nan


if __name__ == "__main__":
    serve(*sys.argv[1:])
