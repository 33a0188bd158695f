#!/usr/bin/env bash
# Runs the networks of the paper's size on this machine's processor, with random weights in the published formats: two
# optimizer steps of three trainings (checkpoint, kill, resume, export), both pipelines, and the identity of Stable Video
# Diffusion under zero convolutions. Needs 22 GB of memory, 40 GB of disk and some hours on two cores; every piece takes at most
# 25 minutes there. Killed, the same command continues. Writes what it measured to a table.
#   bash tools/full_size.sh [FOLDER [TABLE]]      FOLDER: data, runs and results (default: runs/full_size). TABLE: a CSV file
#                                                 (default: FOLDER/full_size.csv)
#   bash tools/full_size.sh FOLDER TABLE PIECE... only these pieces: names as in `.venv/bin/python tools/full_size.py --list`
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
folder=${1:-runs/full_size}
table=${2:-$folder/full_size.csv}
.venv/bin/python tools/published_weights.py weights
exec .venv/bin/python tools/full_size.py "$folder" "$table" "${@:3}"
