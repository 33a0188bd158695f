"""The SVD ControlNet: a trainable copy of Stable Video Diffusion's encoder half, linked by zero convolutions."""

from functools import wraps
from typing import Any, Literal, NamedTuple

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from dreamdance.models.svd_unet import run_encoder_half

# The facts about its training that a ControlNet's config records, with their values in configs that lack them.
TRAINING_FACTS: dict[str, Any] = {
    "trained_frames": None,
    "reference_first": False,
    "trained_fps": None,
    "prediction_type": "v_prediction",
}


class ControlResiduals(NamedTuple):
    """What `run_svd_unet` adds.

    Attributes:
        down: one `(b f) c h w` for each skip connection, from shallow to deep.
        mid: `(b f) c h w`, for the mid block's output.
    """

    down: list[Tensor]
    mid: Tensor


class SpatioTemporalControlNetModel(UNetSpatioTemporalConditionModel):
    """Copy of SVD's `conv_in`, time embeddings, down blocks and mid block; a zero convolution on each output.

    The constructor takes the SVD UNet's arguments, so that a UNet's config builds its ControlNet, and `TRAINING_FACTS`,
    which a pipeline reads from the config:

    * `trained_frames`: number of frames that the networks saw at once in training; None if it is not recorded.
    * `reference_first`: whether the first of them was the reference.
    * `trained_fps`: the constant frame rate that conditioned SVD; None if it was that of each clip.
    * `prediction_type`: what the UNet predicts, `"v_prediction"` as SVD, `"sample"` or `"blend"`.

    Gradient checkpointing is diffusers' own (`enable_gradient_checkpointing`).
    """

    # modules that only the SVD UNet has, and modules that only this class has
    unused_unet_weights = ("up_blocks.", "conv_norm_out.", "conv_out.")
    added_weights = ("down_zero_convolutions.", "mid_zero_convolution.")

    @wraps(UNetSpatioTemporalConditionModel.__init__)  # type: ignore[misc]  # mypy takes the class for an instance
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        facts = {name: kwargs.pop(name, absent) for name, absent in TRAINING_FACTS.items()}
        super().__init__(*args, **kwargs)
        self.register_to_config(**facts)
        del self.up_blocks, self.conv_norm_out, self.conv_act, self.conv_out
        widths = self.config.block_out_channels
        # the skip connections: conv_in, then every layer and the downsampler of each block
        skip_widths = [widths[0]]
        for block, width in zip(self.down_blocks, widths, strict=True):
            skip_widths += [width] * (len(block.resnets) + (block.downsamplers is not None))
        self.down_zero_convolutions = nn.ModuleList(_zero_convolution(width) for width in skip_widths)
        self.mid_zero_convolution = _zero_convolution(widths[-1])

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers reads signatures, and `wraps` shows it the UNet's."""
        return UNetSpatioTemporalConditionModel._get_init_keys(UNetSpatioTemporalConditionModel) | {*TRAINING_FACTS}

    @classmethod
    def from_unet(
        cls,
        unet: UNetSpatioTemporalConditionModel,
        *,
        trained_frames: int | None = None,
        reference_first: bool = False,
        trained_fps: float | None = None,
        prediction_type: Literal["v_prediction", "sample", "blend"] = "v_prediction",
    ) -> "SpatioTemporalControlNetModel":
        """Copies the encoder half of `unet`; the zero convolutions start at zero, so that SVD's output does not
        change.

        Args:
            unet: an SVD UNet. It is not changed and shares no weight with the copy, which has its device and type.
            trained_frames, reference_first, trained_fps, prediction_type: facts of the coming training, see the class.

        Raises:
            ValueError: the UNet's weights do not fit its config (a key is missing or left over).
        """
        # built on the meta device first, so that the base network's up blocks are never allocated
        with torch.device("meta"):
            controlnet = cls.from_config(
                unet.config,
                trained_frames=trained_frames,
                reference_first=reference_first,
                trained_fps=trained_fps,
                prediction_type=prediction_type,
            )
        copied = {
            name: weight.detach().clone()
            for name, weight in unet.state_dict().items()
            if not name.startswith(cls.unused_unet_weights)
        }
        added = {
            name: torch.zeros_like(weight, device=unet.device, dtype=unet.dtype)
            for name, weight in controlnet.state_dict().items()
            if name.startswith(cls.added_weights)
        }
        mismatch = set(copied) ^ (set(controlnet.state_dict()) - set(added))
        if mismatch:
            raise ValueError(
                f"the UNet's weights do not fit its config: {len(mismatch)} missing or unexpected keys, "
                f"such as {sorted(mismatch)[:3]}"
            )
        controlnet.load_state_dict(copied | added, assign=True)
        # `assign` keeps the flag of the meta parameters it replaces, the mode is the UNet's
        return controlnet.train(unet.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        control_features: Tensor,
    ) -> ControlResiduals:
        """Turns the controller's guidance feature into residuals for the SVD UNet.

        Args:
            sample: `b f c h w`, as given to the SVD UNet.
            timestep: `b` or a scalar, ln(sigma) / 4.
            encoder_hidden_states: `b 1 c`, the image embedding.
            added_time_ids: `b 3`.
            control_features: `(b f) c h w` of the width of `conv_in`'s output, added there.

        Raises:
            ValueError: `control_features` do not fit.
        """
        batch_size, num_frames, _, height, width = sample.shape
        expected = (batch_size * num_frames, self.config.block_out_channels[0], height, width)
        if tuple(control_features.shape) != expected:
            raise ValueError(
                f"control_features have the shape {tuple(control_features.shape)}, {expected} are needed: "
                "the controller's out_channels are block_out_channels[0], its downscale_factor is the autoencoder's"
            )
        encoded = run_encoder_half(
            self, sample, timestep, encoder_hidden_states, added_time_ids, input_features=control_features
        )
        down = [convolution(skip) for convolution, skip in zip(self.down_zero_convolutions, encoded.skips, strict=True)]
        return ControlResiduals(down=down, mid=self.mid_zero_convolution(encoded.mid))


def _zero_convolution(channels: int) -> nn.Conv2d:
    """A 1x1 convolution that begins at zero."""
    convolution = nn.Conv2d(channels, channels, kernel_size=1)
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution
