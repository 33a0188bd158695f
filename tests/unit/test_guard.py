"""What counts as a leap of the loss, how many skipped steps are too many, and that a resumed run decides alike."""

import json
import math

import pytest
from support.recipes import tiny_stage1_recipe

from dreamdance.training.guard import FEWEST_LOSSES, StepGuard


def make_guard(**changes: object) -> StepGuard:
    recipe = tiny_stage1_recipe(changes={"recovery.spike_factor": 3.0, **changes})
    return StepGuard(recipe.recovery, max_nonfinite_steps=recipe.max_nonfinite_steps)


def fed(guard: StepGuard, loss: float = 1.0, count: int = FEWEST_LOSSES) -> StepGuard:
    for _ in range(count):
        guard.note_applied(loss)
    return guard


def test_a_loss_leaps_that_is_the_recipes_factor_above_the_median():
    guard = fed(fed(make_guard(), 1.0, 6), 100.0, 5)
    assert guard.usual_loss == 1.0
    assert guard.is_spike(3.01)
    assert not guard.is_spike(3.0)


def test_nothing_leaps_before_a_usual_loss_is_known_or_where_the_recipe_does_not_ask():
    assert not fed(make_guard(), count=FEWEST_LOSSES - 1).is_spike(1e9)
    assert fed(make_guard()).is_spike(1e9)
    silent = fed(make_guard(**{"recovery.spike_factor": None}))
    assert not silent.looks_for_spikes
    assert not silent.is_spike(1e9)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_not_finite_is_no_leap_and_no_usual_loss(loss):
    guard = fed(make_guard())
    assert not guard.is_spike(loss)
    guard.note_applied(loss)
    assert guard.usual_loss == 1.0


@pytest.mark.parametrize("kind", ["spike", "nonfinite"])
def test_only_what_is_skipped_within_the_window_counts_together(kind):
    bounds = {"recovery.max_spikes": 1, "max_nonfinite_steps": 1, "recovery.spike_window_steps": 10}
    note = getattr(make_guard(**bounds), f"note_{kind}")
    assert note(5) == "continue"
    assert note(15) == "continue", "10 steps later the first is forgotten"
    assert note(24) == "stop"


def test_roll_backs_come_before_the_end_and_are_counted():
    guard = make_guard(max_nonfinite_steps=1, **{"recovery.max_roll_backs": 1})
    state = json.loads(json.dumps(fed(guard).state_dict()))
    assert [guard.note_nonfinite(step) for step in (7, 8)] == ["continue", "roll back"]
    guard.roll_back(state)
    assert (guard.roll_backs, guard.nonfinite_steps, guard.spike_steps) == (1, [], [])
    assert [guard.note_nonfinite(step) for step in (7, 8)] == ["continue", "stop"]


def test_a_guard_that_comes_back_from_a_checkpoint_decides_like_the_one_that_was_saved():
    guard = fed(fed(make_guard(), 2.0), 1.0, 3)
    guard.note_spike(9)
    other = make_guard()
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    assert other.usual_loss == guard.usual_loss
    assert other.note_spike(10) == guard.note_spike(10)
