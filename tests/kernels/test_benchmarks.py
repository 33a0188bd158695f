"""The benchmark: run on a CPU from end to end, and its arithmetic checked on made-up measurements."""

import subprocess
import sys
from dataclasses import replace

import clock
import measure
import pytest
import records
import tables
import torch
from contestants import Contestant
from records import Environment, describe
from workloads import tiny_workloads, workloads

from dreamdance_kernels import dispatch_table

H200 = Environment("2026-11-22", "abc1234", "NVIDIA H200", "sm_90", "580", "2.11.0", "3.6.0")
GEOMETRY = workloads()[0]
CPU = measure.find_machine(tiny=True)


def run(*arguments):
    command = [sys.executable, measure.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows_of(workload, times, *, errors=None, directions=("forward", "backward")):
    """Rows in the form of a run on a GPU: milliseconds by contestant, for each direction."""
    return [
        replace(
            describe(workload, backend=name, direction=direction, environment=H200),
            ms=ms,
            lower_ms=ms,
            upper_ms=ms,
            host_ms=0.1,
            error=(errors or {}).get(name, 0.01),
        )
        for name, ms in times.items()
        for direction in directions
    ]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "tiny.csv"
    finished = run("--tiny", "--output", output)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, output


@pytest.mark.slow
def test_the_whole_path_runs_on_a_cpu_and_every_result_agrees_with_float64(tried):
    rows = records.read_rows(tried[1])
    assert {row.workload for row in rows} == {workload.name for workload in tiny_workloads()}
    ours = [row for row in rows if not records.is_rival(row.backend)]
    assert len(ours) == 3 * 3 + 2  # three attentions, each with a second backward, and a normalisation
    assert all(row.ms is not None and row.ms > 0 for row in ours)
    assert all((row.ms is None) == bool(row.why_not) for row in rows)
    measured = [row for row in rows if row.error is not None]
    assert len(measured) >= 30
    assert all(row.error < 2e-5 for row in measured)  # float32, in every layout and for every gradient


@pytest.mark.slow
def test_a_measurement_on_a_cpu_never_counts_as_one_on_a_gpu(tried):
    text, output = tried
    rows = records.read_rows(output)
    assert {row.gpu for row in rows} == {"none (CPU)"}
    ours = {row.backend for row in rows if row.backend.startswith("triton")}
    assert all("interpreted" in name or "on CPU" in name for name in ours)
    assert "these times mean nothing" in text
    assert "aim met" not in text
    assert records.dispatch_cases(rows) == []


@pytest.mark.slow
def test_a_rival_that_cannot_run_is_listed_with_the_reason(tried):
    why_not = {row.backend: row.why_not for row in records.read_rows(tried[1]) if row.ms is None}
    assert "not installed" in why_not["flash_attn_4"]
    assert "backend" in why_not["sdpa_cudnn"]
    assert "CPU" in why_not["flex (traced only)"]


@pytest.mark.slow
def test_a_run_that_was_cut_off_resumes_where_it_was(tried, tmp_path):
    rows = records.read_rows(tried[1])
    records.write_rows([row for row in rows if row.backend != "torch"], tmp_path / "part.csv")
    resumed = run("--tiny", "--resume", "--output", tmp_path / "part.csv")
    assert resumed.returncode == 0, resumed.stderr
    again = records.read_rows(tmp_path / "part.csv")
    assert [row.backend for row in again[-2:]] == ["torch", "torch"]
    assert len(again) == len(rows)


def test_a_tiny_run_refuses_to_write_the_committed_results():
    with pytest.raises(SystemExit):
        measure.parse_arguments(["--tiny", "--output", str(measure.RESULTS)])
    assert measure.parse_arguments(["--tiny"]).output is None


@pytest.mark.parametrize(
    ("name", "gigaflops", "megabytes"),
    [
        ("geometry d40 1536x3 B16", (435, 1087), (191, 382)),
        ("geometry d80 384x3 B16", (54, 136), (95, 190)),
        ("geometry d160 96x3 B16", (6.8, 17), (47, 95)),
        ("controller 5x64 6144x3 B16", (6958, 17395), (761, 1522)),
        ("temporal d40 T16 1 clip", (1.5, 3.8), (191, 382)),
        ("temporal d40 T24 4 clips", (13.6, 34), (1147, 2293)),
    ],
)
def test_useful_operations_and_fewest_bytes_are_those_counted_by_hand(name, gigaflops, megabytes):
    workload = next(x for x in workloads() if x.name == name)
    for direction, flops, size in zip(("forward", "backward"), gigaflops, megabytes, strict=True):
        assert workload.useful_flops(direction) / 1e9 == pytest.approx(flops, rel=0.03)
        assert workload.fewest_bytes(direction, 2) / 1e6 == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("workload", tiny_workloads(), ids=lambda workload: workload.function)
def test_a_fast_wrong_kernel_shows_in_its_error(workload, direction):
    right = next(x for x in measure.contestants(workload, on_gpu=False) if x.name in ("sdpa", "torch"))
    wrong = Contestant("wrong", lambda x: (right.run(x)[0] * 1.01,))
    exact = measure.exact_results(workload, CPU)
    errors = [
        measure.find_error(workload, measure.try_once(workload, x, CPU, backward=direction == "backward"), exact)
        for x in (right, wrong)
    ]
    assert errors[0] < 1e-5
    assert errors[1] == pytest.approx(0.01, rel=0.01)


def test_a_result_that_is_not_a_number_is_an_error():
    workload = tiny_workloads()[0]
    exact = measure.exact_results(workload, CPU)
    broken = Contestant("broken", lambda x: (x["query"] * float("nan"),))
    error = measure.find_error(workload, measure.try_once(workload, broken, CPU, backward=False), exact)
    assert error != error
    rows = rows_of(GEOMETRY, {"triton": 1.0, "sdpa": 2.0}, errors={"triton": error})
    assert records.is_wrong(rows, GEOMETRY.name, "triton")


def test_ratios_are_to_the_fastest_rival_of_the_same_workload_and_direction():
    rows = rows_of(GEOMETRY, {"triton": 2.0, "triton_deterministic": 1.0, "sdpa_flash": 5.0, "sdpa_cudnn": 3.0})
    ratios = {row.backend: row.times_faster_than_best_rival for row in records.with_ratios(rows)}
    assert ratios == {"triton": 1.5, "triton_deterministic": 3.0, "sdpa_flash": 0.6, "sdpa_cudnn": 1.0}


@pytest.mark.parametrize(
    ("ours", "verdict"), [(1.0, "aim met"), (1.25, "must met"), (1.5, "missed"), (None, "not measured")]
)
def test_a_target_is_met_only_against_the_fastest_rival(ours, verdict):
    rows = rows_of(GEOMETRY, {"sdpa_cudnn": 1.46, "sdpa_flash": 2.0} | ({"triton": ours} if ours else {}))
    found = records.outcomes(rows, [GEOMETRY])
    assert found[0].target.label == "geometry d40 forward"
    assert (found[0].verdict, found[0].rival) == (verdict, "sdpa_cudnn")


def test_a_wrong_result_meets_no_target_however_fast():
    rows = rows_of(GEOMETRY, {"triton": 0.1, "sdpa": 1.0}, errors={"triton": 0.3})
    assert {found.verdict for found in records.outcomes(rows, [GEOMETRY])} == {"WRONG RESULT", "not measured"}


def test_the_concat_form_is_compared_only_with_its_own_kind():
    rows = rows_of(GEOMETRY, {"triton": 1.0, "sdpa": 1.1, "concat_flash": 1.4, "concat_cudnn": 1.35})
    found = next(x for x in records.outcomes(rows, [GEOMETRY]) if "concat" in x.target.label)
    assert (found.rival, found.verdict) == ("concat_cudnn", "must met")
    assert found.ratio == pytest.approx(1.35)


def test_every_target_of_the_issue_has_a_workload():
    covered = {found.target.label for found in records.outcomes([], workloads())}
    assert covered == {target.label for target in records.TARGETS}


def test_the_dispatch_table_has_the_fastest_backend_of_both_directions_over_all_batches(tmp_path):
    larger = replace(GEOMETRY, name="geometry d40 1536x3 B32", outer=32)
    rows = [
        *rows_of(GEOMETRY, {"triton": 1.0, "sdpa": 0.9, "sdpa_cudnn": 0.1}),  # a rival that is not one of our backends
        *rows_of(larger, {"triton": 2.0, "sdpa": 3.0}),
    ]
    (case,) = records.dispatch_cases(rows)
    assert (case.backend, case.num_queries, case.architecture) == ("triton", 4608, "sm_90")
    assert case.reason == "6 ms forward and backward against sdpa's 7.8 ms on NVIDIA H200, torch 2.11.0"
    dispatch_table.write_table([case], tmp_path / "table.csv")
    table = dispatch_table.read_table(tmp_path / "table.csv")
    assert dispatch_table.fastest("geometry", 40, 4608, 4608, (9, 0), table=table).backend == "triton"


def test_a_backend_with_a_wrong_result_or_without_a_backward_is_never_dispatched_to():
    wrong = rows_of(GEOMETRY, {"triton": 0.1, "sdpa": 1.0}, errors={"triton": 0.3})
    half = rows_of(GEOMETRY, {"triton": 0.1}, directions=["forward"]) + rows_of(GEOMETRY, {"sdpa": 1.0})
    assert [case.backend for case in records.dispatch_cases(wrong)] == ["sdpa"]
    assert [case.backend for case in records.dispatch_cases(half)] == ["sdpa"]


def test_rows_survive_the_file(tmp_path):
    rows = rows_of(GEOMETRY, {"triton": 1.25, "sdpa": 2.5})
    rows.append(replace(describe(GEOMETRY, backend="x", direction="forward", environment=H200), why_not="no, because"))
    records.write_rows(rows, tmp_path / "rows.csv")
    assert records.read_rows(tmp_path / "rows.csv") == records.with_ratios(rows)


def test_the_readme_table_shows_losses_and_what_was_not_measured():
    rows = rows_of(GEOMETRY, {"triton": 2.0, "sdpa_cudnn": 1.0}, directions=["forward"])
    text = tables.markdown(rows, [GEOMETRY])
    assert "NVIDIA H200, driver 580, torch 2.11.0, triton 3.6.0, abc1234" in text
    assert "| forward | 2 (2 to 2) | 1 (1 to 1) sdpa_cudnn | 0.50 |" in text
    assert "| backward | not measured | not measured |" in text
    assert tables.markdown([], [GEOMETRY]) == "Not measured."


def test_the_committed_results_hold_every_target_or_do_not_exist():
    if not measure.RESULTS.exists():
        assert dispatch_table.PACKAGED == ()
        return
    rows = records.read_rows(measure.RESULTS)
    assert {row.gpu for row in rows} != {"none (CPU)"}
    found = records.outcomes(rows, workloads())
    assert not [outcome for outcome in found if outcome.verdict == "WRONG RESULT"]
    measured = {outcome.target.label for outcome in found if outcome.verdict != "not measured"}
    assert measured == {target.label for target in records.TARGETS}
    assert records.dispatch_cases(rows) == list(dispatch_table.PACKAGED)


def test_medians_and_quartiles_are_those_of_the_samples():
    timing = clock._summarise([(float(ms), float(ms) / 10) for ms in (5, 1, 4, 2, 3)])
    assert (timing.lower_ms, timing.median_ms, timing.upper_ms) == (2, 3, 4)
    assert timing.host_ms == pytest.approx(0.3)


def test_calls_take_turns():
    order = []
    calls = [lambda: order.append(0), lambda: order.append(1), lambda: order.append(2)]
    timing = clock.time_calls(calls, device=torch.device("cpu"), seconds=0.001)
    assert order[:6] == [0, 1, 2, 0, 1, 2]
    assert timing.median_ms > 0
