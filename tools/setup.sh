#!/usr/bin/env bash
# Creates .venv with everything that the project needs; later calls return at once.
#   bash tools/setup.sh                    installs the versions in tools/pins.txt, on machines with and without GPUs
#   TORCH_INDEX=URL bash tools/setup.sh    installs the same version of torch from another index of wheels, for another CUDA:
#                                          for drivers that are too old for the public build (remembered in .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
pins=tools/pins.txt
index=${TORCH_INDEX-$(cat .venv/torch_index 2>/dev/null || true)}
fail() { echo "setup: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, but $python is $("$python" --version); choose another with PYTHON=..."
command -v git >/dev/null || fail "git is needed: apt-get install git"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is needed: apt-get install python3-venv"

wanted=$( (cat setup.cfg pyproject.toml tools/setup.sh "$pins"; echo "$index") | sha256sum | cut -c1-16)
stamp=.venv/installed
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

started=$SECONDS
say() { echo "setup: $* ($((SECONDS - started)) s)"; }
pip() { PYTHONWARNINGS=ignore .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
rm -f "$stamp"
[ -x .venv/bin/python ] || { say "creating .venv"; "$python" -m venv .venv; }

# torch installs the CUDA libraries that its build needs, in the versions that it names itself; all other packages are
# pinned, so that pip does not search for versions.
if [ "$index" != "$(cat .venv/torch_index 2>/dev/null || true)" ]; then pip uninstall --yes torch triton; fi
say "installing torch"
pip install --constraint "$pins" ${index:+--extra-index-url "$index"} "$(grep '^torch==' "$pins")"
echo "$index" > .venv/torch_index
say "installing the pinned packages"
pip install --no-deps -r "$pins"
pip install --no-deps --no-build-isolation -e .

# Reports a driver that is too old here, not in the first job.
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    .venv/bin/python -c 'import torch; torch.zeros(1, device="cuda")' 2>/dev/null ||
        say "WARNING: torch ($(.venv/bin/python -c 'import torch; print(torch.__version__, "for CUDA", torch.version.cuda)')) cannot use this machine's GPU. If its driver is too old, choose an index of torch's wheels for an older CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cu126 bash tools/setup.sh"
fi
echo "$wanted" > "$stamp"
say "done"
