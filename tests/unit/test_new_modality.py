"""A modality that is added to the table, and nowhere else, goes from a video through shards and batches to a sample.

The entry is the one in the instructions for contributors. The names of modalities are fixed when the package is
imported, so that the test runs a copy of it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAST_ENTRY = '        Modality("mask", "region", channels=1, control=True),\n'
EXAMPLE = re.compile(r"^ *(Modality\(.*\))$", re.MULTILINE)


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `support.new_modality` finds."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "dreamdance", copy / "dreamdance", ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "dreamdance" / "modalities.py"
    (entry,) = EXAMPLE.findall((ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    text = table.read_text(encoding="utf-8")
    assert text.count(LAST_ENTRY) == 1
    table.write_text(text.replace(LAST_ENTRY, f"{LAST_ENTRY}        {entry},\n"), encoding="utf-8")
    paths = os.pathsep.join(map(str, (copy, ROOT / "kernels", ROOT / "tests")))
    program = subprocess.run(
        [sys.executable, "-m", "support.new_modality", copy, shards / "train"],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert program.returncode == 0, program.stderr
    return json.loads((copy / "found.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_video_of_a_new_modality_is_stored_cropped_like_its_pictures(found):
    assert found["bright rows"] == [0] * 16 + [255] * 32 + [0] * 16


@pytest.mark.slow
def test_a_recipe_that_names_a_new_modality_reads_it_resized_as_its_kind_wants(found):
    assert found["read besides rgb and pose"] == ["part"]
    assert found["shape"] == [1, 4, 3, 24, 16]
    assert found["values"] == [0.0, 1.0]


@pytest.mark.slow
def test_the_controller_reads_a_new_modality_learns_from_it_and_samples_with_it(found):
    assert found["reaches the controller"]
    assert found["gradient"] > 0
    assert found["a sample is finite"]
    assert found["maps of the manifest"] == {"part": "a.part.mp4"}


@pytest.mark.slow
def test_shards_from_before_a_modality_are_read_without_it_and_refused_with_it(found):
    assert found["maps of older shards"] == ["rgb", "pose", "mask"]
    assert re.search(r"has no part frames, .*remove part from its `model\.controls`", found["refusal"])
