"""Retargets a driving skeleton to the reference bone by bone: the motion of one person on the body of another.

`media.alignment` scales the whole skeleton by one factor. Here every bone gets the length of the reference's bone and
keeps its direction and foreshortening in each frame; the path of the body is scaled, the feet keep their contact with
the floor, hands and face follow the joints that they hang on.

A picture shows bones foreshortened, the reference as well as the driving frames, each in an unknown way. Frames in
which the driving person has the pose of the reference are foreshortened alike, so the ratio of the two lengths is there
that of the true lengths. So frames count by how near their pose is to the reference's, and bones by how well their
vectors agree. What remains uncertain is drawn towards the scale of the whole body.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamdance.media.alignment import MIN_JOINTS, SCALE_RANGE, AlignmentError
from dreamdance.media.keypoints import (
    BODY,
    CONFIDENCE_THRESHOLD,
    FACE,
    LEFT_HAND,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    KeypointSequence,
)

_Array = NDArray[np.float64]

# The middle of the hips: a point of our own behind the others.
_PELVIS = NUM_KEYPOINTS
_NECK = 1
_ANKLES = [10, 13]
_HIPS = [8, 11]

# (start, end, group): the bones of a group have one ratio of lengths; so both sides of a body are measured at once.
_BONES = (
    (_PELVIS, _NECK, "trunk"),
    (_PELVIS, 8, "hips"), (_PELVIS, 11, "hips"),
    (8, 9, "thighs"), (11, 12, "thighs"),
    (9, 10, "shins"), (12, 13, "shins"),
    (_NECK, 2, "shoulders"), (_NECK, 5, "shoulders"),
    (2, 3, "upper arms"), (5, 6, "upper arms"),
    (3, 4, "forearms"), (6, 7, "forearms"),
    (_NECK, 0, "neck"),
    (0, 14, "head"), (0, 15, "head"), (0, 16, "head"), (0, 17, "head"),
    # From the wrist to the root of the middle finger, and from the bridge of the nose to the chin.
    (LEFT_HAND.start, LEFT_HAND.start + 9, "hands"), (RIGHT_HAND.start, RIGHT_HAND.start + 9, "hands"),
    (FACE.start + 27, FACE.start + 8, "head"),
)  # fmt: skip
_STARTS, _ENDS = [bone[0] for bone in _BONES], [bone[1] for bone in _BONES]
_MEMBERS = {
    name: [number for number, bone in enumerate(_BONES) if bone[2] == name] for name in sorted({b[2] for b in _BONES})
}
# Bones that give the scale of the whole body: long, and rarely foreshortened much.
_UPRIGHT = np.isin([bone[2] for bone in _BONES], ["trunk", "thighs", "shins"])
# Bones that decide whether two poses are alike.
_COMPARED = ~np.isin([bone[2] for bone in _BONES], ["head", "hands"])

# The constants were chosen on 12 pairs of rendered dancers (another body in the same motion, 8 reference frames each).
# The mean joint error is .011 of the torso; with half or twice a value it is .009 to .014, but .031 with twice the
# tolerance of poses.
# The length of a driving bone is this quantile of its lengths in all frames: the least foreshortened ones.
_LENGTH_QUANTILE = 0.95
# Frames count by exp(-(difference from the best frame / this)^2 / 2); differences are in lengths of the bones.
_POSE_TOLERANCE = 0.06
# Where no frame is like the reference, frames whose differences are within this part of the smallest count alike.
_RELATIVE_TOLERANCE = 0.35
# Standard deviation, in log lengths, of one bone of a person from the scale of the person's whole body. People differ
# by about 5 %, drawn characters by more.
_PROPORTION_SPREAD = 0.12
# Standard deviation of the measured log ratio of a bone of full length, per turn (the distance of unit vectors) between
# the reference and a frame. The smallest turn stands for errors of the key points themselves.
_NOISE_PER_TURN, _SMALLEST_TURN = 0.35, 0.03
# Poses are compared at the ratios that the last round found.
_ROUNDS = 6
# No proportion changes by more than this factor.
_LARGEST_CHANGE = 1.5


@dataclass(frozen=True)
class _Fit:
    """How a reference's body relates to a driving one: scale of the whole, ratio of each group of bones, weights."""

    scale: float
    ratios: dict[str, float]
    weights: _Array  # (f,), sum 1: how much each frame counts


