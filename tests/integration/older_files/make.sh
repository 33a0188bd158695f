#!/usr/bin/env bash
# Makes files.tar.xz for tests/integration/test_older_files.py with the code and the commands of commit 5194bb1:
#   git worktree add --detach OLD 5194bb1
#   bash tests/integration/older_files/make.sh OLD .venv/bin/python OUT        OUT: a new folder to work in
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
old=$(realpath "$1") python=$(realpath -s "$2") out=$3
export PYTHONPATH=$old:$old/kernels OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir "$out"
cd "$out"
cp -r "$here/recipes" .
launch() { "$python" "$old/launchers/slurm.py" "recipes/$1.yaml" --cluster local --follow; }

# The base of stage 2: multiples of 1/64, which compress. SVD's blocks cannot have fewer than 32 channels.
"$python" - <<'PY'
import torch
from diffusers import UNetSpatioTemporalConditionModel

torch.manual_seed(0)
unet = UNetSpatioTemporalConditionModel(
    in_channels=24, out_channels=12, block_out_channels=[32], layers_per_block=1, num_frames=4,
    down_block_types=["DownBlockSpatioTemporal"], up_block_types=["UpBlockSpatioTemporal"], num_attention_heads=[2],
    addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, cross_attention_dim=8,
)
with torch.no_grad():
    for parameter in unet.parameters():
        parameter.copy_((parameter * 64).round() / 64)
unet.save_pretrained("base/unet")
PY

launch prepare
launch domains
launch geometry &
launcher=$!
until [[ -e runs/older_geometry/checkpoints/step_00000004/COMPLETE ]]; do kill -0 $launcher && sleep 0.1; done
"$python" "$old/launchers/slurm.py" cancel runs/older_geometry # in the middle: steps 2 and 4 of 12 are saved
wait $launcher || true
cp -r runs stopped
launch geometry # the rest of the training by that commit, for comparison
mkdir continued
mv runs/older_geometry/{logs,exports} continued
rm -r runs
mv stopped runs
launch animation
launch animate
launch evaluate

# Left out: the large checkpoint of stage 2, texts that contain folders of this machine, and files that can be unpacked
# again.
rm -r runs/older_animation/checkpoints runs/*/logs/*_log.out continued/logs/earlier continued/logs/*_log.out runs/*/tensorboard
find data -name "*.mds" -delete -o -name "*.lock" -delete
XZ_OPT=-9e tar --sort=name --owner=0 --group=0 --numeric-owner --exclude=./recipes -cJf "$here/files.tar.xz" .
