"""A procedural dancer's appearance: shapes around the skeleton, and which cloth, skin or hair covers each part.

This module knows nothing of cameras, light or pictures.
"""

import colorsys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dreamdance.dancers.landmarks import (
    CHIN,
    CHIN_RADIUS,
    EAR,
    FINGER_RADIUS,
    HEAD_STRETCH,
    NOSE,
    NOSE_RADII,
    SKULL,
    SKULL_RADIUS,
    find_foot,
    hand_points,
)
from dreamdance.dancers.motion import SIDES, Proportions, Skeleton, draw_proportions
from dreamdance.dancers.quadrics import ShapeList

_Array = NDArray[np.floating[Any]]
_Colour = tuple[float, float, float]

Pattern = Literal["plain", "rings", "stripes", "checks", "gingham", "dots"]
PATTERNS: tuple[Pattern, ...] = ("plain", "rings", "stripes", "checks", "gingham", "dots")
HairStyle = Literal["short", "bob", "long", "ponytail", "bun", "cap"]
_HAIR_STYLES: tuple[HairStyle, ...] = ("short", "bob", "long", "ponytail", "bun", "cap")

# Materials, by their place in `Identity.materials`.
SKIN, HAIR, TOP, BOTTOM, SHOES = range(5)

_SKIN_TONES = ("f6d7c0", "ecc0a0", "dda883", "c98f66", "ae7549", "8d5a37", "74492d", "5a3926")
_HAIR_COLOURS = ("15110f", "2c1e16", "4a2e1c", "7a4a28", "a9773f", "d0a864", "8e2f20", "b8b4ae", "3b3f6b", "a8557e")


@dataclass(frozen=True)
class Material:
    """A surface: its pattern, two colours (red, green, blue in [0,1]), repeats per metre and shine."""

    pattern: Pattern
    colour: _Colour
    second: _Colour
    repeats: float = 10.0
    gloss: float = 0.0


@dataclass(frozen=True)
class Identity:
    """One person: body, materials, and how far each cloth reaches (shares of limbs; 0 none, 1 all)."""

    body: Proportions
    materials: tuple[Material, ...]
    hair_style: HairStyle
    sleeves: float  # of the upper arm; above 1 also of the forearm
    trousers: float  # of the thigh; above 1 also of the shin
    hem: float  # where the top ends, as a share of the spine
    skirt: float  # its length as a share of the thigh, 0 for none
    flare: float  # width of trouser legs and sleeves beyond the limb's


def draw_identity(generator: np.random.Generator) -> Identity:
    """Draws a person."""
    body = draw_proportions(generator)
    skin = _from_hex(generator.choice(_SKIN_TONES))
    hair = _from_hex(generator.choice(_HAIR_COLOURS))
    hue = generator.uniform()
    top = _draw_cloth(generator, hue, plain=0.25)
    bottom = _draw_cloth(generator, hue + generator.choice([0.08, 0.33, 0.5, 0.62]), plain=0.6)
    shoes = _draw_cloth(generator, generator.uniform(), plain=1.0)
    skirt = generator.uniform(0.45, 0.95) if generator.uniform() < 0.22 else 0.0
    sleeves = generator.choice([0.12, 0.45, 0.6, 2.0], p=[0.2, 0.25, 0.2, 0.35])
    trousers = 0.3 if skirt else generator.choice([0.4, 0.75, 1.5, 2.0], p=[0.15, 0.2, 0.15, 0.5])
    return Identity(
        body=body,
        materials=(
            Material("plain", skin, skin, gloss=0.12),
            Material("plain", hair, hair, gloss=0.35),
            top,
            bottom,
            Material("plain", shoes.colour, shoes.colour, gloss=0.3),
        ),
        hair_style=_HAIR_STYLES[generator.integers(len(_HAIR_STYLES))],
        sleeves=float(sleeves),
        trousers=float(trousers),
        hem=float(generator.uniform(0.0, 0.24)) * (0.0 if skirt else 1.0),
        skirt=float(skirt),
        flare=float(generator.uniform(1.0, 1.22)),
    )


