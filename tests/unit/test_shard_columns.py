"""Columns of a stored clip: packed values are read back unchanged, and damaged or hostile bytes are refused by name."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from support.older_shards import pack_frames, pack_keypoints

from dreamdance.data.shards import columns
from dreamdance.data.shards.columns import (
    COLUMNS,
    SCHEMA_VERSION,
    check_schema_version,
    encode_disparity,
    encode_normal,
    metric_disparity,
    read_frame_format,
    schema_of,
    unpack_frames,
    unpack_keypoints,
)
from dreamdance.data.shards.frame_codecs import MAX_FRAME_PIXELS, frame_format
from dreamdance.data.shards.tracks import MAX_FRAMES, TRACK_COLUMNS, TrackWriter
from dreamdance.errors import ShardError
from dreamdance.media.transforms import decode_normals, pictures_to_tensor
from dreamdance.modalities import MODALITIES, Modality

HEADER_SIZE, ENTRY_SIZE = 20, 8


def noise(shape: tuple[int, ...], dtype: type, count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (count, *shape), dtype=dtype, endpoint=True)


@pytest.mark.parametrize(("shape", "dtype"), [((7, 5, 3), np.uint8), ((7, 5), np.uint16), ((1, 1), np.uint8)])
def test_packed_frames_are_read_back_without_loss(shape: tuple[int, ...], dtype: type) -> None:
    frames = noise(shape, dtype)
    data = pack_frames(list(frames))
    unpacked = unpack_frames(data)
    assert unpacked.dtype == frames.dtype
    assert np.array_equal(unpacked, frames)
    kind = read_frame_format(data)
    assert (kind.num_frames, kind.height, kind.width) == (5, *shape[:2])
    assert kind.frame_shape == shape


def test_chosen_frames_are_returned_in_the_requested_order() -> None:
    frames = noise((4, 6, 3), np.uint8)
    assert np.array_equal(unpack_frames(pack_frames(list(frames)), [3, 0, 3]), frames[[3, 0, 3]])
    assert unpack_frames(pack_frames(list(frames)), []).shape == (0, 4, 6, 3)


def test_reading_a_window_does_not_decode_the_other_frames() -> None:
    frames = noise((4, 6, 3), np.uint8)
    data = bytearray(pack_frames(list(frames)))
    data[-3] ^= 0xFF  # damages the last frame alone
    assert np.array_equal(unpack_frames(bytes(data), [0, 1]), frames[:2])
    with pytest.raises(ShardError, match="frame 4 does not match its checksum"):
        unpack_frames(bytes(data), where="clip a, rgb")


def test_every_single_damaged_byte_is_detected() -> None:
    frames = list(noise((3, 4), np.uint16, count=2))
    data = pack_frames(frames)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        with pytest.raises(ShardError, match="clip a, depth"):
            unpack_frames(bytes(damaged), where="clip a, depth")


def test_every_truncation_is_detected() -> None:
    data = pack_frames(list(noise((3, 4), np.uint8, count=2)))
    for length in range(len(data)):
        with pytest.raises(ShardError, match="clip a"):
            unpack_frames(data[:length], [0], where="clip a, mask")
    with pytest.raises(ShardError, match="clip a"):
        unpack_frames(data + b"x", where="clip a, mask")


def test_claimed_sizes_are_checked_before_memory_is_allocated() -> None:
    def header(height: int, width: int, count: int) -> bytes:
        return struct.pack("<4sBBHIII", b"DDFR", 8, 3, 0, height, width, count) + bytes(64)

    with pytest.raises(ShardError, match=f"claims {MAX_FRAMES + 1} frames"):
        read_frame_format(header(4, 4, MAX_FRAMES + 1))
    with pytest.raises(ShardError, match="claims frames of 4294967295x4294967295"):
        read_frame_format(header(2**32 - 1, 2**32 - 1, 1))
    with pytest.raises(ShardError, match="too few for the table"):
        read_frame_format(header(4, 4, 1000))
    assert MAX_FRAME_PIXELS < 2**31


def test_a_png_larger_than_announced_is_refused_without_decoding_it() -> None:
    _, encoded = cv2.imencode(".png", np.zeros((2000, 2000, 3), np.uint8))
    payload = encoded.tobytes()
    data = struct.pack("<4sBBHIII", b"DDFR", 8, 3, 0, 4, 6, 1)
    data += struct.pack("<II", len(payload), zlib.crc32(payload)) + payload
    with pytest.raises(ShardError, match="not the 6x4 PNG that its clip lists"):
        unpack_frames(data)


def test_a_payload_that_only_begins_like_a_png_is_refused() -> None:
    real = pack_frames(list(noise((4, 6, 3), np.uint8, count=1)))
    payload = real[HEADER_SIZE + ENTRY_SIZE :][:33] + bytes(40)
    data = real[:HEADER_SIZE] + struct.pack("<II", len(payload), zlib.crc32(payload)) + payload
    with pytest.raises(ShardError, match="cannot be decoded"):
        unpack_frames(data)


def test_a_frame_that_is_not_there_is_an_index_error() -> None:
    data = pack_frames(list(noise((4, 6), np.uint8)))
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"frame {index} of 5"):
            unpack_frames(data, [index])


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 4, 4), np.uint8), np.zeros((1, 4, 4, 4), np.uint8), np.zeros((1, 4, 4), np.float32)]
)
def test_frames_that_cannot_be_stored_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"frames?"):
        frame_format(frames)


def test_key_points_are_read_back_exactly() -> None:
    keypoints = np.random.default_rng(0).random((3, 128, 3), dtype=np.float32)
    assert np.array_equal(unpack_keypoints(pack_keypoints(keypoints)), keypoints)


def test_hostile_key_point_arrays_are_refused_without_unpickling_or_allocating() -> None:
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (99_999, 128, 3)})
    wrong = io.BytesIO()
    np.save(wrong, np.zeros((3, 17, 3), np.float32))
    doubles = io.BytesIO()
    np.save(doubles, np.zeros((3, 128, 3)))
    for data in (b"", b"garbage", pickled.getvalue(), huge.getvalue(), wrong.getvalue(), doubles.getvalue()):
        with pytest.raises(ShardError, match="clip a, keypoints"):
            unpack_keypoints(data, where="clip a, keypoints")


def test_key_points_that_are_not_finite_are_refused() -> None:
    keypoints = np.zeros((2, 128, 3), np.float32)
    keypoints[1, 4, 0] = np.nan
    with pytest.raises(ShardError, match="not finite"):
        unpack_keypoints(pack_keypoints(keypoints))


def test_key_points_of_another_shape_are_not_stored() -> None:
    with pytest.raises(ValueError, match=r"expected \(frames, 128, 3\)"):
        TrackWriter().add_keypoints("clip", np.zeros((2, 18, 3)))


def test_a_wall_facing_the_camera_is_the_colour_128_128_255() -> None:
    assert encode_normal(np.array([0.0, 0.0, 1.0])).tolist() == [128, 128, 255]
    assert encode_normal(np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])).tolist() == [[255, 128, 128], [128, 0, 128]]


def test_normals_survive_eight_bits_to_half_a_degree() -> None:
    normals = np.random.default_rng(0).normal(size=(5000, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    pictures = pictures_to_tensor(encode_normal(normals)[:, None, None, :])
    decoded = decode_normals(pictures)[..., 0, 0].numpy()
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=-1), 1.0, rtol=1e-6)
    assert np.degrees(np.arccos((decoded * normals).sum(-1).clip(-1, 1))).max() < 0.5


def test_disparity_is_bright_where_it_is_near_and_uses_all_sixteen_bits() -> None:
    depth = np.random.default_rng(0).uniform(1.5, 9.0, (3, 8, 6)).astype(np.float32)
    encoded, (low, high) = encode_disparity(depth)
    assert encoded.dtype == np.uint16
    assert (encoded.min(), encoded.max()) == (0, 65535)
    assert encoded.ravel()[depth.argmin()] == 65535
    assert low == pytest.approx(1 / depth.max(), rel=1e-6)
    assert high == pytest.approx(1 / depth.min(), rel=1e-6)
    # Half a step of disparity is the largest error; in metres it is largest for far points.
    step = (high - low) / 65535
    np.testing.assert_allclose(metric_disparity(encoded / 65535, (low, high)), 1 / depth, rtol=0, atol=0.51 * step)


def test_disparity_is_normalised_over_the_clip_not_over_each_frame() -> None:
    depth = np.stack([np.full((2, 2), metres, np.float32) for metres in (2.0, 4.0, 8.0)])
    encoded, _ = encode_disparity(depth)
    assert [int(frame[0, 0]) for frame in encoded] == [65535, 21845, 0]


def test_a_flat_depth_encodes_to_one_value() -> None:
    encoded, depth_range = encode_disparity(np.full((1, 2, 2), 4.0, np.float32))
    assert np.array_equal(metric_disparity(encoded / 65535, depth_range), np.full((1, 2, 2), 0.25))


@pytest.mark.parametrize("hole", [0.0, -1.0, np.nan, np.inf])
def test_depth_with_holes_is_refused(hole: float) -> None:
    depth = np.ones((1, 2, 2), np.float32)
    depth[0, 1, 1] = hole
    with pytest.raises(ValueError, match="positive and finite"):
        encode_disparity(depth)


def test_columns_other_than_ours_are_refused_by_name() -> None:
    assert schema_of(COLUMNS, where="shards") == 1
    assert schema_of(TRACK_COLUMNS, where="shards") == 2
    with pytest.raises(ShardError, match=r"version 2, .*frames is missing; rgb is unknown"):
        schema_of({"clip": "bytes", "clip_id": "str", "schema_version": "int", "rgb": "bytes"}, where="shards")
    foreign = {**COLUMNS, "image": "jpeg", "fps": "str"}
    del foreign["normal"]
    with pytest.raises(ShardError, match=r"shards: .*normal is missing; image is unknown; fps is str, not float64"):
        schema_of(foreign, where="shards")


def test_shards_may_lack_the_column_of_a_modality_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {"edges": Modality("edges", "values", channels=1, control=True)}
    monkeypatch.setattr(columns, "MODALITIES", {**MODALITIES, **later})
    monkeypatch.setattr(columns, "COLUMNS", {**COLUMNS, "edges": "bytes"})
    schema_of(COLUMNS, where="shards of before")
    schema_of({**COLUMNS, "edges": "bytes"}, where="shards of now")
    with pytest.raises(ShardError, match="edges is jpeg, not bytes"):
        schema_of({**COLUMNS, "edges": "jpeg"}, where="shards")


def test_pictures_of_one_number_per_pixel_are_stored_over_the_whole_range() -> None:
    greys = np.uint8([0, 127, 128, 255]).reshape(1, 1, 4, 1).repeat(3, axis=-1)
    depth, mask = (columns.encode_grey(greys, MODALITIES[name]) for name in ("depth", "mask"))
    assert (depth.dtype, depth.ravel().tolist()) == (np.uint16, [0, 127 * 257, 128 * 257, 65535])
    assert (mask.dtype, mask.ravel().tolist()) == (np.uint8, [0, 0, 255, 255])


def test_another_schema_version_is_refused_with_what_to_do() -> None:
    check_schema_version(SCHEMA_VERSION, where="shards")
    with pytest.raises(
        ShardError, match=rf"version {SCHEMA_VERSION + 1}, this code reads 1 to {SCHEMA_VERSION}; run `prepare`"
    ):
        check_schema_version(SCHEMA_VERSION + 1, where="shards")
