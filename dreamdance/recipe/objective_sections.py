"""The sections about noise: the noise and the loss of training, and the sampling that removes noise."""

from typing import Annotated, Literal

from pydantic import Field

from dreamdance.modalities import DOMAINS
from dreamdance.recipe.model_sections import Control
from dreamdance.recipe.sections import (
    Fraction,
    Frames,
    NonNegative,
    Pixels,
    Positive,
    PositiveFloat,
    Scale,
    Section,
    Unit,
)


class DomainWeights(Section):
    """One number for each domain, in the order rgb, normal, depth. A domain that the section leaves out has 1.0."""

    rgb: Scale = Field(
        default=1.0,
        description="Number for the picture, the first of the three domains; raise it if pictures matter most.",
    )
    normal: Scale = Field(
        default=1.0,
        description="Number for the normal map, the second of the three domains; raise it if normals are the weakest.",
    )
    depth: Scale = Field(
        default=1.0,
        description="Number for the depth map, the last of the three domains; raise it if depths are the weakest.",
    )

    @property
    def in_order(self) -> tuple[float, ...]:
        """The numbers in the order of the domains (C1)."""
        return tuple(getattr(self, domain) for domain in DOMAINS)


RegionWeight = Annotated[float, Field(ge=1.0)]


class RegionWeights(Section):
    """Weights of face and hands in the loss, relative to the rest of a frame, which has 1.

    A region is the box around its certain key points with a margin; its weight is nearer to 1 the less certain they
    are. The weights of a clip are scaled to a mean of 1, so that clips count alike, the learning rate keeps its
    meaning, and a close-up, which shows little but a face, is not weighed up. The held-out loss has no such weights.
    """

    face: RegionWeight = Field(
        default=1.0,
        description="Weight of the box of the face. Raise it (2 to 5) if faces of full bodies stay blurred.",
    )
    hands: RegionWeight = Field(
        default=1.0,
        description="Weight of the box of each hand. Raise it (2 to 5) if fingers melt, as MimicMotion does.",
    )

    @property
    def is_active(self) -> bool:
        """Whether any region weighs more than the rest."""
        return (self.face, self.hands) != (1.0, 1.0)


