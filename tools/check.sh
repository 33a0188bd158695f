#!/usr/bin/env bash
# Checks format, lint, types and import contracts, as CI does before the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
bin=.venv/bin
"$bin"/ruff format --check .
"$bin"/ruff check .
"$bin"/mypy
"$bin"/lint-imports
"$bin"/python tools/figures.py --check
"$bin"/python tools/key_reference.py --check
