"""Writes recipes/README.md: how recipes work, and every key with its type, default and meaning, from the schema.

With `--check` it writes nothing, and fails if the file is out of date.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from dreamdance.recipe.keys import REQUIRED, Key, keys
from dreamdance.recipe.parse import TASKS
from dreamdance.recipe.schema import Recipe, TrainingRecipe

OUTPUT = Path(__file__).resolve().parent.parent / "recipes" / "README.md"
HEAD = """# Recipes

*`tools/key_reference.py` generates this page from the recipe schema; change the descriptions there.*

A recipe is one YAML file that describes a run completely. `task` decides which keys exist:

| task | what it does | recipes |
|---|---|---|
| `prepare` | makes streaming shards of videos or of rendered dancers | `prepare.yaml`, `footage/`, `demo/`, `base/` |
| `encode` | stores latents of shards, or maps of a trained stage 1, from which stages train | `encode*.yaml`, `demo/` |
| `stage1` | trains the geometry model, in three steps (`train`) | `stage1_*.yaml`, `ablations/`, `demo/`, `base/` |
| `stage2` | trains the SVD-ControlNet and its controller | `stage2.yaml`, `ablations/`, `footage/`, `demo/`, `base/` |
| `animate` | animates a manifest of reference pictures and poses | `animate.yaml`, `footage/`, `demo/` |
| `evaluate` | scores the results of an animate run | `evaluate.yaml`, `footage/`, `demo/` |

The comment at the head of each recipe describes the run, how to launch it, and what to expect.

## How a recipe is read

* **Precedence.** The command line overrides the file, and the file overrides the defaults of this page:
  `dreamdance recipes/stage2.yaml optimizer.lr=2e-5 cluster.partition=gpu`. There are no includes, no interpolation and
  no environment variables. `--dry-run` shows the resolved recipe and marks the lines that the command line changed.
* **Values on the command line.** A text key takes the characters as they are (`"videos.folder=takes/take #2"`). Every
  other value is read as in a file: `data.stride=[1,4]`, `checkpoint.keep_every_steps=null`. `--sweep key=v1,v2` starts
  one run for each value.
* **Names.** `name` is unique over all recipes; names of the demo begin with `demo_`. The run is the folder
  `runs/<name>/` (`--runs` changes `runs`). The same command continues the run in it.
* **A changed recipe.** An existing run folder accepts the same recipe only. Not counted as changes: `cluster`,
  `logging`, `checkpoint.allow_changed`, `checkpoint.copy_in_memory`, `sharding.gradient_checkpointing`, `data.verify`,
  `data.mixed_backgrounds`, `compression`, `videos.on_error`, `videos.list` and a raised `max_steps`. Other changes are
  refused with a list (exit code 3), unless `checkpoint.allow_changed` names their keys.
* **Starting from another run.** `init_from: stage1_domains` takes the averaged weights of that run under `--runs`:
  module weights only, no optimizer state. The run must be finished, unless `init_step` names one of its steps. Steps
  that leave those weights as they are keep its `objective.prediction_type` and `objective.zero_terminal_snr`.
* **Relative paths** start at the folder where the command is called.

## What is refused

All problems of a file are listed at once, with file and line (exit code 2): an unknown key, with the nearest known one;
a value of another type or out of range; a key that is given twice; YAML's tags, anchors, aliases and several documents.
Only `true` and `false` are truth values (`no` is text), and `1e-5` is a number. Relations between keys are checked once
every key by itself is right, such as `batch_size` = `micro_batch_size` x accumulation x processes.

## The keys

`dreamdance explain KEY` (or `python launchers/slurm.py explain KEY`) shows one key or section of this page,
`dreamdance explain` all of them. "required" keys have no default; a key that is "not set" takes `null` too.
"""


def page() -> str:
    """The text of recipes/README.md."""
    known = keys()
    return "\n".join([HEAD, _sections_by_task(known), *_own_keys(known), *_section_keys(known)]).rstrip() + "\n"


def _sections_by_task(known: Sequence[Key]) -> str:
    """A table that shows which tasks have which sections."""
    tops = [key for key in known if key.section is not None and "." not in key.path]
    lines = ["| section | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for path in dict.fromkeys(key.path for key in tops):
        present = {task: key for key in tops if key.path == path for task in key.tasks}
        marks = [_mark(present.get(task)) for task in TASKS]
        lines.append(f"| `{path}` | {' | '.join(marks)} |")
    return "\n".join([*lines, ""])


def _mark(key: Key | None) -> str:
    if key is None:
        return ""
    return REQUIRED if key.default == REQUIRED else "yes"


def _own_keys(known: Sequence[Key]) -> Iterator[str]:
    """Tables of the keys outside of sections: for every recipe, for training, for each task."""
    groups: dict[str, set[str]] = {
        "Every recipe": set(Recipe.model_fields),
        "Every training (stage1, stage2)": set(TrainingRecipe.model_fields),
        **{f"Task {task}": set(recipe_class.model_fields) for task, recipe_class in TASKS.items()},
    }
    shown: set[Key] = set()
    for title, names in groups.items():
        task = title.removeprefix("Task ")
        rows = [
            key for key in known if key.path in names and key not in shown and (task not in TASKS or task in key.tasks)
        ]
        if title.startswith("Every training"):
            rows = [key for key in rows if set(key.tasks) == {"stage1", "stage2"}]
        shown.update(rows)
        if rows:
            yield _table(f"### {title}", "", [(key.path, key) for key in rows])


def _section_keys(known: Sequence[Key]) -> Iterator[str]:
    """One table for each class of sections; its title contains all keys that have such a section."""
    places: dict[type[BaseModel], list[Key]] = {}
    for key in known:
        if key.section is not None:
            places.setdefault(key.section, []).append(key)
    for section, here in places.items():
        paths = list(dict.fromkeys(key.path for key in here))
        tasks = [task for task in TASKS if any(task in key.tasks for key in here)]
        title = f"### {', '.join(f'`{path}`' for path in paths)} ({', '.join(tasks)})"
        prefix = f"{paths[0]}."
        owned = [key for key in known if key.path.startswith(prefix) and "." not in key.path.removeprefix(prefix)]
        owned = [key for key in owned if set(key.tasks) & set(here[0].tasks)]
        names = [key.path if len(paths) == 1 else key.path.removeprefix(prefix) for key in owned]
        yield _table(title, " ".join((section.__doc__ or "").split()), list(zip(names, owned, strict=True)))


def _table(title: str, text: str, rows: Sequence[tuple[str, Key]]) -> str:
    lines = [title, "", *([text, ""] if text else []), "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, key in rows:
        kind = ", ".join(part for part in (key.kind, key.unit) if part)
        lines.append(f"| `{name}` | {kind} | {key.default} | {key.meaning} |")
    return "\n".join([*lines, ""])


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        OUTPUT.write_text(text, encoding="utf-8")
        return 0
    if OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{OUTPUT} is out of date; run tools/key_reference.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
