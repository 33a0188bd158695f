"""The output of `--follow`: a live line on a terminal, fewer plain lines elsewhere, and the failing rank's error."""

import io
import json
import time
from pathlib import Path

import pytest

from dreamdance.launch.follow import _Screen, explain_failure, follow, progress_line
from dreamdance.launch.job import record_failure
from dreamdance.launch.local.controller import status_file
from dreamdance.launch.submission import JobStatus, SubmittedJob
from dreamdance.recipe import load_recipe
from dreamdance.runs.layout import ProgressLog, progress_file

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "demo" / "prepare.yaml")
JOB = SubmittedJob("local", "4194300", 2, "host", time.time(), 1, "1")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def end(run_folder, **status):
    defaults = {"exit_code": 0, "first_failed_rank": None, "rank_exit_codes": [0, 0], "ended_by": None}
    status_file(run_folder, JOB.job_id).write_text(json.dumps(defaults | status))


def test_the_progress_line_has_the_form_of_the_contract():
    line = {"time": 1.0, "unit": "steps", "done": 1200, "total": 50000, "loss": 0.08341, "samples_per_second": 3.21}
    line |= {"eta_seconds": 118_800, "message": "hello", "validation_loss": 0.1}
    assert progress_line(line) == ("step 1200/50000  loss 0.0834  3.2 samples/s  validation loss 0.1  eta 1d 09h")


def test_plain_output_holds_messages_and_the_last_line_and_ends_with_the_job(run_folder):
    log = ProgressLog(run_folder)
    log.write(done=0, total=3, unit="parts", message="resuming from part 0")
    for done in (1, 2, 3):
        log.write(done=done, total=3, unit="parts", message="writing" if done < 3 else None)
    end(run_folder)
    out = io.StringIO()
    assert follow(JOB, RECIPE, run_folder, 0, out).state == "finished"
    lines = out.getvalue().splitlines()
    assert lines[:-1] == ["resuming from part 0", "writing"], "a repeated message is shown once"
    assert lines[-1].startswith("part 3/3"), "of the lines between two looks, the newest is shown"


def test_a_terminal_gets_one_redrawn_line_with_messages_above_it(run_folder):
    screen = _Screen(out := Terminal())
    screen.progress("step 1/3")
    screen.message("saved step_00000001")
    screen.progress("step 2/3")
    screen.close()
    clear = "\r\x1b[2K"
    assert out.getvalue() == f"step 1/3{clear}saved step_00000001\nstep 1/3{clear}step 2/3\n"
    log = ProgressLog(run_folder)
    log.write(done=1, total=3, unit="steps", message="saved step_00000001")
    log.write(done=2, total=3, unit="steps")
    end(run_folder)
    follow(JOB, RECIPE, run_folder, 0, out := Terminal())
    message, line, rest = out.getvalue().split("\n")
    assert (message, line.partition("  ")[0], rest) == ("saved step_00000001", "step 2/3", "")


def test_lines_of_an_earlier_job_and_half_lines_are_not_shown(run_folder):
    log = ProgressLog(run_folder)
    log.write(done=7, total=9, unit="steps")
    offset = progress_file(run_folder).stat().st_size
    with progress_file(run_folder).open("a") as raw:
        raw.write('{"time": 1, "done": 8, "to\n{"half')
    end(run_folder)
    out = io.StringIO()
    follow(JOB, RECIPE, run_folder, offset, out)
    assert out.getvalue() == ""


def test_a_user_error_is_shown_whole_without_a_traceback(run_folder):
    record_failure(run_folder, JOB.job_id, 1, "shard 3 of data/train is damaged", user_error=True)
    status = JobStatus("failed", "rank 1 ended with exit code 1", 1)
    text = explain_failure(JOB, run_folder, status)
    assert "shard 3 of data/train is damaged" in text
    assert "Traceback" not in text
    assert text.endswith(f"log of rank 1: {run_folder / 'logs' / '4194300_1_log.out'}")


def test_the_rank_that_failed_first_is_shown_and_not_those_that_failed_because_of_it(run_folder):
    record_failure(run_folder, JOB.job_id, 0, "Connection closed by peer", user_error=False)
    (run_folder / "logs" / "4194300_1_log.out").write_text("step 3\nlast words\n")
    text = explain_failure(JOB, run_folder, JobStatus("failed", "rank 1 was killed by SIGKILL", 1))
    assert "last words" in text
    assert "Connection closed" not in text


