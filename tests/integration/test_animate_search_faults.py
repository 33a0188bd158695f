"""A rank of `animate` is killed while it searches a driving video, or a picture, for key points."""

import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import killed_search
from support.animated_frames import frames
from support.fault_log import record_fault
from support.faulty_shares import PAUSE_SECONDS, WORLD_SIZE
from support.ranks import StartedRanks
from support.recipes import HEIGHT, WIDTH
from support.tiny_pipelines import tiny_animation_pipeline
from support.true_maps import FOLDER, write_truth

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.inference.animate import animate
from dreamdance.media.video import write_video
from dreamdance.recipe.schema import AnimateRecipe

NUM_ENTRIES, NUM_FRAMES = 4, 20
# A video is searched in parts of 16 frames, then the picture.
PARTS = [16, 4, 1]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Dancers with their truth, a manifest that names their videos, an export and the results of an undisturbed run."""
    folder = tmp_path_factory.mktemp("work")
    lines = []
    for number in range(NUM_ENTRIES):
        seed = HELD_OUT_SEEDS[40 + number]
        clip = render_clip(seed, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=8)
        write_truth(folder / "truth", str(number), clip)
        write_video(folder / f"{number}.mkv", clip.rgb, fps=8, lossless=True)
        Image.fromarray(clip.rgb[-1]).save(folder / f"{number}.png")
        files = {"image": f"{number}.png", "video": f"{number}.mkv"}
        lines.append(json.dumps({"id": f"clip_{number}", "align": "bones", **files}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    tiny_animation_pipeline(controls=("pose",)).save_pretrained(folder / "pose_only")
    return folder


def environment(work: Path, folder: Path, *, deadly: int | None = None) -> dict[str, str]:
    """What the annotator reads; with `deadly`, rank 1 dies once, when it searches this number of frames for a pose."""
    return {
        FOLDER: str(work / "truth"),
        killed_search.SEARCHES: str(folder / "searches"),
        killed_search.FLAG: str(folder / "flag"),
        killed_search.DYING_RANK: "1",
        killed_search.DEADLY_FRAMES: str(deadly),
    }


def make_recipe(work: Path, output: Path) -> AnimateRecipe:
    values = {
        "task": "animate",
        "name": "tiny_animate",
        "manifest": str(work / "manifest.jsonl"),
        "output": str(output),
        "animation_from": str(work / "pose_only"),
        "width": WIDTH,
        "height": HEIGHT,
        "precision": "fp32",
        "annotators": {"pose": killed_search.NAME},
        "animation": {"num_inference_steps": 1, "window_frames": 10, "window_overlap": 1},
    }
    return AnimateRecipe.model_validate_json(json.dumps(values))


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory) -> dict[str, np.ndarray]:
    """The frames of one undisturbed process, by entry."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(work, folder).items():
            patch.setenv(name, value)
        animate(make_recipe(work, folder / "results"), folder / "run")
    return frames(folder / "results")


def start(work: Path, folder: Path, *, pause: float = 0.0, **more) -> StartedRanks:
    arguments = {
        "recipe": make_recipe(work, folder / "results").model_dump_json(),
        "run_folder": str(folder / "run"),
        "environment": environment(work, folder, **more),
        "pause": pause,
    }
    return StartedRanks(killed_search.work_in, WORLD_SIZE, folder / "ranks", **arguments)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "deadly", "lost"),
    [("a video", 4, [16, 4]), ("a picture, whose video's key points are kept", 1, [1])],
    ids=["video", "picture"],
)
def test_a_rank_killed_in_a_search_costs_that_search_alone(work, whole, tmp_path, what, deadly, lost):
    output, searches = tmp_path / "results", tmp_path / "searches"
    with start(work, tmp_path, deadly=deadly, pause=PAUSE_SECONDS) as ranks:
        assert ranks.wait() == [0, -signal.SIGKILL], ranks.output()
        assert "rank 1 has died: this process takes over" in ranks.output()
    found = frames(output)
    assert set(found) == set(whole)
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    searched = Counter(int(line.split()[1]) for line in searches.read_text().splitlines())
    assert searched == Counter(PARTS * NUM_ENTRIES + lost)
    for result in output.glob("[!.]*/result.json"):
        result.unlink()  # so that the next start needs all key points again
    searches.unlink()
    with start(work, tmp_path) as ranks:
        ranks.results()
    assert not searches.exists(), "all key points are kept"
    assert all(np.array_equal(frames(output)[name], whole[name]) for name in whole)
    record_fault(
        f"rank of animate killed while it searches {what}",
        how="SIGKILL to one of two ranks",
        promised="the other animates its entries; kept key points are not searched again",
        happened="that search alone was made twice; all frames equal those of an undisturbed run",
    )
