"""Runs a network that is stored as an ONNX file, by onnxruntime."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.errors import MissingInputError, UserError

# The types of values that a network may take and return; all others hold no pictures.
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxNetwork:
    """A network with one input `(1, 3, height, width)`.

    Attributes:
        height, width: the size of its input.
    """

    def __init__(
        self, path: Path, *, size: tuple[int, int], outputs: int, device: str = "cpu", num_threads: int | None = None
    ) -> None:
        """Opens the file and checks its form.

        Args:
            path: the file.
            size: height and width of the input, which the file must accept.
            outputs: number of results that the file must have.
            device: `cpu`, `cuda` or `cuda:<number>`. The type of the arithmetic is the file's own.
            num_threads: threads of the arithmetic on a CPU; None lets onnxruntime choose.

        Raises:
            MissingInputError: onnxruntime is not installed, or cannot use the device.
            UserError: the file is no such network.
        """
        runtime = _import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        if num_threads is not None:
            options.intra_op_num_threads = options.inter_op_num_threads = num_threads
        providers = _providers(runtime, device)
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=providers)
        except _errors_of(runtime) as error:
            raise UserError(f"{path} cannot be opened as an ONNX network: {error}") from error
        if self._session.get_providers()[0] != providers[0][0]:
            raise MissingInputError(f"onnxruntime {runtime.__version__} cannot start on device '{device}'")
        self.height, self.width = size
        inputs, results = self._session.get_inputs(), self._session.get_outputs()
        expected = [1, 3, *size]
        shape = inputs[0].shape
        fits = len(shape) == 4 and all(
            not isinstance(length, int) or length == wanted for length, wanted in zip(shape, expected, strict=True)
        )
        if len(inputs) != 1 or inputs[0].type not in _FLOATS or not fits or len(results) != outputs:
            raise UserError(
                f"{path} has {len(inputs)} inputs, the first of shape {shape} and type {inputs[0].type}, and "
                f"{len(results)} results; expected are one input of shape {expected} with floats, and {outputs} results"
            )
        self._path, self._input, self._type = path, inputs[0].name, _FLOATS[inputs[0].type]

    def run(self, picture: NDArray[Any], *, shapes: tuple[tuple[int, ...], ...]) -> list[NDArray[np.float32]]:
        """Applies the network to one picture.

        Args:
            picture: `(height, width, 3)`, in the order of channels and the range that the network expects.
            shapes: the shapes that the results must have.

        Raises:
            UserError: a result has another shape, or is not finite.
        """
        batch = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], dtype=self._type)
        results = [np.asarray(result) for result in self._session.run(None, {self._input: batch})]
        for index, (result, shape) in enumerate(zip(results, shapes, strict=True)):
            if result.shape != shape or not np.isfinite(result).all():
                raise UserError(
                    f"{self._path}: result {index} has shape {result.shape}; expected are finite values of {shape}"
                )
        return [result.astype(np.float32) for result in results]


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingInputError(
            f"annotators whose networks are ONNX files need onnxruntime ({error}): pip install 'dreamdance[annotate]'; "
            "for GPUs, install onnxruntime-gpu in its place"
        ) from error
    return onnxruntime


def _errors_of(runtime: Any) -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions, which have no common class of their own."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NotImplemented")
    return tuple(getattr(state, name) for name in (*names, "NoSuchFile", "RuntimeException"))


def _providers(runtime: Any, device: str) -> list[tuple[str, dict[str, int]]]:
    """What runs the network: the device, and the CPU for what the device cannot run."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise UserError(f"device '{device}' of an ONNX network: accepted are 'cpu', 'cuda' and 'cuda:<number>'")
    if kind == "cpu":
        return [("CPUExecutionProvider", {})]
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        raise MissingInputError(
            f"device '{device}': this onnxruntime {runtime.__version__} has no CUDA; install onnxruntime-gpu instead"
        )
    return [("CUDAExecutionProvider", {"device_id": int(number or 0)}), ("CPUExecutionProvider", {})]
