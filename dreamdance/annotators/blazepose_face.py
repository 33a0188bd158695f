"""The face of a person whose head's place is known: 468 points of a mesh, of which 68 are in iBUG order."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.anchor_detector import AnchorDetector
from dreamdance.annotators.picture_regions import to_picture
from dreamdance.annotators.tflite_network import TfliteNetwork, sigmoid

_NUM_MESH_POINTS = 468
# The points of the mesh that are nearest to the 68 points of iBUG.
_MESH_OF_IBUG = (
    127, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 356,  # jaw
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,  # brows
    168, 197, 5, 4, 75, 97, 2, 326, 305,  # nose
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # eyes
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,  # outer lips
    78, 82, 13, 312, 308, 317, 14, 87,  # inner lips
)  # fmt: skip
# Faces of a lower score are not used: of the detector, and of the mesh (MediaPipe's value).
_DETECTION_SCORE, _MESH_SCORE = 0.4, 0.5
# The mesh's region against the detector's box (MediaPipe's value).
_MARGIN = 1.5
# The region around the head in which a face is looked for, in distances between the ears and between eyes and mouth.
_EAR_DISTANCES, _EYE_MOUTH_DISTANCES = 3.5, 6.0
# A face whose nose is farther from the body's nose, in sides of its box, is another person's.
_NOSE_DISTANCE = 0.5
# BlazePose's landmarks of the head: all, eyes, ears, mouth.
_HEAD, _EYES, _EARS, _MOUTH = slice(0, 11), [2, 5], [7, 8], [9, 10]
# The detector's points: the eye at the left of the picture, the other eye, the tip of the nose.
_FIRST_EYE, _SECOND_EYE, _NOSE = 0, 1, 2


@dataclass(frozen=True)
class Face:
    """A face in a picture: `points` `(68, 2)` in pixels, in iBUG order, and its probability `score` in [0,1]."""

    points: NDArray[np.float64]
    score: float


class FaceNetworks:
    """The networks `face_detection_short_range` and `face_landmark`."""

    def __init__(self, detector: AnchorDetector, mesh: TfliteNetwork) -> None:
        self._detector = detector
        self._mesh = mesh

    def find_face(self, picture: NDArray[np.uint8], landmarks: NDArray[np.float64], *, smallest: float) -> Face | None:
        """Finds the face of a person.

        Args:
            picture: `(H, W, 3)`.
            landmarks: BlazePose's `(33, 2)` in pixels of the picture.
            smallest: a lower limit of the side of the region that is searched, in pixels.

        Returns:
            The face, or None if there is none to see.
        """
        centre = landmarks[_HEAD].mean(axis=0)
        ears = float(np.hypot(*(landmarks[_EARS[0]] - landmarks[_EARS[1]])))
        eyes_to_mouth = float(np.hypot(*(landmarks[_EYES].mean(axis=0) - landmarks[_MOUTH].mean(axis=0))))
        side = max(_EAR_DISTANCES * ears, _EYE_MOUTH_DISTANCES * eyes_to_mouth, smallest)
        searched = (float(centre[0]), float(centre[1]), side, 0.0)
        faces = self._detector.detect(picture, searched, threshold=_DETECTION_SCORE)
        own = [face for face in faces if np.hypot(*(face.points[_NOSE] - landmarks[0])) < _NOSE_DISTANCE * face.side]
        if not own:
            return None
        face = own[0]
        across, down = face.points[_SECOND_EYE] - face.points[_FIRST_EYE]
        region = (float(face.centre[0]), float(face.centre[1]), _MARGIN * face.side, math.atan2(down, across))
        values, logit = self._mesh.run(picture, region, lowest=0.0)
        score = float(sigmoid(logit).reshape(-1)[0])
        if score < _MESH_SCORE:
            return None
        mesh = values.reshape(_NUM_MESH_POINTS, 3)[list(_MESH_OF_IBUG), :2]
        return Face(to_picture(mesh, region, size=self._mesh.size), score)
