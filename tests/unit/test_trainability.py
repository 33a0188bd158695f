"""Exactly the right parameters train in each step, and frozen ones keep no inputs for gradients."""

import pytest
import torch
from support.recipes import tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe
from torch import nn

from dreamdance.errors import RecipeError
from dreamdance.models.equal_rewrites import EQUAL_REWRITES
from dreamdance.training.networks.trainability import set_modes
from dreamdance.training.stages.training_stage import stage_of

ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}
# cross-attention over one token: its query, its key and the norm before the query cannot matter
CROSS_ATTENTION = {"attn2.to_v", "attn2.to_out.0"}
FEED_FORWARD = {"ff.net.0.proj", "ff.net.2"}
BLOCK = {"norm1", "norm3", *(f"attn1.{part}" for part in ATTENTION), *CROSS_ATTENTION, *FEED_FORWARD}
TEMPORAL_BLOCK = BLOCK | {"norm_in", "ff_in.net.0.proj", "ff_in.net.2"}
RESNET = {"norm1", "conv1", "time_emb_proj", "norm2", "conv2"}
TIME = {"time_embedding.linear_1", "time_embedding.linear_2"}
GEOMETRY_BRANCH = {"norm", "to_qkv", "to_out"}
# where the tiny UNet of two levels, attention at the lower one, has its transformer blocks
TRANSFORMERS = (
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)


def under(prefix: str, names: set[str]) -> set[str]:
    return {f"{prefix}.{name}" for name in names}


def unet_modules() -> set[str]:
    """Every module of the tiny UNet that trains, written out."""
    resnets = {
        "down_blocks.0.resnets.0": RESNET,
        "down_blocks.1.resnets.0": RESNET | {"conv_shortcut"},
        "mid_block.resnets.0": RESNET,
        "mid_block.resnets.1": RESNET,
        "up_blocks.0.resnets.0": RESNET | {"conv_shortcut"},
        "up_blocks.0.resnets.1": RESNET | {"conv_shortcut"},
        "up_blocks.1.resnets.0": RESNET | {"conv_shortcut"},
        "up_blocks.1.resnets.1": RESNET | {"conv_shortcut"},
    }
    names = {
        "conv_in",
        "conv_norm_out",
        "conv_out",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
    }
    names |= TIME
    for place, parts in resnets.items():
        names |= under(place, parts)
    for place in TRANSFORMERS:
        names |= under(place, {"norm", "proj_in", "proj_out"}) | under(f"{place}.transformer_blocks.0", BLOCK)
    return names


def reference_unet_modules() -> set[str]:
    """The same, up to `norm1` of the last transformer block: nothing after it is read."""
    last = TRANSFORMERS[-1]
    unread = under(f"{last}.transformer_blocks.0", BLOCK - {"norm1"}) | {f"{last}.proj_out"}
    return {
        name
        for name in unet_modules() - unread - {"conv_norm_out", "conv_out", "up_blocks.0.upsamplers.0.conv"}
        if not name.startswith("up_blocks.1.")
    }


