"""Draws the CSV file of tools/claims.py as one SVG picture: a panel per claim, a line per variant, a dot per seed.

Below the panel of guidance by domain lies its sweep: error against scale.
"""

import statistics
from collections.abc import Sequence
from html import escape

from claims_aims import MADE, TRUE
from claims_comparisons import COMPARISONS, TITLES
from claims_costs import denoising_steps
from claims_names import CLAIMS, DOMAINS, FACTORS, SCALES, trivial_with
from claims_table import DIGITS, HIGHER_IS_BETTER, Row, values_of
from claims_tasks import scaled

WIDTH, LEFT, RIGHT = 860, 230, 90
LINE, HEAD, FOOT = 20, 46, 30
# What follows the kind of maps in the variants of the parts that are no claims of the paper.
ENDINGS: dict[str, Sequence[int | str]] = {"demo": denoising_steps(), "curve": [f"x{factor}" for factor in FACTORS]}
# Of the sweep: the height of its curves, and what each of them varies.
SWEEP_HEIGHT = 130
CURVES = {
    "one": ("one scale for all domains", "#333333"),
    "rgb": ("that of rgb alone", "#b3261e"),
    "normal": ("that of normals alone", "#1f5fa8"),
    "depth": ("that of depth alone", "#2e7d32"),
}


def draw(rows: Sequence[Row]) -> str:
    """The picture; claims without numbers say so."""
    parts, top = list[str](), 10
    for claim in CLAIMS:
        compared = [comparison for comparison in COMPARISONS if comparison.claim == claim]
        if endings := ENDINGS.get(claim):
            metric, made = "l1_body", [f"{maps}_{ending}" for maps in (MADE, TRUE) for ending in endings]
            named = [*made, *trivial_with(metric)]
        else:
            metric, named = compared[0].metric, [name for one in compared for name in (one.own, one.other)]
        found = {name: values_of(rows, claim, name, metric) for name in dict.fromkeys(named)}
        panel, height = _panel(TITLES[claim], metric, {name: [*values.values()] for name, values in found.items()})
        parts.append(f'<g transform="translate(0 {top})">{panel}</g>')
        top += height
        if claim == "b":
            panel, height = _sweep(rows)
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
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{value:.{DIGITS[metric]}f}</text>'
        )
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
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y + 4:.1f}">{mean:.{DIGITS[metric]}f}</text>')
    return "".join(parts), bottom + FOOT


def _sweep(rows: Sequence[Row]) -> tuple[str, int]:
    """Error against guidance scale, a graph per domain's error, and their height; every clip counts here."""
    title = "sweep of the guidance scales, all clips; the domains that a curve does not name have scale 0"
    parts = [f'<text x="12" y="16" fill="#555">{escape(title)}</text>']
    width = (WIDTH - 24) / len(DOMAINS)
    graphs = [_graph(rows, metric, width) for metric in DOMAINS.values()]
    if not any(graphs):
        return "".join([*parts, f'<text x="{LEFT}" y="36" fill="#555">not measured</text>']), HEAD
    for number, graph in enumerate(graphs):
        parts.append(f'<g transform="translate({12 + number * width:.1f} 26)">{graph}</g>')
    bottom = SWEEP_HEIGHT + 76
    for number, (label, colour) in enumerate(CURVES.values()):
        x = 24 + number * (WIDTH - 24) / len(CURVES)
        parts.append(f'<line x1="{x:.1f}" x2="{x + 22:.1f}" y1="{bottom}" y2="{bottom}" stroke="{colour}"/>')
        parts.append(f'<text x="{x + 28:.1f}" y="{bottom + 4}">{escape(label)}</text>')
    return "".join(parts), bottom + FOOT


def _graph(rows: Sequence[Row], metric: str, width: float) -> str:
    """One error against the scale: a curve through the seeds' means, a dot per seed; empty without numbers."""
    curves = {
        varied: {
            scale: [*values_of(rows, "b", scaled(varied if scale else "one", scale), metric).values()]
            for scale in SCALES
        }
        for varied in CURVES
    }
    values = [value for curve in curves.values() for found in curve.values() for value in found]
    if not values:
        return ""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high, left, right = low - margin, high + margin, 52.0, width - 14

    def place(scale: float, value: float) -> tuple[float, float]:
        return left + (right - left) * scale / max(SCALES), 16 + SWEEP_HEIGHT * (high - value) / (high - low)

    parts = [f'<text x="{left:.1f}" y="8">{escape(metric)}</text>']
    for number in range(4):
        value = low + (high - low) * number / 3
        y = place(0.0, value)[1]
        parts.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{value:.{DIGITS[metric]}f}</text>'
        )
    for scale in SCALES:
        x = place(scale, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{SWEEP_HEIGHT + 31}" text-anchor="middle" fill="#555">{scale:g}</text>')
    for varied, curve in curves.items():
        colour = CURVES[varied][1]
        means = [place(scale, statistics.fmean(found)) for scale, found in curve.items() if found]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in means)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        dots = [place(scale, value) for scale, found in curve.items() for value in found]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}" fill-opacity="0.6"/>' for x, y in dots]
    return "".join(parts)
