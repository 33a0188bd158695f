"""What is compared between ranks and between starts sees every difference, and says which."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dreamdance
from dreamdance.errors import UserError
from dreamdance.ranks import Ranks
from dreamdance.training import identity
from dreamdance.training.distributed import process_group
from dreamdance.training.identity import code_digest, require_same, weights_digests


@pytest.fixture
def group() -> Iterator[None]:
    with process_group(Ranks(), timeout_seconds=60):
        yield


def test_the_digests_of_weights_see_every_value_each_on_its_side():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    network[0].requires_grad_(False)
    before = weights_digests(network)
    with torch.no_grad():
        network[1].weight += 1
    trained = weights_digests(network)
    assert trained.frozen == before.frozen
    assert trained.trainable != before.trainable
    with torch.no_grad():
        network[0].bias[1] += 1e-6
    assert weights_digests(network).frozen != before.frozen
    network.to(torch.bfloat16)
    assert weights_digests(network).trainable != trained.trainable, "any type can be hashed"


def test_the_digest_of_the_code_sees_every_source(tmp_path, monkeypatch):
    before = code_digest()
    assert code_digest() == before
    copied = tmp_path / "dreamdance"
    source = Path(dreamdance.__path__[0])
    for path in source.rglob("*.py"):
        target = copied / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.setattr(dreamdance, "__path__", [str(copied)])
    assert code_digest() == before, "where it lies does not matter"
    with (copied / "training" / "trainer.py").open("a") as file:
        file.write("# one line more\n")
    assert code_digest() != before


@pytest.mark.usefixtures("group")
def test_one_process_agrees_with_itself():
    require_same({"code": "a"})


def test_the_rank_that_differs_is_named_with_what_differs(monkeypatch):
    """`gathered` is answered as three ranks would, which the test of distributed runs does for real."""
    ranks = [{"code": "a", "torch": "2"}, {"code": "a", "torch": "2"}, {"code": "b", "torch": "2"}]
    answers = iter([["x", "x", "y"], ranks])
    monkeypatch.setattr(identity, "gathered", lambda value: next(answers))
    with pytest.raises(UserError, match=r"1 of 3 ranks .* code: a on rank 0, b on rank 2\. Give all nodes"):
        require_same(ranks[0])
