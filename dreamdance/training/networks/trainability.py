"""Which parameters train in which step (dreamdance/README.md, "The method"), by name. Knows nothing of optimizers.

Never among them: the autoencoder and the image encoder.
Paper: both UNets train in the first step; here: all but what precedes the softmax of cross-attention, because over the
single token of the image embedding that softmax is 1 and its gradient rounding noise, which Adam would turn into steps.
"""

import re

from torch import nn

from dreamdance.models.svd_unet import DECODER_HALF
from dreamdance.recipe.schema import Stage1Recipe, Stage2Recipe
from dreamdance.training.networks.frozen_convolution import replace_convolutions
from dreamdance.training.objectives.animation import AnimationObjective
from dreamdance.training.objectives.geometry import GeometryObjective

Objective = GeometryObjective | AnimationObjective

# Cross-attention reads a single token, the image embedding: its softmax is 1 whatever the query and the key are.
_BLIND_TO_ONE_TOKEN = re.compile(r"\.(attn2\.to_q|attn2\.to_k|norm2)\.(weight|bias)$")
_TRANSFORMER_BLOCK = re.compile(r"transformer_blocks\.\d+\.")
_SVD_TEMPORAL = re.compile(r"temporal_transformer_blocks|temporal_res_block|time_mixer|time_pos_embed")


def set_trainable(objective: Objective, recipe: Stage1Recipe | Stage2Recipe) -> list[str]:
    """Sets `requires_grad` of every parameter as the recipe's step wants it.

    Also sets the modes that go with it: training mode for the networks that train, evaluation mode for the others; and
    has the denoiser's frozen convolutions keep no input for a weight gradient.

    Returns:
        The sorted names, within `objective`, of the parameters that train.
    """
    if isinstance(objective, GeometryObjective) and isinstance(recipe, Stage1Recipe):
        trainable = _geometry_names(objective, recipe.train)
    elif isinstance(objective, AnimationObjective) and isinstance(recipe, Stage2Recipe):
        trainable = _animation_names(objective, recipe.model.unfreeze)
    else:
        raise TypeError(f"a {type(objective).__name__} cannot train by a {type(recipe).__name__}")
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(name in trainable)
    replace_convolutions(objective.unet)
    set_modes(objective)
    return sorted(trainable)


def set_modes(objective: Objective) -> None:
    """Training mode, except for the networks that are frozen as a whole."""
    objective.train()
    for network in objective.children():
        network.train(any(parameter.requires_grad for parameter in network.parameters()))


def _geometry_names(objective: GeometryObjective, step: str) -> set[str]:
    unet = objective.unet
    added = {"geometry": unet.geometry_parameters().keys(), "temporal": unet.temporal_parameters().keys()}
    if step != "domains":
        return {f"unet.{name}" for name in added[step]}
    return (
        {f"unet.{name}" for name in _seeing(unet) - added["geometry"] - added["temporal"]}
        | {f"reference_unet.{name}" for name in _seeing(objective.reference_unet)}
        | {f"pose_encoder.{name}" for name, _ in objective.pose_encoder.named_parameters()}
    )


def _animation_names(objective: AnimationObjective, unfreeze: str) -> set[str]:
    names = {f"controlnet.{name}" for name in _seeing(objective.controlnet)}
    names |= {f"controller.{name}" for name, _ in objective.controller.named_parameters()}
    unet = _seeing(objective.unet)
    if unfreeze == "temporal":
        unet = {name for name in unet if _SVD_TEMPORAL.search(name)}
    elif unfreeze == "decoder":
        unet = {name for name in unet if name.split(".", 1)[0] in DECODER_HALF}
    elif unfreeze == "none":
        unet = set()
    return names | {f"unet.{name}" for name in unet}


def _seeing(network: nn.Module) -> set[str]:
    """Names of the parameters whose gradient is not zero by construction."""
    return {
        name
        for name, _ in network.named_parameters()
        if not (_TRANSFORMER_BLOCK.search(name) and _BLIND_TO_ONE_TOKEN.search(name))
    }
