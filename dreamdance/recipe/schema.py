"""The typed recipe: what one YAML file may say, section by section, with its defaults.

Knows nothing of torch or of the rest of the package, so that a login node can check a recipe in a moment.
Single values are checked here; relations between values are in `rules.py`, files and line numbers in `parse.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from dreamdance.recipe.sections import (
    Cluster,
    Fraction,
    Logging,
    NonNegative,
    Positive,
    PositiveFloat,
    Scale,
    Section,
    Shards,
    Verify,
)

Control = Literal["pose", "depth", "normal"]


# ------------------------------------------------------------------------------------------ shared by every task


class Recipe(Section):
    """What every recipe has: a task, a name unique over all recipes, a seed, a place to run.

    `tf32` lets GPUs round the factors of float32 products to 10 bits: what computes in float32 (the autoencoder, and
    all of it at `precision: fp32`) is several times faster, with errors of about 1e-3 instead of 1e-6.
    """

    task: str
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    seed: NonNegative = 0
    tf32: bool = False
    cluster: Cluster = Cluster()
    logging: Logging = Logging()


# ------------------------------------------------------------------------------------------ data


class TrainingData(Section):
    """Training windows cut from stored clips (C9).

    `verify` says how shards are checked. Sizes are compared at every start. `first_use` hashes a shard when it is
    opened for the first time, by whichever process that is, and notes it beside the index (in `.verified`), so that it
    is not read again before it changes. `hash` hashes all of them at every start, divided over all ranks. `size` hashes
    none: damage that keeps a file's size is found only where a picture's own checksum finds it.
    """

    train: Shards
    validation: Shards
    width: Positive
    height: Positive
    num_frames: Positive
    stride: tuple[Positive, Positive] = (1, 1)
    flip_probability: Fraction = 0.0
    num_workers: NonNegative = 2
    batch_timeout_seconds: Positive = 300
    verify: Verify = "first_use"


# ------------------------------------------------------------------------------------------ model parts


class NetworkSource(Section):
    """A diffusers network: weights from a folder in diffusers' layout, or a random one of constructor arguments."""

    path: str | None = None
    subfolder: str | None = None
    config: dict[str, Any] | None = None


class AutoencoderSource(Section):
    """The image autoencoder: from a folder, or the lossless patch autoencoder of the given patch size."""

    path: str | None = None
    subfolder: str | None = None
    patch_size: Positive | None = None


class ImageEncoderSource(Section):
    """CLIP's vision tower from a folder, or the small deterministic stand-in of the given width."""

    path: str | None = None
    subfolder: str | None = None
    stand_in_width: Positive | None = None


class GeometryModel(Section):
    """The mutually aligned geometry diffusion model (stage 1)."""

    unet: NetworkSource
    autoencoder: AutoencoderSource
    image_encoder: ImageEncoderSource
    pose_channels: list[Positive] = [16, 32, 96, 256]
    geometry_attention: bool = False
    temporal_attention: bool = False
    max_frames: Positive = 32
    attention_backend: str | None = None
    channels_last: bool = False


class AnimationModel(Section):
    """The cross-domain controlled video diffusion model (stage 2)."""

    unet: NetworkSource
    autoencoder: AutoencoderSource
    image_encoder: ImageEncoderSource
    controls: list[Control] = ["pose", "depth", "normal"]
    controller_channels: list[Positive] = [16, 32, 96, 320]
    controller_head_width: Positive = 64
    geometry_attention: bool = True
    unfreeze: Literal["none", "temporal", "decoder", "all"] = "none"
    attention_backend: str | None = None
    channels_last: bool = False


# ------------------------------------------------------------------------------------------ objectives


class DomainWeights(Section):
    """One number for each domain."""

    rgb: Scale = 1.0
    normal: Scale = 1.0
    depth: Scale = 1.0


