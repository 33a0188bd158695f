"""Damaged, missing, foreign and hostile shards give an error that names the file, never a short epoch or a hang."""

import json
import os
import shutil
import struct
import time
from hashlib import sha1
from itertools import islice
from pathlib import Path

import pytest
import zstd
from support.fault_log import record_fault
from support.older_shards import older_sample, write_older_shards
from support.random_shards import HEIGHT, WIDTH, edit_index, flip_byte, random_clip, write_random_shards
from support.tool_modules import load_tool

from dreamdance.data.loading.dataset import ClipDataset
from dreamdance.data.loading.loader import ClipLoader
from dreamdance.data.loading.order import ClipOrder
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.cache import zstd_content_size
from dreamdance.data.shards.columns import COLUMNS
from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.mds import MDSWriter
from dreamdance.data.shards.verify import open_shards, verify_shards
from dreamdance.errors import ShardError
from dreamdance.evaluation.clips import open_clips
from dreamdance.recipe.sections import Shards
from dreamdance.runtime.ranks import Ranks

SECOND = "part_00004.shard.00000.mds"


@pytest.fixture(scope="module", params=["older", "zstd"])
def sound(request, tmp_path_factory) -> Path:
    """Shards whose whole files are hashed before they are read; `test_track_shards` tests files that need no hash."""
    folder = tmp_path_factory.mktemp("sound") / request.param
    if request.param == "older":
        write_older_shards(folder, 12)
    else:
        write_random_shards(folder, 12, compression=request.param)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def stored_file(folder: Path) -> Path:
    """The second shard, in the stored form of the folder."""
    (path,) = folder.glob(f"{SECOND}*")
    return path


def read_epochs(shards: Shards, *, num_workers: int, verify: str = "size", num_steps: int = 8) -> int:
    clips = ClipDataset(shards, width=WIDTH, height=HEIGHT, num_frames=2, verify=verify)
    order = ClipOrder(clips.index.samples_per_shard, batch_size=4, seed=1)
    loader = ClipLoader(clips, order, micro_batch_size=4, ranks=Ranks(), num_workers=num_workers, timeout_seconds=60)
    return sum(len(batch) for step in islice(loader, num_steps) for batch in step)


