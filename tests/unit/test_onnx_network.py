"""Opening of ONNX files: what is no such network, and what this machine cannot run, is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
from support.onnx_graphs import Graph, require_onnx

from dreamdance.annotators.onnx_network import OnnxNetwork
from dreamdance.errors import MissingInputError, UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A network that halves its input."""
    require_onnx()
    graph = Graph()
    return graph.save(tmp_path / "half.onnx", (1, 3, 4, 6), {graph("Mul", "input", 0.5): (1, 3, 4, 6)})


def test_a_picture_goes_in_by_channels(path):
    network = OnnxNetwork(path, size=(4, 6), outputs=1, num_threads=1)
    picture = np.random.default_rng(0).random((4, 6, 3))
    (result,) = network.run(picture, shapes=((1, 3, 4, 6),))
    np.testing.assert_allclose(result[0], picture.transpose(2, 0, 1) / 2, rtol=1e-6)
    assert result.dtype == np.float32


def test_results_of_another_shape_or_without_a_value_are_refused(path):
    network = OnnxNetwork(path, size=(4, 6), outputs=1, num_threads=1)
    with pytest.raises(UserError, match=r"half.onnx: result 0"):
        network.run(np.zeros((4, 6, 3)), shapes=((1, 1, 4, 6),))
    with pytest.raises(UserError, match="finite"):
        network.run(np.full((4, 6, 3), np.nan), shapes=((1, 3, 4, 6),))


def test_a_file_that_is_no_network_or_another_one_is_refused_by_name(path, tmp_path):
    with pytest.raises(UserError, match=r"half.onnx has 1 inputs.*\[1, 3, 4, 6\].*expected.*\[1, 3, 8, 6\]"):
        OnnxNetwork(path, size=(8, 6), outputs=1)
    with pytest.raises(UserError, match=r"1 results; expected .* 2 results"):
        OnnxNetwork(path, size=(4, 6), outputs=2)
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(UserError, match=r"junk.onnx cannot be opened"):
        OnnxNetwork(junk, size=(4, 6), outputs=1)
    junk.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"junk.onnx cannot be opened"):
        OnnxNetwork(junk, size=(4, 6), outputs=1)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", ""])
def test_an_unknown_device_is_refused_with_those_that_are_accepted(path, device):
    with pytest.raises(UserError, match="accepted are 'cpu', 'cuda' and 'cuda:<number>'"):
        OnnxNetwork(path, size=(4, 6), outputs=1, device=device)


def test_a_gpu_that_onnxruntime_cannot_use_is_an_error_and_no_slow_cpu(path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime can use a GPU")
    with pytest.raises(MissingInputError, match="install onnxruntime-gpu"):
        OnnxNetwork(path, size=(4, 6), outputs=1, device="cuda")


def test_without_onnxruntime_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingInputError, match=r"dreamdance\[annotate\]"):
        OnnxNetwork(path, size=(4, 6), outputs=1)
