"""The domain embedding of the unified diffusion (Eq. 3): it encodes which map the denoiser processes."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from dreamdance.modalities import DOMAINS


class DomainEmbedding(nn.Module):
    """One-hot domain, positionally encoded as cat(sin, cos), through an MLP; added after the time embedding's own MLP.

    The projection is not zero-initialised: Wonder3D reports that with zeros the domains came out at random.

    Args:
        time_embed_dim: width of the UNet's time embedding.
        num_domains: m.
    """

    def __init__(self, time_embed_dim: int, num_domains: int = len(DOMAINS)) -> None:
        super().__init__()
        self.num_domains = num_domains
        self.mlp = TimestepEmbedding(2 * num_domains, time_embed_dim)

    def forward(self, domains: Tensor) -> Tensor:
        """Embed domain indices.

        Args:
            domains: `((b f m),)` int64, indices into `DOMAINS`.

        Returns:
            `((b f m), time_embed_dim)` in the dtype of the weights.
        """
        one_hot_rows = torch.eye(self.num_domains, device=domains.device, dtype=self.mlp.linear_1.weight.dtype)
        one_hot = F.embedding(domains, one_hot_rows)
        return self.mlp(torch.cat([one_hot.sin(), one_hot.cos()], dim=-1))
