"""A procedural dancer's motion: joint positions and frames as smooth functions of time, sums of slow sinusoids.

World space: x right as the camera sees it, y up, z towards the camera, metres, the floor at y = 0. A dancer who faces
the camera has their left side at +x. Frames are `(f, 3, 3)` whose columns are the part's own left, up and forward axes.
Pairs are ordered left, right. This module knows nothing of shapes and pictures.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.floating[Any]]
_Pair = tuple[_Array, _Array]

# Left is towards the dancer's own +x, right towards -x.
SIDES = (1.0, -1.0)

_LARGEST_YAW = np.radians(75.0)


@dataclass(frozen=True)
class Proportions:
    """Sizes of one body, in metres."""

    height: float
    girth: float  # factor on all radii
    shoulder_width: float  # half
    hip_width: float  # half
    thigh: float
    shin: float
    spine: float  # from the pelvis to the base of the neck
    neck: float
    upper_arm: float
    forearm: float
    hand: float
    head: float  # factor on the head's size
    ankle: float = 0.08


def draw_proportions(generator: np.random.Generator) -> Proportions:
    """Draws a body: tall or short, slim or stout, wide shoulders or hips."""
    height = generator.uniform(1.52, 1.88)
    legs = generator.uniform(0.465, 0.495) * height
    ankle = 0.08
    return Proportions(
        height=height,
        girth=generator.uniform(0.86, 1.2) * height / 1.72,
        shoulder_width=generator.uniform(0.098, 0.116) * height,
        hip_width=generator.uniform(0.050, 0.060) * height,
        thigh=0.5 * (legs - ankle),
        shin=0.5 * (legs - ankle),
        spine=generator.uniform(0.285, 0.305) * height,
        neck=generator.uniform(0.048, 0.056) * height,
        upper_arm=generator.uniform(0.158, 0.172) * height,
        forearm=generator.uniform(0.138, 0.150) * height,
        hand=generator.uniform(0.104, 0.114) * height,
        head=generator.uniform(0.98, 1.1) * height / 1.72,
    )


@dataclass(frozen=True)
class Skeleton:
    """A dancer's joints `(f, 3)` and frames `(f, 3, 3)` in world space; pairs are left, right."""

    pelvis: _Array
    waist: _Array
    chest: _Array
    neck: _Array  # its base, between the shoulders
    head: _Array  # centre of the skull
    pelvis_frame: _Array
    chest_frame: _Array
    head_frame: _Array
    shoulders: tuple[_Array, _Array]
    elbows: tuple[_Array, _Array]
    wrists: tuple[_Array, _Array]
    hand_frames: tuple[_Array, _Array]  # columns: thumb's side, along the hand, out of the palm
    finger_curls: tuple[_Array, _Array]  # (f, 5) in [0,1], thumb first
    hips: tuple[_Array, _Array]
    knees: tuple[_Array, _Array]
    ankles: tuple[_Array, _Array]
    foot_frames: tuple[_Array, _Array]


class Waves:
    """Draws smooth functions of time: sums of sinusoids at a quarter, half and the whole of one beat's frequency."""

    def __init__(self, generator: np.random.Generator, times: _Array) -> None:
        """Draws the beat.

        Args:
            generator: every number is drawn from it, in the order of the calls.
            times: `(f,)` seconds.
        """
        self.generator = generator
        self.times = times
        self.beat_hertz = generator.uniform(1.4, 2.0)
        self.beat_phase = generator.uniform(0, 2 * np.pi)

    def at(self, multiple: float, phase: float = 0.0) -> _Array:
        """The sinusoid `(f,)` of a multiple of the beat's frequency, in time with it."""
        return np.sin(2 * np.pi * self.beat_hertz * multiple * self.times + self.beat_phase * multiple + phase)

    def draw(self, middle: float, amplitude: float, *, quick: float = 0.25) -> _Array:
        """A wave `(f,)` that stays within `amplitude` of `middle`; `quick` is the share that moves with every beat."""
        weights = np.array([0.5, 0.5, 0.0]) * (1 - quick) + np.array([0.0, 0.0, quick])
        weights[:2] *= self.generator.dirichlet([2.0, 2.0]) * 2
        phases = self.generator.uniform(0, 2 * np.pi, 3)
        parts = zip((0.25, 0.5, 1.0), weights, phases, strict=True)
        return middle + amplitude * sum(weight * self.at(multiple, phase) for multiple, weight, phase in parts)