class GeometryObjective(Section):
    """DDPM noise of stage 1 (Eq. 1, 3).

    `noise_offset` is drawn once per clip, domain and channel. `min_snr_gamma` bounds SNR, or SNR + 1 with
    `zero_terminal_snr`. `target_latents`: targets are a sample of the autoencoder's distribution, as its users' were,
    or its mode.
    """

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    num_train_timesteps: Positive = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.012
    zero_terminal_snr: bool = False
    noise_offset: Scale = 0.0
    min_snr_gamma: PositiveFloat | None = None
    target_latents: Literal["sample", "mode"] = "sample"
    reference_dropout: Fraction = 0.1
    domain_draw: DomainWeights = DomainWeights()
    domain_loss: DomainWeights = DomainWeights()


class AnimationObjective(Section):
    """EDM noise of stage 2 as SVD was trained, and robust conditioning.

    `target_latents`: targets are a sample of the autoencoder's distribution, as SVD's were, or its mode. The latents
    that SVD is conditioned on are always the mode.
    """

    sigma_log_mean: float = 0.7
    sigma_log_std: PositiveFloat = 1.6
    augmentation_log_mean: float = -3.0
    augmentation_log_std: PositiveFloat = 0.5
    latents_dropout: Fraction = 0.05
    embedding_dropout: Fraction = 0.05
    both_dropout: Fraction = 0.05
    frame_control_dropout: Fraction = 0.1
    modality_control_dropout: Fraction = 0.1
    motion_bucket: NonNegative = 127
    target_latents: Literal["sample", "mode"] = "sample"
    geometry_width: Positive = 256
    geometry_height: Positive = 384


# ------------------------------------------------------------------------------------------ training


class Optimizer(Section):
    """AdamW, its schedule, and the moving average of the weights."""

    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Scale = 0.01
    warmup_steps: NonNegative = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_fraction: Fraction = 0.3
    gradient_clipping: Scale = 1.0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999


class Sharding(Section):
    """How DeepSpeed divides the work, and what is computed twice to save memory."""

    zero_stage: Literal[0, 1, 2] = 2
    gradient_checkpointing: Literal[True, False, "keep_attention"] = True
    overlap_communication: bool = True
    reduce_bucket_elements: Positive = 100_000_000


class Checkpoint(Section):
    """When to save and what to keep."""

    every_steps: Positive = 1000
    keep_last: Annotated[int, Field(ge=2)] = 3
    keep_every_steps: Positive | None = None
    allow_changed: list[str] = []


class Recovery(Section):
    """When a loss leaps, or too many steps are skipped: those within `spike_window_steps` count together.

    A roll-back goes on with the next data, not with the same.
    """

    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    spike_window_steps: Annotated[int, Field(ge=10)] = 100
    max_spikes: NonNegative = 3
    max_roll_backs: NonNegative = 0


class Validation(Section):
    """Held-out loss and pictures made by the real pipeline."""

    loss_every_steps: Positive = 1000
    sample_every_steps: Positive = 5000
    num_loss_clips: Positive = 16
    num_sample_clips: Positive = 4
    num_frames: Positive = 1


class GeometrySampling(Section):
    """How stage 1 is sampled: DDIM, Eq. 6 guidance, overlapping windows."""

    num_inference_steps: Positive = 25
    guidance_scales: DomainWeights = DomainWeights(rgb=2.5, normal=1.0, depth=1.5)
    window_frames: Positive = 16
    window_overlap: NonNegative = 4
    sequential_guidance: bool = False
    decode_chunk_size: Positive = 8


class AnimationSampling(Section):
    """How stage 2 is sampled: Euler, constant guidance, overlapping windows. `guidance_scale` is SVD's w: 1 is none."""

    num_inference_steps: Positive = 25
    guidance_scale: Annotated[float, Field(ge=1.0)] = 2.5
    window_frames: Positive = 16
    window_overlap: NonNegative = 4
    sequential_guidance: bool = False
    decode_chunk_size: Positive = 8
    motion_bucket: NonNegative = 127
    noise_augmentation: Scale = 0.02


