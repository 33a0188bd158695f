"""The reference picture as one token for cross-attention: CLIP's image embedding, or a small stand-in for it."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from dreamdance.errors import UserError
from dreamdance.models.autoencoding import computes_one_by_one

# what CLIP's pictures were normalised with in its training, rgb
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_GRID = 8
PROJECTION_SEED = 0


@dataclass
class ImageEmbedding(BaseOutput):
    """`image_embeds`: `b c`, named as in CLIP's output."""

    image_embeds: Tensor


class ImageEmbeddingStandIn(ModelMixin, ConfigMixin):
    """Mean colours on a coarse grid through a fixed orthogonal projection: deterministic, nothing to train.

    The projection keeps distances: two embeddings are as far apart as the two grids of colours. It is kept with the
    saved model, so that another machine's linear algebra changes nothing.

    Args:
        width: width of the embedding, at least 3. The grid is the largest whose colours fit, at most 8x8.
    """

    @register_to_config
    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 3:
            raise UserError(f"width is {width}; it must be 3 or more (model.image_encoder.stand_in_width)")
        self.grid_size = min(MAX_GRID, math.isqrt(width // 3))
        self.register_buffer("projection", _orthonormal_rows(3 * self.grid_size**2, width))

    def forward(self, images: Tensor) -> ImageEmbedding:
        """Embeds pictures.

        Args:
            images: `b 3 H W` in [0, 1].
        """
        colours = F.adaptive_avg_pool2d(images.to(self.projection) * 2 - 1, self.grid_size)
        return ImageEmbedding(image_embeds=rearrange(colours, "b c h w -> b (c h w)") @ self.projection)


def _orthonormal_rows(rows: int, columns: int) -> Tensor:
    """Returns `rows columns`, seeded; the sign of each row is fixed, since QR leaves it open."""
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    # on the CPU even where the model is built on the meta device
    square = torch.randn(columns, rows, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(square)
    return (q * r.diagonal().sign()).T.float().contiguous()


ImageEncoder: TypeAlias = CLIPVisionModelWithProjection | ImageEmbeddingStandIn
Resizing: TypeAlias = Literal["clip", "svd"]


def embedding_width(image_encoder: ImageEncoder) -> int:
    """Width of the embedding: the UNets' `cross_attention_dim`."""
    if isinstance(image_encoder, ImageEmbeddingStandIn):
        return image_encoder.config.width
    return image_encoder.config.projection_dim


@torch.no_grad()
def embed_images(image_encoder: ImageEncoder, images: Tensor, *, resizing: Resizing = "clip") -> Tensor:
    """Embeds each picture as one token: CLIP's pooled, projected `image_embeds`, or the stand-in's. Without
    gradients. On the CPU they are embedded one by one, see `autoencoding.encode_moments`.

    Args:
        image_encoder: the frozen encoder.
        images: `b 3 H W` in [0, 1], clean. The whole picture is seen, squeezed to CLIP's square.
        resizing: how, for the two differ by 31 dB: `"clip"`, bicubic with antialiasing as CLIP's own processor, in
            stage 1; `"svd"`, blurred by a Gaussian and then bicubic, which is all that SVD ever saw, in stage 2.

    Returns:
        `b 1 c`. A dropped embedding is zeros of that shape.
    """
    return embed_prepared(image_encoder, prepare_images(image_encoder, images, resizing=resizing))


def prepare_images(image_encoder: ImageEncoder, images: Tensor, *, resizing: Resizing) -> Tensor:
    """The first half of `embed_images`: pictures of the encoder's size. It copies filters to the pictures' device."""
    if not isinstance(image_encoder, CLIPVisionModelWithProjection):
        return images
    return prepare_for_clip(images, image_encoder.config.image_size, resizing=resizing)


@torch.no_grad()
def embed_prepared(image_encoder: ImageEncoder, images: Tensor) -> Tensor:
    """The second half of `embed_images`, of pictures from `prepare_images`; returns `b 1 c`."""
    images = images.to(device=image_encoder.device, dtype=image_encoder.dtype)
    size = 1 if computes_one_by_one(images) else max(len(images), 1)
    embeddings = torch.cat([image_encoder(chunk.contiguous()).image_embeds for chunk in images.split(size)])
    return rearrange(embeddings, "b c -> b 1 c")


def prepare_for_clip(images: Tensor, image_size: int, *, resizing: Resizing) -> Tensor:
    """Resizes and normalises in float32, `b 3 H W` in [0, 1] to `b 3 image_size image_size`; see `embed_images`."""
    images = images.float()
    if resizing == "svd":
        # in [-1, 1] and with pictures of CLIP's own size too, as SVD's pipeline does
        images = (_resize_with_antialiasing(images * 2.0 - 1.0, (image_size, image_size)) + 1.0) / 2.0
    elif images.shape[-2:] != (image_size, image_size):
        images = F.interpolate(images, size=(image_size, image_size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (rearrange(images.new_tensor(values), "c -> c 1 1") for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std
