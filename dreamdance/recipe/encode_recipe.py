"""The recipe of the task `encode`, which stores latents, or maps that a trained stage 1 makes."""

from typing import Annotated, Literal

from pydantic import Field

from dreamdance.recipe.every_recipe import TASK, Recipe
from dreamdance.recipe.model_sections import FrozenNetworks
from dreamdance.recipe.objective_sections import GeometrySampling
from dreamdance.recipe.sections import Clips, NonNegative, Pixels, Positive, Shards, Unit


class EncodeRecipe(Recipe):
    """Stores what the frozen networks of a stage (`data.latents`) or a trained stage 1 (`data.maps`) make of shards."""

    task: Literal["encode"] = Field(description=TASK)
    shards: Shards = Field(description="Shards to encode, the data.train of the training.")
    output: str = Field(
        description=(
            "Folder of the latents, the data.latents.local of the training; or of the maps, data.maps.local. What "
            "other shards, networks or settings made is refused there."
        ),
    )
    stage: Literal["stage1", "stage2"] | None = Field(
        default=None,
        description=(
            "The stage whose training reads the latents. It decides the class of the autoencoder and how the image "
            "encoder sees pictures. Not used with geometry_from, which maps for stage 2 need."
        ),
    )
    model: FrozenNetworks | None = Field(
        default=None, description="The frozen networks of the training. Not used with geometry_from."
    )
    geometry_from: str | None = Field(
        default=None,
        description=(
            "Run of stage 1 under --runs, whose newest export is taken, or the folder of an export: it makes the "
            "normal and depth maps of all clips and references, which are stored in place of latents."
        ),
    )
    geometry: GeometrySampling = Field(
        default=GeometrySampling(),
        description="Sampling of stage 1, best as in the `animate` recipe. Not used without geometry_from.",
    )
    width: Pixels = Field(
        description="Width of the pictures, the data.width of the training; of maps, its objective.geometry_width."
    )
    height: Pixels = Field(
        description="Height of the pictures, the data.height of the training; of maps, its objective.geometry_height."
    )
    domains: list[Literal["rgb", "normal", "depth"]] | None = Field(
        default=None,
        description=(
            "Maps to encode. Without it, what the stage denoises: rgb, normal and depth in stage1, rgb in stage2, "
            "whose normals and depths stay pixels."
        ),
    )
    flip: bool = Field(
        default=False,
        description=(
            "Whether mirrored pictures are encoded too, of clips with key points. A training with "
            "data.flip_probability above 0 needs it; it doubles time and size. Not with geometry_from: maps are "
            "mirrored when they are read."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description=(
            "Number format of the stored values; the networks compute in float32. With fp32 a training on the CPU "
            "gives the same bits as from pixels; bf16 has half the size and rounds each value by up to 0.2 %. With "
            "geometry_from, the number format of stage 1's networks: bf16 is faster on GPUs; maps are stored as PNG."
        ),
    )
    verify_samples: Annotated[NonNegative, Unit("clips")] = Field(
        default=4,
        description="Clips of which one frame is encoded again, decoded and compared at the end. 0 compares none.",
    )
    clips_per_part: Clips = Field(
        default=16,
        description="Clips in one part, the unit of work of a process. Do not change it for an output that was begun.",
    )
    shard_size_mib: Annotated[Positive, Unit("MiB")] = Field(
        default=256, description="Largest size of a file of latents."
    )

    @property
    def encoded_domains(self) -> list[str]:
        """The maps to encode."""
        if self.domains is not None:
            return list(self.domains)
        return ["rgb", "normal", "depth"] if self.stage == "stage1" else ["rgb"]
