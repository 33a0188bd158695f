"""References of videos with several shots: of the clip's own person, from all shots that show that person."""

import numpy as np
import pytest
from support.true_maps import FOLDER, NAME, write_truth
from support.video_folders import stored_clips, videos_recipe

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.curation.clothes import clothes_difference, describe_clothes, wear_same_clothes
from dreamdance.data.prepare import prepare
from dreamdance.media.video import write_video

WIDTH, HEIGHT, NUM_FRAMES, FPS = 48, 72, 16, 8


@pytest.fixture(scope="module")
def looks():
    """The clothes of 8 dancers, each before two stages with another light, camera and motion: `[dancer][stage]`."""

    def look(dancer, stage):
        clip = render_clip(
            HELD_OUT_SEEDS[stage],
            identity_seed=HELD_OUT_SEEDS[dancer],
            num_frames=5,
            width=64,
            height=96,
            fps=1.5,
        )
        return describe_clothes(clip.rgb, clip.keypoints)

    return [[look(600 + number, stage) for stage in (600 + number, 700 + number % 3)] for number in range(8)]


def test_one_dancer_before_two_stages_is_one_person(looks):
    assert [wear_same_clothes(*both) for both in looks] == [True] * 8


def test_two_dancers_are_two_people_also_before_one_stage(looks):
    pairs = [
        (one, other)
        for number, dancer in enumerate(looks)
        for another in looks[number + 1 :]
        for one in dancer
        for other in another
    ]
    assert len(pairs) == 112
    assert not any(wear_same_clothes(*pair) for pair in pairs)


def test_the_difference_is_hellingers_and_unseen_clothes_agree_with_nobody(looks):
    half, other = np.array([[0.5, 0.5, 0.0]], np.float32), np.array([[0.5, 0.0, 0.5]], np.float32)
    assert clothes_difference(half, other)[0] == pytest.approx(np.sqrt(0.5))
    look = looks[0][0]
    np.testing.assert_allclose(look.sum(axis=1), 1.0, rtol=1e-5)
    assert not wear_same_clothes(look, np.zeros_like(look))
    unseen = describe_clothes(np.zeros((1, 96, 64, 3), np.uint8), np.zeros((1, 128, 3), np.float32))
    assert not unseen.any()
    only_trunk = look * [[1], [0]]
    assert wear_same_clothes(only_trunk, look)


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """`pair`: a shot of each of two dancers. `again`: the first, the second, and the first before another stage."""
    first, second = HELD_OUT_SEEDS[20:22]
    dancers = {"first": (first, first), "second": (second, second), "later": (HELD_OUT_SEEDS[25], first)}
    clips = {
        name: render_clip(seed, identity_seed=identity, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT, fps=FPS)
        for name, (seed, identity) in dancers.items()
    }
    for name, clip in clips.items():
        write_truth(tmp_path / "truth", name, clip)
    for name, shots in (("pair", ["first", "second"]), ("again", ["first", "second", "later"])):
        write_video(tmp_path / "videos" / f"{name}.mp4", np.concatenate([clips[shot].rgb for shot in shots]), fps=FPS)
    monkeypatch.setenv(FOLDER, str(tmp_path / "truth"))
    open_networks.cache_clear()
    yield tmp_path
    open_networks.cache_clear()


def test_references_show_the_clips_own_person_from_all_its_shots(videos):
    """Truth is the order in which the shots were joined; their frames beside a cut are left out."""
    recipe = videos_recipe(
        videos / "data",
        videos / "videos",
        annotators={"pose": NAME, "mask": NAME, "depth": NAME, "normal": NAME, "smooth": False},
        validation_fraction=0.0,
        crop_letterbox=False,
        references=6,
        clip_frames=6,
        min_clip_frames=6,
    )
    prepare(recipe.model_copy(update={"contact_sheets": False}), videos / "run")
    found = {}
    for clip in stored_clips(videos / "data", "train"):
        first = clip.metadata["first_frame"]
        shots = [(first + position) // NUM_FRAMES for position in clip.reference_positions]
        assert len(shots) == 6
        found[clip.clip_id.partition(".")[0], first // NUM_FRAMES] = set(shots)
    assert found == {
        ("pair", 0): {0},
        ("pair", 1): {1},
        ("again", 0): {0, 2},
        ("again", 1): {1},
        ("again", 2): {0, 2},
    }