def _from_hex(text: str) -> _Colour:
    red, green, blue = (int(text[place : place + 2], 16) / 255 for place in (0, 2, 4))
    return red, green, blue


def _draw_cloth(generator: np.random.Generator, hue: float, *, plain: float) -> Material:
    """A cloth of one hue; its pattern's second colour differs in lightness, so that it shows."""
    others = PATTERNS[1:]
    pattern: Pattern = "plain" if generator.uniform() < plain else others[generator.integers(len(others))]
    lightness = generator.uniform(0.22, 0.72)
    saturation = generator.choice([0.12, 0.45, 0.65, 0.8])
    colour = colorsys.hls_to_rgb(hue % 1.0, lightness, saturation)
    second_lightness = lightness + 0.34 if lightness < 0.5 else lightness - 0.36
    second_hue = hue + generator.choice([0.0, 0.0, 0.12, 0.5])
    second = colorsys.hls_to_rgb(second_hue % 1.0, second_lightness, saturation * 0.8)
    return Material(pattern, colour, second, repeats=float(generator.uniform(8.0, 17.0)), gloss=0.04)


@dataclass
class Skins:
    """The colouring of surfaces: a local frame for each part, and the materials below and above a cut along its y."""

    origins: list[_Array] = field(default_factory=list)  # (f, 3)
    frames: list[_Array] = field(default_factory=list)  # (f, 3, 3)
    radii: list[float] = field(default_factory=list)
    below: list[int] = field(default_factory=list)
    above: list[int] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)

    def add(
        self, origin: _Array, frame: _Array, radius: float, below: int, above: int | None = None, cut: float = 0.0
    ) -> int:
        """Adds a part and returns its number; without `above` the whole part has one material."""
        self.origins.append(origin)
        self.frames.append(frame)
        self.radii.append(radius)
        self.below.append(below)
        self.above.append(below if above is None else above)
        self.cuts.append(cut)
        return len(self.cuts) - 1


@dataclass(frozen=True)
class BodyShapes:
    """A dancer's shapes and skins. The head's skin has the number `HEAD`: shading paints the face on it."""

    shapes: ShapeList
    skins: Skins


HEAD = 0


@dataclass(frozen=True)
class Girths:
    """How thick a dressed body is: radii in metres.

    Attributes:
        hips, waist, chest: half the width of the trunk there.
        trunk_depth: depth of the trunk as a share of its width.
        yoke: of the shoulders' upper edge.
        neck: of the neck.
        arm: at shoulder, elbow and wrist.
        leg: at hip, knee and ankle.
        cuff: where the shin's shape, or a trouser leg, ends at the ankle.
        finger: of a finger.
    """

    hips: float
    waist: float
    chest: float
    trunk_depth: float
    yoke: float
    neck: float
    arm: tuple[float, float, float]
    leg: tuple[float, float, float]
    cuff: float
    finger: float


def find_girths(identity: Identity) -> Girths:
    """The girths of a drawn person."""
    size, girth = identity.body, identity.body.girth
    hips = size.hip_width + 0.068 * girth
    chest = size.shoulder_width * 0.80
    sleeve = identity.flare if identity.sleeves > 1 else 1.0
    trouser = identity.flare if identity.trousers > 1 else 1.0
    ankle = 0.038 * girth
    return Girths(
        hips=hips,
        waist=0.5 * (hips + chest) * 0.86,
        chest=chest,
        trunk_depth=0.70 * girth / (0.5 + 0.5 * girth),
        yoke=0.060 * girth,
        neck=0.055 * girth,
        arm=(0.057 * girth, 0.042 * girth * sleeve, 0.030 * girth * sleeve),
        leg=(0.088 * girth, 0.058 * girth * trouser, ankle),
        cuff=ankle * (trouser**2 if identity.trousers >= 2 else 1.0),
        finger=FINGER_RADIUS * size.hand * (0.6 + 0.4 * girth),
    )


