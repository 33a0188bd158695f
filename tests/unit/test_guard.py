"""The guard: what counts as a spike, how many skipped steps are too many, and the same decisions after a resume."""

import json
import math

import pytest
from support.recipes import tiny_stage1_recipe

from dreamdance.training.guard import FEWEST_LOSSES, StepGuard


def make_guard(**changes: object) -> StepGuard:
    recipe = tiny_stage1_recipe(changes={"recovery.spike_factor": 3.0, **changes})
    return StepGuard(recipe.recovery, max_nonfinite_steps=recipe.max_nonfinite_steps)


def guard_after_losses(guard: StepGuard, loss: float = 1.0, count: int = FEWEST_LOSSES) -> StepGuard:
    for _ in range(count):
        guard.note_applied(loss)
    return guard


def test_a_loss_above_the_recipes_factor_times_the_median_is_a_spike():
    guard = guard_after_losses(guard_after_losses(make_guard(), 1.0, 6), 100.0, 5)
    assert guard.usual_loss == 1.0
    assert guard.is_spike(3.01)
    assert not guard.is_spike(3.0)


def test_no_loss_is_a_spike_before_a_median_is_known_or_without_the_key():
    assert not guard_after_losses(make_guard(), count=FEWEST_LOSSES - 1).is_spike(1e9)
    assert guard_after_losses(make_guard()).is_spike(1e9)
    silent = guard_after_losses(make_guard(**{"recovery.spike_factor": None}))
    assert not silent.looks_for_spikes
    assert not silent.is_spike(1e9)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_spike_and_does_not_enter_the_median(loss):
    guard = guard_after_losses(make_guard())
    assert not guard.is_spike(loss)
    guard.note_applied(loss)
    assert guard.usual_loss == 1.0


@pytest.mark.parametrize("kind", ["spike", "nonfinite"])
def test_only_steps_skipped_within_the_window_count_together(kind):
    bounds = {"recovery.max_spikes": 1, "max_nonfinite_steps": 1, "recovery.spike_window_steps": 10}
    note = getattr(make_guard(**bounds), f"note_{kind}")
    assert note(5) == "continue"
    assert note(15) == "continue", "10 steps later the first no longer counts"
    assert note(24) == "stop"


def test_roll_backs_precede_the_end_and_are_counted():
    guard = make_guard(max_nonfinite_steps=1, **{"recovery.max_roll_backs": 1})
    state = json.loads(json.dumps(guard_after_losses(guard).state_dict()))
    assert [guard.note_nonfinite(step) for step in (7, 8)] == ["continue", "roll back"]
    guard.roll_back(state)
    assert (guard.roll_backs, guard.nonfinite_steps, guard.spike_steps) == (1, [], [])
    assert [guard.note_nonfinite(step) for step in (7, 8)] == ["continue", "stop"]


def test_a_guard_restored_from_a_checkpoint_decides_like_the_saved_one():
    guard = guard_after_losses(guard_after_losses(make_guard(), 2.0), 1.0, 3)
    guard.note_spike(9)
    other = make_guard()
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    assert other.usual_loss == guard.usual_loss
    assert other.note_spike(10) == guard.note_spike(10)
