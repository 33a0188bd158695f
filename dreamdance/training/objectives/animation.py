"""The objective of stage 2: SVD's own denoising objective, with the cross-domain controller's guidance (Eq. 7).

The objective holds all networks, trained and frozen. This module does not know ranks, optimizers or checkpoints. Every
random draw about a clip is keyed by the clip (C8).
"""

from dataclasses import dataclass

import torch
from diffusers import UNetSpatioTemporalConditionModel
from einops import rearrange, repeat
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.diffusion.condition_dropout import drop_conditions, drop_controls
from dreamdance.diffusion.noise import (
    draw_log_normal,
    draw_noise,
    edm_preconditioning,
    edm_weight,
    make_svd_scheduler,
)
from dreamdance.errors import UserError
from dreamdance.media.transforms import pass_through
from dreamdance.modalities import DOMAINS, MODALITIES
from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel
from dreamdance.models.autoencoding import Autoencoder, encode_latents
from dreamdance.models.image_embedding import ImageEncoder, embed_images
from dreamdance.models.svd_unet import is_encoder_half_frozen, run_svd_unet
from dreamdance.pipelines import AnimationPipeline
from dreamdance.recipe import schema
from dreamdance.training.objectives.output import Objective, ObjectiveOutput, no_grad_if_frozen


@dataclass(frozen=True)
class DenoiserInput:
    """Inputs of SVD's UNet and its ControlNet, at one noise level per clip.

    Attributes:
        sample: `b f 2c h w`, preconditioned noisy latents, then the conditioning latents.
        timestep: `b`, ln(sigma) / 4.
        embeddings: `b 1 c`, the image embedding of the clean reference.
        added_time_ids: `b 3`, frames per second - 1, motion bucket, noise augmentation.
        control_features: `(b f) c h w`, the controller's output.
    """

    sample: Tensor
    timestep: Tensor
    embeddings: Tensor
    added_time_ids: Tensor
    control_features: Tensor


class AnimationObjective(Objective):
    """Denoising of videos under EDM noise with robust conditioning.

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

    def forward(self, batch: ClipBatch) -> ObjectiveOutput:
        """The loss of one micro batch; in evaluation mode no condition is dropped.

        Args:
            batch: clips with the maps that the recipe's controls name, on any device; rgb may be stored latents.

        Raises:
            UserError: the clips lack a map that the controls name.
        """
        keys = batch.keys.tolist()
        batch = batch.to(self.unet.device)
        num_frames = batch.pose.shape[1]

        # 1. noisy latents at one noise level per clip
        form = self.settings.target_latents
        if batch.latents:
            latents = self.draw_targets(rearrange(batch.latents["rgb"], "b f ... -> (b f) ..."), keys, form)
        else:
            latents = self.encode_targets(rearrange(batch.rgb, "b f c h w -> (b f) c h w"), keys, form)
        latents = rearrange(latents, "(b f) c h w -> b f c h w", f=num_frames)
        sigmas = draw_log_normal(keys, self.settings.sigma_log_mean, self.settings.sigma_log_std, purpose="sigma")
        sigmas = rearrange(sigmas.to(latents), "b -> b 1 1 1 1")
        noisy = latents + sigmas * draw_noise(keys, latents.shape[1:]).to(latents)

        # 2. prediction; the UNet's encoder half runs without a graph if it is frozen
        inputs = self._prepare_input(batch, keys, noisy, sigmas)
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
        c_skip, c_out, _, _ = edm_preconditioning(sigmas)
        denoised = c_skip * noisy + c_out * output.float()

        # 3. loss
        losses = (edm_weight(sigmas) * (denoised - latents).square()).mean(dim=(1, 2, 3, 4))
        only_rgb = torch.tensor([domain == "rgb" for domain in DOMAINS], device=losses.device)
        return ObjectiveOutput(
            loss=losses.mean(),
            sample_losses=losses.detach(),
            domain_sums=only_rgb * losses.detach().sum(),
            domain_counts=only_rgb * len(keys),
        )

    def _prepare_input(self, batch: ClipBatch, keys: list[list[int]], noisy: Tensor, sigmas: Tensor) -> DenoiserInput:
        """Preconditions `noisy` (`b f c h w`, at `sigmas`: `b 1 1 1 1`) and draws and encodes all conditions."""
        dtype = self.unet.dtype
        num_frames = noisy.shape[1]
        _, _, c_in, timestep = edm_preconditioning(sigmas)
        conditioning, augmentation = self._encode_reference_pixels(batch.reference, keys)
        if stored := batch.latents:
            embeddings = rearrange(stored["embedding"], "b c -> b 1 c")
        else:
            embeddings = embed_images(self.image_encoder, batch.reference, resizing="svd")
        if self.training:
            latents_dropped, embedding_dropped = drop_conditions(
                keys,
                latents=self.settings.latents_dropout,
                embedding=self.settings.embedding_dropout,
                both=self.settings.both_dropout,
            )
            conditioning = conditioning * rearrange(~latents_dropped, "b -> b 1 1 1").to(conditioning)
            embeddings = embeddings * rearrange(~embedding_dropped, "b -> b 1 1").to(embeddings)
        conditioning = repeat(conditioning, "b c h w -> b f c h w", f=num_frames)
        motion_bucket = torch.full_like(augmentation, self.settings.motion_bucket)
        with no_grad_if_frozen(self.controller):
            control_features = self.controller(self._control_maps(batch, keys))
        return DenoiserInput(
            sample=torch.cat([c_in * noisy, conditioning], dim=2).to(dtype),
            timestep=rearrange(timestep, "b 1 1 1 1 -> b"),
            embeddings=embeddings.to(dtype),
            added_time_ids=torch.stack([batch.fps - 1, motion_bucket, augmentation], dim=1),
            control_features=control_features,
        )

    def _encode_reference_pixels(self, reference: Tensor, keys: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns conditioning latents `b c h w` of the noisy reference, not scaled, and its noise strengths `b`."""
        mean, std = self.settings.augmentation_log_mean, self.settings.augmentation_log_std
        strength = draw_log_normal(keys, mean, std, purpose="augmentation").to(reference)
        noise = draw_noise(keys, reference.shape[1:], purpose="augmentation noise").to(reference)
        # strengths are meant for pixels in [-1, 1]; for pixels in [0, 1] they are half as large
        noised = reference + 0.5 * rearrange(strength, "b -> b 1 1 1") * noise
        return encode_latents(self.vae, noised, scaled=False).float(), strength

    def _control_maps(self, batch: ClipBatch, keys: list[list[int]]) -> dict[str, Tensor]:
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
        if self.training:
            maps = drop_controls(
                maps,
                keys,
                frame_rate=self.settings.frame_control_dropout,
                modality_rate=self.settings.modality_control_dropout,
            )
        dtype = self.unet.dtype
        return {name: rearrange(frames, "b f c h w -> (b f) c h w").to(dtype) for name, frames in maps.items()}
