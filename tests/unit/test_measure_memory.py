"""The tool that measures a training's memory: whose pages it counts, and to which phase a sample belongs."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from support.tool_modules import load_tool

from dreamdance.recipe import load_recipe

ROOT = Path(__file__).parents[2]
tool = load_tool("measure_memory")


def test_own_pages_count_and_mapped_files_do_not(tmp_path):
    (tmp_path / "mapped").write_bytes(bytes(32 << 20))
    before = tool.own_bytes(os.getpid())
    mapped = np.memmap(tmp_path / "mapped", dtype=np.uint8, mode="r")
    assert mapped.sum() == 0, "reads every page"
    assert tool.own_bytes(os.getpid()) - before < 8 << 20
    with mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE) as own:  # np.ones may reuse pages that were freed before
        own.write(bytes([1]) * len(own))
        assert abs(tool.own_bytes(os.getpid()) - before - len(own)) < 8 << 20
    assert tool.own_bytes(2**22 + 1) == 0, "a process that is gone"


def test_each_phase_has_its_largest_sample():
    progress = [
        {"time": 10.0, "message": "no checkpoint in runs; starting at step 0"},
        {"time": 20.0, "done": 1, "loss": 0.5},
        {"time": 25.0, "message": "saved step_00000001 in 2 s"},
        {"time": 30.0, "message": "saved step_00000003 in 2 s"},
    ]
    samples = [(1.0, 3), (9.0, 5), (15.0, 9), (19.0, 7), (22.0, 8), (29.0, 12), (31.0, 40)]
    assert tool.peaks(samples, progress) == {"starting": 5, "first step": 9, "saving": 12}


@pytest.mark.slow
def test_the_trainings_are_accepted_and_the_wider_one_has_more_parameters():
    for width in tool.WIDTHS:
        load_recipe(ROOT / "recipes/demo/stage1_domains.yaml", [*tool.TRAINING, tool.unet(width), *tool.LEAST])
    load_recipe(ROOT / "recipes/demo/prepare.yaml", tool.DANCERS)
    narrow, wide = map(tool.count_parameters, tool.WIDTHS)
    assert wide > 2 * narrow