def build_body(identity: Identity, skeleton: Skeleton) -> BodyShapes:
    """Surrounds a skeleton with shapes, in every frame, in world space."""
    body = BodyShapes(ShapeList(len(skeleton.pelvis)), Skins())
    girths = find_girths(identity)
    add_head(body, identity, skeleton, girths)
    add_trunk(body, identity, skeleton, girths)
    for side in (0, 1):
        add_arm(body, identity, skeleton, girths, side)
        add_leg(body, identity, skeleton, girths, side)
    if identity.skirt:
        _add_skirt(body, identity, skeleton)
    return body


def limb_frame(start: _Array, end: _Array, forward: _Array) -> _Array:
    """A frame `(f, 3, 3)` whose y axis runs from start to end, and whose z axis is as near `forward` as can be."""
    along = end - start
    along = along / np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-9)
    ahead = forward - (forward * along).sum(axis=-1, keepdims=True) * along
    ahead = ahead / np.maximum(np.linalg.norm(ahead, axis=-1, keepdims=True), 1e-9)
    return np.stack([np.cross(along, ahead), along, ahead], axis=-1)


def _stretch(frame: _Array, factors: tuple[float, float, float]) -> _Array:
    return frame @ np.diag(factors) @ np.swapaxes(frame, -1, -2)


def _add_limb(
    body: BodyShapes, skin: int, start: _Array, end: _Array, radii: tuple[float, float], *,
    stretch: _Array | None = None, closed: tuple[bool, bool] = (True, True),
) -> None:  # fmt: skip
    """Adds a round cone with the spheres at its ends, or without those that another part covers."""
    body.shapes.add_cone(skin, start, end, *radii, stretch=stretch)
    for point, radius, wanted in zip((start, end), radii, closed, strict=True):
        if wanted:
            body.shapes.add_sphere(skin, point, radius, stretch=stretch)


def add_head(body: BodyShapes, identity: Identity, skeleton: Skeleton, girths: Girths) -> None:
    """Adds head, hair and neck."""
    size, frame, centre = identity.body.head, skeleton.head_frame, skeleton.head

    def at(point: _Array | tuple[float, float, float]) -> _Array:
        return centre + frame @ (np.asarray(point) * size)

    def scaled(radii: _Array | tuple[float, float, float]) -> _Array:
        return frame * (np.asarray(radii) * size)

    head = body.skins.add(centre, frame / size, 0.08, SKIN)
    radii = (SKULL_RADIUS * size, CHIN_RADIUS * size)
    _add_limb(body, head, at(SKULL * HEAD_STRETCH), at(CHIN * HEAD_STRETCH), radii, stretch=frame * HEAD_STRETCH)
    plain = body.skins.add(centre, frame, 0.08, SKIN)
    _add_limb(body, plain, at(NOSE[0]), at(NOSE[1]), (NOSE_RADII[0] * size, NOSE_RADII[1] * size))
    for side in SIDES:
        body.shapes.add_ellipsoid(plain, at(EAR * (side, 1.0, 1.0)), scaled((0.012, 0.026, 0.016)))
    _add_hair(body, identity, skeleton)
    neck_end = at((0.0, -0.05, -0.012))
    radius = girths.neck
    neck = body.skins.add(skeleton.neck, skeleton.chest_frame, radius, SKIN)
    _add_limb(body, neck, skeleton.neck, neck_end, (radius * 1.12, radius * 0.94), closed=(True, False))


