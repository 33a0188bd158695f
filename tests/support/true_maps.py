"""Annotators that know the right answers for rendered dancers; each process reads them from a folder."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.exact_poses import exact_poses
from dreamdance.annotators.protocols import Depths, PersonPoses
from dreamdance.dancers.render import DancerClip
from support.exact_annotator import LARGEST_DIFFERENCE, ExactAnnotator

# In a recipe: `annotators: {pose: "support.true_maps:open_truth", ...}`.
NAME = f"{__name__}:open_truth"
FOLDER = "DREAMDANCE_TRUE_MAPS"


def write_truth(folder: Path, name: str, clip: DancerClip) -> None:
    """Stores the frames of a dancer with their key points, landmarks and maps."""
    poses = exact_poses(clip)
    assert poses.landmarks is not None
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / f"{name}.npz",
        rgb=clip.rgb,
        keypoints=clip.keypoints,
        landmarks=poses.landmarks,
        mask=clip.mask.astype(np.float32),
        normal=clip.normal,
        depth=clip.depth,
    )


class TrueMaps(ExactAnnotator):
    """Recognises frames and returns what is stored with them. Depth and normals have a meaning on the person alone."""

    sees_background = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        stored = []
        for path in sorted(folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as content:
                stored.append({name: content[name] for name in content.files})
        self._truth = {name: np.concatenate([one[name] for one in stored]) for name in stored[0]}
        self._rows = _as_rows(self._truth["rgb"])
        self._squares = (self._rows**2).sum(axis=1)

    def annotate_pose(self, rgb: NDArray[np.uint8], people: Any) -> PersonPoses:
        return PersonPoses(super().annotate_pose(rgb, people).keypoints, landmarks=self._look_up("landmarks", rgb))

    def annotate_mask(self, rgb: NDArray[np.uint8], poses: PersonPoses) -> NDArray[np.float32]:
        return self._look_up("mask", rgb)

    def annotate_normal(
        self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return self._look_up("normal", rgb)

    def annotate_depth(self, rgb: NDArray[np.uint8], poses: PersonPoses, mask: NDArray[np.float32]) -> Depths:
        return Depths(self._look_up("depth", rgb), "depth")

    def _look_up(self, name: str, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(self._truth[name][[self._find(frame) for frame in rgb]], dtype=np.float32)

    def _find(self, frame: NDArray[np.uint8]) -> int:
        """The known frame of the least squared difference."""
        return int((self._squares - 2 * (self._rows @ _as_rows(frame[None])[0])).argmin())

    def _people(self, frame: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        if frame.shape != self._truth["rgb"].shape[1:]:
            return []
        nearest = self._find(frame)
        difference = np.abs(self._truth["rgb"][nearest].astype(np.float32) - frame).mean()
        return [self._truth["keypoints"][nearest]] if difference <= LARGEST_DIFFERENCE else []


def _as_rows(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Frames as vectors, around grey: small numbers have the smaller errors of rounding."""
    return rgb.reshape(len(rgb), -1).astype(np.float32) - 128


@cache
def _open(folder: str) -> TrueMaps:
    return TrueMaps(Path(folder))


def open_truth() -> TrueMaps:
    """The annotator of the folder that the environment names; one for each process."""
    return _open(os.environ[FOLDER])


def open_other() -> TrueMaps:
    """The same answers under another name."""
    return open_truth()
