"""The sections about the course of training: data, optimizer, sharding, checkpoints, recovery, validation."""

from typing import Annotated, Literal

from pydantic import Field

from dreamdance.recipe.filter_section import ScoreFilters
from dreamdance.recipe.sections import (
    Clips,
    Fraction,
    Frames,
    NonNegative,
    Pixels,
    Positive,
    PositiveFloat,
    Scale,
    Seconds,
    Section,
    Shards,
    Steps,
    Unit,
    Verify,
)

CropShare = Annotated[float, Field(gt=0.0, le=1.0)]


class TrainingData(Section):
    """Training windows that are cut from stored clips (C9)."""

    train: Shards = Field(description="Shards to train on; prepare writes them to `output`/train.")
    validation: Shards = Field(
        description=(
            "Shards of held-out clips for losses and samples; prepare writes them to `output`/validation. Not the "
            "folder of data.train."
        ),
    )
    latents: Shards | None = Field(
        default=None,
        description=(
            "Latents of data.train that a recipe with `task: encode` stored; training then encodes no frames. Refused "
            "if other shards, networks or sizes were encoded. Validation always encodes its pictures."
        ),
    )
    maps: Shards | None = Field(
        default=None,
        description=(
            "Normal and depth maps of data.train that a trained stage 1 made (`task: encode` with geometry_from). "
            "Stage 2 then trains on these, with the errors that it gets in `animate`. Without it, on the true maps, "
            "blurred to stage 1's size. Refused if they are of other shards or sizes. Validation reads true maps."
        ),
    )
    width: Pixels = Field(
        description=(
            "Width of the frames, a multiple of the autoencoder's factor times the UNet's reductions: of 64 for Stable "
            "Diffusion and SVD. The paper: 256 in stage 1, 512 in stage 2."
        ),
    )
    height: Pixels = Field(
        description=(
            "Height of the frames, a multiple of the same number as the width. The paper: 384 in stage 1, 768 in stage "
            "2."
        ),
    )
    num_frames: Frames = Field(
        description=(
            "Frames of a training window; with objective.reference_first of stage 2 the reference is one of them. A "
            "shorter clip is an error. The paper: 16 in stage 2; in stage 1 it states none, and single frames serve "
            "the first two steps."
        ),
    )
    stride: Annotated[tuple[Positive, Positive], Unit("frames")] = Field(
        default=(1, 1),
        description=(
            "Smallest and largest distance between the frames of a window, drawn once per window; smaller if the clip "
            "is too short. [1, 4] lets one window show more motion."
        ),
    )
    flip_probability: Fraction = Field(
        default=0.0,
        description=(
            "Probability that a window is mirrored. Only clips with key points are mirrored: a pose that is only drawn "
            "cannot be, because its colours distinguish left and right."
        ),
    )
    crop_scale: tuple[CropShare, CropShare] = Field(
        default=(1.0, 1.0),
        description=(
            "Smallest and largest share of a frame's area that a random crop keeps, drawn once per window and once "
            "more for its reference; the aspect stays, and the crop is enlarged. [0.9, 1.0] is what Moore and Champ "
            "take, so that a person is not always framed alike. [1, 1] crops nothing. Not with data.latents or "
            "data.maps."
        ),
    )
    reference_margin: Annotated[NonNegative, Unit("frames")] = Field(
        default=30,
        description=(
            "Smallest distance of the reference from the window, in frames of the source video; less if the video is "
            "too short. It needs clips that are stored with references (videos.references); of other clips, the "
            "reference is any frame."
        ),
    )
    filters: ScoreFilters = Field(
        default=ScoreFilters(),
        description=(
            "Which clips training uses, by the scores that prepare stored: `{motion: [0.01, 0.3], people: 1}`. Without "
            "it, all. --dry-run shows the scores and what would be dropped. Held-out clips are never filtered, so that "
            "runs with other filters are measured on the same clips."
        ),
    )
    mixed_backgrounds: Literal["refuse", "accept"] = Field(
        default="refuse",
        description=(
            "Whether a training set may mix clips whose depth and normals are of the person alone, before a flat wall "
            "(stored as `background: none`), with clips whose maps show the whole frame. Accept it only if you know "
            "why. A run may continue with another value."
        ),
    )
    num_workers: NonNegative = Field(
        default=2,
        description=(
            "Processes of each rank that read and decode windows ahead. 0 reads in the rank itself. Raise it, with "
            "cluster.cpus_per_task, if training waits for data."
        ),
    )
    batch_timeout_seconds: Seconds = Field(
        default=300,
        description="How long a rank waits for the next batch of its reading processes before it ends with an error.",
    )
    verify: Verify = Field(
        default="first_use",
        description=(
            "How shards are checked; sizes are compared at every start, and each frame with its checksum when it is "
            "read. first_use: each shard of schema 1, which has no checksums of heads, is hashed when a process first "
            "opens it, and noted beside the index (`.verified`) until the file changes. hash: the ranks share the "
            "hashing of all shards at every start. size: no shard is hashed. A run may continue with another value."
        ),
    )


