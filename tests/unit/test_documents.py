"""The documents name only existing contracts, files, links, commands and recipe keys; their code blocks parse.

Each check is a function from text to a list of problems, so that the last tests can check it with broken samples.
"""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from dreamdance.errors import UserError
from dreamdance.recipe import load
from dreamdance.recipe.parse import TASKS

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "dreamdance" / "README.md"
FOLDERS = (".ci", ".github", "dreamdance", "kernels", "launchers", "recipes", "tests", "tools")
DOCUMENTS = sorted([ROOT / "README.md", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
SOURCES = sorted(
    [
        ROOT / "setup.cfg",
        *(path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".sh", ".yaml")),
    ]
)
WRITTEN_BY_RUNS = {"table.md"}
RUN_FOLDERS = {"runs", "checkpoints", "exports", "samples", "tensorboard", "logs"}
LANGUAGES = {"bash", "python", "json"}
LAUNCHERS = ("dreamdance", "launchers/slurm.py")
# A file or folder in `code`: with one of our suffixes or a slash at the end.
PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)*(/|\.(py|sh|yaml|md|csv|txt|cfg))")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language (empty where none is named) and its text, without the fence's indentation."""

    language: str
    text: str


def code_blocks(text: str) -> list[Block]:
    found = re.findall(r"^([ ]*)```(\w*)\n(.*?)^\1```[ ]*$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(language, textwrap.dedent(body)) for _, language, body in found]


def without_code_blocks(text: str) -> str:
    return re.sub(r"^([ ]*)```.*?^\1```[ ]*$", "", text, flags=re.DOTALL | re.MULTILINE)


def contracts(design: str) -> set[str]:
    """The contracts that the design defines, such as C8."""
    return set(re.findall(r"^\*\*(C\d+) ", design, flags=re.MULTILINE))


def unknown_contracts(text: str, known: set[str]) -> list[str]:
    cited = re.findall(r"(?<![\w-])C[1-9]\d?\b", text)
    return sorted({name for name in cited if name not in known})


def missing_documents(text: str, folder: Path) -> list[str]:
    """Documents that a text names and the repository lacks."""
    names = {path.name for path in DOCUMENTS}
    missing = {f"{word}.md" for word in re.findall(r"\b(DESIGN|FACTS|PAPER|ECOSYSTEM)\b", text)} - names
    for name in re.findall(r"(?<![\w/:*.-])(?:\.{1,2}/|\w[\w-]*/)*[\w-]+\.md\b", text):
        is_there = (folder / name).is_file() or (ROOT / name).is_file() if "/" in name else name in names
        is_there = is_there or name.rpartition("/")[2] in WRITTEN_BY_RUNS
        missing |= set() if is_there else {name}
    return sorted(missing)


def heading_anchors(text: str) -> set[str]:
    """The anchors of the headings of a document on GitHub."""
    headings = re.findall(r"^#+ (.*)$", without_code_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Links to files and headings of the repository that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(text)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else None
        if path is not None and not (path.exists() and path.is_relative_to(ROOT)):
            broken.append(target)
            continue
        if anchor and anchor not in heading_anchors(text if path is None else read(path)):
            broken.append(target)
    return broken


def missing_paths(text: str, folder: Path) -> list[str]:
    """Files and folders of the repository in `code` that do not exist."""
    missing = []
    for code in re.findall(r"`([^`\n]+)`", without_code_blocks(text)):
        places = (folder, ROOT, ROOT / "dreamdance")
        first = code.split("/")[0]
        ours = first in FOLDERS or folder.is_relative_to(ROOT / "dreamdance")
        ours = ours or any((place / first).is_dir() for place in places)
        ours = ours and (first not in RUN_FOLDERS or code.endswith(".py"))
        is_path = PATH.fullmatch(code) is not None and "/" in code.rstrip("/")
        if is_path and ours and not any(any(place.glob(code.rstrip("/"))) for place in places):
            missing.append(code)
    return missing


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a recipe or section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, f"{prefix}{name}.")


@cache
def recipe_keys() -> frozenset[str]:
    return frozenset(key for recipe in TASKS.values() for key in keys_of(recipe))


def unknown_keys(text: str) -> list[str]:
    """Dotted words in `code` that begin with a section of a recipe and are not keys."""
    keys = recipe_keys()
    sections = {key.split(".")[0] for key in keys if "." in key}
    found = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[:=][^`\n]*)?`", without_code_blocks(text))
    files = (".sh", ".py")
    return [key for key in found if key.split(".")[0] in sections and key not in keys and not key.endswith(files)]


@cache
def launcher_words() -> tuple[frozenset[str], frozenset[str]]:
    """The sub-commands and the options of the launcher, from its own help."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "slurm.py"), "--help"], capture_output=True, text=True, check=True
    )
    usage = done.stdout.partition("\n\n")[0]
    commands = re.findall(r"slurm\.py ([a-z]+)\b", usage)
    return frozenset(commands), frozenset(re.findall(r"--[a-z][a-z-]*", done.stdout))


def problems_of_launch(words: list[str]) -> list[str]:
    """Problems in the arguments of the launcher: sub-command, recipe, overrides, options."""
    commands, options = launcher_words()
    problems = [f"unknown option {word}" for word in words if word.startswith("--") and word not in options]
    positional = plain_words(words)
    if not positional or positional[0].isupper():
        return problems
    first, *rest = positional
    if not first.endswith(".yaml"):
        problems += [] if first in commands else [f"unknown sub-command {first}"]
        if first == "explain" and rest and not rest[0].isupper() and rest[0] not in recipe_keys():
            problems.append(f"unknown key {rest[0]}")
        return problems
    sweeps = [word for before, word in pairwise(words) if before == "--sweep"]
    swept = [f"{key}={value}" for key, _, values in (sweep.partition("=") for sweep in sweeps)
             for value in values.split(",")]  # fmt: skip
    for overrides in [rest, *([*rest, one] for one in swept)]:
        try:
            load(ROOT / first, overrides)
        except UserError as error:
            problems.append(str(error))
    return problems


def plain_words(words: list[str]) -> list[str]:
    """The words that are neither options nor their values."""
    with_value = {"--cluster", "--gpu", "--runs", "--sweep", "--task"}
    return [
        word
        for index, word in enumerate(words)
        if not word.startswith("--") and (index == 0 or words[index - 1] not in with_value)
    ]


def problems_of_commands(text: str) -> list[str]:
    """Problems in the lines of a shell block: grammar, missing scripts, arguments of the launcher."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        return [done.stderr.strip()]
    problems = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):  # variables before the command
            words = words[1:]
        words = words[1:] if words and words[0] in ("python", "bash") else words
        if not words:
            continue
        if "/" in words[0] and not (ROOT / words[0]).is_file():
            problems.append(f"no file {words[0]}")
        elif words[0] in LAUNCHERS:
            problems += problems_of_launch(words[1:])
    return problems


def problems_of_python(text: str) -> list[str]:
    """Problems in a Python block: its grammar, and imports of our modules that do not exist."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dreamdance"):
            spec = importlib.util.find_spec(node.module or "")
            source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
            problems += [f"{node.module} has no {name.name}" for name in node.names
                         if not re.search(rf"\b{name.name}\b", source)]  # fmt: skip
    return problems


def problems_of_blocks(text: str) -> list[str]:
    """Problems in the code blocks of a document."""
    problems: list[str] = []
    for block in code_blocks(text):
        has_commands = re.match(rf"(python |bash |{'|'.join(LAUNCHERS)} )", block.text) is not None
        if block.language == "bash" or (not block.language and has_commands):
            problems += problems_of_commands(block.text)
        elif block.language == "python":
            problems += problems_of_python(block.text)
        elif block.language == "json":
            try:
                json.loads(block.text)
            except ValueError as error:
                problems.append(str(error))
        elif block.language:
            problems.append(f"a block of {block.language}; {', '.join(sorted(LANGUAGES))} are checked")
    return problems


def problems_of_mentioned_commands(text: str) -> list[str]:
    """Problems in commands in `code` between words, and in the header of a recipe."""
    code = without_code_blocks(text)
    lines = re.findall(r"`((?:python|bash|dreamdance)\s[^`]+)`", code) + re.findall(
        r"^#   (python .+)$", text, re.MULTILINE
    )
    return [problem for line in lines for problem in problems_of_commands(" ".join(line.split()))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def found_in(paths: list[Path], check: Any) -> dict[str, list[str]]:
    """The problems by file, for all files that have any."""
    found = {name_of(path): check(path) for path in paths if path != Path(__file__)}
    return {name: problems for name, problems in found.items() if problems}


def test_the_documents_that_a_reader_needs_are_there() -> None:
    folders = {name_of(path.parent) for path in DOCUMENTS if path.name == "README.md"}
    assert folders >= {".", "dreamdance", "dreamdance/data", "kernels", "launchers", "recipes", "tests"}
    assert {path.name for path in DOCUMENTS} >= {"CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}
    assert contracts(read(DESIGN)) == {f"C{number}" for number in range(1, 11)}
    assert len(SOURCES) > 300


def test_every_contract_that_is_cited_is_defined() -> None:
    known = contracts(read(DESIGN))
    assert found_in([*SOURCES, *DOCUMENTS], lambda path: unknown_contracts(read(path), known)) == {}


def test_every_document_that_is_named_exists() -> None:
    assert found_in([*SOURCES, *DOCUMENTS], lambda path: missing_documents(read(path), path.parent)) == {}


def test_every_link_leads_somewhere_in_the_repository() -> None:
    assert found_in(DOCUMENTS, lambda path: broken_links(read(path), path.parent)) == {}


def test_every_file_that_a_document_names_exists() -> None:
    assert found_in(DOCUMENTS, lambda path: missing_paths(read(path), path.parent)) == {}


def test_every_recipe_key_that_a_document_names_exists() -> None:
    assert found_in(DOCUMENTS, lambda path: unknown_keys(read(path))) == {}


def test_every_code_block_parses_and_names_existing_things() -> None:
    assert sum(block.language in LANGUAGES for path in DOCUMENTS for block in code_blocks(read(path))) > 10
    assert found_in(DOCUMENTS, lambda path: problems_of_blocks(read(path))) == {}


def test_every_command_between_words_or_in_a_recipe_names_existing_things() -> None:
    recipes = [path for path in SOURCES if path.suffix == ".yaml"]
    assert found_in([*DOCUMENTS, *recipes], lambda path: problems_of_mentioned_commands(read(path))) == {}


# Broken samples: each check must find its problem.


def test_an_undefined_contract_is_found() -> None:
    assert unknown_contracts("as C8 promises, and C11; not IPT-C2", {"C8"}) == ["C11"]


def test_a_document_that_is_not_there_is_found() -> None:
    text = "see DESIGN 4, FACTS.md, tools/faults.md, tools/lost.md, table.md and README.md"
    assert missing_documents(text, ROOT) == ["DESIGN.md", "FACTS.md", "tools/lost.md"]


def test_links_to_lost_files_lost_headings_and_out_of_the_repository_are_found() -> None:
    text = (
        "# One head\n[a](README.md) [b](lost.md) [c](#one-head) [d](#two) [e](README.md#no) [f](../x) [g](https://x.y)"
    )
    assert broken_links(text, ROOT) == ["lost.md", "#two", "README.md#no", "../x"]


def test_a_file_that_was_moved_away_is_found() -> None:
    text = "`tools/test.sh` `tools/lost.sh` `tools/*.sh` `tests/unit/` `tests/lost/` `a/b` `runs/x/`"
    assert missing_paths(text, ROOT) == ["tools/lost.sh", "tests/lost/"]


def test_a_key_that_no_recipe_has_is_found() -> None:
    assert unknown_keys("`optimizer.lr=1e-5` `optimizer.rate` `model.unfreeze: all` `torch.load`") == ["optimizer.rate"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("for x in", "syntax error"),
        ("bash tools/lost.sh", "no file tools/lost.sh"),
        ("python launchers/slurm.py recipes/lost.yaml", "recipes/lost.yaml"),
        ("python launchers/slurm.py recipes/stage2.yaml optimizer.rate=1", "optimizer.rate"),
        ("A=1 dreamdance recipes/stage2.yaml optimizer.lr=much", "optimizer.lr"),
        ("dreamdance recipes/stage2.yaml --sweep optimizer.rate=1,2", "optimizer.rate"),
        ("dreamdance recipes/stage2.yaml --dry-runn", "unknown option --dry-runn"),
        ("dreamdance state stage2", "unknown sub-command state"),
    ],
)
def test_a_command_that_cannot_work_is_found(line: str, problem: str) -> None:
    assert problem in " ".join(problems_of_blocks(f"```bash\n{line}\n```\n"))


def test_a_command_between_words_that_cannot_work_is_found() -> None:
    text = "run `bash tools/test.sh quick`, `bash\ntools/lost.sh`, `dreamdance status [RUN]` or `dreamdance state`"
    assert problems_of_mentioned_commands(text) == ["no file tools/lost.sh", "unknown sub-command state"]
    assert len(problems_of_mentioned_commands("# What\n#\n#   python launchers/slurm.py recipes/lost.yaml\n")) == 1


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "def f(:"),
        ("python", "from dreamdance.pipelines import LostPipeline"),
        ("json", '{"a": }'),
        ("console", "$ ls"),
        ("", "python launchers/slurm.py recipes/lost.yaml"),
    ],
)
def test_a_block_that_does_not_parse_is_found(language: str, code: str) -> None:
    assert len(problems_of_blocks(f"```{language}\n{code}\n```\n")) == 1
