"""An autoencoder without weights: pixels of a patch become channels, without loss.

It has `AutoencoderKL`'s interface, scaling factor included, so that everything runs and is tested where no weights
are.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor

from dreamdance.errors import UserError


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Lossless space-to-depth with the interface of `AutoencoderKL` and `AutoencoderKLTemporalDecoder`.

    Args:
        patch_size: pixels along a patch's side; the latents are that much smaller, and have `3 * patch_size ** 2`
            channels.
        scaling_factor: latents times this have about unit variance. Pictures in [-1, 1] have a standard deviation
            near 0.5, hence 2; a power of two keeps the round trip exact in every floating type.
        in_channels: channels of the pictures.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int,
        scaling_factor: float = 2.0,
        in_channels: int = 3,
        latent_channels: int | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise UserError(f"patch_size is {patch_size}; it must be 1 or more (model.autoencoder.patch_size)")
        expected_channels = in_channels * patch_size**2
        if latent_channels not in (None, expected_channels):
            raise UserError(
                f"latent_channels is {latent_channels}, but {in_channels} channels in patches of {patch_size} are "
                f"{expected_channels}: leave it out"
            )
        self.register_to_config(latent_channels=expected_channels)
        # holds nothing: diffusers asks a model's tensors for its device and type, and this one has no others
        self.register_buffer("placement", torch.zeros(1))

    @property
    def downscale_factor(self) -> int:
        """Pixels per latent along a side."""
        return self.config.patch_size

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Folds each patch into channels.

        Args:
            x: `b 3 H W` in [-1, 1].
            return_dict: as in `AutoencoderKL`.

        Returns:
            The latent distribution over `b c h w`; it has no variance: `sample()` equals `mode()`.

        Raises:
            UserError: `H` or `W` is not a multiple of the patch size.
        """
        patch_size = self.config.patch_size
        height, width = x.shape[-2:]
        if height % patch_size or width % patch_size:
            raise UserError(
                f"pictures of {width}x{height} do not divide into patches of {patch_size}: "
                "choose data.width and data.height as multiples of model.autoencoder.patch_size"
            )
        latents = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=patch_size, q=patch_size)
        moments = torch.cat([latents, torch.zeros_like(latents)], dim=1)
        distribution = DiagonalGaussianDistribution(moments, deterministic=True)
        if not return_dict:
            return (distribution,)
        return AutoencoderKLOutput(latent_dist=distribution)

    @apply_forward_hook
    def decode(
        self, z: Tensor, num_frames: int | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Unfolds channels into patches.

        Args:
            z: `b c h w`, not scaled.
            num_frames: taken for the sake of `AutoencoderKLTemporalDecoder`'s interface; frames are independent here.
            return_dict: as in `AutoencoderKL`.

        Returns:
            `.sample`: `b 3 H W`, in [-1, 1] where the latents are those of a picture.
        """
        patch_size = self.config.patch_size
        pictures = rearrange(z, "b (c p q) h w -> b c (h p) (w q)", p=patch_size, q=patch_size)
        if not return_dict:
            return (pictures,)
        return DecoderOutput(sample=pictures)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes: the identity."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict=return_dict)
