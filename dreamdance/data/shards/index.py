"""Reads and validates a folder's `index.json`: names, sizes, counts, columns and encodings.

The library trusts its index: it writes a shard named `../evil.mds` outside the local folder (dreamdance/README.md,
"The stack"). So this module checks every index first; a remote index is checked before any shard is downloaded.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamdance.data.shards.columns import SCHEMA_VERSION, check_schema_version, schema_of
from dreamdance.errors import ShardError

MAX_INDEX_BYTES = 256 << 20
MAX_SHARD_BYTES = (1 << 32) - 1  # MDS keeps sample offsets as uint32
MAX_SAMPLES_PER_SHARD = 1 << 24
HASH_DIGITS = {"sha1": 40, "xxh64": 16}  # hexadecimal digits; the strongest algorithm first
DETAILS_KEY = "dreamdance"

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_COLUMN_BYTES = {"int": 8, "float64": 8}  # encodings of fixed width; a value of any other encoding stores its size


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard as the index describes it."""

    name: str
    num_bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its schema, its MDS file, and its compressed file if the shard is compressed."""

    schema_version: int
    num_samples: int
    raw: ShardFile
    compressed: ShardFile | None

    @property
    def stored(self) -> ShardFile:
        """The file that a complete folder contains."""
        return self.compressed or self.raw


@dataclass(frozen=True)
class ShardIndex:
    """A checked index of a folder of shards."""

    path: Path
    shards: tuple[ShardEntry, ...]
    details: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def samples_per_shard(self) -> list[int]:
        return [shard.num_samples for shard in self.shards]


def read_index(path: Path, *, may_be_empty: bool = False) -> ShardIndex:
    """Reads and checks an index file.

    Args:
        path: the `index.json`, or a copy of it under another name.
        may_be_empty: whether to accept an index without shards; `prepare` writes one if it skips all videos.

    Raises:
        ShardError: the file is missing, is not JSON, has another schema, or contains a value that `prepare` never
            writes.
    """
    if not path.is_file():
        raise ShardError(
            f"no shards in {path.parent}: {path.name} is missing; run `prepare` (again), which writes this file last"
        )
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ShardError(f"{path} has more than {MAX_INDEX_BYTES} bytes: it is not an index of shards")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # text that is not UTF-8, and too long numbers, are ValueErrors
        raise ShardError(f"{path} is damaged: it is not valid JSON ({error})") from error
    top = _mapping(content, f"{path}: the index")
    if top.get("version") != 2:
        raise ShardError(f"{path}: MDS version {top.get('version')!r}; this code reads version 2")
    details = _mapping(top.get(DETAILS_KEY, {}), f"{path}: '{DETAILS_KEY}'")
    check_schema_version(details.get("schema_version", SCHEMA_VERSION), where=str(path))
    shards = top.get("shards")
    if not isinstance(shards, list) or not (shards or may_be_empty):
        raise ShardError(
            f"{path}: the index lists no shards; if `prepare` skipped all videos of this split, repair them and run it "
            "again"
        )
    entries = tuple(_parse_shard(f"{path}: shard {number}", shard) for number, shard in enumerate(shards))
    index = ShardIndex(path=path, shards=entries, details=details)
    _check_totals(index)
    return index


def _check_totals(index: ShardIndex) -> None:
    names = Counter(file.name for entry in index.shards for file in (entry.raw, entry.compressed) if file is not None)
    for name, times in names.most_common(1):
        if times > 1:
            raise ShardError(f"{index.path}: more than one shard has the file name {name!r}")
    counted = index.details.get("num_samples", index.num_samples)
    if counted != index.num_samples:
        raise ShardError(
            f"{index.path}: the shards have {index.num_samples} samples in total, but `num_samples` is {counted!r}"
        )


def _parse_shard(label: str, content: Any) -> ShardEntry:
    shard = _mapping(content, label)
    if shard.get("format") != "mds" or shard.get("version") != 2:
        raise ShardError(
            f"{label} has format {shard.get('format')!r} version {shard.get('version')!r}, not 'mds' version 2"
        )
    schema_version = _check_columns(label, shard)
    compression = shard.get("compression")
    if compression is not None and not re.fullmatch(r"zstd(:\d{1,2})?", str(compression)):
        raise ShardError(f"{label} has compression {compression!r}; accepted are none and 'zstd'")
    raw = _parse_file(f"{label} ('raw_data')", shard.get("raw_data"), ".mds")
    compressed = None
    if compression is not None:
        compressed = _parse_file(f"{label} ('zip_data')", shard.get("zip_data"), ".mds.zstd")
    elif shard.get("zip_data") is not None:
        raise ShardError(f"{label} has a compressed file ('zip_data') but no compression")
    samples = _integer(f"{label}: the number of samples", shard.get("samples"), 1, MAX_SAMPLES_PER_SHARD)
    return ShardEntry(schema_version=schema_version, num_samples=samples, raw=raw, compressed=compressed)


def _check_columns(label: str, shard: dict[str, Any]) -> int:
    """Returns the schema version that the columns have."""
    names, encodings = shard.get("column_names"), shard.get("column_encodings")
    if not isinstance(names, list) or not isinstance(encodings, list) or len(names) != len(encodings):
        raise ShardError(f"{label} has no readable list of columns")
    found = {str(name): str(encoding) for name, encoding in zip(names, encodings, strict=True)}
    pickled = sorted(name for name, encoding in found.items() if encoding.startswith("pkl"))
    if pickled:
        raise ShardError(f"{label}: column '{pickled[0]}' is pickled ('pkl') and could run any code; it is refused")
    schema_version = schema_of(found, where=label)
    sizes = [_COLUMN_BYTES.get(encoding) for encoding in found.values()]
    if names != sorted(found) or shard.get("column_sizes") != sizes:
        raise ShardError(f"{label}: order or width of the columns differ from the format")
    return schema_version


def _parse_file(label: str, content: Any, suffix: str) -> ShardFile:
    file = _mapping(content, label)
    name = file.get("basename")
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or ".." in name:
        raise ShardError(
            f"{label} is named {name!r}; accepted are plain file names: no folders, no '..', no absolute paths"
        )
    if not name.endswith(suffix):
        raise ShardError(f"{label} is named {name!r}, which does not end in '{suffix}'")
    num_bytes = _integer(f"{label}: the size of '{name}'", file.get("bytes"), 1, MAX_SHARD_BYTES)
    hashes = _mapping(file.get("hashes"), f"{label}: 'hashes' of '{name}'")
    known = {algorithm: digest for algorithm, digest in hashes.items() if algorithm in HASH_DIGITS}
    for algorithm, digest in known.items():
        if not isinstance(digest, str) or not re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS[algorithm]}}}", digest):
            raise ShardError(
                f"{label}: the {algorithm} of '{name}' is {digest!r}; accepted are {HASH_DIGITS[algorithm]} "
                "hexadecimal digits"
            )
    if not known:
        raise ShardError(
            f"{label}: '{name}' has no hash; one of {', '.join(HASH_DIGITS)} is required to verify the file"
        )
    return ShardFile(name=name, num_bytes=num_bytes, hashes=known)


def _mapping(content: Any, label: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ShardError(f"{label} is not a JSON object")
    return content


def _integer(label: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ShardError(f"{label} is {value!r}; accepted are {least} to {most}")
    return value