class GeometryObjectiveSettings(Section):
    """The DDPM noise and the loss of stage 1 (Eq. 1, 3). The defaults of the schedule are Stable Diffusion 1.5's."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = Field(
        default="epsilon",
        description=(
            "What the network predicts: the noise (Eq. 1 and 3, as Stable Diffusion 1.5), the velocity, or the clean "
            "latents. The second set of recipes (stage1_*_v) takes v_prediction, also with Stable Diffusion's weights."
        ),
    )
    num_train_timesteps: Positive = Field(
        default=1000,
        description="Number of noise levels. Training draws one of them per clip, with equal probability.",
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        default="scaled_linear",
        description=(
            "How the noise variance grows over the timesteps, by diffusers' names. squaredcos_cap_v2 does not read "
            "beta_start and beta_end."
        ),
    )
    beta_start: PositiveFloat = Field(
        default=0.00085,
        description=(
            "Noise variance (beta) of the first timestep. It must be below beta_end. Change both only together with a "
            "base model that was trained with other values; these are Stable Diffusion's."
        ),
    )
    beta_end: PositiveFloat = Field(
        default=0.012, description="Noise variance (beta) of the last timestep. See beta_start for when to change it."
    )
    zero_terminal_snr: bool = Field(
        default=False,
        description=(
            "Rescales the schedule so that the last timestep is pure noise, where sampling begins. It needs "
            "prediction_type v_prediction or sample."
        ),
    )
    noise_offset: Scale = Field(
        default=0.0,
        description=(
            "Strength of noise that is constant over a picture, added to the noise; drawn once per clip, domain and "
            "channel. 0 is Eq. 3. Raise it to 0.05, as Moore and Champ do, if flat maps tend to mid-grey."
        ),
    )
    min_snr_gamma: PositiveFloat | None = Field(
        default=None,
        description=(
            "Upper bound of the signal-to-noise ratio (SNR) that weighs the loss of a timestep (arXiv 2303.09556, "
            "there 5, as in stage1_*_v); of SNR + 1 with zero_terminal_snr. Without it all timesteps weigh the same, "
            "as in Eq. 3."
        ),
    )
    target_latents: Literal["sample", "mode"] = Field(
        default="sample",
        description=(
            "The latents to denoise: a sample of the autoencoder's distribution, as Stable Diffusion was trained, or "
            "its mode."
        ),
    )
    reference_dropout: Fraction = Field(
        default=0.1,
        description=(
            "Probability that a clip trains without its reference (zero latents, zero embedding). Guidance needs this "
            "(Eq. 6)."
        ),
    )
    region_weights: RegionWeights = Field(
        default=RegionWeights(),
        description="Weights of face and hands in the loss of each domain, in clips with key points.",
    )
    domain_draw: DomainWeights = Field(
        default=DomainWeights(),
        description=(
            "In `train: domains` each clip trains one domain, drawn with these relative probabilities. At least one is "
            "above 0. Not used in the other steps."
        ),
    )
    domain_loss: DomainWeights = Field(
        default=DomainWeights(),
        description=(
            "Relative weights of the domains in the loss of `train: geometry` and `train: temporal`; they are scaled "
            "to a sum of 1. At least one is above 0."
        ),
    )


class AnimationObjectiveSettings(Section):
    """The EDM noise of stage 2, as Stable Video Diffusion (SVD) was trained, and what training leaves out at random."""

    prediction_type: Literal["v_prediction", "sample", "blend"] = Field(
        default="v_prediction",
        description=(
            "What the video model predicts: the velocity, with EDM's preconditioning, as SVD does; the clean latents; "
            "or both them and, in one more output channel, which share of the reference's latents stays. It is a "
            "property of the base model: take another than SVD's only for one that was trained so, such as the "
            "demo's. A small model that predicts velocities leaves grain; one that predicts samples blurs what stands "
            "still. What stays keeps the noise of the reference (augmentation_log_mean, and noise_augmentation in "
            "sampling): let it be small."
        ),
    )
    sigma_log_mean: float = Field(
        default=0.7,
        description=(
            "Mean of the logarithm of the noise level sigma, drawn once per clip. Higher values train more on strong "
            "noise."
        ),
    )
    sigma_log_std: PositiveFloat = Field(
        default=1.6,
        description=(
            "Standard deviation of the logarithm of the noise level sigma. Lower values train on fewer noise levels; "
            "sampling needs all of them, so keep the base model's value."
        ),
    )
    augmentation_log_mean: float = Field(
        default=-3.0,
        description=(
            "Mean of the logarithm of the strength of the noise that is added to the reference picture, for pixels in "
            "[-1, 1]."
        ),
    )
    augmentation_log_std: PositiveFloat = Field(
        default=0.5,
        description="Standard deviation of the logarithm of the strength of that noise (see augmentation_log_mean).",
    )
    latents_dropout: Fraction = Field(
        default=0.05,
        description=(
            "Probability that a clip trains without the reference's latents alone. The three dropouts of the reference "
            "exclude one another: their sum is at most 1."
        ),
    )
    embedding_dropout: Fraction = Field(
        default=0.05,
        description="Probability that a clip trains without the reference's image embedding alone.",
    )
    both_dropout: Fraction = Field(
        default=0.05,
        description=(
            "Probability that a clip trains without both latents and embedding of the reference, as in the "
            "unconditional pass of guidance."
        ),
    )
    frame_control_dropout: Fraction = Field(
        default=0.1,
        description=(
            "Probability that one frame of one control map is replaced by zeros (robust conditioning). Below 1. The "
            "paper states no value."
        ),
    )
    modality_control_dropout: Fraction = Field(
        default=0.1,
        description=(
            "Probability that one control map is replaced by zeros in all frames of a clip. Below 1. A clip never "
            "loses all maps."
        ),
    )
    region_weights: RegionWeights = Field(
        default=RegionWeights(),
        description="Weights of face and hands in the loss of the frames, in clips with key points.",
    )
    reference_first: bool = Field(
        default=True,
        description=(
            "Whether the reference, with its own pose, depth and normal, is the first of the data.num_frames frames of "
            "each window, in training and inference; there it is not part of the result. SVD was trained on videos "
            "that begin with the picture it is given. Then `animate` needs the reference's pose. false: as the paper "
            "reads, which is silent; for stored references without maps."
        ),
    )
    fps: Annotated[PositiveFloat, Unit("frames/s")] | Literal["clip"] = Field(
        default=7.0,
        description=(
            "Frame rate that conditions SVD, in training and inference, whatever that of the clips. SVD 1.1 was tuned "
            "at a constant 6, its number for 7. clip: the window's own rate, for SVD 1.0 and XT."
        ),
    )
    motion_bucket: NonNegative = Field(
        default=127,
        description=(
            "SVD's motion number, the same for all clips in training. SVD 1.1 was tuned at 127; keep "
            "sampling.motion_bucket equal."
        ),
    )
    target_latents: Literal["sample", "mode"] = Field(
        default="sample",
        description=(
            "The latents to denoise: a sample of the autoencoder's distribution, as SVD was trained, or its mode. The "
            "latents that condition SVD are always the mode."
        ),
    )
    geometry_width: Pixels = Field(
        default=256,
        description=(
            "Width to which normal and depth maps are reduced and enlarged again, so that they are as blurred as stage "
            "1 delivers them. Set it to stage 1's data.width."
        ),
    )
    geometry_height: Pixels = Field(
        default=384,
        description=(
            "Height to which normal and depth maps are reduced and enlarged again. Set it to stage 1's data.height."
        ),
    )


class GeometrySampling(Section):
    """How stage 1 is sampled: DDIM, the guidance of Eq. 6, overlapping windows."""

    num_inference_steps: Positive = Field(
        default=25,
        description="Number of DDIM steps. More steps take longer in proportion; raise it if samples lack detail.",
    )
    guidance_scales: DomainWeights = Field(
        default=DomainWeights(rgb=2.5, normal=1.0, depth=1.5),
        description=(
            "Guidance scale s of each domain (Eq. 6): `e + s (e - e_uncond)`, so that 0 is no guidance. Give all "
            "three: a scale that the section leaves out is 1.0. Three zeros save the unconditional pass."
        ),
    )
    window_frames: Frames = Field(
        default=16,
        description=(
            "Frames that are denoised together; longer videos are covered by overlapping windows. With temporal "
            "attention no more than stage 1 was trained on (data.num_frames)."
        ),
    )
    window_overlap: Annotated[NonNegative, Unit("frames")] = Field(
        default=4,
        description=(
            "Frames that neighbouring windows share, where their predictions are averaged. Below window_frames."
        ),
    )
    sequential_guidance: bool = Field(
        default=False,
        description=(
            "Runs the conditional and the unconditional prediction one after the other, each with half the batch: it "
            "takes less memory."
        ),
    )
    decode_chunk_size: Positive = Field(
        default=8,
        description=(
            "Number of pictures that the autoencoder decodes, and the pose encoder encodes, at once. Lower it if "
            "memory runs out."
        ),
    )


class AnimationSampling(Section):
    """How stage 2 is sampled: Euler steps, constant guidance, overlapping windows."""

    num_inference_steps: Positive = Field(
        default=25,
        description="Number of Euler steps. More steps take longer in proportion.",
    )
    guidance_scale: Annotated[float, Field(ge=1.0)] = Field(
        default=2.5,
        description=(
            "Guidance weight w, the same for all frames: `e_uncond + w (e - e_uncond)`. 1 is no guidance and saves the "
            "unconditional pass."
        ),
    )
    conditioning_scale: Scale = Field(
        default=1.0,
        description=(
            "Factor of the ControlNet's residuals: below 1 the maps guide less and the video model decides more, 0 "
            "ignores them. Training has 1."
        ),
    )
    control_scales: dict[Control, Scale] = Field(
        default={},
        description=(
            "Factors of single maps of model.controls in the controller, before the mean over the maps, such as "
            "`{normal: 0.5}` for poor normals. A map that is left out has 1, as in training. The maps have attended "
            "to one another before, so 0 does not remove all that a map says."
        ),
    )
    window_frames: Frames = Field(
        default=16,
        description=(
            "Frames that are denoised together, with the reference if objective.reference_first; longer videos are "
            "covered by overlapping windows. More than stage 2 was trained on (data.num_frames) is possible, but "
            "frames may drift."
        ),
    )
    window_overlap: Annotated[NonNegative, Unit("frames")] = Field(
        default=4,
        description=(
            "Frames that neighbouring windows share, without the reference; their predictions are averaged there. "
            "Below window_frames, and below window_frames - 1 with objective.reference_first."
        ),
    )
    repeated_noise: bool = Field(
        default=False,
        description=(
            "Whether all windows begin with the same noises, repeated over the video, as in MimicMotion: it may keep "
            "windows alike, and may show as a repetition. false: each frame has its own noise."
        ),
    )
    sequential_guidance: bool = Field(
        default=False,
        description=(
            "Runs the conditional and the unconditional prediction one after the other, each with half the batch, "
            "which takes less memory."
        ),
    )
    decode_chunk_size: Positive = Field(
        default=8,
        description=(
            "Number of frames that the autoencoder decodes, and the controller encodes, at once. Lower it if memory "
            "runs out."
        ),
    )
    motion_bucket: NonNegative = Field(
        default=127,
        description=(
            "SVD's motion number: higher values ask for more motion. Keep the value of training "
            "(objective.motion_bucket)."
        ),
    )
    noise_augmentation: Scale = Field(
        default=0.02,
        description=(
            "Strength of the noise that is added to the reference picture, for pixels in [-1, 1]. 0.02 is SVD's own "
            "value."
        ),
    )
