"""Temporal attention as a residual branch of a transformer block."""

import torch
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange
from torch import Tensor, nn

from dreamdance.errors import UserError
from dreamdance_kernels import temporal_attention


class TemporalAttention(nn.Module):
    """Every token attends over the frames of its clip, at its own position and in its own domain.

    LayerNorm first, then a sinusoidal frame position (without it the branch could not tell the order of frames); the
    output projection starts at zero, so that the branch adds nothing before it is trained.

    Args:
        channels: c.
        num_heads: heads; any that divide c.
        max_frames: longest clip that positions exist for.
    """

    def __init__(self, channels: int, num_heads: int, max_frames: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.max_frames = max_frames
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(
        self, hidden_states: Tensor, *, num_frames: int, num_domains: int = 1, backend: str | None = None
    ) -> Tensor:
        """The branch alone, without the residual.

        Args:
            hidden_states: `((b f m) n c)`.
            num_frames: f, at most `max_frames`.
            num_domains: m; domains do not see one another here.
            backend: name of a backend of `dreamdance_kernels`.

        Returns:
            `((b f m) n c)`.

        Raises:
            UserError: the clip has more frames than `max_frames`.
        """
        if num_frames > self.max_frames:
            raise UserError(
                f"{num_frames} frames at once, but temporal attention has positions for {self.max_frames} "
                "(model.max_frames): use shorter windows, or train with a larger max_frames."
            )
        channels = hidden_states.shape[-1]
        frames = torch.arange(num_frames, device=hidden_states.device)
        positions = get_timestep_embedding(frames, channels).to(hidden_states.dtype)

        normed = rearrange(self.norm(hidden_states), "(b f m) n c -> b f (m n) c", f=num_frames, m=num_domains)
        placed = rearrange(normed + positions[:, None], "b f tokens c -> (b f) tokens c")
        query, key, value = self.to_qkv(placed).chunk(3, dim=-1)
        attended = temporal_attention(
            query, key, value, num_frames=num_frames, num_heads=self.num_heads, backend=backend
        )
        return rearrange(self.to_out(attended), "(b f) (m n) c -> (b f m) n c", f=num_frames, m=num_domains)
