"""Rules about relations between the values of a recipe of stage 2; see `rules`."""

from collections.abc import Iterator

from dreamdance.recipe.schema import Stage2Recipe
from dreamdance.recipe.yaml_text import Problem


def stage2_problems(recipe: Stage2Recipe) -> Iterator[Problem]:
    """The problems of values that only recipes of stage 2 have."""
    controls, objective = recipe.model.controls, recipe.objective
    if not controls or len(set(controls)) != len(controls):
        yield Problem.at("model.controls", f"model.controls {controls} must name one control or more, each once")
    channels, head_width = recipe.model.controller_channels, recipe.model.controller_head_width
    if len(channels) < 2:
        yield Problem.at(
            "model.controller_channels",
            f"model.controller_channels {channels} must hold two widths or more, for a step down to the latents' size",
        )
    elif recipe.model.geometry_attention and channels[-1] % head_width:
        yield Problem.at(
            "model.controller_channels",
            f"model.controller_channels {channels} must end with a multiple of "
            f"model.controller_head_width {head_width}, for the heads of its geometry attention",
        )
    for name in ("frame_control_dropout", "modality_control_dropout"):
        if getattr(objective, name) == 1.0:
            yield Problem.at(f"objective.{name}", f"objective.{name} is 1, but must be below 1, or no map is left")
    yield from _reference_first(recipe)
    yield from _control_scales(recipe)
    yield from _maps(recipe)
    total = objective.latents_dropout + objective.embedding_dropout + objective.both_dropout
    if total > 1.0:
        yield Problem.at(
            "objective.both_dropout",
            f"objective.latents_dropout + embedding_dropout + both_dropout is {total:g}; together they are at most 1",
        )


def _reference_first(recipe: Stage2Recipe) -> Iterator[Problem]:
    """The reference takes the place of one frame."""
    if not recipe.objective.reference_first:
        return
    if recipe.data.num_frames < 2:
        yield Problem.at(
            "data.num_frames", "data.num_frames 1 leaves no frame beside the reference (objective.reference_first)"
        )
    if recipe.sampling.window_frames < 2:
        yield Problem.at(
            "sampling.window_frames",
            "sampling.window_frames 1 leaves no frame beside the reference (objective.reference_first)",
        )
    if recipe.sampling.window_overlap == recipe.sampling.window_frames - 1:
        yield Problem.at(
            "sampling.window_overlap",
            f"sampling.window_overlap {recipe.sampling.window_overlap} must be below sampling.window_frames "
            f"{recipe.sampling.window_frames} - 1: each window begins with the reference (objective.reference_first)",
        )


def _maps(recipe: Stage2Recipe) -> Iterator[Problem]:
    data, objective = recipe.data, recipe.objective
    if data.maps is None:
        return
    if objective.geometry_width * data.height != objective.geometry_height * data.width:
        yield Problem.at(
            "data.maps",
            f"data.maps: maps of objective.geometry_width x geometry_height {objective.geometry_width}x"
            f"{objective.geometry_height} show another part of the frame than pictures of {data.width}x{data.height}; "
            "give both one aspect ratio",
        )
    smallest, largest = data.crop_scale
    if smallest < 1.0:  # a crop's edges are rounded to whole pixels of each size, and its maps are blurred once more
        yield Problem.at(
            "data.crop_scale",
            f"data.crop_scale [{smallest:g}, {largest:g}] would shift data.maps against the pictures by up to one of "
            "their own, larger pixels; set it to [1, 1], or leave data.maps out to train on true maps",
        )
    if not {"normal", "depth"} & {*recipe.model.controls}:
        yield Problem.at("data.maps", f"data.maps: model.controls {recipe.model.controls} reads none of them")


def _control_scales(recipe: Stage2Recipe) -> Iterator[Problem]:
    if foreign := [name for name in recipe.sampling.control_scales if name not in recipe.model.controls]:
        yield Problem.at(
            "sampling.control_scales",
            f"sampling.control_scales names {', '.join(foreign)}, which model.controls {recipe.model.controls} lacks",
        )
