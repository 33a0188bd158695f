"""The objective of stage 1: denoising rgb, normals and depth of a person together (Eq. 1, 3, 4, 5).

The objective holds all networks, trained and frozen. This module does not know ranks, optimizers or checkpoints. Every
random draw about a clip is keyed by the clip (C8).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.loading.domain_draw import TARGET, draw_domain, normalise_weights
from dreamdance.diffusion.condition_dropout import drop_references
from dreamdance.diffusion.noise import (
    ddpm_target,
    draw_noise,
    draw_timesteps,
    make_ddim_scheduler,
    make_ddpm_scheduler,
    min_snr_weights,
    timestep_at,
)
from dreamdance.errors import UserError
from dreamdance.modalities import DOMAINS
from dreamdance.models import GeometryUNetModel, PoseEncoderModel, ReferenceUNetModel
from dreamdance.models.autoencoding import Autoencoder, encode_latents, latent_shape, latents_from_moments
from dreamdance.models.image_embedding import ImageEncoder, embed_prepared, prepare_images
from dreamdance.pipelines import GeometryPipeline
from dreamdance.recipe import schema
from dreamdance.training.objectives.output import (
    EncodedClips,
    Objective,
    ObjectiveOutput,
    PreparedBatch,
    no_grad_if_frozen,
)
from dreamdance.training.objectives.region_weights import region_weights

Step = Literal["image", "domains", "geometry", "temporal"]


def domain_weights(step: Step, settings: schema.GeometryObjectiveSettings) -> Tensor | None:
    """The weights by which one domain of each clip is drawn, in the order of `DOMAINS`; None in a step with all three.

    Raises:
        UserError: all weights of `objective.domain_draw` are zero.
    """
    if step == "image":
        return normalise_weights([float(name == "rgb") for name in DOMAINS], "the step image")
    if step == "domains":
        return normalise_weights(settings.domain_draw.in_order, "objective.domain_draw")
    return None


class GeometryObjective(Objective):
    """Noise prediction of the mutually aligned geometry diffusion model, in one of its three training steps.

    Args:
        reference_unet: gives the features of the reference image (Eq. 4).
        unet: the denoiser.
        pose_encoder: encodes the pose drawing, once per frame, shared by the domains.
        vae: the frozen image autoencoder.
        image_encoder: the frozen CLIP vision tower, or its stand-in.
        step: `"image"` denoises rgb with the base network alone, from the image embedding; `"domains"` draws one domain
            per clip; `"geometry"` and `"temporal"` denoise all three together.
        settings: the recipe's `objective` section.

    Raises:
        UserError: all weights of a domain section are zero.
    """

    reference_unet: ReferenceUNetModel
    unet: GeometryUNetModel
    pose_encoder: PoseEncoderModel

    def __init__(
        self,
        reference_unet: ReferenceUNetModel,
        unet: GeometryUNetModel,
        pose_encoder: PoseEncoderModel,
        vae: Autoencoder,
        image_encoder: ImageEncoder,
        *,
        step: Step,
        settings: schema.GeometryObjectiveSettings,
    ) -> None:
        super().__init__()
        self.reference_unet = reference_unet
        self.unet = unet
        self.pose_encoder = pose_encoder
        self.vae = vae
        self.image_encoder = image_encoder
        self.step = step
        self.settings = settings
        with torch.device("cpu"):  # real numbers, even if the networks are built as shapes only
            self.noise_scheduler = make_ddpm_scheduler(
                prediction_type=settings.prediction_type,
                num_train_timesteps=settings.num_train_timesteps,
                beta_schedule=settings.beta_schedule,
                beta_start=settings.beta_start,
                beta_end=settings.beta_end,
                zero_terminal_snr=settings.zero_terminal_snr,
            )
        self._draw_weights = domain_weights(step, settings)
        self._loss_weights = normalise_weights(settings.domain_loss.in_order, "objective.domain_loss")

    def make_pipeline(self) -> GeometryPipeline:
        """The pipeline that samples with the same networks (shared, not copied)."""
        return GeometryPipeline(
            reference_unet=self.reference_unet,
            unet=self.unet,
            pose_encoder=self.pose_encoder,
            vae=self.vae,
            image_encoder=self.image_encoder,
            scheduler=make_ddim_scheduler(self.noise_scheduler),
        )

    def describe_noise(self, quantile: float) -> str:
        """See `Objective`."""
        return f"timestep_{timestep_at(quantile, self.settings.num_train_timesteps)}"

    def draw(self, batch: ClipBatch, *, noise_quantile: float | None = None) -> dict[str, Tensor]:
        """See `Objective`: domains `b m`, noise `(b f m) c h w`, timesteps `b`, kept references `b`, loss weights."""
        keys, num_frames = batch.keys.tolist(), batch.pose.shape[1]
        domains = self._choose_domains(keys)
        shape = latent_shape(self.vae, batch.pose)
        # one timestep per clip, independent noise for each of its frames and domains. All frames share one offset, but
        # each domain has its own: the network could infer a shared one from a domain whose level is known
        noise = draw_noise(keys, (num_frames, domains.shape[1], *shape), offset=self.settings.noise_offset)
        kept = torch.ones(len(keys))
        if self.training:
            kept -= drop_references(keys, self.settings.reference_dropout).to(kept)
        num_pictures = num_frames * domains.shape[1]
        return {
            "domains": domains,
            "noise": rearrange(noise, "b f m c h w -> (b f m) c h w"),
            "timesteps": self._choose_timesteps(keys, noise_quantile),
            "kept": kept,
            "loss weights": self._loss_weights,
            **self.draw_target_noise(keys, (num_pictures, *shape), self.settings.target_latents),
        }

    def resize_reference(self, batch: ClipBatch) -> Tensor | None:
        """See `Objective`."""
        if batch.latents:
            return None
        return prepare_images(self.image_encoder, batch.reference, resizing="clip")

    def prepare(
        self, batch: ClipBatch, *, non_blocking: bool = False, noise_quantile: float | None = None
    ) -> PreparedBatch:
        """See `Objective`; the tables of noise levels move to the device as well, once."""
        self.noise_scheduler.alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(self.unet.device)
        return super().prepare(batch, non_blocking=non_blocking, noise_quantile=noise_quantile)

    def forward(self, batch: ClipBatch | PreparedBatch, *, noise_quantile: float | None = None) -> ObjectiveOutput:
        """The loss of one micro batch (Eq. 3); in evaluation mode no condition is dropped.

        Args:
            batch: clips with `normal` and `depth`, or with their stored latents, on any device; or what `prepare` made
                of them.
            noise_quantile: see `Objective`.

        Raises:
            UserError: the clips have no normal or depth maps.
        """
        prepared = batch if isinstance(batch, PreparedBatch) else self.prepare(batch, noise_quantile=noise_quantile)
        batch, draws = prepared.clips, prepared.draws
        num_frames = batch.pose.shape[1]

        # 1. clean latents of the drawn domain, or of all three
        domains = draws["domains"]
        num_domains = domains.shape[1]
        encoded = prepared.encoded or self.encode(prepared)
        latents = encoded.targets

        # 2. noise
        noise, timesteps = draws["noise"], draws["timesteps"]
        latent_timesteps = repeat(timesteps, "b -> (b f m)", f=num_frames, m=num_domains)
        noisy = self.noise_scheduler.add_noise(latents, noise, latent_timesteps)

        # 3. conditions: the base network of the step "image" has only the image embedding
        dtype = self.unet.dtype
        embeddings = (encoded.embeddings * rearrange(draws["kept"], "b -> b 1 1")).to(dtype)
        conditions: dict[str, Any] = {}
        if self.step != "image":
            with no_grad_if_frozen(self.pose_encoder):
                pose_features = self.pose_encoder(rearrange(batch.pose, "b f c h w -> (b f) c h w").to(dtype))
            conditions = {
                "domains": repeat(domains, "b m -> (b f m)", f=num_frames),
                "pose_features": pose_features,
                "reference_features": self._reference_features(encoded, draws["kept"], embeddings),
            }

        # 4. prediction and loss
        prediction = self.unet(
            noisy.to(dtype), timesteps, embeddings, num_frames=num_frames, num_domains=num_domains, **conditions
        )
        target = ddpm_target(self.noise_scheduler, latents, noise, latent_timesteps)
        squared_error = (prediction.float() - target).square()
        if self.training and self.settings.region_weights.is_active and batch.regions.numel():
            height, width = squared_error.shape[-2:]
            weights = region_weights(batch.regions, self.settings.region_weights, height=height, width=width)
            squared_error = squared_error * repeat(weights, "b f h w -> (b f m) 1 h w", m=num_domains)
        losses = rearrange(squared_error, "(b f m) c h w -> b m (f c h w)", f=num_frames, m=num_domains).mean(dim=-1)
        return self._weigh(losses, draws)

    def _choose_timesteps(self, keys: list[list[int]], quantile: float | None) -> Tensor:
        """`b` timesteps, on the CPU: drawn by the keys, or the one at a quantile."""
        count = self.settings.num_train_timesteps
        if quantile is None:
            return draw_timesteps(keys, count)
        return torch.full((len(keys),), timestep_at(quantile, count))

    def _choose_domains(self, keys: list[list[int]]) -> Tensor:
        """`b m` domain numbers: one drawn per clip in the first steps, all three afterwards."""
        if self._draw_weights is None:
            return repeat(torch.arange(len(DOMAINS)), "m -> b m", b=len(keys))
        return torch.stack([draw_domain(self._draw_weights, key) for key in keys])

    @torch.no_grad()
    def encode(self, prepared: PreparedBatch) -> EncodedClips:
        """See `Objective`; the targets are `(b f m) c h w`."""
        batch, draws = prepared.clips, prepared.draws
        if stored := batch.latents:
            return EncodedClips(
                targets=self.draw_targets(_of_domains(stored, draws["domains"]), draws),
                reference=latents_from_moments(self.vae, stored["reference"]),
                embeddings=rearrange(stored["embedding"], "b c -> b 1 c"),
            )
        assert prepared.encoder_pictures is not None
        return EncodedClips(
            targets=self.encode_targets(_of_domains(batch.maps, draws["domains"]), draws),
            reference=None if self.step == "image" else encode_latents(self.vae, batch.reference),
            embeddings=embed_prepared(self.image_encoder, prepared.encoder_pictures),
        )

    def _reference_features(self, encoded: EncodedClips, kept: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
        """Features of the references, given their embeddings; a dropped one enters the network as zeros."""
        assert encoded.reference is not None
        latents = encoded.reference * rearrange(kept, "b -> b 1 1 1")
        with no_grad_if_frozen(self.reference_unet):
            features: dict[str, Tensor] = self.reference_unet(
                latents.to(self.unet.dtype), torch.zeros_like(kept), embeddings
            )
        return features

    def _weigh(self, losses: Tensor, draws: Mapping[str, Tensor]) -> ObjectiveOutput:
        """Reduces `b m` losses to one: min-SNR weights of timesteps, then domain weights (which sum to 1)."""
        if self.settings.min_snr_gamma is not None:
            weights = min_snr_weights(self.noise_scheduler, draws["timesteps"], self.settings.min_snr_gamma)
            losses = losses * rearrange(weights, "b -> b 1")
        if self._draw_weights is not None:
            sample_losses = rearrange(losses, "b 1 -> b")
        else:
            sample_losses = losses @ draws["loss weights"]
        zeros = torch.zeros(len(DOMAINS), device=losses.device)
        index = rearrange(draws["domains"], "b m -> (b m)")
        return ObjectiveOutput(
            loss=sample_losses.mean(),
            sample_losses=sample_losses.detach(),
            domain_sums=zeros.index_add(0, index, rearrange(losses.detach(), "b m -> (b m)")),
            domain_counts=torch.zeros_like(zeros, dtype=index.dtype).index_add(0, index, torch.ones_like(index)),
        )


def _of_domains(maps: Mapping[str, Tensor], domains: Tensor) -> Tensor:
    """`(b f m) ...`: the chosen domains (`b m`) of every frame, domains innermost (C1), of maps `b f ...`."""
    if TARGET in maps:  # the loader has drawn the same ones
        return rearrange(maps[TARGET], "b f ... -> (b f) ...")
    if missing := [name for name in DOMAINS if name not in maps]:
        raise UserError(
            f"stage 1 learns from normal and depth maps, but the shards have no {' and no '.join(missing)}; "
            "give data.train a set with these maps"
        )
    images = torch.stack([maps[name] for name in DOMAINS], dim=2)
    chosen = [clip[:, index] for clip, index in zip(images, domains, strict=True)]
    return rearrange(torch.stack(chosen), "b f m ... -> (b f m) ...")
