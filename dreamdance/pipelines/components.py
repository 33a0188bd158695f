"""The classes that `model_index.json` of a saved pipeline names, in one module that does not move.

For each component, diffusers imports the module in `model_index.json`, and looks in that module for the class and for
the base class that loads it. Therefore this module also contains `ModelMixin` and `DiffusionPipeline`.
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