def dance(generator: np.random.Generator, body: Proportions, times: _Array) -> Skeleton:
    """Moves a body through a randomly drawn dance.

    Args:
        generator: decides the dance.
        body: the sizes of the limbs.
        times: `(f,)` seconds; the dance is a function of them, so that a longer clip begins like a shorter one.
    """
    waves = Waves(generator, times)
    yaw = waves.draw(generator.uniform(-0.35, 0.35), generator.uniform(0.25, 0.95), quick=0.1)
    yaw = _LARGEST_YAW * np.tanh(yaw / _LARGEST_YAW)
    sway_phase = generator.uniform(0, 2 * np.pi)
    sway = waves.at(0.5, sway_phase)
    pelvis, pelvis_frame, legs = _lower_body(waves, body, yaw, sway, sway_phase)
    hips, knees, ankles, foot_frames = legs
    bend = rotation_about("x", waves.draw(0.03, 0.12)) @ rotation_about("z", waves.draw(0, 0.16) + 0.08 * sway)
    twist = rotation_about("y", waves.draw(0, 0.35))
    middle_frame = pelvis_frame @ rotation_about("z", -0.05 * sway)
    chest_frame = pelvis_frame @ twist @ bend
    waist = pelvis + middle_frame @ np.array([0.0, 0.36 * body.spine, 0.0])
    chest = waist + chest_frame @ np.array([0.0, 0.30 * body.spine, 0.0])
    neck = waist + chest_frame @ np.array([0.0, 0.64 * body.spine, 0.0])
    look = rotation_about("y", -0.55 * yaw + waves.draw(0, 0.3))
    head_frame = (
        chest_frame @ look @ rotation_about("x", waves.draw(0.04, 0.16)) @ rotation_about("z", waves.draw(0, 0.16))
    )
    neck_top = neck + 0.5 * (chest_frame + head_frame) @ np.array([0.0, body.neck, 0.006])
    head = neck_top + head_frame @ (np.array([0.0, 0.085, 0.012]) * body.head)
    arms = [_arm(waves, body, neck, chest_frame, side) for side in SIDES]
    shoulders, elbows, wrists, hand_frames, curls = (tuple(part) for part in zip(*arms, strict=True))
    return Skeleton(
        pelvis=pelvis, waist=waist, chest=chest, neck=neck, head=head,
        pelvis_frame=pelvis_frame, chest_frame=chest_frame, head_frame=head_frame,
        shoulders=shoulders, elbows=elbows, wrists=wrists, hand_frames=hand_frames, finger_curls=curls,
        hips=hips, knees=knees, ankles=ankles, foot_frames=foot_frames,
    )  # fmt: skip


def _lower_body(
    waves: Waves, body: Proportions, yaw: _Array, sway: _Array, sway_phase: float
) -> tuple[_Array, _Array, tuple[_Pair, _Pair, _Pair, _Pair]]:
    """Moves the lower body: feet step and pivot on the floor, the weight shifts, both legs reach the pelvis."""
    generator = waves.generator
    heading = rotation_about("y", yaw)
    stance = body.hip_width + generator.uniform(0.02, 0.13)
    shift = generator.uniform(0.03, 0.09)
    step_height = generator.choice([0.0, generator.uniform(0.04, 0.24)], p=[0.25, 0.75])
    step_forward = generator.uniform(-0.12, 0.16)
    turn_out = generator.uniform(0.1, 0.5)
    tilt = generator.uniform(0.03, 0.13)
    ankles, foot_frames = [], []
    for side in SIDES:
        lift = np.maximum(0.0, -side * waves.at(0.5, sway_phase + 0.25)) ** 2
        local = np.stack(
            [np.full_like(lift, side * stance), body.ankle + step_height * lift, step_forward * lift - 0.02], axis=-1
        )
        ankles.append(np.einsum("fij,fj->fi", heading, local))
        pitch = rotation_about("x", lift * step_height * 3.0)
        foot_frames.append(heading @ rotation_about("y", side * turn_out * np.ones_like(lift)) @ pitch)
    pelvis_frame = heading @ rotation_about("z", -tilt * sway) @ rotation_about("x", waves.draw(0.02, 0.08))
    offset = np.stack([shift * sway, np.zeros_like(sway), waves.draw(0.0, 0.025)], axis=-1)
    ground = np.einsum("fij,fj->fi", heading, offset)
    dip = generator.uniform(0.012, 0.05) * (1 + waves.at(1.0, generator.uniform(0, 2 * np.pi))) + 0.012
    hip_offsets = [pelvis_frame @ np.array([side * body.hip_width, -0.03, 0.0]) for side in SIDES]
    reach = 0.99 * (body.thigh + body.shin)
    heights = []
    for ankle, hip in zip(ankles, hip_offsets, strict=True):
        across = ((ankle - ground - hip)[:, [0, 2]] ** 2).sum(axis=-1)
        heights.append(ankle[:, 1] - hip[:, 1] + np.sqrt(np.maximum(reach**2 - across, 0.01)))
    pelvis = ground.copy()
    pelvis[:, 1] = _smooth_minimum(heights[0], heights[1]) - dip
    hips = (pelvis + hip_offsets[0], pelvis + hip_offsets[1])
    left, right = (
        _bend_leg(hip, ankle, frame[:, :, 2] + 0.2 * side * frame[:, :, 0], body)
        for hip, ankle, frame, side in zip(hips, ankles, foot_frames, SIDES, strict=True)
    )
    knees = (left, right)
    return pelvis, pelvis_frame, (hips, knees, (ankles[0], ankles[1]), (foot_frames[0], foot_frames[1]))


