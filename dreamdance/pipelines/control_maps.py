"""The control maps of stage 2's pipeline: brought to the frames' size, and the reference's put before them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dreamdance.media.transforms import resize_map
from dreamdance.modalities import MODALITIES
from dreamdance.pipelines.inputs import MAP_ASPECT_TOLERANCE, Clips, Images, clip_tensor, cut_to_aspect, still_tensor


def fit_control_maps(
    controls: Sequence[str], given: Mapping[str, Clips | None], height: int, width: int
) -> dict[str, Tensor]:
    """The maps that a controller reads, as `b f 3 H W` in the frames' size; other maps are ignored.

    Raises:
        ValueError: a map is missing or is none.
    """
    maps = {}
    for name in controls:
        frames = given.get(name)
        if frames is None:
            missing = f"{name}s" if name in given else f'maps={{"{name}": ...}}'
            raise ValueError(f"this controller reads {', '.join(controls)}, but no {missing} were given")
        maps[name] = _fit(clip_tensor(frames, f"{name}s"), name, height, width)
    return maps


def put_reference_first(
    maps: dict[str, Tensor], of_reference: Mapping[str, Images] | None, *, is_needed: bool
) -> dict[str, Tensor]:
    """The maps with the reference's own before those of the clip: `b (1 + f) 3 H W`.

    Args:
        maps: the fitted maps, `b f 3 H W`.
        of_reference: the reference's map of each control.
        is_needed: whether the networks were trained so; if not, `of_reference` must be None, and nothing changes.

    Raises:
        ValueError: maps of the reference are missing, superfluous, or for another number of clips.
    """
    if not is_needed:
        if of_reference is not None:
            raise ValueError("reference_maps were given, but the ControlNet was trained without reference_first")
        return maps
    if missing := [name for name in maps if name not in (of_reference or {})]:
        raise ValueError(
            "the ControlNet was trained with the reference as the first frame of each window "
            f"(objective.reference_first): give reference_maps, its own {' and '.join(missing)}"
        )
    joined = {}
    for name, frames in maps.items():
        first = still_tensor((of_reference or {})[name], f"{name}s")
        if len(first) != len(frames):
            raise ValueError(f"reference_maps has {len(first)} pictures of {name} for {len(frames)} clips")
        joined[name] = torch.cat([_fit(first, name, *frames.shape[-2:]), frames], dim=1)
    return joined


def _fit(frames: Tensor, name: str, height: int, width: int) -> Tensor:
    modality = MODALITIES[name]
    tolerance = MAP_ASPECT_TOLERANCE if modality.domain else 0.0
    return resize_map(cut_to_aspect(frames, height, width, tolerance=tolerance), height, width, kind=modality.kind)
