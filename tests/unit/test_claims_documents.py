"""The tables of the pages about the demo and the claims show the numbers of `tools/claims.csv`."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tool_modules import load_tool

names, table, aims = (load_tool(f"claims_{name}") for name in ("names", "table", "aims"))

ROOT = Path(__file__).parents[2]
ROWS = table.read(ROOT / "tools/claims.csv")
README, PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "dreamdance/README.md"))
TRIVIAL = {"R": "reference_repeated", "C": "mean_colour", "F": "facing_camera"}
NUMBER = re.compile(r"(?<![\w.])-?\d*\.\d+")
# In the order of the page: claim, metric, the variant with the part and the one without it.
CLAIMS = (
    *(("c", "l1_body", f"all_three{maps}", f"no_{left_out}{maps}")
      for maps in ("", "_made") for left_out in ("normal", "depth", "pose")),
    ("a", "consistency_angle", "with_geometry", "without_geometry"),
    ("a", "angular_error_mean", "with_geometry", "without_geometry"),
    ("b", "angular_error_mean", "own_scales", "one_best_for_normals"),
    ("d", "l1_body", "attention", "mean"),
    ("f", "flicker", "with_temporal", "without_temporal"),
    *(("e", "l1_body", f"robust_error_{error}", f"plain_error_{error}") for error in ("1", "0", "half", "2")),
    ("g", "l1_body", "reference_first", "as_demo"),
    ("g", "l1_body", "trained_on_made_made", "as_demo_made"),
    ("pairs", "l1_body", "align_bones", "align_none"),
)  # fmt: skip
DEMO = ("angular_error_mean", "abs_rel", "l1_body", "psnr_body", "l1", "lpips_alex", "grain_distance", "grain")
CURVE = ("angular_error_mean", "abs_rel", "l1", "l1_body", "psnr_body", "lpips_alex", "grain_distance")


def cells_below(page: str, header: str) -> list[list[str]]:
    """The cells of the lines of a table, without its head."""
    lines = page[page.index(header) :].splitlines()[2:]
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def values(claim: str, variant: str, metric: str) -> list[float]:
    found = table.values_of(ROWS, claim, variant, metric)
    return [found[seed] for seed in sorted(found)]


def assert_shows(cell: str, expected: Sequence[float]) -> None:
    """Checks that the cell's decimal numbers are these, rounded as they are shown."""
    shown = NUMBER.findall(cell)
    assert len(shown) == len(expected), f"{cell!r} must show {expected}"
    for text, value in zip(shown, expected, strict=True):
        half = 0.5 * 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) - value) <= half * (1 + 1e-6), f"{cell!r} must show {expected}"


def spread(found: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(found), statistics.stdev(found)


def aim_of(metric: str) -> "aims.Aim":
    (found,) = (aim for aim in aims.AIMS if aim.metric == metric)
    return found


def test_the_claims_table_shows_means_spreads_and_gains() -> None:
    lines = cells_below(PAGE, "| claim | measured | with | without |")
    for cells, (claim, metric, own, other) in zip(lines, CLAIMS, strict=True):
        assert cells[0].startswith(f"({claim})") or claim == "pairs", cells
        one, two = values(claim, own, metric), values(claim, other, metric)
        assert_shows(cells[2], spread(one) if cells[2] else ())  # empty as above
        assert_shows(cells[3], spread(two))
        gains = [b - a for a, b in zip(one, two, strict=True)]
        assert_shows(cells[4], gains)
        assert table.verdict(gains) in cells[5].replace("*", ""), cells


def test_the_demos_tables_show_its_aims() -> None:
    for cells, metric in zip(cells_below(PAGE, "| | other people |"), DEMO, strict=True):
        letters = re.findall(r"([RCF]) \.?\d", cells[1])
        trivial = [statistics.fmean(values("demo", TRIVIAL[letter], metric)) for letter in letters]
        assert_shows(cells[1], [*spread(values("demo", aims.DEMO, metric)), *trivial])
    lines = cells_below(README, "| the demo | ours |")
    for cells, metric in zip(lines, ("angular_error_mean", "abs_rel", "l1", "l1_body", "psnr_body", "lpips_alex",
                                     "grain_distance"), strict=False):  # fmt: skip
        own = statistics.fmean(values("demo", aims.DEMO, metric))
        assert_shows(cells[1], [own])
        if against := aim_of(metric).against:
            best = min(statistics.fmean(values("demo", name, metric)) for name in against)
            assert_shows(cells[2], [best])
            assert cells[3].startswith(f"{abs(100 * (1 - own / best)):.0f} % {'better' if own < best else 'worse'}")
    assert_shows(lines[7][1], [statistics.fmean(values("demo", f"maps_made_{steps}", "l1_body")) for steps in (10, 25)])


def test_the_tables_of_denoising_steps_and_of_the_curve_show_their_rows() -> None:
    for cells in cells_below(PAGE, "| denoising steps | L1"):
        made = [(metric, "made") for metric in ("l1", "l1_body", "psnr_body", "lpips_alex")]
        for cell, (metric, maps) in zip(cells[1:], [*made, ("l1_body", "true")], strict=True):
            assert_shows(cell, [statistics.fmean(values("demo", f"maps_{maps}_{cells[0]}", metric))])
    *lines, goals = cells_below(PAGE, "| steps of every training |")
    for cells, times in zip(lines, names.FACTORS, strict=True):
        for cell, metric in zip(cells[2:], CURVE, strict=True):
            found = values("curve", f"maps_made_x{times}", metric)
            assert found or "not measured" in cells, cells
            assert_shows(cell, found)
    for cell, metric in zip(goals[2:], CURVE, strict=True):
        aim = aim_of(metric)
        rivals = [value for name in aim.against for value in values("curve", name, metric)]
        needed = min(rivals) * (1 - aim.needed) if rivals else aim.needed
        assert float(cell.split()[0]) == pytest.approx(needed, rel=5e-3), metric
