"""Training uses the clips that pass `data.filters`, of one kind of background, and reads no clip to choose them."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from support.random_shards import random_clip, write_random_shards

from dreamdance.data.loading.clip_choice import choose_training_clips
from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.order import ClipOrder
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.score_report import describe_scores
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.data.writing.shard_writer import Part, ShardFormat, write_shards
from dreamdance.errors import ShardError
from dreamdance.recipe.filter_section import ScoreFilters
from dreamdance.recipe.parse import load_recipe
from dreamdance.recipe.sections import Shards
from dreamdance.runtime.ranks import Ranks
from dreamdance.training.stages.training_stage import stage_of
from dreamdance.training.train import make_loader

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
MOTIONS = (0.0, 0.05, 0.1, 0.2, None, 0.9, 0.11, 0.3)


def write_scored(folder, *, motions=MOTIONS, walls=(), compression="none") -> Shards:
    """Clips in two parts, so in two shards; those whose number is in `walls` have no background."""

    def record(number):
        metadata = {"seed": number, "scores": {"motion": motions[number], "people": 1 + number % 2}}
        metadata |= {"background": "none"} if number in walls else {}
        return replace(random_clip(number), metadata=metadata)

    middle = len(motions) // 2
    parts = [
        Part("part_0", lambda: map(record, range(middle))),
        Part("part_1", lambda: map(record, range(middle, len(motions)))),
    ]
    write_shards(folder, parts, settings={}, shard_format=ShardFormat(compression=compression))
    return Shards(local=str(folder))


def without_list(shards: Shards) -> Shards:
    """The set as it was written before indices listed scores."""
    path = f"{shards.local}/{INDEX_FILE}"
    with open(path, encoding="utf-8") as file:
        index = json.load(file)
    del index["dreamdance"]["clips"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(index, file)
    return shards


def chosen(shards: Shards, mixed_backgrounds="refuse", **filters) -> list[int]:
    choice = choose_training_clips(
        StoredClips(shards, ranks=Ranks()), ScoreFilters(**filters), mixed_backgrounds=mixed_backgrounds
    )
    return [number for number, passed in enumerate(choice.passed) if passed]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_only_clips_that_pass_remain(tmp_path, compression):
    shards = write_scored(tmp_path / "set", compression=compression)
    assert chosen(shards) == list(range(8))
    assert chosen(shards, motion=(0.05, 0.3)) == [1, 2, 3, 6, 7]
    assert chosen(shards, motion=(0.05, 0.3), people=1) == [2, 6]


def test_a_set_whose_index_lists_no_scores_is_read_from_its_heads(tmp_path):
    shards = without_list(write_scored(tmp_path / "set", walls=(2, 3)))
    assert chosen(shards, "accept", motion=(0.05, 0.3)) == [1, 2, 3, 6, 7]
    with pytest.raises(ShardError, match="2 have"):
        chosen(shards)


def test_clips_of_a_listed_set_are_not_read_to_choose_them(tmp_path):
    shards = write_scored(tmp_path / "set")
    for shard in (tmp_path / "set").glob("*.mds"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert chosen(shards, motion=(0.05, 0.3)) == [1, 2, 3, 6, 7]


def test_clips_without_scores_do_not_pass_and_the_report_says_so(tmp_path):
    shards = write_scored(tmp_path / "set")
    choice = choose_training_clips(StoredClips(shards, ranks=Ranks()), ScoreFilters(motion=(0.0, 0.2)), "refuse")
    assert choice.report() == "5 of 8 clips remain; dropped by motion: 3 (1 without this score)"


def test_no_clip_left_is_an_error_that_names_the_keys(tmp_path):
    shards = write_scored(tmp_path / "set")
    with pytest.raises(
        ShardError, match=r"no clip .* is left.* data\.filters\.motion \(1 to 2\), data\.filters\.jitter"
    ):
        chosen(shards, motion=(1.0, 2.0), jitter=0.5)
    plain = write_random_shards(tmp_path / "plain", compression="none")
    with pytest.raises(ShardError, match=r"0 of 12 clips remain; dropped by people: 12 \(12 without this score\)"):
        chosen(plain, people=1)


def test_mixed_backgrounds_are_refused_with_both_counts_and_the_key(tmp_path):
    shards = write_scored(tmp_path / "set", walls=(1, 2, 6))
    with pytest.raises(ShardError, match=r"3 have .* and 5 of the whole frame.*data\.mixed_backgrounds: accept"):
        chosen(shards)
    assert chosen(shards, "accept") == list(range(8))
    assert chosen(shards, motion=(0.04, 0.1)) == [1, 2]  # only clips that train count
    assert chosen(write_scored(tmp_path / "walls", walls=range(8))) == list(range(8))


@pytest.mark.parametrize("wrong", [[{}], {"0": {}}, [{"scores": 3}] * 8, [{"unknown": "x"}] * 8])
def test_a_damaged_list_is_refused(tmp_path, wrong):
    shards = write_scored(tmp_path / "set")
    path = tmp_path / "set" / INDEX_FILE
    index = json.loads(path.read_text())
    index["dreamdance"]["clips"] = wrong
    path.write_text(json.dumps(index))
    with pytest.raises(ShardError, match="'clips'"):
        chosen(shards)


def test_the_order_holds_the_chosen_samples_alone_and_no_others():
    passed = [number % 3 != 0 for number in range(20)]
    order = ClipOrder([7, 3, 10], batch_size=4, seed=2, chosen=passed)
    assert (order.num_samples, order.batches_per_epoch) == (13, 3)
    seen = {key.sample_id for step in range(60) for key in order.batch(step)}
    assert seen == {number for number in range(20) if passed[number]}


def test_all_samples_chosen_is_the_order_without_a_choice():
    plain, full = (ClipOrder([7, 3, 10], batch_size=4, seed=2, chosen=given) for given in (None, [True] * 20))
    assert [plain.batch(step) for step in range(9)] == [full.batch(step) for step in range(9)]
    assert plain.state_dict(3) == full.state_dict(3)


def test_a_run_does_not_continue_with_other_samples():
    first, other = ([number not in left_out for number in range(20)] for left_out in ((3,), (4,)))
    state = ClipOrder([7, 13], batch_size=4, seed=2, chosen=first).state_dict(2)
    assert ClipOrder([7, 13], batch_size=4, seed=2, chosen=first).resume(state) == 2
    with pytest.raises(ShardError, match="cannot be resumed"):
        ClipOrder([7, 13], batch_size=4, seed=2, chosen=other).resume(state)


def test_too_few_chosen_clips_for_a_batch_name_the_filters():
    with pytest.raises(ShardError, match=r"2 training clips are fewer than one batch of 4.*relax data\.filters"):
        ClipOrder([4], batch_size=4, seed=2, chosen=[True, True, False, False])


def load_demo(folder, shards, **changes):
    overrides = [f"data.train.local={shards.local}", *(f"{key}={value}" for key, value in changes.items())]
    return load_recipe(DEMO / f"{folder}.yaml", overrides)


def test_the_loader_of_a_recipe_delivers_the_chosen_clips_and_logs_their_number(tmp_path, caplog):
    shards = write_scored(tmp_path / "set")
    recipe = load_demo(
        "stage1_domains",
        shards,
        **{"data.filters.motion": "[0.05,0.3]", "batch_size": 2, "micro_batch_size": 2, "cluster.tasks_per_node": 1},
    )
    with caplog.at_level(logging.INFO):
        loader = make_loader(stage_of(recipe), Ranks())
    assert "data.filters: 5 of 8 clips remain; dropped by motion: 3 (1 without this score)" in caplog.text
    assert isinstance(loader.dataset, ClipDataset)
    samples = {key.sample_id for step in range(40) for keys in loader.micro_batch_keys(step) for key in keys}
    assert samples == {1, 2, 3, 6, 7}


def test_a_dry_run_shows_the_scores_and_what_the_recipe_would_drop(tmp_path):
    shards = write_scored(tmp_path / "made" / "train")
    text = describe_scores(load_demo("stage1_domains", shards, **{"data.filters.motion": "[0.05,0.3]"}))
    assert "data.filters.motion (0.05 to 0.3) drops 3 of 8 clips (37.5 %)" in text
    assert "data.filters: 5 of 8 clips remain; dropped by motion: 3 (1 without this score)" in text
    prepared = describe_scores(load_recipe(DEMO / "prepare.yaml", [f"output={tmp_path / 'made'}"]))
    assert prepared.startswith(f"scores of the 8 clips of {shards.local}")
    assert "motion: mean motion" in prepared
    assert describe_scores(load_recipe(DEMO / "prepare.yaml", [f"output={tmp_path / 'absent'}"])) == ""


def test_a_dry_run_says_that_clips_have_no_scores(tmp_path):
    shards = write_random_shards(tmp_path / "plain", compression="none")
    text = describe_scores(load_demo("stage1_domains", shards, **{"data.filters.people": 1}))
    assert text == (
        f"scores of the clips: none are stored with the 12 clips of {shards.local}; data.filters would drop all of them"
    )
