"""Writes one static HTML page that plays clips with their maps, sorted by any score, and lists failures by reason.

The page needs no server and no other file than the small videos beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dreamdance.data.curation.scores import SCORE_KINDS, Scores
from dreamdance.data.curation.shown_clip import SHOWN_MAPS, ShownClip, strip_frame
from dreamdance.media.video_writing import write_video
from dreamdance.runs.files import write_atomically

PAGE_FILE = "index.html"
VIDEOS_FOLDER = "clips"

_TEMPLATE = "page.html"
_CONTENT_MARK = "__CONTENT__"
_VIDEO_HEIGHT = 192
_VIDEO_CRF = 26


@dataclass(frozen=True)
class PageEntry:
    """A clip on the page.

    Attributes:
        clip_id: name of the clip.
        source: where it comes from, for people to read.
        video: path of its small video, relative to the page.
        width, height: size of that video in pixels.
        scores: of the clip.
    """

    clip_id: str
    source: str
    video: str
    width: int
    height: int
    scores: Scores


def write_clip_video(folder: Path, clip: ShownClip) -> PageEntry:
    """Writes the small video of a clip, all maps side by side, below the folder of the page."""
    entry = describe_clip(clip)
    frames = [strip_frame(clip, frame, height=_VIDEO_HEIGHT) for frame in range(len(clip.maps["rgb"]))]
    write_video(folder / entry.video, frames, fps=clip.fps, crf=_VIDEO_CRF)
    return entry


def describe_clip(clip: ShownClip) -> PageEntry:
    """The entry of a clip whose video `write_clip_video` writes, or has written."""
    height, width = strip_frame(clip, 0, height=_VIDEO_HEIGHT).shape[:2]
    video = f"{VIDEOS_FOLDER}/{clip.clip_id}.mp4"
    return PageEntry(clip.clip_id, clip.source, video, width, height, clip.scores)


def write_page(
    folder: Path, entries: Sequence[PageEntry], *, title: str, failures: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Writes `index.html`; it appears when it is complete.

    Args:
        folder: the folder that contains the videos.
        entries: from `write_clip_video`.
        title: shown above the clips.
        failures: names of the videos that have no clips, or none for one split, by the reason.

    Returns:
        The path of the page.
    """
    content = {
        "title": title,
        "maps": SHOWN_MAPS,
        "scores": [{"name": name, "meaning": kind.meaning, "unit": kind.unit} for name, kind in SCORE_KINDS.items()],
        "clips": [
            {
                "id": entry.clip_id,
                "source": entry.source,
                "video": quote(entry.video),
                "width": entry.width,
                "height": entry.height,
                "scores": list(entry.scores.values().values()),
            }
            for entry in entries
        ],
        "failures": [{"reason": reason, "names": list(names)} for reason, names in (failures or {}).items()],
    }
    path = folder / PAGE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, fill_page("dreamdance.data.curation", _TEMPLATE, content))
    return path


def fill_page(package: str, template: str, content: Any) -> str:
    """The text of a page: a template of a package with its content.

    Args:
        package: the package that contains the template.
        template: its name; it has the word `__CONTENT__` in a script element of JSON.
        content: JSON values.
    """
    # No text of a file name can end the script element that contains it.
    text = json.dumps(content, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    return (resources.files(package) / template).read_text(encoding="utf-8").replace(_CONTENT_MARK, text)
