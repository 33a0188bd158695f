#!/usr/bin/env bash
# Measures the demo's aims and the paper's claims on rendered dancers that no model has seen, with exact truth and three
# seeds: trains the demo's small models with and without each part, runs them, and compares. Prints a table and one
# sentence for each aim and claim; writes tools/claims.csv and tools/claims.svg. At most 4 hours a call on two cores; if
# it is killed, the same command continues, and has all its hours again. LPIPS needs the networks of tools/networks.sh:
# run it first, else nothing begins.
#   bash tools/claims.sh [PART...] [--seeds 0 1 2] [--out FOLDER]
#     PART is demo, c, a, b, d, pairs, curve, e, f or g; all of them, in this order, by default
#   bash tools/claims.sh demo      only the demo's aims; the claims share its trainings
#   bash tools/claims.sh curve     the same after 2 and 4 times the steps of every training, one seed
#   bash tools/claims.sh --list    only what would be trained, and how long it takes
#   bash tools/claims.sh --help    more, such as a trial with few clips and steps
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
exec .venv/bin/python tools/claims.py "$@"
