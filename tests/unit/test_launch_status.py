"""`status`: the list of runs, the progress of each, and the state of its job."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from dreamdance.errors import UserError
from dreamdance.launch.finished import digest_inputs, mark_finished
from dreamdance.launch.job import record_failure
from dreamdance.launch.local.controller import status_file
from dreamdance.launch.requeue import decide
from dreamdance.launch.status import details, find_run, table
from dreamdance.recipe import dump_recipe, load_recipe
from dreamdance.runs.damaged_videos import by_reason
from dreamdance.runs.layout import (
    RECIPE_FILE,
    ProgressLog,
    checkpoint_folder,
    export_folder,
    last_progress,
    progress_file,
)

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
JOB_ID = "4194300"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def make_run(runs: Path, recipe: str, name: str | None = None) -> Path:
    """A run folder with its resolved recipe, as the launcher makes it."""
    loaded = load_recipe(DEMO / f"{recipe}.yaml")
    folder = runs / (name or loaded.name)
    (folder / "logs").mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(dump_recipe(loaded))
    return folder


def submit(run: Path, **changes: object) -> None:
    """Writes the files of a submission to this machine."""
    job = {
        "cluster": "local", "job_id": JOB_ID, "num_tasks": 2, "host": socket.gethostname(),
        "submitted": time.time(), "launcher_pid": os.getpid(), "process_start": "1",
    }  # fmt: skip
    (run / "logs" / "job.json").write_text(json.dumps(job | changes))


def end(run: Path, **changes: object) -> None:
    """Writes the files that the controller of a job writes when it ends."""
    ending = {"exit_code": 0, "first_failed_rank": None, "rank_exit_codes": [0, 0], "ended_by": None}
    status_file(run, JOB_ID).write_text(json.dumps(ending | changes))


def states(runs: Path) -> dict[str, str]:
    """By run: the text of the table after its name."""
    header, *lines = table(runs).splitlines()
    assert header.split() == ["run", "task", "state", "progress"]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_a_run_is_found_by_its_name_or_its_path(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = make_run(runs, "stage2"), make_run(tmp_path / "other", "prepare")
    assert find_run("demo_stage2", runs) == here
    assert find_run(str(elsewhere), runs) == elsewhere
    monkeypatch.chdir(tmp_path)
    assert find_run("other/demo_prepare", runs) == Path("other/demo_prepare")


def test_a_run_that_is_not_there_is_named_with_those_that_are(runs: Path) -> None:
    with pytest.raises(UserError, match=r"no run 'x' .*runs in .*: none$"):
        find_run("x", runs)
    make_run(runs, "stage2")
    make_run(runs, "prepare")
    (runs / "no_run").mkdir()
    with pytest.raises(UserError, match=r"no run 'no_run' \(looked for .*recipe.yaml\).*: demo_prepare, demo_stage2$"):
        find_run("no_run", runs)


def test_the_table_without_runs_reports_that_there_are_none(runs: Path) -> None:
    assert table(runs) == f"no runs in {runs}"


def test_every_state_of_a_run_has_a_name(runs: Path) -> None:
    make_run(runs, "prepare", "fresh")
    for name, ending in {
        "crashed": {"exit_code": 1, "first_failed_rank": 1, "rank_exit_codes": [-15, 3]},
        "ended": {},
        "cancelled": {"exit_code": 1, "ended_by": "cancelled"},
    }.items():
        run = make_run(runs, "stage2", name)
        submit(run)
        end(run, **ending)
    submit(make_run(runs, "stage2", "lost"))
    submit(make_run(runs, "stage2", "away"), host="another")
    found = states(runs)
    assert found["fresh"] == "prepare not started"
    assert found["crashed"] == "stage2 failed (local job 4194300: rank 1 ended with exit code 3)"
    assert found["ended"] == "stage2 stopped", "a job that ended well before the last step has not finished the run"
    assert found["cancelled"].startswith("stage2 cancelled (local job 4194300")
    assert found["lost"].startswith("stage2 failed (local job 4194300: its process is gone")
    assert found["away"].startswith("stage2 running (local job 4194300: on another")


def test_a_finished_run_stays_finished_whatever_the_state_of_its_last_job(runs: Path) -> None:
    run = make_run(runs, "stage2")
    recipe = load_recipe(run / RECIPE_FILE)
    export_folder(run, recipe.max_steps).mkdir(parents=True)
    assert mark_finished(recipe, run, digest_inputs(recipe, run.parent))
    submit(run)
    end(run, exit_code=1, first_failed_rank=0, rank_exit_codes=[1, -15])
    assert states(runs)["demo_stage2"] == "stage2 finished"


@pytest.mark.parametrize(("on_error", "label"), [("skip", "left out"), ("stop", "unusable")])
def test_details_show_videos_per_hour_and_failures_by_reason(
    runs: Path, tmp_path: Path, on_error: str, label: str
) -> None:
    output = tmp_path / "data"
    run = make_run(runs, "prepare", "videos")
    recipe = load_recipe(
        DEMO.parent / "prepare.yaml", [f"output={output}", f"videos.folder={tmp_path}", f"videos.on_error={on_error}"]
    )
    (run / RECIPE_FILE).write_text(dump_recipe(recipe))
    output.mkdir()
    rows = ["video\tdamage"]
    for number in range(3):
        rows.append(f"{number}0\t/videos/{number}0.rgb.mp4: frame {number + 5} of 90 cannot be decoded")
    rows.append("short\t/videos/short.pose.mp4 is missing")
    (output / "damaged_videos.tsv").write_text("\n".join(rows) + "\n")
    ProgressLog(run).write(done=7, total=40, unit="parts", videos_per_hour=1234.5, videos_left_out=4)
    lines = details(run).splitlines()
    assert lines[1] == "  progress     part 7/40  videos per hour 1234  videos left out 4"
    assert lines[2:] == [
        f"  {label}     3 x <clip>.rgb.mp4: frame N of N cannot be decoded",
        f"  {label}     1 x <clip>.pose.mp4 is missing",
        f"               see {output / 'damaged_videos.tsv'}",
    ]


def test_tables_of_an_earlier_job_are_not_shown_while_a_new_one_works(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    run = make_run(runs, "prepare", "videos")
    recipe = load_recipe(DEMO.parent / "prepare.yaml", [f"output={output}", f"videos.folder={tmp_path}"])
    (run / RECIPE_FILE).write_text(dump_recipe(recipe))
    output.mkdir()
    tables = [output / "damaged_videos.tsv", output / "videos_without_clips.tsv"]
    for table_file in tables:
        table_file.write_text("video\treason\na\tbroken\n")
        os.utime(table_file, (1.7e9, 1.7e9))
    start = {"time": "2023-11-14T22:13:30+0000", "jobs": []}  # 10 seconds later
    (run / "provenance.json").write_text(json.dumps({"starts": [start]}))
    submit(run)
    assert "broken" in details(run), "the job is over: the tables may be of its own"
    submit(run, host="another")
    assert "running" in states(runs)["videos"]
    assert "broken" not in details(run)
    for table_file in tables:
        os.utime(table_file, (1.7e9 + 20, 1.7e9 + 20))
    assert details(run).count("1 x broken") == 2


def test_reasons_are_grouped_whatever_the_names_and_numbers() -> None:
    damaged = {
        "a": "/x/a.rgb.mp4 has 20 frames of 64x96, a.pose.mp4 10 of 64x96; at -0.5 s",
        "b (1)": "/y y/b (1).rgb.mp4 has 7 frames of 32x48, b (1).pose.mp4 3 of 32x48; at 1.25 s",
        "c": "/x/c.pose.mp4 is missing",
    }
    first = "<clip>.rgb.mp4 has N frames of NxN, <clip>.pose.mp4 N of NxN; at N s"
    assert by_reason(damaged) == {first: ["a", "b (1)"], "<clip>.pose.mp4 is missing": ["c"]}


def test_a_run_in_the_launchers_own_process_is_distinguished_from_jobs(runs: Path) -> None:
    run = make_run(runs, "prepare")
    submit(run, cluster="debug", job_id="debug")
    assert "prepare failed (in the launcher: its process is gone" in states(runs)["demo_prepare"]
    record_failure(run, "debug", 0, "there are no videos", user_error=True)
    assert states(runs)["demo_prepare"] == "prepare failed (in the launcher: ended with an error)"
    assert "there are no videos" in details(run)


def test_a_run_of_another_version_does_not_break_the_table(runs: Path) -> None:
    broken = make_run(runs, "stage2", "ancient")
    (broken / RECIPE_FILE).write_text("task: stage2\nname: ancient\nlayers: 3\n")
    make_run(runs, "prepare")
    found = states(runs)
    assert found["ancient"] == "? this version cannot read its recipe.yaml"
    assert found["demo_prepare"] == "prepare not started"


def test_the_table_lines_up_and_shows_the_newest_progress(runs: Path) -> None:
    log = ProgressLog(make_run(runs, "stage2", "a_run_with_a_long_name"))
    log.write(done=1, total=9, unit="steps", loss=0.5)
    log.write(done=4, total=9, unit="steps", loss=0.25, samples_per_second=2.0)
    make_run(runs, "prepare")
    header, first, second = table(runs).splitlines()
    assert first.endswith("step 4/9  loss 0.2500  2.0 samples/s  eta 0s")
    starts = [line.rindex(word) for line, word in ((header, "task"), (first, "stage2"), (second, "prepare"))]
    assert len(set(starts)) == 1
    assert not any(line.endswith(" ") for line in (header, first, second))


def test_the_newest_whole_line_is_shown_and_half_lines_are_skipped(runs: Path) -> None:
    run = make_run(runs, "stage2")
    assert last_progress(run) is None
    ProgressLog(run).write(done=3, total=9, unit="steps")
    with progress_file(run).open("a") as log:
        log.write('[1, 2]\n"text"\n{"done": 4, "tot')
    progress = last_progress(run)
    assert progress is not None
    assert progress["done"] == 3


def test_only_the_end_of_a_long_log_is_read(runs: Path) -> None:
    run = make_run(runs, "stage2")
    with progress_file(run).open("wb") as log:
        log.write(b'{"done": 1, "note": "' + b"x" * 300_000 + b'"}\n')
        log.write(b'{"done": 2}\n')
    assert last_progress(run) == {"done": 2}
    progress_file(run).write_bytes(b"\xff" * 100_000)
    assert last_progress(run) is None


def test_details_name_the_newest_checkpoints_and_exports(runs: Path) -> None:
    run = make_run(runs, "stage2")
    assert details(run).splitlines()[0] == f"{run} (stage2): not started"
    assert "checkpoints" not in details(run)
    for step in range(100, 800, 100):
        checkpoint_folder(run, step).mkdir(parents=True)
    export_folder(run, 700).mkdir(parents=True)
    lines = {line.split()[0]: line for line in details(run).splitlines()[1:]}
    assert "step_00000200" not in lines["checkpoints"]
    assert lines["checkpoints"].endswith("step_00000300, step_00000400, step_00000500, step_00000600, step_00000700")
    assert lines["exports"].split() == ["exports", "step_00000700"]


def test_details_of_a_run_of_another_version_still_name_the_log_of_its_job(runs: Path) -> None:
    run = make_run(runs, "stage2")
    submit(run)
    (run / RECIPE_FILE).write_text("task: stage2\nname: of_another_version\n")
    text = details(run)
    assert "this version cannot read its recipe.yaml" in text
    assert f"{JOB_ID}_0_log.out" in text


def test_details_of_a_failed_run_show_the_error_and_the_log_of_the_failing_rank(runs: Path) -> None:
    run = make_run(runs, "stage2")
    submit(run)
    record_failure(run, JOB_ID, 1, "shard 3 is damaged", user_error=True)
    end(run, exit_code=1, first_failed_rank=1, rank_exit_codes=[-15, 1])
    text = details(run)
    assert "shard 3 is damaged" in text
    assert f"log of rank 1: {run / 'logs' / '4194300_1_log.out'}" in text
    end(run)
    assert "damaged" not in details(run), "a job that ended well has nothing to explain"


def test_details_show_the_nodes_of_a_run_its_restarts_and_its_newest_checkpoint(runs: Path) -> None:
    run = make_run(runs, "stage2")
    submit(run)
    begun = [{"time": "t", "job_id": JOB_ID, "hosts": hosts} for hosts in (["a1", "a2"], ["a1", "a3"])]
    (run / "provenance.json").write_text(json.dumps({"starts": [{"jobs": []}, {"jobs": begun}]}))
    for step in (10, 20):
        checkpoint_folder(run, step).mkdir(parents=True)
    (checkpoint_folder(run, 10) / "COMPLETE").touch()
    assert decide(run, 137).again
    lines = [line.strip() for line in details(run).splitlines()]
    assert "nodes        a1, a3" in lines
    assert "restarts     1 (it failed (exit code 137))" in lines
    (checkpoint,) = [line for line in lines if line.startswith("checkpoint ")]
    assert checkpoint.startswith("checkpoint   step_00000010, complete since "), "the newer one is not complete"
    assert states(runs)[run.name].endswith("checkpoint 10 restarts 1")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_off_gives_sensible_times(
    runs: Path, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the machine that wrote the run's files differs from that of this machine."""
    run = make_run(runs, "stage2")
    off = time.time() + 3600 * hours
    with monkeypatch.context() as clock:
        clock.setattr("time.time", lambda: off)
        submit(run)
        progress = ProgressLog(run)
        progress.write(done=1, total=9, unit="steps", loss=0.5)
        progress.write(done=2, total=9, unit="steps", loss=0.25)
        record_failure(run, JOB_ID, 1, "lost its peer", user_error=False)
        assert decide(run, 1).again
        record_failure(run, JOB_ID, 1, "lost its peer again", user_error=False)
        end(run, exit_code=1, first_failed_rank=1, rank_exit_codes=[-15, 1])
    complete = checkpoint_folder(run, 2) / "COMPLETE"
    complete.parent.mkdir(parents=True)
    complete.touch()
    os.utime(complete, (off, off))
    text = details(run)
    assert "complete since 0s" in text if hours > 0 else "complete since 1h 00m" in text
    assert "step 2/9  loss 0.2500  eta 0s" in text
    assert "lost its peer again" in text
    assert "demo_stage2" in states(runs)
    assert decide(run, 1).again, "more steps count, whatever their time"


def test_the_last_loss_is_shown_whatever_messages_follow_it(runs):
    run = make_run(runs, "stage2")
    progress = ProgressLog(run)
    progress.write(done=3, total=9, unit="steps", loss=0.25)
    progress.write(done=4, total=9, unit="steps", message="saved step_00000004 in 0.1 s")
    assert "step 4/9  loss 0.2500" in table(runs)
    assert "step 4/9  loss 0.2500" in details(run)
