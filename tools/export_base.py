"""Writes the base UNet of an export as plain diffusers: what `train: image`, or the UNet of stage 2, has learnt.

    python tools/export_base.py runs/base_image/exports/step_00010000 recipes/base/image
    python tools/export_base.py runs/base_video/exports/step_00004000 recipes/base/video --dtype fp32

OUT becomes a folder with config.json and one file of weights, which `model.unet.path` and diffusers' own classes read:
`UNet2DConditionModel.from_pretrained(OUT, variant="fp16")` for stage 1, `UNetSpatioTemporalConditionModel` for stage 2.
What this project added to the UNet of stage 1 (the domain embedding) stays behind; a UNet with geometry or temporal
attention is refused, because it computes something else without them. The config.json of a video model says what it
predicts (`_prediction_type`): training refuses to freeze it for another prediction. Exit codes: 0 done, 1 error.
"""

import argparse
import inspect
import json
import sys
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNetSpatioTemporalConditionModel

from dreamdance.errors import MissingInputError, UserError
from dreamdance.models import GeometryUNetModel
from dreamdance.models.svd_unet import PREDICTION_TYPE
from dreamdance.runs.files import follow_umask, replace_atomically

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="a folder of a run's exports/")
    parser.add_argument("out", type=Path, help="the folder to write; one that is there is replaced")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="type of the stored weights (fp16)")
    options = parser.parse_args(arguments)
    try:
        write(read_base(options.export), options.out, options.dtype)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def read_base(export: Path) -> ModelMixin:
    """The UNet of an export, as diffusers' own class, in float32.

    Raises:
        MissingInputError: the folder is no export.
        UserError: the UNet has attention layers that diffusers' class lacks.
    """
    file = export / "unet" / "config.json"
    if not file.is_file():
        raise MissingInputError(
            f"{file} is not there: give a folder of a run's exports/, such as exports/step_00010000"
        )
    if json.loads(file.read_text(encoding="utf-8"))["_class_name"] != GeometryUNetModel.__name__:
        video = UNetSpatioTemporalConditionModel.from_pretrained(export / "unet", local_files_only=True)
        controlnet = json.loads((export / "controlnet" / "config.json").read_text(encoding="utf-8"))
        video.register_to_config(**{PREDICTION_TYPE: controlnet.get("prediction_type", "v_prediction")})
        return video
    unet = GeometryUNetModel.from_pretrained(export / "unet", local_files_only=True)
    for name in ("geometry_attention", "temporal_attention"):
        if unet.config[name]:
            raise UserError(f"{export}: its UNet was trained with model.{name}, which a plain UNet does not have")
    keys = inspect.signature(UNet2DConditionModel.__init__).parameters
    plain = UNet2DConditionModel(**{key: value for key, value in unet.config.items() if key in keys})
    added = unet.domain_parameters()
    plain.load_state_dict({name: value for name, value in unet.state_dict().items() if name not in added})
    return plain


def write(unet: ModelMixin, out: Path, dtype: str) -> None:
    """Writes `out` with config.json and one file of weights, in place of what was there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unet.register_to_config(_name_or_path="")
    with replace_atomically(out) as temporary:
        unet.to(DTYPES[dtype]).save_pretrained(temporary, variant="fp16" if dtype == "fp16" else None)
        follow_umask(temporary)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    print(f"{out}: {sum(value.numel() for value in unet.parameters()):,} parameters, {size:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