class Optimizer(Section):
    """AdamW, the schedule of its learning rate, and the moving average of the weights."""

    only: list[str] = Field(
        default=[],
        description=(
            "Patterns of the parameters that train, such as [controller.*, controlnet.*zero_convolution*] (`*` stands "
            "for any text); the others of the step stay as they are. Layers before zero convolutions get no gradient "
            "unless those train as well. Empty: all that the step trains. For experiments, and for machines that "
            "cannot hold the optimizer's state of all."
        ),
    )
    lr: PositiveFloat = Field(
        description=(
            "Highest learning rate of AdamW. The paper states none. The full recipes take 5e-5 where only geometry "
            "attention trains, 1e-4 where only temporal attention does, and 1e-5 elsewhere; the small networks of "
            "the demo take 1e-3 to 5e-3."
        )
    )
    lr_scales: dict[str, PositiveFloat] = Field(
        default={},
        description=(
            "Factors on the learning rate of networks or parts of networks, by name: `{unet.domain_embedder: 10}` is "
            "Wonder3D's. A name stands for all that lies below it, and the longest counts. Raise what begins from "
            "random weights, lower what must stay near its base. A name that does not train is refused with a list."
        ),
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999),
        description=(
            "AdamW's decay rates of the first and the second moment, each at least 0 and below 1. Lower the "
            "second (0.95) if the loss spikes after rare large gradients."
        ),
    )
    eps: PositiveFloat = Field(
        default=1e-8,
        description=(
            "Number that AdamW adds to the denominator of an update, against division by zero. Raise it (1e-6) "
            "if single parameters with tiny gradients make the loss jump."
        ),
    )
    weight_decay: Scale = Field(
        default=0.01,
        description=(
            "AdamW's decoupled weight decay, for all trained parameters. Raise it if the validation loss rises "
            "while the training loss falls."
        ),
    )
    warmup_steps: Annotated[NonNegative, Unit("steps")] = Field(
        default=0,
        description="Optimizer steps over which the learning rate rises linearly to `lr`. At most max_steps.",
    )
    decay: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description=(
            "Course of the learning rate over the last decay_fraction of all steps: it stays, or falls to 0 linearly "
            "or as a cosine."
        ),
    )
    decay_fraction: Fraction = Field(
        default=0.3,
        description=(
            "Share of max_steps, at the end, over which the learning rate falls. Not used with `decay: constant`. "
            "Raising max_steps moves the beginning."
        ),
    )
    gradient_clipping: Scale = Field(
        default=1.0,
        description="Largest norm of the whole gradient; a longer one is scaled down to it. 0 does not clip.",
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.9999,
        description=(
            "Decay d of the moving average of the weights: average = d average + (1 - d) weights, at each step. After "
            "n steps d is at most (1 + n) / (10 + n). Validation and exports use the average. Lower it for short runs; "
            "0 makes the average equal to the weights, which saves its memory (4 bytes for each parameter that trains)."
        ),
    )


class Sharding(Section):
    """How DeepSpeed divides the training state over the processes, and what is computed twice to save memory."""

    zero_stage: Literal[0, 1, 2] = Field(
        default=2,
        description=(
            "What ZeRO divides over the processes: 0 nothing (precision fp32 only), 1 the optimizer state, 2 also the "
            "gradients. 1 takes less host time for each trainable tensor, and 4 bytes for each trainable number."
        ),
    )
    gradient_checkpointing: Literal["auto", "none", "blocks", "keep_attention", "transformers", True, False] = Field(
        default="auto",
        description=(
            "Which activations are computed again in the backward pass, which saves memory, takes time and changes no "
            "bit. none: no activations. blocks (or true): those inside of blocks, except SVD's temporal ones. "
            "keep_attention: the same, but not attention. transformers: those of whole transformers too, for the least "
            "memory. false is none. auto takes the first of none, blocks and transformers that fits in the GPUs by the "
            "plan of --dry-run, and blocks without a GPU."
        ),
    )
    overlap_communication: bool = Field(
        default=True,
        description=(
            "Sends gradients during the backward pass. It needs a second bucket, and is off if training is "
            "deterministic."
        ),
    )
    reduce_bucket_elements: Annotated[Positive, Unit("elements")] = Field(
        default=100_000_000,
        description=(
            "Gradient elements that are sent together, 2 or 4 bytes each. Smaller buckets take less memory, larger "
            "ones fewer messages."
        ),
    )

    @property
    def checkpointing_level(self) -> Literal["none", "blocks", "keep_attention", "transformers"]:
        """The level of `gradient_checkpointing`; "blocks" for an `auto` that nothing has resolved."""
        match self.gradient_checkpointing:
            case False:
                return "none"
            case True | "auto":
                return "blocks"
            case level:
                return level


