#!/usr/bin/env python
"""Measures how clearly normals and depth tell a wrong sign of an axis: the table of dreamdance/annotators/README.md.

python tools/measure_axes.py [NUMBER OF DANCERS]

Each row degrades the true normals and depth of rendered dancers. The angle is that between the normals and the normals
of the depth, in degrees, over the dancers: the least and the greatest. `best wrong` is the least angle with any other
signs of the axes. With the random depth no signs are right, and the least angle is given.
"""

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dreamdance.annotators.axes import geometry_consistency
from dreamdance.annotators.protocols import Depths
from dreamdance.dancers.render import HELD_OUT_SEEDS, DancerClip, render_clip

WIDTH, HEIGHT, NUM_FRAMES = 256, 384, 2
AS_THEY_ARE = (1, 1, 1)
_Floats = NDArray[np.floating[Any]]


def blurred(frames: _Floats, sigma: float) -> _Floats:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])


def at_a_quarter(frames: _Floats) -> _Floats:
    small = [cv2.resize(frame, (WIDTH // 4, HEIGHT // 4)) for frame in frames]
    return np.stack([cv2.resize(frame, (WIDTH, HEIGHT)) for frame in small])


def coarse(clip: DancerClip, generator: np.random.Generator) -> tuple[_Floats, Depths]:
    return blurred(clip.normal, 6), Depths(at_a_quarter(1 / clip.depth).astype(np.float32), "disparity")


def blurred_depth(clip: DancerClip, generator: np.random.Generator) -> tuple[_Floats, Depths]:
    body = np.where(clip.mask, clip.depth, np.median(clip.depth[clip.mask])).astype(np.float32)
    return clip.normal, Depths(blurred(body, 6).astype(np.float32), "depth")


def noisy_depth(clip: DancerClip, generator: np.random.Generator) -> tuple[_Floats, Depths]:
    noise = generator.normal(scale=0.01, size=clip.depth.shape)
    return clip.normal, Depths((clip.depth + noise).astype(np.float32), "depth")


def random_depth(clip: DancerClip, generator: np.random.Generator) -> tuple[_Floats, Depths]:
    noise = np.asarray(generator.normal(size=clip.depth.shape))
    return clip.normal, Depths(blurred(noise, 24).astype(np.float32), "disparity")


ROWS: dict[str, Callable[[DancerClip, np.random.Generator], tuple[_Floats, Depths]]] = {
    "both true": lambda clip, _: (clip.normal, Depths(clip.depth, "depth")),
    "both at about a quarter of the resolution": coarse,
    "true normals, depth blurred over 6 pixels": blurred_depth,
    "true normals, depth with 1 cm of noise per pixel": noisy_depth,
    "true normals, smooth random depth": random_depth,
}


def main() -> None:
    """Prints the table."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    clips = [render_clip(seed, num_frames=NUM_FRAMES, width=WIDTH, height=HEIGHT) for seed in HELD_OUT_SEEDS[:number]]
    generator = np.random.default_rng(0)
    for name, degrade in ROWS.items():
        given, wrong = [], []
        for clip in clips:
            normals, depths = degrade(clip, generator)
            by_signs = {
                signs: geometry_consistency(normals * np.array(signs), depths, clip.mask)
                for signs in product((1, -1), repeat=3)
            }
            given.append(by_signs.pop(AS_THEY_ARE))
            wrong.append(min(by_signs.values()))
        least = np.min(np.minimum(given, wrong))
        margin = np.min(np.subtract(wrong, given))
        print(
            f"{name}: as they are {min(given):.1f} to {max(given):.1f}, best wrong {min(wrong):.1f} to "
            f"{max(wrong):.1f}, wrong minus given at least {margin:.1f}, least of all {least:.1f}"
        )


if __name__ == "__main__":
    main()
