"""The recipe of the task `encode`, which stores latents."""

from typing import Annotated, Literal

from pydantic import Field

from dreamdance.recipe.every_recipe import TASK, Recipe
from dreamdance.recipe.model_sections import FrozenNetworks
from dreamdance.recipe.sections import Clips, NonNegative, Pixels, Positive, Shards, Unit


class EncodeRecipe(Recipe):
    """Stores what the frozen networks of a stage make of shards; a training reads it by `data.latents`."""

    task: Literal["encode"] = Field(description=TASK)
    shards: Shards = Field(description="Shards to encode, the data.train of the training.")
    output: str = Field(
        description=(
            "Folder of the latents, the data.latents.local of the training. Latents of other shards, networks or "
            "settings are refused there."
        ),
    )
    stage: Literal["stage1", "stage2"] = Field(
        description=(
            "The stage whose training reads the latents. It decides the class of the autoencoder and how the image "
            "encoder sees pictures."
        ),
    )
    model: FrozenNetworks = Field(description="The frozen networks of the training.")
    width: Pixels = Field(description="Width of the pictures, the data.width of the training.")
    height: Pixels = Field(description="Height of the pictures, the data.height of the training.")
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
            "data.flip_probability above 0 needs it; it doubles time and size."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description=(
            "Number format of the stored values; the networks compute in float32. With fp32 a training on the CPU "
            "gives the same bits as from pixels; bf16 has half the size and rounds each value by up to 0.2 %."
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