def _add_hair(body: BodyShapes, identity: Identity, skeleton: Skeleton) -> None:
    """Adds the hair: a shell over the skull, cut along a slanted hairline, and the strands of the hair style."""
    size, frame, style = identity.body.head, skeleton.head_frame, identity.hair_style
    material = TOP if style == "cap" else HAIR
    hair = body.skins.add(skeleton.head, frame, 0.09 * size, material)

    def at(x: float, y: float, z: float) -> _Array:
        return skeleton.head + frame @ (np.array([x, y, z]) * size)

    slant = np.array([0.0, 0.80, -0.60]) if style != "cap" else np.array([0.0, 0.93, -0.37])
    body.shapes.add_ellipsoid(
        hair, at(0.0, 0.017, -0.004), frame * (np.array([0.0815, 0.0975, 0.0985]) * size),
        cut_normal=frame @ slant, cut_offset=size * (-0.002 if style != "cap" else 0.026),
    )  # fmt: skip
    if style in ("long", "bob"):
        low = -0.21 if style == "long" else -0.10
        stretch = _stretch(frame, (1.35, 1.0, 0.72))
        _add_limb(body, hair, at(0.0, 0.0, -0.058), at(0.0, low, -0.085), (0.064 * size, 0.05 * size), stretch=stretch)
    elif style == "ponytail":
        body.shapes.add_sphere(hair, at(0.0, 0.06, -0.105), 0.026 * size)
        _add_limb(body, hair, at(0.0, 0.045, -0.125), at(0.0, -0.15, -0.15), (0.032 * size, 0.012 * size))
    elif style == "bun":
        body.shapes.add_sphere(hair, at(0.0, 0.105, -0.06), 0.042 * size)
    elif style == "cap":
        body.shapes.add_ellipsoid(hair, at(0.0, 0.055, 0.090), frame * (np.array([0.062, 0.007, 0.062]) * size))


def add_trunk(body: BodyShapes, identity: Identity, skeleton: Skeleton, girths: Girths) -> None:
    """Adds the trunk from the hips to the shoulders."""
    size, depth = identity.body, girths.trunk_depth
    hips, waist, chest = girths.hips, girths.waist, girths.chest
    low = skeleton.pelvis
    lower = limb_frame(low, skeleton.waist, skeleton.pelvis_frame[:, :, 2])
    hem = identity.hem * size.spine
    skin = body.skins.add(low, lower, hips * 0.85, BOTTOM, TOP, hem)
    stretch = _stretch(skeleton.pelvis_frame, (1.0, 1.0, depth))
    _add_limb(body, skin, low, skeleton.waist, (hips, waist), stretch=stretch, closed=(False, True))
    body.shapes.add_ellipsoid(skin, low, skeleton.pelvis_frame * np.array([hips, 0.62 * hips, hips * depth]))
    upper = limb_frame(skeleton.waist, skeleton.neck, skeleton.chest_frame[:, :, 2])
    # The same origin for both halves, so that a pattern continues over the waist.
    trunk = body.skins.add(
        skeleton.waist - upper @ np.array([0.0, 0.36 * size.spine, 0.0]), upper, hips * 0.85, BOTTOM, TOP, hem
    )
    stretch = _stretch(skeleton.chest_frame, (1.0, 1.0, depth))
    _add_limb(body, trunk, skeleton.waist, skeleton.chest, (waist, chest), stretch=stretch, closed=(True, True))
    yoke = girths.yoke
    for shoulder in skeleton.shoulders:
        inner = skeleton.neck + 0.30 * (shoulder - skeleton.neck)
        _add_limb(body, trunk, inner, shoulder, (yoke * 1.08, yoke), closed=(True, False))
        _add_limb(body, trunk, skeleton.chest, shoulder, (chest, yoke), stretch=stretch, closed=(False, True))


def add_arm(body: BodyShapes, identity: Identity, skeleton: Skeleton, girths: Girths, side: int) -> None:
    """Adds an arm with its hand; side 0 is the left."""
    size, radii = identity.body, girths.arm
    shoulder, elbow, wrist = skeleton.shoulders[side], skeleton.elbows[side], skeleton.wrists[side]
    forward = skeleton.chest_frame[:, :, 2]
    upper = limb_frame(shoulder, elbow, forward)
    cut = identity.sleeves * size.upper_arm if identity.sleeves < 1 else 1.0
    skin = body.skins.add(shoulder, upper, 0.05, TOP, SKIN, cut)
    _add_limb(body, skin, shoulder, elbow, radii[:2])
    lower = body.skins.add(elbow, limb_frame(elbow, wrist, forward), 0.04, TOP if identity.sleeves > 1 else SKIN)
    _add_limb(body, lower, elbow, wrist, radii[1:], closed=(False, True))
    _add_hand(body, identity, skeleton, girths.finger, side)


