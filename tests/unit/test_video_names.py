"""Every name of a video gives an id that `animate` accepts, and no two names give the same."""

import pytest
from support.video_folders import videos_recipe, write_videos

from dreamdance.data.shards.index import _PLAIN_NAME
from dreamdance.data.writing.video_clips import find_videos
from dreamdance.data.writing.video_opening import clip_files, open_videos
from dreamdance.inference.manifest import ID_PATTERN
from dreamdance.media.video import VideoError
from dreamdance.media.video_names import files_of, part_name, plain_name, video_ids

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


@pytest.mark.parametrize(
    ("file", "name"),
    [("IMG_1.MOV", "IMG_1"), ("a.Mp4", "a"), ("A.RGB.MKV", "A"), ("a.MASK.MP4", None), ("a.b.MP4", "a.b"), ("a", None)],
)
def test_endings_may_have_upper_case_letters(file, name):
    assert plain_name(file) == name


def test_the_files_of_a_clip_are_found_as_they_are_spelled(tmp_path):
    for file in ("IMG_1.MOV", "IMG_1.Mask.MKV", "img_1.mp4", "IMG_10.MP4"):
        (tmp_path / file).touch()
    assert files_of(tmp_path, "IMG_1", [".mp4", ".mov"]) == (tmp_path / "IMG_1.mp4", tmp_path / "IMG_1.MOV")
    assert files_of(tmp_path, "IMG_1", [".mask.mkv"]) == (tmp_path / "IMG_1.Mask.MKV",)
    assert files_of(tmp_path, "img_1", [".mp4", ".mov"]) == (tmp_path / "img_1.mp4", tmp_path / "img_1.mov")
    assert files_of(tmp_path / "absent", "a", [".mp4"]) == (tmp_path / "absent" / "a.mp4",)
    (tmp_path / "IMG_1.MP4").touch()  # the list of the folder is read again
    assert files_of(tmp_path, "IMG_1", [".mp4"]) == (tmp_path / "IMG_1.MP4",)


def test_the_names_that_phones_write_are_opened(tmp_path):
    write_videos(tmp_path, "IMG_1", num_frames=4)
    (tmp_path / "IMG_1.rgb.mp4").rename(tmp_path / "IMG_1.RGB.MP4")
    (tmp_path / "IMG_1.pose.mp4").rename(tmp_path / "IMG_1.POSE.mp4")
    for section in (None, {}):  # a pair, and plain videos
        source = videos_recipe(tmp_path / "out", tmp_path, annotators=section).videos
        assert find_videos(tmp_path, plain=section is not None) == ["IMG_1"]
        opened = {name: file.path.name for name, file in open_videos(source, "IMG_1").items()}
        assert opened == {"rgb": "IMG_1.RGB.MP4", "pose": "IMG_1.POSE.mp4"}
        assert tmp_path / "IMG_1.RGB.MP4" in clip_files(source, "IMG_1")
    (tmp_path / "IMG_1.mov").touch()
    with pytest.raises(VideoError, match=r"IMG_1\.RGB\.MP4 and IMG_1\.mov: the same map twice"):
        open_videos(source, "IMG_1")
