"""The environment of a rank of a Slurm job, given the variables of `srun`."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from dreamdance.launch.job import PORTS, default_environment, job_hosts, private_folder, set_environment
from dreamdance.recipe import Recipe, load_recipe
from dreamdance.runtime.ranks import START, Ranks

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
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Variables that may come from a user's shell, or from a job that submitted this one.
STALE = dict.fromkeys((*VARIABLES, START), "stale") | {"MASTER_PORT": "1"}


@pytest.fixture
def as_on_slurm(monkeypatch, own_environment):
    """Sets the variables of `srun`; variables that `set_environment` sets are removed afterwards."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "PYTHONFAULTHANDLER"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name, value in (GIVEN | STALE).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def recipe(gpus_per_node: int) -> Recipe:
    words = ["cluster.nodes=2", "cluster.tasks_per_node=4", f"cluster.gpus_per_node={gpus_per_node}"]
    return load_recipe(DEMO, words)


def test_a_rank_knows_its_number_and_the_first_nodes_name(as_on_slurm):
    assert set_environment(recipe(0)) == "1234"
    found = {name: os.environ[name] for name in VARIABLES}
    port = found.pop("MASTER_PORT")
    assert found == {
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
    assert os.environ["MASTER_PORT"] != port, "a port that an earlier start may still use is not chosen again"
    assert Ranks.from_environment().start not in (start, "stale"), "its ranks do not count as those of this start"


def test_every_rank_sees_all_gpus_that_slurm_gave_its_node_and_takes_the_one_of_its_local_rank(as_on_slurm):
    """torch and DeepSpeed count from LOCAL_RANK among what is visible: with one GPU visible, rank 1 would have none."""
    as_on_slurm.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    set_environment(recipe(4))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert os.environ["LOCAL_RANK"] == "1"


def test_a_rank_of_a_recipe_without_gpus_sees_none_though_its_node_has_some(as_on_slurm):
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


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    """The node's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("temporary_folder")
def test_nccl_errors_and_allocator_keep_torchs_defaults_except_settings_that_help_to_find_a_hang(tmp_path, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    found = default_environment(recipe(4), local_rank=1, logs=tmp_path / "logs")
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in found, "1 enables the abort that can hang"
    assert found["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert found["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/logs/nccl_trace_rank_"
    assert found["PYTORCH_ALLOC_CONF"] == found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.usefixtures("temporary_folder")
def test_the_recipes_environment_overrides_the_defaults_also_by_the_allocators_old_name(as_on_slurm):
    given = {
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TRITON_CACHE_DIR": "/x",
    }
    for name in (*given, "PYTORCH_ALLOC_CONF"):
        as_on_slurm.delenv(name, raising=False)
    words = ", ".join(f"{name}: '{value}'" for name, value in given.items())
    set_environment(load_recipe(DEMO, [f"cluster.environment={{{words}}}"]))
    assert {name: os.environ[name] for name in given} == given
    assert "PYTORCH_ALLOC_CONF" not in os.environ, "torch would read it first"


def test_compiled_kernels_lie_on_the_node_apart_for_each_of_its_ranks_and_closed_to_others(temporary_folder):
    caches = [default_environment(recipe(4), local_rank=rank, logs=None) for rank in (0, 1)]
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert len({found[name] for found in caches}) == 2
        assert all(Path(found[name]).is_relative_to(temporary_folder) for found in caches)
    assert caches[0] == default_environment(recipe(4), local_rank=0, logs=None), (
        "the next start uses the compiled kernels again"
    )
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700


def test_a_folder_that_other_users_own_or_can_write_is_not_used_for_code(temporary_folder):
    usual = private_folder()
    usual.chmod(0o777)
    other = private_folder()
    assert other != usual
    assert stat.S_IMODE(other.stat().st_mode) == 0o700
    usual.rmdir()
    usual.symlink_to(other)
    assert private_folder() not in (usual, other)
