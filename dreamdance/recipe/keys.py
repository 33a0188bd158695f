"""The key reference: every recipe key with its type, range, unit, default, meaning and tasks, read from the schema.

`explain` is the text of `dreamdance explain`; `tools/key_reference.py` writes recipes/README.md from the same keys.
"""

import difflib
import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dreamdance.errors import RecipeError
from dreamdance.recipe.overrides import section_class
from dreamdance.recipe.parse import TASKS
from dreamdance.recipe.sections import Unit

REQUIRED, NOT_SET, OWN_DEFAULTS = "required", "not set", "the defaults of its keys"
WIDTH = 100
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}


@dataclass(frozen=True)
class Key:
    """One key of one recipe class or of several.

    Attributes:
        path: the dotted key.
        kind: kind of the value, with its range, such as `whole number, > 0`.
        unit: unit of the value; empty if it has none.
        default: the value if the recipe does not set the key; `required` if it must.
        meaning: the field's description.
        section: the class of a section's keys; None if the key has a value of its own.
        tasks: the tasks whose recipes have this key with this meaning.
    """

    path: str
    kind: str
    unit: str
    default: str
    meaning: str
    section: type[BaseModel] | None
    tasks: tuple[str, ...] = ()


def keys(task: str | None = None) -> list[Key]:
    """All keys in the schema's order; a key that means different things in two tasks is listed once for each.

    Args:
        task: lists the keys of this task's recipes only.
    """
    tasks_of: dict[Key, list[str]] = {}
    for name in [task] if task is not None else TASKS:
        for key in _keys_of(TASKS[name], "", None):
            tasks_of.setdefault(key, []).append(name)
    return [replace(key, tasks=tuple(tasks)) for key, tasks in tasks_of.items()]


def explain(path: str | None = None, task: str | None = None) -> str:
    """The reference of one key, of a section with all its keys, or of all keys.

    Args:
        path: a dotted key; None for all keys.
        task: one of the tasks; None for all tasks.

    Raises:
        RecipeError: no recipe (or none of this task) has the key; the message suggests a similar one.
    """
    known = keys(task)
    found = [key for key in known if path is None or key.path == path or key.path.startswith(f"{path}.")]
    if path is not None and not found:
        raise RecipeError(_unknown(path, task, known))
    return "\n\n".join(map(_block, found))


def describe_type(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """The kind of value that a key takes and its range, in words.

    Args:
        annotation: the field's type.
        constraints: the metadata that pydantic has moved from the type to the field.
    """
    bare, found = _bare(annotation, constraints)
    if section_class(bare) is not None:
        return "section"
    origin, arguments = get_origin(bare), get_args(bare)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(option) for option in arguments if option is not types.NoneType)
    if origin is Literal:
        return f"one of {', '.join(_text(option) for option in arguments)}"
    if origin is list:
        return f"list, each {describe_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {'; '.join(map(describe_type, arguments))}"
    if origin is dict:
        return f"mapping of names to {describe_type(arguments[1])}"
    return ", ".join([_WORDS[bare], *_range(found)])


def _keys_of(model: type[BaseModel], prefix: str, given: BaseModel | None) -> Iterator[Key]:
    """The keys of a class and of its sections; `given` is the default of the whole section, if it has one."""
    for name, field in model.model_fields.items():
        section = section_class(field.annotation)
        default = field.default if given is None else getattr(given, name)
        yield Key(
            path=prefix + name,
            kind=f"one of {', '.join(TASKS)}" if name == "task" else describe_type(field.annotation, field.metadata),
            unit=_unit(field),
            default=_default(field, default),
            meaning=field.description or "",
            section=section,
        )
        if section is not None:
            inner = default if isinstance(default, BaseModel) else None
            yield from _keys_of(section, f"{prefix}{name}.", inner)


def _default(field: FieldInfo, default: Any) -> str:
    """The default in words; `default` is used only if the recipe leaves out the whole section."""
    if field.is_required():
        return REQUIRED
    if isinstance(default, BaseModel):
        return OWN_DEFAULTS if default == type(default)() else _text(dict(default))
    if default != field.default:
        return f"{_text(default)}, or {_text(field.default)} where another key of its section is set"
    return _text(default)


def _text(value: Any) -> str:
    """A value as a recipe has it."""
    if value is None:
        return NOT_SET
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_text(one)}" for name, one in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _unit(field: FieldInfo) -> str:
    options = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    found = [*field.metadata, *(constraint for option in options for constraint in _bare(option, ())[1])]
    return next((constraint.name for constraint in found if isinstance(constraint, Unit)), "")


def _bare(annotation: Any, constraints: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A type without `Annotated`, and its annotations."""
    found = list(constraints)
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        for one in more:
            found += one.metadata if isinstance(one, FieldInfo) else [one]
    return annotation, found


def _range(constraints: Sequence[Any]) -> list[str]:
    """The range of a number, or the characters of a text."""
    if any(getattr(constraint, "pattern", None) for constraint in constraints):
        return ["of lower-case letters, digits and underscores"]
    bounds = [
        f"{sign} {bound:g}"
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        for constraint in constraints
        if (bound := getattr(constraint, name, None)) is not None
    ]
    return [" and ".join(bounds)] if bounds else []


def _block(key: Key) -> str:
    """The text about a key: its facts, then its meaning."""
    facts = {"type": key.kind, "unit": key.unit, "default": key.default, "tasks": ", ".join(key.tasks)}
    lines = [f"    {name + ':':<9}{value}" for name, value in facts.items() if value]
    return "\n".join([key.path, *lines, textwrap.indent(textwrap.fill(key.meaning, WIDTH - 4), "    ")])


def _unknown(path: str, task: str | None, known: Sequence[Key]) -> str:
    where = f"recipes of task {task} have no key '{path}'" if task else f"no recipe has a key '{path}'"
    paths = list(dict.fromkeys(key.path for key in known))
    name = path.rpartition(".")[2]
    if tasks := [other for key in keys() if key.path == path for other in key.tasks]:
        return f"{where}; it belongs to task {' and '.join(tasks)}"
    outer = next(
        (key.path for key in known if path.startswith(f"{key.path}.") and key.kind.startswith("mapping")), None
    )
    near = [outer] if outer else [one for one in paths if one.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(path, paths, 1)
    near = near or [one for one in paths if difflib.get_close_matches(name, [one.rpartition(".")[2]], 1)]
    hint = f"; did you mean {' or '.join(f'{one!r}' for one in near[:3])}?" if near else ""
    return f"{where}{hint}"
