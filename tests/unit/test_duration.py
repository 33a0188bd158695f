"""The estimated duration of a training: exact for known work and rates, and marked as an estimate."""

import re

import pytest
import torch
from support.recipes import tiny_stage1_recipe, tiny_stage2_recipe

from dreamdance.runtime.gpus import DEFAULT_GPU, GPUS, known_gpu
from dreamdance.training.planning.duration import (
    MEMORY_EFFICIENCY,
    PRODUCT_EFFICIENCY,
    STORED_BYTES_PER_PIXEL,
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


@pytest.mark.parametrize("tf32", [False, True])
def test_the_roofline_adds_products_at_the_rate_of_their_format_and_other_bytes(tf32):
    recipe, gpu = tiny_stage2_recipe(WORDS | {"tf32": tf32}), GPUS["a800"]
    estimate = step_seconds(recipe, COST, gpu)
    float32 = 156e12 if tf32 else 19.5e12
    assert recipe.accumulation_steps == 2
    assert estimate.products == pytest.approx(2 * (100e12 / 312e12 + 10e12 / float32) / PRODUCT_EFFICIENCY)
    assert estimate.memory == pytest.approx(2 * 1e12 / 2.039e12 / MEMORY_EFFICIENCY)
    assert estimate.num_operators == 10_000


def test_the_text_gives_hours_storage_and_assumptions_and_says_that_nobody_measured_them():
    recipe, gpu = tiny_stage2_recipe(WORDS | {"cluster.nodes": 2, "cluster.tasks_per_node": 2}), GPUS["h200"]
    text = "\n".join(describe_duration(recipe, COST, gpu, bytes_per_sample=5e6))
    step = step_seconds(recipe, COST, gpu).total
    assert text.startswith("time on 4 x h200 in 2 nodes (estimate, not measured):")
    (hours,) = re.findall(r"([\d.]+) hours: 3,600 steps of [\d,]+ ms", text)
    assert float(hours) == pytest.approx(step, abs=0.051)  # 3,600 steps: as many hours as a step has seconds
    (rate,) = re.findall(r"storage: ([\d.]+) GB/s for each node", text)
    assert float(rate) == pytest.approx(4 * 5e6 / step / 1e9, rel=0.006)
    assert "110.0 TFLOP, 10.0 of them repeated by gradient checkpointing" in text
    assert "10.0 in float32 (tf32: false)" in text
    assert f"at {PRODUCT_EFFICIENCY:.0%} of the peak rate" in text


def test_latents_are_read_as_they_are_and_pictures_by_the_average_of_a_pixel():
    recipe = tiny_stage1_recipe("geometry", {"data.latents": {"local": "latents"}})
    stage = stage_of(recipe)
    batch = simulated_batch(stage, stage.build(device="meta"))
    assert set(batch.maps) == {
        "pose",
        *(f"latents.{name}" for name in ("rgb", "normal", "depth", "reference", "embedding")),
    }
    # 4 frames of 12 channels at 12 x 8, mean and deviation, of 3 domains; the reference's mean; 24 numbers; and poses
    latents = 4 * (3 * 4 * 2 * 12 * 12 * 8 + 12 * 12 * 8 + 24)
    assert sample_bytes(batch) == pytest.approx(latents + 4 * 24 * 16 * STORED_BYTES_PER_PIXEL)
    stage = stage_of(tiny_stage1_recipe("domains"))
    batch = simulated_batch(stage, stage.build(device="meta"))
    assert set(batch.maps) == {"pose", "target"}
    assert sample_bytes(batch) == pytest.approx(3 * 24 * 16 * STORED_BYTES_PER_PIXEL)


def test_only_the_forms_of_a_gpu_whose_rates_are_in_the_table_are_known():
    assert known_gpu("NVIDIA H200") is GPUS[DEFAULT_GPU]
    assert known_gpu("NVIDIA A800-SXM4-80GB") is GPUS["a800"]
    assert known_gpu("NVIDIA H100 PCIe") is None
    assert known_gpu("NVIDIA H200 MIG 1g.18gb") is None
