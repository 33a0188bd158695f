"""The plan: counts equal those of the real networks, memory follows sharding, the simulated step equals a real one."""

from pathlib import Path

import pytest
import torch
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.recipe import load_recipe
from dreamdance.training.planning.activation_memory import LiveBytes
from dreamdance.training.planning.plan import describe, make_plan, network_sizes, state_memory, verdict
from dreamdance.training.planning.simulated_batch import simulated_batch
from dreamdance.training.planning.step_cost import count_step
from dreamdance.training.stages.training_stage import stage_of

RECIPES = Path(__file__).parents[2] / "recipes"
DEMOS = ["stage1_domains", "stage1_geometry", "stage1_temporal", "stage2"]
SMALL = ("batch_size=2", "micro_batch_size=1")


def demo(name, *overrides):
    return load_recipe(RECIPES / "demo" / f"{name}.yaml", [*SMALL, *overrides])


def built(recipe, device):
    objective = stage_of(recipe).build(device=device)
    stage_of(recipe).set_trainable(objective)
    return objective


def activations(recipe):
    return count_step(built(recipe, "meta"), stage_of(recipe)).peak_bytes


def states(recipe, trainable=1_000_000, total=3_000_000, exact=0):
    return {part.name: part.num_bytes for part in state_memory(recipe, trainable, total, exact=exact)}


@pytest.mark.parametrize("name", DEMOS)
def test_planned_parameters_are_those_of_the_networks_that_will_train(name):
    recipe = demo(name)
    planned, objective = network_sizes(built(recipe, "meta")), built(recipe, "cpu")
    real = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    assert sum(network.trainable for network in planned) == sum(parameter.numel() for parameter in real)
    everything = sum(network.trainable + network.frozen for network in planned)
    assert everything == sum(parameter.numel() for parameter in objective.parameters())


def test_without_weights_the_full_size_is_counted_from_the_published_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    networks = {network.name: network for network in network_sizes(built(load_recipe(RECIPES / "stage2.yaml"), "meta"))}
    assert networks["unet"].frozen == 1_524_623_082
    assert networks["unet"].trainable == 0
    assert networks["controlnet"].trainable > 600_000_000


def drop_gradients(objective):
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))


