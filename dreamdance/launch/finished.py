"""Tells whether a run is finished: its results exist, and its inputs are still those that the results were made from.

Smaller pieces of work have records of their own, because they compare other things; dreamdance/README.md has a table of
them (C7). `FINISHED` lets the launcher answer without torch and without opening each of these.
"""

import hashlib
import json
import time
from pathlib import Path

from dreamdance.launch.prepared import describe_videos, is_encoded, is_prepared
from dreamdance.recipe import AnimateRecipe, EncodeRecipe, EvaluateRecipe, PrepareRecipe, Recipe, TrainingRecipe
from dreamdance.runs.file_notes import is_as_noted
from dreamdance.runs.files import hash_file, write_atomically
from dreamdance.runs.finished_clips import INDEX_FILE
from dreamdance.runs.layout import EXPORT_INDEX_FILE, FINISHED_FILE, RESULT_FILE, export_folder, is_export, step_folders


def mark_finished(recipe: Recipe, run_folder: Path, inputs: str) -> bool:
    """Writes `FINISHED`, unless the task stopped early (training that was pre-empted returns before its last step).

    Args:
        recipe: the run's recipe.
        run_folder: where the file goes.
        inputs: the result of `digest_inputs` before the task began; the task may not have read later inputs.

    Returns:
        Whether the run is finished.
    """
    if isinstance(recipe, TrainingRecipe) and not export_folder(run_folder, recipe.max_steps).is_dir():
        return False
    record = {"time": time.time(), "inputs": inputs}
    write_atomically(run_folder / FINISHED_FILE, json.dumps(record) + "\n")
    return True


def is_finished(recipe: Recipe, run_folder: Path) -> bool:
    """Whether starting the run again would do nothing; False after `max_steps` was raised, or with new inputs."""
    marker = run_folder / FINISHED_FILE
    if not marker.is_file():
        return False
    if isinstance(recipe, TrainingRecipe):
        return export_folder(run_folder, recipe.max_steps).is_dir()
    if not Path(getattr(recipe, "output", run_folder)).is_dir():
        return False
    if isinstance(recipe, PrepareRecipe) and not is_prepared(recipe):
        return False
    if isinstance(recipe, EncodeRecipe) and not is_encoded(Path(recipe.output)):
        return False
    if isinstance(recipe, AnimateRecipe | EvaluateRecipe) and not is_as_noted(run_folder):
        return False
    return bool(json.loads(marker.read_text(encoding="utf-8"))["inputs"] == digest_inputs(recipe, run_folder.parent))


def digest_inputs(recipe: Recipe, runs: Path) -> str:
    """A hash that changes with the inputs of a run, except for those that the run's own note of files covers."""
    parts: list[str] = []
    if isinstance(recipe, AnimateRecipe):
        manifest = Path(recipe.manifest)
        parts.append(hash_file(manifest) if manifest.is_file() else "")
        for name in (recipe.geometry_from, recipe.animation_from):
            parts += _weights(name, runs) if name else []
    elif isinstance(recipe, EvaluateRecipe):
        for folder in (recipe.results, *recipe.compare.values()):  # the note of files covers the contents
            parts += sorted(path.parent.name for path in Path(folder).glob(f"[!.]*/{RESULT_FILE}"))
    elif isinstance(recipe, EncodeRecipe):
        index = Path(recipe.shards.remote or recipe.shards.local) / INDEX_FILE
        parts.append(hash_file(index) if index.is_file() else "")
        parts += _weights(recipe.geometry_from, runs) if recipe.geometry_from else []
        for source in (recipe.model.autoencoder, recipe.model.image_encoder) if recipe.model else ():
            parts += _listing(Path(source.path) / (source.subfolder or ""), "*.safetensors") if source.path else []
    elif isinstance(recipe, PrepareRecipe) and recipe.videos is not None:
        parts += describe_videos(recipe.videos)
        if recipe.videos.list is not None and Path(recipe.videos.list).is_file():
            parts.append(hash_file(Path(recipe.videos.list)))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _weights(name: str, runs: Path) -> list[str]:
    """Lines that identify a trained stage: a run's newest export by its name, an export folder by its index file."""
    if is_export(Path(name)):
        return [name, *_listing(Path(name), EXPORT_INDEX_FILE)]
    return [f"{name} {folder.name}" for folder in step_folders(runs / name / "exports")[-1:]]


def _listing(folder: Path, pattern: str) -> list[str]:
    states = [(path, path.stat()) for path in sorted(folder.glob(pattern))]
    return [f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}" for path, state in states]
