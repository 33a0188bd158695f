"""`prepare` by the command: its exit codes and messages about unusable videos, on one rank and on two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.video_folders import damage_video, stored_clips, write_videos

from dreamdance.data import prepare
from dreamdance.data.prepare import write_missing
from dreamdance.launch.command import main

ROOT = Path(__file__).parents[2]
WORDS = ("recipes/prepare.yaml", "videos.folder=take #2", "output=out", "videos.width=null", "videos.height=null")
WORDS += ("smaller_sizes=[]", "videos.clip_frames=8", "videos.min_clip_frames=4", "videos.validation_fraction=0.25")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the recipes and four clips; a job in this process sets variables, which are restored."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for seed, name in enumerate("abcd"):
        write_videos(tmp_path / "take #2", name, seed=seed)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    return tmp_path


def debug(*words: str) -> int:
    """The command, in this process; unlike a user's, it lives on, so its last job is forgotten."""
    Path("runs/prepare/logs/job.json").unlink(missing_ok=True)
    return main((*WORDS, "num_workers=1", *words, "--cluster", "debug"), lambda *_: "")


def failure() -> str:
    (path,) = Path("runs/prepare/logs/failures").iterdir()
    return json.loads(path.read_text())["text"]


def names(*splits: str) -> set[str]:
    return {clip.clip_id[0] for split in splits for clip in stored_clips(Path("out"), split)}


@pytest.mark.slow
def test_a_damaged_video_stops_a_run_is_skipped_by_it_then_repaired_and_then_replaced(folder, capsys):
    path = folder / "take #2" / "b.rgb.mp4"
    whole = path.read_bytes()
    damage_video(path)
    assert debug() == 1
    assert "1 of the videos are damaged" in failure()
    assert debug("videos.on_error=skip") == 0, "the same run resumes: the treatment of damage makes no other run"
    assert names("train", "validation") == set("acd")
    capsys.readouterr()
    assert debug("videos.on_error=skip") == 0
    assert capsys.readouterr().out.startswith("prepare is finished: ")
    path.write_bytes(whole)
    assert debug() == 0
    assert names("train", "validation") == set("abcd")
    shutil.rmtree("out/examples")
    assert debug() == 0
    assert Path("out/examples").is_dir()
    times = path.stat()
    path.write_bytes(whole[:-1] + b"?")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert debug() == 1
    assert "\n  b.rgb.mp4 has changed\n" in failure()


def test_a_name_that_is_no_text_is_skipped_and_the_run_is_finished(folder, capsys):
    for kind in ("rgb", "pose"):
        shutil.copy(
            folder / "take #2" / f"a.{kind}.mp4", folder / "take #2" / os.fsdecode(b"d\xe9j\xe0.%s.mp4" % kind.encode())
        )
    assert debug("videos.on_error=skip") == 0
    assert names("train", "validation") == set("abcd")
    assert "d\\udce9j" in Path("out/damaged_videos.tsv").read_text()
    capsys.readouterr()
    assert debug("videos.on_error=skip") == 0
    assert capsys.readouterr().out.startswith("prepare is finished: ")


def test_a_video_added_while_the_others_are_written_does_not_count_as_done(folder, capsys, monkeypatch):
    def write_and_add(*arguments):
        damaged = write_missing(*arguments)
        write_videos(folder / "take #2", "late", seed=9)
        return damaged

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(prepare, "write_missing", write_and_add)
        assert debug() == 0
    capsys.readouterr()
    assert debug() == 1
    assert "finished" not in capsys.readouterr().out
    assert "\n  late was added\n" in failure()


def on_two_ranks() -> subprocess.CompletedProcess[str]:
    surrounding = ("SUBMITIT", "SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(surrounding)}
    command = [sys.executable, ROOT / "launchers" / "slurm.py", *WORDS, "num_workers=1"]
    command += ["cluster.tasks_per_node=2", "cluster.cpus_per_task=1", "--cluster", "local", "--follow"]
    environment = kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("folder")
def test_two_ranks_name_problems_in_headers_of_both_shares_in_one_list():
    for name in "ab":
        Path(f"take #2/{name}.pose.mp4").write_bytes(b"this is no video")
    done = on_two_ranks()
    assert done.returncode == 1
    first, *lines = done.stderr[done.stderr.index("2 of the videos cannot be used") :].splitlines()
    assert first == "2 of the videos cannot be used; `prepare` has written no clips:"
    assert [line[:5] for line in lines[:2]] == ["  a: ", "  b: "]
    (path,) = Path("runs/prepare/logs/failures").iterdir()
    assert path.name.endswith("_0.json"), "the main rank alone ends with an error"
    assert not Path("out/train/index.json").exists()
