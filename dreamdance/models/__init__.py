"""The networks of DreamDance, as diffusers models: a configuration, `from_pretrained`, `save_pretrained`.

Letters of all shapes here and elsewhere: `b` clips or images, `f` frames, `m` domains (always in the order rgb, normal,
depth), `c` channels, `h w` latent height and width, `H W` pixel height and width, `n` tokens, `t` tokens of the
conditioning, `heads`, `d` head width. Batches that mix clips, frames and domains are ordered `(b f m)` (contract C1).
This package knows no data, recipes, ranks or sharding.
"""

from dreamdance.models.cross_domain_controller import CrossDomainControllerModel
from dreamdance.models.geometry_unet import GeometryUNetModel
from dreamdance.models.image_embedding import ImageEmbeddingStandIn
from dreamdance.models.patch_autoencoder import PatchAutoencoder
from dreamdance.models.pose_encoder import PoseEncoderModel
from dreamdance.models.reference_unet import ReferenceUNetModel
from dreamdance.models.svd_controlnet import ControlResiduals, SpatioTemporalControlNetModel
from dreamdance.models.svd_unet import run_svd_unet

__all__ = [
    "ControlResiduals",
    "CrossDomainControllerModel",
    "GeometryUNetModel",
    "ImageEmbeddingStandIn",
    "PatchAutoencoder",
    "PoseEncoderModel",
    "ReferenceUNetModel",
    "SpatioTemporalControlNetModel",
    "run_svd_unet",
]
