#!/usr/bin/env bash
# Runs the whole method with rendered dancers and tiny, randomly initialised models; needs no GPU, Slurm or downloads.
# Trains the three steps of stage 1, then stage 2; animates held-out dancers; evaluates. Takes at most 20 minutes on two cores
# after set-up. If it is killed, the same command continues.
#   bash tools/demo.sh [RUNS [KEY=VALUE...]]     RUNS: the folder for run folders (default: runs). KEY=VALUE, such as seed=1,
#                                                is set in every recipe. Results are always in results/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs}
overrides=("${@:2}")
bash tools/setup.sh
started=$SECONDS

step() { # RECIPE BUDGET WHAT...
    local recipe=$1 budget=$2 begun=$SECONDS
    shift 2
    printf '\n== %s (budget %s)\n' "$*" "$budget"
    .venv/bin/python launchers/slurm.py "recipes/demo/$recipe.yaml" --cluster local --follow --runs "$runs" "${overrides[@]}"
    printf '== %s: %d s, %d s in all\n' "$recipe" $((SECONDS - begun)) $((SECONDS - started))
}

step prepare 1m "Render dancers into streaming shards"
step stage1_domains 7m "Stage 1, step 1: one network for rgb, normals and depth"
step stage1_geometry 1m "Stage 1, step 2: geometry attention"
step stage1_temporal 1m "Stage 1, step 3: temporal attention"
step stage2 8m "Stage 2: pose, depth and normals animate the picture"
step animate 1m "Animate held-out dancers"
step evaluate 1m "Evaluate against the truth"

results=(results/demo/*/)
printf '\nThe demo took %d minutes %d seconds. Look at:\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
printf '  a dancer animated   %s\n' "${results[0]}side_by_side.mp4"
printf '  its contact sheet   %s\n' "${results[0]}contact_sheet.png"
printf '  all of them         %s\n' "$runs/demo_evaluate/overview.png"
printf '  the table           %s\n' "$runs/demo_evaluate/table.md"
printf '  one page, in step   %s\n' "$runs/demo_evaluate/report.html"
printf '  the curves          .venv/bin/tensorboard --logdir %s\n' "$runs"
