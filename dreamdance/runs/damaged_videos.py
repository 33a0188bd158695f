"""The tables of videos without clips, as `prepare` writes them and `status` reads them. No torch here.

One has the videos that could not be used, the other one the sound videos that gave no clip.
"""

import re
from collections.abc import Mapping
from pathlib import Path

DAMAGED_FILE = "damaged_videos.tsv"
WITHOUT_CLIPS_FILE = "videos_without_clips.tsv"
# The titles of the columns.
HEADERS = {DAMAGED_FILE: ("video", "damage"), WITHOUT_CLIPS_FILE: ("video", "reason")}
# Of each reason, `list_reasons` names at most this number of videos.
_NAMES_PER_REASON = 3


def read_damaged(output: Path) -> dict[str, str]:
    """The videos that could not be used: name -> reason; empty without the table."""
    return read_reasons(output / DAMAGED_FILE)


def read_without_clips(output: Path) -> dict[str, str]:
    """The sound videos that gave no clip, or none for one split: name -> reason; empty without the table."""
    return read_reasons(output / WITHOUT_CLIPS_FILE)


def read_reasons(path: Path) -> dict[str, str]:
    """Reads one of the tables: name -> reason; empty without the table."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines)}


def by_reason(damaged: Mapping[str, str]) -> dict[str, list[str]]:
    """Groups videos whose reasons differ only in names, places and numbers; the largest group comes first.

    Args:
        damaged: name -> reason, as in the table.

    Returns:
        Names by the common reason, in which `<clip>` stands for a video's name and N for a number.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in damaged.items():
        groups.setdefault(_common_reason(name, reason), []).append(name)
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def list_reasons(reasons: Mapping[str, str]) -> str:
    """An indented line for each common reason, with the number of its videos and the first names.

    The reason of a single video keeps its numbers.

    Args:
        reasons: name -> reason.
    """
    lines = []
    for reason, names in by_reason(reasons).items():
        more = ", ..." if len(names) > _NAMES_PER_REASON else ""
        text = reasons[names[0]] if len(names) == 1 else reason
        lines.append(f"  {len(names)} x {text} ({', '.join(names[:_NAMES_PER_REASON])}{more})")
    return "\n".join(lines)


def _common_reason(name: str, reason: str) -> str:
    """`/data/a.pose.mp4 has 10 frames` becomes `<clip>.pose.mp4 has N frames`."""
    text = re.sub(rf"(/([^;:]*?/)?|(?<!\w)){re.escape(name)}(?=\.\w)", "<clip>", reason)
    # Not the digit of `mp4`, but both numbers of `64x96`.
    return re.sub(r"((?<=\dx)|(?<![A-Za-z\d.]))-?\d+(\.\d+)?", "N", text)