def retarget_bones(driving: KeypointSequence, reference: KeypointSequence) -> NDArray[np.float32]:
    """Gives a driving sequence the bones of the reference's body.

    Args:
        driving: the driving sequence; `keypoints` `(f, 128, 3)`.
        reference: the key points of the reference picture; only the first frame is used.

    Returns:
        `(f, 128, 3)` in [0,1] of the reference's frame, with the confidences of the driving sequence. The person stands
        where the reference stands in the frames in which the two poses are alike; if that would carry the body over an
        edge of the picture, it is moved sideways as far as needed. An ankle on the floor stays on the floor.

    Raises:
        AlignmentError: too few joints are visible in both, or the scale is outside `SCALE_RANGE`.
    """
    points, seen = _measured(driving.keypoints, driving)
    target, target_seen = (part[0] for part in _measured(reference.keypoints[:1], reference))
    root = _choose_root(seen, target_seen)
    fit = _fit(points, seen, target, target_seen)
    present = np.concatenate([driving.keypoints[..., 2] > 0, seen[:, _PELVIS, None]], axis=1)
    path = _fill_gaps(points[:, root], seen[:, root])
    moved = _rebuild(points, present, path, fit, root)
    moved += target[root] - np.einsum("f,fi->i", fit.weights, moved[:, root])
    moved[..., 1] += _floor_correction(points, seen, moved, (target, target_seen), fit)[:, None]
    moved[..., 0] += _shift_inside(moved[:, BODY, 0], seen[:, BODY], reference.width)
    result = driving.keypoints.astype(np.float64)
    result[..., :2] = moved[:, :NUM_KEYPOINTS] / [reference.width, reference.height]
    return result.astype(np.float32)


def _measured(keypoints: NDArray[np.float32], sequence: KeypointSequence) -> tuple[_Array, NDArray[np.bool_]]:
    """Points in pixels `(f, 129, 2)` and whether they are seen `(f, 129)`; the last is the middle of the hips."""
    points = keypoints[..., :2].astype(np.float64) * [sequence.width, sequence.height]
    seen = keypoints[..., 2] >= CONFIDENCE_THRESHOLD
    points = np.concatenate([points, points[:, _HIPS].mean(axis=1, keepdims=True)], axis=1)
    return points, np.concatenate([seen, seen[:, _HIPS].all(axis=1, keepdims=True)], axis=1)


def _choose_root(seen: NDArray[np.bool_], target_seen: NDArray[np.bool_]) -> int:
    """The point whose path the body follows: the middle of the hips, or the neck where hips are seldom visible."""
    for root in (_PELVIS, _NECK):
        if target_seen[root] and 2 * seen[:, root].sum() >= seen[:, BODY].any(axis=1).sum() > 0:
            return root
    raise AlignmentError(
        "align: bones needs both hips or the neck, visible in the reference and in at least half of the driving "
        "frames; set 'align' to scale, or remove it from the entry"
    )


