"""The table of videos that `prepare` could not use, as `prepare` writes it and `status` reads it. No torch here."""

import re
from collections.abc import Mapping
from pathlib import Path

DAMAGED_FILE = "damaged_videos.tsv"
HEADER = ("video", "damage")


def read_damaged(output: Path) -> dict[str, str]:
    """The videos that were not used: name -> reason; empty without the table."""
    path = output / DAMAGED_FILE
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


def _common_reason(name: str, reason: str) -> str:
    """`/data/a.pose.mp4 has 10 frames` becomes `<clip>.pose.mp4 has N frames`."""
    text = re.sub(rf"(/([^;:]*?/)?|(?<!\w)){re.escape(name)}(?=\.\w)", "<clip>", reason)
    # Not the digit of `mp4`, but both numbers of `64x96`.
    return re.sub(r"((?<=\dx)|(?<![A-Za-z\d.]))-?\d+(\.\d+)?", "N", text)