class Checkpoint(Section):
    """When the run saves its state, which checkpoints stay, and which changes of the recipe it accepts."""

    every_steps: Steps = Field(
        default=1000,
        description=(
            "The run saves a checkpoint once in this many optimizer steps, and at the last one. A job that is asked to "
            "stop also saves."
        ),
    )
    keep_last: Annotated[int, Field(ge=2), Unit("checkpoints")] = Field(
        default=3,
        description=(
            "Number of newest sound checkpoints that stay; older ones are deleted once a new one has been read back, "
            "except the one that this start resumed from. Lower it if disk space is short."
        ),
    )
    keep_every_steps: Steps | None = Field(
        default=None,
        description=(
            "Checkpoints at multiples of this step stay for good. A multiple of every_steps. Without it, only the "
            "newest stay."
        ),
    )
    copy_in_memory: bool = Field(
        default=True,
        description=(
            "Whether a save copies the state in host memory first (16 bytes for each parameter that trains, divided "
            "among the ranks), so that training continues while the files are written. Without it, training waits for "
            "the files. Set it to false where host memory is short."
        ),
    )
    allow_changed: list[str] = Field(
        default=[],
        description=(
            "Dotted keys in which this recipe may differ from an existing run's recipe, such as [optimizer.lr]; "
            "a section permits all its keys. Without it, a changed recipe is refused (exit code 3)."
        ),
    )


class Recovery(Section):
    """Reaction to loss spikes and non-finite losses: the update is skipped; too many end the run or roll it back."""

    spike_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        default=None,
        description=(
            "An update is skipped if its loss is above this many times the median of the recent steps (10 at least). "
            "Without it, no finite loss is skipped."
        ),
    )
    spike_window_steps: Annotated[int, Field(ge=10), Unit("steps")] = Field(
        default=100,
        description="Recent optimizer steps that the median covers, and within which skipped updates count together.",
    )
    max_spikes: NonNegative = Field(
        default=3,
        description=(
            "Number of updates within the window that may be skipped because of a loss spike. One more rolls the run "
            "back or ends it."
        ),
    )
    max_roll_backs: NonNegative = Field(
        default=0,
        description=(
            "How often the run may return to its newest checkpoint after too many skipped updates. It continues with "
            "the next data, not with the same data. 0 ends the run instead."
        ),
    )


class Validation(Section):
    """The loss on held-out clips, and samples that the real pipeline makes of them, with the averaged weights."""

    loss_every_steps: Steps = Field(
        default=1000,
        description="The loss on held-out clips is computed once in this many optimizer steps, and at the last one.",
    )
    sample_every_steps: Steps = Field(
        default=5000,
        description=(
            "Samples are drawn once in this many optimizer steps, and at the last one. Sampling is much slower than "
            "the loss."
        ),
    )
    num_loss_clips: Clips = Field(
        default=16,
        description=(
            "Number of held-out clips for the loss: the first ones, always with the same window and noise. Ranks "
            "divide them."
        ),
    )
    noise_levels: Positive = Field(
        default=8,
        description=(
            "Number of noise levels (timesteps in stage 1, sigmas in stage 2) at which each of these clips is "
            "measured: the same quantiles of training's distribution for all clips, so that the loss does not depend "
            "on drawn levels. TensorBoard shows the loss of each level. The cost: one forward pass per clip and level."
        ),
    )
    num_sample_clips: Clips = Field(
        default=4,
        description=(
            "Number of held-out clips for samples: the first ones. Ranks divide them. TensorBoard shows their "
            "distance from the truth: L1 and PSNR of pictures, L1 of depth, degrees of normals."
        ),
    )
    num_cross_clips: Annotated[NonNegative, Unit("clips")] = Field(
        default=1,
        description=(
            "Number of these clips that are sampled once more, with the reference of the next clip of another video: "
            "the result must show the other person in this clip's motion. A network that copies the person of the "
            "poses shows it here alone. 0 samples none."
        ),
    )
    num_frames: Frames = Field(
        default=1,
        description=(
            "Frames of each sample. The loss has data.num_frames instead. With temporal attention a sample's windows "
            "are no longer than data.num_frames."
        ),
    )
