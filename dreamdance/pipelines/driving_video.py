"""Poses for the pipelines from a video of a person, in one function."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from dreamdance.annotators.driving_video import check_options, choose_frames, fit_sequence, to_reference, to_sequence
from dreamdance.annotators.opening import open_annotator
from dreamdance.annotators.people import Box
from dreamdance.annotators.protocols import PoseAnnotator
from dreamdance.annotators.video_person import find_in_picture, find_in_video
from dreamdance.errors import UserError
from dreamdance.media.pictures import read_picture
from dreamdance.media.pose_drawing import draw_pose
from dreamdance.media.video import probe_video


@dataclass(frozen=True)
class DrivingPoses:
    """Poses for the argument `poses` of the pipelines.

    Attributes:
        poses: a drawing for each frame; of the image's size if the skeleton was fitted to its person, else of the
            video's.
        fps: frames per second.
        reference_pose: the drawing of the image's person, of the image's size, for the argument of that name; None
            without `image`.
    """

    poses: list[Image.Image]
    fps: float
    reference_pose: Image.Image | None = None


def poses_from_video(
    video: Path | str,
    *,
    image: Path | str | None = None,
    align: Literal["scale", "bones"] | None = None,
    person: int | Box | None = None,
    fps: float | None = None,
    smooth: bool = True,
    annotator: str | PoseAnnotator = "blazepose",
    weights: Path | str = "weights/networks",
    device: str = "cpu",
) -> DrivingPoses:
    """Finds the key points of one person of a video and draws them, as the task `animate` does.

    Args:
        video: a video of a person.
        image: the reference picture; needed by `align`, and for `reference_pose`.
        align: fits the skeleton to the person of the image: by one scale, or limb by limb. None leaves it as it is.
        person: whom to follow: 0 (the default) is the largest and most central person; or a box in fractions of the
            frame.
        fps: frames per second that are taken; None keeps the video's.
        smooth: whether to put exchanged legs right, to fill short gaps, and to smooth the key points over time.
        annotator: an opened annotator, or the name of one.
        weights: folder of the networks' weights, for an annotator's name.
        device: `cpu` or `cuda`, for an annotator's name.

    Raises:
        UserError: a value is not accepted; a file, the weights or the person cannot be found; the skeleton cannot be
            fitted.
    """
    check_options(align=align, person=person, fps=fps)
    if align is not None and image is None:
        raise UserError("align needs `image`, to whose person the skeleton is fitted")
    opened = open_annotator(annotator, weights=weights, device=device) if isinstance(annotator, str) else annotator
    if not isinstance(opened, PoseAnnotator):
        raise UserError(f"annotator: {annotator} finds no poses")
    source = probe_video(video)
    body, reference_pose = None, None
    if image is not None:  # before the video, which takes longer
        picture = read_picture(Path(image))
        height, width = picture.shape[:2]
        body = to_reference(find_in_picture(opened, picture), width=width, height=height, where=str(image))
        reference_pose = Image.fromarray(draw_pose(body.keypoints[0], width=width, height=height))
    search = find_in_video(opened, source, choose_frames(source, fps), person=person)
    while True:
        try:
            next(search)
        except StopIteration as found:
            keypoints = found.value.keypoints
            break
    sequence = to_sequence(source, keypoints, fps=fps or source.fps, smooth=smooth)
    if align is not None and body is not None:
        sequence = fit_sequence(sequence, body, align)
    size = {"width": sequence.width, "height": sequence.height}
    poses = [Image.fromarray(draw_pose(points, **size)) for points in sequence.keypoints]
    return DrivingPoses(poses, sequence.fps, reference_pose)
