"""A job is requeued after a stop or a failure, but only a limited number of times and only with progress."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamdance.launch.finished import digest_inputs, mark_finished
from dreamdance.launch.job import record_failure
from dreamdance.launch.local.controller import worst_code
from dreamdance.launch.requeue import decide, read_failures, read_requeues, requeues_file
from dreamdance.launch.run_ownership import REPLACED_EXIT_CODE
from dreamdance.recipe import dump_recipe, load_recipe
from dreamdance.runs.layout import (
    COMPLETE_FILE,
    RECIPE_FILE,
    ProgressLog,
    checkpoint_folder,
    export_folder,
    failures_folder,
    note_done,
    note_signal,
    was_warned,
)
from dreamdance.runtime.ranks import Ranks

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


def make_run(folder: Path, recipe: str = "stage2", *words: str) -> Path:
    (folder / "logs").mkdir()
    (folder / RECIPE_FILE).write_text(dump_recipe(load_recipe(DEMO / f"{recipe}.yaml", words)))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def save(run: Path, step: int) -> None:
    """Writes the file that marks a checkpoint as complete."""
    folder = checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    (folder / COMPLETE_FILE).touch()


def test_a_training_that_was_asked_to_stop_is_requeued_as_often_as_the_recipe_allows(tmp_path):
    run = make_run(tmp_path, "stage2", "cluster.max_requeues=2")
    assert decide(run, 0).again
    assert decide(run, 0).again, "no progress is needed: the stop may have come during the start"
    verdict = decide(run, 0)
    assert not verdict.again
    assert "cluster.max_requeues" in verdict.reason
    assert [requeue.failed for requeue in read_requeues(run)] == [False, False]


def test_a_finished_training_does_not_start_again(run):
    recipe = load_recipe(run / RECIPE_FILE)
    export_folder(run, recipe.max_steps).mkdir(parents=True)
    assert mark_finished(recipe, run, digest_inputs(recipe, run.parent))
    assert not decide(run, 0).again


def test_a_job_that_fails_is_tried_again_as_long_as_it_gets_further(run):
    for step in (0, 10, 20):
        if step:
            save(run, step)
        assert decide(run, 137).again
    assert [requeue.progress for requeue in read_requeues(run)] == [0, 10, 20]
    (checkpoint_folder(run, 30)).mkdir()  # begun, never completed
    verdict = decide(run, 137)
    assert not verdict.again
    assert "twice without progress" in verdict.reason


def test_a_stop_in_between_is_no_failure(run):
    assert decide(run, 1).again
    assert decide(run, 0).again
    assert decide(run, 1).again
    assert not decide(run, 1).again


def test_a_start_ended_by_its_time_limit_before_it_could_save_is_no_failure(run):
    for _ in range(2):
        note_signal(run, signal.SIGUSR2)
        assert decide(run, 75).again
        assert not was_warned(run), "the next start is decided by its own failures"
    assert {requeue.failed for requeue in read_requeues(run)} == {False}
    note_signal(run, signal.SIGUSR2)
    assert decide(run, 75).reason == "it was stopped 3 times without progress"
    save(run, 10)
    note_signal(run, signal.SIGUSR2)
    assert decide(run, 75).again


def test_ranks_that_srun_ends_because_one_failed_were_not_warned(run):
    for again in (True, False):
        note_signal(run, signal.SIGTERM)
        assert decide(run, 137).again is again


def test_an_error_of_the_user_ends_the_job_and_one_caused_by_a_lost_rank_does_not(run):
    record_failure(run, "7", 0, "Connection closed by peer", user_error=False)
    assert decide(run, 1).again
    assert read_failures(run) == [], "the next start is decided by its own failures"
    record_failure(run, "7", 1, "shard 3 is damaged", user_error=True)
    verdict = decide(run, 1)
    assert not verdict.again
    assert verdict.reason == "the error of rank 1 names what to change"


def test_the_first_failure_is_found_by_the_clock_of_the_file_system_and_not_of_the_ranks(run, monkeypatch):
    for rank, hours_ahead in enumerate((1, 0, -1)):
        now = time.time() + 3600 * hours_ahead
        with monkeypatch.context() as clock:
            clock.setattr("time.time", lambda now=now: now)
            record_failure(run, "7", rank, "lost its peer" if rank else "out of memory", user_error=False)
        time.sleep(0.02)  # longer than a tick of the file system's clock
    assert [failure["rank"] for failure in read_failures(run)] == [0, 1, 2]
    assert decide(run, 1).again


@pytest.mark.parametrize("torn", ["", '{"time": 1.0, "ra', "[]", '{"time": 1.0}'])
def test_half_written_files_of_a_killed_rank_or_decision_are_ignored(run, caplog, torn):
    record_failure(run, "7", 0, "Connection closed by peer", user_error=False)
    (failures_folder(run) / "7_1.json").write_text(torn)
    assert [failure["rank"] for failure in read_failures(run)] == [0]
    assert "7_1.json" in caplog.text
    assert decide(run, 1).again
    with requeues_file(run).open("a") as log:
        log.write(torn or "{")
    assert [requeue.failed for requeue in read_requeues(run)] == [True]
    assert "requeues.jsonl" in caplog.text
    assert decide(run, 0).again
    assert [requeue.failed for requeue in read_requeues(run)] == [True, False], (
        "the incomplete line does not hide others"
    )


def test_a_rank_killed_while_it_records_its_failure_leaves_no_file_or_a_whole_one(run, monkeypatch):
    class KilledError(Exception):
        pass

    def kill(handle: int) -> None:
        raise KilledError

    monkeypatch.setattr("os.fsync", kill)
    with pytest.raises(KilledError):
        record_failure(run, "7", 0, "Connection closed by peer", user_error=False)
    assert list(failures_folder(run).glob("*.json")) == []


def test_a_replaced_start_ends_and_changes_nothing_of_its_successor(run):
    record_failure(run, "8", 1, "Connection closed by peer", user_error=False)
    verdict = decide(run, REPLACED_EXIT_CODE)
    assert not verdict.again
    assert "another start" in verdict.reason
    assert read_requeues(run) == []
    assert len(read_failures(run)) == 1


def test_srun_and_the_controller_report_a_replaced_start():
    killed_along = [-number for number in signal.valid_signals()]
    assert worst_code([REPLACED_EXIT_CODE, 1, 0, None, *killed_along]) == REPLACED_EXIT_CODE, "the highest is reported"


def test_progress_of_shared_work_is_what_any_rank_has_done_and_not_what_is_reported(tmp_path):
    run = make_run(tmp_path, "prepare")
    log = ProgressLog(run)
    for rank in (0, 1, 0):
        note_done(run, Ranks(rank), "a part")
        log.write(done=0, total=9, unit="parts")
        assert decide(run, 1).again
    log.write(done=5, total=9, unit="parts")
    assert not decide(run, 1).again


def test_the_batch_script_gets_the_decision_by_the_exit_code(run):
    words = [sys.executable, "-P", "-m", "dreamdance.launch.requeue", str(run / "logs")]
    done = [subprocess.run([*words, "9"], capture_output=True, text=True, check=False) for _ in range(2)]
    assert [one.returncode for one in done] == [0, 1]
    assert "WARNING dreamdance.launch.requeue: back into the queue: it failed (exit code 9)" in done[0].stdout
    assert "the job is over: it failed twice" in done[1].stdout


def test_a_storage_error_during_the_decision_is_tried_again(run):
    """The memory of a process is the only file of Linux that fails with EIO."""
    requeues_file(run).symlink_to("/proc/self/mem")
    words = [sys.executable, "-P", "-u", "-m", "dreamdance.launch.requeue", str(run / "logs"), "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as deciding:
        assert deciding.stdout is not None
        assert (
            "deciding whether the job starts again failed, trying again in 1 s: [Errno 5]" in deciding.stdout.readline()
        )
        requeues_file(run).unlink()
        output, _ = deciding.communicate(timeout=20)
    assert deciding.returncode == 0, output
    assert "back into the queue" in output
    assert len(read_requeues(run)) == 1


def test_a_decision_does_not_recreate_a_removed_run_folder(run, monkeypatch):
    monkeypatch.setattr("dreamdance.runs.files.FIRST_PAUSE_SECONDS", 0.0)
    shutil.rmtree(run)
    with pytest.raises(OSError, match="the run folder was removed"):
        decide(run, 1)
    assert not run.exists()
