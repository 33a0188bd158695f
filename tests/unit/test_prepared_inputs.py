"""Inputs of training are prepared one micro batch ahead, in order, and errors come with the step that they concern."""

import pytest
import torch
from support.recipes import select_clips, tiny_clip_batch, tiny_stage1_recipe

from dreamdance.errors import ShardError
from dreamdance.training.inputs import PreparedInputs
from dreamdance.training.stages.training_stage import stage_of


class Training:
    """A real objective, and the order in which its inputs are read, prepared and trained on."""

    def __init__(self, monkeypatch, *, failing=None):
        self.events, self.failing = [], failing
        self.objective = stage_of(tiny_stage1_recipe("geometry")).build(device="meta")
        prepare = self.objective.prepare

        def note_and_prepare(batch, **words):
            self.events.append(f"prepare {batch.clip_ids[0]}")
            return prepare(batch, **words)

        monkeypatch.setattr(self.objective, "prepare", note_and_prepare)
        self.clips = [select_clips(tiny_clip_batch(num_frames=1), index) for index in (0, 1)]
        self.names = [clip.clip_ids[0] for clip in self.clips]
        self.inputs = PreparedInputs(self._steps(), self.objective, torch.device("cpu"))

    def _steps(self):
        for number in range(10):
            if number == self.failing:
                raise ShardError("shard 7 is damaged")
            self.events.append(f"read step {number}")
            yield list(self.clips)

    def step(self, *, is_last_step=False):
        for batch in self.inputs.micro_batches(is_last_step=is_last_step):
            assert batch.draws["noise"].device.type == "meta"
            self.events.append(f"train {batch.clips.clip_ids[0]}")


def test_a_micro_batch_is_prepared_once_the_one_before_is_queued(monkeypatch):
    training = Training(monkeypatch)
    first, second = training.names
    training.step()
    begun = [f"prepare {first}", f"train {first}", f"prepare {second}", f"train {second}"]
    assert training.events == ["read step 0", *begun, "read step 1", f"prepare {first}"]
    assert training.inputs.steps_ahead == 1
    training.events.clear()
    training.step(is_last_step=True)
    assert training.events == begun[1:], "nothing is read beyond the last step"
    assert training.inputs.steps_ahead == 0
    assert training.inputs.take_waited_seconds() > 0
    assert training.inputs.take_waited_seconds() == 0


def test_an_error_while_reading_ahead_is_raised_by_the_step_that_lacks_its_data(monkeypatch):
    training = Training(monkeypatch, failing=1)
    training.step()
    assert training.events[-1] == f"train {training.names[1]}"
    assert training.inputs.steps_ahead == 0
    with pytest.raises(ShardError, match="shard 7 is damaged"):
        training.step()
