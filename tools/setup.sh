#!/usr/bin/env bash
# Makes .venv with everything that the project needs, once; a second call finds it done and returns at once.
#   bash tools/setup.sh              a CPU machine: the exact versions of tools/pins.txt
#   PINS=none bash tools/setup.sh    a GPU machine: what pip resolves from setup.cfg (torch's CUDA build, flash-attn left to you)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
pins=${PINS:-tools/pins.txt}
fail() { echo "setup: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, $("$python" --version) is here; name another one with PYTHON=..."
for tool in git g++; do command -v "$tool" >/dev/null || fail "$tool is needed: apt-get install git g++ python3-dev python3-venv"; done
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
    || fail "Python's headers are needed (DeepSpeed compiles one operation): apt-get install python3-dev"

wanted=$(cat setup.cfg tools/setup.sh "$([ "$pins" = none ] && echo /dev/null || echo "$pins")" | sha256sum | cut -c1-16)
stamp=.venv/installed
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

started=$SECONDS
say() { echo "setup: $* ($((SECONDS - started)) s)"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
rm -f "$stamp"
[ -x .venv/bin/python ] || { say "making .venv"; "$python" -m venv .venv; }
if [ "$pins" = none ]; then
    say "installing what pip resolves from setup.cfg"
    pip install -e '.[train,slurm,video,dev]'
else
    say "installing torch"
    pip install "$(grep '^torch==' "$pins")"
    say "installing the pinned packages"
    pip install --no-deps -r "$pins"
    pip install --no-deps --no-build-isolation -e .
fi
say "compiling DeepSpeed's communication operation (about two minutes, once)"
PATH="$PWD/.venv/bin:$PATH" .venv/bin/python tools/compile_extensions.py
echo "$wanted" > "$stamp"
say "done"
