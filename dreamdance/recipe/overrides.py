"""What a `key=value` word of the command line means: text keys take the text as it is, others are read as YAML.

So no character of a path is lost: a shell has read the word already, and `#`, quotes or brackets in it are the value's.
"""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from dreamdance.recipe.yaml_text import Document, KeyPath, Problem, read_yaml

_OPENING, _CLOSING = "[{", "]}"


def read_override(text: str, annotation: Any) -> Document:
    """Reads the value of one word.

    Args:
        text: what stands behind the `=`.
        annotation: of the key, as `annotation_at` found it.

    Returns:
        A document with the value. For a text key the text itself; without any text, or `null` where a key may be left
        out, None. Else what YAML reads, or a problem where YAML would leave a part of it out.
    """
    options = _options(annotation)
    if str in options and options <= {str, types.NoneType}:
        is_nothing = not text or (text == "null" and types.NoneType in options)
        return Document(value=None if is_nothing else text)
    document = read_yaml(text)
    if annotation is None and document.problems:  # an unknown key, and named as such later
        return Document(value=text)
    if not document.problems and (rest := text[document.end :].strip()):
        document.problems.append(
            Problem(f"'{rest}' would be left out as a comment; put quotes around the value, inside those of the shell")
        )
    return document


def split_choices(text: str) -> list[str]:
    """The values of a sweep: split at commas, but not inside of brackets that are closed again."""
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
    """The type that a recipe class gives to a dotted key, also to one inside of a mapping; None for an unknown key."""
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
    """The types of a union, of one that is annotated too; of any other type itself."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_options, get_args(annotation)))
    return {annotation}
