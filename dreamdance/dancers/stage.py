"""The stage of a procedural dancer: floor and walls of exact geometry, the lamp, the camera, soft shadows.

Floor and walls do not move, so that they are drawn once per clip.
"""

import colorsys
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.dancers.body import Pattern
from dreamdance.dancers.motion import Skeleton
from dreamdance.dancers.shading import Light, pattern_share

_Array = NDArray[np.floating[Any]]

_BACKDROPS: tuple[Pattern, ...] = ("plain", "plain", "stripes", "rings", "checks", "gingham", "dots")
_FLOORS: tuple[Pattern, ...] = ("plain", "stripes", "checks", "checks", "gingham")
_SKIRTING_HEIGHT = 0.10
_SHADOW_CELL = 0.035  # metres
_SHADOW_CELLS = 128
_FILL = 0.94  # share of the picture that the dance may take


@dataclass(frozen=True)
class Plane:
    """A floor or wall in world space: unit normal n, points p with n . p = offset, and its pattern along two axes."""

    normal: _Array
    offset: float
    across: _Array
    along: _Array
    pattern: Pattern
    colour: _Array
    second: _Array
    repeats: tuple[float, float]
    skirting: _Array | None = None


@dataclass(frozen=True)
class Stage:
    """Planes, lamp (direction and colours in world space) and the preferred position of the camera."""

    planes: tuple[Plane, ...]
    to_lamp: _Array
    lamp: _Array
    ambient: _Array
    eye: _Array


@dataclass(frozen=True)
class Camera:
    """position `(3,)`, rotation `(3, 3)` from world to camera axes (x right, y up, z towards the camera)."""

    position: _Array
    rotation: _Array

    def to_camera(self, points: _Array) -> _Array:
        """Moves world points `(..., 3)` to camera space."""
        return (points - self.position) @ self.rotation.T


@dataclass(frozen=True)
class Backdrop:
    """The empty stage as the camera sees it; constant over a clip.

    colours: `(H, W, 3)` float32, lit. normals: `(H, W, 3)` float32. depths: `(H, W)` float32. shadow_map: `(H, W, 2)`
    float32, where each pixel lies in the lamp's own view, in cells.
    """

    colours: _Array
    normals: _Array
    depths: _Array
    shadow_map: _Array


def draw_stage(generator: np.random.Generator, points: _Array) -> Stage:
    """Draws a stage for a dance.

    Args:
        generator: the source of every random number.
        points: `(n, 3)` world points of the dancer, who must not touch a wall.
    """
    hue = generator.uniform()
    turn = generator.choice([0.0, generator.uniform(-0.6, 0.6)], p=[0.3, 0.7])
    walls = [_draw_wall(generator, turn, hue, points)]
    if generator.uniform() < 0.3:
        walls.append(_draw_wall(generator, turn - np.sign(turn or 1.0) * np.pi / 2, hue, points))
    azimuth, elevation = generator.uniform(0.25, 0.9) * generator.choice([-1.0, 1.0]), generator.uniform(0.6, 1.0)
    warmth = generator.uniform(-0.06, 0.08)
    strength = generator.uniform(0.62, 0.78)
    return Stage(
        planes=(_draw_floor(generator, hue), *walls),
        to_lamp=np.array([np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)]),
        lamp=strength * np.array([1 + warmth, 1.0, 1 - warmth]),
        ambient=(1.16 - strength) * np.array([1 - 0.7 * warmth, 1.0, 1 + 0.7 * warmth]),
        eye=np.array([generator.uniform(-0.3, 0.3), generator.uniform(0.75, 1.5), generator.uniform(3.4, 5.2)]),
    )


def _draw_wall(generator: np.random.Generator, turn: float, hue: float, points: _Array) -> Plane:
    normal = np.array([np.sin(turn), 0.0, np.cos(turn)])
    clearance = 0.2 - float((points @ normal).min())
    offset = -max(generator.uniform(0.8, 2.2), clearance)
    base, second = _two_tones(generator, hue, lightness=(0.34, 0.8), contrast=0.13, saturation=(0.08, 0.5))
    return Plane(
        normal=normal, offset=offset,
        across=np.array([np.cos(turn), 0.0, -np.sin(turn)]), along=np.array([0.0, 1.0, 0.0]),
        pattern=_BACKDROPS[generator.integers(len(_BACKDROPS))], colour=base, second=second,
        repeats=(float(generator.uniform(1.5, 4.0)),) * 2, skirting=0.5 * base + 0.45,
    )  # fmt: skip


