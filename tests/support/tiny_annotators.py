"""Tiny random networks in the formats of Depth Anything V2 and Marigold, saved by transformers and diffusers."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, MarigoldNormalsPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)


def save_depth_anything(folder: Path, kind: str = "relative") -> Path:
    """Depth Anything V2 of the given kind, `relative` or `metric`, for pictures of about 70 pixels."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 16, 32, 32],
        fusion_hidden_size=8,
        head_in_index=-1,
        patch_size=14,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    network = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():  # transformers' first weights are so small that the result would be the same everywhere
        for weight in network.parameters():
            if weight.ndim > 1:
                torch.nn.init.xavier_normal_(weight)
        network.head.conv3.weight.abs_()  # a ReLU follows
        network.head.conv3.bias.fill_(0.5)
    network.save_pretrained(folder, safe_serialization=True)
    DPTImageProcessor(
        do_resize=True,
        size={"height": 70, "width": 70},
        ensure_multiple_of=14,
        keep_aspect_ratio=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


def save_marigold(folder: Path) -> Path:
    """Marigold's pipeline for normals, for pictures of 64 pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=[16, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    words = folder.parent / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    MarigoldNormalsPipeline(
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=16),
        prediction_type="normals",
        use_full_z_range=True,
        default_denoising_steps=1,
        default_processing_resolution=64,
    ).save_pretrained(folder, safe_serialization=True)
    return folder
