"""Stage 2: makes high-resolution frames from a reference image and control maps (Eq. 2, second line)."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from einops import rearrange, repeat
from torch import Tensor

from dreamdance.diffusion.guidance import classifier_free_guidance
from dreamdance.diffusion.noise import blend_reference, edm_velocity
from dreamdance.media.transforms import resize_images
from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel
from dreamdance.models.autoencoding import Autoencoder, decode_latents, downscale_factor, encode_latents
from dreamdance.models.equal_rewrites import apply_equal_rewrites
from dreamdance.models.image_embedding import ImageEncoder, embed_images
from dreamdance.models.svd_unet import run_svd_unet
from dreamdance.pipelines.control_maps import fit_control_maps, put_reference_first
from dreamdance.pipelines.drawing_sizes import warn_of_drawing_size
from dreamdance.pipelines.inputs import Clips, Images, clip_tensor, cut_to_aspect, image_tensor
from dreamdance.pipelines.outputs import AnimationOutput, Frames, check_output_type, frames_output
from dreamdance.pipelines.sampling import (
    Generators,
    SamplingPipeline,
    StepCallback,
    checked_latents,
    draw_initial_noise,
    predict_for_each,
)
from dreamdance.pipelines.windows import SamplingWindow, plan_windows, repeat_noise

# The frame rate that conditions SVD if neither its training nor the caller gives one.
DEFAULT_FPS = 8.0


@dataclass(frozen=True)
class AnimationCondition:
    """SVD's inputs from the reference image, or zeros in their place if the reference is dropped for guidance.

    Attributes:
        latents: `b c h w`, latents of the noised reference, not scaled.
        embedding: `b 1 c`, embedding of the clean reference.
        added_time_ids: `b 3`, (fps - 1, motion bucket, noise augmentation).
    """

    latents: Tensor
    embedding: Tensor
    added_time_ids: Tensor

    @classmethod
    def merged(cls, conditions: "Sequence[AnimationCondition]") -> "AnimationCondition":
        """Concatenates conditions along `b`."""
        return cls(
            torch.cat([condition.latents for condition in conditions]),
            torch.cat([condition.embedding for condition in conditions]),
            torch.cat([condition.added_time_ids for condition in conditions]),
        )


class AnimationPipeline(SamplingPipeline):
    """Stable Video Diffusion, guided by the cross-domain controller through an SVD ControlNet (Eq. 7).

    The pipeline shares the networks with the caller, and makes them compute the same with less work
    (`apply_equal_rewrites`).

    Args:
        unet: SVD's denoiser.
        controlnet: the trained copy of the denoiser's encoder half.
        controller: encodes the control maps; its config names them.
        vae: the video autoencoder.
        image_encoder: CLIP's vision tower, or its stand-in.
        scheduler: SVD's Euler scheduler.
        default_height, default_width: size in pixels at which the networks were trained; exports contain it.
    """

    model_cpu_offload_seq = "image_encoder->controller->controlnet->unet->vae"

    def __init__(
        self,
        unet: UNetSpatioTemporalConditionModel,
        controlnet: SpatioTemporalControlNetModel,
        controller: CrossDomainControllerModel,
        vae: Autoencoder,
        image_encoder: ImageEncoder,
        scheduler: EulerDiscreteScheduler,
        default_height: int | None = None,
        default_width: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            controlnet=controlnet,
            controller=controller,
            vae=vae,
            image_encoder=image_encoder,
            scheduler=scheduler,
        )
        for network in (unet, controlnet, vae):
            apply_equal_rewrites(network)
        self.register_to_config(default_height=default_height, default_width=default_width)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the maps that the controller reads, from `modalities.CONTROLS`."""
        return tuple(self.controller.config.controls)

    @property
    def reference_first(self) -> bool:
        """Whether the networks were trained on windows that begin with the reference: then it needs maps too."""
        return bool(self.controlnet.config.reference_first)

    @property
    def trained_fps(self) -> float | None:
        """The constant frame rate that conditioned SVD in training; None if it was that of each clip."""
        return self.controlnet.config.trained_fps

    def describe_untrained(self, window_frames: int) -> str | None:
        """A warning if windows are longer than the ControlNet's training clips, otherwise None.

        This is not an error: the ControlNet is a copy of SVD, which was trained on longer clips.
        """
        trained, base = self.controlnet.config.trained_frames, self.unet.config.num_frames
        if trained is None or window_frames <= trained:
            return None
        return (
            f"window_frames {window_frames} is more than the {trained} frames (data.num_frames) that the ControlNet "
            f"was trained on; its SVD was made for {base} frames. Frames may drift; use {trained} or less"
        )

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        poses: Clips | None = None,
        normals: Clips | None = None,
        depths: Clips | None = None,
        *,
        maps: Mapping[str, Clips] | None = None,
        reference_maps: Mapping[str, Images] | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | Sequence[float] | None = None,
        motion_bucket: int = 127,
        noise_augmentation: float = 0.02,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.5,
        conditioning_scale: float = 1.0,
        control_scales: Mapping[str, float] | None = None,
        window_frames: int = 16,
        window_overlap: int = 4,
        repeated_noise: bool = False,
        sequential_guidance: bool = False,
        decode_chunk_size: int = 8,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> AnimationOutput | tuple[Frames]:
        """Animates the reference with the control maps.

        Args:
            image: the reference: a picture, b pictures, or `(b) 3 H W` in [0, 1]; see `pipelines.inputs`.
            poses, normals, depths, maps: the control maps in `controls`, of any size: f pictures, b lists of them, or
                `(b) f 3 H W` (depths also `(b) f 1 H W`) in [0, 1]. `maps` contains maps by name.
            reference_maps: the reference's own map of each control, a picture or `(b) 3 H W`; exactly if the networks
                were trained with `reference_first`. It is denoised as frame 0 of every window, and not returned.
            height, width: size of the frames in pixels, by default from `size_of_result`. Inputs of another aspect
                ratio are cropped at the centre; normals and depths of nearly this aspect ratio are not cropped.
            fps, motion_bucket, noise_augmentation: conditions of SVD: frames per second, one number or one for each
                clip, by default the constant of the training, else 8; noise in units of pixels in [-1, 1].
            num_inference_steps: number of Euler steps.
            guidance_scale: w of `uncond + w (cond - uncond)`, the same for all frames; 1 is no guidance.
            conditioning_scale: factor of the ControlNet's residuals.
            control_scales: factors of single controls before their mean, by name (`CrossDomainControllerModel`).
            window_frames, window_overlap: frames denoised together, and shared by neighbours; see `plan_windows`.
            repeated_noise: whether all windows begin with the same noises, see `windows.repeat_noise`.
            sequential_guidance: compute conditional and unconditional predictions one after the other, to save memory.
            decode_chunk_size: number of frames decoded at once.
            generator: one generator, or one for each clip.
            latents: initial unit noise `b f c h w`, also for a first reference; drawn from `generator` by default.
            output_type, return_dict: `pil`, `np`, `pt` or `latent`; False returns (frames,).
            callback_on_step_end: (pipeline, step, timestep, {"latents": `b f c h w`}) -> changed latents or None.

        Raises:
            ValueError: inputs, sizes or windows do not match each other, or a map of the clip or reference is missing.
        """
        check_output_type(output_type)
        reference = self._fitted_reference(image, height, width)
        given = {"pose": poses, "normal": normals, "depth": depths, **(maps or {})}
        controls = self._fitted_maps(given, reference)
        self._check_inputs(reference, controls, guidance_scale)
        windows = self._plan_windows(controls, window_frames, window_overlap)
        controls = put_reference_first(controls, reference_maps, is_needed=self.reference_first)
        numbers = _added_numbers(fps or self.trained_fps or DEFAULT_FPS, motion_bucket, noise_augmentation, reference)
        with self._evaluation_mode():
            conditions = self._encode_conditions(reference, generator, numbers, with_dropped=guidance_scale > 1)
            features = self._encode_controls(controls, control_scales, decode_chunk_size)
            predict = partial(
                self._predict, features, conditions, guidance_scale, conditioning_scale, sequential=sequential_guidance
            )
            noise = self._initial_noise(reference, windows, generator, repeated=repeated_noise, given=latents)
            denoised = self._denoise_windows(
                noise, windows, predict, num_inference_steps, generator, callback_on_step_end
            )
            frames = self._decode(denoised[:, int(self.reference_first) :], decode_chunk_size, output_type)
        self.maybe_free_model_hooks()
        return AnimationOutput(frames=frames) if return_dict else (frames,)

    def _fitted_reference(self, image: Images, height: int | None, width: int | None) -> Tensor:
        """The reference `b 3 H W`, cropped and resized to the frames' size."""
        reference = image_tensor(image)
        height, width = self.size_of_result(height, width, reference)
        return resize_images(cut_to_aspect(reference, height, width), height, width)

    def window_starts(self, num_frames: int, window_frames: int, overlap: int) -> list[int]:
        """The frames, without the reference, with which the windows over `num_frames` frames begin."""
        windows = plan_windows(num_frames, window_frames, overlap, reference_first=self.reference_first)
        return [window.start - int(self.reference_first) for window in windows]

    def _fitted_maps(self, given: dict[str, Clips | None], reference: Tensor) -> dict[str, Tensor]:
        """The maps that the controller reads, in the size of the reference; warns of drawings of another resolution."""
        size = reference.shape[-2:]
        if "pose" in self.controls and given["pose"] is not None:
            given["pose"] = drawings = clip_tensor(given["pose"], "poses")
            warn_of_drawing_size(drawings.shape[-2:], shown=size, trained=self.trained_size, stacklevel=5)
        return fit_control_maps(self.controls, given, *size)

    def _plan_windows(self, maps: dict[str, Tensor], window_frames: int, overlap: int) -> list[SamplingWindow]:
        num_frames = next(iter(maps.values())).shape[1]
        windows = plan_windows(num_frames, window_frames, overlap, reference_first=self.reference_first)
        if problem := self.describe_untrained(windows[0].num_frames):
            warnings.warn(problem, stacklevel=4)
        return windows

    def _check_inputs(self, reference: Tensor, maps: dict[str, Tensor], guidance_scale: float) -> None:
        lengths = {f"{name}s": tuple(frames.shape[:2]) for name, frames in maps.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"control maps differ in (clips, frames): {lengths}")
        num_clips = next(iter(lengths.values()))[0]
        if len(reference) != num_clips:
            raise ValueError(f"{len(reference)} reference images were given for {num_clips} clips of control maps")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be at least 1 (1 is no guidance)")

    def _encode_conditions(
        self, reference: Tensor, generator: Generators, numbers: Tensor, *, with_dropped: bool
    ) -> list[AnimationCondition]:
        """The condition with the reference; for guidance, a condition with zeros comes before it.

        The noise of pixels is drawn first of all noises, as in SVD's pipeline.
        """
        device, pixel_noise = self._execution_device, draw_initial_noise(reference.shape, generator)
        noise_augmentation = numbers[0, 2]
        # the strength is for pixels in [-1, 1]; pixels in [0, 1] have half their range
        noised = reference.to(device) + 0.5 * noise_augmentation.to(device) * pixel_noise.to(device)
        latents = encode_latents(self.vae, noised, scaled=False).to(device, torch.float32)
        embedding = embed_images(self.image_encoder, reference, resizing="svd").to(device, self.unet.dtype)
        added_time_ids = numbers.to(device)
        return [
            AnimationCondition(kept * latents, kept * embedding, added_time_ids)
            for kept in ((0.0, 1.0) if with_dropped else (1.0,))
        ]

    def _encode_controls(self, maps: dict[str, Tensor], scales: Mapping[str, float] | None, chunk_size: int) -> Tensor:
        """The controller's guidance features `b f c h w`; it encodes frame by frame, so chunks do not change them."""
        num_clips, num_frames = next(iter(maps.values())).shape[:2]
        device, dtype = self._execution_device, self.controller.dtype
        frames = {name: rearrange(clips, "b f c H W -> (b f) c H W") for name, clips in maps.items()}
        features = []
        for start in range(0, num_clips * num_frames, chunk_size):
            chunk = slice(start, start + chunk_size)
            inputs = {name: clip[chunk].to(device, dtype) for name, clip in frames.items()}
            features.append(self.controller(inputs, scales))
        return rearrange(torch.cat(features), "(b f) c h w -> b f c h w", b=num_clips)

    def _initial_noise(
        self,
        reference: Tensor,
        windows: Sequence[SamplingWindow],
        generator: Generators,
        *,
        repeated: bool,
        given: Tensor | None,
    ) -> Tensor:
        """Unit noise `b f c h w` for the whole sequence, drawn unless it is given."""
        factor, (height, width) = downscale_factor(self.vae), reference.shape[-2:]
        per_frame = (self.vae.config.latent_channels, height // factor, width // factor)
        shape = (len(reference), windows[-1].stop, *per_frame)
        if given is not None:
            return checked_latents(given, shape)
        if not repeated:
            return draw_initial_noise(shape, generator)
        noise = draw_initial_noise((len(reference), windows[0].num_frames, *per_frame), generator)
        return repeat_noise(noise, windows[-1].stop, reference_first=self.reference_first)

    def _predict(
        self,
        control_features: Tensor,
        conditions: list[AnimationCondition],
        guidance_scale: float,
        conditioning_scale: float,
        scaled: Tensor,
        window: SamplingWindow,
        timestep: Tensor,
        *,
        sequential: bool,
    ) -> Tensor:
        """The guided prediction for one window, as SVD's sampler reads it: `b f c h w` -> `b f c h w` float32."""
        predictions = predict_for_each(
            conditions,
            lambda noisy, features, condition: self._denoise(noisy, timestep, features, condition, conditioning_scale),
            scaled,
            control_features[:, window.frames],
            merge=AnimationCondition.merged,
            sequential=sequential,
        )
        prediction = predictions[0]
        if len(predictions) > 1:
            unconditional, conditional = predictions
            prediction = classifier_free_guidance(conditional, unconditional, guidance_scale)
        if self.controlnet.config.prediction_type == "v_prediction":
            return prediction
        return edm_velocity(prediction, scaled, timestep)

    def _denoise(
        self,
        scaled: Tensor,
        timestep: Tensor,
        control_features: Tensor,
        condition: AnimationCondition,
        conditioning_scale: float,
    ) -> Tensor:
        """Runs ControlNet and SVD once: `b f c h w` -> `b f c h w` float32."""
        dtype = self.unet.dtype
        conditioning = repeat(condition.latents, "b c h w -> b f c h w", f=scaled.shape[1])
        sample = torch.cat([scaled, conditioning], dim=2).to(dtype)
        inputs = (sample, timestep, condition.embedding, condition.added_time_ids)
        features = rearrange(control_features, "b f c h w -> (b f) c h w").to(dtype)
        down, mid = self.controlnet(*inputs, features)
        if conditioning_scale != 1:
            down, mid = [conditioning_scale * residual for residual in down], conditioning_scale * mid
        prediction = run_svd_unet(self.unet, *inputs, down_residuals=down, mid_residual=mid, encoder_without_grad=False)
        if self.controlnet.config.prediction_type == "blend":
            return blend_reference(prediction.float(), self.vae.config.scaling_factor * conditioning)
        return prediction.float()

    def _decode(self, latents: Tensor, chunk_size: int, output_type: str) -> Frames:
        """Decodes latents `b f c h w` to frames."""
        if output_type == "latent":
            return latents
        num_clips, num_frames = latents.shape[:2]
        frames = decode_latents(
            self.vae,
            rearrange(latents, "b f c h w -> (b f) c h w"),
            chunk_size=chunk_size,
            num_frames=num_frames,
        )
        return frames_output(rearrange(frames, "(b f) c H W -> b f c H W", b=num_clips), output_type)


def _added_numbers(
    fps: float | Sequence[float], motion_bucket: int, noise_augmentation: float, reference: Tensor
) -> Tensor:
    """SVD's conditions `b 3` of each clip. SVD was trained on frames per second minus one."""
    rates = [float(fps)] * len(reference) if isinstance(fps, int | float) else [float(rate) for rate in fps]
    if len(rates) != len(reference):
        raise ValueError(f"fps has {len(rates)} values for {len(reference)} clips")
    return torch.tensor([[rate - 1.0, motion_bucket, noise_augmentation] for rate in rates])
