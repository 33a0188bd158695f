"""Exact ray casting of bodies made of quadrics: ellipsoids and round cones (the hull of two spheres).

In camera space every pixel's ray is p = t d with d = (x, y, -1), so that t is the depth itself. For a quadric
F(p) = p'Qp + 2q'p + s the discriminant along a ray is d'Hd with H = qq' - sQ: a conic of the picture plane. Each
picture row cuts it in one interval, found in closed form, so that only pixels that are hit are ever computed, for all
quadrics and frames at once. This module knows nothing of people, colours or light.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.floating[Any]]
_Indices = NDArray[np.signedinteger[Any]]


@dataclass
class ShapeList:
    """Shapes in world space, collected one by one; every array has the frames `f` in front.

    A round cone has its ends a, b `(f, 3)`, radii and a linear map `(f, 3, 3)` that stretches it (the identity: none).
    An ellipsoid has its centre `(f, 3)` and axes `(f, 3, 3)`: columns, each as long as its radius; it may be cut by a
    plane: only points with normal . (p - centre) >= offset stay.
    """

    num_frames: int
    centres: list[_Array] = field(default_factory=list)
    axes: list[_Array] = field(default_factory=list)
    cut_normals: list[_Array] = field(default_factory=list)
    cut_offsets: list[float] = field(default_factory=list)
    ellipsoid_skins: list[int] = field(default_factory=list)
    starts: list[_Array] = field(default_factory=list)
    ends: list[_Array] = field(default_factory=list)
    start_radii: list[float] = field(default_factory=list)
    end_radii: list[float] = field(default_factory=list)
    stretches: list[_Array] = field(default_factory=list)
    cone_skins: list[int] = field(default_factory=list)

    def add_ellipsoid(
        self, skin: int, centre: _Array, axes: _Array, *, cut_normal: _Array | None = None, cut_offset: float = 0.0
    ) -> None:
        """Adds an ellipsoid. `skin` is the caller's own number for it, returned with every hit."""
        self.ellipsoid_skins.append(skin)
        self.centres.append(centre)
        self.axes.append(axes)
        self.cut_normals.append(np.zeros_like(centre) if cut_normal is None else cut_normal)
        self.cut_offsets.append(-1.0 if cut_normal is None else cut_offset)

    def add_sphere(self, skin: int, centre: _Array, radius: float, *, stretch: _Array | None = None) -> None:
        """Adds a sphere; the linear map `stretch` turns it into an ellipsoid."""
        linear = np.eye(3) if stretch is None else stretch
        self.add_ellipsoid(skin, centre, np.broadcast_to(linear * radius, (self.num_frames, 3, 3)))

    def add_cone(
        self, skin: int, start: _Array, end: _Array, start_radius: float, end_radius: float, *,
        stretch: _Array | None = None,
    ) -> None:  # fmt: skip
        """Adds the side of a round cone, without the spheres (`add_sphere`) that close and join cones."""
        linear = np.eye(3) if stretch is None else stretch
        self.cone_skins.append(skin)
        self.starts.append(start)
        self.ends.append(end)
        self.start_radii.append(start_radius)
        self.end_radii.append(end_radius)
        self.stretches.append(np.broadcast_to(linear, (self.num_frames, 3, 3)))


@dataclass(frozen=True)
class Quadrics:
    """`k` quadrics in `f` frames, in camera space, float64.

    F(p) = (p-c)'Q(p-c) + 2q'(p-c) + s, negative inside; a point counts if 0 <= n'(p-c) + o <= 1.
    bounds: `(f, k, 4)` the smallest and largest x, then y, of rays d = (x, y, -1) that meet it. skins: `(k,)`.
    """

    centres: _Array
    matrices: _Array
    linears: _Array
    constants: _Array
    cut_normals: _Array
    cut_offsets: _Array
    bounds: _Array
    skins: _Indices

    def frames(self, chosen: slice) -> "Quadrics":
        """The same quadrics in some of the frames."""
        return replace(
            self, **{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__ if name != "skins"}
        )


