"""The words of tools/claims.py's plan: settings, tasks, the rows that they give, and the plan that holds them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from claims_animate import Job


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


@dataclass(frozen=True)
class Variant:
    """A row of an evaluation's table, under the name that it has in the CSV file."""

    name: str
    evaluation: str
    row: str
    steps: str
    metrics: tuple[str, ...]
    is_last_half: bool = False


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
