"""Prints the size of the code: lines, longest file and function, test-to-library ratio.

With `--check` it fails if a file or a function is longer than the limit.
"""

import ast
import subprocess
import sys
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def python_files() -> list[Path]:
    root = Path(__file__).resolve().parent.parent
    listed = subprocess.check_output(["git", "ls-files", "*.py"], cwd=root, text=True)
    return [root / name for name in listed.split() if (root / name).exists()]


def functions(path: Path) -> list[tuple[int, str]]:
    """(number of lines, file:name) of every function in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [((node.end_lineno or node.lineno) - node.lineno + 1, f"{path.name}:{node.name}") for node in found]


def over_limit(paths: list[Path], lines: dict[Path, int]) -> list[str]:
    """A line for each file and each function that is longer than its limit."""
    files = [(lines[path], path.name, MAX_FILE_LINES) for path in paths]
    within = [(length, name, MAX_FUNCTION_LINES) for path in paths for length, name in functions(path)]
    return [
        f"{name} has {length} lines, at most {limit}" for length, name, limit in [*files, *within] if length > limit
    ]


def main() -> int:
    files = python_files()
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    tests = [path for path in files if "tests" in path.parts]
    library = [path for path in files if path not in set(tests)]
    longest_file = max((lines[path], path.name) for path in library)
    longest_function = max(entry for path in library for entry in functions(path))
    num_library, num_tests = sum(lines[path] for path in library), sum(lines[path] for path in tests)
    print(f"library {num_library} lines, tests {num_tests} lines, ratio {num_tests / num_library:.2f}")
    print(
        f"longest file {longest_file[0]} ({longest_file[1]}), "
        f"longest function {longest_function[0]} ({longest_function[1]})"
    )
    too_long = over_limit(library, lines) if "--check" in sys.argv[1:] else []
    print(*too_long, sep="\n", end="\n" if too_long else "", file=sys.stderr)
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
