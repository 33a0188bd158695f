"""The Frechet distance of two sets of features, as in FID (arXiv 1706.08500), FVD and FID-VID."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# The features of a window by metric: I3D's logits and what the 3D ResNet-50 pools. With fewer windows than features the
# covariance is singular, and the distance says little.
_NUM_FEATURES = {"fvd": 400, "fid_vid": 2048}


def min_windows(metric: str) -> int:
    """The least number of windows for a distance that compares with other tables; 0 for other metrics.

    Args:
        metric: a key of the table, such as `fvd` or `fid_vid_disco`.
    """
    return next((number for name, number in _NUM_FEATURES.items() if metric.startswith(name)), 0)


def frechet_distance(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """Frechet distance of the Gaussians with the means and (unbiased) covariances of two sets.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With centred samples X (rows, divided by the root of n - 1),
    S = X^T X, and the last trace is the sum of the singular values of X1 X2^T: no root of a singular matrix is taken.
    Not scipy's `sqrtm` of S1 S2, which DisCo's code takes: with fewer samples than features, as here nearly always, it
    is exact to half the digits (tests/unit/test_frechet.py).

    Args:
        first, second: `n d` and `m d`, finite; at least two samples each.

    Raises:
        ValueError: the shapes do not fit.
    """
    sets = [np.asarray(features, dtype=np.float64) for features in (first, second)]
    if any(features.ndim != 2 or len(features) < 2 for features in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"features must be n d and m d with n, m >= 2, not {sets[0].shape} and {sets[1].shape}")
    means = [features.mean(axis=0) for features in sets]
    roots = [_root(features - mean) for features, mean in zip(sets, means, strict=True)]
    cross = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    traces = sum(float((root**2).sum()) for root in roots)
    return max(0.0, float(((means[0] - means[1]) ** 2).sum()) + traces - 2 * cross)


def _root(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """A matrix R with R^T R = covariance, with at most as many rows as columns."""
    scaled: NDArray[np.float64] = centred / np.sqrt(len(centred) - 1)
    if len(scaled) <= scaled.shape[1]:
        return scaled
    return np.linalg.qr(scaled).R