def leave_out(quadrics: Quadrics, absent: NDArray[np.bool_]) -> Quadrics:
    """The same quadrics, of which no ray hits those that are absent, `(f, k)`."""
    nowhere = np.array([np.inf, -np.inf, np.inf, -np.inf])
    return replace(quadrics, bounds=np.where(absent[..., None], nowhere, quadrics.bounds))


def to_camera(shapes: ShapeList, position: _Array, rotation: _Array, *, sideless: bool = False) -> Quadrics:
    """Turns shapes into quadrics of camera space.

    Args:
        shapes: the shapes in world space.
        position: the camera's position `(3,)`.
        rotation: the rotation `(3, 3)` from world to camera axes (x right, y up, z towards the camera).
        sideless: whether round cones may have no side in some frames, because one of their spheres holds the other.
            No ray hits them there.

    Raises:
        ValueError: a round cone has no side, and `sideless` is false.
    """
    parts = []
    if shapes.centres:
        parts.append(_ellipsoid_quadrics(shapes, position, rotation))
    if shapes.starts:
        parts.append(_cone_quadrics(shapes, position, rotation, sideless))
    joined = (
        np.concatenate([getattr(part, name) for part in parts], axis=0 if name == "skins" else 1)
        for name in Quadrics.__dataclass_fields__
    )
    return Quadrics(*joined)


def _ellipsoid_quadrics(shapes: ShapeList, position: _Array, rotation: _Array) -> Quadrics:
    centres = (np.stack(shapes.centres, axis=1) - position) @ rotation.T
    axes = rotation @ np.stack(shapes.axes, axis=1)
    inverse = np.linalg.inv(axes)
    offsets = np.broadcast_to(np.array(shapes.cut_offsets), centres.shape[:2])
    return Quadrics(
        centres=centres,
        matrices=np.swapaxes(inverse, -1, -2) @ inverse,
        linears=np.zeros_like(centres),
        constants=np.full(centres.shape[:2], -1.0),
        cut_normals=np.stack(shapes.cut_normals, axis=1) @ rotation.T,
        # With no plane the normal is zero and the offset -1: a value of 1, which counts. Lengths stay far below 1.
        cut_offsets=-offsets,
        bounds=_ellipsoid_bounds(centres, axes),
        skins=np.array(shapes.ellipsoid_skins),
    )


def _cone_quadrics(shapes: ShapeList, position: _Array, rotation: _Array, sideless: bool) -> Quadrics:
    starts, ends = np.stack(shapes.starts, axis=1), np.stack(shapes.ends, axis=1)
    radii, end_radii = np.array(shapes.start_radii), np.array(shapes.end_radii)
    linear = rotation @ np.stack(shapes.stretches, axis=1)
    inverse = np.linalg.inv(linear)
    transposed = np.swapaxes(inverse, -1, -2)
    spans = np.einsum("fkij,fkj->fki", inverse, (ends - starts) @ rotation.T)
    taper = radii - end_radii
    length = (spans**2).sum(axis=-1)
    side = length - taper**2
    without = side <= 0
    if without.any() and not sideless:
        raise ValueError("a round cone has no side where one of its spheres holds the other")
    side = np.where(without, 1.0, side)
    matrices = side[..., None, None] * np.eye(3) - spans[..., :, None] * spans[..., None, :]
    centres = (starts - position) @ rotation.T
    first = _ellipsoid_bounds(centres, linear * radii[:, None, None])
    second = _ellipsoid_bounds((ends - position) @ rotation.T, linear * end_radii[:, None, None])
    low, high = np.minimum(first, second), np.maximum(first, second)
    cones = Quadrics(
        centres=centres,
        matrices=transposed @ matrices @ inverse,
        linears=np.einsum("fkij,fkj->fki", transposed, spans) * (taper * radii)[:, None],
        constants=-length * radii**2,
        cut_normals=np.einsum("fkij,fkj->fki", transposed, spans) / side[..., None],
        cut_offsets=-(radii * taper) / side,
        bounds=np.stack([low[..., 0], high[..., 1], low[..., 2], high[..., 3]], axis=-1),
        skins=np.array(shapes.cone_skins),
    )
    return leave_out(cones, without) if without.any() else cones


