"""Every name of a video gives an id that `animate` accepts, and no two names give the same."""

import pytest

from dreamdance.data.shards.index import _PLAIN_NAME
from dreamdance.inference.manifest import ID_PATTERN
from dreamdance.media.video_names import part_name, video_ids

FINE = ["dance_01", "AbCdEf12345", "_x", "a.b-c", "0", "x" * 182]
OTHERS = [
    "my dance (1)",
    "my dance [1]",
    "my dance  1",
    "我的舞蹈",
    "我的舞",
    "-AbCdEf12345",
    "é",
    "e\u0301",
    "x" * 183,
    "y" * 300,
]
OTHERS += ["a\nb", "a\u2028b", "..", "-", " ", "a/b".replace("/", "\u2215"), "café №5", "failures.json ", "\udcff"]


def test_a_name_that_animate_accepts_is_its_own_id():
    assert video_ids(FINE) == {name: name for name in FINE}


def test_every_other_name_gives_a_unique_id_that_animate_accepts():
    ids = video_ids([*FINE, *OTHERS])
    assert all(ID_PATTERN.fullmatch(f"{name}.validation.000000") for name in ids.values())
    assert len({name.casefold() for name in ids.values()}) == len(FINE) + len(OTHERS)
    assert {name: ids[name] for name in FINE} == {name: name for name in FINE}
    assert ids["my dance (1)"].startswith("my_dance_1-")
    assert ids["-AbCdEf12345"].startswith("AbCdEf12345-")
    assert ids["我的舞蹈"].startswith("video-")


def test_an_id_does_not_depend_on_the_other_videos():
    assert {name: video_ids([name])[name] for name in OTHERS} == video_ids(OTHERS)


def test_names_that_some_file_systems_take_for_one_get_ids_that_differ_there():
    ids = video_ids(["Dance", "dance", "other"])
    assert ids["other"] == "other"
    assert ids["Dance"].casefold() != ids["dance"].casefold()


def test_a_name_that_is_the_id_of_another_keeps_it():
    taken = video_ids(["my dance (1)"])["my dance (1)"]
    ids = video_ids(["my dance (1)", taken])
    assert ids[taken] == taken
    assert ids["my dance (1)"] != taken


@pytest.mark.parametrize("name", [*FINE, *OTHERS])
def test_shards_of_a_video_have_plain_names(name):
    assert "." not in part_name(name)
    assert _PLAIN_NAME.fullmatch(f"{part_name(name)}.shard.00000.mds.zstd")
