"""YAML is read without implicit conversions, no hostile object is built, and written YAML reads back the same."""

import pytest

from dreamdance.recipe.yaml_text import MAX_CHARACTERS, MAX_DEPTH, read_yaml, write_yaml


def value_of(text):
    document = read_yaml(text)
    assert document.problems == []
    return document.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("2.5e-3", 2.5e-3),
        (".5", 0.5),
        ("-3.", -3.0),
        ("12", 12),
        ("-7", -7),
        ("100_000", 100_000),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_numbers_booleans_and_nothing_are_read_as_such(text, value):
    read = value_of(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    ["no", "yes", "on", "off", "No", "True", "NULL", "1:30", "010", "0x10", "2026-11-22", "1e", "e5", ".inf", ".nan"],
)
def test_words_that_yaml_1_1_would_convert_stay_text(text):
    assert value_of(f"key: {text}")["key"] == text


def test_quoted_numbers_and_booleans_stay_text():
    assert value_of("a: '1e-5'\nb: \"true\"\nc: '3'") == {"a": "1e-5", "b": "true", "c": "3"}


@pytest.mark.parametrize("text", ["1e400", "9" * 5000])
def test_numbers_that_no_recipe_can_mean_stay_text_instead_of_becoming_infinite(text):
    assert value_of(f"key: {text}")["key"] == text


def test_keys_are_text_whatever_they_look_like():
    assert value_of("no: 1\n1: 2\nnull: 3") == {"no": 1, "1": 2, "null": 3}


def test_a_key_given_twice_is_a_problem_with_both_lines():
    document = read_yaml("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n")
    (problem,) = document.problems
    assert problem.message == "key 'b.c' is given twice (first on line 3)"
    assert problem.line == 5


def test_all_keys_given_twice_are_reported_at_once():
    assert [problem.line for problem in read_yaml("a: 1\na: 2\nb: 1\nb: 2\nb: 3").problems] == [2, 4, 5]


def test_every_value_has_its_line():
    lines = read_yaml("a: 1\nb:\n  - x\n  - y\nc: {d: 1,\n  e: 2}\n").lines
    assert lines[("a",)] == 1
    assert lines[("b", 1)] == 4
    assert lines[("c", "d")] == 5
    assert lines[("c", "e")] == 6


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("a: !include other.yaml", "tag"),
        ("a: &anchor 1\nb: 2", "anchor"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested"),
        ("a: " + "[" * 100_000, "nested"),
        ("a: 1\n---\nb: 2", "document"),
        ("a: [1, 2", "YAML"),
        ("a: 1\n b: 2", "YAML"),
        ("a: \x07", "YAML"),
        ("[1, 2]: 3", "key must be a word"),
        ("a: '" + "x" * MAX_CHARACTERS + "'", "characters"),
    ],
)
def test_hostile_or_broken_yaml_is_a_problem_and_never_a_value(text, word):
    document = read_yaml(text)
    assert any(word in problem.message for problem in document.problems)
    assert document.value in (None, {})


def test_an_alias_bomb_is_refused_before_it_grows():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    document = read_yaml(bomb)
    assert document.value is None
    assert len(document.problems) > 60


def test_a_merge_key_is_an_ordinary_key():
    assert value_of("<<: {a: 1}\nb: 2") == {"<<": {"a": 1}, "b": 2}


@pytest.mark.parametrize(
    "value",
    [
        {
            "text": ["1e-5", "no", "true", "null", "~", "", "3", "-1.5", "a: b", "#", " x "],
            "number": [1e-5, 1, 0.1, -2],
        },
        {"a": {"b": {"c": []}}, "d": {}, "e": None, "f": True, "g": 1e-08, "h": 1e16, "i": 100000},
        {"shared": [[1, 2], [1, 2]], "umlaut": "Tänzer", "lines": "a\nb\n"},
        {
            "line ends": ["a\rb", "a\x85b", "a\u2028b", " \u2029"],
            "a\x85": 1,
            "mark": "\ufeffa",
            "long": "a  b #c " * 40,
        },
    ],
)
def test_written_yaml_reads_back_the_same(value):
    assert value_of(write_yaml(value)) == value


def test_writing_one_object_twice_writes_no_alias():
    once = [1, 2]
    assert value_of(write_yaml({"a": once, "b": once})) == {"a": [1, 2], "b": [1, 2]}
