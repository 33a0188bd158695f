"""Creates or checks a run folder (contract C7): recipe and provenance are written before anything runs."""

import errno
import functools
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreamdance.errors import RecipeError, UserError
from dreamdance.recipe import PrepareRecipe, Recipe, TrainingRecipe, dump_recipe, load_stored_recipe
from dreamdance.recipe.parse import flatten
from dreamdance.recipe.same_run import CHANGEABLE_KEYS, is_changeable
from dreamdance.recipe.yaml_text import read_yaml
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.files import NUM_PATIENT_ATTEMPTS, retry_transient, write_atomically
from dreamdance.runs.finished_clips import has_clips
from dreamdance.runs.layout import PROVENANCE_FILE, RECIPE_FILE
from dreamdance.runs.locks import HeldLockError, locked_file
from dreamdance.runs.provenance import code_version, package_versions

logger = logging.getLogger(__name__)

LOCK_FILE = ".launch_lock"
LOCK_SECONDS = 60.0
FOLDERS = ("checkpoints", "exports", "samples", "tensorboard", "logs")
# The meaning of keys that old stored recipes lack, by task, where it differs from today's default.
FORMER_VALUES: dict[str, dict[str, str]] = {
    "stage1": {"objective.target_latents": "mode"},
    "stage2": {"objective.target_latents": "mode", "objective.reference_first": "false", "objective.fps": "clip"},
}
ABSENT = "(not set)"
# Of the times in `provenance.json`.
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


class DifferentRecipeError(UserError):
    """The run folder belongs to another recipe (exit code 3)."""