def _add_hand(body: BodyShapes, identity: Identity, skeleton: Skeleton, radius: float, side: int) -> None:
    length, frame = identity.body.hand, skeleton.hand_frames[side]
    skin = body.skins.add(skeleton.wrists[side], frame, 0.03, SKIN)
    palm = skeleton.wrists[side] + frame @ (np.array([0.02, 0.27, 0.0]) * length)
    body.shapes.add_ellipsoid(skin, palm, frame * (np.array([0.235, 0.33, 0.10]) * length))
    points = hand_points(skeleton, identity.body, side)
    for finger in range(5):
        root, middle, _, tip = (points[:, 1 + 4 * finger + joint] for joint in range(4))
        _add_limb(body, skin, root, middle, (radius * 1.15, radius), closed=(finger == 0, True))
        _add_limb(body, skin, middle, tip, (radius, radius * 0.85), closed=(False, True))


def add_leg(body: BodyShapes, identity: Identity, skeleton: Skeleton, girths: Girths, side: int) -> None:
    """Adds a leg with its foot; side 0 is the left."""
    size, radii = identity.body, girths.leg
    hip, knee, ankle = skeleton.hips[side], skeleton.knees[side], skeleton.ankles[side]
    foot_frame = skeleton.foot_frames[side]
    forward = foot_frame[:, :, 2]
    thigh = body.skins.add(
        hip,
        limb_frame(hip, knee, forward),
        0.075,
        BOTTOM,
        SKIN,
        identity.trousers * size.thigh if identity.trousers < 1 else 1.0,
    )
    _add_limb(body, thigh, hip, knee, radii[:2])
    shin_cut = (identity.trousers - 1.0) * size.shin if 1 < identity.trousers < 2 else 1.0
    covered = identity.trousers > 1
    shin = body.skins.add(knee, limb_frame(knee, ankle, forward), 0.05, BOTTOM if covered else SKIN, SKIN, shin_cut)
    _add_limb(body, shin, knee, ankle, (radii[1], girths.cuff), closed=(False, False))
    shoe = body.skins.add(ankle, foot_frame, 0.04, SHOES)
    body.shapes.add_sphere(shoe, ankle, radii[2] * 1.08)
    foot = find_foot(size)
    heel, ball = (ankle + foot_frame @ point for point in (foot.heel, foot.ball))
    stretch = _stretch(foot_frame, (1.12, 1.0, 1.0))
    _add_limb(body, shoe, heel, ball, (foot.heel_radius, foot.ball_radius), stretch=stretch)
    _add_limb(body, shoe, ankle, ball, (radii[2], foot.ball_radius), closed=(False, False))


def _add_skirt(body: BodyShapes, identity: Identity, skeleton: Skeleton) -> None:
    """Adds a skirt: an open cone from the waist, wide enough for the legs below it."""
    size, girth = identity.body, identity.body.girth
    hem = 0.5 * (skeleton.knees[0] + skeleton.knees[1])
    start = skeleton.pelvis + skeleton.pelvis_frame @ np.array([0.0, 0.06, 0.0])
    end = start + (hem - start) * (0.3 + 0.7 * identity.skirt)
    half = float(np.linalg.norm(skeleton.knees[0] - skeleton.knees[1], axis=-1).max()) / 2
    waist = size.hip_width + 0.062 * girth
    wide = max(waist * 1.35, half * identity.skirt + 0.10 * girth)
    span = float(np.linalg.norm(end - start, axis=-1).min())
    wide = min(wide, waist + 0.85 * span)
    skin = body.skins.add(start, limb_frame(start, end, skeleton.pelvis_frame[:, :, 2]), waist, BOTTOM)
    body.shapes.add_cone(skin, start, end, waist, wide, stretch=_stretch(skeleton.pelvis_frame, (1.0, 1.0, 0.8)))
