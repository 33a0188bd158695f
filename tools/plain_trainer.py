"""Training of both stages as a good engineer would write it in a day with plain diffusers and DeepSpeed.

`tools/measure_step.py` compares our training with it. It is written in the manner of Moore-AnimateAnyone, Wonder3D and
MimicMotion: diffusers' networks, whose transformer blocks get a `forward` of their own; the reference's features, kept
by hooks, beside the tokens of every frame; torch's attention; the autoencoder and CLIP in each step; frozen parts
without gradients; ZeRO-2. It shares no code with our networks, objectives and engine, so equal losses test both.
"""

import json
import math
from collections.abc import Collection, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, DDPMScheduler, UNet2DConditionModel
from diffusers import UNetSpatioTemporalConditionModel as VideoUNet
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

ENCODE_CHUNK = 8
Inputs = Mapping[str, Tensor]


class ExtraAttention(nn.Module):
    """A residual branch of self-attention: over all domains of a frame (geometry), or over frames (temporal)."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """`k n c` to `k n c`; positions: `n c`, added after the norm."""
        normed = self.norm(tokens)
        if positions is not None:
            normed = normed + positions
        form = "k n (three heads d) -> three k heads n d"
        query, key, value = rearrange(self.to_qkv(normed), form, three=3, heads=self.num_heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(attended, "k heads n d -> k n (heads d)"))


class Shared:
    """What the blocks of one forward pass need beside their inputs."""

    def __init__(self) -> None:
        self.bank: dict[str, Tensor] = {}  # block name -> `b n c`, the reference's features
        self.pose: Tensor | None = None  # `(b f m) c h w`
        self.num_frames = self.num_domains = 1


def read_block(
    block: Any,
    name: str,
    shared: Shared,
    hidden_states: Tensor,
    attention_mask: None = None,
    encoder_hidden_states: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    """A transformer block of the denoiser: spatial with reference, geometry, cross, feed-forward, temporal."""
    normed, reference = block.norm1(hidden_states), shared.bank[name]
    reference = repeat(reference, "b n c -> (b r) n c", r=len(normed) // len(reference))
    hidden_states = hidden_states + block.attn1(normed, encoder_hidden_states=torch.cat([normed, reference], dim=1))
    if hasattr(block, "geometry"):
        tokens = rearrange(hidden_states, "(k m) n c -> k (m n) c", m=shared.num_domains)
        hidden_states = hidden_states + rearrange(
            block.geometry(tokens), "k (m n) c -> (k m) n c", m=shared.num_domains
        )
    hidden_states = hidden_states + block.attn2(block.norm2(hidden_states), encoder_hidden_states)
    hidden_states = hidden_states + block.ff(block.norm3(hidden_states))
    if hasattr(block, "temporal"):
        sizes = {"f": shared.num_frames, "m": shared.num_domains}
        tokens = rearrange(hidden_states, "(b f m) n c -> (b m n) f c", **sizes)
        frames = torch.arange(shared.num_frames, device=tokens.device)
        positions = get_timestep_embedding(frames, tokens.shape[-1]).to(tokens.dtype)
        branch = block.temporal(tokens, positions)
        hidden_states = hidden_states + rearrange(
            branch, "(b m n) f c -> (b f m) n c", n=hidden_states.shape[1], **sizes
        )
    return hidden_states


class PoseGuider(nn.Module):
    """Convolutions from drawn poses to the latents' size, an eighth."""

    def __init__(self, out_channels: int, channels: Collection[int]) -> None:
        super().__init__()
        first, *_, last = channels
        self.conv_in = nn.Conv2d(3, first, 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(channels):
            self.blocks += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, wider, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(self, poses: Tensor) -> Tensor:
        """`k 3 H W` to `k c h w`."""
        hidden_states = F.silu(self.conv_in(poses))
        for block in self.blocks:
            hidden_states = F.silu(block(hidden_states))
        return self.conv_out(hidden_states)


class Plain(nn.Module):
    """What both stages have: the frozen encoders."""

    vae: Any
    image_encoder: Any
    unet: Any
    second_unet: str  # the name of the other network that diffusers can checkpoint

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents `n c h w`, not scaled, of pictures `n 3 H W` in [-1, 1]: the mode."""
        with torch.no_grad():
            parts = pictures.to(self.vae.dtype).split(ENCODE_CHUNK)
            return torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """CLIP's embedding `b 1 c` of pictures as its processor makes them."""
        return self.image_encoder(pictures.to(self.image_encoder.dtype)).image_embeds[:, None]


class PlainGeometry(Plain):
    """Stage 1 in one of its three steps. `forward` returns the loss of a batch that `tools/measure_step.py` makes."""

    second_unet = "reference_unet"

    def __init__(self, networks: Path, step: str, pose_channels: Collection[int]) -> None:
        super().__init__()
        base = networks / "stable-diffusion-v1-5"
        self.reference_unet = UNet2DConditionModel.from_config(_read(base / "unet"))
        self.unet = UNet2DConditionModel.from_config(_read(base / "unet"))
        self.vae = AutoencoderKL.from_config(_read(base / "vae")).eval()
        self.image_encoder = open_clip(networks / "clip-vit-large-patch14")
        self.pose_encoder = PoseGuider(self.unet.config.block_out_channels[0], pose_channels)
        self.unet.class_embedding = TimestepEmbedding(6, self.unet.time_embedding.linear_2.out_features)
        with torch.device("cpu"):
            self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.step, self.shared, self._written = step, Shared(), dict[str, Tensor]()
        for name, block in self.reference_unet.named_modules():
            if name.rpartition(".")[0].endswith("transformer_blocks"):
                block.attn1.register_forward_pre_hook(partial(self._write, name))
        for name, block in self.unet.named_modules():
            if name.rpartition(".")[0].endswith("transformer_blocks"):
                if step != "domains":
                    block.geometry = ExtraAttention(block.dim, block.num_attention_heads)
                if step == "temporal":
                    block.temporal = ExtraAttention(block.dim, block.num_attention_heads)
                block.forward = partial(read_block, block, name, self.shared)
        self.unet.conv_in.register_forward_hook(lambda _, __, output: output + self.shared.pose)

    def _write(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._written[name] = inputs[0]

    def forward(self, inputs: Inputs) -> Tensor:
        """The mean squared error of the predicted noise (Eq. 3)."""
        dtype, shared = self.unet.dtype, self.shared
        domains, kept = inputs["domains"], inputs["kept"]
        _, num_frames, num_domains = domains.shape
        per_clip = num_frames * num_domains
        # 1. noisy latents
        latents = self.encode(inputs["images"]) * self.vae.config.scaling_factor
        timesteps = repeat(inputs["timesteps"], "b -> (b k)", k=per_clip)
        noisy = self.scheduler.add_noise(latents, inputs["noise"].to(latents.dtype), timesteps).to(dtype)
        # 2. conditions
        reference = self.encode(inputs["reference"]) * self.vae.config.scaling_factor * kept[:, None, None, None]
        embeddings = (self.embed(inputs["clip_pictures"]) * kept[:, None, None]).to(dtype)
        with torch.set_grad_enabled(self.step == "domains"):
            self.reference_unet(reference.to(dtype), torch.zeros_like(inputs["timesteps"]), embeddings)
            pose = self.pose_encoder(inputs["pose"].to(dtype))
        # A copy: with gradient checkpointing the hooks run once more in the backward pass.
        shared.bank, self._written = self._written, {}
        shared.pose = repeat(pose, "k c h w -> (k m) c h w", m=num_domains)
        shared.num_frames, shared.num_domains = num_frames, num_domains
        one_hot = F.one_hot(domains.flatten(), 3).to(dtype)
        # 3. prediction
        prediction = self.unet(
            noisy,
            timesteps,
            repeat(embeddings, "b t c -> (b k) t c", k=per_clip),
            class_labels=torch.cat([one_hot.sin(), one_hot.cos()], dim=-1),
        ).sample
        return F.mse_loss(prediction.float(), inputs["noise"].float())


class MapEncoder(nn.Module):
    """Convolutions from a map to the latents' size, with a residual block after each reduction."""

    def __init__(self, channels: Collection[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, next(iter(channels)), 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(channels):
            self.blocks += [nn.Conv2d(width, wider, 3, stride=2, padding=1), ResidualBlock(wider)]

    def forward(self, maps: Tensor) -> Tensor:
        """`n 3 H W` to `n c h w`."""
        hidden_states = F.silu(self.conv_in(maps))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(8, channels)
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`n c h w` to the same."""
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        return hidden_states + self.conv2(F.silu(self.norm2(residual)))


class Controller(nn.Module):
    """An encoder for each control map, attention over the maps of a frame, mean, convolution (Eq. 7)."""

    def __init__(
        self, controls: Collection[str], out_channels: int, channels: Collection[int], head_width: int
    ) -> None:
        super().__init__()
        *_, last = channels
        self.encoders = nn.ModuleDict({name: MapEncoder(channels) for name in controls})
        self.attention = ExtraAttention(last, last // head_width)
        self.zero_convolution = nn.Conv2d(last, out_channels, 1)

    def forward(self, maps: Inputs) -> Tensor:
        """`k 3 H W` for each control to `k c h w`."""
        features = torch.stack([encoder(maps[name]) for name, encoder in self.encoders.items()], dim=1)
        sizes = {"m": len(self.encoders), "h": features.shape[-2]}
        tokens = rearrange(features, "k m c h w -> k (m h w) c")
        tokens = tokens + self.attention(tokens)
        return self.zero_convolution(rearrange(tokens, "k (m h w) c -> k m c h w", **sizes).mean(dim=1))


class PlainAnimation(Plain):
    """Stage 2. `forward` returns the loss of a batch that `tools/measure_step.py` makes."""

    second_unet = "controlnet"

    def __init__(self, networks: Path, controls: Collection[str], channels: Collection[int], head_width: int) -> None:
        super().__init__()
        base = networks / "stable-video-diffusion-img2vid-xt-1-1"
        self.unet = VideoUNet.from_config(_read(base / "unet"))
        self.controlnet = VideoUNet.from_config(_read(base / "unet"))
        del self.controlnet.up_blocks, self.controlnet.conv_norm_out, self.controlnet.conv_out
        widths = self.unet.config.block_out_channels
        skips = [widths[0]]
        for block, width in zip(self.unet.down_blocks, widths, strict=True):
            skips += [width] * (len(block.resnets) + (block.downsamplers is not None))
        self.controlnet.down_zero_convolutions = nn.ModuleList(nn.Conv2d(width, width, 1) for width in skips)
        self.controlnet.mid_zero_convolution = nn.Conv2d(widths[-1], widths[-1], 1)
        self.controller = Controller(controls, widths[0], channels, head_width)
        self.vae = AutoencoderKLTemporalDecoder.from_config(_read(base / "vae")).eval()
        self.image_encoder = open_clip(base / "image_encoder")

    def forward(self, inputs: Inputs) -> Tensor:
        """SVD's weighted squared error of the denoised latents."""
        dtype, sigmas = self.unet.dtype, inputs["sigmas"][:, None, None, None, None]
        num_frames = inputs["noise"].shape[1]
        # 1. noisy latents, conditioning latents
        latents = (self.encode(inputs["images"]) * self.vae.config.scaling_factor).float()
        latents = rearrange(latents, "(b f) c h w -> b f c h w", f=num_frames)
        noisy = latents + sigmas * inputs["noise"]
        strength = inputs["augmentation"]
        noised = inputs["reference"] + strength[:, None, None, None] * inputs["augmentation noise"]
        conditioning = self.encode(noised) * inputs["kept latents"][:, None, None, None]
        conditioning = repeat(conditioning, "b c h w -> b f c h w", f=num_frames)
        embeddings = (self.embed(inputs["clip_pictures"]) * inputs["kept embedding"][:, None, None]).to(dtype)
        # 2. prediction
        scale = (sigmas.square() + 1).sqrt()
        sample = torch.cat([noisy / scale, conditioning.float()], dim=2).to(dtype)
        ids = torch.stack([inputs["fps"] - 1, torch.full_like(strength, 127), strength], dim=1)
        conditions = (inputs["sigmas"].log() / 4, embeddings, ids)
        control = self.controller({name: inputs[name].to(dtype) for name in self.controller.encoders})
        hidden, skips, _ = run_encoder(self.controlnet, sample, *conditions, added=control)
        zero_convolutions = self.controlnet.down_zero_convolutions
        down = [convolution(skip) for convolution, skip in zip(zero_convolutions, skips, strict=True)]
        mid = self.controlnet.mid_zero_convolution(hidden)
        hidden, skips, more = run_encoder(self.unet, sample, *conditions)
        skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
        output = run_decoder(self.unet, hidden + mid, skips, more)
        output = rearrange(output.float(), "(b f) c h w -> b f c h w", f=num_frames)
        # 3. loss
        denoised = noisy / scale.square() - output * sigmas / scale
        return (scale.square() / sigmas.square() * (denoised - latents).square()).mean()


def run_encoder(
    unet: Any, sample: Tensor, timesteps: Tensor, embeddings: Tensor, ids: Tensor, added: Tensor | None = None
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """diffusers' `forward` of SVD's UNet to its middle block: hidden states, skips, and what its blocks read."""
    num_clips, num_frames = sample.shape[:2]
    time = unet.time_embedding(unet.time_proj(timesteps).to(sample.dtype))
    time = time + unet.add_embedding(unet.add_time_proj(ids.flatten()).reshape(num_clips, -1).to(time.dtype))
    arguments: dict[str, Any] = {
        "temb": time.repeat_interleave(num_frames, dim=0),
        "encoder_hidden_states": embeddings.repeat_interleave(num_frames, dim=0),
        "image_only_indicator": torch.zeros(num_clips, num_frames, dtype=sample.dtype, device=sample.device),
    }
    hidden = unet.conv_in(sample.flatten(0, 1))
    if added is not None:
        hidden = hidden + added
    skips = [hidden]
    for block in unet.down_blocks:
        hidden, more_skips = block(hidden_states=hidden, **_read_by(block, arguments))
        skips += more_skips
    return unet.mid_block(hidden_states=hidden, **arguments), skips, arguments


def run_decoder(unet: Any, hidden: Tensor, skips: list[Tensor], arguments: Mapping[str, Any]) -> Tensor:
    """The rest of diffusers' `forward`."""
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips, own = skips[:-count], skips[-count:]
        hidden = block(hidden_states=hidden, res_hidden_states_tuple=tuple(own), **_read_by(block, arguments))
    output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return output


def _read_by(block: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    without = () if getattr(block, "has_cross_attention", False) else ("encoder_hidden_states",)
    return {name: value for name, value in arguments.items() if name not in without}


def _read(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def open_clip(folder: Path) -> Any:
    """The vision tower of a whole CLIP, or of itself."""
    values = _read(folder)
    return CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(values.get("vision_config", values))).eval()


class PlainTrainer:
    """DeepSpeed's ZeRO-2 with torch's AdamW, and diffusers' moving average, over a model that returns its loss."""

    def __init__(self, model: Plain, optimizer: Any, *, checkpointing: bool, bf16: bool, device: torch.device) -> None:
        """Wraps a model with weights.

        Args:
            model: its parameters with `requires_grad` train.
            optimizer: has the settings `lr`, `betas`, `eps`, `weight_decay`, `gradient_clipping` and `ema_decay`.
            checkpointing: whether diffusers computes blocks again in the backward pass, else the best settings.
            bf16: whether DeepSpeed casts the model to bfloat16.
            device: of the model.
        """
        import deepspeed
        from diffusers.training_utils import EMAModel

        if checkpointing:
            for network in (model.unet, getattr(model, model.second_unet)):
                network.enable_gradient_checkpointing()
        self.device, self.trained = device, [value for value in model.parameters() if value.requires_grad]
        on_gpu, bucket = device.type == "cuda", min(100_000_000, sum(value.numel() for value in self.trained))
        settings = {name: getattr(optimizer, name) for name in ("lr", "betas", "eps", "weight_decay")}
        adamw = torch.optim.AdamW(self.trained, **settings, fused=True if on_gpu else None)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # with one rank and no accumulation it is only a name
            "gradient_clipping": optimizer.gradient_clipping,
            "bf16": {"enabled": bf16},
            "zero_optimization": {
                "stage": 2,
                "overlap_comm": on_gpu,
                "contiguous_gradients": True,
                "reduce_bucket_size": bucket + bucket % 2,
                "allgather_bucket_size": bucket + bucket % 2,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
        if not checkpointing:  # not before: DeepSpeed broadcasts dense weights alone; what trains gets its own layout
            for weight in model.parameters():
                if weight.dim() == 4 and not weight.requires_grad:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.average = EMAModel(self.trained, decay=optimizer.ema_decay, foreach=True)

    def step(self, inputs: Inputs) -> Tensor:
        """One optimizer step; returns the loss."""
        loss = self.engine({name: values.to(self.device) for name, values in inputs.items()})
        self.engine.backward(loss)
        self.engine.step()
        self.average.step(self.trained)
        return loss.detach()
