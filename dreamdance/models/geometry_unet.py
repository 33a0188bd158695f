"""The denoising UNet of stage 1: Stable Diffusion's, denoising rgb, normal and depth together (Eq. 3 to 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

from dreamdance.models.diffusers_unet import (
    check_stable_diffusion_config,
    embed_time,
    expand_to_batch,
    load_base_weights,
    replace_transformer_blocks,
    run_blocks,
)
from dreamdance.models.domain_embedding import DomainEmbedding
from dreamdance.models.geometry_attention import GeometryAttention
from dreamdance.models.reference_attention import attend_to_reference
from dreamdance.models.temporal_attention import TemporalAttention


@dataclass(frozen=True)
class GeometryContext:
    """Inputs of every transformer block in one forward pass, beside its hidden states.

    Attributes:
        num_frames: f.
        num_domains: m.
        reference_features: `(b n c)` by block name, or None for no reference.
        attention_backend: name of a backend of `dreamdance_kernels`.
    """

    num_frames: int
    num_domains: int
    reference_features: Mapping[str, Tensor] | None
    attention_backend: str | None


class GeometryTransformerBlock(nn.Module):
    """A transformer block in the paper's order: spatial (Eq. 4), geometry (Eq. 5), cross, feed-forward, temporal.

    Args:
        name: the block's name in the UNet, which is the key of its reference feature.
        block: diffusers' block; this one takes over its parts under the same names.
        geometry_attention: whether the branch exists.
        temporal_attention: whether the branch exists.
        max_frames: longest clip of the temporal branch.
    """

    def __init__(
        self,
        name: str,
        block: BasicTransformerBlock,
        *,
        geometry_attention: bool,
        temporal_attention: bool,
        max_frames: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff
        channels, num_heads = block.dim, block.num_attention_heads
        self.geometry = GeometryAttention(channels, num_heads) if geometry_attention else None
        self.temporal = TemporalAttention(channels, num_heads, max_frames) if temporal_attention else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: None = None,
        timestep: None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: None = None,
    ) -> Tensor:
        """Run on `((b f m) n c)`; arguments and their order are those in which diffusers calls a transformer block."""
        context: GeometryContext = (cross_attention_kwargs or {})["context"]
        reference = None if context.reference_features is None else context.reference_features[self.name]
        return self.compute(
            hidden_states,
            encoder_hidden_states,
            reference,
            num_frames=context.num_frames,
            num_domains=context.num_domains,
            backend=context.attention_backend,
        )

    def compute(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        reference: Tensor | None,
        *,
        num_frames: int,
        num_domains: int,
        backend: str | None,
    ) -> Tensor:
        """Run on `((b f m) n c)` with the block's own reference feature `(b n c)`, or None; see `GeometryContext`."""
        # 1. spatial, with the reference (Eq. 4)
        normed = self.norm1(hidden_states)
        hidden_states = hidden_states + attend_to_reference(self.attn1, normed, reference, backend=backend)
        # 2. geometry (Eq. 5)
        if self.geometry is not None:
            hidden_states = hidden_states + self.geometry(hidden_states, num_domains=num_domains, backend=backend)
        # 3. cross
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
        # 4. feed-forward
        hidden_states = hidden_states + self.ff(self.norm3(hidden_states))
        # 5. temporal
        if self.temporal is not None:
            hidden_states = hidden_states + self.temporal(
                hidden_states, num_frames=num_frames, num_domains=num_domains, backend=backend
            )
        return hidden_states