def _fit(points: _Array, seen: NDArray[np.bool_], target: _Array, target_seen: NDArray[np.bool_]) -> _Fit:
    vectors, wanted = points[:, _ENDS] - points[:, _STARTS], target[_ENDS] - target[_STARTS]
    visible = seen[:, _ENDS] & seen[:, _STARTS]
    lengths, wanted_lengths = np.linalg.norm(vectors, axis=-1), np.linalg.norm(wanted, axis=-1)
    shared = visible & (target_seen[_ENDS] & target_seen[_STARTS]) & (lengths > 0) & (wanted_lengths > 0)
    most = int((shared & _COMPARED).sum(axis=1).max(initial=0))
    if most < MIN_JOINTS:
        raise AlignmentError(
            f"align: no frame of the driving sequence shows more than {most} of the bones that the reference shows, "
            f"{MIN_JOINTS} are needed; remove 'align' from the entry"
        )
    usual = np.ones(len(_BONES))
    for members in _MEMBERS.values():
        if (found := lengths[:, members][visible[:, members]]).size:
            usual[members] = max(float(np.quantile(found, _LENGTH_QUANTILE)), 1e-6)
    upright = shared & _UPRIGHT if (shared & _UPRIGHT).any() else shared & _COMPARED
    usable = (shared & _COMPARED).sum(axis=1) >= MIN_JOINTS
    weights = usable / usable.sum()
    scale = _fit_scale(lengths, wanted_lengths, upright, weights)
    ratios = np.full(len(_BONES), scale)
    turns = _turns(vectors, wanted, shared, usual)
    for _ in range(_ROUNDS):
        differences = np.linalg.norm(wanted / ratios[:, None] - vectors, axis=-1) / usual
        importance = (shared & _COMPARED) * usual  # long bones show a pose better than short ones
        distances = np.sqrt((importance * differences**2).sum(axis=1) / np.maximum(importance.sum(axis=1), 1e-9))
        nearest = distances[usable].min()
        tolerance = max(_POSE_TOLERANCE, _RELATIVE_TOLERANCE * nearest)
        weights = np.where(usable, np.exp(-0.5 * ((distances - nearest) / tolerance) ** 2), 0.0)
        weights /= weights.sum()
        scale = _fit_scale(lengths, wanted_lengths, upright, weights)
        safe = np.where(shared, lengths, 1.0)
        changes = np.where(shared, np.log(np.where(shared, wanted_lengths, 1.0) / safe / scale), 0.0)
        deviation = _NOISE_PER_TURN * turns / np.minimum(safe / usual, 1.0)
        ratios = _combine(changes, np.where(shared, weights[:, None] / deviation**2, 0.0), scale)
    return _Fit(scale, {name: float(ratios[members[0]]) for name, members in _MEMBERS.items()}, weights)


def _turns(vectors: _Array, wanted: _Array, shared: NDArray[np.bool_], usual: _Array) -> _Array:
    """How much the direction of each bone, and of all bones of the frame, differs from the reference's `(f, bones)`."""
    units, wanted_units = (
        part / np.maximum(np.linalg.norm(part, axis=-1, keepdims=True), 1e-9) for part in (vectors, wanted)
    )
    turns = np.linalg.norm(units - wanted_units, axis=-1)
    importance = (shared & _COMPARED) * usual
    whole = (importance * turns**2).sum(axis=1) / np.maximum(importance.sum(axis=1), 1e-9)
    return np.asarray(np.sqrt(turns**2 + whole[:, None] + _SMALLEST_TURN**2))


def _combine(changes: _Array, certainty: _Array, scale: float) -> _Array:
    """The ratio of each bone: the mean change of its group, drawn towards the scale as far as it is uncertain."""
    ratios = np.empty(len(_BONES))
    for members in _MEMBERS.values():
        total = certainty[:, members].sum()
        change = (certainty[:, members] * changes[:, members]).sum() / max(total, 1e-12)
        known = total / len(members)  # all frames and both sides are one observation
        change *= known / (known + _PROPORTION_SPREAD**-2)
        ratios[members] = scale * np.exp(np.clip(change, -np.log(_LARGEST_CHANGE), np.log(_LARGEST_CHANGE)))
    return ratios