def _draw_floor(generator: np.random.Generator, hue: float) -> Plane:
    floor_hue = generator.choice([hue, 0.08, 0.09, 0.6])
    base, second = _two_tones(generator, floor_hue, lightness=(0.28, 0.6), contrast=0.12, saturation=(0.1, 0.45))
    turn = generator.uniform(-0.8, 0.8)
    repeats = float(generator.uniform(1.0, 2.6))
    return Plane(
        normal=np.array([0.0, 1.0, 0.0]), offset=0.0, across=np.array([np.cos(turn), 0.0, np.sin(turn)]),
        along=np.array([-np.sin(turn), 0.0, np.cos(turn)]), pattern=_FLOORS[generator.integers(len(_FLOORS))],
        colour=base, second=second, repeats=(repeats, repeats),
    )  # fmt: skip


def _two_tones(
    generator: np.random.Generator, hue: float, *, lightness: tuple[float, float], contrast: float,
    saturation: tuple[float, float],
) -> tuple[_Array, _Array]:  # fmt: skip
    level, depth = generator.uniform(*lightness), generator.uniform(*saturation)
    other = level - contrast if level > 0.5 else level + contrast
    return np.array(colorsys.hls_to_rgb(hue, level, depth)), np.array(colorsys.hls_to_rgb(hue, other, depth))


def aim_camera(eye: _Array, points: _Array) -> Camera:
    """Turns a camera at `eye` `(3,)` so that world points `(n, 3)` lie around the middle of its picture."""
    target = points.mean(axis=0)
    for _ in range(3):
        back = eye - target
        back = back / np.linalg.norm(back)
        right = np.cross([0.0, 1.0, 0.0], back)
        right = right / np.linalg.norm(right)
        rotation = np.stack([right, np.cross(back, right), back])
        seen = (points - eye) @ rotation.T
        directions = seen[:, :2] / -seen[:, 2:]
        middle = 0.5 * (directions.min(axis=0) + directions.max(axis=0))
        target = eye + np.array([*middle, -1.0]) @ rotation * np.linalg.norm(eye - target)
    return Camera(eye, rotation)


def fit_focal(bounds: _Array, width: int, height: int) -> float:
    """The focal length in pixels that keeps ray directions within `bounds` `(..., 4)` (x, x, y, y) in the picture."""
    largest = np.abs(bounds.reshape(-1, 4)).max(axis=0)
    return 0.5 * _FILL * min(width / max(largest[0], largest[1]), height / max(largest[2], largest[3]))


def camera_light(stage: Stage, camera: Camera) -> Light:
    """The stage's lamp in camera space."""
    return Light(
        direction=camera.rotation @ stage.to_lamp,
        up=camera.rotation @ np.array([0.0, 1.0, 0.0]),
        lamp=stage.lamp,
        ambient=stage.ambient,
    )


def pixel_directions(focal: float, width: int, height: int) -> _Array:
    """Rays d = (x, y, -1) through the pixel centres, `(H, W, 3)` float64."""
    x = (np.arange(width) + 0.5 - width / 2) / focal
    y = (height / 2 - 0.5 - np.arange(height)) / focal
    rays = np.full((height, width, 3), -1.0)
    rays[..., 0], rays[..., 1] = x, y[:, None]
    return rays


def see_planes(stage: Stage, camera: Camera, rays: _Array) -> tuple[_Array, _Array]:
    """Depth along rays `(H, W, 3)` to the nearest plane, `(H, W)`, and which plane it is, `(H, W)`."""
    depths = []
    for plane in stage.planes:
        facing = rays @ (camera.rotation @ plane.normal)
        distance = plane.offset - float(plane.normal @ camera.position)
        with np.errstate(divide="ignore"):
            depths.append(np.where(facing < 0, distance / facing, np.inf))
    which = np.argmin(depths, axis=0)
    return np.min(depths, axis=0), which


def build_backdrop(stage: Stage, camera: Camera, *, focal: float, width: int, height: int, samples: int) -> Backdrop:
    """Draws the empty stage; colours are means of `samples` x `samples` rays per pixel, the rest is at its centre."""
    depths, which = see_planes(stage, camera, rays := pixel_directions(focal, width, height))
    normals = np.stack([camera.rotation @ plane.normal for plane in stage.planes])[which]
    world = (rays * depths[..., None]) @ camera.rotation + camera.position
    basis = _lamp_basis(stage.to_lamp)
    shadow_map = (world @ basis.T - basis @ _SHADOW_CENTRE) / _SHADOW_CELL + _SHADOW_CELLS / 2
    colours = _plane_colours(stage, camera, pixel_directions(focal * samples, width * samples, height * samples))
    return Backdrop(
        colours=np.asarray(cv2.resize(colours, (width, height), interpolation=cv2.INTER_AREA), dtype=np.float32),
        normals=normals.astype(np.float32),
        depths=depths.astype(np.float32),
        shadow_map=shadow_map.astype(np.float32),
    )


