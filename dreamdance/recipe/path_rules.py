"""Refuses paths with `~` or environment variables, which recipes do not expand (C6).

Expanded, the same recipe would be another run for another user or on another machine (C7): the run folder records the
text. Taken as it is, `output: ~/data` would create a folder named `~` beside the job.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from dreamdance.recipe.schema import Recipe
from dreamdance.recipe.yaml_text import Problem

# `~`, `~/videos`, `~name/videos`; `$HOME/videos`, `/data/${USER}/videos`.
_EXPANDABLE = re.compile(r"^~$|^~[\w.-]*/|(^|/)\$(\w+|\{\w+\})(/|$)")
# The keys of paths, whatever their section.
_PATH_KEYS = frozenset(
    [
        *("animation_from", "folder", "geometry_from", "list", "local", "manifest", "output", "path", "results"),
        *("side_files", "split", "weights"),
    ]
)


def find_expandable(recipe: Recipe) -> Iterator[Problem]:
    """A problem for each path that a shell would expand; it states the path to write instead."""
    yield from _find(recipe.model_dump(mode="json", exclude={"cluster"}), ())


def _find(value: Any, path: tuple[str, ...]) -> Iterator[Problem]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _find(inner, (*path, str(key)))
    elif isinstance(value, str) and path[-1] in _PATH_KEYS and _EXPANDABLE.search(value):
        expanded = os.path.expandvars(os.path.expanduser(value))
        really = f" (for a folder of that name: ./{value})" if value.startswith("~") else ""
        advice = "write the whole path" if _EXPANDABLE.search(expanded) else f"write {expanded}"
        key = ".".join(path)
        yield Problem(
            f"{key} is {value!r}: recipes expand neither ~ nor variables, so that a recipe means the same for every "
            f"user and machine; {advice}{really}",
            path,
        )
