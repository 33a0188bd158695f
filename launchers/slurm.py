"""Launches any recipe on Slurm, on this machine, or in this process. See `python launchers/slurm.py --help`."""

import sys
from pathlib import Path

# Removes this folder, which Python puts first unless PYTHONSAFEPATH is set, from the import path: `dreamdance` is
# installed, and recipes may be launched from any folder.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

try:
    from dreamdance.console import main
except ModuleNotFoundError as error:
    sys.stderr.write(f"{error} (Python: {sys.executable}); run tools/setup.sh and use .venv/bin/python\n")
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
