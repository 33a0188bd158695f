"""One network in TensorFlow Lite's format, run by ai-edge-litert (the extra `annotate`)."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.picture_regions import Region, crop_region
from dreamdance.errors import MissingInputError


class TfliteNetwork:
    """A network that sees one square picture.

    Attributes:
        size: width and height of its input in pixels.
    """

    def __init__(self, path: Path, *, num_threads: int = 1) -> None:
        """Loads a `.tflite` file.

        Args:
            path: the file.
            num_threads: number of processor threads that it uses.

        Raises:
            MissingInputError: ai-edge-litert is not installed.
        """
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise MissingInputError(
                f"{path.name} needs the package ai-edge-litert ({error}); install the extra: "
                "pip install 'dreamdance[annotate]', or run bash tools/networks.sh"
            ) from error
        self._interpreter = Interpreter(str(path), num_threads=num_threads)
        self._interpreter.allocate_tensors()
        (entry,) = self._interpreter.get_input_details()
        self._input = entry["index"]
        self._outputs = [output["index"] for output in self._interpreter.get_output_details()]
        self.size = int(entry["shape"][1])

    def run(self, picture: NDArray[np.uint8], region: Region, *, lowest: float) -> list[NDArray[np.float32]]:
        """Runs the network on a region of a picture.

        Args:
            picture: `(H, W, 3)`, red, green, blue.
            region: the square that the network sees; pixels beyond the picture are black.
            lowest: the value of black in the network's input, 0 or -1; white is 1.

        Returns:
            The outputs in the order of the file, without the axis of the batch.
        """
        square = crop_region(picture, region, size=self.size).astype(np.float32)
        self._interpreter.set_tensor(self._input, (square * ((1.0 - lowest) / 255.0) + np.float32(lowest))[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(output)[0] for output in self._outputs]


def sigmoid(values: NDArray[Any]) -> NDArray[np.float64]:
    """The logistic function, without overflow."""
    return 1.0 / (1.0 + np.exp(-np.clip(np.asarray(values, dtype=np.float64), -80.0, 80.0)))