def module_names(parameters: list[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in parameters}


def optimize(objective: nn.Module, batch: object, *, steps: int) -> tuple[set[str], dict[str, torch.Tensor]]:
    """Names of the parameters that moved in some AdamW steps, and the state before them."""
    before = {name: value.detach().clone() for name, value in objective.state_dict().items()}
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(batch).loss.backward()
        optimizer.step()
    after = objective.state_dict()
    return {name for name in after if not torch.equal(after[name], before[name])}, before


def test_first_step_trains_both_unets_pose_encoder_and_domain_embedding():
    recipe = tiny_stage1_recipe("domains")
    objective = stage_of(recipe).build()
    names = stage_of(recipe).set_trainable(objective)
    expected = under("unet", unet_modules()) | under("reference_unet", reference_unet_modules())
    expected |= {f"pose_encoder.{part}" for part in ("conv_in", "blocks.0", "blocks.1", "conv_out")}
    expected |= {"unet.domain_embedder.mlp.linear_1", "unet.domain_embedder.mlp.linear_2"}
    assert module_names(names) == expected
    assert names == sorted(names)


@pytest.mark.parametrize(("train", "branch"), [("geometry", "geometry"), ("temporal", "temporal")])
def test_second_and_third_step_train_only_their_own_branches(train, branch):
    recipe = tiny_stage1_recipe(train)
    objective = stage_of(recipe).build()
    names = stage_of(recipe).set_trainable(objective)
    expected = set()
    for place in TRANSFORMERS:
        expected |= under(f"unet.{place}.transformer_blocks.0.{branch}", GEOMETRY_BRANCH)
    assert module_names(names) == expected


def svd_encoder_modules() -> set[str]:
    """Every module of the tiny SVD UNet before its up blocks, written out."""
    spatio_temporal = under("spatial_res_block", RESNET) | under("temporal_res_block", RESNET) | {"time_mixer"}
    names = (
        {"conv_in", "down_blocks.0.downsamplers.0.conv"} | TIME | {"add_embedding.linear_1", "add_embedding.linear_2"}
    )
    for place in ("down_blocks.0.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"):
        names |= under(place, spatio_temporal)
    names |= under("down_blocks.1.resnets.0", spatio_temporal | {"spatial_res_block.conv_shortcut"})
    for place in TRANSFORMERS[:2]:
        names |= svd_transformer_modules(place)
    return names


def svd_transformer_modules(place: str) -> set[str]:
    names = under(
        place, {"norm", "proj_in", "proj_out", "time_mixer", "time_pos_embed.linear_1", "time_pos_embed.linear_2"}
    )
    names |= under(f"{place}.transformer_blocks.0", BLOCK)
    return names | under(f"{place}.temporal_transformer_blocks.0", TEMPORAL_BLOCK)


def test_frozen_svd_trains_the_controller_and_the_whole_controlnet():
    recipe = tiny_stage2_recipe({"model.unfreeze": "none"})
    objective = stage_of(recipe).build()
    modules = module_names(stage_of(recipe).set_trainable(objective))
    zero_convolutions = {"mid_zero_convolution", *(f"down_zero_convolutions.{index}" for index in range(4))}
    of_controlnet = {name.removeprefix("controlnet.") for name in modules if name.startswith("controlnet.")}
    assert of_controlnet == svd_encoder_modules() | zero_convolutions
    of_controller = {name for name, _ in objective.controller.named_parameters()}
    assert {name for name in stage_of(recipe).set_trainable(objective) if name.startswith("controller.")} == under(
        "controller", of_controller
    )
    assert not any(name.startswith(("unet.", "vae.", "image_encoder.")) for name in modules)


def test_unfreezing_the_decoder_adds_the_up_blocks_and_the_head_alone():
    added = unfrozen_modules("decoder")
    assert {name.split(".")[0] for name in added} == {"up_blocks", "conv_norm_out", "conv_out"}
    assert svd_transformer_modules("up_blocks.0.attentions.0") <= added


def test_unfreezing_temporal_layers_adds_them_in_both_halves_alone():
    added = unfrozen_modules("temporal")
    parts = ("temporal_transformer_blocks", "temporal_res_block", "time_mixer", "time_pos_embed")
    assert all(any(part in name for part in parts) for name in added)
    assert {name.split(".")[0] for name in added} == {"down_blocks", "mid_block", "up_blocks"}
    assert added == {name for name in unfrozen_modules("all") if any(part in name for part in parts)}


def test_unfreezing_all_adds_everything_that_can_learn():
    assert unfrozen_modules("all") >= svd_encoder_modules() | unfrozen_modules("decoder")


def unfrozen_modules(unfreeze: str) -> set[str]:
    recipe = tiny_stage2_recipe({"model.unfreeze": unfreeze})
    objective = stage_of(recipe).build()
    modules = module_names(stage_of(recipe).set_trainable(objective))
    return {name.removeprefix("unet.") for name in modules if name.startswith("unet.")}


@pytest.mark.parametrize("train", ["domains", "geometry", "temporal"])
def test_three_steps_of_stage_1_move_each_trainable_parameter_and_nothing_else(train):
    recipe = tiny_stage1_recipe(train)
    objective = stage_of(recipe).build()
    names = stage_of(recipe).set_trainable(objective)
    # three, because zero-initialised projections at first block the gradients of the layers before them
    moved, _ = optimize(objective, tiny_clip_batch(num_frames=recipe.data.num_frames), steps=3)
    assert moved == set(names)
    assert all((parameter.grad is None) != (name in names) for name, parameter in objective.named_parameters())


@pytest.mark.parametrize("unfreeze", ["none", "temporal", "decoder", "all"])
def test_four_steps_of_stage_2_move_each_trainable_parameter_and_nothing_else(unfreeze):
    recipe = tiny_stage2_recipe({"model.unfreeze": unfreeze})
    objective = stage_of(recipe).build()
    names = stage_of(recipe).set_trainable(objective)
    # four: ControlNet's zero convolutions, the controller's, its attention's output, then the layers before that
    moved, _ = optimize(objective, tiny_clip_batch(), steps=4)
    assert moved == set(names)
    assert all((parameter.grad is None) != (name in names) for name, parameter in objective.named_parameters())


def test_query_key_and_norm_of_one_token_cross_attention_get_no_gradient_or_only_rounding_noise():
    recipe = tiny_stage1_recipe("domains")
    blind = ("attn2.to_q", "attn2.to_k", "norm2")
    for rewrites in (EQUAL_REWRITES, EQUAL_REWRITES - {"one_token_attention"}):
        objective = stage_of(recipe).build(rewrites=rewrites)
        names = stage_of(recipe).set_trainable(objective)
        objective.unet.requires_grad_(True)
        objective(tiny_clip_batch(num_frames=1)).loss.backward()
        gradients = {f"unet.{name}": parameter.grad for name, parameter in objective.unet.named_parameters()}
        left_out = gradients.keys() - set(names)
        assert left_out
        assert all(any(part in name for part in blind) for name in left_out)
        if "one_token_attention" in rewrites:
            assert all(gradients[name] is None for name in left_out)
        else:
            largest = max(gradients[name].abs().max() for name in names if name in gradients)
            assert max(gradients[name].abs().max() for name in left_out) < 1e-6 * largest


def test_networks_that_are_frozen_as_a_whole_are_in_evaluation_mode():
    recipe = tiny_stage1_recipe("geometry")
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    assert objective.training
    assert {name: network.training for name, network in objective.named_children()} == {
        "reference_unet": False,
        "unet": True,
        "pose_encoder": False,
        "vae": False,
        "image_encoder": False,
    }
    objective.eval()
    set_modes(objective)
    assert objective.training
    assert objective.unet.training
    assert not objective.reference_unet.training


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parameters_save_no_input_for_a_weight_gradient(frozen):
    recipe = tiny_stage1_recipe("geometry")
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    if not frozen:
        objective.unet.requires_grad_(True)
    inputs, saved = record_saved_inputs(objective, tiny_clip_batch())
    # with unfrozen parameters the same recording finds the tensors
    assert inputs
    assert {place in saved for place in inputs.values()} == {not frozen}


def record_saved_inputs(objective: nn.Module, batch: object) -> tuple[dict[str, int], set[int]]:
    """Addresses of the inputs of layers on the path of the gradient, by layer, and of all saved tensors.

    Layers whose input another operation saves are left out: attention saves its output, and a norm shares its input
    with the shortcut beside it.
    """
    inputs: dict[str, int] = {}
    kept: list[torch.Tensor] = []
    layers = {
        name: module
        for name, module in objective.unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not name.endswith(("to_out", "to_out.0", "conv_shortcut"))
        and not any(part in name for part in (".geometry.", "time_emb", "attn2", "domain_embedder"))
    }

    def remember(name: str):
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if arguments[0].requires_grad:
                kept.append(arguments[0])
                inputs[name] = arguments[0].untyped_storage().data_ptr()

        return hook

    handles = [module.register_forward_pre_hook(remember(name)) for name, module in layers.items()]
    saved: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch)
    for handle in handles:
        handle.remove()
    return inputs, saved


def test_only_the_parameters_that_a_pattern_matches_train():
    patterns = ["controller.*", "controlnet.down_blocks.0.*"]
    stage = stage_of(tiny_stage2_recipe({"optimizer.only": patterns}))
    objective = stage.build()
    everything = set(stage_of(tiny_stage2_recipe()).set_trainable(objective))
    names = stage.set_trainable(objective)
    expected = {name for name in everything if name.startswith(("controller.", "controlnet.down_blocks.0."))}
    assert set(names) == expected
    assert {name for name, value in objective.named_parameters() if value.requires_grad} == expected
    assert 0 < len(expected) < len(everything)
    assert objective.controlnet.training
    assert not objective.unet.training


def test_a_pattern_without_a_parameter_is_refused_with_the_names_that_there_are():
    stage = stage_of(tiny_stage1_recipe("geometry", {"optimizer.only": ["unet.*", "pose_encoder.*"]}))
    with pytest.raises(
        RecipeError, match=r"optimizer.only: .* matches pose_encoder.\*; their names begin with unet.down_blocks"
    ):
        stage.set_trainable(stage.build())
