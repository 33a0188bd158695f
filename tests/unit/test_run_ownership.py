"""The later of two starts of one run owns the run."""

import shutil
import subprocess
import sys
import time

from dreamdance.launch.run_ownership import REPLACED_EXIT_CODE, RunOwnership
from dreamdance.runs.array_member import MEMBER
from dreamdance.runtime.exits import TRY_AGAIN_EXIT_CODE

PROGRAM = """
import sys, time
from pathlib import Path
from dreamdance.launch import run_ownership

run_ownership.LOOK_EVERY_SECONDS = 0.05
with run_ownership.RunOwnership(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_replaced_start_ends_and_names_its_successor(tmp_path):
    (tmp_path / "logs").mkdir()
    words = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        with RunOwnership(tmp_path):
            _, errors = first.communicate(timeout=20)
    assert first.returncode == REPLACED_EXIT_CODE
    assert "another start owns this run now" in errors


def test_members_of_an_array_own_a_run_together_and_a_new_start_of_one_replaces_only_that_one(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()

    def start(member: str) -> "subprocess.Popen[str]":
        monkeypatch.setenv(MEMBER, member)
        words = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path)]
        started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert started.stdout is not None
        assert started.stdout.readline() == "mine\n"
        return started

    first, second = start("42_0"), start("42_1")
    second_again = start("42_1")
    assert second.wait(20) == REPLACED_EXIT_CODE
    time.sleep(0.3)
    assert (first.poll(), second_again.poll()) == (None, None)
    another = start("43_0")
    assert (first.wait(20), second_again.wait(20)) == (REPLACED_EXIT_CODE, REPLACED_EXIT_CODE)
    another.kill()
    for process in (first, second, second_again, another):
        process.communicate()


def test_a_start_continues_though_its_owner_file_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr("dreamdance.launch.run_ownership.LOOK_EVERY_SECONDS", 0.01)
    with RunOwnership(tmp_path) as ownership:
        (tmp_path / "logs" / "owner.txt").unlink()
        ownership._thread.join(0.1)
        assert ownership._thread.is_alive()


def test_a_start_whose_run_folder_was_removed_ends_naming_it_and_does_not_recreate_it(tmp_path):
    run_folder = tmp_path / "run"
    (run_folder / "logs").mkdir(parents=True)
    words = [sys.executable, "-P", "-c", PROGRAM, str(run_folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as start:
        assert start.stdout is not None
        assert start.stdout.readline() == "mine\n"
        shutil.rmtree(run_folder)
        _, errors = start.communicate(timeout=20)
    assert start.returncode == TRY_AGAIN_EXIT_CODE
    assert f"the run folder {run_folder} is gone" in errors
    assert not run_folder.exists()