def _smooth_minimum(first: _Array, second: _Array, width: float = 0.02) -> _Array:
    return 0.5 * (first + second - np.sqrt((first - second) ** 2 + width**2))


def _bend_leg(hip: _Array, ankle: _Array, forward: _Array, body: Proportions) -> _Array:
    """The knee `(f, 3)` of two bones from hip to ankle, bent towards `forward`."""
    reach = ankle - hip
    distance = np.linalg.norm(reach, axis=-1, keepdims=True)
    along = reach / distance
    side = forward - (forward * along).sum(axis=-1, keepdims=True) * along
    side /= np.linalg.norm(side, axis=-1, keepdims=True)
    ahead = (body.thigh**2 - body.shin**2 + distance**2) / (2 * distance)
    return hip + along * ahead + side * np.sqrt(np.maximum(body.thigh**2 - ahead**2, 0.0))


def _arm(
    waves: Waves, body: Proportions, neck: _Array, chest_frame: _Array, side: float
) -> tuple[_Array, _Array, _Array, _Array, _Array]:
    """Moves an arm (shoulder, elbow, wrist, hand): from hanging to overhead, from the side to straight ahead."""
    generator = waves.generator
    middle = np.radians(generator.choice([-62.0, -30.0, 5.0, 45.0], p=[0.3, 0.25, 0.2, 0.25]))
    elevation = waves.draw(middle, np.radians(generator.uniform(12, 45)))
    elevation = np.radians(-5.0) + np.radians(72.0) * np.tanh((elevation - np.radians(-5.0)) / np.radians(72.0))
    azimuth = waves.draw(np.radians(generator.uniform(15, 68)), np.radians(generator.uniform(10, 40)))
    azimuth = np.clip(azimuth, np.radians(-25), np.radians(90))
    flex = np.clip(waves.draw(np.radians(generator.uniform(35, 105)), np.radians(50)), np.radians(4), np.radians(135))
    lean = waves.draw(generator.uniform(0.0, 1.3), 0.6)
    level, out = np.cos(elevation), np.array([side, 1.0, 1.0])
    upper = np.stack([level * np.cos(azimuth), np.sin(elevation), level * np.sin(azimuth)], axis=-1) * out
    ahead = np.stack([-np.sin(azimuth), np.zeros_like(azimuth), np.cos(azimuth)], axis=-1) * out
    rise = np.sin(elevation)
    raised = np.stack([-rise * np.cos(azimuth), level, -rise * np.sin(azimuth)], axis=-1) * out
    bend = np.cos(lean)[:, None] * ahead + np.sin(lean)[:, None] * raised
    fore = np.cos(flex)[:, None] * upper + np.sin(flex)[:, None] * bend
    inner = np.cos(flex)[:, None] * bend - np.sin(flex)[:, None] * upper
    wrist_bend, twist = waves.draw(0.0, 0.5)[:, None], waves.draw(0.3, 1.0)[:, None]
    along = np.cos(wrist_bend) * fore + np.sin(wrist_bend) * inner
    palm = np.cos(wrist_bend) * inner - np.sin(wrist_bend) * fore
    palm = np.cos(twist) * palm + np.sin(twist) * np.cross(along, palm)
    thumb = np.cross(along, palm) * -side
    shrug = 0.02 * (1 + np.tanh(3 * elevation))
    local = np.stack([np.full_like(shrug, side * body.shoulder_width), shrug - 0.045, np.zeros_like(shrug)], axis=-1)
    shoulder = neck + np.einsum("fij,fj->fi", chest_frame, local)
    elbow = shoulder + body.upper_arm * np.einsum("fij,fj->fi", chest_frame, upper)
    wrist = elbow + body.forearm * np.einsum("fij,fj->fi", chest_frame, fore)
    hand_frame = chest_frame @ np.stack([thumb, along, palm], axis=-1)
    style = generator.choice([0.08, 0.3, 0.85], p=[0.45, 0.35, 0.2])
    curls = np.stack([waves.draw(style, 0.15) for _ in range(5)], axis=-1).clip(0.02, 1.0)
    return shoulder, elbow, wrist, hand_frame, curls


def rotation_about(axis: str, angles: _Array) -> _Array:
    """Rotation matrices `(f, 3, 3)` about the x, y or z axis, right-handed, angles `(f,)` in radians."""
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    result = np.broadcast_to(np.eye(3), (len(angles), 3, 3)).copy()
    result[:, first, first] = result[:, second, second] = np.cos(angles)
    result[:, second, first] = np.sin(angles)
    result[:, first, second] = -np.sin(angles)
    return result
