#!/usr/bin/env bash
# Runs the whole method on rendered dancers; needs no GPU, Slurm or downloads. Starts from the small base models in
# recipes/base, as the paper starts from Stable Diffusion and Stable Video Diffusion: trains the three steps of stage 1,
# then stage 2; animates held-out dancers; evaluates. If it is killed, the same command continues.
#   bash tools/demo.sh [--from-scratch] [--image PHOTO --video DANCE] [RUNS] [KEY=VALUE...]
#     --from-scratch    begins with random networks instead; its runs and results are in runs/from_scratch and
#                       results/from_scratch
#     --image, --video  also animates your photo with your video, once tools/networks.sh has run. A toy: these networks
#                       have seen rendered people only.
#     RUNS              the folder for run folders (default: runs). Results are in results/demo, whatever RUNS is.
#     KEY=VALUE         is set in every recipe, such as seed=1
set -euo pipefail

fail() {
    printf 'demo.sh: %s\n' "$1" >&2
    exit 2
}

scratch='' image='' video='' runs='' overrides=() given=()
while (($#)); do
    case $1 in
        --help | -h) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
        --from-scratch) scratch=1 given+=("$1") ;;
        --image | --video)
            [[ -f ${2:-} ]] || fail "$1 needs a file, not '${2:-}'"
            printf -v "${1#--}" '%s' "$(realpath -- "$2")"
            shift ;;
        -*) fail "unknown option $1; the options are --from-scratch, --image and --video" ;;
        *=*) overrides+=("$1") given+=("$1") ;;
        *)
            [[ -z $runs ]] || fail "two folders for runs: $runs and $1"
            runs=$1 given+=("$1") ;;
    esac
    shift
done
cd "$(dirname "$0")/.."
runs=${runs:-runs${scratch:+/from_scratch}}
results=results/${scratch:+from_scratch}
[[ -n $scratch ]] || results=results/demo
if [[ -n $image$video ]]; then
    [[ -n $image && -n $video ]] || fail '--image and --video belong together'
    [[ -d weights/networks/mediapipe ]] || fail 'to find people in them, run first: bash tools/networks.sh'
fi
if [[ -f $runs/demo_prepare/recipe.yaml ]] && grep -qx '  width: 32' "$runs/demo_prepare/recipe.yaml"; then
    fail "$runs has runs of an older demo, of 32x48 pixels: rm -r $runs/demo_* data/demo results/demo"
fi
bash tools/setup.sh

if [[ -n $image ]]; then # before all trainings: can they be read?
    mkdir -p "$runs"
    own=$(.venv/bin/python - "$image" "$video" "$runs/own.jsonl" <<'PYTHON'
import json, pathlib, re, sys
from PIL import Image
from dreamdance.media.video import probe_video
image, video, manifest = map(pathlib.Path, sys.argv[1:])
Image.open(image).load()
probe_video(video)
name = re.sub(r"[^A-Za-z0-9_]+", "_", f"{image.stem}_{video.stem}")[:100]
entry = {"id": name, "image": str(image), "video": str(video), "align": "bones"}
manifest.write_text(json.dumps(entry) + "\n", encoding="utf-8")
print(name)
PYTHON
    )
fi

random() { # NAME: the words that replace a base model by a random network of its shape, one in a line
    .venv/bin/python - "recipes/base/$1/config.json" <<'PYTHON'
import json, sys
config = {name: value for name, value in json.load(open(sys.argv[1])).items() if name[0] != "_"}
print("model.unet.path=null", "model.unet.config=" + json.dumps(config), sep="\n")
PYTHON
}

of_image=() of_video=()
if [[ -n $scratch ]]; then
    words=$(random image)
    mapfile -t of_image <<<"$words"
    words=$(random video)
    mapfile -t of_video <<<"$words"
    of_video+=(model.unfreeze=all)
fi

started=$SECONDS parts=()
step() { # RECIPE BUDGET WHAT [OVERRIDE...]: the budget in seconds on two idle cores
    local recipe=$1 budget=$2 what=$3 begun=$SECONDS took over=''
    shift 3
    printf '\n== %s (budget %d s)\n' "$what" "$budget"
    .venv/bin/python launchers/slurm.py "recipes/demo/$recipe.yaml" --cluster local --follow --runs "$runs" \
        "$@" "${overrides[@]}"
    took=$((SECONDS - begun))
    ((took <= budget)) || over='  over its budget'
    parts+=("$(printf '%5d s of %3d s  %s%s' "$took" "$budget" "$what" "$over")")
    printf '== %s: %d s%s, %d s in all\n' "$what" "$took" "$over" $((SECONDS - started))
}

step prepare 35 'Render dancers into streaming shards'
step stage1_domains 215 'Stage 1, step 1: one network for rgb, normals and depth' "${of_image[@]}"
step stage1_geometry 40 'Stage 1, step 2: geometry attention' "${of_image[@]}"
step stage1_temporal 50 'Stage 1, step 3: temporal attention' "${of_image[@]}"
step stage2 210 'Stage 2: pose, depth and normals animate the picture' "${of_video[@]}"
step animate 25 'Animate held-out dancers' "output=$results"
step evaluate 15 'Evaluate against the truth' "results=$results"

shown=("$results"/*/)
printf '\nThe demo took %d minutes %d seconds:\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
printf '%s\n' "${parts[@]}"
printf 'Look at:\n'
printf '  a dancer animated   %s\n' "${shown[0]}side_by_side.mp4"
printf '  its contact sheet   %s\n' "${shown[0]}contact_sheet.png"
printf '  one page, in step   %s\n' "$runs/demo_evaluate/report.html"
printf '  the table           %s\n' "$runs/demo_evaluate/table.md"
printf '  the curves          .venv/bin/tensorboard --logdir %s\n' "$runs"
if [[ -z $image ]]; then
    again=$(printf ' %q' bash tools/demo.sh "${given[@]}")
    printf 'Next, your own (a toy: these networks know rendered people only):\n'
    printf '  bash tools/networks.sh &&%s --image photo.jpg --video dance.mp4\n' "$again"
    exit
fi

step animate 300 'Animate your photo with your video' name=own_animate "manifest=$runs/own.jsonl" output=results/own
printf '\nLook at results/own/%s/side_by_side.mp4. It is a toy: these networks have seen rendered people only.\n' "$own"
