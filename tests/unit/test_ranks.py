"""The rank of this process; a missing GPU is an error and never replaced by the CPU silently."""

import pytest
import torch

from dreamdance.errors import LostDeviceError, is_transient
from dreamdance.runtime.ranks import START, Ranks


def test_a_process_without_a_launcher_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", START):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    assert Ranks().is_main


def test_a_rank_without_its_gpu_is_an_error_naming_the_host_and_the_visible_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    local_rank = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(LostDeviceError, match=r"CUDA_VISIBLE_DEVICES '0,1'.*cluster\.gpus_per_node=0") as raised:
        Ranks(rank=9, world_size=16, local_rank=local_rank).take_gpu()
    assert "rank 9 on " in str(raised.value)
    assert f"needs GPU {local_rank}, but torch finds {local_rank}" in str(raised.value)
    assert is_transient(raised.value), "another node may have it"


def test_a_rank_makes_the_gpu_of_its_local_rank_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ranks = Ranks(rank=11, world_size=16, local_rank=3)
    ranks.take_gpu()
    assert chosen == [3]
    assert ranks.device == torch.device("cuda", 3)
