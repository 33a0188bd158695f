"""torch.compile of the repeated blocks: no graph break, the values of eager mode, no graph after the first steps."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from support.recipes import perturb, tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe
from torch._dynamo.utils import counters

from dreamdance.models.compiled_blocks import compile_blocks
from dreamdance.training.networks.build import exportable
from dreamdance.training.stages.training_stage import stage_of

REQUIRED = "DREAMDANCE_COMPILER_REQUIRED"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graphs of other tests, and torch's own limit afterwards."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def require_compiler() -> None:
    """Skips the test if there is no C++ compiler or no Python.h; if they are required, the test fails."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [name for name, found in (("g++", shutil.which("g++")), (str(headers), headers.is_file())) if not found]
    if missing:
        reason = f"no {' and no '.join(missing)} here (Debian: apt-get install g++ libc6-dev python3-dev)"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)


def make(recipe):
    objective = stage_of(recipe).build()
    stage_of(recipe).set_trainable(objective)
    return perturb(objective)


def loss_and_gradients(objective, batch):
    objective.zero_grad()
    loss = objective(batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def compile_all(objective, backend):
    return {name: compile_blocks(network, backend=backend) for name, network in exportable(objective).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        tiny_stage1_recipe("domains"),
        tiny_stage1_recipe("temporal", {"sharding.gradient_checkpointing": "transformers"}),
        tiny_stage2_recipe({"sharding.gradient_checkpointing": "blocks"}),
    ],
    ids=["domains", "temporal", "stage 2"],
)
def test_blocks_compile_as_one_graph_each_with_eager_s_values_and_no_graph_after_the_first_step(recipe):
    objective, batch = make(recipe), tiny_clip_batch(num_frames=recipe.data.num_frames)
    expected, expected_gradients = loss_and_gradients(objective, batch)
    counts = compile_all(objective, "aot_eager")
    assert all(counts[name] > 0 for name in counts if name.endswith(("unet", "controlnet")))
    loss, gradients = loss_and_gradients(objective, batch)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert not counters["graph_break"]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)
    for first_id in (2, 4):
        loss_and_gradients(objective, tiny_clip_batch(num_frames=recipe.data.num_frames, first_id=first_id))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_generated_code_gives_the_values_of_eager_mode():
    require_compiler()
    recipe = tiny_stage1_recipe("geometry")
    objective, batch = make(recipe), tiny_clip_batch(num_clips=1, num_frames=1)
    expected, expected_gradients = loss_and_gradients(objective, batch)
    assert compile_blocks(objective.unet.mid_block.attentions[0]) == 1, "one block: code takes seconds to compile"
    loss, gradients = loss_and_gradients(objective, batch)
    assert counters["inductor"], "code was generated"
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5)
