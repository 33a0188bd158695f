"""Marigold: normals of the whole picture, from a folder in the format of diffusers.

B. Ke et al., "Repurposing Diffusion-Based Image Generators for Monocular Depth Estimation" (CVPR 2024), the network for
normals. Its axes are ours: x right, y up, z towards the viewer (diffusers, `MarigoldImageProcessor.visualize_normals`).
Not run with real weights: the tests run a tiny pipeline of the same classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.local_models import find_weights, import_class, to_torch
from dreamdance.annotators.protocols import PersonPoses, check_shape

SOURCE = "https://huggingface.co/prs-eth/marigold-normals-v1-1"
LICENCE = "CreativeML Open RAIL++-M (v1-1; Apache-2.0 for v0-1), see the model's page"
_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
# Each frame starts from the clip's noise with this share of the last frame's latents, as in diffusers' guide
# "Frame-by-frame Video Processing with Temporal Consistency".
LAST_FRAME_SHARE = 0.1


class Marigold:
    """Estimates the normals of frames by Marigold; it sees the background."""

    sees_background = True
    uses: Mapping[str, tuple[str, ...]] = {"normal": ()}

    def __init__(
        self,
        folder: Path | str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        num_steps: int = 4,
        resolution: int | None = None,
        seed: int = 0,
    ) -> None:
        """Loads the pipeline.

        Args:
            folder: the folder with `model_index.json` and the networks' safetensors.
            device, dtype: where the networks run and in which type: `float32`, `bfloat16` or `float16`.
            num_steps: steps of denoising.
            resolution: the longer side of the pictures that the network sees; 0 for the frames' own size, None for
                the network's default.
            seed: of the noise from which every clip starts.

        Raises:
            MissingInputError: a file is missing.
            UserError: the folder holds another pipeline.
        """
        self._device, dtype_of_networks = to_torch(device, dtype)
        self.networks = find_weights(
            folder,
            _FILES,
            network="Marigold, normals",
            licence=LICENCE,
            source=SOURCE,
            kind=("model_index.json", "_class_name", "MarigoldNormalsPipeline"),
        )
        pipeline: Any = import_class("diffusers", "MarigoldNormalsPipeline").from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, torch_dtype=dtype_of_networks
        )
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to(self._device)
        self._num_steps, self._seed = num_steps, seed
        self._resolution = pipeline.default_processing_resolution if resolution is None else resolution

    @torch.inference_mode()
    def annotate_normal(
        self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Maps frames `(f, H, W, 3)` to unit normals of the same shape."""
        noise = self._draw_noise(Image.fromarray(rgb[0]))
        normals, last = [], None
        for frame in rgb:
            beat()
            result = self._pipeline(
                Image.fromarray(frame),
                num_inference_steps=self._num_steps,
                processing_resolution=self._resolution,
                ensemble_size=1,
                latents=noise if last is None else (1 - LAST_FRAME_SHARE) * noise + LAST_FRAME_SHARE * last,
                output_latent=True,
                output_type="np",
            )
            last = result.latent
            normals.append(np.asarray(result.prediction[0], dtype=np.float32))
        found = np.stack(normals)
        check_shape(self, found, rgb.shape)
        lengths = np.linalg.norm(found, axis=-1, keepdims=True)
        if not (lengths > 0).all():  # NaN too
            raise ValueError("Marigold returned normals without a direction; use dtype float32")
        found /= lengths
        return found

    def _draw_noise(self, picture: Image.Image) -> torch.Tensor:
        """Latents `1 c h w` of unit variance; drawn on the CPU, so that they are the same on every device."""
        pipeline = self._pipeline
        seen, _, _ = pipeline.image_processor.preprocess(picture, self._resolution, "bilinear", "cpu", torch.float32)
        height, width = (side // pipeline.vae_scale_factor for side in seen.shape[-2:])
        generator = torch.Generator().manual_seed(self._seed)
        noise = torch.randn((1, pipeline.vae.config.latent_channels, height, width), generator=generator)
        return noise.to(self._device, pipeline.dtype)
