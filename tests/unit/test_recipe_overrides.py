"""Overrides on the command line: their values by the type of the key, and the splitting of sweeps."""

from typing import Any

import pytest

from dreamdance.recipe import Stage1Recipe
from dreamdance.recipe.overrides import annotation_at, split_choices
from dreamdance.recipe.schema import NetworkSource


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[8,16],[16,32]", ["[8,16]", "[16,32]"]),
        ("{a: [1,2], b: 3},{}", ["{a: [1,2], b: 3}", "{}"]),
        ("pf/take #1,pf/take #2", ["pf/take #1", "pf/take #2"]),
        ("a[1,b", ["a[1", "b"]),
        ("a],b", ["a]", "b"]),
        ("a,", ["a", ""]),
    ],
)
def test_a_sweep_is_split_at_commas_outside_of_brackets(text, choices):
    assert split_choices(text) == choices


@pytest.mark.parametrize(
    ("key", "annotation"),
    [
        ("name", str),
        ("init_from", str | None),
        ("data.train.local", str),
        ("cluster.environment.A", str),
        ("model.unet", NetworkSource),
        ("model.unet.config.block_out_channels", Any),
        ("no.such.key", None),
    ],
)
def test_every_key_has_the_type_that_the_schema_gives_it(key, annotation):
    assert annotation_at(Stage1Recipe, tuple(key.split("."))) == annotation