def _ellipsoid_bounds(centres: _Array, axes: _Array) -> _Array:
    """The x and y that rays d = (x, y, -1) to an ellipsoid span: where planes through the camera touch it."""
    bounds = []
    depth, depth_row = centres[..., 2], axes[..., 2, :]
    for axis in (0, 1):
        row = axes[..., axis, :]
        a = depth**2 - (depth_row**2).sum(axis=-1)
        b = centres[..., axis] * depth - (row * depth_row).sum(axis=-1)
        c = centres[..., axis] ** 2 - (row**2).sum(axis=-1)
        root = np.sqrt(np.maximum(b * b - a * c, 0.0))
        bounds += [(-b - root) / a, (-b + root) / a]
    return np.stack(bounds, axis=-1)


@dataclass(frozen=True)
class Hits:
    """The nearest hit of every pixel that has one, ordered by pixel.

    pixels: `(n,)` index into frames x height x width. depths: `(n,)` float32. quadrics: `(n,)` index into f x k.
    """

    pixels: _Indices
    depths: _Array
    quadrics: _Indices

    def points(self, focal: float, width: int, height: int) -> NDArray[np.float32]:
        """Where they lie in camera space, `(3, n)` float32; arguments as those of `cast`."""
        rows, columns = np.divmod(self.pixels % (width * height), width)
        x = ((columns + 0.5 - width / 2) / focal).astype(np.float32)
        y = ((height / 2 - 0.5 - rows) / focal).astype(np.float32)
        return np.stack([x * self.depths, y * self.depths, -self.depths])


def cast(quadrics: Quadrics, *, focal: float, width: int, height: int) -> Hits:
    """Finds what each pixel's centre sees.

    Args:
        quadrics: quadrics in front of the camera; the principal point is the picture's centre.
        focal: focal length in pixels.
        width, height: the picture's size in pixels.
    """
    rows = _rows(quadrics, focal, width, height)
    counts = rows.counts
    first = np.cumsum(counts) - counts
    columns = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(rows.left - first, counts)
    pixels = columns + np.repeat(rows.row_pixels, counts)
    x = ((columns + 0.5 - width / 2) / focal).astype(np.float32)

    def spread(values: _Array) -> NDArray[np.float32]:
        return np.repeat(values.astype(np.float32), counts)

    offset = x - spread(rows.origin)
    discriminant = (spread(rows.h2) * offset + spread(rows.h1)) * offset + spread(rows.h0)
    root = np.sqrt(np.maximum(discriminant, 0.0))
    depths = spread(rows.constant) / (root - (spread(rows.k0) + spread(rows.k1) * offset))
    along = depths * (spread(rows.n0) + spread(rows.n1) * offset) + spread(rows.cut)
    valid = np.flatnonzero((discriminant > 0.0) & (np.abs(along - 0.5) <= 0.5) & (depths > 0.0))
    pixels, depths = pixels[valid], depths[valid]
    nearest = np.full(len(quadrics.centres) * height * width, np.inf, dtype=np.float32)
    np.minimum.at(nearest, pixels, depths)
    winners = np.flatnonzero(depths == nearest[pixels])
    owners = np.empty(len(nearest), dtype=np.int32)
    owners[pixels[winners]] = np.repeat(rows.quadrics, counts)[valid[winners]]
    hit = np.flatnonzero(nearest < np.inf)
    return Hits(hit, nearest[hit], owners[hit])


