"""`init_from`: the averaged weights of another run, from its export or, by step, from its checkpoint."""

from pathlib import Path

import pytest
import torch
import yaml
from support.dancer_shards import write_dancer_shards
from support.recipes import tiny_stage1_recipe

from dreamdance.errors import MissingInputError
from dreamdance.recipe.schema import Stage1Recipe
from dreamdance.runs.layout import FINISHED_FILE, RECIPE_FILE, checkpoint_folder
from dreamdance.training.checkpointing.checkpointer import read_checkpoint_weights
from dreamdance.training.networks.initial_weights import load_initial_weights
from dreamdance.training.objectives.output import Objective
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def make_recipe(shards: Path, train_what: str, **changes: object) -> Stage1Recipe:
    return tiny_stage1_recipe(
        train_what,
        {
            "data.train.local": str(shards / "train"),
            "data.validation.local": str(shards / "validation"),
            "data.num_workers": 0,
            "max_steps": 2,
            "checkpoint.every_steps": 1,
            "optimizer.ema_decay": 0.5,
            "validation.num_sample_clips": 1,
            "validation.num_loss_clips": 1,
            "sampling.num_inference_steps": 1,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two finished runs: `first` trains the domains, `second` geometry attention on top of it."""
    folder = tmp_path_factory.mktemp("runs")
    write_dancer_shards(folder / "shards")
    for name, recipe in (
        ("first", make_recipe(folder / "shards", "domains")),
        ("second", make_recipe(folder / "shards", "geometry", init_from="first")),
    ):
        run = folder / name
        run.mkdir()
        (run / RECIPE_FILE).write_text(yaml.safe_dump({**recipe.model_dump(mode="json"), "name": name}))
        train(recipe, run)
        (run / FINISHED_FILE).write_text("{}")
    return folder


def initialised(recipe: Stage1Recipe, runs: Path) -> Objective:
    objective = stage_of(recipe).build()
    load_initial_weights(objective, runs, init_from=recipe.init_from, init_step=recipe.init_step)
    return objective


def test_the_averaged_weights_of_a_finished_run_are_used(runs):
    recipe = make_recipe(runs / "shards", "geometry", init_from="first")
    objective = initialised(recipe, runs)
    average = read_checkpoint_weights(checkpoint_folder(runs / "first", 2))
    parameters = dict(objective.named_parameters())
    assert average
    assert all(torch.equal(parameters[name], value) for name, value in average.items())


def test_without_init_from_the_networks_stay_as_they_were_built(runs):
    recipe = make_recipe(runs / "shards", "domains")
    built, left = stage_of(recipe).build().state_dict(), initialised(recipe, runs).state_dict()
    assert all(torch.equal(built[name], left[name]) for name in built)


def test_an_unfinished_run_is_refused_unless_a_step_is_named(runs):
    marker = runs / "first" / FINISHED_FILE
    marker.unlink()
    try:
        recipe = make_recipe(runs / "shards", "geometry", init_from="first")
        with pytest.raises(MissingInputError, match=r"'first' is not finished; .* give init_step"):
            initialised(recipe, runs)
        initialised(recipe.model_copy(update={"init_step": 1}), runs)
    finally:
        marker.write_text("{}")


def test_a_finished_run_that_is_being_continued_to_more_steps_is_refused(runs):
    stored = runs / "first" / RECIPE_FILE
    before = stored.read_text()
    stored.write_text(before.replace("max_steps: 2\n", "max_steps: 3\n"))
    try:
        recipe = make_recipe(runs / "shards", "geometry", init_from="first")
        with pytest.raises(MissingInputError, match="'first' is not finished"):
            initialised(recipe, runs)
    finally:
        stored.write_text(before)


def test_a_named_step_uses_its_checkpoint_and_frozen_weights_of_the_run_before(runs):
    recipe = make_recipe(runs / "shards", "temporal", init_from="second", init_step=1)
    parameters = dict(initialised(recipe, runs).named_parameters())
    trained_second = read_checkpoint_weights(checkpoint_folder(runs / "second", 1))
    trained_first = read_checkpoint_weights(checkpoint_folder(runs / "first", 2))
    assert trained_second
    assert not trained_second.keys() & trained_first.keys(), "the second run trains weights that the first did not have"
    for trained in (trained_first, trained_second):
        assert all(torch.equal(parameters[name], value) for name, value in trained.items())


def test_a_run_a_step_or_an_export_that_is_not_there_is_named(runs):
    shards = runs / "shards"
    with pytest.raises(MissingInputError, match="run 'nobody' does not exist"):
        initialised(make_recipe(shards, "geometry", init_from="nobody"), runs)
    with pytest.raises(MissingInputError, match="neither an export nor a checkpoint of step 77"):
        initialised(make_recipe(shards, "geometry", init_from="first", init_step=77), runs)
