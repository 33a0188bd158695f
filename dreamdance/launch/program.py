"""How the launcher was called, so that the commands it advises can be copied."""

import shlex
import sys
from pathlib import Path

CONSOLE_COMMAND = "dreamdance"
DEFAULT_RUNS = Path("runs")


def program() -> str:
    """The command's own words: `dreamdance` where that was called, else the script of a checkout."""
    called = Path(sys.argv[0]).name if sys.argv else ""
    return CONSOLE_COMMAND if called == CONSOLE_COMMAND else "python launchers/slurm.py"


def launcher_command(words: str | Path, runs: Path) -> str:
    """A command to copy, for the same folder of runs as the one that was asked for."""
    elsewhere = "" if runs == DEFAULT_RUNS else f" --runs {shlex.quote(str(runs))}"
    return f"{program()} {words}{elsewhere}"
