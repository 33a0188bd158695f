"""One run as an array of two jobs that share its items: one of them is killed, and begins again when all is done."""

import os
import signal
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.slurm_jobs import ROOT, Cluster, Run, wait_until
from support.true_maps import FOLDER, NAME, write_truth

from dreamdance.dancers.render import HELD_OUT_SEEDS, render_clip
from dreamdance.data.prepare import prepare
from dreamdance.media.video import write_video
from dreamdance.recipe import load_recipe
from dreamdance.runs.folder_lock import FOLDER_LOCK_FILE
from dreamdance.runs.layout import read_done

NUM_VIDEOS = 40
WORDS = ("videos.folder=videos", "videos.width=null", "videos.height=null", "smaller_sizes=[]", "videos.clip_frames=8")
WORDS += ("videos.min_clip_frames=4", "videos.validation_fraction=0.25", "videos.references=3", "num_workers=1")
WORDS += tuple(f"videos.annotators.{what}={NAME}" for what in ("pose", "mask", "depth", "normal"))
RESOURCES = ("cluster.partition=low", "cluster.memory_gib=null", "cluster.cpus_per_task=1", "cluster.time_minutes=10")


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> Path:
    """A user's folder with short videos of pictures alone; the annotators know the dancers."""
    for number, seed in enumerate(HELD_OUT_SEEDS[60 : 60 + NUM_VIDEOS]):
        clip = render_clip(seed, num_frames=12, width=48, height=72, fps=8)
        write_truth(tmp_path / "truth", f"{number:02d}", clip)
        write_video(tmp_path / "videos" / f"clip_{number:02d}.mp4", clip.rgb, fps=8)
    searched = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setitem(cluster.environment, "PYTHONPATH", searched)
    monkeypatch.setitem(cluster.environment, FOLDER, str(tmp_path / "truth"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "truth"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored_files(output: Path) -> dict[str, bytes]:
    """The shards, the indices, the examples and the record of the videos, by path.

    Of an example's drawings only the size: Matroska has a random number in its header. A killed process may leave an
    unfinished file in `annotations`, hidden.
    """
    return {
        str(path.relative_to(output)): str(path.stat().st_size).encode() if path.suffix == ".mkv" else path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and ".verified" not in path.parts and not path.match("annotations/*/.*.partial-*")
    }


def main_ranks(run: Run) -> dict[str, int]:
    """Number of a member -> process number of its main rank, for those that run."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            text = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "dreamdance.launch.rank" in words and str(run.run_folder / "logs") in words:
            variables = dict(line.partition("=")[::2] for line in text)
            if words[0].endswith("python") and "SLURM_PROCID" in variables:
                found[variables["SLURM_ARRAY_TASK_ID"]] = int(entry.name)
    return found


@pytest.mark.long
def test_an_array_whose_member_is_killed_writes_the_same_files_as_one_job(cluster: Cluster, videos: Path):
    alone = load_recipe(ROOT / "recipes" / "prepare.yaml", [*WORDS, "output=alone/out"])
    prepare(alone, videos / "alone_run")
    run = Run(
        cluster,
        videos,
        ROOT / "recipes" / "prepare.yaml",
        "shared",
        *WORDS,
        *RESOURCES,
        "output=out",
        "cluster.array=2",
    )
    submitted = run.launch()
    assert submitted.returncode == 0, submitted.stderr
    assert "2 jobs of 1 process" in submitted.stdout
    assert run.launch().returncode == 4, "a second launch of the same run is refused"
    job = run.job

    def logs() -> str:
        return "\n".join(job.log_file(run.run_folder, member=member).read_text() for member in job.members)

    done = run.run_folder / "logs" / "done"
    wait_until(lambda: len(list(done.glob("*.txt"))) == 2, "a part by each member")
    os.kill(main_ranks(run)["1"], signal.SIGKILL)
    num_done = len(read_done(run.run_folder))
    assert num_done < NUM_VIDEOS, "killed in the middle"
    followed = run.launch("--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr + logs()
    # The killed member goes back into the queue, finds that all is done, and succeeds, too.
    wait_until(lambda: {cluster.show(member)["JobState"] for member in job.members} == {"COMPLETED"}, f"ends\n{logs()}")
    assert [cluster.show(member)["Restarts"] for member in job.members] == ["0", "1"]
    assert "back into the queue: it failed" in job.log_file(run.run_folder, member=job.members[1]).read_text()
    assert stored_files(videos / "out") == stored_files(videos / "alone" / "out")
    assert not (videos / "out" / FOLDER_LOCK_FILE).exists()
    assert len(read_done(run.run_folder)) == len(set(read_done(run.run_folder))), "no part was written twice"
    assert "finished" in run.run_verb("status")
    record_fault(
        "a member of an array loses its rank",
        how="SIGKILL to the rank of one of the two jobs that share a `prepare`",
        promised="the other job continues; the output equals that of one job",
        happened="the same files, byte for byte; the killed job went back into the queue and ended with success",
    )
