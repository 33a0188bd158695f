"""`prepare` from plain videos is killed in each of its stages, start after start, and ends as if it never was."""

import signal
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.killed_stage import prepare_in
from support.ranks import StartedRanks, run_ranks
from support.true_maps import FOLDER, NAME, write_truth
from support.video_folders import videos_recipe

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.prepare import prepare
from dreamdance.media.video import write_video

WIDTH, HEIGHT, NUM_FRAMES, FPS = 48, 72, 16, 8
# In the order of the work.
STAGES = ("area", "cuts", "motion", "person", "maps-mask", "maps-normal", "maps-depth")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the videos of four dancers, whom the annotators know."""
    for name, seed in zip("abcd", HELD_OUT_SEEDS[20:24], strict=True):
        clip = render_clip(seed, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=FPS)
        write_truth(tmp_path / "truth", name, clip)
        write_video(tmp_path / "videos" / f"{name}.mp4", clip.rgb, fps=FPS)
    monkeypatch.setenv(FOLDER, str(tmp_path / "truth"))
    monkeypatch.chdir(tmp_path)  # a path in the recipe is part of the settings that the index states
    return tmp_path


def content(output: Path) -> dict[str, bytes]:
    files = [path for split in ("train", "validation") for path in (output / split).iterdir() if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_killed_in_every_stage_end_with_the_same_shards(folder):
    annotators = {"pose": NAME, "mask": NAME, "depth": NAME, "normal": NAME, "smooth": False}
    recipes = [
        videos_recipe(
            Path(output), Path("videos"), annotators=annotators, validation_fraction=0.25, references=2
        ).model_copy(update={"contact_sheets": False})
        for output in ("whole", "data")
    ]
    prepare(recipes[0], folder / "undisturbed")
    arguments = {
        "work": str(folder),
        "recipe": recipes[1].model_dump_json(),
        "environment": {FOLDER: str(folder / "truth")},
    }
    kept: dict[Path, int] = {}
    for stage in STAGES:
        before = set(kept)
        with StartedRanks(prepare_in, 2, folder / "ranks", deadly_stage=stage, **arguments) as ranks:
            assert ranks.wait() == [-signal.SIGKILL] * 2, f"no new result of {stage}\n{ranks.output()}"
        assert all(path.stat().st_mtime_ns == made for path, made in kept.items()), "a kept result was made again"
        kept = {path: path.stat().st_mtime_ns for path in (folder / "data" / "annotations").glob("*/*.npz")}
        assert any(path.name.startswith(f"{stage}-") for path in set(kept) - before)
        assert not list((folder / "data").glob("*/index.json")), "nothing is complete"
    run_ranks(prepare_in, 2, folder / "ranks", deadly_stage=None, **arguments)
    assert content(folder / "data") == content(folder / "whole")
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items()), "a kept result was made again"
    record_fault(
        "both processes of a prepare from plain videos killed",
        how="SIGKILL in each of its seven stages, one start after the other",
        promised="the next start goes on; kept results are not made again",
        happened="the shards equal those of an undisturbed run, byte for byte",
    )