def test_the_first_error_of_ranks_that_ended_together_is_shown(run_folder):
    record_failure(run_folder, JOB.job_id, 1, "RuntimeError: out of memory", user_error=False)
    record_failure(run_folder, JOB.job_id, 0, "Connection closed by peer", user_error=False)
    text = explain_failure(JOB, run_folder, JobStatus("failed", "rank 0 ended with exit code 1", 0))
    assert "RuntimeError: out of memory" in text
    assert "Connection closed" not in text
    assert "log of rank 1" in text


def test_a_long_traceback_is_cut_to_its_end(run_folder):
    record_failure(run_folder, JOB.job_id, 0, "\n".join(f"line {i}" for i in range(99)), user_error=False)
    text = explain_failure(JOB, run_folder, JobStatus("failed", "rank 0 ended with exit code 1", 0))
    assert "line 98" in text
    assert "line 50" not in text


def test_warnings_and_errors_of_every_rank_are_shown_and_nothing_else_of_its_log(run_folder):
    log = run_folder / "logs" / "4194300_1_log.out"
    lines = [
        "2026-11-22 17:00:00,123 [rank 1] INFO a: fine",
        "2026-11-22 17:00:01,123 [rank 1] WARNING a: skipping shard 3",
    ]
    cancelled = "slurmstepd: error: *** JOB 3 ON node1 CANCELLED ***"
    log.write_text("\n".join([*lines, "Traceback of something", f"{cancelled}\n"]))
    end(run_folder)
    out = io.StringIO()
    follow(JOB, RECIPE, run_folder, 0, out)
    assert out.getvalue().splitlines() == [lines[1], cancelled]
    out = io.StringIO()
    follow(JOB, RECIPE, run_folder, 0, out, is_new=False)
    assert out.getvalue() == "", "a later follower sees only later lines"


def test_the_list_of_a_warning_is_shown_up_to_its_tenth_line_and_messages_are_not_repeated_after_it(run_folder):
    head = "2026-11-22 17:00:01,123 [rank 0] WARNING a: the output contains no clips of 12 damaged videos:"
    listed = [f"  video_{number}: cannot be decoded" for number in range(12)]
    error = "2026-11-22 17:00:02,123 [rank 0] ERROR a: 12 of the videos are damaged:"  # shown whole at the end
    out = io.StringIO()
    log, ranks_log = ProgressLog(run_folder), run_folder / "logs" / "4194300_0_log.out"
    ranks_log.write_text("\n".join([head, *listed, "not indented", "  of no warning", error, "  its list", ""]))
    log.write(done=1, total=3, unit="parts", message="writing")
    log.write(done=2, total=3, unit="parts", message="writing")
    end(run_folder)
    follow(JOB, RECIPE, run_folder, 0, out)
    lines = out.getvalue().splitlines()
    assert lines[:11] == [head, *listed[:9], "  ... (see the log)"]
    assert lines[11:13] == [error, "writing"]
    assert lines[13].startswith("part 2/3  eta ")
    screen = _Screen(out := io.StringIO())
    for show, text in ((screen.message, "writing"), (screen.write_line, head), (screen.message, "writing")):
        show(text)
    assert out.getvalue().splitlines() == ["writing", head]


def test_no_time_to_go_is_shown_at_the_end():
    assert progress_line({"unit": "parts", "done": 6, "total": 6, "eta_seconds": 0.0}) == "part 6/6"


def test_ranks_without_a_recorded_error_are_named_if_the_cluster_does_not_name_the_failed_one(run_folder):
    record_failure(run_folder, JOB.job_id, 0, "Connection reset by peer", user_error=False)
    text = explain_failure(JOB, run_folder, JobStatus("failed", "failed"))
    assert text.endswith("ended without an error of their own (killed?): ranks 1")


def test_a_failed_job_without_any_log_is_reported_as_such(run_folder):
    assert "it wrote no log" in explain_failure(JOB, run_folder, JobStatus("failed", "it could not start"))