class GeometryUNetModel(UNet2DConditionModel):
    """Denoises the latents of rgb, normal and depth of every frame together, guided by pose and reference (Eq. 3 to 5).

    At initialisation, with `domains=None`, no pose and no reference, its output equals the plain UNet's on the same
    batch bit for bit (contract C3).

    Args:
        domain_embedding: whether the domain embedding exists.
        geometry_attention: whether every transformer block has a geometry attention (Eq. 5).
        temporal_attention: whether every transformer block has a temporal attention.
        max_frames: longest clip of the temporal attention.
        trained_frames: length of the clips that the temporal attention was trained on; positions beyond are untrained.
            None without temporal attention, and for older exports, which do not record it.
        attention_backend: name of a backend of `dreamdance_kernels`, or None for its default.
        kwargs: the configuration of `UNet2DConditionModel`.

    Raises:
        UserError: a variant of diffusers' UNet that is not supported.
    """

    _no_split_modules = ["GeometryTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["GeometryTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        domain_embedding: bool = True,
        geometry_attention: bool = False,
        temporal_attention: bool = False,
        max_frames: int = 32,
        trained_frames: int | None = None,
        attention_backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_stable_diffusion_config(self.config)
        time_embed_dim = self.time_embedding.linear_2.out_features
        self.domain_embedder = DomainEmbedding(time_embed_dim) if domain_embedding else None
        self.block_names = replace_transformer_blocks(
            self,
            lambda name, block: GeometryTransformerBlock(
                name,
                block,
                geometry_attention=geometry_attention,
                temporal_attention=temporal_attention,
                max_frames=max_frames,
            ),
        )

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Adds the parent's keys to the configuration: diffusers reads signatures, where `kwargs` hides them."""
        parents = UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        return parents | (UNet2DConditionModel._get_init_keys(GeometryUNetModel) - {"kwargs"})

    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        *,
        domain_embedding: bool = True,
        geometry_attention: bool = False,
        temporal_attention: bool = False,
        max_frames: int = 32,
        trained_frames: int | None = None,
        attention_backend: str | None = None,
        reuse_weights: bool = False,
    ) -> Self:
        """Take a plain UNet's weights, on its device and in its dtype; the added modules keep their initial values.

        Args:
            unet: the UNet with the weights.
            domain_embedding, geometry_attention, temporal_attention, max_frames, trained_frames, attention_backend:
                see the constructor.
            reuse_weights: share the memory of `unet`'s weights; what trains one then changes the other.

        Raises:
            CheckpointError: a weight is missing or left over.
        """
        with torch.device(unet.device):
            model = cls.from_config(
                unet.config,
                domain_embedding=domain_embedding,
                geometry_attention=geometry_attention,
                temporal_attention=temporal_attention,
                max_frames=max_frames,
                trained_frames=trained_frames,
                attention_backend=attention_backend,
            ).to(dtype=unet.dtype)
        added = (*model.domain_parameters(), *model.geometry_parameters(), *model.temporal_parameters())
        load_base_weights(model, unet, added=added, unused=(), reuse=reuse_weights)
        return model

    def domain_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the domain embedding, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith("domain_embedder.")}

    def geometry_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of every geometry attention, by name: what step 2 trains."""
        return {name: parameter for name, parameter in self.named_parameters() if ".geometry." in name}

    def temporal_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of every temporal attention, by name: what step 3 trains."""
        return {name: parameter for name, parameter in self.named_parameters() if ".temporal." in name}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        domains: Tensor | None = None,
        num_frames: int = 1,
        num_domains: int = 1,
        pose_features: Tensor | None = None,
        reference_features: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict the denoising target of every domain of every frame.

        Args:
            sample: `((b f m) c h w)`, noisy latents, domains innermost.
            timestep: `(b,)` or a scalar, one per clip; `((b f m),)` is accepted too.
            encoder_hidden_states: `(b t c)`, CLIP embedding of each clip's reference; `((b f m) t c)` is accepted too.
            domains: `((b f m),)` int64 into `DOMAINS`, or None to switch the domain embedding off.
            num_frames: f.
            num_domains: m.
            pose_features: `((b f) c h w)` from the pose encoder, shared by the domains, or None.
            reference_features: `(b n c)` by block name, from the reference UNet, or None.

        Returns:
            `((b f m) c h w)`.

        Raises:
            ValueError: the inputs do not fit together.
            UserError: the clip has more frames than the temporal attention has positions.
        """
        self._check_inputs(sample, domains, num_frames, num_domains, pose_features, reference_features)
        context = GeometryContext(num_frames, num_domains, reference_features, self.config["attention_backend"])
        # 1. time and domain
        embedding = embed_time(self, sample, timestep)
        if domains is not None and self.domain_embedder is not None:
            embedding = embedding + self.domain_embedder(domains)
        encoder_hidden_states = expand_to_batch(encoder_hidden_states, sample.shape[0], "encoder_hidden_states")
        # 2. input and pose
        hidden_states = self.conv_in(2 * sample - 1.0 if self.config["center_input_sample"] else sample)
        if pose_features is not None:
            by_frame = rearrange(hidden_states, "(bf m) c h w -> bf m c h w", m=num_domains)
            hidden_states = rearrange(by_frame + pose_features[:, None], "bf m c h w -> (bf m) c h w")
        # 3. down, middle, up
        hidden_states = run_blocks(self, hidden_states, embedding, encoder_hidden_states, context)
        # 4. output
        if self.conv_norm_out is not None:
            hidden_states = self.conv_act(self.conv_norm_out(hidden_states))
        return self.conv_out(hidden_states)

    def _check_inputs(
        self,
        sample: Tensor,
        domains: Tensor | None,
        num_frames: int,
        num_domains: int,
        pose_features: Tensor | None,
        reference_features: Mapping[str, Tensor] | None,
    ) -> None:
        batch_size = sample.shape[0]
        if num_frames < 1 or num_domains < 1 or batch_size % (num_frames * num_domains):
            raise ValueError(
                f"a batch of {batch_size} is not whole clips of {num_frames} frames x {num_domains} domains"
            )
        if domains is not None and self.domain_embedder is None:
            raise ValueError("domains were given, but this model has no domain embedding (domain_embedding=False)")
        if domains is not None and domains.shape != (batch_size,):
            raise ValueError(f"domains must have one index per sample, ({batch_size},); got {tuple(domains.shape)}")
        if pose_features is not None and pose_features.shape[0] * num_domains != batch_size:
            raise ValueError(
                f"pose_features: {pose_features.shape[0]} frames, but the batch has {batch_size // num_domains}"
            )
        if reference_features is not None and set(reference_features) != set(self.block_names):
            differing = sorted(set(reference_features) ^ set(self.block_names))
            raise ValueError(
                f"reference_features must have one entry per transformer block; differing: {differing[:5]}"
            )
