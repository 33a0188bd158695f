"""Reads the `key=value` words of the command line: a text key takes the text as it is, any other is read as YAML.

The shell has removed its own quotes already: every `#`, quote or bracket in the word belongs to the value.
"""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from dreamdance.recipe.yaml_text import Document, KeyPath, Problem, read_yaml

_OPENING, _CLOSING = "[{", "]}"


def read_override(text: str, annotation: Any) -> Document:
    """Reads the value of one word.

    Args:
        text: the part of the word after the first `=`.
        annotation: the type of the key, from `annotation_at`.

    Returns:
        A document with the value. A text key has the text itself, or None for an empty text, or for `null` if the key
        may be left out. Any other key has the value that YAML reads; text that YAML would ignore is a problem.
    """
    options = _options(annotation)
    if str in options and options <= {str, types.NoneType}:
        is_nothing = not text or (text == "null" and types.NoneType in options)
        return Document(value=None if is_nothing else text)
    document = read_yaml(text)
    if annotation is None and document.problems:  # the key is unknown, which is reported later
        return Document(value=text)
    if not document.problems and (rest := text[document.end :].strip()):
        document.problems.append(
            Problem(f"YAML would ignore '{rest}' as a comment; put quotes around the value, inside those of the shell")
        )
    return document


def split_choices(text: str) -> list[str]:
    """The values of a sweep: splits at commas, except inside brackets that are closed again."""
    choices, depth = [""], 0
    for position, character in enumerate(text):
        if character in _OPENING and any(closing in text[position:] for closing in _CLOSING):
            depth += 1
        elif character in _CLOSING:
            depth = max(0, depth - 1)
        if character == "," and not depth:
            choices.append("")
        else:
            choices[-1] += character
    return choices


def annotation_at(model: type[BaseModel], path: KeyPath) -> Any:
    """The type of a dotted key in a recipe class, also inside a mapping; None for an unknown key."""
    annotation: Any = model
    for part in path:
        section = section_class(annotation)
        if section is not None:
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field else None
        else:
            mappings = (option for option in _options(annotation) if get_origin(option) is dict)
            annotation = next((get_args(mapping)[1] for mapping in mappings), None)
        if annotation is None:
            return None
    return annotation


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation allows, or None."""
    found = (option for option in _options(annotation) if isinstance(option, type))
    return next((option for option in found if issubclass(option, BaseModel)), None)


def _options(annotation: Any) -> set[Any]:
    """The types of a union, annotated or not; any other type by itself."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_options, get_args(annotation)))
    return {annotation}
