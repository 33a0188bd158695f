"""Colours of a dancer's surfaces: cloth patterns, a painted face, and light that shows the shape.

Patterns are averaged over a pixel's own size in closed form, so that they fade instead of flickering when small.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.dancers.body import HAIR, HEAD, SKIN, Identity, Pattern, Skins

_Array = NDArray[np.floating[Any]]

_EYE_WHITE, _EYE_DARK, _LIPS = (0.95, 0.95, 0.94), (0.10, 0.07, 0.06), (0.66, 0.30, 0.29)


@dataclass(frozen=True)
class Light:
    """One lamp and the light from all around; directions in camera space."""

    direction: _Array  # (3,) unit, towards the lamp
    up: _Array  # (3,) unit
    lamp: _Array  # (3,) colour
    ambient: _Array  # (3,) colour


def pattern_share(pattern: Pattern, u: _Array, v: _Array, width_u: _Array, width_v: _Array) -> _Array:
    """How much of the second colour a pattern shows, in [0,1].

    Args:
        pattern: the pattern's kind.
        u, v: coordinates across and along, in repeats.
        width_u, width_v: a pixel's size in repeats.
    """
    if pattern == "plain":
        return np.zeros_like(u)
    if pattern == "rings":
        return _square_wave(v, width_v)
    if pattern == "stripes":
        return _square_wave(u, width_u)
    if pattern == "dots":
        row = np.floor(v)
        across, along = u + 0.5 * (row % 2), v - row - 0.5
        across = across - np.floor(across) - 0.5
        return np.clip((0.30 - np.sqrt(across**2 + along**2)) / np.maximum(width_u, width_v) + 0.5, 0.0, 1.0)
    first, second = _square_wave(u, width_u), _square_wave(v, width_v)
    if pattern == "checks":
        return first + second - 2 * first * second
    return 0.5 * (first + second)


def _square_wave(position: _Array, width: _Array) -> _Array:
    """A wave of 0 and 1, half each, averaged over `width`."""
    edge = np.abs(position - np.floor(position) - 0.5) - 0.25
    return np.clip(edge / np.maximum(width, 1e-6) + 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class SkinTable:
    """Skins in camera space, one row for each frame and part."""

    values: _Array  # (12, f * parts) float32: the frame's columns, the origin
    radii: _Array
    below: _Array
    above: _Array
    cuts: _Array
    num_parts: int


def tabulate_skins(skins: Skins, position: _Array, rotation: _Array) -> SkinTable:
    """Moves skins to camera space; arguments as for `to_camera`."""
    origins = (np.stack(skins.origins, axis=1) - position) @ rotation.T
    frames = rotation @ np.stack(skins.frames, axis=1)
    num_parts = origins.shape[1]
    columns = np.swapaxes(frames, -1, -2).reshape(-1, 9)
    values = np.concatenate([columns, origins.reshape(-1, 3)], axis=-1).T
    return SkinTable(
        values=np.ascontiguousarray(values, dtype=np.float32),
        radii=np.array(skins.radii, dtype=np.float32),
        below=np.array(skins.below),
        above=np.array(skins.above),
        cuts=np.array(skins.cuts, dtype=np.float32),
        num_parts=num_parts,
    )


def surface_colours(
    table: SkinTable, identity: Identity, rows: NDArray[np.signedinteger[Any]], points: _Array, pixel_size: float
) -> tuple[_Array, _Array]:
    """Unlit colours of points on the body.

    Args:
        table: the skins in the frames shown.
        identity: the person, who has the materials.
        rows: `(n,)` row of the table for each point.
        points: `(3, n)` float32 in camera space.
        pixel_size: size of one pixel at a distance of one metre, in metres.

    Returns:
        Colours `(3, n)` and gloss `(n,)`.
    """
    values = np.take(table.values, rows, axis=1)
    x, y, z = points - values[9:]
    across = values[0] * x + values[1] * y + values[2] * z
    along = values[3] * x + values[4] * y + values[5] * z
    ahead = values[6] * x + values[7] * y + values[8] * z
    parts = rows % table.num_parts
    materials = np.where(along < table.cuts[parts], table.below[parts], table.above[parts])
    size = -points[2] * pixel_size
    colours = np.empty_like(points)
    gloss = np.empty_like(size)
    for number, material in enumerate(identity.materials):
        here = np.flatnonzero(materials == number)
        first, second = (np.array(c, dtype=np.float32)[:, None] for c in (material.colour, material.second))
        gloss[here] = material.gloss
        if material.pattern == "plain":
            colours[:, here] = first
            continue
        repeats = material.repeats
        u = np.arctan2(across[here], ahead[here]) * (table.radii[parts[here]] * repeats)
        width = size[here] * repeats
        share = pattern_share(material.pattern, u, along[here] * repeats, width, width)
        colours[:, here] = first + (second - first) * share
    face = np.flatnonzero((parts == HEAD) & (ahead > 0.0))
    if len(face):
        skin = np.array(identity.materials[SKIN].colour, dtype=np.float32)
        colours[:, face] = _paint_face(across[face], along[face], size[face] / identity.body.head, skin, identity)
    return colours, gloss


def _paint_face(x: _Array, y: _Array, size: _Array, skin: _Array, identity: Identity) -> _Array:
    """Eyes, brows, cheeks and mouth on the front of the head; x, y and pixel size in its own measures."""
    brows = np.array(identity.materials[HAIR].colour, dtype=np.float32) * 0.7
    lips = 0.55 * np.array(_LIPS, dtype=np.float32) + 0.45 * skin
    # Colour, strength, then an ellipse, mirrored: its centre, its radii, and how much it bends upwards at the sides.
    features = (
        (skin * (1.0, 0.72, 0.70), 0.35, 0.042, -0.032, 0.020, 0.016, 0.0),
        (_EYE_WHITE, 1.0, 0.0315, 0.004, 0.0145, 0.0075, 0.0),
        (_EYE_DARK, 1.0, 0.0315, 0.0045, 0.0068, 0.0072, 0.0),
        (brows, 1.0, 0.0320, 0.0275, 0.0185, 0.0040, 0.0),
        (lips, 1.0, 0.0, -0.0705, 0.0240, 0.0085, 8.0),
        (skin * 0.45, 0.8, 0.0, -0.0695, 0.0210, 0.0018, 8.0),
    )
    colours = np.repeat(skin[:, None], len(x), axis=1)
    mirrored = np.abs(x)
    for colour, strength, centre_x, centre_y, radius_x, radius_y, bend in features:
        height = y - centre_y - bend * mirrored**2
        radius = np.sqrt(((mirrored - centre_x) / radius_x) ** 2 + (height / radius_y) ** 2)
        share = strength * np.clip((1.0 - radius) / np.maximum(size / radius_y, 1e-6) + 0.5, 0.0, 1.0)
        colours += (np.asarray(colour, dtype=np.float32)[:, None] - colours) * share
    return colours


def shade(colours: _Array, gloss: _Array, normals: _Array, points: _Array, light: Light) -> _Array:
    """Lights colours `(3, n)` at points `(3, n)` with normals `(3, n)`: lamp, sky and floor, shine, a bright rim."""
    to_lamp = light.direction.astype(np.float32)
    facing = to_lamp @ normals
    diffuse = np.maximum(0.85 * facing + 0.15, 0.0)
    height = 0.62 + 0.38 * (light.up.astype(np.float32) @ normals)
    distance = np.sqrt((points**2).sum(axis=0))
    towards_eye = -(normals * points).sum(axis=0) / distance
    halfway_cosine = (facing + towards_eye) / np.sqrt(np.maximum(2 - 2 * (to_lamp @ points) / distance, 1e-6))
    shine = gloss * np.maximum(halfway_cosine, 0.0) ** 16
    rim = 0.16 * (1.0 - np.clip(towards_eye, 0.0, 1.0)) ** 3
    lamp, ambient = (colour.astype(np.float32)[:, None] for colour in (light.lamp, light.ambient))
    return colours * (ambient * height + lamp * diffuse) + (shine + rim * height) * lamp
