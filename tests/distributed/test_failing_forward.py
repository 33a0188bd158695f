"""An error in the forward pass of one rank: `--follow` shows it first and once, and the job ends."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.interruptions import run_settings
from support.recipes import tiny_stage1_recipe

from dreamdance.launch.requeue import read_failures
from dreamdance.recipe import dump_recipe
from dreamdance.runs.layout import complete_steps

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAUNCHER = Path(__file__).parents[2] / "launchers" / "slurm.py"
FAILING_RANK = 1
# Every Python process runs this when it starts; it has an effect on one rank only.
IN_THE_FORWARD = """
import os

if os.environ.get("SUBMITIT_LOCAL_GLOBALID") == "{rank}":
    import time
    from pathlib import Path

    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    forwards = 0

    def fail(module, inputs):
        global forwards
        if type(module).__name__ == "GeometryObjective" and module.training:
            forwards += 1
            if forwards == 5:  # the first micro batch of step 3
                Path("{moment}").write_text(str(time.time()))
                {raising}

    register_module_forward_pre_hook(fail)
"""
KINDS = {
    "out of memory": ("torch.empty(1 << 60, dtype=torch.uint8)", r"RuntimeError: .*can't allocate memory"),
    "out of GPU memory": ("raise torch.OutOfMemoryError('CUDA out of memory')", "OutOfMemoryError: CUDA out of memory"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_one_ranks_forward_is_shown_first_and_once_and_ends_the_job(kind, shards, tmp_path):
    raising, error = KINDS[kind]
    hook = IN_THE_FORWARD.format(rank=FAILING_RANK, moment=tmp_path / "moment", raising=raising)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(hook)
    recipe = tiny_stage1_recipe("domains", run_settings(shards, name="failing", **{"data.num_workers": 1}))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, LAUNCHER, "recipe.yaml", "--cluster", "local", "--follow"]
    environment = environment_with(tmp_path / "hook")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    detected = time.time() - float((tmp_path / "moment").read_text())

    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert len(re.findall(error, output)) == 1, output
    shown = output.partition("failing failed: ")[2]
    assert "in forward" in shown, "the line that raised"
    assert f"log of rank {FAILING_RANK}: " in shown
    assert "Connection closed by peer" not in output, "the other rank only failed because of it"
    assert detected < 45, "the end waits neither for the collective's time-out nor for a process that reads data"
    run = tmp_path / "runs" / "failing"
    first, *_ = read_failures(run)
    assert first["rank"] == FAILING_RANK
    assert re.search(error, first["text"])
    assert complete_steps(run) in ([], [2]), "the failed step is not saved"
    record_fault(
        f"one rank {kind} in its forward",
        how=f"{raising.split('(')[0]} in the forward of step 3 on rank {FAILING_RANK} of 2 local ranks",
        promised="its stack is shown first and once, the others end quickly, the exit code is not 0",
        happened=f"exit code {done.returncode}, the stack of rank {FAILING_RANK} alone",
        detected_seconds=detected,
    )


def environment_with(hook: Path) -> dict[str, str]:
    """The environment of a user, without variables of other tests or of a surrounding job."""
    names = ("SUBMITIT", "SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
