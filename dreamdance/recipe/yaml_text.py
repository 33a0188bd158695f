"""Reads recipe YAML into plain values with line numbers and without YAML 1.1's traps; what it writes reads back.

Only `true` and `false` are booleans, `1e-5` is a float, everything else that is not a number is text. A key given
twice, tags, anchors, aliases, several documents, deep nesting and large files are reported as problems.
This module does not know the schema.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 20
MAX_DIGITS = 18
KeyPath = tuple[str | int, ...]  # the parts of a dotted key; a number is a place in a list

_TAG = "tag:yaml.org,2002:"
_OTHER_LINE_ENDS = "\r\x85\u2028\u2029"
_SURROGATES = re.compile("[\ud800-\udfff]")
_PATTERNS = {
    "null": (r"^(?:~|null|)$", ["~", "n", ""]),
    "bool": (r"^(?:true|false)$", ["t", "f"]),
    "int": (r"^[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$", list("-+0123456789")),
    "float": (r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
}


@dataclass(frozen=True)
class Problem:
    """A mistake in a recipe: `path` is the key where it is, `line` the line of the file, if known."""

    message: str
    path: KeyPath = ()
    line: int | None = None

    @classmethod
    def at(cls, path: str, message: str) -> "Problem":
        """A mistake at a dotted key."""
        return cls(message, tuple(path.split(".")))


@dataclass
class Document:
    """The values of one YAML text, the line (from 1) on which each path starts, and the problems of the text.

    Attributes:
        end: the number of characters up to the end of the value; only blanks or a comment follow.
    """

    value: Any = None
    end: int = 0
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with our own patterns for plain scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would read as another type."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escapes line ends that PyYAML would write as they are and read as a space."""
    style = '"' if any(character in text for character in _OTHER_LINE_ENDS) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _name, (_pattern, _first) in _PATTERNS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


def read_yaml(text: str) -> Document:
    """Reads one YAML text; lists every mistake in it under `problems` and never raises for one."""
    if len(text) > MAX_CHARACTERS:
        return Document(
            problems=[Problem(f"the file has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")]
        )
    document = Document()
    try:
        document.problems = _forbidden(text)
        if not document.problems:
            root = yaml.compose(text, Loader=_Loader)
            if root is not None:
                document.value, document.end = _value(root, (), document), root.end_mark.index
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(Problem(f"not valid YAML: {what}", line=mark.line + 1 if mark else None))
    except yaml.YAMLError as error:
        document.problems.append(Problem(f"not valid YAML: {' '.join(str(error).split())}"))
    return document


def write_yaml(value: Any) -> str:
    """Block-style YAML in the given order of keys, short lists in one line; `read_yaml` gives the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


def _forbidden(text: str) -> list[Problem]:
    """Finds the YAML features that a recipe may not use, before any value is built."""
    problems: list[Problem] = []
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else None
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                return [*problems, Problem(f"nested more than {MAX_DEPTH} levels deep", line=line)]
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.ScalarEvent) and _SURROGATES.search(event.value):
            problems.append(
                Problem(f"{event.value[:40]!r} contains half of a surrogate pair, which is not valid text", line=line)
            )
        if isinstance(event, yaml.AliasEvent):
            problems.append(Problem(f"alias '*{anchor}' is not allowed; write the value out", line=line))
        elif anchor:
            problems.append(Problem(f"anchor '&{anchor}' is not allowed; write the value out", line=line))
        if tag:
            problems.append(Problem(f"tag '{tag}' is not allowed in a recipe", line=line))
    return problems


def _value(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    text = str(node.value)
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text == "true"
        case "int" if len(text) <= MAX_DIGITS:
            return int(text)
        case "float" if math.isfinite(float(text)):
            return float(text)
    return text


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(Problem("a key must be a word", path, line))
            continue
        key = str(key_node.value)
        key_path = (*path, key)
        if key in values:
            first = document.lines[key_path]
            dotted = ".".join(map(str, key_path))
            document.problems.append(Problem(f"key '{dotted}' is given twice (first on line {first})", key_path, line))
            continue
        document.lines[key_path] = line
        values[key] = _value(value_node, key_path, document)
    return values
