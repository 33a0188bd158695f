"""Clips are prepared, animated and measured on several nodes; finished work is kept when a rank is lost."""

import json
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.animated_frames import frames
from support.fault_log import record_fault
from support.networks import require_weights
from support.slurm_jobs import ROOT, Cluster, Run, wait_until
from support.tiny_pipelines import tiny_animation_pipeline, tiny_geometry_pipeline

from dreamdance.data.prepare import prepare
from dreamdance.evaluation.evaluate import evaluate
from dreamdance.inference.animate import animate
from dreamdance.recipe import load_recipe
from dreamdance.runs.layout import DONE_FOLDER, read_done

DEMO = ROOT / "recipes" / "demo"
NUM_CLIPS = 12
STEP_TIMEOUT_SECONDS = 8
# Smaller than the demo's, so that a clip takes seconds.
SMALL = ("dancers.width=32", "dancers.height=48")
SMALL_RESULTS = ("width=32", "height=48", "geometry_width=32", "geometry_height=48", "geometry.num_inference_steps=4")


@dataclass(frozen=True)
class Measured:
    """The file of the table of some results, and the overrides that name these results."""

    words: tuple[str, ...]
    table: dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with held-out clips and two trained stages."""
    folder = tmp_path_factory.mktemp("work")
    words = [f"output={folder / 'data' / 'demo'}", "dancers.num_train_clips=2", "num_workers=1", *SMALL]
    prepare(
        load_recipe(DEMO / "prepare.yaml", [*words, f"dancers.num_validation_clips={NUM_CLIPS}"]), folder / "prepared"
    )
    tiny_geometry_pipeline().save_pretrained(folder / "stage1")
    tiny_animation_pipeline().save_pretrained(folder / "stage2")
    return folder


def test_a_lost_ranks_clips_are_animated_by_the_next_attempt(cluster: Cluster, folder: Path):
    words = ("geometry_from=stage1", "animation_from=stage2", "cluster.nodes=2", "cluster.tasks_per_node=1")
    words = (*words, *SMALL_RESULTS, f"output={folder / 'results' / 'faulty'}")
    run = Run(cluster, folder, DEMO / "animate.yaml", "animated", *words, "animation.num_inference_steps=8")
    submitted = run.launch()
    assert submitted.returncode == 0, submitted.stderr
    results = folder / "results" / "faulty"
    wait_until(lambda: len(list(results.glob("*/result.json"))) >= 3, f"the first results\n{run.logs()}")
    pids, fault_time = set(run.rank_pids().values()), time.time()
    run.signal_rank(1, signal.SIGKILL)
    detected = wait_until(lambda: not pids & set(run.rank_pids().values()), "the other rank's end")
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert 3 <= len(before) < NUM_CLIPS
    follow(run)
    assert run.restarts() == 1
    after = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert len(after) == NUM_CLIPS
    assert {path: after[path] for path in before} == before, "no clip was made again"
    record_fault(
        "rank killed that animates",
        how="SIGKILL to one of two ranks",
        promised="requeued; only missing clips are made",
        happened="all clips made, none twice",
        detected_seconds=detected,
        resumed_seconds=time.time() - fault_time,
    )


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    """All clips, animated and measured by one undisturbed process."""
    words = [f"output={folder / 'results' / 'whole'}", f"manifest={folder / 'data' / 'demo' / 'manifest.jsonl'}"]
    words += [f"{stage}_from={folder / name}" for stage, name in (("geometry", "stage1"), ("animation", "stage2"))]
    words += SMALL_RESULTS
    animate(load_recipe(DEMO / "animate.yaml", words), folder / "animated_whole")
    data = [
        f"{key}.local={folder / 'data' / 'demo' / name}"
        for key, name in (("truth", "validation"), ("training_set", "train"))
    ]
    words = [
        f"results={folder / 'results' / 'whole'}",
        *data,
        f"metrics.weights={require_weights('lpips/alexnet.ckpt')}",
    ]
    evaluate(load_recipe(DEMO / "evaluate.yaml", words), folder / "scored_whole")
    return Measured(tuple(words), table(folder / "scored_whole"))


def follow(run: Run) -> None:
    done = run.launch("--follow")
    assert done.returncode == 0, done.stdout + done.stderr + run.logs()


def table(run_folder: Path) -> dict[str, Any]:
    return json.loads((run_folder / "table.json").read_text())


def test_a_lost_ranks_clips_are_measured_by_the_next_attempt_with_the_same_table(
    cluster: Cluster, folder: Path, measured: Measured
):
    run = Run(cluster, folder, DEMO / "evaluate.yaml", "scored", *measured.words, "cluster.nodes=2")
    submitted = run.launch()
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: len(list(run.run_folder.glob("queue/member.*"))) == 2, f"both ranks\n{run.logs()}")
    run.signal_rank(1, signal.SIGSTOP)  # the other rank continues, and cannot end without it
    wait_until(lambda: len(read_done(run.run_folder)) >= NUM_CLIPS // 2, f"half of the clips\n{run.logs()}")
    of_main = read_done(run.run_folder)
    pids, fault_time = set(run.rank_pids().values()), time.time()
    run.signal_rank(1, signal.SIGKILL)
    detected = wait_until(lambda: not pids & set(run.rank_pids().values()), "the other rank's end")
    follow(run)
    assert run.restarts() == 1
    assert table(run.run_folder) == measured.table
    assert Counter(read_done(run.run_folder)) == Counter(measured.table["clips"].keys()), "no clip was measured twice"
    assert set(of_main) <= set(read_done(run.run_folder))
    record_fault(
        "rank killed that evaluates",
        how="SIGKILL to one of two ranks, when half of the clips are measured",
        promised="requeued; only missing clips are measured",
        happened="all clips measured, none twice; the table equals that of an undisturbed run",
        detected_seconds=detected,
        resumed_seconds=time.time() - fault_time,
    )


def run_array(run: Run) -> None:
    """Runs two jobs of one process each to their end."""
    submitted = run.launch()
    assert submitted.returncode == 0, submitted.stderr
    assert "2 jobs of 1 process" in submitted.stdout
    job = run.job
    followed = run.launch("--follow")
    logs = [job.log_file(run.run_folder, member=member).read_text() for member in job.members]
    assert followed.returncode == 0, "\n".join((followed.stdout, followed.stderr, *logs))
    wait_until(lambda: {run.cluster.show(one)["JobState"] for one in job.members} == {"COMPLETED"}, "\n".join(logs))
    assert [run.cluster.show(member)["Restarts"] for member in job.members] == ["0", "0"]
    done = read_done(run.run_folder)
    assert len(done) == len(set(done)) == NUM_CLIPS, "each clip once"
    assert len(list((run.run_folder / "logs" / DONE_FOLDER).glob("*.txt"))) == 2, "both jobs had clips"
    assert "finished" in run.run_verb("status")


@pytest.mark.long
def test_the_jobs_of_an_array_share_the_clips_to_animate_and_to_measure(
    cluster: Cluster, folder: Path, measured: Measured
):
    resources = ("cluster.array=2", "cluster.nodes=1", "cluster.tasks_per_node=1")
    output = folder / "results" / "array"
    words = ("geometry_from=stage1", "animation_from=stage2", f"output={output}", *SMALL_RESULTS, *resources)
    run_array(Run(cluster, folder, DEMO / "animate.yaml", "animated_array", *words))
    found, whole = frames(output), frames(folder / "results" / "whole")
    assert set(found) == set(whole)
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    scored = Run(cluster, folder, DEMO / "evaluate.yaml", "scored_array", *measured.words, *resources)
    run_array(scored)
    assert table(scored.run_folder) == measured.table


def test_the_parts_of_a_stopped_rank_are_prepared_by_the_other(cluster: Cluster, folder: Path):
    clips = ("dancers.num_train_clips=20", "dancers.num_validation_clips=2", "clips_per_part=2", "num_workers=1")
    clips += (*SMALL, "dancers.num_frames=48")  # seconds of work, so that the fault comes in the middle
    alone = load_recipe(DEMO / "prepare.yaml", [*clips, f"output={folder / 'data' / 'alone'}"])
    prepare(alone, folder / "prepared_alone")
    output = folder / "data" / "shared"
    words = (*clips, f"output={output}", "cluster.nodes=2", f"cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}")
    run = Run(cluster, folder, DEMO / "prepare.yaml", "prepared_faulty", *words)
    submitted = run.launch()
    assert submitted.returncode == 0, submitted.stderr
    done = run.run_folder / "logs" / DONE_FOLDER
    wait_until(lambda: list(done.glob("rank_1_*.txt")), f"its first part\n{run.logs()}")
    pids, fault_time = set(run.rank_pids().values()), time.time()
    run.signal_rank(1, signal.SIGSTOP)
    detected = wait_until(lambda: not pids & set(run.rank_pids().values()), f"the end of all ranks\n{run.logs()}")
    before = read_done(run.run_folder)
    assert len(before) == 11, "of both splits, all"
    follow(run)
    assert run.restarts() == 1
    assert "rank 1 has given no sign for" in run.log(0)
    assert read_done(run.run_folder) == before
    assert set(Counter(before).values()) == {1}, "no part was written twice"
    for split in ("train", "validation"):
        assert (output / split / "index.json").read_bytes() == (Path(alone.output) / split / "index.json").read_bytes()
    record_fault(
        "rank stopped (SIGSTOP) that prepares",
        how=f"one of two ranks, after its first part; cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}",
        promised="the other writes its parts; detected in time, ended, requeued; the next start finds all done",
        happened="the shards equal those of a single rank, no part was written twice",
        detected_seconds=detected,
        resumed_seconds=time.time() - fault_time,
    )
