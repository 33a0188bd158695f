"""Hands around known wrists: a palm detector finds the hand near each wrist, a second network its 21 points."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.anchor_detector import AnchorDetector, Detection
from dreamdance.annotators.picture_regions import Region, region_along, to_picture
from dreamdance.annotators.tflite_network import TfliteNetwork

NUM_HAND_POINTS = 21
# Sides of the regions around a wrist in which a palm is looked for, in lengths of the forearm. Measured on 114 hands of
# dancers: hands found in 55 % in the best of these, in 23 % in a region computed from the body's points of the hand.
_SEARCHED_SIDES = (1.6, 2.2, 3.0)
# The regions lie so far beyond the wrist, in lengths of the forearm.
_BEYOND_WRIST = 0.25
# A palm of a lower score is ignored; the second network decides whether there is a hand.
_PALM_SCORE = 0.1
# A hand with a lower score counts as not found (MediaPipe's value); with a higher one no other region is tried.
_HAND_SCORE, _CERTAIN_SCORE = 0.5, 0.9
# A hand with at least this score is looked at again, in the region that its own points give.
_SECOND_LOOK_SCORE = 0.1
# Farther from the body's wrist, in lengths of the forearm, it is another hand.
_WRIST_DISTANCE = 0.5
# The hand's region against the palm's box: wider, and moved towards the fingers (MediaPipe's values).
_HAND_MARGIN, _HAND_SHIFT = 2.6, 0.5
# The same against the box of the points of palm and lower fingers (MediaPipe's values, in its tracking of hands).
_POINTS_MARGIN, _POINTS_SHIFT = 2.0, 0.1
_LOWER_POINTS = [0, 1, 2, 3, 5, 6, 9, 10, 13, 14, 17, 18]
# The palm detector's points of the wrist and of the middle finger's root.
_WRIST, _MIDDLE_FINGER = 0, 2


@dataclass(frozen=True)
class Hand:
    """A hand in a picture.

    Attributes:
        points: `(21, 2)` in pixels of the picture: the wrist, then four of each finger from root to tip, thumb first.
        score: the probability that this is a hand, in [0,1].
    """

    points: NDArray[np.float64]
    score: float


class HandNetworks:
    """The networks `palm_detection_full` and `hand_landmark_full`."""

    def __init__(self, palms: AnchorDetector, hands: TfliteNetwork) -> None:
        self._palms = palms
        self._hands = hands

    def find_hand(
        self, picture: NDArray[np.uint8], *, elbow: NDArray[np.float64], wrist: NDArray[np.float64], shortest: float
    ) -> Hand | None:
        """Finds the hand at a wrist.

        Args:
            picture: `(H, W, 3)`.
            elbow, wrist: `(2,)` in pixels of the picture.
            shortest: a lower limit of the forearm's length in pixels, for arms that point at the camera.

        Returns:
            The hand, or None if there is none to see.
        """
        forearm = wrist - elbow
        length = max(float(np.hypot(*forearm)), shortest)
        centre = wrist + _BEYOND_WRIST * forearm
        best: Hand | None = None
        for side in _SEARCHED_SIDES:
            region = (float(centre[0]), float(centre[1]), side * length, 0.0)
            palms = self._palms.detect(picture, region, threshold=_PALM_SCORE)
            distances = [float(np.hypot(*(palm.points[_WRIST] - wrist))) for palm in palms]
            if not palms or min(distances) > _WRIST_DISTANCE * length:
                continue
            hand = self._find_points(picture, _region_of_palm(palms[int(np.argmin(distances))]))
            if hand.score >= _SECOND_LOOK_SCORE:
                hand = max(hand, self._find_points(picture, _region_of_hand(hand)), key=lambda found: found.score)
            is_far = float(np.hypot(*(hand.points[0] - wrist))) > _WRIST_DISTANCE * length
            if not is_far and hand.score >= max(_HAND_SCORE, best.score if best else 0.0):
                best = hand
                if hand.score >= _CERTAIN_SCORE:
                    break
        return best

    def _find_points(self, picture: NDArray[np.uint8], region: Region) -> Hand:
        values, score, _, _ = self._hands.run(picture, region, lowest=0.0)
        places = values.reshape(NUM_HAND_POINTS, 3)[:, :2]
        return Hand(to_picture(places, region, size=self._hands.size), float(score[0]))


def _region_of_palm(palm: Detection) -> Region:
    along = palm.points[_MIDDLE_FINGER] - palm.points[_WRIST]
    length = float(np.hypot(*along))
    centre = palm.centre + (along / length if length > 0 else along) * (_HAND_SHIFT * palm.side)
    rotation = region_along(palm.points[_WRIST], palm.points[_MIDDLE_FINGER])
    return float(centre[0]), float(centre[1]), _HAND_MARGIN * palm.side, rotation


def _region_of_hand(hand: Hand) -> Region:
    roots = 0.25 * hand.points[5] + 0.5 * hand.points[9] + 0.25 * hand.points[13]
    rotation = region_along(hand.points[0], roots)
    cosine, sine = math.cos(rotation), math.sin(rotation)
    turn = np.array([[cosine, -sine], [sine, cosine]])  # from the picture into the region, for rows
    lower = hand.points[_LOWER_POINTS] @ turn
    low, high = lower.min(axis=0), lower.max(axis=0)
    side = float((high - low).max())
    centre = ((low + high) / 2 - (0.0, _POINTS_SHIFT * side)) @ turn.T
    return float(centre[0]), float(centre[1]), _POINTS_MARGIN * side, rotation


def keep_own_hands(
    left: Hand | None, right: Hand | None, wrists: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> tuple[Hand | None, Hand | None]:
    """Removes the same hand found at both wrists (left, right) from the wrist that is farther from it."""
    if left is None or right is None:
        return left, right
    extent = max(float(np.ptp(hand.points, axis=0).max()) for hand in (left, right))
    between = float(np.hypot(*(left.points - right.points).T).mean())
    # Two hands that fold together still differ by more than this share of a hand.
    if between > 0.25 * extent:
        return left, right
    to_left, to_right = (
        float(np.hypot(*(hand.points[0] - wrist))) for hand, wrist in zip((left, right), wrists, strict=True)
    )
    return (left, None) if to_left <= to_right else (None, right)
