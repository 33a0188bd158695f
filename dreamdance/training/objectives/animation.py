"""The objective of stage 2: SVD's own denoising objective, with the cross-domain controller's guidance (Eq. 7).

The objective holds all networks, trained and frozen. This module does not know ranks, optimizers or checkpoints. Every
random draw about a clip is keyed by the clip (C8).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNetSpatioTemporalConditionModel
from einops import rearrange, repeat
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.diffusion.condition_dropout import blank_controls, draw_kept_controls, drop_conditions
from dreamdance.diffusion.noise import (
    draw_log_normal,
    draw_noise,
    edm_denoised,
    edm_preconditioning,
    edm_weight,
    log_normal_at,
    make_svd_scheduler,
)
from dreamdance.errors import UserError
from dreamdance.media.transforms import pass_through
from dreamdance.modalities import DOMAINS, MODALITIES
from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel
from dreamdance.models.autoencoding import Autoencoder, encode_latents, latent_shape
from dreamdance.models.image_embedding import ImageEncoder, embed_prepared, prepare_images
from dreamdance.models.svd_unet import is_encoder_half_frozen, run_svd_unet
from dreamdance.pipelines import AnimationPipeline
from dreamdance.recipe import schema
from dreamdance.training.objectives.output import (
    EncodedClips,
    Objective,
    ObjectiveOutput,
    PreparedBatch,
    no_grad_if_frozen,
)
from dreamdance.training.objectives.region_weights import region_weights


@dataclass(frozen=True)
class DenoiserInput:
    """Inputs of SVD's UNet and its ControlNet, at one noise level per clip.

    Attributes:
        sample: `b f 2c h w`, preconditioned noisy latents, then the conditioning latents.
        timestep: `b`, ln(sigma) / 4.
        embeddings: `b 1 c`, the image embedding of the clean reference.
        added_time_ids: `b 3`, frames per second - 1, motion bucket, noise augmentation.
        control_features: `(b f) c h w`, the controller's output.
        conditioning: `b f c h w` float32, the conditioning latents in full precision, not scaled.
    """

    sample: Tensor
    timestep: Tensor
    embeddings: Tensor
    added_time_ids: Tensor
    control_features: Tensor
    conditioning: Tensor


class AnimationObjective(Objective):
    """Denoising of videos under EDM noise with robust conditioning.

    With `settings.reference_first` frame 0 of each clip is the reference. It stays a target like the other frames, as
    in MimicMotion, StableAnimator and ControlNeXt: in sampling its noisy latents are denoised with those of the others,
    which attend to it, so the networks must denoise it too.

    Args:
        unet: SVD's denoiser.
        controlnet: the trainable copy of its encoder half.
        controller: encodes the control maps.
        vae: the frozen video autoencoder.
        image_encoder: the frozen CLIP vision tower, or its stand-in.
        settings: the recipe's `objective` section.
    """

    unet: UNetSpatioTemporalConditionModel
    controlnet: SpatioTemporalControlNetModel
    controller: CrossDomainControllerModel

    def __init__(
        self,
        unet: UNetSpatioTemporalConditionModel,
        controlnet: SpatioTemporalControlNetModel,
        controller: CrossDomainControllerModel,
        vae: Autoencoder,
        image_encoder: ImageEncoder,
        *,
        settings: schema.AnimationObjectiveSettings,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet
        self.controller = controller
        self.vae = vae
        self.image_encoder = image_encoder
        self.settings = settings

    def make_pipeline(self) -> AnimationPipeline:
        """The pipeline that samples with the same networks (shared, not copied)."""
        return AnimationPipeline(
            unet=self.unet,
            controlnet=self.controlnet,
            controller=self.controller,
            vae=self.vae,
            image_encoder=self.image_encoder,
            scheduler=make_svd_scheduler(),
        )

    def describe_noise(self, quantile: float) -> str:
        """See `Objective`."""
        return f"sigma_{self._sigma_at(quantile):.3g}"

    def _sigma_at(self, quantile: float) -> float:
        return log_normal_at(quantile, self.settings.sigma_log_mean, self.settings.sigma_log_std)

    def draw(self, batch: ClipBatch, *, noise_quantile: float | None = None) -> dict[str, Tensor]:
        """See `Objective`: noise, sigmas, strengths and noise of the reference, and what is kept of the conditions."""
        keys, settings, num_frames = batch.keys.tolist(), self.settings, batch.pose.shape[1]
        shape = (num_frames, *latent_shape(self.vae, batch.pose))
        mean, std = settings.augmentation_log_mean, settings.augmentation_log_std
        draws = {
            "noise": draw_noise(keys, shape),
            "sigmas": self._choose_sigmas(keys, noise_quantile),
            "augmentation": draw_log_normal(keys, mean, std, purpose="augmentation"),
            "augmentation noise": draw_noise(keys, batch.reference.shape[1:], purpose="augmentation noise"),
            **self.draw_target_noise(keys, shape, settings.target_latents),
        }
        if self.training:
            dropped = drop_conditions(
                keys,
                latents=settings.latents_dropout,
                embedding=settings.embedding_dropout,
                both=settings.both_dropout,
            )
            draws |= {"kept latents": ~dropped.latents, "kept embedding": ~dropped.embedding}
            rates = {
                "frame_rate": settings.frame_control_dropout,
                "modality_rate": settings.modality_control_dropout,
            }
            kept = draw_kept_controls(keys, self.controller.config.controls, num_frames, **rates)
            draws |= {f"kept {name}": frames for name, frames in kept.items()}
        return draws

    def _choose_sigmas(self, keys: list[list[int]], quantile: float | None) -> Tensor:
        """`b` sigmas, on the CPU: drawn by the keys, or the one at a quantile."""
        if quantile is None:
            mean, std = self.settings.sigma_log_mean, self.settings.sigma_log_std
            return draw_log_normal(keys, mean, std, purpose="sigma")
        return torch.full((len(keys),), self._sigma_at(quantile))

    def resize_reference(self, batch: ClipBatch) -> Tensor | None:
        """See `Objective`."""
        if batch.latents:
            return None
        return prepare_images(self.image_encoder, batch.reference, resizing="svd")

    def forward(self, batch: ClipBatch | PreparedBatch, *, noise_quantile: float | None = None) -> ObjectiveOutput:
        """The loss of one micro batch; in evaluation mode no condition is dropped.

        Args:
            batch: clips with the maps that the recipe's controls name, on any device; rgb may be stored latents. Or
                what `prepare` made of them.
            noise_quantile: see `Objective`.

        Raises:
            UserError: the clips lack a map that the controls name.
        """
        prepared = batch if isinstance(batch, PreparedBatch) else self.prepare(batch, noise_quantile=noise_quantile)
        batch, draws = prepared.clips, prepared.draws
        num_frames = batch.pose.shape[1]

        # 1. noisy latents at one noise level per clip
        encoded = prepared.encoded or self.encode(prepared)
        latents = rearrange(encoded.targets, "(b f) c h w -> b f c h w", f=num_frames)
        sigmas = rearrange(draws["sigmas"], "b -> b 1 1 1 1")
        noisy = latents + sigmas * draws["noise"]

        # 2. prediction; the UNet's encoder half runs without a graph if it is frozen
        inputs = self._prepare_input(prepared, encoded, noisy, sigmas)
        conditions = (inputs.timestep, inputs.embeddings, inputs.added_time_ids)
        residuals = self.controlnet(inputs.sample, *conditions, inputs.control_features)
        output = run_svd_unet(
            self.unet,
            inputs.sample,
            *conditions,
            down_residuals=residuals.down,
            mid_residual=residuals.mid,
            encoder_without_grad=is_encoder_half_frozen(self.unet),
        )
        prediction_type = self.settings.prediction_type
        reference = self.vae.config.scaling_factor * inputs.conditioning if prediction_type == "blend" else None
        denoised = edm_denoised(output.float(), noisy, sigmas, prediction_type, reference)

        # 3. loss
        squared_error = edm_weight(sigmas, prediction_type) * (denoised - latents).square()
        if self.training and self.settings.region_weights.is_active and batch.regions.numel():
            height, width = squared_error.shape[-2:]
            weights = region_weights(batch.regions, self.settings.region_weights, height=height, width=width)
            squared_error = squared_error * rearrange(weights, "b f h w -> b f 1 h w")
        losses = squared_error.mean(dim=(1, 2, 3, 4))
        only_rgb = torch.arange(len(DOMAINS), device=losses.device) == DOMAINS.index("rgb")
        return ObjectiveOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            domain_sums=only_rgb * losses.detach().sum(),
            domain_counts=only_rgb * len(losses),
        )

    @torch.no_grad()
    def encode(self, prepared: PreparedBatch) -> EncodedClips:
        """See `Objective`; the targets are `(b f) c h w`, and the reference has its noise."""
        batch, draws = prepared.clips, prepared.draws
        if stored := batch.latents:
            targets = self.draw_targets(rearrange(stored["rgb"], "b f ... -> (b f) ..."), draws)
            embeddings = rearrange(stored["embedding"], "b c -> b 1 c")
        else:
            assert prepared.encoder_pictures is not None
            targets = self.encode_targets(rearrange(batch.rgb, "b f c h w -> (b f) c h w"), draws)
            embeddings = embed_prepared(self.image_encoder, prepared.encoder_pictures)
        return EncodedClips(targets, self._encode_reference_pixels(batch.reference, draws), embeddings)

    def _prepare_input(
        self, prepared: PreparedBatch, encoded: EncodedClips, noisy: Tensor, sigmas: Tensor
    ) -> DenoiserInput:
        """Preconditions `noisy` (`b f c h w`, at `sigmas`: `b 1 1 1 1`) and puts all conditions together."""
        dtype, batch, draws = self.unet.dtype, prepared.clips, prepared.draws
        num_frames = noisy.shape[1]
        _, _, c_in, timestep = edm_preconditioning(sigmas)
        assert encoded.reference is not None
        conditioning, embeddings, augmentation = encoded.reference, encoded.embeddings, draws["augmentation"]
        if "kept latents" in draws:
            conditioning = conditioning * rearrange(draws["kept latents"], "b -> b 1 1 1").to(conditioning)
            embeddings = embeddings * rearrange(draws["kept embedding"], "b -> b 1 1").to(embeddings)
        conditioning = repeat(conditioning, "b c h w -> b f c h w", f=num_frames)
        motion_bucket = torch.full_like(augmentation, self.settings.motion_bucket)
        fps = batch.fps if self.settings.fps == "clip" else torch.full_like(batch.fps, self.settings.fps)
        with no_grad_if_frozen(self.controller):
            control_features = self.controller(self._control_maps(batch, draws))
        return DenoiserInput(
            sample=torch.cat([c_in * noisy, conditioning], dim=2).to(dtype),
            timestep=rearrange(timestep, "b 1 1 1 1 -> b"),
            embeddings=embeddings.to(dtype),
            added_time_ids=torch.stack([fps - 1, motion_bucket, augmentation], dim=1),
            control_features=control_features,
            conditioning=conditioning,
        )

    def _encode_reference_pixels(self, reference: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Conditioning latents `b c h w` of the noisy reference, not scaled."""
        strength, noise = draws["augmentation"], draws["augmentation noise"]
        # strengths are meant for pixels in [-1, 1]; for pixels in [0, 1] they are half as large
        noised = reference + 0.5 * rearrange(strength, "b -> b 1 1 1") * noise
        return encode_latents(self.vae, noised, scaled=False).float()

    def _control_maps(self, batch: ClipBatch, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The controller's maps `(b f) 3 H W` in [0,1]; maps that stage 1 predicts are blurred to its resolution.

        The loader may deliver the latter at that resolution (`TrainingStage.map_sizes`).
        """
        maps: dict[str, Tensor] = {}
        for name in self.controller.config.controls:
            frames = batch.maps.get(name)
            if frames is None:
                raise UserError(
                    f"model.controls names '{name}', but the shards have no {name} maps; leave it out "
                    "or give data.train a set with these maps"
                )
            if MODALITIES[name].domain:
                size = (self.settings.geometry_height, self.settings.geometry_width)
                full_size = (batch.pose.shape[-2], batch.pose.shape[-1])
                frames = pass_through(frames, *size, kind=MODALITIES[name].kind, to=full_size)
            maps[name] = frames
        if any(f"kept {name}" in draws for name in maps):
            maps = blank_controls(maps, {name: draws[f"kept {name}"] for name in maps})
        dtype = self.unet.dtype
        return {name: rearrange(frames, "b f c h w -> (b f) c h w").to(dtype) for name, frames in maps.items()}
