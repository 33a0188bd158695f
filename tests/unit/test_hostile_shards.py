"""Hostile shards, indexes and key points that would run code or fill the memory are refused, and no code runs."""

import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zlib
from hashlib import sha1
from pathlib import Path

import numpy as np
import pytest
import zstd
from support.fault_log import record_fault
from support.older_shards import older_sample, pack_frames
from support.random_shards import edit_index, random_clip, write_random_shards

from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.columns import COLUMNS, unpack_frames, unpack_keypoints
from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.mds import MDSWriter
from dreamdance.errors import ManifestError, ShardError
from dreamdance.inference.manifest import read_entries
from dreamdance.media.keypoints import KeypointFileError, read_keypoint_file
from dreamdance.recipe.sections import Shards


class Runs:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.path,))


@pytest.fixture
def ran(tmp_path) -> Path:
    """A folder that exists if hostile code has run; the fixture checks that the code works."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Runs(path)))
    path.rmdir()
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    write_random_shards(tmp_path / "shards", 4)
    return tmp_path / "shards"


def test_a_pickled_column_is_refused_and_never_unpickled(tmp_path, ran):
    """A shard as written by mosaicml-streaming, whose metadata is a Python object."""
    folder = tmp_path / "shards"
    with MDSWriter(columns={**COLUMNS, "metadata": "pkl"}, out=str(folder), hashes=["sha1"]) as writer:
        writer.write({**older_sample(random_clip(0)), "metadata": Runs(ran)})
    with pytest.raises(
        ShardError, match=r"index\.json: shard 0: column 'metadata' is pickled .* could run any code"
    ) as raised:
        StoredClips(Shards(local=str(folder)))
    assert not ran.exists()
    record_fault(
        "pickle in a shard column",
        how="a column of encoding 'pkl' whose object makes a folder when it is unpickled",
        promised="refused because of the index, nothing unpickled",
        happened=str(raised.value),
    )


def test_a_pickle_behind_an_index_that_calls_it_text_is_never_unpickled(tmp_path, ran):
    """The index is wrong, and the header of the shard contains 'pkl'."""
    folder = tmp_path / "shards"
    with MDSWriter(columns={**COLUMNS, "metadata": "pkl"}, out=str(folder), hashes=["sha1"]) as writer:
        writer.write({**older_sample(random_clip(0)), "metadata": Runs(ran)})

    def lie(index: dict) -> None:
        shard = index["shards"][0]
        shard["column_encodings"][shard["column_names"].index("metadata")] = "str"

    edit_index(folder, lie)
    assert b'"pkl"' in (folder / "shard.00000.mds").read_bytes()
    with pytest.raises(ShardError, match=r"sample 0 of shard .*shard\.00000\.mds"):
        StoredClips(Shards(local=str(folder))).clip(0)
    assert not ran.exists()


def test_an_index_that_is_a_pickle_is_no_index(folder, ran):
    (folder / "index.json").write_bytes(pickle.dumps(Runs(ran)))
    with pytest.raises(ShardError, match=r"index\.json is damaged: it is not valid JSON"):
        StoredClips(Shards(local=str(folder)))
    assert not ran.exists()
    record_fault(
        "pickle in place of a shard index",
        how="index.json holds a pickle that makes a folder",
        promised="refused, nothing unpickled",
        happened="an error that names the file",
    )


def test_key_points_that_are_a_pickle_are_never_unpickled(ran):
    stored = io.BytesIO()
    np.save(stored, np.array([Runs(ran)], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="clip a"):
        unpack_keypoints(stored.getvalue(), where="clip a")
    assert not ran.exists()


def test_a_shard_that_unpacks_to_a_thousand_times_its_size_takes_no_memory(tmp_path):
    """Hash and size of the packed file are right; only its unpacked size is hostile."""
    write_random_shards(tmp_path / "shards", 4, compression="zstd")
    (path,) = (tmp_path / "shards").glob("*.zstd")
    bomb = zstd.compress(bytes(1 << 28))
    assert len(bomb) * 1000 < 1 << 28
    path.write_bytes(bomb)

    def describe(index: dict) -> None:
        index["shards"][0]["zip_data"].update(bytes=len(bomb), hashes={"sha1": sha1(bomb).hexdigest()})

    edit_index(tmp_path / "shards", describe)
    clips = StoredClips(Shards(local=str(tmp_path / "shards")))
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match="would decompress to 268435456 bytes, the index lists") as raised:
            clips.clip(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24
    record_fault(
        "zstd shard that grows a thousandfold",
        how=f"{len(bomb)} bytes that unpack to 256 MiB, hash and size of the packed file right",
        promised="refused because of the frame's header before memory is taken",
        happened=f"{raised.value}; at most {peak >> 10} KiB were taken",
    )


def test_a_picture_in_a_shard_that_claims_a_hundred_thousand_pixels_a_side_is_refused(tmp_path):
    """The column announces 6x4; its PNG 100,000 x 100,000, with right checksums everywhere."""
    data = bytearray(pack_frames([np.zeros((4, 6, 3), np.uint8)]))
    start = data.index(b"IHDR")
    data[start + 4 : start + 12] = struct.pack(">II", 100_000, 100_000)
    data[start + 17 : start + 21] = struct.pack(">I", zlib.crc32(data[start : start + 17]))
    payload = bytes(data[28:])
    data[24:28] = struct.pack("<I", zlib.crc32(payload))
    with pytest.raises(ShardError, match="clip a: frame 0 is not the 6x4 PNG that its clip lists") as raised:
        unpack_frames(bytes(data), where="clip a")
    record_fault(
        "PNG bomb in a shard",
        how="a frame's header claims 100,000 x 100,000",
        promised="refused before it is decoded",
        happened=str(raised.value),
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_json_that_is_nested_without_end_is_an_error_everywhere(tmp_path, folder, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(KeypointFileError, match=r"file\.json: nested too deeply"):
        read_keypoint_file(path)
    with pytest.raises(ManifestError, match=r"file\.json:1: not valid JSON"):
        read_entries(path)
    shutil.copy(path, folder / "index.json")
    with pytest.raises(ShardError, match=r"index\.json is damaged"):
        read_index(folder / "index.json")
    record_fault(
        "JSON nested a hundred thousand deep",
        how="as key-point file, manifest and shard index",
        promised="an error that names the file, no crash",
        happened="three errors, each with its file",
    )


@pytest.mark.parametrize(
    "bad", ["../../x", "/etc/x", "..", "a/../../x", "results/../x", "~", "a\0", "\u2215etc", "．．"]
)
def test_an_id_of_a_manifest_never_leaves_the_output_folder(tmp_path, bad):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps({"id": bad, "image": "a.png", "keypoints": "a.json"}))
    with pytest.raises(ManifestError, match=r"manifest\.jsonl:1: id .* must be 1 to 200 letters") as raised:
        read_entries(path)
    record_fault(
        "manifest id that climbs out of the output folder",
        how=repr(bad),
        promised="refused with its line, before anything runs",
        happened=str(raised.value).replace(str(tmp_path), "..."),
    )
