"""Several results of the same clips in one table: what they must have in common, and the join of their rows."""

from collections.abc import Mapping
from dataclasses import replace

from dreamdance.evaluation.clips import Result, ResultError
from dreamdance.evaluation.measured import EvaluatedClip
from dreamdance.evaluation.measures import sum_costs
from dreamdance.evaluation.table import RESULT_ROW


def check_comparable(firsts: Mapping[str, Result]) -> None:
    """Refuses results of different sizes: their scores would not be comparable.

    Args:
        firsts: row of the table -> one of its results.

    Raises:
        ResultError: the sizes differ.
    """
    own = firsts[RESULT_ROW]
    for name, other in firsts.items():
        has_maps = other.prediction.normals is not None
        if other.frame_size != own.frame_size or (has_maps and other.map_size != own.map_size):
            raise ResultError(
                f"the results of '{name}' have frames of {other.frame_size} and maps of {other.map_size}, those of "
                f"`results` {own.frame_size} and {own.map_size} (rows x columns): scores at different sizes cannot be "
                "compared (key: compare). Where only some have maps, `results` names one that has them"
            )


def join_rows(clip_id: str, rows: Mapping[str, EvaluatedClip]) -> EvaluatedClip:
    """One clip's measurements of all results: a row for each result, then trivial answers and the truth.

    Raises:
        ResultError: the results were measured on different frames, or at different sizes.
    """
    own = rows[RESULT_ROW]
    others = {name: clip for name, clip in rows.items() if name != RESULT_ROW}
    for name, other in others.items():
        if other.compared.numbers != own.compared.numbers:
            raise ResultError(
                f"result '{clip_id}' of '{name}' has other frames, or another reference, than that of `results`: "
                "their scores cannot be compared (key: compare)"
            )
    scores = {RESULT_ROW: own.scores[RESULT_ROW], **{name: clip.scores[RESULT_ROW] for name, clip in others.items()}}
    files = {path: state for clip in rows.values() for path, state in clip.files.items()}
    features = {name: clip.features.get(RESULT_ROW, {}) for name, clip in others.items()}
    costs = sum_costs([clip.costs for clip in rows.values()])
    return replace(own, scores=scores | own.scores, files=files, features=own.features | features, costs=costs)
