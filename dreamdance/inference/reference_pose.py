"""The pose of the reference picture, which stage 2 needs if it was trained with `objective.reference_first`."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import MissingInputError, UserError
from dreamdance.inference.driving_videos import KeypointFinder
from dreamdance.inference.manifest import ManifestEntry
from dreamdance.media.keypoint_formats import read_any_keypoints
from dreamdance.media.pictures import read_picture
from dreamdance.media.pose_drawing import draw_pose
from dreamdance.modalities import MODALITIES
from dreamdance.runs.file_states import read_state


class ReferencePoseError(UserError):
    """Nothing gives the pose of an entry's reference picture; the other entries are not affected."""


@contextmanager
def explaining_missing_annotator(entry: ManifestEntry) -> Iterator[None]:
    """In the block, a missing annotator is reported as the missing pose of the reference, with all that may give it.

    Raises:
        ReferencePoseError: the annotator or its weights are missing.
    """
    try:
        yield
    except MissingInputError as error:
        if entry.reference_pose_from != "annotator":
            raise
        raise ReferencePoseError(
            "stage 2 was trained with the reference as the first frame of each window (objective.reference_first), so "
            f"it needs the pose of {entry.image}: give 'reference_keypoints' (a key-point file), 'reference_pose' (a "
            "picture of its drawing) or, if the image is a frame of the pose sequence itself, 'reference_frame'; or "
            f"the network that finds it: {error}"
        ) from error


def draw_reference_pose(
    entry: ManifestEntry, picture: NDArray[np.uint8], finder: KeypointFinder | None
) -> NDArray[np.uint8]:
    """The pose drawing of the reference picture, `(H, W, 3)`, in its size, or in that of `reference_pose`.

    Args:
        entry: an entry whose reference pose is not a frame of its pose sequence.
        picture: the reference picture `(H, W, 3)`.
        finder: finds the key points, if the entry does not give them.

    Raises:
        UserError: the pose is not given and cannot be found, or a file cannot be used, or has another aspect.
    """
    height, width = picture.shape[:2]
    if entry.reference_pose is not None:
        drawing = read_picture(entry.reference_pose, background=MODALITIES["pose"].background)
        if abs(drawing.shape[1] * height / (drawing.shape[0] * width) - 1) > 0.03:
            raise ReferencePoseError(
                f"{entry.reference_pose} has {drawing.shape[1]}x{drawing.shape[0]} pixels and {entry.image} has "
                f"{width}x{height}: a drawing of this picture has its aspect ratio"
            )
        return drawing
    if entry.reference_keypoints is not None:
        keypoints = read_any_keypoints(entry.reference_keypoints, size=(width, height), fps=1.0).keypoints
    else:
        assert finder is not None, "the caller gives a finder"
        state = read_state(entry.image)
        if state is None:
            raise ReferencePoseError(f"{entry.image} was removed while it was read")
        with explaining_missing_annotator(entry):
            keypoints = finder.of_picture(entry.image, picture, state).keypoints
    return draw_pose(keypoints[0], width=width, height=height)
