"""The key reference: every key is described, `explain` shows it, and recipes/README.md is generated from it."""

import inspect
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from support.tool_modules import load_tool

from dreamdance.launch.command import main
from dreamdance.recipe import load_recipe
from dreamdance.recipe.keys import describe_type, explain, keys
from dreamdance.recipe.overrides import section_class
from dreamdance.recipe.parse import TASKS, known_keys
from dreamdance.recipe.same_run import CHANGEABLE_KEYS
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.recipe.sections import Fraction, Pixels

ROOT = Path(__file__).parents[2]
# The same key with the same meaning in several recipe classes.
SHARED = {"task", "sampling"}
SENTENCE = re.compile(r"[A-Z`].{18,}\.", re.DOTALL)


def fields() -> dict[str, FieldInfo]:
    """Every field of every recipe and section class, by the class that declares it: `class.field`."""
    found: dict[str, FieldInfo] = {}
    waiting: list[type[BaseModel]] = list(TASKS.values())
    while waiting:
        model = waiting.pop()
        for name, field in model.model_fields.items():
            owner = next(base for base in model.__mro__ if name in inspect.get_annotations(base))
            found[f"{owner.__name__}.{name}"] = field
            if section := section_class(field.annotation):
                waiting.append(section)
    return found


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("key_reference")


def test_every_key_is_described_by_a_sentence() -> None:
    assert len(fields()) > 180
    bad = {
        name: field.description for name, field in fields().items() if not SENTENCE.fullmatch(field.description or "")
    }
    assert bad == {}


def test_no_two_keys_have_the_same_description() -> None:
    names_by_description = defaultdict(list)
    for name, field in fields().items():
        if name.partition(".")[2] not in SHARED:
            names_by_description[field.description].append(name)
    assert [names for names in names_by_description.values() if len(names) > 1] == []


def test_every_key_that_a_description_names_exists() -> None:
    every = {key for recipe in TASKS.values() for key in known_keys(recipe)}
    sections = {key.partition(".")[0] for key in every if "." in key}
    named = {
        word
        for field in fields().values()
        for word in re.findall(r"\b[a-z_]+\.[a-z_0-9]+\b", field.description or "")
        if word.partition(".")[0] in sections
    }
    assert len(named) > 5
    assert named <= every


def test_the_readme_of_the_recipes_equals_the_generated_one(tool: ModuleType) -> None:
    stored = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert stored == tool.page(), "run tools/key_reference.py"


def test_the_readme_shows_every_task_and_every_key(tool: ModuleType) -> None:
    page = tool.page()
    for key in keys():
        assert f"`{key.path}`" in page or f"| `{key.path.rpartition('.')[2]}` |" in page
        assert key.meaning in page
    for task in TASKS:
        assert f"\n| `{task}` | " in page


def test_the_readme_lists_the_changes_that_a_run_folder_accepts(tool: ModuleType) -> None:
    sentence = re.search(r"Not counted as changes:(.*?)\. Other", tool.page(), re.DOTALL)
    assert sentence is not None
    assert set(re.findall(r"`([a-z_.]+)`", sentence[1])) == set(CHANGEABLE_KEYS)


def test_the_check_fails_where_the_readme_is_old(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "OUTPUT", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["key_reference.py", "--check"])
    assert tool.main() == 1
    assert "run tools/key_reference.py" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["key_reference.py"])
    assert tool.main() == 0
    monkeypatch.setattr(sys, "argv", ["key_reference.py", "--check"])
    assert tool.main() == 0
    with tool.OUTPUT.open("a") as page:
        page.write("| `optimizer.lr` | old |\n")
    assert tool.main() == 1


def test_a_key_is_explained_with_type_default_and_tasks() -> None:
    assert explain("optimizer.ema_decay").splitlines()[:4] == [
        "optimizer.ema_decay",
        "    type:    number, >= 0 and < 1",
        "    default: 0.9999",
        "    tasks:   stage1, stage2",
    ]
    assert "    unit:    seconds\n" in explain("cluster.stop_seconds")
    assert "    unit:    GiB\n    default: not set\n" in explain("cluster.memory_gib")
    assert "    default: required\n" in explain("optimizer.lr")
    assert "    type:    one of none, temporal, decoder, all\n" in explain("model.unfreeze")


def test_a_section_is_explained_with_all_its_keys() -> None:
    shown = [block.splitlines()[0] for block in explain("optimizer").split("\n\n")]
    assert shown == ["optimizer", *(key for key in known_keys(TASKS["stage1"]) if key.startswith("optimizer."))]


def test_without_a_key_all_keys_are_explained() -> None:
    shown = {line for line in explain().splitlines() if line and not line.startswith(" ")}
    assert shown == {key for recipe in TASKS.values() for key in known_keys(recipe)}


def test_a_key_with_two_meanings_is_explained_for_each_task() -> None:
    both = explain("objective.target_latents")
    assert "tasks:   stage1\n" in both
    assert "tasks:   stage2\n" in both
    assert "tasks:   stage1\n" not in explain("objective.target_latents", "stage2")


def test_a_section_that_is_given_loses_the_default_of_the_whole_as_explained() -> None:
    assert "default: 1.5, or 1.0 where another key of its section is set" in explain("geometry.guidance_scales.depth")
    for words, depth in (([], 1.5), (["geometry.guidance_scales.rgb=2.0"], 1.0)):
        recipe = load_recipe(ROOT / "recipes" / "animate.yaml", words)
        assert isinstance(recipe, AnimateRecipe)
        assert recipe.geometry.guidance_scales.depth == depth


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Fraction, "number, >= 0 and <= 1"),
        (Pixels | None, "whole number, > 0"),
        (list[Literal["pose", "depth"]], "list, each one of pose, depth"),
        (tuple[int, Pixels], "list of 2: whole number; whole number, > 0"),
        (dict[str, Any] | None, "mapping of names to any value"),
        (Literal[True, False, "keep_attention"], "one of true, false, keep_attention"),
        (Annotated[str, Field(pattern="^[a-z]+$")], "text, of lower-case letters, digits and underscores"),
        (bool | None, "true or false"),
    ],
)
def test_a_type_is_described_in_words(annotation: Any, words: str) -> None:
    assert describe_type(annotation) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lrr"], "no recipe has a key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["ema_decay"], "no recipe has a key 'ema_decay'; did you mean 'optimizer.ema_decay'?"),
        (["cluster.environment.PATH"], "did you mean 'cluster.environment'?"),
        (["manifest", "--task", "stage1"], "recipes of task stage1 have no key 'manifest'; it belongs to task animate"),
        (["--task", "stage3"], "invalid choice: 'stage3'"),
        (["zzz"], "no recipe has a key 'zzz'\n"),
    ],
)
def test_a_key_that_no_recipe_has_is_refused_with_the_nearest_one(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *words], lambda *_: "") == 2
    assert message in capsys.readouterr().err


def test_the_command_explains_without_loading_torch() -> None:
    code = (
        "import sys; sys.argv = ['dreamdance', 'explain', 'batch_size', '--task', 'stage2']\n"
        "from dreamdance.console import main\n"
        "code = main()\n"
        "sys.exit(code or int('torch' in sys.modules) * 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("batch_size\n    type:    whole number, > 0\n    unit:    clips\n")
