"""Measures BlazePose: key points, depths of the joints and masks against rendered dancers, whose truth is exact.

With `--clips FOLDER` (videos `<clip>.rgb.mp4` with DWPose drawings `<clip>.pose.mp4`) also against joints read off the
drawings by their colours. Errors are in lengths of the torso (neck to the middle of the hips).

    python tools/measure_keypoints.py [--weights weights/networks] [--dancers 12] [--frames 4] [--clips FOLDER]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.blazepose import BlazePose
from dreamdance.annotators.people import follow_person
from dreamdance.annotators.protocols import LANDMARK_NAMES, PersonPoses
from dreamdance.dancers.render import HELD_OUT_SEEDS, DancerClip, render_clip
from dreamdance.media.keypoints import BODY, BODY_NAMES, CONFIDENCE_THRESHOLD, FACE, LEFT_HAND, RIGHT_HAND
from dreamdance.media.pose_drawing import _BODY_COLOURS
from dreamdance.media.video import probe_video, read_frames

_Array = NDArray[np.floating[Any]]

_FIRST_SEED = 100  # of the held-out ones
_WIDTH, _HEIGHT = 256, 384
_NECK = BODY_NAMES.index("neck")
_HIPS = [BODY_NAMES.index("left_hip"), BODY_NAMES.index("right_hip")]
# The joints whose depths are compared: landmarks of the same name.
_JOINTS = [name for name in BODY_NAMES if name in LANDMARK_NAMES and name.split("_")[-1] not in ("nose", "eye", "ear")]
# Drawings are lossy: colours may differ by this sum over the channels, and smaller spots (pixels) are noise.
_COLOUR_TOLERANCE, _SMALLEST_SPOT = 60, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, default=Path("weights/networks"), help="the folder of tools/networks.sh"
    )
    parser.add_argument("--dancers", type=int, default=12, help="number of dancers")
    parser.add_argument("--frames", type=int, default=4, help="frames of each dancer")
    parser.add_argument("--clips", type=Path, help="a folder of videos with DWPose drawings")
    parser.add_argument("--step", type=int, default=15, help="every so many frames of these videos are measured")
    options = parser.parse_args()
    blazepose = BlazePose(options.weights)
    measure_dancers(blazepose, options.dancers, options.frames)
    if options.clips:
        measure_clips(blazepose, options.clips, options.step)


def annotate(blazepose: BlazePose, rgb: NDArray[np.uint8]) -> PersonPoses:
    people = blazepose.find_people(rgb)
    followed = follow_person(people, width=rgb.shape[2], height=rgb.shape[1])
    return blazepose.annotate_pose(rgb, followed.people if followed else [None] * len(rgb))


def distances(found: _Array, truth: _Array, width: int, height: int) -> _Array:
    """Distances `(f, n)` of points `(f, n, 2 or 3)`, in lengths of the true torso."""
    points = truth[..., :2] * (width, height)
    torso = np.hypot(*np.moveaxis(points[:, _NECK] - points[:, _HIPS].mean(axis=1), -1, 0))
    between = found[..., :2] * (width, height) - points
    return np.asarray(np.hypot(between[..., 0], between[..., 1]) / torso[:, None])


def measure_dancers(blazepose: BlazePose, num_dancers: int, num_frames: int) -> None:
    seeds = HELD_OUT_SEEDS[_FIRST_SEED : _FIRST_SEED + num_dancers]
    clips = [render_clip(seed, num_frames=num_frames, width=_WIDTH, height=_HEIGHT, fps=1.5) for seed in seeds]
    started = time.perf_counter()
    poses = [annotate(blazepose, clip.rgb) for clip in clips]
    milliseconds = 1000 * (time.perf_counter() - started) / (num_dancers * num_frames)
    truth = np.concatenate([clip.keypoints for clip in clips])
    found = np.concatenate([pose.keypoints for pose in poses])
    errors = distances(found, truth, _WIDTH, _HEIGHT)
    mean_pose = distances(np.broadcast_to(truth.mean(axis=0), truth.shape), truth, _WIDTH, _HEIGHT)
    is_visible = truth[..., 2] == 1.0
    is_found = found[..., 2] >= CONFIDENCE_THRESHOLD
    print(f"{num_dancers} dancers, {num_frames} frames each, {_WIDTH}x{_HEIGHT}, {milliseconds:.0f} ms per frame")
    print("median error of visible points, in torsos: BlazePose | the dancers' mean pose | found")
    points: list[tuple[Any, str]] = [*enumerate(BODY_NAMES), (BODY, "body")]
    for index, name in points:
        print_errors(name, errors[:, index], mean_pose[:, index], is_visible[:, index], is_found[:, index])
    for part, name in ((LEFT_HAND, "left hand"), (RIGHT_HAND, "right hand"), (FACE, "face")):
        print_errors(name, errors[:, part], mean_pose[:, part], is_visible[:, part], is_found[:, part])
    masks = np.concatenate(
        [blazepose.annotate_mask(clip.rgb, pose) > 0.5 for clip, pose in zip(clips, poses, strict=True)]
    )
    true_masks = np.concatenate([clip.mask for clip in clips])
    shared = (masks & true_masks).sum(axis=(1, 2)) / (masks | true_masks).sum(axis=(1, 2))
    print(f"mask: intersection over union {shared.mean():.3f}, worst {shared.min():.3f}")
    measure_depths(clips, poses)


def print_errors(
    name: str, errors: _Array, trivial: _Array, is_visible: NDArray[np.bool_], is_found: NDArray[np.bool_]
) -> None:
    both = is_visible & is_found
    share = both.sum() / max(is_visible.sum(), 1)
    median = f"{np.median(errors[both]):.3f}" if both.any() else "  -  "
    print(f"  {name:15} {median} | {np.median(trivial[is_visible]):.3f} | {share:.0%}")


def measure_depths(clips: list[DancerClip], poses: list[PersonPoses]) -> None:
    found, truth = [], []
    for clip, pose in zip(clips, poses, strict=True):
        if pose.landmarks is None:
            continue
        hips = clip.joints[:, _HIPS].mean(axis=1, keepdims=True)
        metres_per_width = -hips[..., 2] * _WIDTH / clip.intrinsics[0, 0]
        truth.append((clip.joints - hips)[:, [BODY_NAMES.index(name) for name in _JOINTS], 2])
        found.append(pose.landmarks[:, [LANDMARK_NAMES.index(name) for name in _JOINTS], 2] * metres_per_width)
    depths, exact = np.concatenate(found).ravel(), np.concatenate(truth).ravel()
    print(
        f"depth of joints: median error {np.median(np.abs(depths - exact)):.3f} m, of the depth of the hips "
        f"{np.median(np.abs(exact)):.3f} m; correlation {np.corrcoef(depths, exact)[0, 1]:.2f}, slope "
        f"{(depths * exact).sum() / (depths**2).sum():.2f}"
    )


def measure_clips(blazepose: BlazePose, folder: Path, step: int) -> None:
    errors: dict[str, list[float]] = {name: [] for name in BODY_NAMES[:14]}
    num_frames = num_hands = num_faces = 0
    for path in sorted(folder.glob("*.pose.mp4")):
        video, drawn_video = probe_video(path.with_name(path.name.replace(".pose.", ".rgb."))), probe_video(path)
        chosen = range(0, min(video.num_frames, drawn_video.num_frames), step)
        rgb, drawings = read_frames(video, chosen), read_frames(drawn_video, chosen)
        height, width = rgb.shape[1:3]
        keypoints = annotate(blazepose, rgb).keypoints
        num_frames += len(rgb)
        num_hands += sum(int((keypoints[:, part, 2] > 0).any(axis=1).sum()) for part in (LEFT_HAND, RIGHT_HAND))
        num_faces += int((keypoints[:, FACE, 2] > 0).any(axis=1).sum())
        for drawing, frame in zip(drawings, keypoints, strict=True):
            points = frame[:, :2] * (width, height)
            torso = np.hypot(*(points[_NECK] - points[_HIPS].mean(axis=0)))
            for index, name in enumerate(BODY_NAMES[:14]):
                drawn = find_spot(drawing, _BODY_COLOURS[index])
                if drawn is not None and frame[index, 2] > 0:
                    scale = (width / drawing.shape[1], height / drawing.shape[0])
                    errors[name].append(float(np.hypot(*(drawn * scale - points[index])) / torso))
    print(f"{num_frames} frames of {folder}: hands {num_hands / max(2 * num_frames, 1):.0%}, faces {num_faces}")
    print("error against the drawn joints, in torsos: median | share below 0.1 | joints")
    for name, values in [*errors.items(), ("body", [value for joint in errors.values() for value in joint])]:
        if values:
            print(f"  {name:15} {np.median(values):.3f} | {np.mean(np.array(values) < 0.1):.0%} | {len(values)}")


def find_spot(drawing: NDArray[np.uint8], colour: tuple[int, int, int]) -> _Array | None:
    """The centre of the one spot of a colour; None if there is none or more (points of hands share a knee's colour)."""
    is_near = np.abs(drawing.astype(np.int32) - colour).sum(axis=-1) < _COLOUR_TOLERANCE
    num_spots, _, statistics, centres = cv2.connectedComponentsWithStats(is_near.astype(np.uint8))
    spots = [index for index in range(1, num_spots) if statistics[index, cv2.CC_STAT_AREA] >= _SMALLEST_SPOT]
    return centres[spots[0]] + 0.5 if len(spots) == 1 else None


if __name__ == "__main__":
    main()
