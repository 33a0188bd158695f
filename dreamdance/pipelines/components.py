"""The classes that a saved pipeline's `model_index.json` names, under one address that stays when modules move.

diffusers imports the module which `model_index.json` names for a component and looks there both for the class and for
the base class which says how to load it; so everything is found here, `ModelMixin` and `DiffusionPipeline` included.
"""

from diffusers import DiffusionPipeline, ModelMixin

from dreamdance.models import (
    CrossDomainControllerModel,
    GeometryUNetModel,
    PatchAutoencoder,
    PoseEncoderModel,
    ReferenceUNetModel,
    SpatioTemporalControlNetModel,
)
from dreamdance.models.image_embedding import ImageEmbeddingStandIn

__all__ = [
    "CrossDomainControllerModel",
    "DiffusionPipeline",
    "GeometryUNetModel",
    "ImageEmbeddingStandIn",
    "ModelMixin",
    "PatchAutoencoder",
    "PoseEncoderModel",
    "ReferenceUNetModel",
    "SpatioTemporalControlNetModel",
]
