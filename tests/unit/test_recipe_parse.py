"""A recipe is defaults < file < command line, and all its problems are reported at once, with their places."""

import os

import pytest
import yaml
from support.fault_log import record_fault

from dreamdance.errors import RecipeError
from dreamdance.recipe import Stage1Recipe, dump_recipe, load, load_recipe
from dreamdance.recipe.parse import TASKS, flatten, known_keys

STAGE1 = """task: stage1
name: tiny
train: domains
max_steps: 10
batch_size: 4
micro_batch_size: 2
data:
  train: {local: data/train}
  validation: {local: data/validation}
  width: 32
  height: 48
  num_frames: 1
model:
  unet: {config: {block_out_channels: [32, 64]}}
  autoencoder: {patch_size: 2}
  image_encoder: {stand_in_width: 16}
optimizer:
  lr: 1e-5
"""


@pytest.fixture
def write(tmp_path):
    def write_recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def problems_of(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.removeprefix(str(path)) for line in str(caught.value).splitlines()]


def test_a_recipe_is_typed_and_frozen(write):
    recipe = load_recipe(write(STAGE1))
    assert isinstance(recipe, Stage1Recipe)
    assert recipe.optimizer.lr == 1e-5
    with pytest.raises(ValueError, match="frozen"):
        recipe.max_steps = 3


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(write):
    path = write(STAGE1 + "  warmup_steps: 3\nseed: 4\n")
    loaded = load(path, ["optimizer.warmup_steps=5", "checkpoint.keep_last=7", "data.stride=[1, 3]"])
    assert loaded.recipe.optimizer.warmup_steps == 5
    assert loaded.recipe.seed == 4
    assert loaded.recipe.checkpoint.keep_last == 7
    assert loaded.recipe.checkpoint.every_steps == 1000
    assert loaded.recipe.data.stride == (1, 3)
    assert loaded.overridden == {"optimizer.warmup_steps", "checkpoint.keep_last", "data.stride"}


def test_a_later_word_on_the_command_line_overrides_an_earlier_one(write):
    assert load_recipe(write(STAGE1), ["seed=1", "seed=2"]).seed == 2


def test_an_override_may_switch_the_source_of_a_network(write):
    words = ["model.autoencoder.patch_size=null", "model.autoencoder.path=weights/vae"]
    recipe = load_recipe(write(STAGE1), words)
    assert recipe.model.autoencoder.path == "weights/vae"
    assert recipe.model.autoencoder.patch_size is None


