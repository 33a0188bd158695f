"""The parts of a recipe that other parts of the package read alone: the place to run, the log, a folder of shards.

Knows nothing of torch or of the rest of the package, like `schema.py`, which puts whole recipes together from them.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Scale = Annotated[float, Field(ge=0.0)]
Verify = Literal["first_use", "size", "hash"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Cluster(Section):
    """Where the job runs: processes per node, and what Slurm is asked for.

    `stop_seconds` before its end the job is warned, and has so long to save. A rank that hangs in a step is ended after
    `step_timeout_seconds` (0: never), or 10 times the median step if that is longer. GPUs of one kind are asked for by
    `sbatch_arguments: {gpus-per-node: "h100:8"}` or `{gres: "gpu:a800:8"}`, beside `gpus_per_node: 8`. What
    `environment` says goes before the launcher's own defaults (NCCL's, the allocator's, where compiled kernels lie).
    `storage_mb_per_second` is what the processes together write to the folder of runs, or read from it; only
    `--dry-run` uses it.
    """

    nodes: Positive = 1
    tasks_per_node: Positive = 1
    gpus_per_node: NonNegative = 0
    cpus_per_task: Positive = 1
    memory_gib: Positive | None = None
    time_minutes: Positive = 1440
    stop_seconds: Positive = 120
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    mail_user: str | None = None
    max_requeues: NonNegative = 1000
    setup: list[str] = []
    environment: dict[str, str] = {}
    sbatch_arguments: dict[str, str] = {}
    srun_arguments: list[str] = []
    container_image: str | None = None
    collective_timeout_seconds: Positive = 1800
    step_timeout_seconds: NonNegative = 600
    storage_mb_per_second: Positive = 500

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def gpus_by_kind(self) -> dict[str, int]:
        """GPUs per node that `sbatch_arguments` ask for, by the option which does: `h100:8` or `gpu:a800:8` are 8."""
        asked = {}
        for name, value in self.sbatch_arguments.items():
            option, wanted = name.replace("_", "-"), value.split(",")
            if option == "gres":
                wanted = [one for one in wanted if one.partition(":")[0] == "gpu"]
            if wanted and option in ("gres", "gpus-per-node"):
                numbers = [one.rpartition(":")[2] for one in wanted]
                asked[option] = sum(int(number) if number.isdecimal() else 1 for number in numbers)
        return asked


class Logging(Section):
    """How often a line is printed and a scalar written."""

    every_steps: Positive = 10


class Shards(Section):
    """A folder of streaming shards. `remote` is where they live, `local` where they are read (and cached)."""

    local: str
    remote: str | None = None
