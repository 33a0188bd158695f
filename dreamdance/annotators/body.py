"""Depth and normals of a person from 3D landmarks and a mask alone, without any network of its own (annotator `body`).

The landmarks move the skeleton of the procedural dancers, the mask says how thick it is, and the dancers' ray casting
finds what each pixel shows: so depth and normals belong to the same surface. It has a body's shape, not its clothes'.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.body_centering import centre_joints
from dreamdance.annotators.body_girths import fit_girths
from dreamdance.annotators.body_outline import Surface, follow_mask
from dreamdance.annotators.body_skeleton import SeenBody, find_skeleton
from dreamdance.annotators.heartbeats import beat
from dreamdance.annotators.protocols import NUM_LANDMARKS, Depths, PersonPoses
from dreamdance.annotators.weights import NetworkFile
from dreamdance.dancers import body as dancers
from dreamdance.dancers.quadrics import Quadrics, ShapeList, cast, leave_out, surface_normals, to_camera

_Array = NDArray[np.floating[Any]]

# Assumed focal length, in the longer sides of the picture.
_FOCAL = 1.8
# Least distance between camera and hips, in metres of a body of standard height.
_NEAREST = 2.0
# Arms with a less visible joint are left out: one that is hidden must not lie before the trunk. Legs are not: wide
# trousers hide their joints, and nothing else of a body is where they are.
_LEAST_VISIBILITY = 0.3
_FRAMES_PER_CHUNK = 8
# How often the joints are moved to the middle of their limbs; each time the girths are fitted again.
_CENTRINGS = 2

_GREY = dancers.Material("plain", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Landmarks of each arm.
_ARM_POINTS = ((11, 13, 15), (12, 14, 16))


class Body:
    """The annotator."""

    sees_background = False
    uses: Mapping[str, tuple[str, ...]] = dict.fromkeys(("normal", "depth"), ("landmarks", "mask"))
    networks: tuple[NetworkFile, ...] = ()

    def __init__(self, *, focal: float = _FOCAL) -> None:
        """Sets the camera.

        Args:
            focal: assumed focal length, in the longer sides of the picture.
        """
        if not focal > 0:
            raise ValueError(f"focal is {focal}; it must be positive")
        self.focal = focal
        # The surface of the last clip, of which only one map was taken, and the inputs that it was made from.
        self._left: tuple[str, PersonPoses, NDArray[np.float32], Surface] | None = None

    def annotate_normal(
        self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Normals `(f, H, W, 3)` of the person; (0, 0, 1) outside of the mask.

        Raises:
            ValueError: the poses have no landmarks, or shapes do not fit.
        """
        return self._take("normal", poses, mask).normals

    def annotate_depth(self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]) -> Depths:
        """Depth `(f, H, W)` of the person; outside of the mask the greatest depth of the clip.

        Raises:
            ValueError: the poses have no landmarks, or shapes do not fit.
        """
        return Depths(self._take("depth", poses, mask).depths, "depth")

    def _take(self, task: str, poses: PersonPoses, mask: NDArray[np.float32]) -> Surface:
        """The surface; the second map of the same clip (the same objects) takes the one of the first."""
        left, self._left = self._left, None
        if left is not None and left[0] != task and left[1] is poses and left[2] is mask:
            return left[3]
        surface = self.find_surface(poses, mask)
        self._left = (task, poses, mask, surface)
        return surface

    def find_surface(self, poses: PersonPoses, mask: NDArray[np.float32]) -> Surface:
        """Depth and normals at once."""
        landmarks = _without_gaps(_check(poses, mask))
        inside = mask >= 0.5
        num_frames, height, width = mask.shape
        seen = find_skeleton(landmarks, width=width, height=height, focal=self.focal, nearest=_NEAREST)
        girths = fit_girths(seen, inside)
        for _ in range(_CENTRINGS):
            beat()
            landmarks = centre_joints(landmarks, seen, girths, inside)
            seen = find_skeleton(landmarks, width=width, height=height, focal=self.focal, nearest=_NEAREST)
            girths = fit_girths(seen, inside)
        quadrics = _surround(seen, girths)
        depths = np.full(mask.shape, np.inf, dtype=np.float32)
        normals = np.zeros((*mask.shape, 3), dtype=np.float32)
        normals[..., 2] = 1.0
        for start in range(0, num_frames, _FRAMES_PER_CHUNK):
            beat()
            chunk = slice(start, start + _FRAMES_PER_CHUNK)
            _cast(quadrics.frames(chunk), seen.focal, depths[chunk], normals[chunk])
        return follow_mask(Surface(depths, normals), inside, focal=seen.focal, hips=-seen.skeleton.pelvis[:, 2])


