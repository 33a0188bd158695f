"""DeepSpeed casts all parameters of a bf16 training; the autoencoder keeps its float32 parameters, bit for bit."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from support.autoencoder_recipes import HEIGHT, WIDTH, recipe_with_autoencoder, save_autoencoder
from support.ranks import run_ranks
from support.recipes import tiny_clip_batch

from dreamdance.runtime.process_group import process_group
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.engine import Engine
from dreamdance.training.stages.training_stage import stage_of

pytestmark = pytest.mark.distributed


def train_a_step(ranks: Ranks, *, autoencoder: str) -> dict[str, object]:
    changes = {"precision": "bf16", "data.num_frames": 2, "micro_batch_size": 1, "batch_size": 1}
    recipe = recipe_with_autoencoder(Path(autoencoder), temporal=True, changes=changes)
    with process_group(ranks, timeout_seconds=60):
        objective = stage_of(recipe).build()
        stage_of(recipe).set_trainable(objective)
        engine = Engine(objective, recipe, ranks, deterministic=True)
        output = engine.forward(tiny_clip_batch(num_clips=1, num_frames=2, width=WIDTH, height=HEIGHT))
        engine.backward(output.loss)
        update = engine.update(1e-3)
        return {
            "vae": objective.vae.state_dict(),
            "dtypes": {parameter.dtype for parameter in objective.unet.parameters()},
            "loss": output.loss.detach(),
            "applied": update.applied,
        }


def test_a_bf16_training_leaves_the_autoencoder_as_it_was_saved(tmp_path):
    save_autoencoder(tmp_path / "vae", temporal=True)
    (found,) = run_ranks(train_a_step, 1, tmp_path, autoencoder=str(tmp_path / "vae"))
    saved = AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "vae").state_dict()
    assert found["vae"].keys() == saved.keys()
    for name, value in saved.items():
        assert found["vae"][name].dtype == torch.float32, name
        assert torch.equal(found["vae"][name], value), name
    assert found["dtypes"] == {torch.bfloat16}
    assert found["loss"].isfinite()
    assert found["applied"]
