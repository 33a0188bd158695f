"""The estimated duration of a training: exact for known work and rates, and marked as an estimate."""

import pytest
import torch
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe

from dreamdance.runtime.gpus import DEFAULT_GPU, GPUS, known_gpu
from dreamdance.training.planning.duration import (
    describe_duration,
    sample_bytes,
    step_seconds,
)
from dreamdance.training.planning.operator_count import NO_WORK, Work
from dreamdance.training.planning.simulated_batch import simulated_batch
from dreamdance.training.planning.step_cost import StepCost
from dreamdance.training.stages.training_stage import stage_of

# 100 TFLOP in bfloat16, 10 in float32 (5 of each repeated), and 1 TB beside products.
FORWARD = Work({torch.bfloat16: 95 * 10**12, torch.float32: 5 * 10**12}, 3 * 10**12, 2 * 10**12, 4_000)
REPEATED = Work({torch.bfloat16: 5 * 10**12, torch.float32: 5 * 10**12}, 0, 0, 1_000)
COST = StepCost({"encoders": NO_WORK, "forward": FORWARD, "recomputation": REPEATED, "backward": NO_WORK}, 0)
WORDS = {"precision": "bf16", "batch_size": 8, "micro_batch_size": 1, "cluster.tasks_per_node": 4, "max_steps": 3600}


@pytest.mark.parametrize(("tf32", "products"), [(False, 3.33333), (True, 1.53846)])
def test_the_roofline_adds_products_at_the_rate_of_their_format_and_other_bytes(tf32, products):
    """On an A800, by its data sheet and the assumed halves and 70 %: of products, per micro batch, 100 / 312 TFLOP/s in
    bfloat16 = 0.32051 s and 10 / 19.5 in float32 = 0.51282 s, or 10 / 156 with tf32 = 0.06410 s; two micro batches at
    half the rate take four times that. 1 TB at 2.039 TB/s takes 0.49044 s, twice at 70 % 1.40125 s.
    """
    estimate = step_seconds(tiny_stage2_recipe(WORDS | {"tf32": tf32}), COST, GPUS["a800"])
    assert estimate.products == pytest.approx(products, rel=1e-5)
    assert estimate.memory == pytest.approx(1.40125, rel=1e-5)
    assert estimate.num_operators == 10_000


def test_the_text_gives_hours_storage_and_assumptions_and_says_that_nobody_measured_them():
    recipe, gpu = tiny_stage2_recipe(WORDS | {"cluster.nodes": 2, "cluster.tasks_per_node": 2}), GPUS["h200"]
    text = "\n".join(describe_duration(recipe, COST, gpu, bytes_per_sample=5e6))
    # Products 4 x (100 / 989.5 + 10 / 66.9) = 1.0022 s, memory 2 x (1 / 4.8) / 0.7 = 0.5952 s: a step of 1.5974 s, and
    # 3,600 of them as many hours. A node reads 4 of the 8 samples of 5 MB: 20 MB / 1.5974 s = 0.01252 GB/s.
    assert text.startswith("time on 4 x h200 in 2 nodes (estimate, not measured):")
    assert "  1.6 hours: 3,600 steps of 1,597 ms" in text
    assert "storage: 0.0125 GB/s for each node" in text
    assert "110.0 TFLOP, 10.0 of them repeated by gradient checkpointing" in text
    assert "10.0 in float32 (tf32: false)" in text
    assert "at 50% of the peak rate" in text


def test_latents_are_read_as_they_are_and_pictures_by_the_average_of_a_pixel():
    recipe = tiny_stage1_recipe("geometry", {"data.latents": {"local": "latents"}})
    stage = stage_of(recipe)
    batch = simulated_batch(stage, stage.build(device="meta"))
    assert set(batch.maps) == {
        "pose",
        *(f"latents.{name}" for name in ("rgb", "normal", "depth", "reference", "embedding")),
    }
    # 4 frames of 12 channels at 12 x 8, mean and deviation, of 3 domains; the reference's mean; 24 numbers; and poses:
    # 4 bytes x (27,648 + 1,152 + 24), and 4 x 24 x 16 pixels of a quarter of a byte
    assert sample_bytes(batch) == 115_296 + 384
    stage = stage_of(tiny_stage1_recipe("domains"))
    batch = simulated_batch(stage, stage.build(device="meta"))
    assert set(batch.maps) == {"pose", "target"}
    assert sample_bytes(batch) == 288  # 3 x 24 x 16 pixels of a quarter of a byte: pose, target, reference


def test_only_the_forms_of_a_gpu_whose_rates_are_in_the_table_are_known():
    assert known_gpu("NVIDIA H200") is GPUS[DEFAULT_GPU]
    assert known_gpu("NVIDIA A800-SXM4-80GB") is GPUS["a800"]
    assert known_gpu("NVIDIA H100 PCIe") is None
    assert known_gpu("NVIDIA H200 MIG 1g.18gb") is None
