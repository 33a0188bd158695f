"""Faults of batch inference: ranks killed or stopped, a full disk, damaged results, hostile exports and links."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.animated_frames import frames
from support.fault_log import record_fault
from support.faulty_shares import STEP_TIMEOUT_SECONDS, FaultInShare, fail_and_start_again, start_task
from support.recipes import HEIGHT, WIDTH
from support.tiny_pipelines import tiny_animation_pipeline

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.errors import CheckpointError
from dreamdance.inference.animate import animate
from dreamdance.media.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.recipe.schema import AnimateRecipe
from dreamdance.runs.folder_lock import OutputError, lock_folder
from dreamdance.runs.layout import progress_file

NUM_ENTRIES = 4


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "pose_only"
    tiny_animation_pipeline(controls=("pose",)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    lines = []
    for number in range(NUM_ENTRIES):
        clip = render_clip(HELD_OUT_SEEDS[number], num_frames=4, width=WIDTH, height=HEIGHT)
        Image.fromarray(clip.rgb[-1]).save(folder / f"{number}.png")
        write_keypoint_file(folder / f"{number}.json", KeypointSequence(clip.keypoints, WIDTH, HEIGHT, 8.0))
        lines.append(json.dumps({"id": f"clip_{number}", "image": f"{number}.png", "keypoints": f"{number}.json"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


@pytest.fixture
def recipe(tmp_path, export, manifest) -> AnimateRecipe:
    values = {
        "task": "animate",
        "name": "tiny_animate",
        "manifest": str(manifest),
        "output": str(tmp_path / "results"),
        "animation_from": str(export),
        "width": WIDTH,
        "height": HEIGHT,
        "precision": "fp32",
        "animation": {"num_inference_steps": 1, "window_frames": 4, "window_overlap": 1},
    }
    return AnimateRecipe.model_validate_json(json.dumps(values))


def run(recipe: AnimateRecipe, tmp_path: Path, **changes: str) -> Path:
    changed = recipe.model_copy(update=changes)
    animate(changed, tmp_path / "run")
    return Path(changed.output)


def ages(output: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("[!.]*/result.json")}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_killed_at_item_7_of_20_lose_only_their_current_items(recipe, tmp_path):
    lines = [json.loads(line) for line in Path(recipe.manifest).read_text().splitlines()]
    longer = Path(recipe.manifest).with_name("longer.jsonl")
    entries = [{**lines[number % NUM_ENTRIES], "id": f"clip_{number}"} for number in range(20)]
    longer.write_text("\n".join(json.dumps(entry) for entry in entries))
    recipe = recipe.model_copy(update={"manifest": str(longer)})
    whole = frames(run(recipe, tmp_path, output=str(tmp_path / "in_one_go")))
    output = Path(recipe.output)
    with start_task(recipe, tmp_path / "faulty", pause=0.3) as started:
        deadline = time.monotonic() + 120
        while len(ages(output)) < 7:
            assert time.monotonic() < deadline, started.output()
            time.sleep(0.02)
        for rank in range(2):
            started.signal(rank, signal.SIGKILL)
        assert started.wait() == [-signal.SIGKILL] * 2
    done = ages(output)
    assert 7 <= len(done) < 20
    began = time.monotonic()
    with start_task(recipe, tmp_path / "faulty") as started:
        started.results()
    resumed = time.monotonic() - began
    assert {name: ages(output)[name] for name in done} == done
    again = frames(output)
    assert set(again) == set(whole)
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    reported = [
        json.loads(line)["done"] for line in progress_file(tmp_path / "faulty" / "run").read_text().splitlines()
    ]
    assert reported[-1] == 20, "of all ranks"
    record_fault(
        "animate killed in the middle of a batch",
        how=f"SIGKILL of both ranks when {len(done)} of 20 entries are done; then the same again",
        promised="finished entries stay, the rest is done, all equal to an uninterrupted run",
        happened="results of the first attempt unchanged, all frames bit-identical to those of an uninterrupted run",
        resumed_seconds=resumed,
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "number", "expected"),
    [
        (1, signal.SIGSTOP, r"LostWorkerError: rank 1 has given no sign for \d+ s"),
        (0, signal.SIGSTOP, r"LostWorkerError: rank 0 has given no sign for \d+ s"),
        (1, None, r"computing \(a network's pass\) has taken over 6 s"),
    ],
    ids=["rank 1 stopped", "rank 0 stopped", "rank 1 hangs"],
)
def test_the_share_of_a_stopped_rank_is_animated_by_the_other(recipe, tmp_path, rank, number, expected):
    fault = FaultInShare(rank, number, 1, tmp_path / "faulty")
    output = Path(recipe.output)
    detection = fail_and_start_again(recipe, tmp_path, fault, lambda: len(ages(output)) == NUM_ENTRIES)
    assert re.search(expected, detection.output), detection.output
    record_fault(
        f"rank {rank} of animate {'hangs' if number is None else 'stopped (SIGSTOP)'}",
        how=f"at its first entry, on 2 ranks; cluster.step_timeout_seconds={STEP_TIMEOUT_SECONDS}",
        promised="the other does its entries and ends in time; the next start finds all done",
        happened="as promised, and nothing was made twice",
        detected_seconds=detection.seconds,
    )


def test_a_full_disk_ends_the_batch_at_once_and_the_same_command_resumes(recipe, tmp_path):
    output = Path(recipe.output)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        with pytest.raises(
            OutputError, match=r"result of 'clip_0' cannot be written: .*give another `output`"
        ) as raised:
            run(recipe, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ages(output) == {}
    assert set(frames(run(recipe, tmp_path))) == {f"clip_{number}" for number in range(NUM_ENTRIES)}
    record_fault(
        "disk full in animate",
        how="no file may grow beyond 512 bytes",
        promised="ends at the first result that cannot be written; resumes when there is room",
        happened=str(raised.value),
    )


def test_an_output_of_another_run_and_an_output_that_cannot_be_written_are_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("dreamdance.runs.folder_lock.WAIT_SECONDS", 0.1)
    with (
        lock_folder(Path(recipe.output), key="output"),
        pytest.raises(OutputError, match="another run is writing into"),
    ):
        run(recipe, tmp_path)
    with pytest.raises(OutputError, match=r"/proc/results cannot be written.*give another `output`"):
        run(recipe, tmp_path, output="/proc/results")


@pytest.mark.parametrize("damage", ["truncated", "missing", "no description"])
def test_a_result_that_was_damaged_later_is_made_again_and_the_others_are_not(recipe, tmp_path, damage):
    output = run(recipe, tmp_path)
    before, expected = ages(output), frames(output)
    arrays = output / "clip_1" / "arrays.npz"
    match damage:
        case "truncated":
            os.truncate(arrays, arrays.stat().st_size - 100)
        case "missing":
            arrays.unlink()
        case "no description":
            (output / "clip_1" / "result.json").write_text("[" * 100_000)
    run(recipe, tmp_path)
    after = ages(output)
    assert {name for name in after if after[name] != before[name]} == {"clip_1"}
    assert all(np.array_equal(frames(output)[name], expected[name]) for name in expected)


def test_links_in_the_output_are_replaced_and_nothing_is_written_through_them(recipe, tmp_path):
    valued = tmp_path / "valued"
    valued.mkdir()
    (valued / "letter").write_text("of value")
    output = Path(recipe.output)
    output.mkdir()
    for name in ("clip_0", ".clip_1.partial", ".clip_2.partial-old"):
        (output / name).symlink_to(valued)
    (output / "clip_3").write_text("a file where a folder belongs")
    run(recipe, tmp_path)
    assert sorted(path.name for path in output.iterdir() if path.is_dir() and not path.is_symlink()) == [
        f"clip_{number}" for number in range(NUM_ENTRIES)
    ]
    assert [path.name for path in valued.iterdir()] == ["letter"]


class _Runs:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_pickled_weights_in_an_export_are_refused_unopened(recipe, export, tmp_path):
    hostile, ran = Path(shutil.copytree(export, tmp_path / "hostile")), tmp_path / "ran"
    weights = hostile / "unet" / "diffusion_pytorch_model"
    weights.with_suffix(".safetensors").unlink()
    content = pickle.dumps({"conv_in.weight": _Runs(ran)})
    pickle.loads(content)
    assert ran.is_dir(), "the pickle does run code when it is unpickled"
    ran.rmdir()
    torch.save({"conv_in.weight": _Runs(ran)}, weights.with_suffix(".bin"))
    with pytest.raises(
        CheckpointError, match=r"animation_from: .*diffusion_pytorch_model\.bin could run any code"
    ) as raised:
        run(recipe, tmp_path, animation_from=str(hostile))
    assert not ran.exists()
    record_fault(
        "pickled weights in an export",
        how="safetensors replaced by a .bin that makes a folder when it is unpickled",
        promised="refused, nothing unpickled",
        happened=str(raised.value),
    )


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["this", "s"], r"takes 'vae' from \['this', 's'\]; only components of diffusers, transformers"),
        (["own_code", "Network"], r"takes 'vae' from \['own_code', 'Network'\]"),
        ("os", "takes 'vae' from 'os'"),
        ([["os"], "system"], "takes 'vae' from"),
    ],
)
def test_an_export_that_names_modules_of_its_own_is_refused_before_they_are_imported(
    recipe, export, tmp_path, named, expected, capsys
):
    hostile = Path(shutil.copytree(export, tmp_path / "hostile"))
    index = json.loads((hostile / "model_index.json").read_text())
    (hostile / "model_index.json").write_text(json.dumps({**index, "vae": named}))
    with pytest.raises(CheckpointError, match=rf"animation_from: .*model_index\.json {expected}"):
        run(recipe, tmp_path, animation_from=str(hostile))
    assert "Zen" not in capsys.readouterr().out  # what importing `this` prints
    record_fault(
        "export that names code of its own",
        how=f"model_index.json takes a component from {named}",
        promised="refused before anything is imported",
        happened="an error that names the component",
    )


def test_code_that_lies_beside_the_weights_is_refused(recipe, export, tmp_path):
    hostile = Path(shutil.copytree(export, tmp_path / "hostile"))
    (hostile / "unet" / "diffusers.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match=r"animation_from: .*unet/diffusers\.py could run any code"):
        run(recipe, tmp_path, animation_from=str(hostile))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"_class_name": ["pipeline", "Evil"]}', "\0"])
def test_an_invalid_index_of_an_export_is_named(recipe, export, tmp_path, content):
    hostile = Path(shutil.copytree(export, tmp_path / "hostile"))
    (hostile / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=r"animation_from: .*(is damaged|is an export of \['pipeline', 'Evil'\])"):
        run(recipe, tmp_path, animation_from=str(hostile))
