"""The cost of a step of each full-size recipe, counted on fake tensors, is that of the committed table."""

import pytest
from support.step_budgets import budgets

PICTURES, LATENTS, TIGHT = budgets.FORMS
# The form from pictures is counted with the plan of the recipe, see test_recipe_headers.py.
COUNTED = [(recipe, form) for recipe in budgets.RECIPES for form in budgets.forms_of(recipe) if form != PICTURES]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "form"), COUNTED)
def test_a_step_from_latents_costs_what_the_table_says(recipe, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without weights: the published shapes
    found = budgets.numbers(budgets.count(recipe, form))
    problems = list(budgets.differences(found, budgets.row_of(recipe, form)))
    assert not problems, f"{problems}; if that is meant, run tools/step_budgets.py {recipe}"


@pytest.mark.parametrize("recipe", budgets.RECIPES)
def test_a_step_costs_less_than_at_the_first_count(recipe):
    before = budgets.row_of(recipe, PICTURES, "5194bb1")
    now, best = budgets.row_of(recipe, PICTURES), budgets.row_of(recipe, LATENTS)
    assert float(now["TF"]) == pytest.approx(float(before["TF"]) - float(before["recomputation TF"]), rel=0.05)
    assert float(best["TF"]) == pytest.approx(float(now["TF"]) - float(now["encoders TF"]), abs=2)
    for column in ("TF", "GB", "operators"):
        assert float(best[column]) < float(now[column])
        assert float(best[column]) < 0.8 * float(before[column])


def test_worse_numbers_are_named_and_better_ones_ask_for_an_update():
    row = {"TF": "100.00", "operators": "2000"}
    assert list(budgets.differences({"TF": 100.9, "operators": 2000}, row)) == []
    (worse,) = budgets.differences({"TF": 101.2, "operators": 1990}, row)
    assert worse == "TF 101.20 is above 100"
    (better,) = budgets.differences({"TF": 100, "operators": 1900}, row)
    assert better == "operators 1900.00 is better than 2000: update the table"
