"""One real Slurm cluster for all tests of this folder; without one, the tests are skipped with the reason."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.slurm_jobs import Cluster

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter")
REQUIRED = "DREAMDANCE_SLURM_REQUIRED"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder: they start processes, so they run with the distributed tests, one at a time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for name in ("slurm", "distributed", "slow"):
                item.add_marker(name)


def unavailable() -> str | None:
    """The reason why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} missing (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting nodes of a Slurm cluster needs root"


def start_or_skip(cluster: Cluster) -> None:
    """Starts a cluster, or skips the test; where Slurm is required, the test fails instead."""
    reason = unavailable()
    if reason is None:
        done = cluster.control("start", cluster.nodes, check=False)
        reason = done.stdout if done.returncode else None
    if reason is not None:
        cluster.control("stop", check=False)
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of four nodes with four processors each."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    start_or_skip(cluster)
    yield cluster
    cluster.stop()


@pytest.fixture
def small_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of one node for one test, which may destroy it."""
    cluster = Cluster(tmp_path / "slurm", nodes=1)
    start_or_skip(cluster)
    yield cluster
    cluster.stop()
