"""Both stages together: makes frames, normals and depths from a reference image and a pose sequence (Eq. 2)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar, cast

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from torch import Tensor

from dreamdance.media.transforms import encode_normals, resize_images
from dreamdance.models import (
    CrossDomainControllerModel,
    GeometryUNetModel,
    PoseEncoderModel,
    ReferenceUNetModel,
    SpatioTemporalControlNetModel,
)
from dreamdance.models.autoencoding import Autoencoder
from dreamdance.models.image_embedding import ImageEncoder
from dreamdance.pipelines.animation import AnimationPipeline
from dreamdance.pipelines.drawing_sizes import drawings_are_checked, warn_of_drawing_size
from dreamdance.pipelines.geometry import GeometryPipeline
from dreamdance.pipelines.inputs import (
    Clips,
    Images,
    clip_tensor,
    cut_to_aspect,
    have_same_aspect,
    image_tensor,
    still_tensor,
)
from dreamdance.pipelines.outputs import DreamDanceOutput, Frames, check_output_type, frames_output, normals_output
from dreamdance.pipelines.sampling import Generators, SamplingPipeline, StepCallback

GEOMETRY_PREFIX = "geometry_"

Stage = TypeVar("Stage", bound=SamplingPipeline)


class DreamDancePipeline(SamplingPipeline):
    """Runs `GeometryPipeline`, drops its low-resolution rgb, then runs `AnimationPipeline`.

    The components of stage 2 have the same names as in `AnimationPipeline`. The names of stage 1's components, and of
    its `default_height` and `default_width`, begin with `geometry_`.
    """

    model_cpu_offload_seq = (
        "geometry_image_encoder->geometry_pose_encoder->geometry_reference_unet->geometry_unet->geometry_vae->"
        "image_encoder->controller->controlnet->unet->vae"
    )

    def __init__(
        self,
        geometry_reference_unet: ReferenceUNetModel,
        geometry_unet: GeometryUNetModel,
        geometry_pose_encoder: PoseEncoderModel,
        geometry_vae: Autoencoder,
        geometry_image_encoder: ImageEncoder,
        geometry_scheduler: DDIMScheduler,
        unet: UNetSpatioTemporalConditionModel,
        controlnet: SpatioTemporalControlNetModel,
        controller: CrossDomainControllerModel,
        vae: Autoencoder,
        image_encoder: ImageEncoder,
        scheduler: EulerDiscreteScheduler,
        geometry_default_height: int | None = None,
        geometry_default_width: int | None = None,
        default_height: int | None = None,
        default_width: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            geometry_reference_unet=geometry_reference_unet,
            geometry_unet=geometry_unet,
            geometry_pose_encoder=geometry_pose_encoder,
            geometry_vae=geometry_vae,
            geometry_image_encoder=geometry_image_encoder,
            geometry_scheduler=geometry_scheduler,
            unet=unet,
            controlnet=controlnet,
            controller=controller,
            vae=vae,
            image_encoder=image_encoder,
            scheduler=scheduler,
        )
        self.register_to_config(
            geometry_default_height=geometry_default_height,
            geometry_default_width=geometry_default_width,
            default_height=default_height,
            default_width=default_width,
        )

    @classmethod
    def from_stages(cls, geometry: GeometryPipeline, animation: AnimationPipeline) -> Self:
        """Joins the pipelines of the two stages; networks are shared, not copied."""
        stage1 = {**geometry.components, **_default_size(geometry)}
        prefixed = {GEOMETRY_PREFIX + name: value for name, value in stage1.items()}
        return cls(**prefixed, **animation.components, **_default_size(animation))

    @property
    def geometry(self) -> GeometryPipeline:
        """The pipeline of stage 1, with the same networks."""
        components = {
            name.removeprefix(GEOMETRY_PREFIX): component
            for name, component in self.components.items()
            if name.startswith(GEOMETRY_PREFIX)
        }
        return self._with_progress_bar(GeometryPipeline(**components, **_default_size(self, GEOMETRY_PREFIX)))

    @property
    def animation(self) -> AnimationPipeline:
        """The pipeline of stage 2, with the same networks."""
        components = {
            name: component for name, component in self.components.items() if not name.startswith(GEOMETRY_PREFIX)
        }
        return self._with_progress_bar(AnimationPipeline(**components, **_default_size(self)))

    def _with_progress_bar(self, stage: Stage) -> Stage:
        """Gives a stage this pipeline's settings of `set_progress_bar_config`."""
        stage.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return stage

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        poses: Clips,
        *,
        maps: Mapping[str, Clips] | None = None,
        reference_pose: Images | None = None,
        reference_maps: Mapping[str, Images] | None = None,
        height: int | None = None,
        width: int | None = None,
        geometry_height: int | None = None,
        geometry_width: int | None = None,
        fps: float | None = None,
        motion_bucket: int = 127,
        noise_augmentation: float = 0.02,
        num_inference_steps: int = 25,
        geometry_num_inference_steps: int | None = None,
        guidance_scales: Sequence[float] = (2.5, 1.0, 1.5),
        guidance_scale: float = 2.5,
        conditioning_scale: float = 1.0,
        control_scales: Mapping[str, float] | None = None,
        window_frames: int = 16,
        window_overlap: int = 4,
        repeated_noise: bool = False,
        sequential_guidance: bool = False,
        decode_chunk_size: int = 8,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> DreamDanceOutput | tuple[Frames, Frames, Frames]:
        """Animates the reference with the poses.

        Args:
            image, poses, maps, height, width: as in `AnimationPipeline`; stage 1 makes normal and depth.
            reference_pose: the pose drawing of the reference, exactly if stage 2 was trained with `reference_first`;
                stage 1 makes the reference's normals and depth from it.
            reference_maps: the reference's `maps`.
            geometry_height, geometry_width: size of stage 1's maps, by default the size at which it was trained.
            guidance_scales: stage 1's scales for rgb, normal, depth (Eq. 6); 0 is no guidance.
            num_inference_steps, geometry_num_inference_steps: for stage 2; for stage 1, by default the same.
            generator: one generator, or one for each clip; stage 1 draws from it first.
            output_type, return_dict: `pil`, `np` or `pt`; False returns (frames, normals, depths).
            callback_on_step_end and the others: as in the two pipelines.

        Raises:
            ValueError: as in the two stages; or their aspect ratios differ, or stage 1's size is not known.
        """
        check_output_type(output_type, accepted=("pil", "np", "pt"))
        reference, drawings = image_tensor(image), clip_tensor(poses, "poses")
        size, map_size = self._sizes(reference, (height, width), (geometry_height, geometry_width))
        warn_of_drawing_size(drawings.shape[-2:], shown=(size["height"], size["width"]), trained=self.trained_size)
        reference, drawings = (cut_to_aspect(pictures, **size) for pictures in (reference, drawings))
        own_pose = self._own_pose(reference_pose, size)
        shared: dict[str, Any] = {"window_frames": window_frames, "window_overlap": window_overlap}
        shared |= {"sequential_guidance": sequential_guidance, "decode_chunk_size": decode_chunk_size}
        shared |= {"generator": generator, "callback_on_step_end": callback_on_step_end}
        stage1 = {"num_inference_steps": geometry_num_inference_steps or num_inference_steps, **map_size, **shared}
        stage1["guidance_scales"] = guidance_scales
        stage2 = {"num_inference_steps": num_inference_steps, **size, **shared, "repeated_noise": repeated_noise}
        stage2 |= {"fps": fps, "motion_bucket": motion_bucket, "noise_augmentation": noise_augmentation}
        stage2 |= {"guidance_scale": guidance_scale, "conditioning_scale": conditioning_scale}

        normals, made = self._run_geometry(reference, drawings, stage1)
        own_maps = dict(reference_maps or {})
        if own_pose is not None:
            own_maps |= {
                name: frames[:, 0] for name, frames in self._run_geometry(reference, own_pose, stage1)[1].items()
            }
            own_maps["pose"] = own_pose[:, 0]
        stage2 |= {"maps": {**(maps or {}), **made}, "reference_maps": own_maps or None}
        with drawings_are_checked():
            result = self.animation(
                reference, drawings, **stage2, control_scales=control_scales, output_type="pt", return_dict=False
            )
        frames = frames_output(cast(Tensor, result[0]), output_type)
        geometry = normals_output(normals, output_type), frames_output(made["depth"], output_type)
        return DreamDanceOutput(frames, *geometry) if return_dict else (frames, *geometry)

    def _run_geometry(
        self, reference: Tensor, poses: Tensor, settings: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 1 on poses `b f 3 H W`: unit normals, and the maps as stage 2 reads them."""
        size = {"height": settings["height"], "width": settings["width"]}
        with drawings_are_checked():
            maps = self.geometry(
                resize_images(reference, **size),
                resize_images(poses, **size),
                **settings,
                output_type="pt",
                return_dict=False,
            )
        normals, depths, _ = cast(tuple[Tensor, Tensor, Tensor], maps)
        return normals, {"normal": encode_normals(normals), "depth": depths}

    def _own_pose(self, drawing: Images | None, size: Mapping[str, int]) -> Tensor | None:
        """The reference's pose `b 1 3 H W` if stage 2 needs it; checked before stage 1 runs."""
        if (drawing is None) == self.animation.reference_first:
            raise ValueError(
                "reference_pose is missing: stage 2 was trained with the reference as the first frame of each window "
                "(objective.reference_first)"
                if drawing is None
                else "reference_pose was given, but stage 2 was trained without reference_first"
            )
        return None if drawing is None else cut_to_aspect(still_tensor(drawing, "poses"), size["height"], size["width"])

    def _sizes(
        self, reference: Tensor, asked: tuple[int | None, int | None], asked_of_maps: tuple[int | None, int | None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Height and width of the frames, and those of stage 1's maps."""
        height, width = self.animation.size_of_result(*asked, reference)
        map_height = asked_of_maps[0] or self.config.geometry_default_height
        map_width = asked_of_maps[1] or self.config.geometry_default_width
        if map_height is None or map_width is None:
            raise ValueError(
                "this export of stage 1 does not contain the size at which it was trained: give geometry_height and "
                "geometry_width"
            )
        if not have_same_aspect((map_height, map_width), (height, width)):
            raise ValueError(
                f"geometry_width x geometry_height {map_width}x{map_height} has another aspect ratio than width x "
                f"height {width}x{height}: stage 1 would get a distorted picture"
            )
        return {"height": height, "width": width}, {"height": map_height, "width": map_width}


def _default_size(pipeline: SamplingPipeline, prefix: str = "") -> dict[str, Any]:
    return {name: pipeline.config[prefix + name] for name in ("default_height", "default_width")}