def _plane_colours(stage: Stage, camera: Camera, rays: _Array) -> _Array:
    """Lit colours along rays `(H, W, 3)`: `(H, W, 3)` float32. The light is a spot that fades towards the edges."""
    depths, which = see_planes(stage, camera, rays)
    world = ((rays * depths[..., None]) @ camera.rotation + camera.position).astype(np.float32)
    distance = np.linalg.norm(world - np.array([0.0, 0.8, 0.0], dtype=np.float32), axis=-1)
    spot = 0.72 + 0.42 / (1.0 + (distance / 2.2) ** 4)
    height = world[..., 1]
    skirting = np.clip((_SKIRTING_HEIGHT - height) / np.maximum(_step(height), 1e-6) + 0.5, 0.0, 1.0)
    colours = np.empty(rays.shape, dtype=np.float32)
    for number, plane in enumerate(stage.planes):
        here = which == number
        u, v = (
            world @ (axis * repeats).astype(np.float32)
            for axis, repeats in zip((plane.across, plane.along), plane.repeats, strict=True)
        )
        share = pattern_share(plane.pattern, u[here], v[here], _step(u)[here], _step(v)[here])
        lit = stage.ambient + stage.lamp * max(float(plane.normal @ stage.to_lamp), 0.0) * 1.15
        colour, second = (tone.astype(np.float32) for tone in (plane.colour, plane.second))
        shown = colour + (second - colour) * share[:, None]
        if plane.skirting is not None:
            shown += (plane.skirting.astype(np.float32) - shown) * skirting[here][:, None]
        colours[here] = shown * spot[here][:, None] * lit.astype(np.float32)
    return colours


def _step(values: _Array) -> _Array:
    """The change of values `(H, W)` from pixel to pixel."""
    return np.abs(np.gradient(values, axis=0)) + np.abs(np.gradient(values, axis=1))


_SHADOW_CENTRE = np.array([0.0, 0.9, 0.0])


def _lamp_basis(to_lamp: _Array) -> _Array:
    right = np.cross([0.0, 1.0, 0.0], to_lamp)
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(to_lamp, right)])


def cast_shadows(stage: Stage, skeleton: Skeleton, girth: float, backdrop: Backdrop) -> _Array:
    """The share of the lamp's light that the dancer blocks at each pixel of the backdrop: `(f, H, W)` float32 in [0,1].

    The function draws the silhouette from the lamp's position, softens it, and reads it where each pixel lies.
    """
    basis = _lamp_basis(stage.to_lamp)
    segments = [(skeleton.pelvis, skeleton.neck, 0.13), (skeleton.head, skeleton.head, 0.095)]
    for side in (0, 1):
        foot = skeleton.ankles[side] + skeleton.foot_frames[side] @ np.array([0.0, -0.05, 0.12])
        segments += [
            (skeleton.shoulders[side], skeleton.elbows[side], 0.05),
            (skeleton.elbows[side], skeleton.wrists[side], 0.04),
            (skeleton.wrists[side], skeleton.wrists[side] + 0.12 * skeleton.hand_frames[side][:, :, 1], 0.035),
            (skeleton.hips[side], skeleton.knees[side], 0.075),
            (skeleton.knees[side], skeleton.ankles[side], 0.05),
            (skeleton.ankles[side], foot, 0.04),
        ]
    ends = np.stack([np.stack([start, end], axis=1) for start, end, _ in segments], axis=1)
    cells = ((ends - _SHADOW_CENTRE) @ basis.T / _SHADOW_CELL + _SHADOW_CELLS / 2) * 16
    cells = np.clip(np.rint(cells), -(1 << 14), 1 << 14).astype(np.int32)
    columns, rows = (np.ascontiguousarray(backdrop.shadow_map[..., axis]) for axis in (0, 1))
    shadows = np.empty((len(cells), *backdrop.depths.shape), dtype=np.float32)
    for frame, lines in enumerate(cells):
        silhouette = np.zeros((_SHADOW_CELLS, _SHADOW_CELLS), dtype=np.float32)
        for (start, end), (_, _, radius) in zip(lines.tolist(), segments, strict=True):
            thickness = max(1, round(2 * radius * girth / _SHADOW_CELL))
            cv2.line(silhouette, start, end, (1.0,), thickness, cv2.LINE_8, 4)
        soft = cv2.GaussianBlur(silhouette, (0, 0), 1.6)
        shadows[frame] = cv2.remap(soft, columns, rows, cv2.INTER_LINEAR, borderValue=0.0)
    return shadows
