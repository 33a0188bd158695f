"""`prepare` from videos of several shots and people: whom it follows, in which shots, and what it says."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.true_maps import TrueMaps, write_truth
from support.video_folders import stored_clips, videos_recipe

from dreamdance.annotators.protocols import PersonPoses
from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.prepare import prepare
from dreamdance.data.writing.annotated_clips import AnnotatedVideoPart
from dreamdance.data.writing.clip_record import NoClips
from dreamdance.media.video import VideoError, write_video

WIDTH, HEIGHT, NUM_FRAMES, FPS = 48, 72, 16, 8
NAME = f"{__name__}:open_two_people"
SECTION = {"pose": NAME, "mask": NAME, "depth": NAME, "normal": NAME, "smooth": False}
_FOLDER: list[Path] = []


class TwoPeople(TrueMaps):
    """Sees the dancer of every frame, and in frames of the first dancer a smaller person, too."""

    def find_people(self, rgb):
        found = super().find_people(rgb)
        known = self._truth["rgb"][:NUM_FRAMES].astype(np.float32)
        for frame, people in zip(rgb, found, strict=True):
            if people and np.abs(known - frame).mean(axis=(1, 2, 3)).min() < 12:
                people.append(replace(people[0], box=(1.0, 1.0, 9.0, 30.0)))
        return found

    def annotate_pose(self, rgb, people):
        keypoints = self._look_up("keypoints", rgb)
        keypoints[[person is None for person in people]] = 0
        return PersonPoses(keypoints, landmarks=self._look_up("landmarks", rgb))


def open_two_people():
    return TwoPeople(_FOLDER[0])


@pytest.fixture(scope="module")
def dancers(tmp_path_factory):
    """The video `pair`: a shot of the first dancer, then one of the second; and `single`, of the second alone."""
    folder = tmp_path_factory.mktemp("people")
    first, second = (
        render_clip(seed, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=FPS) for seed in HELD_OUT_SEEDS[20:22]
    )
    for name, clip in (("first", first), ("second", second)):
        write_truth(folder / "truth", name, clip)
    write_video(folder / "videos" / "pair.mp4", np.concatenate([first.rgb, second.rgb]), fps=FPS)
    write_video(folder / "videos" / "single.mp4", second.rgb, fps=FPS)
    return folder


@pytest.fixture
def run(tmp_path, dancers, monkeypatch):
    monkeypatch.setattr(f"{__name__}._FOLDER", [dancers / "truth"])
    open_networks.cache_clear()

    def recipe(output="data", *, videos="*", person=None, **changes):
        chosen = {"validation_fraction": 0.0, "crop_letterbox": False, "references": 2, **changes}
        folder = tmp_path / f"videos_{output}"
        folder.mkdir(exist_ok=True)
        for path in (dancers / "videos").glob(f"{videos}.mp4"):
            (folder / path.name).write_bytes(path.read_bytes())
        annotators = {**SECTION, **({} if person is None else {"person": person})}
        made = videos_recipe(tmp_path / output, folder, annotators=annotators, **chosen)
        return made.model_copy(update={"contact_sheets": False})

    def run(output="data", **changes):
        prepare(recipe(output, **changes), tmp_path / f"run_{output}")
        return {clip.clip_id: clip.metadata["first_frame"] for clip in stored_clips(tmp_path / output, "train")}

    run.recipe, run.folder = recipe, tmp_path
    yield run
    open_networks.cache_clear()


def test_a_shot_without_the_chosen_person_gives_no_clip_and_one_warning(run, caplog):
    with caplog.at_level(logging.WARNING):
        assert list(run(videos="pair", person=1).values()) == [0, 8]
    warnings = [record.getMessage() for record in caplog.records if "videos.annotators.person" in record.getMessage()]
    assert len(warnings) == 1
    assert "pair.mp4: 1 of 2 shots" in warnings[0]
    assert warnings[0].endswith("2.5 to 3.9 s")  # half a second after the cut is left out


def test_a_video_that_shows_the_chosen_person_in_no_shot_is_an_error_of_that_video(run):
    with pytest.raises(VideoError, match=r"single\.mp4: no shot.*`videos\.annotators\.person`.*there are 1 people"):
        run(person=1, on_error="stop")
    found = run("skipped", person=1, on_error="skip")
    assert {name.partition(".")[0] for name in found} == {"pair"}
    assert "single" in (run.folder / "skipped" / "damaged_videos.tsv").read_text()


def test_person_0_is_the_default_also_where_nobody_is(run, dancers):
    nobody = np.full((NUM_FRAMES, HEIGHT, WIDTH, 3), 90, np.uint8)
    folders = {}
    for output, person in (("by_default", None), ("first_person", 0)):
        recipe = run.recipe(output, person=person)
        write_video(Path(recipe.videos.folder) / "empty.mp4", nobody, fps=FPS)
        prepare(recipe, run.folder / f"run_{output}")
        stored = run.folder / output
        folders[output] = [clip.clip_id for clip in stored_clips(stored, "train")]
        folders[f"{output} files"] = sorted(path.name for path in stored.glob("annotations/*/person-*.npz"))
    assert folders["by_default"] == folders["first_person"]
    assert folders["by_default files"] == folders["first_person files"] != []
    assert not any(name.startswith("empty") for name in folders["by_default"])


def test_a_part_follows_the_person_only_in_shots_that_can_give_it_clips(run):
    """The first 16 of 32 frames are a shot; with a fifth for validation, that shot gives training clips alone."""
    source = run.recipe(videos="pair", split_by="time", validation_fraction=0.2).videos
    part = AnnotatedVideoPart(source, "pair", "pair", "validation", run.folder / "side")
    clips = [clip for clip in part() if clip is not None]
    assert [clip.metadata["first_frame"] for clip in clips] == [26]
    assert len(list((run.folder / "side").glob("pair/person-*.npz"))) == 1


def test_validation_without_the_chosen_person_is_no_error_if_training_shows_it(run, caplog):
    source = run.recipe(videos="pair", split_by="time", validation_fraction=0.2, person=1).videos
    part = AnnotatedVideoPart(source, "pair", "pair", "validation", run.folder / "side")
    with caplog.at_level(logging.WARNING):
        (found,) = (one for one in part() if one is not None)
    assert found == NoClips("no shot shows the person that `videos.annotators.person` chooses")
    assert "1 of 1 shots do not show the person that `videos.annotators.person`" in caplog.text
