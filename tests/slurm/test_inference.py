"""Clips are animated and measured on several nodes; what a lost rank has done stays done."""

import json
import signal
import time
from pathlib import Path

import pytest
from fault_log import record_fault
from slurm_runs import ROOT, Cluster, Run, wait_until
from tiny_pipelines import tiny_animation_pipeline, tiny_geometry_pipeline

from dreamdance.data.prepare import prepare
from dreamdance.recipe import load_recipe

DEMO = ROOT / "recipes" / "demo"
NUM_CLIPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's, with held-out clips and two trained stages."""
    folder = tmp_path_factory.mktemp("work")
    words = [f"output={folder / 'data' / 'demo'}", "dancers.num_train_clips=2", "num_workers=1"]
    prepare(
        load_recipe(DEMO / "prepare.yaml", [*words, f"dancers.num_validation_clips={NUM_CLIPS}"]), folder / "prepared"
    )
    tiny_geometry_pipeline().save_pretrained(folder / "stage1")
    tiny_animation_pipeline().save_pretrained(folder / "stage2")
    return folder


def test_a_lost_ranks_clips_are_animated_by_the_next_attempt_and_all_are_measured(cluster: Cluster, folder: Path):
    words = ("geometry_from=stage1", "animation_from=stage2", "cluster.nodes=2", "cluster.tasks_per_node=1")
    run = Run(cluster, folder, DEMO / "animate.yaml", "animated", *words, "animation.num_inference_steps=8")
    submitted = run.launch()
    assert submitted.returncode == 0, submitted.stderr
    results = folder / "results" / "demo"
    wait_until(lambda: len(list(results.glob("*/result.json"))) >= 3, f"the first results\n{run.logs()}")
    pids, struck = set(run.rank_pids().values()), time.time()
    run.strike_rank(1, signal.SIGKILL)
    detected = wait_until(lambda: not pids & set(run.rank_pids().values()), "the other rank's end")
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert 3 <= len(before) < NUM_CLIPS
    done = run.launch("--follow")
    assert done.returncode == 0, done.stdout + done.stderr + run.logs()
    assert run.restarts() == 1
    after = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert len(after) == NUM_CLIPS
    assert {path: after[path] for path in before} == before, "none was made again"
    record_fault(
        "rank killed that animates",
        how="SIGKILL to one of two ranks",
        promised="requeued; only what is missing is made",
        happened="all clips made, none twice",
        detected_seconds=detected,
        resumed_seconds=time.time() - struck,
    )

    scored = Run(cluster, folder, DEMO / "evaluate.yaml", "scored", "cluster.nodes=3")
    done = scored.launch("--follow")
    assert done.returncode == 0, done.stdout + done.stderr + scored.logs()
    table = json.loads((scored.run_folder / "table.json").read_text())
    assert len(table["clips"]) == NUM_CLIPS
