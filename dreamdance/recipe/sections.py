"""The sections that modules receive without the whole recipe (the place to run, the log, a folder of shards).

This module also defines the value types that all sections share. Every field has a `description`, from which `keys.py`
makes the key reference. This module imports neither torch nor the rest of the package.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Unit:
    """The unit of a key's value, for the key reference only."""

    name: str


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Scale = Annotated[float, Field(ge=0.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
Verify = Literal["first_use", "size", "hash"]

Pixels = Annotated[Positive, Unit("pixels")]
Frames = Annotated[Positive, Unit("frames")]
Clips = Annotated[Positive, Unit("clips")]
Steps = Annotated[Positive, Unit("steps")]
Seconds = Annotated[Positive, Unit("seconds")]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Cluster(Section):
    """Where the job runs: its processes, what the launcher asks of Slurm, and how long the job may wait or hang.

    A run may continue with other values of this section.
    """

    nodes: Positive = Field(
        default=1, description="Number of machines. More than one needs Slurm. batch_size stays the same on any number."
    )
    tasks_per_node: Positive = Field(
        default=1,
        description=(
            "Processes (ranks) on each machine. On GPUs it equals gpus_per_node, because every process drives one GPU."
        ),
    )
    array: Positive = Field(
        default=1,
        description=(
            "Number of Slurm jobs, the members of one array, that share the items of prepare, encode, animate or "
            "evaluate. Each has the nodes and processes that this section asks for. Members that start late or are "
            "lost do no harm: the others do their items. Training is one job. Slurm only."
        ),
    )
    gpus_per_node: NonNegative = Field(
        default=0,
        description=(
            "GPUs on each machine; 0 runs on the CPU, also on a machine with GPUs. The value is 0 or tasks_per_node."
        ),
    )
    cpus_per_task: Positive = Field(
        default=1,
        description="CPU cores of each process, and its number of OpenMP threads. Raise it with data.num_workers.",
    )
    memory_gib: Annotated[Positive, Unit("GiB")] | None = Field(
        default=None,
        description=(
            "Main memory of each machine that the launcher asks of Slurm (`--mem`). Without it, Slurm gives the "
            "partition's default."
        ),
    )
    time_minutes: Annotated[Positive, Unit("minutes")] = Field(
        default=1440,
        description=(
            "Time limit of the job. Training saves before it. On Slurm an unfinished job then returns to the queue by "
            "itself; on one machine the same command continues."
        ),
    )
    stop_seconds: Seconds = Field(
        default=120,
        description=(
            "How long before the time limit the job receives its warning signal. It must be less than time_minutes. "
            "Ranks have 80 % of it to save a checkpoint: raise it if --dry-run shows that a save takes longer."
        ),
    )
    partition: str | None = Field(
        default=None,
        description="Slurm partition of the job. Without it, Slurm takes its default partition.",
    )
    account: str | None = Field(
        default=None, description="Slurm account that pays for the job. Set it if your cluster asks for one."
    )
    qos: str | None = Field(
        default=None, description="Slurm quality of service (`--qos`) of the job, which decides limits and priority."
    )
    constraint: str | None = Field(
        default=None,
        description="Node features that Slurm must find (`--constraint`), such as a kind of GPU.",
    )
    reservation: str | None = Field(
        default=None,
        description="Slurm reservation (`--reservation`) in which the job runs, if nodes are reserved for you.",
    )
    mail_user: str | None = Field(
        default=None,
        description=(
            "Address to which Slurm sends a mail when the job ends, fails, is requeued or reaches its time limit."
        ),
    )
    max_requeues: NonNegative = Field(
        default=1000,
        description=(
            "How often a job may go back into Slurm's queue, after a time limit, a pre-emption or a failure. 0 never "
            "requeues. Two failures, or three stops, without progress in between end the run earlier."
        ),
    )
    setup: list[str] = Field(
        default=[],
        description=(
            "Shell lines that the batch script runs before the processes start, such as `module load cuda`. Slurm only."
        ),
    )
    environment: dict[str, str] = Field(
        default={},
        description=(
            "Environment variables of every process, by name. They take precedence over the launcher's own defaults, "
            "such as those of NCCL, of the CUDA allocator and of the folder for compiled kernels."
        ),
    )
    sbatch_arguments: dict[str, str] = Field(
        default={},
        description=(
            "Further options of sbatch, by name without dashes; an empty value is an option without a value. GPUs of "
            'one kind: `{gpus-per-node: "h100:8"}` or `{gres: "gpu:a800:8"}`, with gpus_per_node: 8. Options that '
            "another key sets are refused."
        ),
    )
    srun_arguments: list[str] = Field(
        default=[],
        description=(
            "Further options of srun, one word each, such as `--mpi=none`. Options that another key sets are refused."
        ),
    )
    container_image: str | None = Field(
        default=None,
        description=(
            "Container image in which srun starts the processes (`--container-image`, an option of the Pyxis plug-in)."
        ),
    )
    collective_timeout_seconds: Seconds = Field(
        default=1800,
        description=(
            "How long a collective operation may wait for another rank. Also how long an activity that has no measured "
            "duration may take: the start, the first step, a save, a validation. Raise it if one of these is slow."
        ),
    )
    step_timeout_seconds: Annotated[NonNegative, Unit("seconds")] = Field(
        default=600,
        description=(
            "A training step or network pass that takes longer than this, and longer than 10 times the median, ends "
            "the job, which then continues from its last checkpoint. In prepare, encode, animate and evaluate, a rank "
            "that is silent for this long loses its items to the other ranks. 0 switches both off, for all activities."
        ),
    )
    storage_mb_per_second: Annotated[Positive, Unit("MB/s")] = Field(
        default=500,
        description=(
            "Speed at which all processes together write to the folder of runs or read from it. Only --dry-run uses "
            "it, to estimate how long a save takes."
        ),
    )

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def gpus_by_kind(self) -> dict[str, int]:
        """GPUs per node that `sbatch_arguments` ask for, by the name of the option: `h100:8` or `gpu:a800:8` are 8."""
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
    """How often training reports. A run may continue with another value."""

    every_steps: Steps = Field(
        default=10,
        description=(
            "Training prints a line and writes the mean values to TensorBoard once in this many optimizer steps."
        ),
    )


class Shards(Section):
    """A folder of streaming shards, and optionally the place from which they are downloaded."""

    local: str = Field(
        description=(
            "Folder of the shards and their index.json, as prepare writes it. With `remote` it is the cache into which "
            "shards are downloaded: give each data set a folder of its own."
        ),
    )
    remote: str | None = Field(
        default=None,
        description=(
            "Folder or URL, such as `s3://bucket/train`, from which missing shards are fetched when they are read. "
            "Without it, all shards must be in `local`."
        ),
    )
