"""ONNX files in the form of DWPose's and DAViD's networks, whose results are simple functions of the picture.

A wrong order of channels, normalisation, padding or scale of the input changes these results.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.networks import REQUIRED

OPSET, IR_VERSION = 17, 9
SIDE = 512
STRIDES = (8, 16, 32)
MEAN, DEVIATION = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def require_onnx() -> None:
    """Skips the test if a package is missing that makes or runs ONNX files; if networks are required, it fails."""
    try:
        import onnx
        import onnxruntime

        assert onnx.__version__, onnxruntime.__version__
    except ImportError as error:
        reason = f"{error}: pip install 'dreamdance[annotate,dev]'"
        if os.environ.get(REQUIRED):
            pytest.fail(reason)
        pytest.skip(reason)


class Graph:
    """Builds a graph node by node; each method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: Any, kind: type = np.float32) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=kind), name))
        return name

    def __call__(self, operation: str, *inputs: Any, **attributes: Any) -> str:
        from onnx import helper

        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, names, [name], **attributes))
        return name

    def channel(self, picture: str, index: int) -> str:
        return self("Gather", picture, self.constant([index], np.int64), axis=1)

    def save(self, path: Path, input_shape: tuple[int, ...], outputs: dict[str, tuple[int, ...]]) -> Path:
        import onnx
        from onnx import TensorProto, helper

        kind = TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("input", kind, input_shape)],
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def save_david(path: Path, tasks: tuple[str, ...], *, near_is_large: bool) -> Path:
    """DAViD for pictures that hold the truth: red and green are x and y of the normal, blue is the disparity.

    The input is blue, green, red in [0,1]. Normals have x right, y up, z towards the camera and no unit length; the
    foreground is where there is any blue.
    """
    graph, outputs = Graph(), dict[str, tuple[int, ...]]()
    blue, green, red = (graph.channel("input", index) for index in range(3))
    if "depth" in tasks:
        factor, shift = (3.0, 1.0) if near_is_large else (-3.0, 5.0)
        depth = graph("Add", graph("Mul", blue, factor), shift)
        outputs[graph("Squeeze", depth, graph.constant([1], np.int64))] = (1, SIDE, SIDE)
    if "normal" in tasks:
        x, y = (graph("Sub", graph("Mul", channel, 2.0), 1.0) for channel in (red, green))
        rest = graph("Sub", 1.0, graph("Add", graph("Mul", x, x), graph("Mul", y, y)))
        z = graph("Sqrt", graph("Relu", rest))
        outputs[graph("Mul", graph("Concat", x, y, z, axis=1), 3.0)] = (1, 3, SIDE, SIDE)
    if "foreground" in tasks:
        outputs[graph("Mul", graph("Sub", blue, 0.1), 5.0)] = (1, 1, SIDE, SIDE)
    return graph.save(path, (1, 3, SIDE, SIDE), outputs)


def save_detector(path: Path, colours: list[tuple[int, int, int]]) -> Path:
    """YOLOX for people who are rectangles of known colours `(red, green, blue)`, on 640 x 640 blue, green, red.

    For each it has a box of score .9, one of score .8 beside it, one of score .2, and one of another class.
    """
    graph, total = Graph(), None
    cells = [(640 // stride) ** 2 for stride in STRIDES]
    for number, colour in enumerate(colours):
        difference = graph("Abs", graph("Sub", "input", np.reshape(colour[::-1], (1, 3, 1, 1))))
        distance = graph("ReduceSum", difference, graph.constant([1], np.int64), keepdims=1)
        inside = graph("Cast", graph("Less", distance, 30.0), to=1)
        present = graph("Reshape", graph("ReduceMax", inside, keepdims=0), graph.constant([1, 1], np.int64))
        (left, right), (top, bottom) = (_extent(graph, inside, axis) for axis in (2, 3))
        for grid, shift, objectness, category in ((0, 0, 0.9, 0), (1, 3, 0.8, 0), (2, 0, 0.2, 0), (0, 0, 0.99, 5)):
            stride, cell = STRIDES[grid], 7 + 5 * number + 100 * category
            down, across = divmod(cell, 640 // stride)
            centre_x = graph("Add", graph("Mul", graph("Add", left, right), 0.5), float(shift))
            centre_y = graph("Mul", graph("Add", top, bottom), 0.5)
            places = [
                graph("Sub", graph("Div", centre_x, float(stride)), float(across)),
                graph("Sub", graph("Div", centre_y, float(stride)), float(down)),
                *(
                    graph("Log", graph("Div", graph("Max", graph("Sub", end, begin), 1.0), float(stride)))
                    for begin, end in ((left, right), (top, bottom))
                ),
            ]
            row = graph("Concat", *places, graph("Mul", present, objectness), np.eye(80)[[category]], axis=1)
            anchor = np.eye(1, sum(cells), sum(cells[:grid]) + cell).T
            part = graph("MatMul", anchor, row)
            total = part if total is None else graph("Add", total, part)
    assert total is not None
    result = graph("Unsqueeze", total, graph.constant([0], np.int64))
    return graph.save(path, (1, 3, 640, 640), {result: (1, sum(cells), 85)})


def _extent(graph: Graph, inside: str, axis: int) -> tuple[str, str]:
    """First column and the one behind the last (with axis 2; rows with axis 3) of a mask `1 1 640 640`, each `1 1`."""
    line = graph("ReduceMax", inside, axes=[axis], keepdims=0)
    ends = graph("ReduceMax", graph("Mul", line, np.arange(1, 641).reshape(1, 1, -1)), axes=[2], keepdims=0)
    begins = graph("ReduceMax", graph("Mul", line, np.arange(640, 0, -1).reshape(1, 1, -1)), axes=[2], keepdims=0)
    return graph("Sub", 640.0, begins), ends


def save_pose_network(path: Path, colours: NDArray[np.float64]) -> Path:
    """DWPose's pose network for points that are dots of known colours `(133, 3)` red, green, blue.

    The input is normalised as ImageNet's, red, green, blue. The distribution of point k over the columns is, for each
    column, how close a pixel comes to colour k: 1 for the colour itself.
    """
    graph = Graph()
    scale, shift = DEVIATION.reshape(1, 3, 1, 1), MEAN.reshape(1, 3, 1, 1)
    picture = graph("Add", graph("Mul", "input", scale), shift)
    weights = (2 * colours).reshape(*colours.shape, 1, 1)
    products = graph("Conv", picture, weights, -(colours**2).sum(axis=1))
    squares = graph("ReduceSum", graph("Mul", picture, picture), graph.constant([1], np.int64), keepdims=1)
    closeness = graph("Sub", products, squares)
    outputs: dict[str, tuple[int, ...]] = {}
    for axis, length in ((2, 288), (3, 384)):
        best = graph("ReduceMax", closeness, axes=[axis], keepdims=0)
        line = graph("Exp", graph("Div", best, 700.0))
        twice = graph("Concat", *[graph("Unsqueeze", line, graph.constant([3], np.int64))] * 2, axis=3)
        bins = graph("Reshape", twice, graph.constant([1, len(colours), 2 * length], np.int64))
        outputs[bins] = (1, len(colours), 2 * length)
    return graph.save(path, (1, 3, 384, 288), outputs)
