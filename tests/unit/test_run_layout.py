"""The layout of a run folder."""

import json

import pytest

from dreamdance.errors import MissingInputError
from dreamdance.runs import layout as run_layout
from dreamdance.runtime.ranks import Ranks


def test_step_folders_are_sorted_by_step_and_others_are_not_steps(tmp_path):
    for name in ("step_00000500", "step_100000000", "step_00000020", "step_x", "step_00000030.tmp", "latest"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000999").touch()
    assert [run_layout.step_of(folder) for folder in run_layout.step_folders(tmp_path)] == [20, 500, 100000000]


def test_the_newest_export_is_the_one_of_the_highest_step(tmp_path):
    run_layout.export_folder(tmp_path, 20).mkdir(parents=True)
    run_layout.export_folder(tmp_path, 100).mkdir(parents=True)
    assert run_layout.newest_export(tmp_path) == run_layout.export_folder(tmp_path, 100)


def test_a_run_without_export_and_a_missing_run_are_distinguished(tmp_path):
    with pytest.raises(MissingInputError, match="has no export yet"):
        run_layout.newest_export(tmp_path)
    with pytest.raises(MissingInputError, match="run 'nowhere' does not exist"):
        run_layout.newest_export(tmp_path / "nowhere")


def test_progress_lines_contain_the_pace_of_this_start_alone(tmp_path):
    log = run_layout.ProgressLog(tmp_path)
    log.write(done=100, total=110, unit="step", message="resumed")
    log.write(done=105, total=110, unit="step", loss=0.5)
    first, second = (json.loads(line) for line in run_layout.progress_file(tmp_path).read_text().splitlines())
    assert "eta_seconds" not in first
    assert first["message"] == "resumed"
    assert 0 <= second["eta_seconds"] < 1
    assert second["loss"] == 0.5


def test_only_the_main_process_of_a_run_reports_progress(tmp_path):
    for rank in (1, 0, 2):
        run_layout.ProgressLog(tmp_path, Ranks(rank, 3)).write(done=rank, total=3, unit="clips")
    (line,) = run_layout.progress_file(tmp_path).read_text().splitlines()
    assert json.loads(line)["done"] == 0


def test_ranks_come_from_the_environment_and_default_to_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ranks = Ranks.from_environment()
    assert ranks == Ranks(3, 4, 1)
    assert not ranks.is_main