@contextmanager
def locked(run_folder: Path, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Prevents two launchers from creating or submitting the same run at the same time.

    Args:
        run_folder: the run's folder; it must exist.
        wait_seconds: how long to wait for another process that holds the lock.

    Raises:
        UserError: the other process held the lock for longer.
        OSError: no file can be created in the folder.
    """
    lock = run_folder / LOCK_FILE
    try:
        with locked_file(lock, wait_seconds=wait_seconds):
            yield
    except HeldLockError as error:
        raise UserError(
            f"another launcher has been starting {run_folder} for over {wait_seconds:.0f} s ({error}); try again, or "
            f"end that launcher if it hangs (`fuser {lock}` names its process on its machine)"
        ) from BlockingIOError(errno.EAGAIN, str(error))


def create_or_check(recipe: Recipe, run_folder: Path, argv: Sequence[str]) -> None:
    """Creates the run folder, or checks that it belongs to this recipe, and records this start.

    A run of `prepare` that has not finished a clip takes any other recipe of `prepare`.

    Raises:
        DifferentRecipeError: the folder belongs to another recipe, or was begun with other base weights; the text names
            the keys that differ, old -> new, or the file.
        OSError: the folder cannot be written; this shows before the first save.
    """
    stored = run_folder / RECIPE_FILE
    if stored.is_file() and not _has_made_nothing(run_folder):
        refuse_different(recipe, run_folder)
        _warn_of_new_keys(recipe, stored)
    for folder in (run_folder, *(run_folder / name for name in FOLDERS)):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "nothing can be written there", str(folder))
    provenance = run_folder / PROVENANCE_FILE
    starts = json.loads(provenance.read_text(encoding="utf-8"))["starts"] if provenance.is_file() else []
    known = starts[-1]["base_weights"] if starts else {}
    starts.append(_this_start(recipe, argv, known))
    _refuse_other_weights(recipe, run_folder, known, starts[-1]["base_weights"])
    write_atomically(provenance, json.dumps({"starts": starts}, indent=2) + "\n")
    write_atomically(stored, dump_recipe(recipe))


def stored_recipe(run_folder: Path) -> Recipe:
    """The recipe of a run that was submitted. The file existed then, so every failed read is repeated.

    Raises:
        OSError: the file could not be read for about a minute.
        RecipeError: this version of the software does not understand the recipe.
    """
    path = run_folder / RECIPE_FILE
    try:
        return retry_transient(
            lambda: _load_stored(path),
            f"reading {path}",
            num_attempts=NUM_PATIENT_ATTEMPTS,
            should_retry=lambda error: isinstance(error.__cause__, OSError),
        )
    except RecipeError as error:
        reason = error.__cause__
        if not isinstance(reason, OSError):
            raise
        raise OSError(
            reason.errno,
            f"cannot be read, {NUM_PATIENT_ATTEMPTS} attempts failed (its storage is away, or the run folder was "
            f"removed): {reason.strerror}",
            str(path),
        ) from error


def record_job(run_folder: Path, job_id: str, hosts: Sequence[str]) -> None:
    """Records on which machines the job of the run's last start began, and again after each requeue."""
    provenance = run_folder / PROVENANCE_FILE
    with locked(run_folder):
        content = json.loads(provenance.read_text(encoding="utf-8"))
        begun = content["starts"][-1].setdefault("jobs", [])
        begun.append({"time": time.strftime(TIME_FORMAT), "job_id": job_id, "hosts": list(hosts)})
        write_atomically(provenance, json.dumps(content, indent=2) + "\n")


def refuse_different(recipe: Recipe, run_folder: Path) -> None:
    """Raises DifferentRecipeError if this recipe does not continue the run in the folder."""
    changes = differences(_stored_values(run_folder / RECIPE_FILE), recipe.model_dump(mode="json"))
    permitted = recipe.checkpoint.allow_changed if isinstance(recipe, TrainingRecipe) else []
    refused = {key: change for key, change in changes.items() if not _covered(key, permitted)}
    if not refused:
        return
    lines = [f"{run_folder} belongs to a different recipe:"]
    lines += [f"  {key}: {old} -> {new}" for key, (old, new) in refused.items()]
    lines.append("give this run another name (name=...), remove that folder, or use its values")
    if isinstance(recipe, PrepareRecipe) and has_clips(output := Path(recipe.output)):
        lines[-1] = (
            f"{output} has clips of that recipe: give this run another name and another output (name=... output=...), "
            f"remove {run_folder}, {output / 'train'} and {output / 'validation'}, or use its values"
        )
    if isinstance(recipe, TrainingRecipe):
        lines[-1] += f"; checkpoint.allow_changed=[{', '.join(refused)}] continues with the new values"
    raise DifferentRecipeError("\n".join(lines))


def _has_made_nothing(run_folder: Path) -> bool:
    """Whether the run is one of `prepare` of which no clip is finished."""
    try:
        stored = _load_stored(run_folder / RECIPE_FILE)
    except UserError:
        return False
    return isinstance(stored, PrepareRecipe) and not has_clips(Path(stored.output))


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The dotted keys in which two resolved recipes differ, with both values as text.

    Keys that may change within a run are left out, but a `max_steps` that was lowered is a difference.
    """
    before, after = flatten(old), flatten(new)
    changed = {}
    for key in [*after, *(key for key in before if key not in after)]:
        pair = before.get(key, ABSENT), after.get(key, ABSENT)
        is_lowered = key == "max_steps" and not (isinstance(pair[1], int) and pair[1] > pair[0])
        if pair[0] != pair[1] and (is_lowered or not is_changeable(key)):
            changed[key] = _text(pair[0]), _text(pair[1])
    return changed


def _covered(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _text(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value)


def _stored_values(path: Path) -> dict[str, Any]:
    """The values of the folder's recipe, with defaults for newer keys if this version can still load it."""
    try:
        return _load_stored(path).model_dump(mode="json")
    except UserError:
        return _written_values(path)


def _load_stored(path: Path) -> Recipe:
    """A run's recipe, in which missing keys have the values that they meant then, or today's defaults."""
    recipe = load_stored_recipe(path)
    if not isinstance(recipe, TrainingRecipe):
        return recipe
    former = [f"{key}={value}" for key, value in _former_values(recipe).items() if not _is_written(recipe, key)]
    return load_stored_recipe(path, former) if former else recipe


def _former_values(recipe: Recipe) -> dict[str, str]:
    """The keys of a recipe's task whose absence in a stored recipe means another value than today's default."""
    return FORMER_VALUES.get(recipe.task, {})


def _is_written(recipe: Recipe, key: str) -> bool:
    """Whether a recipe's file contains a key."""
    *sections, name = key.split(".")
    return name in functools.reduce(getattr, sections, recipe).model_fields_set


def _written_values(path: Path) -> dict[str, Any]:
    values = read_yaml(path.read_text(encoding="utf-8")).value
    return values if isinstance(values, dict) else {}


def _warn_of_new_keys(recipe: Recipe, stored: Path) -> None:
    """Warns about keys that a run's stored recipe lacks, and names the values that hold from now on."""
    written, now = flatten(_written_values(stored)), flatten(recipe.model_dump(mode="json"))
    compared = (
        *CHANGEABLE_KEYS,
        *_former_values(recipe),
        *written,
    )  # a section that was null before, and is set now, is not new
    new = [key for key in now if not _covered(key, compared) and not any(_covered(old, [key]) for old in written)]
    if new:
        values = ", ".join(f"{key}={_text(now[key])}" for key in new)
        logger.warning(
            "%s was written by an earlier version, which lacked these keys; from now on: %s. If that version behaved "
            "otherwise, the run continues with the new values",
            stored,
            values,
        )


def _this_start(recipe: Recipe, argv: Sequence[str], known_weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "time": time.strftime(TIME_FORMAT),
        "argv": list(argv),
        "git": code_version(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "base_weights": _base_weights(recipe, known_weights),
    }


def _base_weights(recipe: Recipe, known: dict[str, Any]) -> dict[str, Any]:
    """States of the weight files that the recipe names; a file that has not changed is not read again."""
    found = {}
    for source in weight_sources(recipe).values():
        folder = Path(source.path) / (source.subfolder or "")
        for file in sorted(folder.glob("[!.]*.safetensors")):
            state = read_state(file, FileState.from_json(known.get(str(file))))
            if state is not None:
                found[str(file)] = state.to_json()
    return found


def _refuse_other_weights(recipe: Recipe, run_folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises DifferentRecipeError if a file of weights has other contents than at the run's last start."""
    permitted = recipe.checkpoint.allow_changed if isinstance(recipe, TrainingRecipe) else []
    other = [path for path in before.keys() & now.keys() if before[path].get("sha256") != now[path]["sha256"]]
    for key, source in weight_sources(recipe).items():
        folder = Path(source.path) / (source.subfolder or "")
        changed = sorted(path for path in other if Path(path).parent == folder)
        if changed and not _covered(f"{key}.path", permitted):
            remedy = "put the former file back, give this run another name (name=...), or remove that folder"
            if isinstance(recipe, TrainingRecipe):
                remedy += f"; checkpoint.allow_changed=[{key}] continues with the new weights"
            raise DifferentRecipeError(f"{run_folder} began with another {changed[0]} ({key}): {remedy}")


def weight_sources(recipe: Recipe) -> dict[str, Any]:
    """The recipe's sections that name a weights folder: dotted key -> section."""
    model = getattr(recipe, "model", None)
    sections = {f"model.{name}": getattr(model, name, None) for name in ("unet", "autoencoder", "image_encoder")}
    return {name: section for name, section in sections.items() if section is not None and section.path is not None}
