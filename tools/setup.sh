#!/usr/bin/env bash
# Makes .venv with everything that the project needs, once; a second call finds it done and returns at once.
#   bash tools/setup.sh              a CPU machine: the exact versions of tools/pins.txt
#   PINS=none bash tools/setup.sh    a GPU machine: what pip resolves from setup.cfg (torch's CUDA build, flash-attn left to you)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
pins=${PINS:-$(cat .venv/pins 2>/dev/null || echo tools/pins.txt)}  # the choice is remembered in .venv
fail() { echo "setup: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed, $("$python" --version) is here; name another one with PYTHON=..."
command -v git >/dev/null || fail "git is needed: apt-get install git"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is needed: apt-get install python3-venv"

wanted=$(cat setup.cfg tools/setup.sh "$([ "$pins" = none ] && echo /dev/null || echo "$pins")" | sha256sum | cut -c1-16)
stamp=.venv/installed
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

started=$SECONDS
say() { echo "setup: $* ($((SECONDS - started)) s)"; }
pip() { PYTHONWARNINGS=ignore .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
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
echo "$pins" > .venv/pins
echo "$wanted" > "$stamp"
say "done"
