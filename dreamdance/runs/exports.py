"""Finds, checks and hashes exports: the folders of trained pipelines that a recipe names."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamdance.errors import CheckpointError, MissingInputError, RecipeError
from dreamdance.runs.file_states import FileState, read_state
from dreamdance.runs.layout import EXPORT_INDEX_FILE, is_export, newest_export

# As `dreamdance.pipelines.sampling` writes them into exports.
PIPELINES_MODULE = "dreamdance.pipelines"
COMPONENTS_MODULE = "dreamdance.pipelines.components"
CODE_SUFFIXES = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
COMPONENT_LIBRARIES = ("diffusers", "transformers", COMPONENTS_MODULE)
NUMBER_ENTRIES = ("default_height", "default_width")  # entries of `model_index.json` that are not components
SAFE_LOADING = {"local_files_only": True, "use_safetensors": True}  # a pickled file of weights could run any code


def find_export(name: str, run_folder: Path, pipeline_class: type, *, key: str) -> Path:
    """The folder of an export: `name` itself if it is one, else the newest export of the run of that name.

    Raises:
        MissingInputError: there is neither.
        CheckpointError: the export is damaged, names foreign code, or contains pickled weights.
        RecipeError: the export is of the other stage.
    """
    folder = Path(name)
    if not is_export(folder):
        try:
            folder = newest_export(run_folder.parent / name)
        except MissingInputError as error:
            raise MissingInputError(f"{key}: {error}") from error
    try:
        index = json.loads((folder / EXPORT_INDEX_FILE).read_text(encoding="utf-8"))
        found = str(index["_class_name"]).removeprefix(f"{PIPELINES_MODULE}.")  # older exports have only the class name
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{key}: {folder / EXPORT_INDEX_FILE} is damaged ({error!r}); export that run again"
        ) from error
    if found != pipeline_class.__name__:
        raise RecipeError(f"{key}: {folder} is an export of {found}, but {pipeline_class.__name__} is needed here")
    check_components(folder, index, key=key)
    return folder


def check_components(folder: Path, index: dict[str, Any], *, key: str) -> None:
    """Refuses an export that contains code: diffusers imports any module that the index names for a component.

    Raises:
        CheckpointError: the export is refused; the error names the component or the file.
    """
    for component, named in index.items():
        if component.startswith("_") or named == [None, None]:
            continue
        if component in NUMBER_ENTRIES and (named is None or isinstance(named, int)):
            continue
        if not isinstance(named, list) or len(named) != 2 or named[0] not in COMPONENT_LIBRARIES:
            raise CheckpointError(
                f"{key}: {folder / EXPORT_INDEX_FILE} takes '{component}' from {named!r}; only components of "
                f"{', '.join(COMPONENT_LIBRARIES)} are loaded"
            )
    foreign = sorted(path for path in folder.rglob("*") if path.suffix in CODE_SUFFIXES)
    if foreign:
        raise CheckpointError(
            f"{key}: {foreign[0]} could run any code; an export has only .json and .safetensors files, remove this one"
        )


def read_export(folder: Path, known: Mapping[Path, FileState]) -> dict[Path, FileState]:
    """The states of an export's files, by absolute path; a file whose known state is still valid is not read again."""
    files = sorted(path.absolute() for path in folder.rglob("*") if path.is_file())
    states = {path: read_state(path, known.get(path)) for path in files}
    return {path: state for path, state in states.items() if state is not None}


def hash_export(folder: Path, states: Mapping[Path, FileState]) -> str:
    """One sha256 over the names and contents of an export's files."""
    listing = [f"{path.relative_to(folder.absolute()).as_posix()} {state.sha256}" for path, state in states.items()]
    return hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()
