"""The sections that name networks: the source of their weights, and the layers added to them."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dreamdance.modalities import CONTROLS
from dreamdance.recipe.sections import Frames, Positive, Section

# The maps that the controller of stage 2 can read; mypy does not accept a `Literal` of names from a table.
if TYPE_CHECKING:
    Control = str
else:
    Control = Literal[CONTROLS]


class NetworkSource(Section):
    """A diffusers network: weights from a folder, or random weights. Exactly one of path and config is given."""

    path: str | None = Field(
        default=None,
        description="Folder in the diffusers layout. Weights are read from safetensors only; nothing is downloaded.",
    )
    subfolder: str | None = Field(
        default=None,
        description="Folder of the network under `path`, such as `unet` in a folder that holds a whole pipeline.",
    )
    config: dict[str, Any] | None = Field(
        default=None,
        description=(
            "Constructor arguments of a network with random weights, drawn from `seed`: of diffusers' "
            "UNet2DConditionModel in stage 1, UNetSpatioTemporalConditionModel in stage 2. For demos and tests."
        ),
    )


class AutoencoderSource(Section):
    """The frozen image autoencoder, always in float32. Exactly one of path and patch_size is given."""

    path: str | None = Field(
        default=None,
        description=(
            "Folder of the autoencoder: diffusers' AutoencoderKL in stage 1, AutoencoderKLTemporalDecoder in stage 2. "
            "Weights are read from safetensors only."
        ),
    )
    subfolder: str | None = Field(default=None, description="Folder of the autoencoder under `path`, such as `vae`.")
    patch_size: Positive | None = Field(
        default=None,
        description=(
            "Side in pixels of the lossless patch autoencoder, which rearranges pixels and learns nothing. For demos "
            "and tests."
        ),
    )


class ImageEncoderSource(Section):
    """The frozen image encoder. Exactly one of path and stand_in_width is given."""

    path: str | None = Field(
        default=None,
        description=(
            "Folder of CLIP's vision tower with its projection: ViT-L/14 for Stable Diffusion 1.5, ViT-H/14 for Stable "
            "Video Diffusion. Weights are read from safetensors only."
        ),
    )
    subfolder: str | None = Field(
        default=None,
        description="Folder of the image encoder under `path`, such as `image_encoder`.",
    )
    stand_in_width: Positive | None = Field(
        default=None,
        description=(
            "Width of the embedding of a small deterministic stand-in without weights to load. For demos and tests."
        ),
    )


class FrozenNetworks(Section):
    """The networks that never train (task encode)."""

    autoencoder: AutoencoderSource = Field(description="Autoencoder between pictures and latents.")
    image_encoder: ImageEncoderSource = Field(description="Encoder of the reference image for cross-attention.")


class GeometryModel(Section):
    """The mutually aligned geometry diffusion model (stage 1)."""

    unet: NetworkSource = Field(
        description=(
            "Network that the denoising UNet and the reference UNet both start from; the paper takes Stable Diffusion "
            "1.5."
        ),
    )
    autoencoder: AutoencoderSource = Field(
        description=(
            "Autoencoder between pictures and latents. Its number of latent channels must equal the number of the "
            "UNet's input and output channels."
        ),
    )
    image_encoder: ImageEncoderSource = Field(
        description=(
            "Encoder of the reference image for cross-attention. Its width must be the UNet's cross_attention_dim."
        ),
    )
    pose_channels: list[Positive] = Field(
        default=[16, 32, 96, 256],
        description=(
            "Widths of the pose encoder's convolutions, from pixels to latents. At least one more than the autoencoder "
            "has halvings: 4 or more for a factor of 8."
        ),
    )
    geometry_attention: bool = Field(
        default=False,
        description=(
            "Adds attention across rgb, normal and depth to every transformer block (Eq. 5). `train: domains` needs "
            "false, `train: geometry` needs true."
        ),
    )
    temporal_attention: bool = Field(
        default=False,
        description=(
            "Adds attention across the frames to every transformer block. `train: temporal` needs true, the other two "
            "need false."
        ),
    )
    max_frames: Frames = Field(
        default=32,
        description=(
            "Number of frame positions of the temporal attention: an upper bound of data.num_frames and "
            "sampling.window_frames."
        ),
    )
    attention_backend: str | None = Field(
        default=None,
        description=(
            "Implementation of attention: reference, sdpa, triton or flash. Without it, the fastest one measured for "
            "the shape runs, else sdpa. A backend that cannot run here is an error, never replaced."
        ),
    )
    channels_last: bool = Field(
        default=False,
        description=(
            "Stores activations with the channels innermost, as GPU convolutions prefer. On GPUs the group norms then "
            "run in Triton, which needs a C compiler. Results are equal to rounding; the speed is not measured."
        ),
    )
    compile: Literal["none", "blocks"] = Field(
        default="none",
        description=(
            "With blocks, torch.compile compiles the residual and transformer blocks, when a size first occurs, which "
            "takes minutes. Results are equal to rounding; the speed is not measured. Needs a C and a C++ compiler and "
            "Python's headers."
        ),
    )


class AnimationModel(Section):
    """The cross-domain controlled video diffusion model (stage 2)."""

    unet: NetworkSource = Field(
        description=(
            "Network that denoises the frames; the ControlNet is a copy of it. The paper takes Stable Video Diffusion "
            "1.1."
        ),
    )
    autoencoder: AutoencoderSource = Field(
        description=(
            "Autoencoder of the video model. The UNet's input has twice its latent channels: noisy latents and "
            "conditioning latents."
        ),
    )
    image_encoder: ImageEncoderSource = Field(
        description=(
            "Encoder of the reference image for the video model's cross-attention. Its width must be the UNet's "
            "cross_attention_dim."
        ),
    )
    controls: list[Control] = Field(
        default=["pose", "depth", "normal"],
        description=(
            "Maps that the controller reads (Eq. 7), each once. The shards must hold them. The paper takes pose, depth "
            "and normal; its ablations leave some out."
        ),
    )
    controller_channels: list[Positive] = Field(
        default=[16, 32, 96, 320],
        description=(
            "Widths of the controller's convolutions, from pixels to latents, two or more. With geometry_attention the "
            "last one must be a multiple of controller_head_width."
        ),
    )
    controller_head_width: Positive = Field(
        default=64,
        description=(
            "Channels of one attention head in the controller's geometry attention; 64 as in Stable Video Diffusion. "
            "The paper states none."
        ),
    )
    geometry_attention: bool = Field(
        default=True,
        description=(
            "Attention across the control maps of each frame in the controller (Eq. 5). The paper's ablation switches "
            "it off."
        ),
    )
    unfreeze: Literal["none", "temporal", "decoder", "all"] = Field(
        default="none",
        description=(
            "Part of the video model that trains with the ControlNet: none as in the paper, its temporal layers, its "
            "decoder half, or all of it. More than none needs more memory."
        ),
    )
    attention_backend: str | None = Field(
        default=None,
        description=(
            "Implementation of the controller's geometry attention: reference, sdpa, triton or flash. Without it, the "
            "fastest one measured for the shape runs, else sdpa. A backend that cannot run here is an error, never "
            "replaced."
        ),
    )
    channels_last: bool = Field(
        default=False,
        description=(
            "Stores activations with the channels innermost, as in stage 1 and with the same requirement: on GPUs the "
            "group norms need Triton and a C compiler. The speed is not measured."
        ),
    )
    compile: Literal["none", "blocks"] = Field(
        default="none",
        description=(
            "With blocks, torch.compile compiles the blocks of SVD and its ControlNet, when a size first occurs, which "
            "takes minutes. The requirements are those of stage 1."
        ),
    )
