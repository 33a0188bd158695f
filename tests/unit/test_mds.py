"""mosaicml-streaming can be imported with torchvision, without it, and with a broken one."""

import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = {"torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')"}
WORKING = {
    "torchvision/__init__.py": "",
    "torchvision/datasets.py": "class VisionDataset: pass",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "def to_tensor(picture): return picture",
}
CHECK = """
import sys
from dreamdance.data.shards.mds import StreamingDataset
import streaming
try:
    import streaming.vision
    print("vision", streaming.vision.__file__ is not None)
except (ImportError, RuntimeError) as error:
    print("no vision:", error)
"""


def import_with(files: dict[str, str], folder: Path) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\n{CHECK}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "expected"),
    [(BROKEN, "no vision: operator torchvision::nms does not exist"), (WORKING, "vision True")],
)
def test_the_stand_in_is_used_only_where_torchvision_does_not_work(tmp_path, files, expected):
    assert import_with(files, tmp_path) == expected
