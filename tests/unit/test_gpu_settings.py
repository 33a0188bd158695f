"""Settings for GPUs, tested without one: torch's functions are replaced to report a GPU and record their arguments."""

import pytest
import torch
from torch import distributed as dist

from dreamdance.launch import job
from dreamdance.recipe import Recipe
from dreamdance.runtime.process_group import process_group, repeatable_arithmetic
from dreamdance.runtime.ranks import Ranks


@pytest.fixture
def opened(monkeypatch):
    """The arguments with which a process group would be opened."""
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **arguments: calls.append((backend, arguments)))
    return calls


def test_nccl_connects_at_once_on_the_gpu_of_the_local_rank(opened, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with process_group(Ranks(local_rank=5), timeout_seconds=60):
        ((backend, arguments),) = opened
    assert backend == "nccl"
    assert arguments["device_id"] == torch.device("cuda", 5)
    assert chosen == [5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without a GPU")
def test_gloo_is_bound_to_no_device(opened):
    with process_group(Ranks(), timeout_seconds=60):
        ((backend, arguments),) = opened
    assert backend == "gloo"
    assert arguments["device_id"] is None


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_measures_its_convolutions_unless_bits_must_repeat(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with repeatable_arithmetic(enabled=True):
        assert torch.backends.cudnn.benchmark is False
    assert torch.backends.cudnn.benchmark is before
    with repeatable_arithmetic(enabled=False):
        assert torch.backends.cudnn.benchmark is True
    assert torch.backends.cudnn.benchmark is before


@pytest.fixture
def restored_tf32():
    """Both switches are restored."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.usefixtures("restored_tf32")
def test_float32_is_exact_on_gpus_unless_the_recipe_asks_for_tf32():
    assert Recipe(task="any", name="any").tf32 is False
    for tf32 in (True, False):
        job._set_float32_products(tf32=tf32)
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
