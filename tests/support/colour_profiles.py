"""ICC profiles written by hand, and the colour arithmetic that they describe, in float64."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Columns: red, green, blue as XYZ under D50 (Bradford), as in the published profiles of Apple and HP.
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
D50 = (0.9642, 1.0, 0.8249)


def to_display_p3(srgb: NDArray[Any]) -> NDArray[Any]:
    """The values that show sRGB colours `... 3` uint8 on a Display P3 screen."""
    share = srgb / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    wide = linear @ (np.linalg.inv(DISPLAY_P3) @ SRGB).T
    wide = wide.clip(0, 1)
    encoded = np.where(wide <= 0.0031308, 12.92 * wide, 1.055 * wide ** (1 / 2.4) - 0.055)
    return np.asarray(np.round(encoded * 255), dtype=np.uint8)


def rgb_profile() -> bytes:
    """Display P3: three primaries and sRGB's curve."""
    parameters = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + b"".join(_fixed(value) for value in parameters)
    columns = {f"{name}XYZ": _xyz(DISPLAY_P3[:, index]) for index, name in enumerate("rgb")}
    return _profile(
        b"mntr", b"RGB ", b"XYZ ", {**columns, **{f"{name}TRC": curve for name in "rgb"}, "wtpt": _xyz(D50)}
    )


def gray_profile(*, gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    return _profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": curve, "wtpt": _xyz(D50)})


def cmyk_profile(*, lab: tuple[float, float, float]) -> bytes:
    """The profile of a printing press on which every mixture of inks gives the same colour."""
    level, a, b = lab
    colour = bytes([round(level * 2.55), round(a + 128), round(b + 128)])
    identity = bytes(range(256))
    matrix = b"".join(_fixed(float(row == column)) for row in range(3) for column in range(3))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + colour * 16 + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": table, "wtpt": _xyz(D50)})


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65_536))


def _xyz(values: NDArray[Any] | tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(_fixed(float(value)) for value in values)


def _profile(device: bytes, space: bytes, connection: bytes, tags: dict[str, bytes]) -> bytes:
    """A profile: header of 128 bytes, table of tags, contents of the tags at multiples of four."""
    table, contents, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += name.encode() + struct.pack(">II", start + len(contents), len(content))
        contents += padded
    size = start + len(contents)
    header = struct.pack(">I4sI", size, bytes(4), 0x04200000) + device + space + connection
    header += bytes(12) + b"acsp" + bytes(28) + b"".join(_fixed(value) for value in D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + contents
