"""Chooses the references of clips from the shots of a video: all show the clip's own person."""

import logging
from collections.abc import Generator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.annotation.video_stages import FollowedPoses, VideoStages
from dreamdance.data.curation.clothes import wear_same_clothes
from dreamdance.data.writing.clip_record import spread_over
from dreamdance.media.keypoints import BODY, CONFIDENCE_THRESHOLD
from dreamdance.media.video_names import printable

logger = logging.getLogger(__name__)

# A frame shows the person if at least this share of the 18 joints of the body is seen.
_LEAST_JOINTS = 0.25
# The clothes of a shot's person are looked at in this number of frames.
_FRAMES_OF_CLOTHES = 5

# The references of a clip: frames by the shot that they are from.
ShotReferences = list[tuple[FollowedPoses, list[int]]]


def shows_person(poses: FollowedPoses, frames: list[int]) -> NDArray[np.bool_]:
    """Which of the frames show the person `(f,)`."""
    confident = poses.smoothed[poses.rows(frames)][:, BODY, 2] >= CONFIDENCE_THRESHOLD
    return np.asarray(confident.mean(axis=1) >= _LEAST_JOINTS)


def choose_references(
    stages: VideoStages, shots: Sequence[FollowedPoses], own: AbstractSet[int], count: int
) -> Generator[None, None, list[ShotReferences]]:
    """Chooses frames that show the person of a shot, spread over this shot and all others with the same person.

    Each shot follows its own person, so that a video may show several. Shots show one person if every two of them show
    the same clothes.

    Args:
        stages: of the video.
        shots: the followed people.
        own: the frames of the split.
        count: the largest number of references of a clip.

    Returns:
        The references of each shot's clips; shots with one person share them.
    """
    seen = [
        [frame for frame, shown in zip(poses.frames, shows_person(poses, poses.frames), strict=True) if shown]
        for poses in shots
    ]
    seen = [[frame for frame in frames if frame in own] for frames in seen]
    groups = yield from _group_by_person(stages, shots, seen)
    result = list[ShotReferences]([[] for _ in shots])
    for group in groups:
        frames = [(shot, frame) for shot in group for frame in seen[shot]]
        chosen = [frames[place] for place in spread_over(len(frames), count)]
        by_shot = [(shots[one], [frame for shot, frame in chosen if shot == one]) for one in group]
        shared = [(poses, found) for poses, found in by_shot if found]
        for shot in group:
            result[shot] = shared
    if len(groups) > 1:
        logger.info(
            "%s: by their clothes, %d shots show %d people; each clip takes its references from shots with its own",
            printable(stages.video.path),
            len(shots),
            len(groups),
        )
    return result


def _group_by_person(
    stages: VideoStages, shots: Sequence[FollowedPoses], seen: Sequence[list[int]]
) -> Generator[None, None, list[list[int]]]:
    """The numbers of the shots that show a person, by person."""
    groups = list[list[int]]()
    clothes = dict[int, NDArray[np.float32]]()
    shown = [shot for shot, frames in enumerate(seen) if frames]
    for shot in shown:
        if len(shown) > 1:
            some = [seen[shot][place] for place in spread_over(len(seen[shot]), _FRAMES_OF_CLOTHES)]
            clothes[shot] = yield from stages.clothes(shots[shot], some)
        for group in groups:
            if all(wear_same_clothes(clothes[shot], clothes[other]) for other in group):
                group.append(shot)
                break
        else:
            groups.append([shot])
    return groups
