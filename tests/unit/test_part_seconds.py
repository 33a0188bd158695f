"""Seconds per frame of each part of the pipelines: parts add up to the whole, on the machine that computed them."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dreamdance.inference.part_seconds import PARTS, REST, PartSeconds, describe_parts, machine_name


class Sleeper(nn.Module):
    """A network whose pass takes a known time, or fails."""

    def __init__(self, seconds, *, parts=()):
        super().__init__()
        self.seconds = seconds
        for name in parts:
            self.add_module(name, Sleeper(seconds))

    def forward(self, fails=False):
        time.sleep(self.seconds)
        if fails:
            raise RuntimeError("no memory")


@pytest.fixture
def stages():
    geometry = SimpleNamespace(
        components={
            "image_encoder": Sleeper(0.01),
            "vae": Sleeper(0.02, parts=("encoder", "decoder")),
            "pose_encoder": Sleeper(0.0),
            "reference_unet": Sleeper(0.03),
            "unet": Sleeper(0.04),
            "scheduler": object(),
        }
    )
    animation = SimpleNamespace(
        device=torch.device("cpu"),
        components={name: Sleeper(0.01) for name in ("image_encoder", "vae", "controller", "controlnet", "unet")},
    )
    return SimpleNamespace(geometry=geometry, animation=animation)


def test_each_pass_counts_for_its_part_and_the_remaining_time_for_the_rest(stages):
    parts, networks = PartSeconds(stages), stages.geometry.components
    with parts.of_stage("geometry"):
        for network in (networks["image_encoder"], networks["vae"].encoder, networks["reference_unet"]):
            network()
        for _ in range(3):
            networks["unet"]()
        networks["vae"].decoder()
        time.sleep(0.05)
    found = parts.take()
    assert set(found) == {"geometry"}
    seconds = found["geometry"]
    assert list(seconds) == [*PARTS["geometry"], REST["geometry"]]
    least = {"encoding": 0.03, "reference network": 0.03, "denoising": 0.12, "decoding": 0.02, REST["geometry"]: 0.05}
    for part, at_least in least.items():
        assert seconds[part] >= at_least - 0.001, part
    assert seconds["pose encoder"] == 0
    assert parts.take() == {}


def test_a_pass_that_failed_does_not_count_for_the_next_clip(stages):
    parts, networks = PartSeconds(stages), stages.animation.components
    with pytest.raises(RuntimeError), parts.of_stage("animation"):
        networks["controlnet"](fails=True)
    parts.take()
    with parts.of_stage("animation"):
        networks["controlnet"]()
    assert 0.01 <= parts.take()["animation"]["ControlNet"] < 1


def test_the_description_divides_by_the_frames_of_each_machine(tmp_path):
    def write(name, machine, num_frames, denoising):
        parts = {"geometry": {"reference network": 1.0, "denoising": denoising}}
        (tmp_path / name).mkdir()
        content = {"machine": machine, "num_frames": num_frames, "part_seconds": parts}
        (tmp_path / name / "result.json").write_text(json.dumps(content))

    write("a", "node1, NVIDIA H200", 10, 10.0)
    write("b", "node1, NVIDIA H200", 30, 50.0)
    write("c", "node2, NVIDIA H100", 10, 9.0)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text('{"num_frames": 5}')  # of a commit that did not measure parts
    first, second = describe_parts(tmp_path, ["a", "b", "c", "old", "absent"])
    assert first == (
        "geometry guidance (stage 1): 1.55 s per frame (reference network 0.05, denoising 1.5), 40 frames on "
        "node1, NVIDIA H200"
    )
    assert second.endswith("1 s per frame (reference network 0.1, denoising 0.9), 10 frames on node2, NVIDIA H100")


def test_the_machine_s_name_has_the_processor_without_a_gpu():
    assert f"{torch.get_num_threads()} threads" in machine_name(torch.device("cpu"))