@dataclass(frozen=True)
class _Rows:
    """Pieces of picture rows that a quadric may cover, and its polynomials in x along each, about `origin`."""

    left: _Indices
    counts: _Indices
    row_pixels: _Indices
    quadrics: _Indices
    origin: _Array
    h0: _Array
    h1: _Array
    h2: _Array
    k0: _Array
    k1: _Array
    n0: _Array
    n1: _Array
    cut: _Array
    constant: _Array


def _rows(quadrics: Quadrics, focal: float, width: int, height: int) -> _Rows:
    num_frames, num_quadrics = quadrics.centres.shape[:2]
    flat = _flatten(quadrics)
    bounds = quadrics.bounds.reshape(-1, 4)
    # Row i looks along y = (height/2 - i - 0.5) / focal, so that the largest y is the first row.
    top = np.clip(np.ceil(height / 2 - 0.5 - focal * bounds[:, 3]), 0, height).astype(np.int64)
    bottom = np.clip(np.floor(height / 2 - 0.5 - focal * bounds[:, 2]) + 1, 0, height).astype(np.int64)
    counts = np.maximum(bottom - top, 0)
    owner = np.repeat(np.arange(num_frames * num_quadrics), counts)
    row = np.arange(len(owner)) + np.repeat(top - (np.cumsum(counts) - counts), counts)
    y = (height / 2 - row - 0.5) / focal - flat.origin[owner, 1]
    conic, linear, cut = flat.conic[owner], flat.linear[owner], flat.cut_normal[owner]
    h0 = conic[:, 5] + (2 * conic[:, 4] + conic[:, 3] * y) * y
    h1 = conic[:, 2] + conic[:, 1] * y
    h2 = conic[:, 0]
    left, right = bounds[owner, 0], bounds[owner, 1]
    inner = h1 * h1 - h2 * h0
    root = np.sqrt(np.maximum(inner, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = h2 < 0  # elsewhere both sides of the roots are hit (steep cones): the bounds alone decide
        left = np.where(between, np.maximum(left, flat.origin[owner, 0] + (-h1 + root) / h2), left)
        right = np.where(between, np.minimum(right, flat.origin[owner, 0] + (-h1 - root) / h2), right)
    first = np.clip(np.ceil(focal * left + width / 2 - 0.5), 0, width).astype(np.int64)
    last = np.clip(np.floor(focal * right + width / 2 - 0.5) + 1, 0, width).astype(np.int64)
    columns = np.where((h2 < 0) & (inner <= 0), 0, np.maximum(last - first, 0))
    kept = np.flatnonzero(columns)
    owner, y = owner[kept], y[kept]
    return _Rows(
        left=first[kept],
        counts=columns[kept],
        row_pixels=(owner // num_quadrics * height + row[kept]) * width,
        quadrics=owner.astype(np.int32),
        origin=flat.origin[owner, 0],
        h0=h0[kept],
        h1=2 * h1[kept],
        h2=h2[kept],
        k0=linear[kept, 2] + linear[kept, 1] * y,
        k1=linear[kept, 0],
        n0=cut[kept, 2] + cut[kept, 1] * y,
        n1=cut[kept, 0],
        cut=flat.cut_constant[owner],
        constant=flat.constant[owner],
    )


@dataclass(frozen=True)
class _Flat:
    """Every quadric's polynomials in the ray's (x, y), relative to the ray to its centre, for float32's sake."""

    origin: _Array  # (n, 2)
    conic: _Array  # (n, 6) discriminant: xx, xy, x, yy, y (halves of the mixed and linear terms), 1
    linear: _Array  # (n, 3) q'd: x, y, 1
    cut_normal: _Array  # (n, 3)
    cut_constant: _Array  # (n,)
    constant: _Array  # (n,) F at the camera


def _flatten(quadrics: Quadrics) -> _Flat:
    centre = quadrics.centres.reshape(-1, 3)
    matrix = quadrics.matrices.reshape(-1, 3, 3)
    moved = np.einsum("nij,nj->ni", matrix, centre)
    linear = quadrics.linears.reshape(-1, 3) - moved
    constant = (
        (moved * centre).sum(axis=-1)
        - 2 * (quadrics.linears.reshape(-1, 3) * centre).sum(axis=-1)
        + quadrics.constants.reshape(-1)
    )
    ray = centre / -centre[:, 2:]
    discriminant = linear[:, :, None] * linear[:, None, :] - constant[:, None, None] * matrix
    along = np.einsum("nij,nj->ni", discriminant, ray)
    conic = np.stack(
        [
            discriminant[:, 0, 0], discriminant[:, 0, 1], along[:, 0], discriminant[:, 1, 1], along[:, 1],
            (along * ray).sum(axis=-1),
        ],
        axis=-1,
    )  # fmt: skip
    normal = quadrics.cut_normals.reshape(-1, 3)
    return _Flat(
        origin=ray[:, :2],
        conic=conic,
        linear=np.concatenate([linear[:, :2], (linear * ray).sum(axis=-1, keepdims=True)], axis=-1),
        cut_normal=np.concatenate([normal[:, :2], (normal * ray).sum(axis=-1, keepdims=True)], axis=-1),
        cut_constant=quadrics.cut_offsets.reshape(-1) - (normal * centre).sum(axis=-1),
        constant=constant,
    )


def surface_normals(quadrics: Quadrics, owners: _Indices, points: _Array) -> _Array:
    """Unit normals `(3, n)` float32, outwards, at points `(3, n)` float32 on the quadrics `owners` `(n,)`."""
    matrix = quadrics.matrices.reshape(-1, 9)[:, [0, 1, 2, 4, 5, 8]]
    table = np.concatenate([quadrics.centres.reshape(-1, 3), matrix, quadrics.linears.reshape(-1, 3)], axis=-1)
    cx, cy, cz, xx, xy, xz, yy, yz, zz, lx, ly, lz = np.take(
        np.ascontiguousarray(table.T, dtype=np.float32), owners, axis=1
    )
    x, y, z = points[0] - cx, points[1] - cy, points[2] - cz
    normals = np.stack([xx * x + xy * y + xz * z + lx, xy * x + yy * y + yz * z + ly, xz * x + yz * y + zz * z + lz])
    return normals / np.sqrt((normals**2).sum(axis=0))


def depth_along(quadrics: Quadrics, directions: _Array) -> _Array:
    """Nearest depth `(f, p)` along rays d = (x, y, -1), given as x, y `(f, p, 2)`; infinite where nothing is hit."""
    num_frames, num_rays = directions.shape[:2]
    flat = _flatten(quadrics)

    def split(values: _Array) -> _Array:
        return values.reshape(num_frames, 1, -1, *values.shape[1:]).astype(np.float32)

    offset = directions[:, :, None, :].astype(np.float32) - split(flat.origin)
    x, y = offset[..., 0], offset[..., 1]
    conic, linear, normal = split(flat.conic), split(flat.linear), split(flat.cut_normal)
    discriminant = (
        (conic[..., 0] * x + 2 * conic[..., 1] * y + 2 * conic[..., 2]) * x
        + (conic[..., 3] * y + 2 * conic[..., 4]) * y
        + conic[..., 5]
    )
    root = np.sqrt(np.maximum(discriminant, 0.0))
    depth = split(flat.constant) / (root - (linear[..., 0] * x + linear[..., 1] * y + linear[..., 2]))
    along = depth * (normal[..., 0] * x + normal[..., 1] * y + normal[..., 2]) + split(flat.cut_constant)
    hit = (discriminant > 0) & (depth > 0) & (np.abs(along - 0.5) <= 0.5)
    return np.where(hit, depth, np.inf).min(axis=-1).reshape(num_frames, num_rays)
