"""The command that converts shards of schema 1 to schema 2 keeps every value."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.older_shards import write_older_shards
from support.random_shards import edit_index, flip_byte

from dreamdance.data.loading.dataset import StoredClips
from dreamdance.data.writing.shard_writer import ShardFormat
from dreamdance.recipe.sections import Shards

MAPS = ("rgb", "pose", "normal", "depth", "mask")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "convert_shards.py"
    spec = importlib.util.spec_from_file_location("convert_shards", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