TEXTS = [
    *(
        "pf/take #2",
        "#2",
        "a: b",
        "- a",
        "'quoted'",
        '"quoted"',
        "[a",
        "a]",
        "{a}",
        "*a",
        "&a",
        "%a",
        "@a",
        "!a",
        "|",
        ">",
    ),
    *(" a ", "~", "5", "true", "1e-5", "a=b", "$HOME", "Tänzer 踊り", "a\\b", "a\tb", "a\x85b", "a\u2028b", "---", "?"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_of_a_text_value_arrives_and_survives_the_run_folder(write, tmp_path, text):
    recipe = load_recipe(write(STAGE1), [f"init_from={text}", f"cluster.environment.A={text}"])
    assert recipe.init_from == text
    assert recipe.cluster.environment == {"A": text}
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe


def test_a_text_key_is_left_out_by_null_or_nothing(write):
    path = write(STAGE1 + "init_from: other\n")
    assert load_recipe(path).init_from == "other"
    assert load_recipe(path, ["init_from=null"]).init_from is None
    assert load_recipe(path, ["init_from="]).init_from is None
    assert load_recipe(path, ["data.train.local=null"]).data.train.local == "null"
    assert problems_of(path, "data.train.local=") == [
        "command line: 'data.train.local' is empty, but must be text (quote it: \"...\")"
    ]


def test_typed_keys_are_parsed_without_silent_loss(write):
    path = write(STAGE1)
    assert load_recipe(path, ["cluster.setup=['module load a #b', c]"]).cluster.setup == ["module load a #b", "c"]
    assert load_recipe(path, ["cluster.environment={A: '1', B: x}"]).cluster.environment == {"A": "1", "B": "x"}
    assert load_recipe(path, ["model.unet.config.layers_per_block=1"]).model.unet.config["layers_per_block"] == 1
    for word, rest in (
        ("seed=5 #2", "#2"),
        ("seed=#2", "#2"),
        ("cluster.setup=[a] # b", "# b"),
        ("seed=1\n...", "..."),
    ):
        (problem,) = problems_of(path, word)
        assert problem.startswith(f"command line: {word.partition('=')[0]}: YAML would ignore '{rest}' as a comment")


def test_a_word_that_is_no_text_is_refused(write):
    (problem,) = problems_of(write(STAGE1), os.fsdecode(b"data.train.local=a\xff"))
    assert problem == "command line: 'data.train.local=a\\udcff' is not UTF-8 text"
    (problem,) = problems_of(write(STAGE1 + 'init_from: "\\udcff"\n'))
    assert problem == ":19: '\\udcff' contains half of a surrogate pair, which is not valid text"


def test_an_integer_is_accepted_for_a_number(write):
    assert load_recipe(write(STAGE1), ["optimizer.gradient_clipping=1"]).optimizer.gradient_clipping == 1.0


def test_text_that_yaml_reads_as_a_boolean_elsewhere_stays_text(write):
    assert load_recipe(write(STAGE1), ["cluster.partition=no", "cluster.account=on"]).cluster.partition == "no"


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_name(write):
    path = write(STAGE1 + "  warmup_step: 10\n")
    assert problems_of(path) == [":19: unknown key 'optimizer.warmup_step'; did you mean 'warmup_steps'?"]


def test_the_error_for_a_key_in_the_wrong_section_names_the_right_one(write):
    path = write(STAGE1 + "warmup_steps: 10\n")
    assert problems_of(path) == [":19: unknown key 'warmup_steps'; did you mean 'optimizer.warmup_steps'?"]


def test_a_key_of_another_task_is_unknown_and_its_task_is_named(write):
    assert problems_of(write(STAGE1 + "manifest: x\n")) == [":19: unknown key 'manifest'; it belongs to task animate"]


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(write):
    text = STAGE1.replace("max_steps: 10", "max_steps: 1e1").replace("height: 48", "height: yes") + "  momentum: 1\n"
    text = text.replace("name: tiny\n", "name: Tiny Run\nname: tiny\n")
    assert problems_of(write(text), "model.geometry_attention=yes", "oops") == [
        ":2: 'name' is the text 'Tiny Run', but must be lower-case letters, digits and underscores",
        ":3: key 'name' is given twice (first on line 2)",
        ":5: 'max_steps' is 10.0, but must be a whole number",
        ":12: 'data.height' is the text 'yes', but must be a whole number",
        ":20: unknown key 'optimizer.momentum'",
        "command line: 'oops' is not key=value",
        "command line: 'model.geometry_attention' is the text 'yes', but must be true or false",
    ]


def test_relations_are_checked_once_every_key_is_known_and_no_spelling_is_guessed(write):
    text = STAGE1.replace("batch_size: 4", "batch_size: 5", 1) + "  warmup_step: 99\n"
    assert problems_of(write(text)) == [
        ":19: unknown key 'optimizer.warmup_step'; did you mean 'warmup_steps'?",
    ]
    found = problems_of(write(text.replace("warmup_step:", "warmup_steps:")))
    assert any("micro_batch_size 2 does not divide batch_size 5" in line for line in found)
    assert any("optimizer.warmup_steps 99 is more than max_steps 10" in line for line in found)


def test_a_problem_with_an_overridden_value_is_located_on_the_command_line(write):
    assert problems_of(write(STAGE1), "batch_size=3", "optimizer.lr=-1") == [
        "command line: 'optimizer.lr' is -1, but must be greater than 0"
    ]
    assert problems_of(write(STAGE1), "data.width=33")[0].startswith("command line: data.width 33 cannot")


def test_missing_keys_are_named_at_their_section(write):
    text = STAGE1.replace("  lr: 1e-5\n", "  warmup_steps: 1\n").replace("max_steps: 10\n", "")
    assert problems_of(write(text)) == [": missing key 'max_steps'", ":16: missing key 'optimizer.lr'"]


def test_a_choice_that_does_not_exist_lists_those_that_do(write):
    (problem,) = problems_of(write(STAGE1), "train=domain")
    assert problem == (
        "command line: 'train' is the text 'domain', but must be one of image, domains, geometry, temporal; "
        "did you mean 'domains'?"
    )


@pytest.mark.parametrize("task", ["stage3", "", "[1]"])
def test_an_unknown_task_lists_the_tasks(write, task):
    (problem,) = problems_of(write(STAGE1.replace("task: stage1", f"task: {task}")))
    assert problem.startswith(":1: unknown task")
    assert all(name in problem for name in TASKS)


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]", "# nothing\n"])
def test_a_file_that_is_no_mapping_is_refused(write, text):
    assert problems_of(write(text)) == [": a recipe is a mapping: `key: value` lines"]


def test_a_file_that_is_not_there_suggests_one_that_is(write):
    path = write(STAGE1)
    with pytest.raises(
        RecipeError, match=r"recipes\.yaml: cannot be read: No such file.*did you mean '.*recipe\.yaml'"
    ):
        load_recipe(path.with_name("recipes.yaml"))
    with pytest.raises(RecipeError, match=r"did you mean '.*recipe\.yaml'"):
        load_recipe(path.with_name("recipe.yml"))
    with pytest.raises(RecipeError, match=r"No such file or directory$"):
        load_recipe(path.with_name("stage9.yaml"))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"task: \xff\xfe")
    with pytest.raises(RecipeError, match="byte 6 is not UTF-8"):
        load_recipe(path)


