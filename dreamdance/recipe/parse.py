"""Reads a file and `key=value` words into a typed recipe, or lists every mistake in them.

Precedence: the schema's defaults < the file < the command line. No includes, no interpolation,
no environment variables.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dreamdance.errors import RecipeError
from dreamdance.recipe import rules, schema
from dreamdance.recipe.overrides import annotation_at, read_override, section_class
from dreamdance.recipe.schema import Recipe
from dreamdance.recipe.yaml_text import MAX_CHARACTERS, MAX_DEPTH, Document, KeyPath, read_yaml, write_yaml

COMMAND_LINE = "command line"
TASKS: dict[str, type[Recipe]] = {
    get_args(recipe_class.model_fields["task"].annotation)[0]: recipe_class
    for recipe_class in get_args(get_args(schema.AnyRecipe)[0])
}

# Keys that earlier versions wrote into the stored recipes of all tasks; tasks without the key never read it.
FORMER_KEYS = ("logging",)


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, its file, and the dotted keys that the command line set."""

    recipe: Recipe
    file: Path
    overridden: frozenset[str]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` words with dotted keys (`optimizer.lr=1e-4`). A text key takes the value as it is; any
            other value is read by the same YAML rules as the file.

    Raises:
        RecipeError: the message has one line for each problem, `file:line: problem`. Relations between values are
            checked only if every single value is right.
    """
    return load(path, overrides).recipe


def load_stored_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks the recipe in a run folder like `load_recipe`, but drops `FORMER_KEYS` of its task."""
    return load(path, overrides, is_stored=True).recipe


def load(path: str | Path, overrides: Sequence[str] = (), *, is_stored: bool = False) -> LoadedRecipe:
    """Reads and checks a recipe like `load_recipe`, and returns which keys the command line changed.

    Args:
        path: a YAML file.
        overrides: `key=value` words.
        is_stored: whether the file is the recipe of a run folder, which an earlier version may have written.
    """
    file = Path(path)
    document = read_yaml(_read(file))
    origins = _Origins(str(path), document)
    recipe, overridden = None, frozenset[str]()
    if isinstance(document.value, dict):
        overridden = _apply(overrides, document, origins)
        if is_stored:
            _drop_former_keys(document.value)
        recipe = _check(document.value, origins)
    elif not document.problems:
        origins.add("a recipe is a mapping: `key: value` lines", ())
    if recipe is None or origins.found:
        raise RecipeError("\n".join(origins.texts()))
    return LoadedRecipe(recipe, file, overridden)


def given_value(path: str | Path, overrides: Sequence[str], key: str) -> Any:
    """The unchecked value of a dotted key in the file or on the command line; None if neither sets it."""
    document = read_yaml(_read(Path(path)))
    if not isinstance(document.value, dict):
        return None
    _apply(overrides, document, _Origins(str(path), document))
    return flatten(document.value).get(key)


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, with all defaults; `load_recipe` reads it back as an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` becomes `{"a.b": 1}`; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _drop_former_keys(values: dict[str, Any]) -> None:
    recipe_class = TASKS.get(str(values.get("task")))
    for key in FORMER_KEYS:
        if recipe_class is not None and key not in recipe_class.model_fields:
            values.pop(key, None)


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(MAX_CHARACTERS + 1)  # `read_yaml` refuses longer texts; a device file has no end
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not a text file: byte {error.start} is not UTF-8") from None
    except OSError as error:
        # Names are compared without their common ending, which would make any two of them similar.
        near = difflib.get_close_matches(file.stem, [entry.stem for entry in file.parent.glob("*.yaml")], 1)
        hint = f"; did you mean '{file.with_name(near[0])}.yaml'?" if near else ""
        raise RecipeError(f"{file}: cannot be read: {error.strerror}{hint}") from error


class _Origins:
    """Records the line of the file, or the command line, for each value, so that a problem is shown at its place."""

    def __init__(self, name: str, document: Document) -> None:
        self.name = name
        self.document = document
        self.from_command_line: set[KeyPath] = set()
        # (on the command line?, line, text): problems sort by line; problems of the command line come last
        self.found: list[tuple[bool, int, str]] = []
        for problem in document.problems:
            self._add_in_file(problem.line or 0, problem.message)

    def add(self, message: str, path: KeyPath) -> None:
        """Adds a problem at the nearest known place at or above `path`."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.from_command_line:
                self.add_on_command_line(message)
                return
            if path[:length] in self.document.lines:
                self._add_in_file(self.document.lines[path[:length]], message)
                return
        self._add_in_file(0, message)

    def add_on_command_line(self, message: str) -> None:
        self.found.append((True, 0, f"{COMMAND_LINE}: {message}"))

    def _add_in_file(self, line: int, message: str) -> None:
        place = f"{self.name}:{line}" if line else self.name
        self.found.append((False, line, f"{place}: {message}"))

    def texts(self) -> list[str]:
        """All problems in the order of the file, then those of the command line."""
        return [text for _, _, text in sorted(self.found, key=lambda entry: entry[:2])]


def _apply(overrides: Sequence[str], document: Document, origins: _Origins) -> frozenset[str]:
    """Applies `key=value` words to the document's values in place; returns the dotted keys that they set."""
    applied = set()
    recipe_class = TASKS.get(_task(overrides, document))
    for word in overrides:
        key, equals, text = word.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            origins.add_on_command_line(f"'{word}' is not key=value")
            continue
        if len(parts) > MAX_DEPTH:
            origins.add_on_command_line(f"'{key[:80]}...' has {len(parts)} parts; at most {MAX_DEPTH} are read")
            continue
        if not _is_unicode(word):
            origins.add_on_command_line(f"{word!r} is not UTF-8 text")
            continue
        value = read_override(text, annotation_at(recipe_class, tuple(parts)) if recipe_class else None)
        if value.problems:
            origins.add_on_command_line(f"{key}: {value.problems[0].message}")
            continue
        section = document.value
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[parts[-1]] = value.value
        origins.from_command_line.add(tuple(parts))
        applied.add(key)
    return frozenset(applied)