class TrainingRecipe(Recipe):
    """What both stages' training shares."""

    max_steps: Positive
    batch_size: Positive
    micro_batch_size: Positive
    precision: Literal["fp32", "bf16"] = "bf16"
    deterministic: bool | None = None
    max_nonfinite_steps: NonNegative = 3
    init_from: str | None = None
    init_step: Positive | None = None
    data: TrainingData
    optimizer: Optimizer
    sharding: Sharding = Sharding()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    validation: Validation = Validation()

    @property
    def accumulation_steps(self) -> int:
        """Micro batches per optimizer step on each rank (`rules.py` made sure that it divides)."""
        return self.batch_size // (self.micro_batch_size * self.cluster.world_size)


class Stage1Recipe(TrainingRecipe):
    """One of the three steps that train the geometry diffusion model."""

    task: Literal["stage1"]
    train: Literal["domains", "geometry", "temporal"]
    model: GeometryModel
    objective: GeometryObjective = GeometryObjective()
    sampling: GeometrySampling = GeometrySampling()


class Stage2Recipe(TrainingRecipe):
    """Training of the SVD-ControlNet."""

    task: Literal["stage2"]
    model: AnimationModel
    objective: AnimationObjective = AnimationObjective()
    sampling: AnimationSampling = AnimationSampling()


# ------------------------------------------------------------------------------------------ prepare, animate, evaluate


class DancersSource(Section):
    """Procedural dancers to render (C10). Training and validation identities and motions are disjoint by seed range."""

    num_train_clips: Positive
    num_validation_clips: Positive
    num_frames: Positive = 16
    width: Positive = 256
    height: Positive = 384
    fps: PositiveFloat = 8.0


class VideosSource(Section):
    """A folder of `<clip>.rgb.mp4` with `<clip>.pose.mp4` and optional `.normal.mp4`, `.depth.mp4`.

    `on_error` says what becomes of damaged videos. `stop`: the videos under way are finished, nothing of the damaged
    ones is written, and the run ends with an error that lists them; after their repair the same command goes on.
    `skip`: they are left out as a whole, listed at the end and in `output`/damaged_videos.tsv; the same command adds
    them when they have been repaired. All others stay in the split that they were drawn for, so that validation may be
    left without clips, which is a warning; training may not.
    """

    folder: str
    on_error: Literal["stop", "skip"] = "stop"
    crop: tuple[NonNegative, NonNegative, Positive, Positive] | None = None
    crop_letterbox: bool = True
    width: Positive | None = None
    height: Positive | None = None
    frame_stride: Positive = 1
    clip_frames: Positive = 64
    min_clip_frames: Positive = 16
    validation_fraction: Fraction = 0.05
    split_by: Literal["clip", "time"] = "clip"


class PrepareRecipe(Recipe):
    """Writes shards (C9) under `output`/train and `output`/validation, and a manifest of validation clips."""

    task: Literal["prepare"]
    output: str
    dancers: DancersSource | None = None
    videos: VideosSource | None = None
    num_workers: Positive = 2
    clips_per_part: Positive = 32
    shard_size_mib: Positive = 64
    compression: Literal["none", "zstd"] = "zstd"


class AnimateRecipe(Recipe):
    """Offline batch inference over a manifest."""

    task: Literal["animate"]
    manifest: str
    output: str
    geometry_from: str | None = None
    animation_from: str
    geometry_width: Positive = 256
    geometry_height: Positive = 384
    width: Positive = 512
    height: Positive = 768
    precision: Literal["fp32", "bf16"] = "bf16"
    geometry: GeometrySampling = GeometrySampling()
    animation: AnimationSampling = AnimationSampling()


class EvaluateRecipe(Recipe):
    """The tables: results of an animate run against the truth of held-out clips, beside the trivial answers."""

    task: Literal["evaluate"]
    results: str
    truth: Shards
    training_set: Shards | None = None


AnyRecipe = Annotated[
    Stage1Recipe | Stage2Recipe | PrepareRecipe | AnimateRecipe | EvaluateRecipe, Field(discriminator="task")
]