def _check(poses: PersonPoses, mask: NDArray[np.float32]) -> NDArray[np.float32]:
    landmarks = poses.landmarks
    if landmarks is None:
        raise ValueError(
            "the annotator body needs the 33 points in space that blazepose finds; set videos.annotators.pose: "
            "blazepose, or another annotator for depth and normals"
        )
    if landmarks.shape != (len(mask), NUM_LANDMARKS, 4) or mask.ndim != 3:
        raise ValueError(
            f"landmarks {landmarks.shape} and mask {mask.shape} must be (f, {NUM_LANDMARKS}, 4) and (f, H, W)"
        )
    if not np.isfinite(landmarks).all():
        raise ValueError("landmarks contain values that are not finite")
    return landmarks


def _without_gaps(landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gives frames in which nobody was found (visibility 0) the landmarks of the nearest frame with somebody.

    Zeros would otherwise disturb the scale and the proportions of the whole clip.
    """
    found = np.flatnonzero(landmarks[..., 3].max(axis=1) > 0)
    if not len(found):
        return landmarks
    nearest = np.abs(np.arange(len(landmarks))[:, None] - found).argmin(axis=1)
    filled: NDArray[np.float32] = landmarks[found[nearest]]
    return filled


def _surround(seen: SeenBody, girths: dancers.Girths) -> Quadrics:
    """Puts the dancers' shapes around the skeleton; arms that are not visible enough are left out."""
    skeleton, num_frames = seen.skeleton, len(seen.visibility)
    person = dancers.Identity(
        body=seen.proportions, materials=(_GREY,) * 5, hair_style="short", sleeves=2.0, trousers=2.0, hem=0.0,
        skirt=0.0, flare=1.0,
    )  # fmt: skip
    body = dancers.BodyShapes(ShapeList(num_frames), dancers.Skins())
    dancers.add_head(body, person, skeleton, girths)
    dancers.add_trunk(body, person, skeleton, girths)
    for side in (0, 1):
        dancers.add_leg(body, person, skeleton, girths, side)
    hidden = np.zeros((num_frames, len(body.skins.cuts)), dtype=bool)
    for side, points in enumerate(_ARM_POINTS):
        first = len(body.skins.cuts)
        dancers.add_arm(body, person, skeleton, girths, side)
        unseen = seen.visibility[:, points].min(axis=1) < _LEAST_VISIBILITY
        hidden = np.concatenate([hidden, np.tile(unseen[:, None], len(body.skins.cuts) - first)], axis=1)
    quadrics = to_camera(body.shapes, np.zeros(3), np.eye(3), sideless=True)
    return leave_out(quadrics, hidden[:, quadrics.skins])


def _cast(quadrics: Quadrics, focal: float, depths: NDArray[np.float32], normals: NDArray[np.float32]) -> None:
    """Writes depth and normals where the quadrics are hit."""
    height, width = depths.shape[1:]
    hits = cast(quadrics, focal=focal, width=width, height=height)
    normals.reshape(-1, 3)[hits.pixels] = surface_normals(quadrics, hits.quadrics, hits.points(focal, width, height)).T
    depths.reshape(-1)[hits.pixels] = hits.depths
