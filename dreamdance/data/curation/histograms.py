"""Text histograms of the clips' scores, and what limits would drop, for `--dry-run`."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dreamdance.data.curation.filters import Limits
from dreamdance.data.curation.scores import SCORE_KINDS, Scores

_NUM_BINS = 10
_BAR_WIDTH = 40
# Values beyond this share of the clips, on either side, share the outermost bins, so that one odd clip hides nothing.
_TAIL = 0.01


def draw_histograms(scores: Sequence[Scores], limits: Mapping[str, Limits]) -> str:
    """Draws the distribution of each score as lines of text.

    Args:
        scores: of all clips.
        limits: of the scores that a recipe names (`filter_limits`); a line states what each drops, and a mark stands
            beside the bins that it drops entirely.

    Returns:
        The text, without a newline at its end.
    """
    blocks = [_draw_score(name, [one.values()[name] for one in scores], limits.get(name)) for name in SCORE_KINDS]
    return "\n\n".join("\n".join(block) for block in blocks)


def _draw_score(name: str, values: Sequence[float | None], limit: Limits | None) -> list[str]:
    kind = SCORE_KINDS[name]
    known = np.array([value for value in values if value is not None], np.float64)
    lines = [f"{name}: {kind.meaning} ({kind.unit})"]
    if len(known):
        middle = float(np.median(known))
        lines.append(f"  smallest {known.min():.4g}, median {middle:.4g}, largest {known.max():.4g}")
        lines += _bars(known, limit, whole=name == "people")
    if unknown := len(values) - len(known):
        lines.append(f"  {unknown} of {len(values)} clips without a value")
    if limit is not None:
        dropped = sum(not limit.accept(value) for value in values)
        share = 100 * dropped / max(len(values), 1)
        lines.append(f"  data.filters.{name} ({limit}) drops {dropped} of {len(values)} clips ({share:.1f} %)")
    return lines


def _bars(known: NDArray[np.float64], limit: Limits | None, *, whole: bool) -> list[str]:
    edges = _edges(known, whole=whole)
    counts, _ = np.histogram(known.clip(edges[0], edges[-1]), bins=edges)
    most, width = counts.max(), len(str(counts.max()))
    last = len(counts) - 1
    lines = []
    for number, count in enumerate(counts):
        low, high = float(edges[number]), float(edges[number + 1])
        label = f"{low + 0.5:.0f}" if whole else f"{low:.4g} to {high:.4g}"
        label += " and less" if number == 0 and known.min() < low else ""
        label += " and more" if number == last and known.max() > high else ""
        bar = "#" * math.ceil(_BAR_WIDTH * count / most)
        inside = (low + 0.5, low + 0.5) if whole else (low, high)
        mark = "  dropped" if count and limit is not None and _drops_all(limit, *inside) else ""
        lines.append(f"  {label:>32}  {count:>{width}}  {bar}{mark}")
    return lines


def _edges(known: NDArray[np.float64], *, whole: bool) -> NDArray[np.float64]:
    if whole:
        return np.asarray(np.arange(known.min(), min(known.max(), known.min() + _NUM_BINS) + 2) - 0.5)
    low, high = np.quantile(known, [_TAIL, 1 - _TAIL])
    if high <= low:
        low, high = known.min(), known.max()
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-3
    return np.asarray(np.linspace(low, high, _NUM_BINS + 1))


def _drops_all(limit: Limits, low: float, high: float) -> bool:
    return (limit.low is not None and high < limit.low) or (limit.high is not None and low > limit.high)
