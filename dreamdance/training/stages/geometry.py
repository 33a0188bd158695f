"""Stage 1: the geometry diffusion model, in one of its three training steps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from torch import Tensor

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.shards.latents import EMBEDDING, REFERENCE
from dreamdance.modalities import DOMAINS, OPTIONAL
from dreamdance.models import GeometryUNetModel, PoseEncoderModel, ReferenceUNetModel
from dreamdance.models.autoencoding import downscale_factor
from dreamdance.models.base_configs import STABLE_DIFFUSION_1_5_UNET
from dreamdance.models.equal_rewrites import EQUAL_REWRITES
from dreamdance.models.image_embedding import embedding_width
from dreamdance.pipelines.sampling import StepCallback
from dreamdance.recipe.model_sections import AutoencoderSource, ImageEncoderSource, NetworkSource
from dreamdance.recipe.schema import Stage1Recipe
from dreamdance.training.networks.build import check_fit, prepare_networks, seeded_networks
from dreamdance.training.networks.sources import open_autoencoder, open_image_encoder, open_unet
from dreamdance.training.networks.trainability import names_with_gradient, train_only
from dreamdance.training.objectives.geometry import GeometryObjective, domain_weights
from dreamdance.training.sample_pictures import Predictions, Samples, sample_geometry, sample_images, show


@dataclass(frozen=True)
class GeometryStage:
    """Implements `TrainingStage` for stage 1."""

    recipe: Stage1Recipe

    @property
    def sources(self) -> Sequence[NetworkSource | AutoencoderSource | ImageEncoderSource]:
        """Stable Diffusion's UNet and autoencoder, and CLIP's image encoder, or their stand-ins."""
        return (self.recipe.model.unet, self.recipe.model.autoencoder, self.recipe.model.image_encoder)

    @property
    def maps(self) -> Sequence[str]:
        """Normal and depth; none where only pictures train."""
        return [name for name in OPTIONAL if name in DOMAINS and self.recipe.train != "image"]

    @property
    def map_sizes(self) -> Mapping[str, tuple[int, int]]:
        """All maps have the size of the pictures."""
        return {}

    @property
    def latent_names(self) -> Sequence[str]:
        """The three domains, and the reference both as latents and as an embedding."""
        return (*DOMAINS, REFERENCE, EMBEDDING)

    @property
    def reference_first(self) -> bool:
        """False: the reference UNet reads the reference."""
        return False

    @property
    def domain_weights(self) -> Tensor | None:
        """Those of the steps that train on one domain of each clip."""
        return domain_weights(self.recipe.train, self.recipe.objective)

    def build(self, *, device: str = "cpu", rewrites: Collection[str] = EQUAL_REWRITES) -> GeometryObjective:
        """See `TrainingStage`."""
        model = self.recipe.model
        with seeded_networks(self.recipe.seed, device):
            vae = open_autoencoder(model.autoencoder, temporal=False, device=device)
            image_encoder = open_image_encoder(model.image_encoder, huge=False, device=device)
            base = open_unet(model.unet, UNet2DConditionModel, published=STABLE_DIFFUSION_1_5_UNET, device=device)
            check_fit(
                base, self.recipe.model.unet, vae, embedding_width(image_encoder), self.recipe.data, latent_inputs=1
            )
            unet = GeometryUNetModel.from_unet2d(
                base,
                geometry_attention=model.geometry_attention,
                temporal_attention=model.temporal_attention,
                max_frames=model.max_frames,
                trained_frames=self.recipe.data.num_frames if model.temporal_attention else None,
                attention_backend=model.attention_backend,
                reuse_weights=True,
            )
            pose_encoder = PoseEncoderModel(
                out_channels=base.config.block_out_channels[0],
                channels=tuple(model.pose_channels),
                downscale_factor=downscale_factor(vae),
            )
            objective = GeometryObjective(
                ReferenceUNetModel.from_unet2d(base),
                unet,
                pose_encoder,
                vae,
                image_encoder,
                step=self.recipe.train,
                settings=self.recipe.objective,
            )
        prepare_networks(
            objective,
            self.recipe.sharding,
            channels_last=model.channels_last,
            device=device,
            rewrites=rewrites,
        )
        return objective

    def set_trainable(self, objective: GeometryObjective) -> list[str]:
        """The step `domains` trains both UNets and the pose encoder; `image` the plain UNet; others what they add."""
        unet, only = objective.unet, self.recipe.optimizer.only
        added = {"geometry": unet.geometry_parameters().keys(), "temporal": unet.temporal_parameters().keys()}
        if self.recipe.train == "image":
            base = names_with_gradient(unet) - unet.domain_parameters().keys()
            return train_only(objective, {f"unet.{name}" for name in base}, only)
        if self.recipe.train != "domains":
            return train_only(objective, {f"unet.{name}" for name in added[self.recipe.train]}, only)
        return train_only(
            objective,
            {f"unet.{name}" for name in names_with_gradient(unet) - added["geometry"] - added["temporal"]}
            | {f"reference_unet.{name}" for name in names_with_gradient(objective.reference_unet)}
            | {f"pose_encoder.{name}" for name, _ in objective.pose_encoder.named_parameters()},
            only,
        )

    def predict(
        self, objective: GeometryObjective, batch: ClipBatch, on_step: StepCallback | None = None
    ) -> Predictions:
        """Normals, depths and pictures at low resolution, from references and poses; pictures alone from `image`."""
        if self.recipe.train == "image":
            return sample_images(objective, batch, self.recipe.sampling, on_step)
        return sample_geometry(objective, batch, self.recipe.sampling, on_step)

    def show(self, batch: ClipBatch, predictions: Predictions) -> Samples:
        """See `TrainingStage`."""
        return show(batch, {} if self.recipe.train == "image" else {"pose": batch.pose}, predictions)

    def sample(self, objective: GeometryObjective, batch: ClipBatch, on_step: StepCallback | None = None) -> Samples:
        """See `TrainingStage`."""
        return self.show(batch, self.predict(objective, batch, on_step))
