"""The typed recipe of each task, composed of sections, with all defaults.

This module imports neither torch nor the rest of the package, so that a login node can check a recipe in a moment.
Single values are checked here and in the sections; relations between values are in `rules.py`, files and line numbers
in `parse.py`.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dreamdance.recipe.annotator_section import DrivingAnnotators
from dreamdance.recipe.batch_arithmetic import accumulation_steps
from dreamdance.recipe.encode_recipe import EncodeRecipe
from dreamdance.recipe.every_recipe import TASK, Recipe
from dreamdance.recipe.metric_section import MetricSettings
from dreamdance.recipe.model_sections import (
    AnimationModel,
    AutoencoderSource,
    GeometryModel,
    ImageEncoderSource,
    NetworkSource,
)
from dreamdance.recipe.objective_sections import (
    AnimationObjectiveSettings,
    AnimationSampling,
    DomainWeights,
    GeometryObjectiveSettings,
    GeometrySampling,
)
from dreamdance.recipe.sections import (
    Clips,
    Logging,
    Name,
    NonNegative,
    Pixels,
    Positive,
    Shards,
    Steps,
    Unit,
)
from dreamdance.recipe.source_sections import DancersSource, VideosSource
from dreamdance.recipe.training_sections import Checkpoint, Optimizer, Recovery, Sharding, TrainingData, Validation

__all__ = [
    "AnimateRecipe",
    "AnimationModel",
    "AnimationObjectiveSettings",
    "AnimationSampling",
    "AnyRecipe",
    "AutoencoderSource",
    "Checkpoint",
    "DancersSource",
    "DomainWeights",
    "DrivingAnnotators",
    "EncodeRecipe",
    "EvaluateRecipe",
    "GeometryModel",
    "GeometryObjectiveSettings",
    "GeometrySampling",
    "ImageEncoderSource",
    "NetworkSource",
    "Optimizer",
    "PrepareRecipe",
    "Recipe",
    "Recovery",
    "Sharding",
    "Stage1Recipe",
    "Stage2Recipe",
    "TrainingData",
    "TrainingRecipe",
    "Validation",
    "VideosSource",
]

SAMPLING = "How validation draws its samples, with the pipeline that the export will have."


class TrainingRecipe(Recipe):
    """The keys that both stages' training shares."""

    max_steps: Steps = Field(
        description=(
            "Optimizer steps of the whole run. It may be raised to continue a finished run. The paper: 50,000 in "
            "stage 2; it states none for stage 1."
        ),
    )
    batch_size: Clips = Field(
        description=(
            "Clips per optimizer step, over all processes: micro_batch_size x accumulation x processes. A run keeps it "
            "on any number of processes that divides it. The paper: 8 in stage 2."
        ),
    )
    micro_batch_size: Clips = Field(
        description=(
            "Clips that one process computes at once. The rest of its share is accumulated. Lower it if memory runs "
            "out; the result stays equal to rounding."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description=(
            "Number format of networks and activations. With bf16 the master weights, the moments and the average stay "
            "in float32, and so does the autoencoder."
        ),
    )
    deterministic: bool | None = Field(
        default=None,
        description=(
            "Whether the same inputs always give the same bits; it makes GPUs slower. Without it: true on the CPU, "
            "false on GPUs."
        ),
    )
    max_nonfinite_steps: Annotated[NonNegative, Unit("steps")] = Field(
        default=3,
        description=(
            "Number of updates that may be skipped within recovery.spike_window_steps because a loss or the gradient "
            "was not finite. One more rolls the run back or ends it."
        ),
    )
    init_from: str | None = Field(
        default=None,
        description=(
            "Name of a finished run under --runs whose averaged weights this run starts from, such as stage1_domains. "
            "Without it, networks start from model."
        ),
    )
    init_step: Steps | None = Field(
        default=None,
        description=(
            "Step of the run in init_from whose export or checkpoint is loaded; then that run need not be finished."
        ),
    )
    data: TrainingData = Field(description="Shards to train and validate on, and the windows that are cut from them.")
    optimizer: Optimizer = Field(description="AdamW, its learning rate, and the moving average of the weights.")
    sharding: Sharding = Field(
        default=Sharding(),
        description="How DeepSpeed divides the training state over the processes.",
    )
    checkpoint: Checkpoint = Field(
        default=Checkpoint(),
        description="When checkpoints are saved and which of them stay.",
    )
    recovery: Recovery = Field(default=Recovery(), description="Reaction to loss spikes and non-finite losses.")
    validation: Validation = Field(default=Validation(), description="Losses and samples on held-out clips.")
    logging: Logging = Field(default=Logging(), description="How often training reports.")

    # The fields are those of the stages: declared here, they would change the order of the keys, and with it the digest
    # of the recipe that checkpoints hold.
    if TYPE_CHECKING:
        model: GeometryModel | AnimationModel
        objective: GeometryObjectiveSettings | AnimationObjectiveSettings
        sampling: GeometrySampling | AnimationSampling

    @property
    def accumulation_steps(self) -> int:
        """Micro batches per optimizer step on each process."""
        return accumulation_steps(self.batch_size, self.micro_batch_size, self.cluster.world_size)


class Stage1Recipe(TrainingRecipe):
    """One of the three steps that train the geometry diffusion model."""

    task: Literal["stage1"] = Field(description=TASK)
    train: Literal["image", "domains", "geometry", "temporal"] = Field(
        description=(
            "The training step, one of the paper's three: domains trains both UNets and the pose encoder on one domain "
            "per clip, geometry only the geometry attention, temporal only the temporal attention. Before them, where "
            "no Stable Diffusion fits: image trains a plain UNet on pictures, from their image embedding alone."
        ),
    )
    model: GeometryModel = Field(description="Networks of the geometry diffusion model.")
    objective: GeometryObjectiveSettings = Field(
        default=GeometryObjectiveSettings(),
        description="Noise and loss of the geometry diffusion model (Eq. 3).",
    )
    sampling: GeometrySampling = Field(default=GeometrySampling(), description=SAMPLING)


class Stage2Recipe(TrainingRecipe):
    """Training of the SVD-ControlNet and its cross-domain controller."""

    task: Literal["stage2"] = Field(description=TASK)
    model: AnimationModel = Field(
        description="Networks of the video diffusion model, its ControlNet and its controller.",
    )
    objective: AnimationObjectiveSettings = Field(
        default=AnimationObjectiveSettings(),
        description="Noise of the video diffusion model, and what training leaves out at random.",
    )
    sampling: AnimationSampling = Field(default=AnimationSampling(), description=SAMPLING)


class PrepareRecipe(Recipe):
    """Writes shards (C9) under `output`/train and `output`/validation, and a manifest of validation clips."""

    task: Literal["prepare"] = Field(description=TASK)
    output: str = Field(
        description=(
            "Folder for train, validation, manifest.jsonl and examples. Once it has a clip, other settings or "
            "other videos are refused."
        ),
    )
    dancers: DancersSource | None = Field(
        default=None,
        description="Procedural dancers as the source. A recipe has either dancers or videos.",
    )
    videos: VideosSource | None = Field(
        default=None,
        description="A folder of videos as the source. A recipe has either dancers or videos.",
    )
    num_workers: Annotated[Positive, Unit("processes")] = Field(
        default=2,
        description=(
            "Processes of each rank that write clips; 1 writes in the rank itself. It usually equals "
            "cluster.cpus_per_task."
        ),
    )
    clips_per_part: Clips = Field(
        default=32,
        description=(
            "Dancers in one part, which is the unit of work of a process. With videos each video is one part. Do not "
            "change it for an output that was begun."
        ),
    )
    shard_size_mib: Annotated[Positive, Unit("MiB")] = Field(
        default=64,
        description=(
            "Largest size of a shard file before compression. Raise it if the file system is slow with many "
            "files; lower it if shards are fetched from remote storage."
        ),
    )
    compression: Literal["none", "zstd"] | None = Field(
        default=None,
        description=(
            "Compression of whole shard files. A reader unpacks zstd files in its local folder, which needs room for "
            "both forms, and PNG and JPEG get no smaller. Without it: none, or what an existing output has."
        ),
    )
    rgb_format: Literal["png", "jpeg", "webp"] | None = Field(
        default=None,
        description=(
            "Codec of the pictures; maps are always stored as PNG, without loss. jpeg keeps colours at full resolution "
            "and is decoded fastest; webp is smaller, with colours at half resolution; png loses nothing. Without it: "
            "jpeg for videos, which are compressed already, and png for dancers."
        ),
    )
    rgb_quality: Annotated[int, Field(ge=1, le=100)] = Field(
        default=95,
        description="Quality of pictures stored as jpeg or webp. Not used with png.",
    )
    smaller_sizes: list[tuple[Pixels, Pixels]] = Field(
        default=[],
        description=(
            "Further sizes [width, height] at which all frames are stored too, such as [[256, 384]] for stage 1 beside "
            "512x768 for stage 2. Training reads the smallest that is large enough for its data.width and data.height. "
            "They are smaller than the stored frames and have the same aspect, to a pixel."
        ),
    )
    contact_sheets: bool = Field(
        default=True,
        description=(
            "Writes `output`/contact_sheets: a picture of every 100 clips with their maps and scores, and index.html, "
            "which plays clips. Delete that folder to have it made again."
        ),
    )
    page_clips: Annotated[NonNegative, Unit("clips")] = Field(
        default=100,
        description=(
            "Largest number of clips that the page of contact_sheets plays, spread evenly over all. Each costs as much "
            "time as decoding and encoding a small video, shared by all ranks."
        ),
    )


class AnimateRecipe(Recipe):
    """Offline inference over a manifest of reference pictures and pose sequences."""

    task: Literal["animate"] = Field(description=TASK)
    manifest: str = Field(
        description=(
            "JSON-lines file: each line is one pair of a reference picture and poses, or a driving video. Its paths "
            "start at its own folder. See recipes/animate.yaml."
        ),
    )
    output: str = Field(
        description=(
            "Folder of the results, one folder per entry. Entries that are done, and whose files are unchanged, are "
            "skipped."
        ),
    )
    geometry_from: str | None = Field(
        default=None,
        description=(
            "Run of stage 1 under --runs, whose newest export is taken, or the folder of an export. Without it, stage "
            "2 must read poses alone."
        ),
    )
    animation_from: str = Field(
        description="Run of stage 2 under --runs, whose newest export is taken, or the folder of an export.",
    )
    geometry_width: Pixels = Field(
        default=256,
        description=(
            "Width of stage 1's maps; use the width of its training. geometry_width x geometry_height must have the "
            "same aspect as width x height, up to 3 %."
        ),
    )
    geometry_height: Pixels = Field(
        default=384, description="Height of stage 1's maps; use the height of its training."
    )
    width: Pixels = Field(
        default=512,
        description=(
            "Width of the frames, a multiple of the autoencoder's factor (8); best the width of stage 2's training. "
            "Pictures of another aspect lose their margins evenly."
        ),
    )
    height: Pixels = Field(
        default=768,
        description=(
            "Height of the frames, a multiple of the autoencoder's factor (8); best the height of stage 2's training."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description="Number format of the networks, except the autoencoders, which stay in float32.",
    )
    geometry: GeometrySampling = Field(
        default=GeometrySampling(),
        description="Sampling of stage 1. Not used without geometry_from.",
    )
    animation: AnimationSampling = Field(default=AnimationSampling(), description="Sampling of stage 2.")
    annotators: DrivingAnnotators = Field(
        default=DrivingAnnotators(),
        description="How key points of driving videos are found. Not used where no entry names a `video`.",
    )


class EvaluateRecipe(Recipe):
    """The tables that compare results of an animate run, and trivial answers, with the truth of held-out clips."""

    task: Literal["evaluate"] = Field(description=TASK)
    results: str = Field(
        description=(
            "Folder of results, the `output` of an animate recipe. A result is compared with the clip of the same id."
        ),
    )
    compare: dict[Name, str] = Field(
        default={},
        description=(
            "Further folders of results by names of your choice, such as `{before: results/before}`: all are measured "
            "on the clips that every folder has, and the table and the page show them side by side."
        ),
    )
    truth: Shards = Field(
        description="Shards of the true clips; normals and depth are scored if the shards contain them.",
    )
    training_set: Shards | None = Field(
        default=None,
        description=(
            "Shards of the training set. The mean picture of up to 256 clips is one of the trivial answers; without "
            "this key, that row is missing."
        ),
    )
    split: str | None = Field(
        default=None,
        description="Text file with the ids of the clips to compare, one in each line. Without it: all of truth.",
    )
    reference_frame: NonNegative | None = Field(
        default=None,
        description=(
            "Number of the reference frame in the clip, for results that do not name theirs; 0 on TikTok's benchmark. "
            "Without it: the reference that prepare gives with the clip."
        ),
    )
    metrics: MetricSettings = Field(
        default=MetricSettings(), description="Metrics of pretrained networks, and further protocols."
    )


AnyRecipe = Annotated[
    Stage1Recipe | Stage2Recipe | PrepareRecipe | EncodeRecipe | AnimateRecipe | EvaluateRecipe,
    Field(discriminator="task"),
]
