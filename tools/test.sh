#!/usr/bin/env bash
# All checks and all tests (about ten minutes on two cores), or a working subset:
#   bash tools/test.sh                everything
#   bash tools/test.sh quick          what takes seconds, under five minutes in all
#   bash tools/test.sh PYTEST-ARGS    just pytest, with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=.venv/bin/python

case "${1:-all}" in
all)
    bash tools/check.sh
    # First what runs alone in its process, on both cores; then what starts processes of its own, one test after the other.
    "$python" -m pytest -n 2 --dist loadfile -m "not distributed"
    "$python" -m pytest -m distributed
    ;;
quick)
    bash tools/check.sh
    "$python" -m pytest -n 2 --dist loadfile -q -m "not slow and not distributed"
    ;;
*)
    "$python" -m pytest "$@"
    ;;
esac
