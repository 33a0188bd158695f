"""The figures that the project states about itself: counted over files that git knows, checked against the limits."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.tool_modules import load_tool

TOOL = Path(__file__).parents[2] / "tools" / "figures.py"


def write(root: Path, name: str, num_lines: int) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("pass\n" * num_lines)


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool in its own repository: 30 lines of library, 12 of tests, and a file that git does not know."""
    write(tmp_path, "tools/figures.py", 0)
    (tmp_path / "tools" / "figures.py").write_text(TOOL.read_text())
    write(tmp_path, "package/large.py", 20)
    write(tmp_path, "package/small.py", 10)
    write(tmp_path, "tests/unit/test_small.py", 12)
    write(tmp_path, "untracked.py", 500)
    (tmp_path / "package" / "functions.py").write_text(
        "class Thing:\n    async def slow(self):\n        def inner():\n            return 1\n        return inner\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "package", "tests"], cwd=tmp_path, check=True)
    module = load_tool("figures", folder=tmp_path / "tools")
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    return module


def test_lines_are_counted_over_what_git_knows(figures: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main() == 0
    sizes, longest = capsys.readouterr().out.splitlines()
    assert sizes == "library 35 lines, tests 12 lines, ratio 0.34"
    assert longest == "longest file 20 (large.py), longest function 4 (functions.py:slow)"


def test_a_removed_file_no_longer_counts_even_before_git_knows(
    figures: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "package" / "large.py").unlink()
    assert figures.main() == 0
    assert "library 15 lines" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "lines", "code"), [("file", 400, 0), ("file", 401, 1)])
def test_the_check_fails_above_the_longest_file(
    figures: ModuleType,
    tmp_path: Path,
    name: str,
    lines: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, f"package/{name}.py", lines)
    subprocess.run(["git", "add", "package"], cwd=tmp_path, check=True)
    assert figures.main() == code
    assert (f"{name}.py has {lines} lines, at most 400" in capsys.readouterr().err) == bool(code)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    assert figures.main() == 0, "without --check it only reports"


@pytest.mark.parametrize(("lines", "code"), [(80, 0), (81, 1)])
def test_the_check_fails_above_the_longest_function_wherever_it_is_nested(
    figures: ModuleType, tmp_path: Path, lines: int, code: int
) -> None:
    body = "        pass\n" * (lines - 1)
    (tmp_path / "package" / "functions.py").write_text(f"class Thing:\n    def long(self):\n{body}")
    assert figures.main() == code


def test_tests_may_be_longer_than_the_library(figures: ModuleType, tmp_path: Path) -> None:
    """A long table of cases is no long function: the limits apply to the library alone."""
    write(tmp_path, "tests/unit/test_small.py", 900)
    assert figures.main() == 0


def test_this_repository_keeps_its_limits() -> None:
    finished = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout
