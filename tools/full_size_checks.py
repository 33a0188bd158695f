"""What tools/full_size.py looks at once the trainings are done: exports load, both pipelines run, SVD is unchanged.

    python tools/full_size_checks.py NAME FOLDER

Prints one line `RESULT ...`, or fails.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNetSpatioTemporalConditionModel

from dreamdance.models import CrossDomainControllerModel, SpatioTemporalControlNetModel, run_svd_unet
from dreamdance.pipelines import AnimationPipeline, GeometryPipeline
from dreamdance.pipelines.outputs import AnimationOutput, Frames, GeometryOutput
from dreamdance.runs.exports import SAFE_LOADING

ROOT = Path(__file__).parents[1]


def geometry_pipeline(folder: Path, *, width: int = 256, height: int = 384) -> str:
    """Makes normals and depths of 4 frames in one denoising step."""
    pipeline = GeometryPipeline.from_pretrained(
        folder / "runs/full_stage1_temporal/exports/step_00000002", torch_dtype=torch.bfloat16, **SAFE_LOADING
    )
    image, poses = torch.rand(3, height, width), torch.rand(1, 4, 3, height, width)
    output = pipeline(
        image, poses, num_inference_steps=1, guidance_scales=(0, 0, 0), decode_chunk_size=2, output_type="pt"
    )
    assert isinstance(output, GeometryOutput)
    return _describe(normals=output.normals, depths=output.depths)


def animation_pipeline(folder: Path, *, width: int = 512, height: int = 768) -> str:
    """Denoises 16 frames, of which the first is the reference's, in one step without guidance."""
    pipeline = AnimationPipeline.from_pretrained(
        folder / "runs/full_stage2/exports/step_00000002", torch_dtype=torch.bfloat16, **SAFE_LOADING
    )
    image = torch.rand(3, height, width)
    maps = torch.rand(3, 1, 15, 3, height, width)
    output = pipeline(
        image,
        *maps,
        reference_maps={name: torch.rand(3, height, width) for name in pipeline.controls},
        num_inference_steps=1,
        guidance_scale=1.0,
        decode_chunk_size=2,
        output_type="pt",
    )
    assert isinstance(output, AnimationOutput)
    return _describe(frames=output.frames)


def zero_convolutions(_: Path) -> str:
    """SVD with ControlNet and controller as initialised returns exactly what SVD returns, in float32."""
    folder = ROOT / "weights/stable-video-diffusion-img2vid-xt-1-1/unet"
    unet = UNetSpatioTemporalConditionModel.from_pretrained(folder, variant="fp16", **SAFE_LOADING)
    control = SpatioTemporalControlNetModel.from_unet(unet)
    controller = CrossDomainControllerModel(out_channels=unet.config.block_out_channels[0])
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 2, 8, 16, 16, generator=generator)
    inputs = (
        sample,
        torch.tensor(1.0),
        torch.randn(1, 1, 1024, generator=generator),
        torch.tensor([[6.0, 127.0, 0.02]]),
    )
    maps = {name: torch.rand(2, 3, 128, 128, generator=generator) for name in controller.config.controls}
    with torch.no_grad():
        expected = unet(*inputs).sample
        residuals = control(*inputs, controller(maps))
        found = run_svd_unet(unet, *inputs, down_residuals=residuals.down, mid_residual=residuals.mid)
    if not torch.equal(expected, found):
        raise SystemExit(f"the largest difference is {(expected - found).abs().max()}")
    return f"bit-identical, {sum(value.numel() for value in unet.parameters()):,} parameters"


CHECKS: dict[str, Callable[[Path], str]] = {
    "geometry pipeline": geometry_pipeline,
    "animation pipeline": animation_pipeline,
    "zero convolutions": zero_convolutions,
}


def _describe(**results: Frames) -> str:
    """Shapes and ranges of results; fails where one is not finite."""
    tensors = {name: torch.as_tensor(result) for name, result in results.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise SystemExit(f"{name} are not finite")
    return ", ".join(f"{name} {tuple(tensor.shape)}, finite" for name, tensor in tensors.items())


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"RESULT {CHECKS[sys.argv[1]](Path(sys.argv[2]))}")
