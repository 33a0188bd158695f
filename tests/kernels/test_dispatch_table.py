"""The table of the fastest backends: which cases count as measured, and the answer for all others."""

import pytest

from dreamdance_kernels.dispatch_table import PACKAGED, MeasuredCase, fastest, read_table, write_table

H200 = (9, 0)
CASES = [
    MeasuredCase("geometry", 40, 4608, 4608, "sm_90", "triton", "3.1 ms against 4.0 ms"),
    MeasuredCase("geometry", 40, 1536, 1536, "sm_90", "sdpa", "0.5 ms against 0.6 ms"),
    MeasuredCase("geometry", 160, 288, 288, "sm_90", "sdpa", "0.02 ms against 0.03 ms"),
    MeasuredCase("temporal", 40, 16, 16, "sm_90", "triton", "0.1 ms against 0.9 ms"),
]


@pytest.fixture
def table(tmp_path):
    write_table(CASES, tmp_path / "table.csv")
    return read_table(tmp_path / "table.csv")


def test_a_written_table_reads_back_the_same(table):
    assert list(table) == CASES


def test_the_measured_lengths_choose_the_backend_that_was_fastest_there(table):
    for case in CASES:
        choice = fastest(case.function, case.head_width, case.num_queries, case.num_keys, H200, table=table)
        assert (choice.backend, choice.reason) == (case.backend, case.reason)


def test_the_nearest_measured_length_applies_to_lengths_within_a_factor_of_two(table):
    backends = {n: fastest("geometry", 40, n, n, H200, table=table).backend for n in (768, 1536, 2500, 2800, 9216)}
    assert backends == {768: "sdpa", 1536: "sdpa", 2500: "sdpa", 2800: "triton", 9216: "triton"}


@pytest.mark.parametrize("lengths", [(767, 767), (9217, 9217), (4608, 9217), (767, 1536)])
def test_lengths_further_than_a_factor_of_two_are_not_measured(table, lengths):
    choice = fastest("geometry", 40, *lengths, H200, table=table)
    assert choice.backend == "sdpa"
    assert f"{lengths[0]} queries and {lengths[1]} keys: not measured on sm_90" in choice.reason


@pytest.mark.parametrize(("function", "head_width"), [("geometry", 80), ("reference", 40), ("temporal", 160)])
def test_another_function_or_head_width_is_not_measured(table, function, head_width):
    choice = fastest(function, head_width, 4608, 4608, H200, table=table)
    assert choice.backend == "sdpa"
    assert "not measured on sm_90" in choice.reason


def test_another_architecture_is_not_measured(table):
    choice = fastest("geometry", 40, 4608, 4608, (8, 0), table=table)
    assert (choice.backend, choice.reason) == ("sdpa", "not measured on sm_80")


def test_an_empty_table_leaves_every_attention_to_torch(tmp_path):
    write_table([], tmp_path / "table.csv")
    choice = fastest("temporal", 40, 16, 16, H200, table=read_table(tmp_path / "table.csv"))
    assert (choice.backend, choice.reason) == ("sdpa", "not measured on sm_90")


def test_the_packaged_table_names_known_backends_with_their_measurements():
    assert all(case.backend in ("triton", "sdpa", "flash") and " ms" in case.reason for case in PACKAGED)
    assert len({(c.function, c.head_width, c.num_queries, c.num_keys, c.architecture) for c in PACKAGED}) == len(
        PACKAGED
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("function,head_width\ngeometry,40\n", "the columns must be function, head_width"),
        (
            "function,head_width,num_queries,num_keys,architecture,backend,reason\ngeometry,wide,1,1,sm_90,sdpa,x\n",
            r"table.csv:2: .*'wide'",
        ),
    ],
)
def test_a_damaged_table_is_refused_by_file_and_line(tmp_path, text, complaint):
    (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        read_table(tmp_path / "table.csv")
