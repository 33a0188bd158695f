"""`report.html`: one static page with the tables, and every clip with all its pictures in step, the worst first.

The page needs no server; the small videos that `show_clip` wrote lie in a folder beside it.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dreamdance.data.curation.page import fill_page
from dreamdance.evaluation.frame_curves import CURVES
from dreamdance.evaluation.scores import BODY_METRICS, TABLES, Metric
from dreamdance.evaluation.table import RESULT_ROW, TRUTH_ROW, Table, describe_missing
from dreamdance.evaluation.trivial import REPEATED_REFERENCE
from dreamdance.runs.files import write_atomically

PAGE_FILE = "report.html"
SHOWN_FOLDER = "report"
# Clips are sorted by the first of these that was measured.
_FIRST_KEYS = ("l1_body", "l1")


def write_report_page(table: Table, run_folder: Path) -> Path:
    """Writes the page over the clips that `show_clip` has written; it appears when it is complete.

    Args:
        table: the scores of all clips.
        run_folder: the folder of the page, with the folder `SHOWN_FOLDER`.

    Returns:
        The path of the page.
    """
    scores = table.as_json()["clips"]
    clips = [_describe_clip(run_folder, clip_id, scores[clip_id]) for clip_id in table.clips]
    measured = {key for rows in table.clips.values() for row in rows.values() for key in row}
    content = {
        "title": f"Evaluation: {run_folder.absolute().name}",
        "missing": describe_missing(table.missing, len(table.clips)) if table.missing else "",
        "absent": _absent(clips),
        "markdown": table.as_markdown(),
        "rows": [RESULT_ROW, *table.compared],
        "truth": TRUTH_ROW,
        "trivial": REPEATED_REFERENCE,
        "metrics": [
            {
                "key": metric.key,
                "title": _full_title(metric),
                "digits": metric.digits,
                "scientific": metric.scientific,
                "higher_is_better": metric.higher_is_better,
                "is_relative": metric.is_relative,
                "arrow": metric.arrow,
                "table": title,
            }
            for title, metrics in TABLES.items()
            for metric in metrics
            if metric.key in measured
        ],
        "sorted_by": next((key for key in _FIRST_KEYS if key in measured), None),
        "curves": CURVES,
        "clips": clips,
    }
    path = run_folder / PAGE_FILE
    write_atomically(path, fill_page("dreamdance.evaluation", "report.html", content))
    return path


def _full_title(metric: Metric) -> str:
    """The title with its place: in the tables, metrics of the body and of whole frames have equal titles."""
    if metric in BODY_METRICS:
        return f"{metric.title} inside the body"
    has_twin = any(metric.title == other.title for other in BODY_METRICS)
    return f"{metric.title} of whole frames" if has_twin else metric.title


def _describe_clip(run_folder: Path, clip_id: str, scores: dict[str, Any]) -> dict[str, Any]:
    described = json.loads((run_folder / SHOWN_FOLDER / f"{clip_id}.json").read_text(encoding="utf-8"))
    return {**described, "id": clip_id, "video": quote(f"{SHOWN_FOLDER}/{clip_id}.mp4"), "scores": scores}


def _absent(clips: list[dict[str, Any]]) -> list[str]:
    """Sentences about pictures that some clips lack."""
    sentences = []
    kinds = {"normals": "normals", "depth": "depth"}
    rows = dict.fromkeys(cell["row"] for clip in clips for cell in clip["cells"] if cell["row"])
    for row in rows:
        for kind, name in kinds.items():
            number = sum({"row": row, "kind": kind} not in clip["cells"] for clip in clips)
            if number:
                sentences.append(f"{row}: {number} of {len(clips)} clips have no {name}.")
    number = sum(not any(cell["kind"] == "pose" for cell in clip["cells"]) for clip in clips)
    if number:
        sentences.append(f"{number} of {len(clips)} clips have no pose, neither with the result nor with the truth.")
    number = sum(bool(clip["pose_is_true"]) for clip in clips) - number
    if number > 0:
        sentences.append(
            f"{number} of {len(clips)} results were made by a version that did not write the poses that drove them: "
            "the true clip's poses are shown."
        )
    return sentences