HOSTILE = "!!python/object/apply:os.mkdir ['{ran}']"


@pytest.mark.parametrize("where", ["in the file", "on the command line"])
def test_a_tag_that_would_run_code_is_refused_and_runs_nothing(write, tmp_path, where):
    ran = tmp_path / "ran"
    tagged = HOSTILE.format(ran=ran)
    yaml.unsafe_load(tagged)
    assert ran.is_dir(), "the tag does run code if YAML is loaded unsafely"
    ran.rmdir()
    if where == "in the file":
        (problem,) = problems_of(write(STAGE1 + f"seed: {tagged}\n"))
    else:
        (problem,) = problems_of(write(STAGE1), f"seed={tagged}")
    assert "tag 'tag:yaml.org,2002:python/object/apply:os.mkdir' is not allowed" in problem
    assert not ran.exists()
    record_fault(
        "YAML tag that runs code",
        how=f"{HOSTILE.format(ran='...')} {where}",
        promised="refused with its place, nothing built",
        happened=problem,
    )


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", ".hidden", "a\\b", "-rf", "A"])
def test_a_name_that_climbs_out_of_the_runs_folder_is_refused(write, name):
    (problem,) = problems_of(write(STAGE1.replace("name: tiny", f"name: {name}")))
    assert problem == f":2: 'name' is the text '{name}', but must be lower-case letters, digits and underscores"


def test_keys_nested_without_end_on_the_command_line_are_refused(write):
    (problem,) = problems_of(write(STAGE1), "a." * 3000 + "b=1")
    assert problem.endswith("...' has 3001 parts; at most 20 are read")


def test_reading_an_endless_recipe_stops_at_a_limit():
    with pytest.raises(RecipeError, match=r"/dev/zero: the file has 1,000,001 characters; at most 1,000,000 are read"):
        load_recipe("/dev/zero")


def test_the_environment_is_never_read(write, monkeypatch):
    monkeypatch.setenv("NAME", "other")
    assert load_recipe(write(STAGE1), ["init_from=$NAME"]).init_from == "$NAME"


def test_the_dumped_recipe_loads_to_the_same_recipe(write, tmp_path):
    recipe = load_recipe(write(STAGE1), ["optimizer.eps=1e-9", "cluster.environment={A: '1e-5', B: 'no'}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert again.read_text(encoding="utf-8").startswith("task: stage1\nname: tiny\n")


def test_flattening_names_every_value_by_its_dotted_key():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_known_keys_hold_sections_and_their_keys():
    keys = known_keys(TASKS["stage2"])
    assert "model" in keys
    assert "model.autoencoder.patch_size" in keys
    assert "train" not in keys


PREPARE = "task: prepare\nname: p\noutput: data\nvideos:\n  folder: videos\n  annotators:\n    person: "


@pytest.mark.parametrize(("text", "person"), [("0", 0), ("2", 2), ("[0, 0.1, 0.5, 1]", (0.0, 0.1, 0.5, 1.0))])
def test_a_person_is_chosen_by_a_number_or_a_box(write, text, person):
    recipe = load_recipe(write(PREPARE + text))
    assert recipe.videos.annotators.person == person
    assert load_recipe(write(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    "text", ["-1", "true", "left", "[0, 0, 1]", "[0, 0, 1.1, 1]", "[-0.1, 0, 1, 1]", "[1, 0, 0, 1]"]
)
def test_a_person_that_is_neither_number_nor_box_is_one_problem(write, text):
    (problem,) = problems_of(write(PREPARE + text))
    assert problem.startswith(":7: 'videos.annotators.person' is ")
    assert problem.endswith(
        "but must be a whole number from 0, or a box [left, top, right, bottom] in fractions of the frame, with left < "
        "right and top < bottom"
    )
