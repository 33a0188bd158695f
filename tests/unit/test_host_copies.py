"""The forward and backward pass of every training step copies nothing to the device and waits for nothing.

The networks are on the meta device, which stands for a GPU: clips and draws begin on the CPU, every operation that
mixes the two raises an error, and what crosses is counted.
"""

from collections import Counter

import pytest
import torch
from support.recipes import tiny_clip_batch, tiny_stage1_recipe, tiny_stage2_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreamdance.data.loading.batch import ClipBatch
from dreamdance.data.shards.latents import EMBEDDING, PREFIX, REFERENCE
from dreamdance.modalities import DOMAINS
from dreamdance.models.autoencoding import latent_shape
from dreamdance.models.image_embedding import embedding_width
from dreamdance.training.stages.training_stage import stage_of

STEPS = {
    "domains": (tiny_stage1_recipe, "domains"),
    "geometry": (tiny_stage1_recipe, "geometry"),
    "temporal": (tiny_stage1_recipe, "temporal"),
    "stage2": (tiny_stage2_recipe,),
}


class Crossings(TorchDispatchMode):
    """Counts operations that move values between devices, and those that would wait for a GPU.

    Attributes:
        found: name of the operation -> count.
    """

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item")

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        devices = {
            value.device.type for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)
        }
        # lift_fresh: torch.tensor made of Python's numbers, which are copied if the result is on a GPU
        if len(devices) > 1 or name in self.WAITING or (name == "aten::lift_fresh" and devices != {"cpu"}):
            self.found[name] += 1
        return result


def make(step, source):
    make_recipe, *words = STEPS[step]
    stage = stage_of(make_recipe(*words))
    objective = stage.build(device="meta")
    stage.set_trainable(objective)
    batch = tiny_clip_batch(num_frames=1 if step in ("domains", "geometry") else 4)
    return objective, batch if source == "pixels" else with_latents(batch, objective, step)


def with_latents(batch, objective, step):
    """The batch as the loader delivers it from stored latents: moments of the domains, of the reference, embeddings."""
    clips, frames = batch.pose.shape[:2]
    shape = latent_shape(objective.vae, batch.pose)
    names = ("rgb",) if step == "stage2" else DOMAINS
    latents = {PREFIX + name: torch.rand(clips, frames, 2, *shape) for name in names}
    latents[PREFIX + EMBEDDING] = torch.rand(clips, embedding_width(objective.image_encoder))
    maps = {name: values for name, values in batch.maps.items() if step == "stage2" or name == "pose"}
    reference = batch.reference
    if step != "stage2":
        latents[PREFIX + REFERENCE] = torch.rand(clips, *shape)
        reference = torch.empty(0)
    return ClipBatch(maps | latents, reference, batch.fps, batch.keys, batch.clip_ids)


@pytest.mark.parametrize("source", ["pixels", "latents"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_on_prepared_clips_copies_nothing_and_waits_for_nothing(step, source):
    objective, batch = make(step, source)
    with Crossings() as preparing:
        prepared = objective.prepare(batch)
    assert preparing.found, "the clips and their random numbers were on the CPU"
    with Crossings() as crossings:
        output = objective(prepared)
        output.loss.backward()
        output.sums()
    assert output.loss.device.type == "meta"
    assert crossings.found == {}
    assert all(values.device.type == "meta" for values in prepared.tensors())


def test_without_preparation_the_same_step_copies(monkeypatch):
    objective, batch = make("geometry", "pixels")
    with Crossings() as crossings:
        objective(batch)
    assert crossings.found.total() > 10
