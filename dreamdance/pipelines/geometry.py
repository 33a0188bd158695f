"""Stage 1: makes normals and depths of every frame from a reference image and a pose sequence (Eq. 2, first line)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from einops import rearrange, reduce, repeat
from torch import Tensor

from dreamdance.diffusion.guidance import multi_domain_guidance
from dreamdance.media.transforms import decode_normals, resize_images
from dreamdance.modalities import DOMAINS
from dreamdance.models import GeometryUNetModel, PoseEncoderModel, ReferenceUNetModel
from dreamdance.models.autoencoding import Autoencoder, decode_latents, downscale_factor, encode_latents
from dreamdance.models.equal_rewrites import apply_equal_rewrites
from dreamdance.models.image_embedding import ImageEncoder, embed_images
from dreamdance.pipelines.drawing_sizes import warn_of_drawing_size
from dreamdance.pipelines.inputs import Clips, Images, clip_tensor, cut_to_aspect, image_tensor
from dreamdance.pipelines.outputs import Frames, GeometryOutput, check_output_type, frames_output, normals_output
from dreamdance.pipelines.sampling import (
    Generators,
    SamplingPipeline,
    StepCallback,
    checked_latents,
    draw_initial_noise,
    predict_for_each,
)
from dreamdance.pipelines.windows import SamplingWindow, plan_windows


@dataclass(frozen=True)
class ReferenceCondition:
    """The denoiser's inputs from the reference image, or from zeros if the reference is dropped for guidance.

    Attributes:
        embedding: `b t c`, the image embedding.
        features: block name -> `b n c`, the same for all steps and windows.
    """

    embedding: Tensor
    features: dict[str, Tensor]

    @classmethod
    def merged(cls, conditions: "Sequence[ReferenceCondition]") -> "ReferenceCondition":
        """Concatenates conditions along `b`."""
        return cls(
            torch.cat([condition.embedding for condition in conditions]),
            {name: torch.cat([other.features[name] for other in conditions]) for name in conditions[0].features},
        )


class GeometryPipeline(SamplingPipeline):
    """Mutually aligned geometry diffusion: rgb, normal and depth of all frames are denoised together (Eq. 3).

    The pipeline shares the networks with the caller, and makes them compute the same with less work
    (`apply_equal_rewrites`).

    Args:
        reference_unet: computes the reference's features (Eq. 4).
        unet: the denoiser.
        pose_encoder: encodes the pose drawings.
        vae: the image autoencoder.
        image_encoder: CLIP's vision tower, or its stand-in.
        scheduler: DDIM, with the noise schedule of the training.
        default_height, default_width: size in pixels at which the networks were trained; exports contain it.
    """

    model_cpu_offload_seq = "image_encoder->pose_encoder->reference_unet->unet->vae"

    def __init__(
        self,
        reference_unet: ReferenceUNetModel,
        unet: GeometryUNetModel,
        pose_encoder: PoseEncoderModel,
        vae: Autoencoder,
        image_encoder: ImageEncoder,
        scheduler: DDIMScheduler,
        default_height: int | None = None,
        default_width: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            reference_unet=reference_unet,
            unet=unet,
            pose_encoder=pose_encoder,
            vae=vae,
            image_encoder=image_encoder,
            scheduler=scheduler,
        )
        for network in (reference_unet, unet, vae):
            apply_equal_rewrites(network)
        self.register_to_config(default_height=default_height, default_width=default_width)

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        poses: Clips,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scales: Sequence[float] = (2.5, 1.0, 1.5),
        window_frames: int = 16,
        window_overlap: int = 4,
        sequential_guidance: bool = False,
        decode_chunk_size: int = 8,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> GeometryOutput | tuple[Frames, Frames, Frames]:
        """Predicts the geometry of a person in every pose.

        Args:
            image: the reference: a picture, b pictures, or `(b) 3 H W` in [0, 1]; see `pipelines.inputs`.
            poses: pose drawings: f pictures, b lists of them, or `(b) f 3 H W` in [0, 1].
            height, width: size of the maps in pixels, by default from `size_of_result`. Inputs of another aspect ratio
                are cropped at the centre.
            num_inference_steps: number of DDIM steps.
            guidance_scales: scales for rgb, normal, depth (Eq. 6); 0 is no guidance. If all are 0, no unconditional
                prediction is computed.
            window_frames: number of frames denoised together.
            window_overlap: number of frames shared by neighbouring windows.
            sequential_guidance: compute conditional and unconditional predictions one after the other, to save memory.
            decode_chunk_size: number of pictures decoded at once.
            generator: one generator, or one for each clip.
            latents: initial noise `b f m c h w`; drawn from `generator` by default.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: False returns (normals, depths, images).
            callback_on_step_end: (pipeline, step, timestep, {"latents": `b f m c h w`}) -> changed latents or None.

        Raises:
            ValueError: inputs, sizes, scales or windows do not match each other.
        """
        check_output_type(output_type)
        reference, drawings = image_tensor(image), clip_tensor(poses, "poses")
        height, width = size = self.size_of_result(height, width, reference)
        # Training reduces drawings of stage 2's size, so larger ones are usual.
        warn_of_drawing_size(drawings.shape[-2:], shown=size, trained=self.trained_size, larger_too=False)
        reference, drawings = (cut_to_aspect(pictures, height, width) for pictures in (reference, drawings))
        self._check_inputs(reference, drawings, guidance_scales, window_frames)
        windows = plan_windows(drawings.shape[1], window_frames, window_overlap)

        with self._evaluation_mode():
            # 1. conditions, once for all steps and windows
            guided = any(scale != 0 for scale in guidance_scales)
            references = self._encode_reference(resize_images(reference, height, width), with_dropped=guided)
            pose_features = self._encode_poses(resize_images(drawings, height, width), decode_chunk_size)

            # 2. denoising, from noise for the whole sequence
            factor, channels = downscale_factor(self.vae), self.unet.config.in_channels
            shape = (*drawings.shape[:2], len(DOMAINS), channels, height // factor, width // factor)
            latents = draw_initial_noise(shape, generator) if latents is None else checked_latents(latents, shape)

            def predict(noisy: Tensor, window: SamplingWindow, timestep: Tensor) -> Tensor:
                features = pose_features[:, window.frames]
                return self._predict(noisy, timestep, features, references, guidance_scales, sequential_guidance)

            latents = self._denoise_windows(
                latents, windows, predict, num_inference_steps, generator, callback_on_step_end
            )

            # 3. maps
            output = self._decode(latents, decode_chunk_size, output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.normals, output.depths, output.images)

    def _check_inputs(
        self,
        reference: Tensor,
        poses: Tensor,
        guidance_scales: Sequence[float],
        window_frames: int,
    ) -> None:
        if len(reference) != len(poses):
            raise ValueError(f"{len(reference)} reference images were given for {len(poses)} pose sequences")
        if len(guidance_scales) != len(DOMAINS):
            raise ValueError(
                f"guidance_scales must be three numbers, for rgb, normal and depth, not {tuple(guidance_scales)}"
            )
        longest, network = min(window_frames, poses.shape[1]), self.unet.config
        if network.temporal_attention and longest > network.max_frames:
            raise ValueError(
                f"windows of {longest} frames are longer than the {network.max_frames} (model.max_frames) "
                f"that temporal attention supports: lower window_frames to {network.max_frames} or less"
            )
        if network.trained_frames is not None and longest > network.trained_frames:
            raise ValueError(
                f"windows of {longest} frames are longer than the {network.trained_frames} (data.num_frames) that "
                f"temporal attention was trained on: lower window_frames to {network.trained_frames} or less"
            )

    def _encode_reference(self, reference: Tensor, *, with_dropped: bool) -> list[ReferenceCondition]:
        """Runs the reference UNet at timestep 0 on the reference; for guidance, before it, on zeros."""
        latents = encode_latents(self.vae, reference)
        embedding = embed_images(self.image_encoder, reference, resizing="clip")
        device, dtype = self._execution_device, self.unet.dtype
        conditions = []
        for kept in (0.0, 1.0) if with_dropped else (1.0,):
            tokens = (kept * embedding).to(device, dtype)
            clean = (kept * latents).to(device, dtype)
            timestep = torch.zeros(len(reference), device=device)
            conditions.append(ReferenceCondition(tokens, self.reference_unet(clean, timestep, tokens)))
        return conditions

    def _encode_poses(self, drawings: Tensor, chunk_size: int) -> Tensor:
        """Encodes `b f 3 H W` to `b f c h w`, `chunk_size` frames at a time."""
        frames = rearrange(drawings, "b f c H W -> (b f) c H W").split(chunk_size)
        encode_to = {"device": self._execution_device, "dtype": self.pose_encoder.dtype}
        features = torch.cat([self.pose_encoder(chunk.to(**encode_to)) for chunk in frames])
        return rearrange(features, "(b f) c h w -> b f c h w", b=len(drawings)).to(self.unet.dtype)

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        pose_features: Tensor,
        references: list[ReferenceCondition],
        guidance_scales: Sequence[float],
        sequential: bool,
    ) -> Tensor:
        """The guided prediction for one window: `b f m c h w` -> `b f m c h w` float32 (Eq. 6)."""
        num_frames, num_domains = latents.shape[1:3]
        predictions = predict_for_each(
            references,
            lambda noisy, features, reference: self._denoise(noisy, timestep, features, reference),
            latents,
            pose_features,
            merge=ReferenceCondition.merged,
            sequential=sequential,
        )
        if len(predictions) == 1:
            guided = predictions[0]
        else:
            unconditional, conditional = predictions
            guided = multi_domain_guidance(conditional, unconditional, guidance_scales)
        return rearrange(guided, "(b f m) c h w -> b f m c h w", f=num_frames, m=num_domains)

    def _denoise(
        self, latents: Tensor, timestep: Tensor, pose_features: Tensor, reference: ReferenceCondition
    ) -> Tensor:
        """Runs the denoiser once: `b f m c h w` -> `(b f m) c h w` float32."""
        batch_size, num_frames, num_domains = latents.shape[:3]
        domains = torch.arange(num_domains, device=latents.device)
        prediction = self.unet(
            rearrange(latents, "b f m c h w -> (b f m) c h w").to(self.unet.dtype),
            timestep,
            reference.embedding,
            domains=repeat(domains, "m -> (b f m)", b=batch_size, f=num_frames),
            num_frames=num_frames,
            num_domains=num_domains,
            pose_features=rearrange(pose_features, "b f c h w -> (b f) c h w"),
            reference_features=reference.features,
        )
        return prediction.float()

    def _decode(self, latents: Tensor, chunk_size: int, output_type: str) -> GeometryOutput:
        """Decodes latents `b f m c h w` to maps."""
        rgb, normal, depth = latents.unbind(dim=2)
        if output_type == "latent":
            return GeometryOutput(normals=normal, depths=depth, images=rgb)
        num_frames = rgb.shape[1]
        frames = {"b": len(rgb), "f": num_frames}
        rgb, normal, depth = (
            rearrange(
                decode_latents(
                    self.vae,
                    rearrange(domain, "b f c h w -> (b f) c h w"),
                    chunk_size=chunk_size,
                    num_frames=num_frames,
                ),
                "(b f) c H W -> b f c H W",
                **frames,
            )
            for domain in (rgb, normal, depth)
        )
        return GeometryOutput(
            normals=normals_output(decode_normals(normal), output_type),
            depths=frames_output(reduce(depth, "b f c H W -> b f 1 H W", "mean"), output_type),
            images=frames_output(rgb, output_type),
        )
