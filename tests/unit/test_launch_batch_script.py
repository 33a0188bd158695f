"""The batch script after its ranks have ended, run by bash with stand-ins for Slurm's programs."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.fault_log import record_fault

from dreamdance.launch.job import record_failure
from dreamdance.launch.requeue import read_failures
from dreamdance.launch.slurm_cluster import batch_script, submit_array
from dreamdance.recipe import Recipe, dump_recipe, load_recipe
from dreamdance.runs.layout import RECIPE_FILE, failures_folder

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
RECIPE = load_recipe(DEMO / "stage2.yaml")
SHARED = load_recipe(DEMO / "prepare.yaml", ["cluster.array=3"])


@dataclass(frozen=True)
class Site:
    """A folder with stand-ins for Slurm's programs, each of which records its arguments in `called`."""

    folder: Path

    def tool(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.folder}/called\n{script}\n')
        path.chmod(0o755)

    def run(self, script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Runs a batch script as Slurm would."""
        (self.folder / "called").unlink(missing_ok=True)
        inherited = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        variables = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "SLURM_JOB_ID": "42",
            **inherited,
            **environment,
        }
        return subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=False)

    def called(self, name: str) -> list[str]:
        lines = (self.folder / "called").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def site(tmp_path):
    (tmp_path / "bin").mkdir()
    site = Site(tmp_path)
    site.tool("srun", "exit 1")
    site.tool("squeue", "echo 'RUNNING             0                   '")
    site.tool("scontrol", "")
    site.tool("sleep", "")
    return site


def make_run(folder: Path, recipe: Recipe = RECIPE) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(dump_recipe(recipe))
    return folder


def test_a_job_whose_ranks_failed_goes_back_into_the_queue(site):
    done = site.run(batch_script(RECIPE, make_run(site.folder / "run")))
    assert done.returncode == 1
    assert site.called("scontrol") == ["scontrol requeue 42"]


def test_a_member_of_an_array_requeues_itself_alone_and_decides_by_its_own_failures(site):
    """A failure that another member's user has to fix does not end this one."""
    run = make_run(site.folder / "run", SHARED)
    script = batch_script(SHARED, run)
    assert "#SBATCH --array=0-2%3" in script
    for number in "012":
        folder = failures_folder(run) / number
        folder.mkdir(parents=True)
        (folder / f"42_{number}_0.json").write_text('{"time": 1, "rank": 0, "user_error": true, "text": "bad"}')
    site.run(script, SLURM_JOB_ID="44", SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID="1")
    assert {call.split()[2] for call in site.called("squeue")} == {"--jobs=42_1"}
    assert site.called("scontrol") == ["scontrol requeue 42_1"]
    assert sorted(path.name for path in failures_folder(run).iterdir()) == ["0", "2"], "only its own are removed"
    assert (run / "logs" / "requeues_1.jsonl").is_file()


def test_a_task_of_an_array_queries_and_requeues_itself_alone(site, monkeypatch):
    runs = [make_run(site.folder / name) for name in ("one", "two")]
    site.tool("sbatch", "echo 'Submitted batch job 42'")
    monkeypatch.setenv("PATH", f"{site.folder}/bin:{os.environ['PATH']}")
    script = submit_array([RECIPE, RECIPE], runs)[0].script.read_text()
    # As in Slurm for the last task.
    site.run(script, SLURM_JOB_ID="42", SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID="1")
    assert {call.split()[2] for call in site.called("squeue")} == {"--jobs=42_1"}
    assert site.called("scontrol") == ["scontrol requeue 42_1"]


def fails_at_first(site: Site, name: str, times: int, answer: str) -> None:
    """A program of Slurm that cannot reach the controller for a while."""
    count = f"[ $(grep -c '^{name} ' {site.folder}/called) -le {times} ]"
    site.tool(name, f"{count} && echo 'Unable to contact slurm controller' >&2 && exit 1\n{answer}")


@pytest.mark.parametrize(("name", "answer"), [("squeue", "echo 'RUNNING 0'"), ("scontrol", "exit 0")])
def test_requests_to_a_controller_that_does_not_answer_are_repeated(site, name, answer):
    fails_at_first(site, name, 4, answer)
    site.run(batch_script(RECIPE, make_run(site.folder / "run")))
    assert site.called("sleep") == ["sleep 5"] * 4
    assert site.called("scontrol")[-1] == "scontrol requeue 42"
    record_fault(
        "Slurm's controller does not answer for a while as a job ends",
        how=f"{name} cannot reach it four times; stand-ins for Slurm's programs",
        promised="asked again every 5 s; the job is requeued",
        happened="the fifth attempt succeeded, and the job was requeued",
    )


@pytest.mark.parametrize("name", ["squeue", "scontrol"])
def test_a_controller_that_never_answers_ends_the_job_with_a_line_in_the_log(site, name):
    site.tool(name, "exit 1")
    done = site.run(batch_script(RECIPE, make_run(site.folder / "run")))
    assert done.returncode == 1
    assert len(site.called(name)) == 12
    assert "did not answer, or refused, for a minute" in done.stderr
    record_fault(
        "Slurm's controller never answers as a job ends",
        how=f"{name} never reaches it; stand-ins for Slurm's programs",
        promised="given up after a minute with a line in the log; the job fails with the code of its ranks",
        happened=done.stderr.strip().splitlines()[-1],
    )


@pytest.mark.parametrize("answer", ["COMPLETING 0", "RUNNING 1", "PENDING 1"])
def test_a_job_that_was_cancelled_or_started_elsewhere_is_left_alone(site, answer):
    site.tool("squeue", f"echo '{answer}'")
    done = site.run(batch_script(RECIPE, make_run(site.folder / "run")))
    assert "scontrol" not in (site.folder / "called").read_text()
    assert "sleep" not in (site.folder / "called").read_text()
    assert done.returncode == 1


def test_a_request_that_succeeded_without_an_answer_is_not_made_twice(site):
    site.tool("scontrol", f"touch {site.folder}/received; exit 1")
    site.tool("squeue", f"[ -e {site.folder}/received ] && echo 'PENDING 1' || echo 'RUNNING 0'")
    site.run(batch_script(RECIPE, make_run(site.folder / "run")))
    assert len(site.called("scontrol")) == 1


def test_a_new_start_ignores_failures_of_an_earlier_one(site):
    """A person fixes what a rank asked for, and requeues the job by hand."""
    run = make_run(site.folder / "a run")
    script = batch_script(RECIPE, run)
    record_failure(run, "42", 1, "shard 3 is damaged", user_error=True)
    site.run(script)
    assert site.called("scontrol") == ["scontrol requeue 42"]
    failure = json.dumps({"time": 1.0, "rank": 0, "user_error": True, "text": "shard 4 is damaged"})
    site.tool(
        "srun", f"mkdir -p '{failures_folder(run)}'; echo '{failure}' > '{failures_folder(run)}/42_0.json'; exit 1"
    )
    site.run(script)
    assert "scontrol" not in (site.folder / "called").read_text(), "the failure of this start counts"


def test_a_new_start_of_an_array_task_removes_the_failures_of_its_own_run_alone(site, monkeypatch):
    runs = [make_run(site.folder / name) for name in ("one", "two")]
    site.tool("sbatch", "echo 'Submitted batch job 42'")
    monkeypatch.setenv("PATH", f"{site.folder}/bin:{os.environ['PATH']}")
    script = submit_array([RECIPE, RECIPE], runs)[0].script.read_text()
    for run in runs:
        record_failure(run, "42", 0, "shard 3 is damaged", user_error=True)
    site.tool("squeue", "echo 'COMPLETING 0'")
    site.run(script, SLURM_JOB_ID="42", SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID="1")
    assert [len(read_failures(run)) for run in runs] == [1, 0]
