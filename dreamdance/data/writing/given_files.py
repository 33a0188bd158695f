"""Warnings about the files that users give beside videos: what is not exact, and what is not stored as it is given."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from dreamdance.data.annotation.networks import open_networks
from dreamdance.data.writing.map_files import MapSource, lossy_reason
from dreamdance.media.video_names import printable
from dreamdance.recipe.schema import VideosSource

logger = logging.getLogger(__name__)


@dataclass
class GivenFiles:
    """Gathers what is to be said about the files of many videos, so that each warning is given once.

    Attributes:
        source: the recipe's section of the videos.
        losses: the files of depth and normals that are not exact -> why.
        walled: the files of depth or normals whose background is not stored -> the other map.
        drawings: the drawings of poses without key points.
    """

    source: VideosSource
    losses: dict[str, str] = field(default_factory=dict)
    walled: dict[str, str] = field(default_factory=dict)
    drawings: list[str] = field(default_factory=list)

    def add(self, opened: Mapping[str, MapSource], *, has_keypoints: bool) -> None:
        """Adds the opened files of one video.

        Args:
            opened: the pictures and the given maps.
            has_keypoints: whether key points are given, too.
        """
        for modality, file in opened.items():
            if (reason := lossy_reason(file, modality)) is not None:
                self.losses[printable(file.path)] = reason
        if self.source.annotators is None:
            return
        for given, other in (("normal", "depth"), ("depth", "normal")):
            if given not in opened or other in opened:
                continue
            if not getattr(open_networks(self.source.annotators), other).sees_background:
                self.walled[printable(opened[given].path)] = other
        if "pose" in opened and not has_keypoints:
            self.drawings.append(printable(opened["pose"].path))

    def report(self) -> None:
        """Gives the warnings."""
        if self.losses:
            logger.warning(
                "%d maps of depth or normals are not exact, such as %s (%s): give depth as .mkv (-c:v ffv1 -pix_fmt "
                "gray16le) or .npz, normals as .mkv (-c:v ffv1) or .npz",
                len(self.losses),
                *min(self.losses.items()),
            )
        if self.walled and self.source.annotators is not None:
            path, other = min(self.walled.items())
            logger.warning(
                "the background of %d given maps is not stored, such as that of %s, because "
                "`videos.annotators.%s` (%s) sees none, and both maps of a clip get the same wall: give the %s too, or "
                "choose an annotator that sees the background",
                len(self.walled),
                path,
                other,
                getattr(self.source.annotators, other),
                other,
            )
        if self.drawings:
            logger.warning(
                "%d drawings of poses have no key points beside them, such as %s: clips of these videos are stored "
                "without key points and are never mirrored, because a mirrored pose would be drawn in another style; "
                "give <clip>.keypoints.json too, or instead of the drawing",
                len(self.drawings),
                min(self.drawings),
            )
