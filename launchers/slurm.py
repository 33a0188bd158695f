"""Launches any recipe on Slurm, on this machine, or in this process: python launchers/slurm.py --help."""

import sys
from pathlib import Path

# This folder, which Python puts first unless PYTHONSAFEPATH is set, is no place to import from; `dreamdance` is
# installed, and a recipe may be launched from anywhere.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

try:
    from dreamdance.console import main
except ModuleNotFoundError as error:
    sys.stderr.write(f"{error}: this Python ({sys.executable}) lacks it; run tools/setup.sh and use .venv/bin/python\n")
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