def flip(path: Path) -> None:
    flip_byte(path, position=path.stat().st_size // 2)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("how", ["size", "hash"])
def test_sound_shards_pass(folder, how):
    index = open_shards(Shards(local=str(folder)), how=how)
    assert index.num_samples == 12
    assert index.samples_per_shard == [4, 4, 4]


def test_each_shard_is_announced_before_it_is_checked(folder):
    """Hashing a large set takes hours; a watchdog must see its progress."""
    seen: list[str] = []
    open_shards(Shards(local=str(folder)), how="hash", before_shard=seen.append)
    assert seen == [f"the sizes of 3 shards in {folder}", *(f"shard {number} of 3 in {folder}" for number in (1, 2, 3))]


def test_an_evaluation_too_is_refused_shards_of_the_right_size_and_the_wrong_bytes(folder):
    flip(stored_file(folder))
    clips = open_clips(Shards(local=str(folder)))
    with pytest.raises(ShardError, match=rf"{SECOND}.* its sha1 differs from the index"):
        clips.clip(5)


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_a_damaged_local_shard_is_named_before_anything_is_read(folder, damage):
    damage(stored_file(folder))
    with pytest.raises(ShardError, match=rf"{SECOND}.*(damaged|missing)"):
        open_shards(Shards(local=str(folder)), how="hash")


@pytest.mark.parametrize("how", ["first_use", "size"])
@pytest.mark.parametrize("damage", [truncate, remove])
def test_sizes_alone_find_truncated_and_missing_shards(folder, damage, how):
    damage(stored_file(folder))
    with pytest.raises(ShardError, match=SECOND):
        open_shards(Shards(local=str(folder)), how=how)


def test_all_missing_and_truncated_shards_are_named_at_once(folder):
    paths = sorted(folder.glob("*.mds*"))
    remove(paths[0])
    truncate(paths[2])
    with pytest.raises(
        ShardError, match=rf"{paths[0].name} is missing.*; .*{paths[2].name} is damaged: it has \d+ bytes"
    ):
        open_shards(Shards(local=str(folder)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_damage_after_the_check_stops_the_loader_with_the_shards_name(folder, damage, num_workers):
    clips = ClipDataset(Shards(local=str(folder)), width=WIDTH, height=HEIGHT, num_frames=2)
    damage(stored_file(folder))
    order = ClipOrder(clips.index.samples_per_shard, batch_size=4, seed=1)
    loader = ClipLoader(clips, order, micro_batch_size=4, ranks=Ranks(), num_workers=num_workers, timeout_seconds=60)
    start = time.monotonic()
    with pytest.raises(ShardError, match=SECOND) as raised:
        list(islice(loader, 9))
    record_fault(
        f"shard damaged while it is trained on: {damage.__name__}",
        how=f"after the check at the start, with {num_workers} workers",
        promised="an error that names the shard, no hang and no short epoch",
        happened=str(raised.value),
        detected_seconds=time.monotonic() - start,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_a_damaged_remote_shard_is_an_error_that_names_it(folder, tmp_path, damage, num_workers):
    damage(stored_file(folder))
    start = time.monotonic()
    with pytest.raises(ShardError, match=SECOND) as raised:
        read_epochs(Shards(local=str(tmp_path / "cache"), remote=str(folder)), num_workers=num_workers)
    assert not (tmp_path / "cache" / SECOND).exists()
    record_fault(
        f"remote shard damaged: {damage.__name__}",
        how=f"before it is fetched, with {num_workers} workers",
        promised="an error that names the shard; it does not enter the cache",
        happened=str(raised.value),
        detected_seconds=time.monotonic() - start,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards_are_read_whole(folder, tmp_path, num_workers):
    cache = tmp_path / "cache"
    assert read_epochs(Shards(local=str(cache), remote=str(folder)), num_workers=num_workers) == 8 * 4
    assert {path.name for path in cache.glob("[!.]*")} == {
        "index.json",
        *(f"part_0000{n}.shard.00000.mds" for n in (0, 4, 8)),
    }


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_download_is_removed_with_a_warning_and_fetched_again(folder, tmp_path, damage, caplog):
    shards = Shards(local=str(tmp_path / "cache"), remote=str(folder))
    list(StoredClips(shards))
    damage(tmp_path / "cache" / SECOND)
    clips = StoredClips(shards, verify="hash")
    assert SECOND in caplog.text
    assert [clip["clip_id"] for clip in clips] == [f"clip_{number:04d}" for number in range(12)]


def test_a_damaged_unpacked_file_is_unpacked_again_from_its_sound_shard(tmp_path):
    write_random_shards(tmp_path / "shards", compression="zstd")
    shards = Shards(local=str(tmp_path / "shards"))
    list(StoredClips(shards))
    flip(tmp_path / "shards" / SECOND)
    assert StoredClips(shards, verify="hash").clip(5).frames("rgb").sum() == random_clip(5).maps["rgb"].sum()


def test_a_cache_of_another_dataset_is_refused(folder, tmp_path):
    list(StoredClips(Shards(local=str(tmp_path / "cache"), remote=str(folder))))
    write_random_shards(tmp_path / "other", 8)
    with pytest.raises(ShardError, match=r"cache caches other shards than .*other contains now"):
        StoredClips(Shards(local=str(tmp_path / "cache"), remote=str(tmp_path / "other")))


def test_only_one_rank_of_a_node_compares_hashes(folder):
    flip(stored_file(folder))
    open_shards(Shards(local=str(folder)), how="hash", ranks=Ranks(1, 2, 1))
    with pytest.raises(ShardError, match=SECOND):
        open_shards(Shards(local=str(folder)), how="hash", ranks=Ranks(2, 4, 0))


def set_name(name: str):
    def edit(index: dict) -> None:
        for key in ("raw_data", "zip_data"):
            if index["shards"][1][key] is not None:
                index["shards"][1][key]["basename"] = name + (".zstd" if key == "zip_data" else "")

    return edit


def set_shard(**fields):
    return lambda index: index["shards"][1].update(fields)


def set_file(**fields):
    return lambda index: index["shards"][1]["raw_data"].update(fields)


def pickled_column(index: dict) -> None:
    index["shards"][0]["column_encodings"][0] = "pkl"


def unknown_column(index: dict) -> None:
    index["shards"][0]["column_names"][0] = "label"


def other_encoding(index: dict) -> None:
    index["shards"][0]["column_encodings"][0] = "jpeg"


def duplicate_name(index: dict) -> None:
    index["shards"][1] = index["shards"][0]


def no_hashes(index: dict) -> None:
    index["shards"][1]["raw_data"]["hashes"] = {}


HOSTILE = [
    (set_name("../evil.mds"), r"shard 1.*'\.\./evil\.mds.*accepted are plain file names"),
    (set_name("/tmp/evil.mds"), r"'/tmp/evil\.mds.*accepted are plain file names"),
    (set_name("sub/evil.mds"), "accepted are plain file names"),
    (set_name("..\\evil.mds"), "accepted are plain file names"),
    (set_name("evil\n.mds"), "accepted are plain file names"),
    (set_name(".hidden.mds"), "accepted are plain file names"),
    (set_name("index.json"), r"does not end in '\.mds'"),
    (pickled_column, "column 'clip(_id)?' is pickled"),
    (unknown_column, "label is unknown"),
    (other_encoding, "clip(_id)? is jpeg, not (str|bytes)"),
    (duplicate_name, "more than one shard has the file name"),
    (no_hashes, "has no hash"),
    (set_file(hashes={"sha1": "0" * 39}), "accepted are 40 hexadecimal digits"),
    (set_file(bytes=1 << 40), "size of .* is 1099511627776"),
    (set_file(bytes=-1), "size of .* is -1"),
    (set_file(bytes=True), "size of .* is True"),
    (set_shard(samples=0), "number of samples is 0"),
    (set_shard(samples="4"), "number of samples is '4'"),
    (set_shard(samples=5), "the shards have 13 samples in total, but `num_samples` is 12"),
    (set_shard(compression="gz"), "compression 'gz'"),
    (set_shard(format="json"), "format 'json'"),
    (set_shard(column_sizes=[None] * len(COLUMNS)), "order or width of the columns differ"),
    (set_shard(raw_data=None), "not a JSON object"),
    (lambda index: index.update(version=1), "version 1"),
    (lambda index: index.update(shards=[]), "lists no shards"),
    (lambda index: index["dreamdance"].update(schema_version=0), "schema version 0"),
]


@pytest.mark.parametrize(("edit", "message"), HOSTILE)
@pytest.mark.parametrize("remote", [False, True])
def test_the_contents_of_an_index_are_checked(folder, tmp_path, edit, message, remote):
    edit_index(folder, edit)
    before = {path for path in tmp_path.rglob("*") if "shards" not in path.parts}
    shards = Shards(local=str(tmp_path / "cache"), remote=str(folder)) if remote else Shards(local=str(folder))
    with pytest.raises(ShardError, match=message) as raised:
        StoredClips(shards)
    written = {path for path in tmp_path.rglob("*") if "shards" not in path.parts} - before
    assert {path.name for path in written} <= {"cache", ".index.json.lock"}  # nothing but the lock, nothing outside
    record_fault(
        "hostile index of shards",
        how="of a remote folder" if remote else "of a local folder",
        promised="refused before anything is written outside the local folder",
        happened=str(raised.value).replace(str(tmp_path), "..."),
    )


@pytest.mark.parametrize("content", ["{", "", "[]", '{"version": 2', "\x00\xff", "[" * 100_000])
def test_an_index_that_is_no_index_is_named(folder, content):
    (folder / "index.json").write_text(content, encoding="latin-1")
    with pytest.raises(ShardError, match=r"index\.json"):
        read_index(folder / "index.json")


def test_a_folder_of_another_project_is_refused(tmp_path):
    with MDSWriter(
        columns={"image": "bytes", "label": "int"}, out=str(tmp_path / "foreign"), hashes=["sha1"]
    ) as writer:
        writer.write({"image": b"1", "label": 1})
    with pytest.raises(
        ShardError, match=r"the columns are not those of schema version 1.*rgb is missing.*label is unknown"
    ):
        StoredClips(Shards(local=str(tmp_path / "foreign")))


def test_shards_of_our_columns_written_by_others_are_read(tmp_path):
    with MDSWriter(columns=COLUMNS, out=str(tmp_path / "shards"), hashes=["xxh64"]) as writer:
        writer.write(older_sample(random_clip(0)))
    assert StoredClips(Shards(local=str(tmp_path / "shards"))).clip(0).clip_id == "clip_0000"


def test_a_wrong_count_is_found_even_where_the_index_agrees_with_itself(folder):
    def edit(index: dict) -> None:
        index["shards"][1]["samples"] = 3
        index["dreamdance"]["num_samples"] = 11

    edit_index(folder, edit)
    with pytest.raises(ShardError, match=rf"{SECOND}.*has 4 samples, the index lists 3"):
        list(StoredClips(Shards(local=str(folder))))


def test_a_table_of_samples_that_points_outside_of_its_file_is_refused(tmp_path):
    write_random_shards(tmp_path / "shards", 4)
    path = tmp_path / "shards" / "part_00000.shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[8:12] = struct.pack("<I", 1 << 30)
    path.write_bytes(bytes(content))
    index = read_index(tmp_path / "shards" / "index.json")
    with pytest.raises(ShardError, match="points outside"):
        verify_shards(index, how="size")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    write_random_shards(tmp_path / "shards", 4, compression="zstd")
    (path,) = (tmp_path / "shards").glob("*.zstd")
    for bomb in (zstd.compress(bytes(1 << 24)), path.read_bytes() + zstd.compress(bytes(1 << 24))):
        path.write_bytes(bomb)

        def describe_bomb(index: dict, size: int = len(bomb), digest: str = sha1(bomb).hexdigest()) -> None:
            index["shards"][0]["zip_data"].update(bytes=size, hashes={"sha1": digest})

        edit_index(tmp_path / "shards", describe_bomb)
        with pytest.raises(ShardError, match=r"would decompress to (16777216|None) bytes"):
            StoredClips(Shards(local=str(tmp_path / "shards"))).clip(0)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_791, 65_792, 1 << 20])
@pytest.mark.parametrize("filler", [b"\0", None])
def test_the_announced_size_of_a_compressed_file_is_read_from_its_header(size, filler):
    content = filler * size if filler is not None else os.urandom(size)
    assert zstd_content_size(zstd.compress(content)) == size


def test_content_that_is_no_whole_single_frame_announces_no_size():
    frame = zstd.compress(os.urandom(1000))
    assert zstd_content_size(frame + frame) is None
    assert zstd_content_size(frame[:-1]) is None
    assert zstd_content_size(b"abc") is None
    assert zstd_content_size(b"\0" * 100) is None


def test_the_index_notes_schema_and_count(sound):
    details = json.loads((sound / "index.json").read_text())["dreamdance"]
    assert (details["schema_version"], details["num_samples"]) == (2 if list(sound.glob("*.zstd")) else 1, 12)


def test_the_command_describes_a_folder_or_names_the_bad_file(folder, capsys):
    command = load_tool("verify_shards")
    assert command.main([str(folder), "--decode"]) == 0
    assert capsys.readouterr().out == f"{folder}: 12 clips in 3 shards are valid, 72 frames decoded\n"
    for path in folder.glob(f"{SECOND}*"):
        flip(path)
    assert command.main([str(folder)]) == 1
    assert SECOND in capsys.readouterr().err


@pytest.mark.parametrize("remote", ["/nowhere/at/all", "ftp://example/shards"])
def test_a_remote_folder_that_cannot_be_reached_is_named(tmp_path, remote):
    with pytest.raises(ShardError, match=rf"{remote}/index\.json cannot be downloaded"):
        StoredClips(Shards(local=str(tmp_path / "cache"), remote=remote))
