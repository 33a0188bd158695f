"""Square regions of a picture that a network sees: how pixels get into the square, and points back to the picture.

Coordinates are in pixels, from the left and upper edge of the picture (the centre of the first pixel is 0.5, 0.5).
"""

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Centre x, centre y, side and rotation in radians of a square. A positive rotation turns its upper side to the right.
Region = tuple[float, float, float, float]


def whole_picture(width: int, height: int) -> Region:
    """The smallest upright square around a picture."""
    return width / 2, height / 2, float(max(width, height)), 0.0


def region_along(start: NDArray[np.floating[Any]], end: NDArray[np.floating[Any]]) -> float:
    """The rotation of a square whose upper side lies in the direction from `start` to `end`, in (-pi, pi]."""
    across, down = (float(part) for part in end - start)
    return math.atan2(across, -down)


def crop_region(picture: NDArray[Any], region: Region, *, size: int, outside: float = 0.0) -> NDArray[Any]:
    """Samples a region bilinearly.

    Args:
        picture: `(H, W)` or `(H, W, c)`, uint8 or float32.
        region: the square.
        size: width and height of the result in pixels.
        outside: the value of pixels beyond the picture.

    Returns:
        `(size, size)` or `(size, size, c)`, of the picture's type.
    """
    centre_x, centre_y, side, rotation = region
    scale = side / size
    along, across = scale * math.cos(rotation), scale * math.sin(rotation)
    # OpenCV's coordinates are 0 at the centre of the first pixel.
    middle = size / 2 - 0.5
    matrix = np.array(
        [
            [along, -across, centre_x - 0.5 - (along - across) * middle],
            [across, along, centre_y - 0.5 - (across + along) * middle],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        picture, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=(outside,) * 4
    )


def paste_region(
    square: NDArray[np.float32], region: Region, *, width: int, height: int, outside: float
) -> NDArray[np.float32]:
    """Samples the values of a square `(size, size)` at the pixels of the picture: `(height, width)` float32."""
    size = len(square)
    centre_x, centre_y, side, rotation = region
    scale = size / side
    along, across = scale * math.cos(rotation), scale * math.sin(rotation)
    x, y = 0.5 - centre_x, 0.5 - centre_y
    middle = size / 2 - 0.5
    matrix = np.array(
        [[along, across, middle + along * x + across * y], [-across, along, middle - across * x + along * y]]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pasted = cv2.warpAffine(
        square, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=outside
    )
    return np.asarray(pasted, dtype=np.float32)


def to_picture(points: NDArray[np.floating[Any]], region: Region, *, size: int) -> NDArray[np.float64]:
    """Maps points `(..., 2)` of a square of `size` pixels to the picture."""
    centre_x, centre_y, side, rotation = region
    from_middle = (np.asarray(points, dtype=np.float64) - size / 2) * (side / size)
    cosine, sine = math.cos(rotation), math.sin(rotation)
    turned = from_middle @ np.array([[cosine, sine], [-sine, cosine]])
    return np.asarray(turned + np.array([centre_x, centre_y]), dtype=np.float64)
