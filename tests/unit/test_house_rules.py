"""Rules for the whole repository, checked in its source, which no test of a single part would check."""

import ast
import configparser
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = sorted([*(ROOT / "dreamdance").rglob("*.py"), *(ROOT / "kernels" / "dreamdance_kernels").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
SUPPORT = sorted((ROOT / "tests" / "support").glob("*.py"))
ENTRIES = sorted([*(ROOT / "launchers").glob("*.py"), *(ROOT / "tools").glob("*.py")])
MEANINGLESS_NAMES = {"utils", "util", "helpers", "common", "misc", "base"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions of the module and methods of its public classes, whose names have no underscore in front."""
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    while scopes:
        for node in scopes.pop().body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                scopes.append(node)
            elif isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__call__"):
                yield node


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_there_is_something_to_check() -> None:
    assert len(LIBRARY) > 80
    assert len(TESTS) > 50
    assert ROOT / "dreamdance" / "training" / "trainer.py" in LIBRARY


def test_the_library_never_prints() -> None:
    assert [place(path, call) for path in LIBRARY for call in calls(parse(path), "print")] == []


def test_every_public_argument_and_result_is_annotated() -> None:
    found = []
    for path in [*LIBRARY, *ENTRIES]:
        for function in public_functions(parse(path)):
            signature = function.args
            arguments = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs]
            arguments += [extra for extra in (signature.vararg, signature.kwarg) if extra]
            bare = [entry.arg for entry in arguments if entry.annotation is None and entry.arg not in ("self", "cls")]
            bare += ["return"] if function.returns is None else []
            found += [f"{place(path, function)} {function.name}: {', '.join(bare)}"] if bare else []
    assert found == []


def test_every_module_has_a_docstring_of_its_purpose() -> None:
    without = [path.relative_to(ROOT) for path in [*LIBRARY, *ENTRIES, *TESTS]
               if path.stat().st_size and not ast.get_docstring(parse(path))]  # fmt: skip
    assert without == []


def test_every_public_class_of_the_library_has_a_docstring() -> None:
    found = []
    for path in LIBRARY:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(f"{place(path, node)} {node.name}")
    assert found == []


def test_no_module_has_a_meaningless_name() -> None:
    assert [
        path.relative_to(ROOT) for path in [*LIBRARY, *TESTS] if path.stem.removeprefix("test_") in MEANINGLESS_NAMES
    ] == []


def test_broad_handlers_raise_again_except_where_a_rank_records_its_failure() -> None:
    """`launch.job` records any error for `--follow`, and raises it again."""
    found = []
    for path in LIBRARY:
        for handler in (node for node in ast.walk(parse(path)) if isinstance(node, ast.ExceptHandler)):
            kind = handler.type
            broad = kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))
            raises_again = any(isinstance(node, ast.Raise) and node.exc is None for node in handler.body)
            if broad and not raises_again:
                found.append(place(path, handler))
    assert found == []


def test_no_random_number_comes_from_a_global_generator() -> None:
    """Every draw has its own seed; the global generators are only seeded, saved and restored for other libraries."""
    pattern = re.compile(
        r"\bnp\.random\.(?!default_rng|Generator|SeedSequence|get_state|set_state|seed)|"
        r"(?<![\w.])random\.(random|randint|uniform|choice|choices|sample|shuffle|gauss)\("
    )
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in LIBRARY
             for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)]  # fmt: skip
    assert found == []


def test_no_reader_can_run_code() -> None:
    """No unpickler, only safe YAML, no code from a folder of weights, and weights only as safetensors."""
    found = []
    for path in [*LIBRARY, *ENTRIES]:
        tree, text = parse(path), path.read_text(encoding="utf-8")
        found += [f"{place(path, tree)} {word}" for word in ("trust_remote_code", "unsafe_load") if word in text]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, given = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            refused = (
                name in ("yaml.load", "eval", "exec")
                or re.fullmatch(r"(pickle|cloudpickle|dill|joblib|marshal|shelve)\.(loads?|Unpickler|open)", name)
                or (name == "np.load" and given.get("allow_pickle") != "False")
                or (name == "torch.load" and given.get("weights_only") != "True")
                or (name.endswith("Pipeline.from_pretrained") and given.get(None) != "SAFE_LOADING")
                or (name == "network_class.from_pretrained" and given.get("use_safetensors") != "True")
            )
            found += [f"{place(path, call)} {name}"] if refused else []
    assert found == []


def test_no_comment_marks_unfinished_work() -> None:
    words = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in [*LIBRARY, *ENTRIES]
             for line in path.read_text(encoding="utf-8").splitlines() if words.search(line)]  # fmt: skip
    assert found == []


def test_no_comment_is_a_banner() -> None:
    banner = re.compile(r"^\s*#\s*([-=#*~])\1{3,}|^\s*#.*([-=#*~])\2{7,}\s*$")
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in [*LIBRARY, *ENTRIES, *TESTS, *SUPPORT]
             for line in path.read_text(encoding="utf-8").splitlines() if banner.search(line)]  # fmt: skip
    assert found == []


def test_constants_are_documented_by_a_comment_above_them() -> None:
    """A string below a constant is no docstring: Python throws it away."""
    found = []
    for path in [*LIBRARY, *ENTRIES]:
        body = parse(path).body
        for before, node in pairwise(body):
            is_text = (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            )
            if is_text and isinstance(before, ast.Assign | ast.AnnAssign):
                found.append(place(path, node))
    assert found == []


def test_every_room_of_the_library_stands_in_the_import_contract() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    layers = set(re.findall(r"dreamdance\.(\w+)", settings["importlinter:contract:layers"]["layers"]))
    rooms = {
        path.stem for path in (ROOT / "dreamdance").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert layers == rooms - {"__init__"}


def test_no_two_classes_of_the_library_have_one_name() -> None:
    names = Counter(
        node.name
        for path in LIBRARY
        for node in parse(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in names.items() if times > 1] == []


def test_no_two_tests_of_a_file_have_one_name() -> None:
    """The first of two would never run."""
    for path in TESTS:
        names = [node.name for node in parse(path).body if isinstance(node, Function)]
        assert len(names) == len(set(names)), path.relative_to(ROOT)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_every_test_can_fail(path: Path) -> None:
    """Every test contains an assertion, or calls a function of its file that contains one."""
    tree = parse(path)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}

    def checks(function: Function, seen: frozenset[str] = frozenset()) -> bool:
        for node in ast.walk(function):
            if isinstance(node, ast.Assert):
                return True
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if re.search(r"assert_|raises$|gradcheck|opcheck|\bfail$|\bcheck", name):
                    return True
                called = functions.get(name)
                if called is not None and name not in seen and checks(called, seen | {name}):
                    return True
        return False

    idle = [name for name, node in functions.items() if name.startswith("test_") and not checks(node)]
    assert not idle


def test_tests_use_real_parts() -> None:
    found = [file.relative_to(ROOT) for file in TESTS
             if any(name.startswith(("unittest.mock", "mock")) for name in imported_modules(parse(file)))]  # fmt: skip
    assert found == []
