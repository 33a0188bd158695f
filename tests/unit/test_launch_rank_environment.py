"""What a rank of a Slurm job is told about itself and the others, given what Slurm's `srun` sets."""

import os
from pathlib import Path

import pytest

from dreamdance.launch.job import PORTS, job_hosts, set_environment
from dreamdance.ranks import START, Ranks
from dreamdance.recipe import Recipe, load_recipe

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "prepare.yaml"
# The sixth of 8 processes, 4 on each of two nodes.
GIVEN = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "1234",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07,12]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# As a user's shell, or a job that submitted this one, may have left them.
STALE = dict.fromkeys((*TOLD, START), "stale") | {"MASTER_PORT": "1"}


@pytest.fixture
def as_on_slurm(monkeypatch):
    """Sets what `srun` sets; all that `set_environment` sets beside is taken back afterwards."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTHONFAULTHANDLER"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name, value in (GIVEN | STALE).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def recipe(gpus_per_node: int) -> Recipe:
    words = ["cluster.nodes=2", "cluster.tasks_per_node=4", f"cluster.gpus_per_node={gpus_per_node}"]
    return load_recipe(DEMO, words)


def test_a_rank_knows_its_place_and_the_first_nodes_name(as_on_slurm):
    assert set_environment(recipe(0)) == "1234"
    told = {name: os.environ[name] for name in TOLD}
    port = told.pop("MASTER_PORT")
    assert told == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
    }
    assert int(port) in PORTS
    assert job_hosts() == ["gpu07", "gpu12"]

    as_on_slurm.setenv("SLURM_PROCID", "0")
    as_on_slurm.setenv("SLURM_NODEID", "0")
    set_environment(recipe(0))
    assert os.environ["MASTER_PORT"] == port, "all ranks agree on it"
    assert (start := Ranks.from_environment().start) == "slurm 1234 restart 0"
    as_on_slurm.setenv("SLURM_RESTART_COUNT", "1")
    set_environment(recipe(0))
    assert os.environ["MASTER_PORT"] != port, "what an earlier start may still hold is not asked for again"
    assert Ranks.from_environment().start not in (start, "stale"), "nor are its ranks taken for this start's"


def test_every_rank_sees_all_gpus_that_slurm_gave_its_node_and_takes_the_one_of_its_local_rank(as_on_slurm):
    """torch and DeepSpeed count from LOCAL_RANK among what is visible: with one GPU visible, rank 1 would have none."""
    as_on_slurm.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    set_environment(recipe(4))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert os.environ["LOCAL_RANK"] == "1"


def test_a_rank_of_a_recipe_that_wants_no_gpu_sees_none_though_its_node_has_some(as_on_slurm):
    as_on_slurm.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    set_environment(recipe(0))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_tasks_of_an_array_have_ports_of_their_own(as_on_slurm):
    """Two of them may share a node; Slurm calls the last task by the array's own id."""
    ids, ports = [], []
    as_on_slurm.setenv("SLURM_ARRAY_JOB_ID", "1234")
    for task, job_id in (("0", "1235"), ("1", "1234")):
        as_on_slurm.setenv("SLURM_ARRAY_TASK_ID", task)
        as_on_slurm.setenv("SLURM_JOB_ID", job_id)
        ids.append(set_environment(recipe(0)))
        ports.append(os.environ["MASTER_PORT"])
    assert ids == ["1234_0", "1234_1"]
    assert len(set(ports)) == 2
