#!/usr/bin/env bash
# Runs every test that injects a fault, and the `long` tests in the same files (those with Slurm if a cluster can be started
# here), then a chaos run: a training with faults at random instants. Prints a table of the results. Takes about an hour on two
# cores. The exit code is not 0 if anything failed.
#   bash tools/faults.sh [TABLE]       also writes the table, in Markdown, to TABLE (default: tools/faults.md)
#   DREAMDANCE_CHAOS_FAULTS=40 DREAMDANCE_CHAOS_SEED=1 DREAMDANCE_CHAOS_RANKS=4 bash tools/faults.sh      another chaos run
#   DREAMDANCE_FAULTS_FOLDER=DIR bash tools/faults.sh      keeps the results of each part in DIR; parts that passed are skipped
set -euo pipefail
cd "$(dirname "$0")/.."
table=${1:-tools/faults.md}
bash tools/setup.sh
python=.venv/bin/python
folder=${DREAMDANCE_FAULTS_FOLDER:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
DREAMDANCE_LOAD_BEFORE=$(cut -d' ' -f1-3 /proc/loadavg)
export DREAMDANCE_LOAD_BEFORE

part() { # NAME MINUTES FILES...   a part that exceeds MINUTES, or is interrupted, has no results and counts as failed
    local name=$1 minutes=$2 code=0
    shift 2
    if [ -f "$folder/$name.passed" ]; then
        printf '\n== %s: passed before, at commit %s\n' "$name" "$(cat "$folder/$name.commit")" >&2
        return
    fi
    export DREAMDANCE_FAULT_LOG=$folder/$name.jsonl
    rm -f "$DREAMDANCE_FAULT_LOG"
    git rev-parse --short=12 HEAD >"$folder/$name.commit"
    printf '\n== %s: %d files, at most %d minutes\n' "$name" $# "$minutes" >&2
    timeout --signal=INT --kill-after=60 "${minutes}m" "$python" -m pytest "$@" \
        --junitxml="$folder/$name.xml" --basetemp="$folder/$name" >&2 || code=$?
    [ "$code" -le 1 ] || rm -f "$folder/$name.xml"
    [ "$code" -ne 0 ] || touch "$folder/$name.passed"
}

chaos=tests/distributed/test_chaos.py
mapfile -t local_files < <(grep -rl --include='test_*.py' record_fault tests | grep -v -e "^$chaos$" -e ^tests/slurm/ | sort)
mapfile -t slurm_files < <(grep -rl --include='test_*.py' record_fault tests/slurm | sort)
part local 60 "${local_files[@]}"
part slurm 30 "${slurm_files[@]}"
export DREAMDANCE_CHAOS_FAULTS=${DREAMDANCE_CHAOS_FAULTS:-24} DREAMDANCE_CHAOS_BY_COMMAND=1
part chaos 60 "$chaos"
cat "$folder"/{local,slurm,chaos}.jsonl >"$folder/all.jsonl" || true
"$python" tools/fault_table.py "$folder/all.jsonl" "$folder"/{local,slurm,chaos}.xml | tee "$table"
