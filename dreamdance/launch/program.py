"""How the launcher was called, so that users can copy the commands in its messages."""

import shlex
import sys
from pathlib import Path

CONSOLE_COMMAND = "dreamdance"
DEFAULT_RUNS = Path("runs")


def program() -> str:
    """`dreamdance` if that command was called, else the script of a checkout."""
    called = Path(sys.argv[0]).name if sys.argv else ""
    return CONSOLE_COMMAND if called == CONSOLE_COMMAND else "python launchers/slurm.py"


def launcher_command(words: str | Path, runs: Path) -> str:
    """A command to copy, with the same folder of runs as this call."""
    elsewhere = "" if runs == DEFAULT_RUNS else f" --runs {shlex.quote(str(runs))}"
    return f"{program()} {words}{elsewhere}"
