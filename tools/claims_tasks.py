"""The words of tools/claims.py's plan: settings, tasks, the rows that they give, and the plan that holds them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

from claims_animate import Job
from claims_names import METRICS_OF_MAPS

from dreamdance.recipe import Recipe, load_recipe
from dreamdance.runs.file_states import FileStamp
from dreamdance.runs.files import hash_file

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes/demo"


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        out: folder of all data, runs and results.
        clips: held-out dancers.
        training_clips: clips to train on.
        steps: steps of every training in place of its recipe's.
        stage1, stage2: further words for the trainings of a stage.
    """

    out: Path
    clips: int = 12
    training_clips: int = 240
    steps: int | None = None
    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A piece of work that is done or not.

    Attributes:
        name: unique; also the name of its run.
        words: a recipe of recipes/demo and its overrides, for the launcher; empty if there are jobs.
        jobs: clips of one stage alone.
        needs: names of tasks that come before.
        seconds: estimate.
        steps: optimizer steps of a training and of those it starts from, such as `1800+300`.
        scales_from: name of the evaluation whose table decides the guidance scales of the job.
    """

    name: str
    words: tuple[str, ...] = ()
    jobs: tuple[Job, ...] = ()
    needs: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    steps: str = ""
    scales_from: str | None = None

    @cached_property
    def recipe(self) -> Recipe | None:
        """What the launcher runs; None for clips.

        Raises:
            RecipeError: a word is refused.
        """
        return load_recipe(DEMO / f"{self.words[0]}.yaml", list(self.words[1:])) if self.words else None

    @cached_property
    def identity(self) -> str:
        """Differs if anything differs that is known before it runs, except for what it needs and for the code.

        That is: the task, its recipes with all their values, and the files of the base models that they name.
        """
        recipes: list[Recipe] = [job.recipe for job in self.jobs] if self.recipe is None else [self.recipe]
        resolved = [recipe.model_dump(mode="json") for recipe in recipes]
        base = [base_weights(recipe) for recipe in recipes]
        content = json.dumps([asdict(replace(self, seconds=0.0)), resolved, base], default=str)
        return hashlib.sha256(content.encode()).hexdigest()


def base_weights(recipe: Recipe, root: Path = ROOT) -> list[tuple[str, str]]:
    """Name and SHA-256 of the weights and settings in each folder that a recipe's `model` names; its card is no part.

    Args:
        recipe: any recipe; those without a model have no base weights.
        root: the project's folder, in which relative paths lie.
    """
    model, found = getattr(recipe, "model", None), list[tuple[str, str]]()
    for network in ("unet", "autoencoder", "image_encoder"):
        source = getattr(model, network, None)
        if source is None or source.path is None:
            continue
        folder = root / source.path / (source.subfolder or "")
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".json"))
        found += [(f"{network}: {file.relative_to(folder)}", _hash(file, FileStamp.of(file))) for file in files]
    return found


@cache
def _hash(file: Path, stamp: FileStamp) -> str:
    """Read once for all tasks, and again if it was replaced."""
    return hash_file(file)


@dataclass(frozen=True)
class Variant:
    """A row of an evaluation's table, under the name that it has in the CSV file.

    Attributes:
        name: in the CSV file.
        evaluation: the task whose table has the row.
        row: its name there; empty for the row that `best_scales` chooses under the variant's name.
        steps: of its model.
        metrics: what the CSV file gets.
        is_last_half: whether only the clips count that did not choose the guidance scales.
        map_steps: of the model that made its maps, if that is another one.
    """

    name: str
    evaluation: str
    row: str
    steps: str
    metrics: tuple[str, ...]
    is_last_half: bool = False
    map_steps: str = ""

    def steps_of(self, metric: str) -> str:
        """Steps of the trainings that decide a metric."""
        return self.map_steps if self.map_steps and metric in METRICS_OF_MAPS else self.steps


@dataclass
class Plan:
    """Tasks in their order, all clips that they make, and per claim and seed the tasks of its table and its rows."""

    settings: Settings
    tasks: dict[str, Task] = field(default_factory=dict)
    jobs: set[Job] = field(default_factory=set)
    units: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    variants: dict[tuple[str, int], list[Variant]] = field(default_factory=dict)

    def add(self, task: Task) -> str:
        """Adds a task unless it is there; returns its name.

        Raises:
            ValueError: another task has this name.
        """
        if self.tasks.setdefault(task.name, task) != task:
            raise ValueError(f"two tasks are named {task.name}")
        return task.name

    def with_needs(self, names: Iterable[str]) -> list[str]:
        """The tasks and all that they need, each once, what is needed first."""
        found: dict[str, None] = {}

        def visit(name: str) -> None:
            for need in self.tasks[name].needs:
                visit(need)
            found[name] = None

        for name in names:
            visit(name)
        return list(found)


def scaled(domain: str, scale: float) -> str:
    """The name of a variant with one guidance scale, such as `normal_scale_0p5`; `one` for all domains."""
    return f"{domain}_scale_{scale:g}".replace(".", "p")


def guidance_words(scales: Mapping[str, float]) -> str:
    """The override of stage 1's guidance scales."""
    return f"geometry.guidance_scales={json.dumps(dict(scales))}"
