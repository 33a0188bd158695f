"""The learning rate: warm-up, plateau and decay as a pure function of the step."""

import math

import pytest

from dreamdance.recipe.schema import Optimizer
from dreamdance.training.schedule import learning_rate


def rates(max_steps: int = 100, **changes: object) -> list[float]:
    section = Optimizer.model_validate({"lr": 2.0, "warmup_steps": 10, "decay_fraction": 0.4, **changes})
    return [learning_rate(section, step, max_steps=max_steps) for step in range(max_steps)]


def test_warmup_is_linear_starts_above_zero_and_reaches_the_recipes_rate():
    found = rates()
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert set(found[9:]) == {2.0}


def test_without_warmup_the_first_step_has_the_full_rate():
    assert rates(warmup_steps=0)[0] == 2.0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_begins_after_the_plateau_and_ends_just_above_zero(decay):
    found = rates(decay=decay)
    assert found[9:61] == [2.0] * 52
    assert found[60:] == sorted(found[60:], reverse=True)
    assert 0 < found[-1] < 0.06
    assert found[80] == pytest.approx(1.0), "half way down"


def test_cosine_follows_the_cosine():
    found = rates(decay="cosine")
    assert found[70] == pytest.approx(1 + math.cos(math.pi / 4))


def test_a_decay_fraction_of_zero_never_decays():
    assert rates(decay="linear", decay_fraction=0.0)[-1] == 2.0


def test_a_decay_fraction_of_one_decays_from_the_start():
    found = rates(decay="linear", decay_fraction=1.0, warmup_steps=0)
    assert found == pytest.approx([2.0 * (1 - step / 100) for step in range(100)])