class _Tracker(MemTracker):
    """torch's own count of memory, without its statistics by module, whose hooks do not accept frozen weights."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def _pre_fw_hook(self, *_):
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook


def peak_beside_weights(recipe):
    """The peak of the simulation in torch's count: all tensors that exist at once, without parameters and buffers."""
    objective = built(recipe, "meta").to(torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    objective.training = False
    batch = simulated_batch(stage_of(recipe), objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        drop_gradients(objective)
        tracker = _Tracker()
        tracker.track_external(objective)
        with tracker:
            objective(batch).loss.backward()
    peak = {
        str(kind): num_bytes for kind, num_bytes in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()
    }
    return peak["Total"] - peak["_MemRefType.PARAM"] - peak["_MemRefType.BUFFER"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        tiny_stage1_recipe("temporal", {"sharding.gradient_checkpointing": True}),
        tiny_stage2_recipe({"model.unfreeze": "decoder", "precision": "bf16"}),
    ],
    ids=["stage 1", "stage 2"],
)
def test_planned_activations_equal_the_count_of_torch_s_tracker_without_weights(recipe):
    assert activations(recipe) == peak_beside_weights(recipe)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_weights_equal_the_bytes_of_the_networks(precision):
    recipe = tiny_stage2_recipe({"precision": precision})
    objective = built(recipe, "cpu").to(torch.bfloat16 if precision == "bf16" else torch.float32)
    planned = {part.name: part.num_bytes for part in make_plan(stage_of(recipe)).memory}
    assert planned["weights"] == sum(parameter.nbytes for parameter in objective.parameters())


@pytest.mark.slow
def test_a_simulated_step_needs_the_memory_of_a_real_one():
    recipe = demo("stage1_geometry")
    objective = built(recipe, "cpu")
    objective.training = False
    drop_gradients(objective)
    maps = {
        name: torch.rand(1, 1, 3, recipe.data.height, recipe.data.width) for name in ("rgb", "pose", "normal", "depth")
    }
    reference = torch.rand(1, 3, recipe.data.height, recipe.data.width)
    keys = torch.zeros(1, 3, dtype=torch.int64)
    batch = ClipBatch(maps=maps, reference=reference, fps=torch.ones(1), keys=keys, clip_ids=["a"])
    with LiveBytes(beside=(*objective.parameters(), *objective.buffers())) as live:
        objective(batch).loss.backward()
    pictures = 3 * maps["rgb"].nbytes  # the plan counts as many as there are domains; here they lie outside
    assert activations(recipe) == pytest.approx(live.peak + pictures, rel=0.002)


@pytest.mark.slow
def test_a_process_without_a_gpu_also_holds_its_programs_and_the_copy_that_it_saves():
    def parts(*overrides):
        recipe = load_recipe(RECIPES / "demo/stage1_geometry.yaml", ["cluster.tasks_per_node=1", *overrides])
        plan = make_plan(stage_of(recipe))
        return {part.name: part.num_bytes for part in plan.memory}, plan.num_trainable

    on_cpu, trainable = parts()
    assert on_cpu["copy for checkpoints"] == trainable * 4 * 4  # master, two moments, average
    assert on_cpu["programs"] > 0
    assert on_cpu["beside these tensors"] == on_cpu["activations"] // 2
    without_copy, _ = parts("checkpoint.copy_in_memory=false")
    assert "copy for checkpoints" not in without_copy
    on_gpu, _ = parts("cluster.gpus_per_node=1", "cluster.memory_gib=64")
    assert on_cpu.keys() - on_gpu.keys() == {"programs", "beside these tensors", "copy for checkpoints"}


@pytest.mark.slow
def test_a_larger_micro_batch_needs_more_memory_and_checkpointing_less():
    small = activations(demo("stage2"))
    assert activations(demo("stage2", "batch_size=4", "micro_batch_size=2")) > 1.7 * small
    assert activations(demo("stage2", "sharding.gradient_checkpointing=true")) < small


@pytest.mark.slow
def test_a_frozen_base_keeps_fewer_activations_than_a_trained_one():
    assert activations(demo("stage2", "model.unfreeze=none")) < activations(demo("stage2", "model.unfreeze=all"))


@pytest.mark.slow
def test_half_precision_needs_less_memory_for_activations():
    assert activations(demo("stage1_domains", "precision=bf16")) < 0.7 * activations(demo("stage1_domains"))


def test_sharding_divides_the_sharded_memory_by_the_number_of_processes():
    one, two = (states(demo("stage1_domains", f"cluster.tasks_per_node={size}")) for size in (1, 2))
    for name in ("gradients", "fp32 masters and Adam", "moving average"):
        assert two[name] == one[name] / 2
    assert two["weights"] == one["weights"]


def test_zero_1_keeps_whole_gradients_and_zero_0_whole_states_without_masters():
    zero2, zero1, zero0 = (states(demo("stage1_domains", f"sharding.zero_stage={stage}")) for stage in (2, 1, 0))
    assert zero1["gradients"] == 2 * zero2["gradients"] == zero0["gradients"]
    assert zero1["fp32 masters and Adam"] == zero2["fp32 masters and Adam"] == 1_000_000 * 12 // 2
    assert zero0["fp32 masters and Adam"] == 1_000_000 * 8
    assert zero0["communication buckets"] == 0


def test_a_second_bucket_is_counted_only_where_communication_overlaps_computation():
    def buckets(*words):
        return states(demo("stage1_domains", "sharding.overlap_communication=true", *words))["communication buckets"]

    gpu = "cluster.gpus_per_node=2"
    one = buckets(gpu, "sharding.overlap_communication=false")
    assert buckets(gpu) == 2 * one
    assert buckets(gpu, "deterministic=true") == one
    assert buckets() == one, "the CPU is deterministic unless the recipe says otherwise"
    assert buckets("deterministic=false") == 2 * one


def test_half_precision_halves_the_weights_but_not_the_optimizer():
    full, half = states(demo("stage1_domains")), states(demo("stage1_domains", "precision=bf16"))
    assert full["weights"] == 3_000_000 * 4
    assert half["weights"] == full["weights"] // 2
    assert half["fp32 masters and Adam"] == full["fp32 masters and Adam"]
    mixed = states(demo("stage1_domains", "precision=bf16"), exact=500_000)
    assert mixed["weights"] == 2_500_000 * 2 + 500_000 * 4, "the autoencoder computes in float32"


@pytest.mark.slow
def test_the_description_adds_up_and_compares_with_the_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model.unet.config=null", "model.unet.path=weights/unet", "model.autoencoder.patch_size=null"]
    words += ["model.autoencoder.path=weights/vae", "model.image_encoder.stand_in_width=768"]
    words += ["model.pose_channels=[8, 8, 16, 16]"]
    words += ["data.width=64", "data.height=64", "cluster.gpus_per_node=1", "cluster.tasks_per_node=1"]
    text = describe(demo("stage1_domains", *words), gpu_memory_gib=80.0)
    numbers = [float(line.split(" GiB")[0].split()[-1]) for line in text.splitlines() if " GiB  " in line]
    together = next(line for line in text.splitlines() if line.strip().startswith("together"))
    assert float(together.split()[1]) == pytest.approx(sum(numbers), abs=0.05)
    assert "published configurations stand in for weights/unet, weights/vae, which are not here" in text
    assert "fits in the 80 GiB of the GPUs here" in text


def test_the_verdict_names_the_keys_to_change_if_the_memory_is_too_small():
    assert "MORE than the 24 GiB of the GPUs here; lower micro_batch_size" in verdict(25.0, 24.0)
    assert "no GPU here to compare with" in verdict(25.0, None)
