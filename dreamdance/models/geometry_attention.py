"""Geometry attention (Eq. 5) as a residual branch of a transformer block."""

from torch import Tensor, nn

from dreamdance_kernels import geometry_attention


class GeometryAttention(nn.Module):
    """Every domain's tokens attend to the tokens of all domains of the same frame, with shared W_q, W_k, W_v (Eq. 5).

    LayerNorm first; the output projection starts at zero, so that the branch adds nothing before it is trained.

    Args:
        channels: c.
        num_heads: heads; any that divide c.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, hidden_states: Tensor, *, num_domains: int, backend: str | None = None) -> Tensor:
        """The branch alone, without the residual.

        Args:
            hidden_states: `((b f m) n c)`.
            num_domains: m; with 1 this is self-attention.
            backend: name of a backend of `dreamdance_kernels`.

        Returns:
            `((b f m) n c)`.
        """
        query, key, value = self.to_qkv(self.norm(hidden_states)).chunk(3, dim=-1)
        attended = geometry_attention(
            query, key, value, num_domains=num_domains, num_heads=self.num_heads, backend=backend
        )
        return self.to_out(attended)
