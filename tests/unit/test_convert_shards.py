"""The command that converts shards of schema 1 to schema 2 keeps every value."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.older_shards import write_older_records, write_older_shards
from support.random_shards import edit_index, flip_byte
from support.tool_modules import load_tool
from support.video_folders import stored_clips, videos_recipe, write_videos

from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.prepare import prepare
from dreamdance.data.writing.shard_writer import ShardFormat
from dreamdance.recipe.sections import Shards

MAPS = ("rgb", "pose", "normal", "depth", "mask")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("convert_shards")


@pytest.mark.parametrize(("codec", "compression"), [("png", "zstd"), ("jpeg", "none")])
def test_every_map_and_key_point_stays_the_same_to_the_bit(tool, tmp_path, capsys, codec, compression):
    older = write_older_shards(tmp_path / "older", 6, compression=compression, width=16, height=24)
    sources = {"part_00000": {"name": "a", "clip_id": "a", "files": {}, "damage": None}}
    edit_index(tmp_path / "older", lambda index: index["dreamdance"].update(sources=sources))
    target = tmp_path / "now"
    assert tool.main([older.local, str(target), "--rgb-format", codec, "--smaller-size", "8x12"]) == 0
    assert "6 clips converted" in capsys.readouterr().out
    before, after = StoredClips(older), StoredClips(Shards(local=str(target)))
    assert before.index.samples_per_shard == after.index.samples_per_shard == [4, 2]
    assert {shard.schema_version for shard in after.index.shards} == {2}
    for number in range(6):
        one, other = before.clip(number), after.clip(number)
        assert (one.clip_id, one.fps, one.metadata) == (other.clip_id, other.fps, other.metadata)
        np.testing.assert_array_equal(one.keypoints, other.keypoints)
        for name in MAPS if codec == "png" else MAPS[1:]:
            np.testing.assert_array_equal(one.frames(name), other.frames(name))
    details = json.loads((target / "index.json").read_text())["dreamdance"]
    assert details["sources"] == sources
    form = ShardFormat(rgb_format=codec, smaller_sizes=((8, 12),)).settings()
    assert details["settings"] == {"clips": 6, "hashes": ["sha1", "xxh64"], **form}


def test_a_damaged_source_is_refused_by_name_and_a_converted_one_too(tool, tmp_path, capsys):
    older = write_older_shards(tmp_path / "older", 4)
    tool.convert(Path(older.local), tmp_path / "now", ShardFormat())
    assert tool.main([str(tmp_path / "now"), str(tmp_path / "again")]) == 1
    assert "schema 2 already" in capsys.readouterr().err
    (path,) = Path(older.local).glob("*.mds")
    flip_byte(path)
    assert tool.main([older.local, str(tmp_path / "third")]) == 1
    assert f"{path.name} is damaged: its sha1 differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--smaller-size", "300x300"], "300x300 is not smaller than the frames (8x12) with the same aspect; 7x10"),
        (["--smaller-size", "4x6", "--smaller-size", "4x6"], "4x6 is given twice"),
    ],
)
def test_a_form_that_cannot_be_is_refused_before_anything_is_written(tool, tmp_path, capsys, words, message):
    older, target = write_older_shards(tmp_path / "older", 4), tmp_path / "now"
    assert tool.main([older.local, str(target), *words]) == 1
    assert message in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("quality", ["0", "500", "-3"])
def test_a_quality_that_does_not_exist_is_refused(tool, capsys, quality):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["older", "now", f"--rgb-quality={quality}"])
    assert f"'{quality}' is no whole number from 1 to 100" in capsys.readouterr().err


def test_the_recipe_of_videos_finds_the_converted_folder_complete_with_the_words_of_the_last_line(
    tool, tmp_path, capsys, caplog
):
    """An output of schema 1 is made of one of today, whose videos have equally many clips."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for seed, name in enumerate("ab"):
        write_videos(videos, name, num_frames=16, with_maps=True, seed=seed)
    changes = {"validation_fraction": 0.0, "references": 0, "width": 8, "height": 8}
    prepare(videos_recipe(tmp_path / "data", videos, **changes), tmp_path / "run")
    index = json.loads((tmp_path / "data" / "train" / "index.json").read_text())
    records = [tool._record(clip) for clip in stored_clips(tmp_path / "data", "train")]
    write_older_records(tmp_path / "older", records, clips_per_part=2)
    names = [shard["raw_data"]["basename"].partition(".")[0] for shard in index["shards"]]

    def rename(older: dict) -> None:
        for shard, name in zip(older["shards"], names, strict=True):
            basename = shard["raw_data"]["basename"]
            shard["raw_data"]["basename"] = f"{name}.{basename.partition('.')[2]}"
            (tmp_path / "older" / basename).rename(tmp_path / "older" / shard["raw_data"]["basename"])
        older["dreamdance"] |= {name: index["dreamdance"][name] for name in ("settings", "sources")}

    edit_index(tmp_path / "older", rename)
    words = [str(tmp_path / "older"), str(tmp_path / "now" / "train"), "--rgb-format", "webp", "--smaller-size", "4x4"]
    assert tool.main(words) == 0
    form = capsys.readouterr().out.splitlines()[-1].partition("complete with ")[2].split()
    assert form == ["videos.references=0", "rgb_format=webp", "rgb_quality=95", "smaller_sizes=[[4,4]]"]
    shutil.copytree(tmp_path / "data", tmp_path / "now", dirs_exist_ok=True, ignore=shutil.ignore_patterns("train"))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "now" / "train").glob("*.mds")}
    recipe = videos_recipe(tmp_path / "now", videos, **changes)
    recipe = recipe.model_copy(update={"rgb_format": "webp", "smaller_sizes": [(4, 4)]})
    with caplog.at_level("INFO"):
        prepare(recipe, tmp_path / "run_2")
    assert "is already complete" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "now" / "train").glob("*.mds")} == written