def _task(overrides: Sequence[str], document: Document) -> str:
    given = [word.removeprefix("task=") for word in overrides if word.startswith("task=")]
    return given[-1] if given else str(document.value.get("task"))


def _is_unicode(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(values: dict[str, Any], origins: _Origins) -> Recipe | None:
    """Checks every single value, then the relations between values, if every single value is right."""
    task = values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        given = "missing key 'task'" if "task" not in values else f"unknown task {task!r}"
        origins.add(
            f"{given}; a recipe's task is one of {', '.join(TASKS)}{_nearest(str(task), list(TASKS))}", ("task",)
        )
        return None
    recipe_class = TASKS[task]
    try:
        # JSON, because strict validation then still accepts a list for a tuple.
        recipe = recipe_class.model_validate_json(json.dumps(values))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=True):
            path = tuple(detail["loc"])
            origins.add(_message(recipe_class, path, detail), path)
        return None
    for problem in rules.problems(recipe, frozenset(known_keys(recipe_class))):
        origins.add(problem.message, problem.path)
    return recipe


def _message(recipe_class: type[Recipe], path: KeyPath, detail: Any) -> str:
    """One pydantic error as a message for the user."""
    dotted = ".".join(map(str, path))
    given = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{dotted}'{_suggestion(recipe_class, path)}"
        case "missing":
            return f"missing key '{dotted}'"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"'{dotted}' is {_shown(given)}, but must be a section of `key: value` lines"
        case "literal_error":
            expected = str(detail["ctx"]["expected"]).replace(" or ", ", ").replace("'", "")
            options = [{"True": "true", "False": "false"}.get(option, option) for option in expected.split(", ")]
            near = _nearest(str(given), options)
            return f"'{dotted}' is {_shown(given)}, but must be one of {', '.join(options)}{near}"
    expected = {
        "bool_type": "must be true or false",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number, written without a point or an exponent",
        "float_type": "must be a number",
        "string_type": 'must be text (quote it: "...")',
        "list_type": "must be a list: [a, b]",
        "tuple_type": "must be a list: [a, b]",
        "string_pattern_mismatch": "must be lower-case letters, digits and underscores",
    }.get(
        detail["type"],
        str(detail["msg"])
        .removeprefix("Value error, ")
        .replace("Input should", "must")
        .replace("String should", "must"),
    )
    return f"'{dotted}' is {_shown(given)}, but {expected}"


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = json.dumps(value) if not isinstance(value, str) else f"the text '{value}'"
    return text if len(text) <= 80 else text[:77] + "..."


def _suggestion(recipe_class: type[Recipe], path: KeyPath) -> str:
    """Suggests a key for an unknown one: a similar sibling, the same name elsewhere, or a key of another task."""
    name = str(path[-1])
    section = section_at(recipe_class, path[:-1])
    siblings = list(section.model_fields) if section else []
    if near := difflib.get_close_matches(name, siblings, 1, cutoff=0.75):
        return f"; did you mean '{near[0]}'?"
    keys = known_keys(recipe_class)
    if elsewhere := [key for key in keys if key.rpartition(".")[2] == name]:
        return f"; did you mean '{elsewhere[0]}'?"
    tasks = [task for task, other in TASKS.items() if ".".join(map(str, path)) in known_keys(other)]
    if tasks:
        return f"; it belongs to task {' and '.join(tasks)}"
    return _nearest(name, siblings) or _nearest(name, [key.rpartition(".")[2] for key in keys])


def _nearest(name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, 1)
    return f"; did you mean '{near[0]}'?" if near else ""


def section_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The section class at `path` of a recipe class; None if the schema has no section there."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = section_class(field.annotation) if field else None
        if inner is None:
            return None
        model = inner
    return model


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a recipe class, sections included, in the schema's order."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        inner = section_class(field.annotation)
        if inner is not None:
            keys.extend(known_keys(inner, f"{prefix}{name}."))
    return keys
