"""Stage 2: Stable Video Diffusion, guided by a ControlNet and the cross-domain controller."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from diffusers import UNetSpatioTemporalConditionModel

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.shards.latents import EMBEDDING
from dreamdance.errors import RecipeError
from dreamdance.modalities import MODALITIES, OPTIONAL
from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel
from dreamdance.models.autoencoding import downscale_factor
from dreamdance.models.base_configs import STABLE_VIDEO_DIFFUSION_UNET
from dreamdance.models.equal_rewrites import EQUAL_REWRITES
from dreamdance.models.image_embedding import embedding_width
from dreamdance.models.svd_unet import DECODER_HALF, PREDICTION_TYPE
from dreamdance.pipelines.sampling import StepCallback
from dreamdance.recipe.model_sections import AutoencoderSource, ImageEncoderSource, NetworkSource
from dreamdance.recipe.schema import Stage2Recipe
from dreamdance.training.networks.build import check_fit, prepare_networks, seeded_networks
from dreamdance.training.networks.sources import absent_folder, open_autoencoder, open_image_encoder, open_unet
from dreamdance.training.networks.trainability import names_with_gradient, train_only
from dreamdance.training.objectives.animation import AnimationObjective
from dreamdance.training.sample_pictures import Predictions, Samples, blur_maps, sample_animation, show

_TEMPORAL_LAYERS = re.compile(r"temporal_transformer_blocks|temporal_res_block|time_mixer|time_pos_embed")


@dataclass(frozen=True)
class AnimationStage:
    """Implements `TrainingStage` for stage 2."""

    recipe: Stage2Recipe

    @property
    def sources(self) -> Sequence[NetworkSource | AutoencoderSource | ImageEncoderSource]:
        """Stable Video Diffusion's UNet and autoencoder, and CLIP's image encoder, or their stand-ins."""
        return (self.recipe.model.unet, self.recipe.model.autoencoder, self.recipe.model.image_encoder)

    @property
    def maps(self) -> Sequence[str]:
        """The maps named in `model.controls`."""
        return [name for name in OPTIONAL if name in self.recipe.model.controls]

    @property
    def map_sizes(self) -> Mapping[str, tuple[int, int]]:
        """Stage 1's size for the maps that it predicts; the objective enlarges them.

        Of another aspect than the pictures they would show another part of the frame: then the objective reduces them.
        """
        data, width, height = (
            self.recipe.data,
            self.recipe.objective.geometry_width,
            self.recipe.objective.geometry_height,
        )
        if width * data.height != height * data.width or width > data.width:
            return {}
        return {name: (width, height) for name in self.maps if MODALITIES[name].domain}

    @property
    def latent_names(self) -> Sequence[str]:
        """The frames and the reference's embedding; the reference's pixels are read as well, because noise is added."""
        return ("rgb", EMBEDDING)

    @property
    def reference_first(self) -> bool:
        """`objective.reference_first`."""
        return self.recipe.objective.reference_first

    @property
    def domain_weights(self) -> None:
        """None: stage 2 draws no domain."""
        return

    def _record_prediction_type(self, unet: UNetSpatioTemporalConditionModel) -> None:
        """Notes in the UNet's config what it is trained to predict; a base model without a note predicts velocities.

        Raises:
            RecipeError: a frozen base model predicts something else.
        """
        own, model = self.recipe.objective.prediction_type, self.recipe.model
        noted = unet.config.get(PREDICTION_TYPE)
        stored = noted or "v_prediction"
        is_there = model.unet.path is not None and absent_folder(model.unet) is None
        if is_there and model.unfreeze != "all" and stored != own:
            known = f"was trained to predict {noted}" if noted else "has no note in its config.json, so it predicts "
            known += "" if noted else "v_prediction, as SVD"
            raise RecipeError(
                f"objective.prediction_type is {own}, but the video model in '{model.unet.path}' {known}: set "
                f"objective.prediction_type={stored}, or train all of it (model.unfreeze=all)"
            )
        unet.register_to_config(**{PREDICTION_TYPE: own})

    def build(self, *, device: str = "cpu", rewrites: Collection[str] = EQUAL_REWRITES) -> AnimationObjective:
        """See `TrainingStage`."""
        model, published = self.recipe.model, STABLE_VIDEO_DIFFUSION_UNET
        with seeded_networks(self.recipe.seed, device):
            vae = open_autoencoder(model.autoencoder, temporal=True, device=device)
            image_encoder = open_image_encoder(model.image_encoder, huge=True, device=device)
            unet = open_unet(model.unet, UNetSpatioTemporalConditionModel, published=published, device=device)
            self._record_prediction_type(unet)
            check_fit(
                unet,
                model.unet,
                vae,
                embedding_width(image_encoder),
                self.recipe.data,
                latent_inputs=2,
                further_outputs=int(self.recipe.objective.prediction_type == "blend"),
            )
            controller = CrossDomainControllerModel(
                controls=model.controls,
                out_channels=unet.config.block_out_channels[0],
                channels=tuple(model.controller_channels),
                head_width=model.controller_head_width,
                downscale_factor=downscale_factor(vae),
                geometry_attention=model.geometry_attention,
                attention_backend=model.attention_backend,
            )
            objective = AnimationObjective(
                unet,
                SpatioTemporalControlNetModel.from_unet(
                    unet,
                    trained_frames=self.recipe.data.num_frames,
                    reference_first=self.reference_first,
                    trained_fps=None if self.recipe.objective.fps == "clip" else self.recipe.objective.fps,
                    prediction_type=self.recipe.objective.prediction_type,
                ),
                controller,
                vae,
                image_encoder,
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

    def set_trainable(self, objective: AnimationObjective) -> list[str]:
        """ControlNet and controller train, and the part of the UNet that `model.unfreeze` names."""
        names = {f"controlnet.{name}" for name in names_with_gradient(objective.controlnet)}
        names |= {f"controller.{name}" for name, _ in objective.controller.named_parameters()}
        unet, unfreeze = names_with_gradient(objective.unet), self.recipe.model.unfreeze
        if unfreeze == "temporal":
            unet = {name for name in unet if _TEMPORAL_LAYERS.search(name)}
        elif unfreeze == "decoder":
            unet = {name for name in unet if name.split(".", 1)[0] in DECODER_HALF}
        elif unfreeze == "none":
            unet = set()
        return train_only(objective, names | {f"unet.{name}" for name in unet}, self.recipe.optimizer.only)

    def predict(
        self, objective: AnimationObjective, batch: ClipBatch, on_step: StepCallback | None = None
    ) -> Predictions:
        """Videos from references, poses and the true maps, blurred to the resolution of stage 1."""
        maps, of_reference = blur_maps(batch, self.recipe), None
        if self.reference_first:
            of_reference = {name: frames[:, 0] for name, frames in maps.items()}
            maps = {name: frames[:, 1:] for name, frames in maps.items()}
        frames = sample_animation(objective, batch, maps, self.recipe.sampling, on_step, of_reference=of_reference)
        return {"rgb": frames}

    def show(self, batch: ClipBatch, predictions: Predictions) -> Samples:
        """See `TrainingStage`."""
        maps = blur_maps(batch, self.recipe)
        if self.reference_first:
            maps = {name: frames[:, 1:] for name, frames in maps.items()}
            batch = replace(batch, maps={name: frames[:, 1:] for name, frames in batch.maps.items()})
        given = {"pose": batch.pose} | {name: maps[name] for name in self.recipe.model.controls if name in maps}
        return show(batch, given, predictions)

    def sample(self, objective: AnimationObjective, batch: ClipBatch, on_step: StepCallback | None = None) -> Samples:
        """See `TrainingStage`."""
        return self.show(batch, self.predict(objective, batch, on_step))
