"""The digests that ranks and starts compare show every difference; for real ranks see test_differing_ranks."""

from pathlib import Path

import torch

import dreamdance
from dreamdance.training.same_start import code_digest, weights_digests


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
    assert code_digest() == before, "the place of the code does not matter"
    with (copied / "training" / "trainer.py").open("a") as file:
        file.write("# one line more\n")
    assert code_digest() != before