def _fit_scale(lengths: _Array, wanted: _Array, shared: NDArray[np.bool_], weights: _Array) -> float:
    """The least-squares factor from driving to reference lengths, over all frames."""
    importance = shared * weights[:, None]
    total = float((importance * lengths**2).sum())
    scale = float((importance * lengths * wanted).sum()) / total if total > 0 else 0.0
    low, high = SCALE_RANGE
    if not low <= scale <= high:
        raise AlignmentError(
            f"align: the driving skeleton would have to be scaled by {scale:.3g}, which is not between {low} and "
            f"{high}; one of the two skeletons may be incomplete. Remove 'align' from the entry"
        )
    return scale


def _tree(root: int) -> list[tuple[int, int, str]]:
    """(point, the point that it hangs on, group of its ratio), each after the point that it hangs on."""
    hips = [(_NECK, _PELVIS, "trunk")] if root == _PELVIS else [(_PELVIS, _NECK, "trunk")]
    limbs = [(end, start, group) for start, end, group in _BONES if BODY.start <= end < BODY.stop and group != "trunk"]
    left = [(point, 7, "hands") for point in range(LEFT_HAND.start, LEFT_HAND.stop)]
    right = [(point, 4, "hands") for point in range(RIGHT_HAND.start, RIGHT_HAND.stop)]
    return [*hips, *limbs, *left, *right, *((point, 0, "head") for point in range(FACE.start, FACE.stop))]


def _rebuild(points: _Array, present: NDArray[np.bool_], path: _Array, fit: _Fit, root: int) -> _Array:
    """All points `(f, 129, 2)` with new bones, around the scaled path of the root.

    A point whose neighbour towards the root is missing in a frame hangs on the next one that is there.
    """
    moved, old_base, new_base = points.copy(), points.copy(), points.copy()
    old_base[:, root], moved[:, root], new_base[:, root] = path, fit.scale * path, fit.scale * path
    for point, parent, group in _tree(root):
        moved[:, point] = new_base[:, parent] + fit.ratios[group] * (points[:, point] - old_base[:, parent])
        there = present[:, point, None]
        old_base[:, point] = np.where(there, points[:, point], old_base[:, parent])
        new_base[:, point] = np.where(there, moved[:, point], new_base[:, parent])
    return moved


def _floor_correction(
    points: _Array,
    seen: NDArray[np.bool_],
    moved: _Array,
    reference: tuple[_Array, NDArray[np.bool_]],
    fit: _Fit,
) -> _Array:
    """What to add to y in each frame `(f,)` so that the lower ankle's height changes as in the scaled original."""
    target, target_seen = reference
    visible = seen[:, _ANKLES]
    known = visible.any(axis=1)
    if not known.any():
        return np.zeros(len(points))
    lowest, lowest_moved = (
        np.where(visible, places[:, _ANKLES, 1], -np.inf).max(axis=1, initial=-np.inf) for places in (points, moved)
    )
    lowest, lowest_moved = _fill_gaps(lowest[:, None], known)[:, 0], _fill_gaps(lowest_moved[:, None], known)[:, 0]
    weights = fit.weights * known if (fit.weights * known).sum() > 0 else known.astype(np.float64)
    weights = weights / weights.sum()
    level = float((weights * lowest_moved).sum())
    if target_seen[_ANKLES].any():
        level = float(target[_ANKLES, 1][target_seen[_ANKLES]].max())
    return np.asarray(level + fit.scale * (lowest - (weights * lowest).sum()) - lowest_moved)


def _fill_gaps(values: _Array, known: NDArray[np.bool_]) -> _Array:
    """Interpolates `(f, n)` over time where it is not known; the ends keep the nearest known value."""
    frames = np.arange(len(values))
    return np.stack([np.interp(frames, frames[known], column[known]) for column in values.T], axis=1)


def _shift_inside(x: _Array, seen: NDArray[np.bool_], width: int) -> float:
    """The smallest shift of x in pixels that keeps the seen points in the picture; centres a path that is too wide."""
    low, high = float(x[seen].min()), float(x[seen].max())
    if high - low > width:
        return 0.5 * width - 0.5 * (low + high)
    return max(0.0, -low) + min(0.0, width - high)
