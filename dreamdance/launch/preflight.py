"""Checks what a recipe needs on this machine before anything starts: weights, data, runs, packages, GPUs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from dreamdance.launch.program import launcher_command
from dreamdance.launch.requirements import (
    BACKEND_KEY,
    CHANNELS_LAST_KEY,
    COMPILE_KEY,
    installation,
    missing_packages,
    named_backend,
    wants_compiled_blocks,
    wants_fused_norms,
    why_backend_cannot_run_in_a_job,
    why_blocks_cannot_compile_in_a_job,
    why_kernels_cannot_start_in_a_job,
)
from dreamdance.launch.run_folder import weight_sources
from dreamdance.media.video_names import plain_name
from dreamdance.recipe import AnimateRecipe, EncodeRecipe, EvaluateRecipe, PrepareRecipe, Recipe, TrainingRecipe
from dreamdance.recipe.schema import VideosSource
from dreamdance.recipe.sections import Shards
from dreamdance.runs.layout import (
    FINISHED_FILE,
    RECIPE_FILE,
    checkpoint_folder,
    export_folder,
    final_export,
    is_export,
    step_folders,
)
from dreamdance.runtime.gpus import Gpu, known_gpu

DOWNLOADS = {
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-video-diffusion-img2vid-xt-1-1": "stabilityai/stable-video-diffusion-img2vid-xt-1-1",
    "clip-vit-large-patch14": "openai/clip-vit-large-patch14",
}


@dataclass(frozen=True)
class Missing:
    """A missing thing: what it is, where it was looked for, and how to get it."""

    what: str
    looked: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}\n    looked for: {self.looked}\n    get it:     {self.remedy}"


def missing(recipe: Recipe, recipe_file: Path, runs: Path, *, check_gpu: bool) -> list[Missing]:
    """Everything that the recipe needs and that is missing; empty if the run can start."""
    found = [
        *_weights(recipe, recipe_file),
        *_data(recipe, recipe_file, runs),
        *_runs(recipe, recipe_file, runs),
        *_packages(recipe),
    ]
    return [*found, *_gpus(recipe), *_backend(recipe), *_kernels(recipe)] if check_gpu else found


def oversize(recipe: Recipe) -> str:
    """Warns if `prepare` would start more processes than this machine has cores, or wants more memory than it has."""
    if not isinstance(recipe, PrepareRecipe):
        return ""
    processes, cores = recipe.num_workers * recipe.cluster.tasks_per_node, len(os.sched_getaffinity(0))
    wanted, memory = recipe.cluster.memory_gib, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    found = []
    if processes > cores:
        found.append(
            f"{processes} processes would work on {cores} cores (num_workers x cluster.tasks_per_node); each needs "
            f"memory of its own: num_workers={max(1, cores // recipe.cluster.tasks_per_node)} fits this machine"
        )
    if wanted is not None and wanted > memory:
        found.append(f"the recipe is written for {wanted} GiB (cluster.memory_gib), this machine has {memory:.0f} GiB")
    return "\n".join(f"warning: {text}" for text in found)


def report(recipe: Recipe, recipe_file: Path, runs: Path, problems: list[Missing]) -> str:
    """The text for the user, with the demo recipe of the same task if there is one beside the recipe."""
    lines = [f"{recipe_file} ({recipe.name}) cannot start here:", *(f"  - {problem}" for problem in problems)]
    demo = recipe_file.parent / "demo" / recipe_file.name
    if demo.is_file():
        lines.append(f"a demo of the same task that needs none of these: {launcher_command(demo, runs)} --follow")
    return "\n".join(lines)


def _weights(recipe: Recipe, recipe_file: Path) -> Iterator[Missing]:
    """One entry for each folder of weights, however many networks it contains.

    Weights that lie in the repository of the recipe are missing where the command runs in another folder.
    """
    absent: dict[str, dict[str, Path]] = {}
    for key, source in weight_sources(recipe).items():
        folder = Path(source.path) / (source.subfolder or "")
        if not (folder / "config.json").is_file() or not any(folder.glob("[!.]*.safetensors")):
            absent.setdefault(source.path, {})[key] = folder
    for path, folders in absent.items():
        repository = DOWNLOADS.get(Path(path).name)
        remedy = f"hf download {repository} --local-dir {path}" if repository else "put the weights into that folder"
        beside = [parent / path for parent in recipe_file.absolute().parents if (parent / path).is_dir()]
        if beside:
            remedy = " ".join(f"{key}.path={beside[0]}" for key in folders)
        if repository and "stable-video" in repository:
            remedy += " (first accept the licence on huggingface.co and run `hf auth login`)"
        looked = ", ".join(str(folder) for folder in folders.values())
        yield Missing(f"weights for {', '.join(folders)}", f"{looked} (config.json and *.safetensors)", remedy)


def _data(recipe: Recipe, recipe_file: Path, runs: Path) -> Iterator[Missing]:
    folders: list[tuple[str, Shards]] = []
    if isinstance(recipe, TrainingRecipe):
        folders = [("data.train", recipe.data.train), ("data.validation", recipe.data.validation)]
        for key, made in (("latents", recipe.data.latents), ("maps", recipe.data.maps)):
            place = (made.remote or made.local) if made else "://"
            if "://" not in place and not (Path(place) / "index.json").is_file():
                remedy = _launch(recipe_file, "encode" if key == "latents" else "encode_maps", runs)
                yield Missing(f"{key} for data.{key}", f"{place}/index.json", remedy)
    elif isinstance(recipe, EncodeRecipe):
        folders = [("shards", recipe.shards)]
    elif isinstance(recipe, EvaluateRecipe):
        folders = [("truth", recipe.truth)]
        folders += [("training_set", recipe.training_set)] if recipe.training_set else []
        compared = {f"compare.{name}": folder for name, folder in recipe.compare.items()}
        for key, folder in {"results": recipe.results, **compared}.items():
            if not Path(folder).is_dir():
                yield Missing("results to score", f"{folder}/ ({key})", _launch(recipe_file, "animate", runs))
    elif isinstance(recipe, PrepareRecipe) and recipe.videos is not None:
        yield from _videos(recipe.videos)
    elif isinstance(recipe, AnimateRecipe):
        yield from _manifest(recipe, _launch(recipe_file, "prepare", runs))
    places = {key: shards.remote or shards.local for key, shards in folders}
    absent = [key for key, place in places.items() if "://" not in place and not (Path(place) / "index.json").is_file()]
    if absent:
        looked = ", ".join(f"{places[key]}/index.json" for key in absent)
        yield Missing(f"shards for {', '.join(absent)}", looked, _launch(recipe_file, "prepare", runs))


def _videos(source: VideosSource) -> Iterator[Missing]:
    folder, section = Path(source.folder), source.annotators
    wanted = "<clip>.mp4 (or another kind of video)" if section else "pairs <clip>.rgb.mp4 and <clip>.pose.mp4"
    names = (path.name for path in folder.glob("*.*"))
    has_pictures = section is not None and any(folder.glob("[!.]*/images"))
    if not has_pictures and not any(
        plain_name(name) is not None if section else name.lower().endswith(".rgb.mp4") for name in names
    ):
        remedy = f"put {wanted} into that folder, or set videos.folder=..."
        yield Missing("videos", f"{folder}/*{'' if section else '.rgb'}.mp4 (videos.folder)", remedy)
    if source.list is not None and not Path(source.list).is_file():
        yield Missing("list of videos", f"{source.list} (videos.list)", "write a name in each line, or set videos.list")
    if section is not None:
        chosen = {section.pose, section.mask, section.depth, section.normal, section.cuts}
        yield from _networks(chosen, section.weights, "videos.annotators.weights")


def _manifest(recipe: AnimateRecipe, prepare: str) -> Iterator[Missing]:
    try:
        lines = Path(recipe.manifest).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        remedy = f"write one, set manifest=..., or use the validation clips: {prepare}"
        yield Missing("manifest", f"{recipe.manifest} (manifest)", remedy)
        return
    except (OSError, UnicodeDecodeError):
        return  # the job says what is wrong
    if any('"video"' in line for line in lines):
        yield from _networks({recipe.annotators.pose}, recipe.annotators.weights, "annotators.weights")


def _networks(chosen: Collection[str], weights: str, key: str) -> Iterator[Missing]:
    """The weights that tools/networks.sh fetches; those of other networks are looked for by the job."""
    shipped = {"blazepose": "mediapipe", "transnetv2": "transnetv2"}
    places = [Path(weights) / place for name, place in shipped.items() if name in chosen]
    if absent := [str(place) for place in places if not place.is_dir()]:
        yield Missing("networks", f"{', '.join(absent)} ({key})", "bash tools/networks.sh")


def _runs(recipe: Recipe, recipe_file: Path, runs: Path) -> Iterator[Missing]:
    step = None
    names: dict[str, str | None] = {}
    if isinstance(recipe, TrainingRecipe):
        names, step = {"init_from": recipe.init_from}, recipe.init_step
    elif isinstance(recipe, AnimateRecipe):
        names = {"geometry_from": recipe.geometry_from, "animation_from": recipe.animation_from}
    elif isinstance(recipe, EncodeRecipe):
        names = {"geometry_from": recipe.geometry_from}
    for key, name in names.items():
        if name is None or (not isinstance(recipe, TrainingRecipe) and is_export(Path(name))):
            continue
        run = runs / name
        if step is not None:
            places = [export_folder(run, step), checkpoint_folder(run, step)]
            if not any(place.is_dir() for place in places):
                have = ", ".join(folder.name for folder in step_folders(run / "checkpoints")) or "none"
                remedy = f"choose another init_step (checkpoints there: {have})"
                yield Missing(f"step {step} of run '{name}'", " or ".join(map(str, places)), remedy)
        elif final_export(run) is None:
            state = "is not finished" if (run / RECIPE_FILE).is_file() else "does not exist"
            remedy = _launch(recipe_file, name, runs) + (" (or give init_step)" if key == "init_from" else "")
            yield Missing(
                f"run '{name}' {state} ({key})", f"{run / FINISHED_FILE} and the export of its max_steps", remedy
            )


def _launch(recipe_file: Path, name: str, runs: Path) -> str:
    """The command that creates what is missing: a recipe of that name beside this recipe, or in the folder above."""
    short_name = name.removeprefix(f"{recipe_file.parent.name}_")  # recipes/demo/stage2.yaml is named demo_stage2
    for folder in (recipe_file.parent, recipe_file.parent.parent):
        for candidate in (folder / f"{name}.yaml", folder / f"{short_name}.yaml"):
            if candidate.is_file():
                return launcher_command(candidate, runs)
    return f"run the recipe named '{name}' first"


def _packages(recipe: Recipe) -> Iterator[Missing]:
    for package, extra in missing_packages(recipe).items():
        yield Missing(f"Python package {package}", f"site-packages of {sys.executable}", installation({extra}))


def _backend(recipe: Recipe) -> Iterator[Missing]:
    """The attention backend that the recipe names, if any. (A job on Slurm checks this on its own node.)"""
    backend = named_backend(recipe)
    if backend is not None and (reason := why_backend_cannot_run_in_a_job(recipe, backend)):
        looked = f"{sys.executable} on this machine: {reason}"
        yield Missing(f"attention backend '{backend}'", looked, f"{BACKEND_KEY}=null lets the library choose")


def _kernels(recipe: Recipe) -> Iterator[Missing]:
    """The tools that start the kernels for channels_last, and those that build what torch.compile generates."""
    if wants_fused_norms(recipe) and (reason := why_kernels_cannot_start_in_a_job(recipe)):
        looked = f"{sys.executable} on this machine: {reason}"
        remedy = f"install it, or set {CHANNELS_LAST_KEY}=false, which does not need it"
        yield Missing(f"the tools that start Triton's group norm ({CHANNELS_LAST_KEY})", looked, remedy)
    if wants_compiled_blocks(recipe) and (reason := why_blocks_cannot_compile_in_a_job(recipe)):
        looked = f"{sys.executable} on this machine: {reason}"
        yield Missing(f"the tools of torch.compile ({COMPILE_KEY})", looked, f"install it, or set {COMPILE_KEY}=none")


def _gpus(recipe: Recipe) -> Iterator[Missing]:
    wanted, have = recipe.cluster.gpus_per_node, num_gpus()
    if wanted > have:
        remedy = "run this recipe on a machine or cluster that has them"
        if isinstance(recipe, TrainingRecipe) and have > 0:
            remedy = f"cluster.gpus_per_node={have} cluster.tasks_per_node={have} accumulates more micro batches"
        yield Missing(f"{wanted} GPUs (cluster.gpus_per_node)", f"nvidia-smi shows {have}", remedy)


def num_gpus() -> int:
    """The number of GPUs of this machine, from nvidia-smi: torch is not loaded."""
    return len(_nvidia_smi("name"))


def gpu_memory_gib() -> float | None:
    """The smallest memory of this machine's GPUs in GiB; None without a GPU."""
    sizes = [float(line) / 1024 for line in _nvidia_smi("memory.total")]
    return min(sizes) if sizes else None


def gpu_at_hand() -> Gpu | None:
    """The kind of this machine's first GPU; None if there is none, or if its rates are not known."""
    names = _nvidia_smi("name")
    return known_gpu(names[0]) if names else None


def _nvidia_smi(field: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [line for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
