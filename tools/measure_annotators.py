"""Measures annotators on rendered dancers, whose true poses, normals and depths are known exactly.

    python tools/measure_annotators.py [--clips 12] [--frames 8] [--size 256 384] [--networks FOLDER]

It prints a table: the mean angle of normals inside the body, AbsRel of depth inside the body (scale and shift of the
disparity fitted there, for the whole clip, as in `evaluate`), and time per frame; beside trivial answers. With the
folder that `tools/networks.sh` filled, also with BlazePose's landmarks and mask.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.blazepose import BlazePose
from dreamdance.annotators.body import Body
from dreamdance.annotators.body_outline import Surface
from dreamdance.annotators.exact_poses import exact_poses
from dreamdance.annotators.protocols import PersonPoses
from dreamdance.dancers.render import HELD_OUT_SEEDS, DancerClip, render_clip
from dreamdance.evaluation.geometry_metrics import angular_error, depth_error
from dreamdance.media.surfaces import PinholeCamera, consistency_angle


@dataclass(frozen=True)
class GeometryScores:
    """Errors of one answer on one clip: degrees, AbsRel, degrees between normals and the depth's own, seconds."""

    normals: float
    depth: float
    consistency: float
    seconds_per_frame: float


def held_out_clips(num_clips: int, *, num_frames: int, width: int, height: int) -> Iterator[DancerClip]:
    """Renders dancers that no training has."""
    for number in range(num_clips):
        seed = HELD_OUT_SEEDS.start + number
        yield render_clip(seed, num_frames=num_frames, width=width, height=height)


def score_surface(clip: DancerClip, surface: Surface, *, focal: float, seconds: float = 0.0) -> GeometryScores:
    """Compares a surface with a clip's true one, inside the true mask.

    Args:
        clip: the dancer.
        surface: the answer.
        focal: focal length in pixels by which the answer's depth is turned into points.
        seconds: time that the answer took.
    """
    height, width = clip.mask.shape[1:]
    camera = PinholeCamera(focal, focal, width / 2 - 0.5, height / 2 - 0.5)
    truth = 1.0 / clip.depth.astype(np.float64)
    error = depth_error(1.0 / surface.depths, truth, clip.mask, min_disparity=float(truth.min()), fit_mask=clip.mask)
    return GeometryScores(
        normals=angular_error(surface.normals, clip.normal, clip.mask).mean,
        depth=error.abs_rel,
        consistency=consistency_angle(surface.normals, surface.depths, clip.mask, camera),
        seconds_per_frame=seconds / len(clip.mask),
    )


def facing_camera(clip: DancerClip) -> Surface:
    """The trivial answer: every pixel faces the camera at one depth."""
    return Surface(np.ones_like(clip.depth), _facing(clip.normal))


def inflated_mask(clip: DancerClip) -> Surface:
    """The trivial answer that knows the mask: a rounded surface that turns away at the outline."""
    depths = np.ones_like(clip.depth)
    for depth, mask in zip(depths, clip.mask, strict=True):
        distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        reach = max(float(distance.max()), 1.0)
        smooth = cv2.GaussianBlur(np.sqrt(np.maximum(reach**2 - (reach - distance) ** 2, 0.0)), (0, 0), 1.0)
        # Heights in pixels; the figure is as many pixels away as the true camera's focal length.
        depth -= (smooth / clip.intrinsics[0, 0]).astype(np.float32)
    focal = clip.intrinsics[0, 0]
    down, right = np.gradient(depths, axis=1), np.gradient(depths, axis=2)
    normals = np.stack([right * focal, -down * focal, depths], axis=-1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return Surface(depths, np.where(clip.mask[..., None], normals, _facing(clip.normal)).astype(np.float32))


def _facing(normals: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.broadcast_to(np.array([0.0, 0.0, 1.0], dtype=np.float32), normals.shape).copy()


def score_body(clip: DancerClip, find_poses: Callable[[DancerClip], PersonPoses]) -> GeometryScores:
    """Scores the annotator `body` with the given poses and their mask."""
    poses = find_poses(clip)
    assert poses.mask is not None
    body = Body()
    before = time.process_time()
    surface = body.find_surface(poses, poses.mask)
    seconds = time.process_time() - before
    return score_surface(clip, surface, focal=body.focal * max(clip.mask.shape[1:]), seconds=seconds)


def find_with(blazepose: BlazePose, clip: DancerClip) -> PersonPoses:
    """The poses of the best person in each frame of a clip."""
    people = [found[0] if found else None for found in blazepose.find_people(clip.rgb)]
    poses = blazepose.annotate_pose(clip.rgb, people)
    return replace(poses, mask=blazepose.annotate_mask(clip.rgb, poses))


def print_geometry(clips: list[DancerClip], blazepose: BlazePose | None) -> None:
    """Prints the table of depth and normals."""
    answers: dict[str, Callable[[DancerClip], GeometryScores]] = {
        "facing the camera": lambda clip: score_surface(clip, facing_camera(clip), focal=clip.intrinsics[0, 0]),
        "inflated mask": lambda clip: score_surface(clip, inflated_mask(clip), focal=clip.intrinsics[0, 0]),
        "body, exact landmarks": lambda clip: score_body(clip, exact_poses),
    }
    if blazepose is not None:
        answers["body, landmarks and mask of blazepose"] = lambda clip: score_body(clip, partial(find_with, blazepose))
    print("| normals and depth inside the body | normals, mean angle | depth AbsRel | normals to depth's own | CPU |")
    print("|---|---|---|---|---|")
    for name, score in answers.items():
        scores = [score(clip) for clip in clips]
        angle, depth, consistency, seconds = (
            float(np.mean([getattr(one, field) for one in scores])) for field in GeometryScores.__annotations__
        )
        time_text = f"{seconds * 1e3:.0f} ms" if seconds else "-"
        print(f"| {name} | {angle:.1f} deg | {depth:.4f} | {consistency:.1f} deg | {time_text} |")


def main() -> None:
    """Renders the dancers and prints the tables."""
    parser = argparse.ArgumentParser(description="measures annotators on rendered dancers")
    parser.add_argument("--clips", type=int, default=12, help="number of held-out dancers")
    parser.add_argument("--frames", type=int, default=8, help="frames of each")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 384), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--networks", help="the folder that tools/networks.sh filled")
    chosen = parser.parse_args()
    width, height = chosen.size
    clips = list(held_out_clips(chosen.clips, num_frames=chosen.frames, width=width, height=height))
    print(f"{len(clips)} held-out dancers, {chosen.frames} frames of {width}x{height}\n")
    print_geometry(clips, BlazePose(chosen.networks) if chosen.networks else None)


if __name__ == "__main__":
    main()
