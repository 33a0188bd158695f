"""Shards of schema 1, as `prepare` wrote them before; the code of this repository only reads them."""

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.data.shards.columns import COLUMNS
from dreamdance.data.shards.mds import MDSWriter
from dreamdance.data.writing.clip_record import ClipRecord
from dreamdance.modalities import MODALITIES
from dreamdance.recipe.sections import Shards
from support.random_shards import random_clip


def pack_frames(frames: Sequence[NDArray[Any]]) -> bytes:
    """Frames of one shape and type as a column: a header, a table of sizes and checksums, and PNG files."""
    first = np.asarray(frames[0])
    payloads = []
    for frame in frames:
        done, encoded = cv2.imencode(".png", frame if frame.ndim == 2 else frame[..., ::-1])
        assert done
        payloads.append(encoded.tobytes())
    channels = 1 if first.ndim == 2 else 3
    header = struct.pack("<4sBBHIII", b"DDFR", first.dtype.itemsize * 8, channels, 0, *first.shape[:2], len(frames))
    table = b"".join(struct.pack("<II", len(payload), zlib.crc32(payload)) for payload in payloads)
    return b"".join([header, table, *payloads])


def pack_keypoints(keypoints: NDArray[Any]) -> bytes:
    """Key points `(f, 128, 3)` as the bytes of an .npy file of little-endian float32."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(keypoints, dtype="<f4"), allow_pickle=False)
    return buffer.getvalue()


def older_sample(record: ClipRecord) -> dict[str, Any]:
    """A clip as the columns of schema 1."""
    num_frames, height, width = record.maps["rgb"].shape[:3]
    sample: dict[str, Any] = {
        "schema_version": 1,
        "clip_id": record.clip_id,
        "num_frames": num_frames,
        "width": width,
        "height": height,
        "fps": float(record.fps),
        "metadata": json.dumps(record.metadata, sort_keys=True),
        "keypoints": b"" if record.keypoints is None else pack_keypoints(record.keypoints),
    }
    return {**sample, **{n: pack_frames(list(record.maps[n])) if n in record.maps else b"" for n in MODALITIES}}


def write_older_shards(
    folder: Path, num_clips: int = 12, *, compression: str = "none", clips_per_part: int = 4, **options: Any
) -> Shards:
    """Writes the clips of `write_random_shards` as schema 1, with the same names of shards."""
    write_older_records(
        folder, [random_clip(seed, **options) for seed in range(num_clips)], compression, clips_per_part
    )
    return Shards(local=str(folder))


def write_older_records(
    folder: Path, records: Sequence[ClipRecord], compression: str = "none", clips_per_part: int = 4
) -> None:
    """Writes clips as schema 1, `clips_per_part` to a shard."""
    folder.mkdir(parents=True)
    shards: list[Mapping[str, Any]] = []
    for start in range(0, len(records), clips_per_part):
        part, name = folder / "part", f"part_{start:05d}"
        with MDSWriter(
            columns=COLUMNS,
            out=str(part),
            compression=None if compression == "none" else compression,
            hashes=["sha1", "xxh64"],
        ) as writer:
            for record in records[start : start + clips_per_part]:
                writer.write(older_sample(record))
        for shard in json.loads((part / "index.json").read_text())["shards"]:
            for file in (shard["raw_data"], shard["zip_data"]):
                if file is not None:
                    path, file["basename"] = part / file["basename"], f"{name}.{file['basename']}"
                    if path.exists():
                        path.rename(folder / file["basename"])
            shards.append(shard)
        (part / "index.json").unlink()
        part.rmdir()
    details = {"schema_version": 1, "num_samples": len(records), "settings": {"clips": len(records)}}
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards, "dreamdance": details}))
