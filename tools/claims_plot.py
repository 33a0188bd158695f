"""Draws the CSV file of tools/claims.py as one SVG picture: a panel per claim, a line per variant, a dot per seed."""

import statistics
from collections.abc import Sequence
from html import escape

from claims_plan import CLAIMS
from claims_table import COMPARISONS, HIGHER_IS_BETTER, TITLES, Row, values_of

WIDTH, LEFT, RIGHT = 860, 230, 90
LINE, HEAD, FOOT = 20, 46, 30


def draw(rows: Sequence[Row]) -> str:
    """The picture; claims without numbers say so."""
    parts, top = list[str](), 10
    for claim in CLAIMS:
        compared = [comparison for comparison in COMPARISONS if comparison.claim == claim]
        metric = compared[0].metric
        named = dict.fromkeys(name for one in compared for name in (one.own, one.other))
        found = {name: values_of(rows, claim, name, metric) for name in named}
        panel, height = _panel(TITLES[claim], metric, {name: [*values.values()] for name, values in found.items()})
        parts.append(f'<g transform="translate(0 {top})">{panel}</g>')
        top += height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{top}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(title: str, metric: str, variants: dict[str, list[float]]) -> tuple[str, int]:
    """One panel and its height: dots are seeds, the bar is their mean."""
    arrow = "more is better" if HIGHER_IS_BETTER[metric] else "less is better"
    parts = [
        f'<text x="12" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="36" fill="#555">{escape(metric)}, {arrow}</text>',
    ]
    values = [value for found in variants.values() for value in found]
    if not values:
        return "".join([*parts, f'<text x="{LEFT}" y="36" fill="#555">not measured</text>']), HEAD + 12
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    bottom = HEAD + LINE * len(variants)
    for number in range(5):
        value = low + (high - low) * number / 4
        x = place(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{value:.4g}</text>')
    for number, (name, found) in enumerate(variants.items()):
        y = HEAD + LINE * (number + 0.5)
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if not found:
            parts.append(f'<text x="{LEFT + 6}" y="{y + 4:.1f}" fill="#555">not measured</text>')
            continue
        mean = statistics.fmean(found)
        parts.append(
            f'<line x1="{place(mean):.1f}" x2="{place(mean):.1f}" y1="{y - 7:.1f}" y2="{y + 7:.1f}" '
            'stroke="#b3261e" stroke-width="3"/>'
        )
        parts += [
            f'<circle cx="{place(value):.1f}" cy="{y:.1f}" r="4" fill="#1f5fa8" fill-opacity="0.7"/>' for value in found
        ]
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y + 4:.1f}">{mean:.4g}</text>')
    return "".join(parts), bottom + FOOT
