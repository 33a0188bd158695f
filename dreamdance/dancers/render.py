"""Procedural dancers (contract C10): people whose pictures, normals, depth, masks and joints are known exactly.

The dataset of the demo, the tests and the ablations. Everything follows from a seed; nothing is read from disk.
`motion` moves a skeleton, `body` surrounds it with shapes, `quadrics` finds what each pixel shows, `shading` and
`stage` colour it; this module draws one clip from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dreamdance.dancers.body import BodyShapes, Identity, build_body, draw_identity
from dreamdance.dancers.landmarks import Landmarks, find_landmarks, foot_points
from dreamdance.dancers.motion import Skeleton, dance
from dreamdance.dancers.quadrics import Quadrics, cast, depth_along, surface_normals, to_camera
from dreamdance.dancers.shading import Light, SkinTable, shade, surface_colours, tabulate_skins
from dreamdance.dancers.stage import (
    Backdrop,
    Camera,
    Stage,
    aim_camera,
    build_backdrop,
    camera_light,
    cast_shadows,
    draw_stage,
    fit_focal,
)

# Identities and motions to train on.
TRAINING_SEEDS = range(1_000_000_000)

# Identities and motions that no training clip may have.
HELD_OUT_SEEDS = range(1_000_000_000, 1_100_000_000)

VISIBLE_CONFIDENCE = 1.0
# Confidence of a hidden limb joint: estimators such as DWPose guess it with less confidence and still draw it.
HIDDEN_JOINT_CONFIDENCE = 0.5
# Confidence of a hidden point of head or hands: estimators miss it, so it lies below the drawing's threshold.
HIDDEN_DETAIL_CONFIDENCE = 0.1

_PIXELS_PER_CHUNK = 1 << 18  # of samples cast at once: the arrays of one chunk stay in the cache
_HEAD_POINTS = np.array([0, 14, 15, 16, 17])
_SHADOW_STRENGTH = 0.8


@dataclass(frozen=True)
class DancerClip:
    """A rendered clip. Camera space is x right, y up, z towards the camera, which sits at its origin.

    rgb: `(f, H, W, 3)` uint8. normal: `(f, H, W, 3)` float32, unit length, at pixel centres. depth: `(f, H, W)`
    float32, metres along the optical axis, at pixel centres. mask: `(f, H, W)` bool, true on the body. keypoints:
    `(f, 128, 3)` float32 (`media.keypoints`). joints: `(f, 128, 3)` float32, metres, the 3D points whose projections
    the key points are. feet: `(f, 4, 3)` float32, metres, in the same space: left heel, right heel, left toes, right
    toes. intrinsics: `(3, 3)` float64, in pixels, y downwards as in pictures; pixel centres at halves.
    """

    rgb: NDArray[np.uint8]
    normal: NDArray[np.float32]
    depth: NDArray[np.float32]
    mask: NDArray[np.bool_]
    keypoints: NDArray[np.float32]
    joints: NDArray[np.float32]
    feet: NDArray[np.float32]
    intrinsics: NDArray[np.float64]
    fps: float
    seed: int


@dataclass(frozen=True)
class _Scene:
    """All random draws of a clip, made before any picture."""

    identity: Identity
    skeleton: Skeleton
    body: BodyShapes
    landmarks: Landmarks
    stage: Stage
    camera: Camera
    quadrics: Quadrics
    skins: SkinTable
    light: Light


def render_clip(
    seed: int,
    *,
    num_frames: int,
    width: int,
    height: int,
    fps: float = 8.0,
    identity_seed: int | None = None,
    place_seed: int | None = None,
    further_times: Sequence[float] = (),
) -> DancerClip:
    """Renders the dancer of a seed.

    Args:
        seed: a number in `TRAINING_SEEDS` or `HELD_OUT_SEEDS`; it fixes body, clothes, background, camera and motion.
        num_frames: length of the clip.
        width, height: the pictures' size in pixels.
        fps: frames per second; the motion itself is a function of seconds.
        identity_seed: takes body and clothes from this seed's dancer instead, who performs the motion of `seed`. The
            camera stands at the same place and is aimed at the other body.
        place_seed: takes floor, walls and light from this seed's clip instead. The camera stands where that of `seed`
            stands, so that the motion is seen from the same side.
        further_times: seconds after the first frame of further frames, which follow the clip's own in the result. The
            camera shows the dancer at all times.

    Raises:
        ValueError: a seed lies outside of both ranges, they lie in different ones, or the clip is empty.
    """
    identity_seed = seed if identity_seed is None else identity_seed
    place_seed = seed if place_seed is None else place_seed
    for number in (seed, identity_seed, place_seed):
        if number not in TRAINING_SEEDS and number not in HELD_OUT_SEEDS:
            raise ValueError(
                f"seed {number} is neither in {TRAINING_SEEDS} (training) nor in {HELD_OUT_SEEDS} (held out)"
            )
    for name, other in (("identity_seed", identity_seed), ("place_seed", place_seed)):
        if (seed in TRAINING_SEEDS) != (other in TRAINING_SEEDS):
            raise ValueError(f"seed {seed} and {name} {other}: one is held out, the other is for training")
    if min(num_frames, width, height) < 1 or not fps > 0:
        raise ValueError(f"cannot render {num_frames} frames of {width}x{height} at {fps} frames per second")
    times = np.concatenate([np.arange(num_frames) / fps, np.asarray(further_times, np.float64)])
    scene = _build_scene(seed, identity_seed, place_seed, times)
    num_frames = len(times)
    focal = fit_focal(scene.quadrics.bounds, width, height)
    samples = 3 if min(width, height) < 128 else 2
    backdrop = build_backdrop(scene.stage, scene.camera, focal=focal, width=width, height=height, samples=samples)
    normal = np.repeat(backdrop.normals[None], num_frames, axis=0)
    depth = np.repeat(backdrop.depths[None], num_frames, axis=0)
    mask = np.zeros((num_frames, height, width), dtype=bool)
    rgb = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    step = max(1, _PIXELS_PER_CHUNK // (width * height * samples**2))
    shadows = cast_shadows(scene.stage, scene.skeleton, scene.identity.body.girth, backdrop)
    for start in range(0, num_frames, step):
        chunk = slice(start, min(start + step, num_frames))
        _draw_geometry(scene, chunk, focal, normal[chunk], depth[chunk], mask[chunk])
        rgb[chunk] = _draw_colours(scene, chunk, focal, backdrop, shadows[chunk], samples)
    intrinsics = np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    joints = scene.camera.to_camera(scene.landmarks.points)
    keypoints = _project(scene, joints, focal, width, height)
    feet = scene.camera.to_camera(foot_points(scene.skeleton, scene.identity.body))
    return DancerClip(
        rgb, normal, depth, mask, keypoints, joints.astype(np.float32), feet.astype(np.float32), intrinsics, fps, seed
    )


def _build_scene(seed: int, identity_seed: int, place_seed: int, times: NDArray[np.float64]) -> _Scene:
    identity = draw_identity(_generators(identity_seed)[0])
    skeleton = dance(_generators(seed)[1], identity.body, times)
    body = build_body(identity, skeleton)
    landmarks = find_landmarks(skeleton, identity.body)
    points = landmarks.points.reshape(-1, 3)
    stage = draw_stage(_generators(place_seed)[2], points)
    if place_seed != seed:
        stage = replace(stage, eye=draw_stage(_generators(seed)[2], points).eye)
    camera = aim_camera(stage.eye, points)
    return _Scene(
        identity=identity,
        skeleton=skeleton,
        body=body,
        landmarks=landmarks,
        stage=stage,
        camera=camera,
        quadrics=to_camera(body.shapes, camera.position, camera.rotation),
        skins=tabulate_skins(body.skins, camera.position, camera.rotation),
        light=camera_light(stage, camera),
    )


def _generators(seed: int) -> list[np.random.Generator]:
    """The sources of person, motion and place."""
    return [np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(3)]


def _draw_geometry(
    scene: _Scene,
    chunk: slice,
    focal: float,
    normal: NDArray[np.float32],
    depth: NDArray[np.float32],
    mask: NDArray[np.bool_],
) -> None:
    """Writes the body's normals, depth and mask, at pixel centres, over the backdrop's."""
    height, width = depth.shape[1:]
    quadrics = scene.quadrics.frames(chunk)
    hits = cast(quadrics, focal=focal, width=width, height=height)
    normals = surface_normals(quadrics, hits.quadrics, hits.points(focal, width, height))
    normal.reshape(-1, 3)[hits.pixels] = normals.T
    depth.reshape(-1)[hits.pixels] = hits.depths
    mask.reshape(-1)[hits.pixels] = True


def _draw_colours(
    scene: _Scene, chunk: slice, focal: float, backdrop: Backdrop, shadows: NDArray[np.float64], samples: int
) -> NDArray[np.float64]:
    """Colours of some frames `(f, H, W, 3)` uint8: the body, `samples` x `samples` rays per pixel, on the backdrop."""
    num_frames, height, width = shadows.shape
    fine_width, fine_height, fine_focal = width * samples, height * samples, focal * samples
    quadrics = scene.quadrics.frames(chunk)
    hits = cast(quadrics, focal=fine_focal, width=fine_width, height=fine_height)
    points = hits.points(fine_focal, fine_width, fine_height)
    normals = surface_normals(quadrics, hits.quadrics, points)
    frame, quadric = np.divmod(hits.quadrics, quadrics.skins.size)
    rows = (frame + chunk.start) * scene.skins.num_parts + quadrics.skins[quadric]
    colours, gloss = surface_colours(scene.skins, scene.identity, rows, points, 1.0 / fine_focal)
    colours = shade(colours, gloss, normals, points, scene.light)
    lines, columns = np.divmod(hits.pixels, fine_width)
    pixels = lines // samples * width + columns // samples
    size = num_frames * height * width
    share = np.float32(1.0 / samples**2)
    background = 1.0 - np.bincount(pixels, minlength=size) * share
    background = background.reshape(shadows.shape) * (1.0 - _SHADOW_STRENGTH * scene.light.lamp.mean() * shadows)
    picture = background[..., None] * backdrop.colours
    for channel in range(3):
        body = np.bincount(pixels, weights=colours[channel].clip(0.0, 1.0), minlength=size)
        picture[..., channel] += body.reshape(shadows.shape) * share
    return (picture * 255.0 + 0.5).clip(0.0, 255.0).astype(np.uint8)


def _project(scene: _Scene, joints: NDArray[np.float64], focal: float, width: int, height: int) -> NDArray[np.float32]:
    """Key points `(f, 128, 3)` float32 of joints `(f, 128, 3)` in camera space; occlusion is traced by rays."""
    directions = joints[..., :2] / -joints[..., 2:]
    x = directions[..., 0] * focal / width + 0.5
    y = 0.5 - directions[..., 1] * focal / height
    nearest = depth_along(scene.quadrics, directions)
    hidden = nearest < -joints[..., 2] - scene.landmarks.skin_depths
    details = np.ones(joints.shape[1], dtype=bool)
    details[:18] = False
    details[_HEAD_POINTS] = True
    confidence = np.where(
        hidden, np.where(details, HIDDEN_DETAIL_CONFIDENCE, HIDDEN_JOINT_CONFIDENCE), VISIBLE_CONFIDENCE
    )
    outside = (x < 0) | (x > 1) | (y < 0) | (y > 1)
    return np.stack([x, y, np.where(outside, 0.0, confidence)], axis=-1).astype(np.float32)
