"""The Frechet distance against closed forms and against the matrix square root of scipy."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from dreamdance.evaluation.frechet import frechet_distance


def whitened(seed: int, num_samples: int, width: int) -> np.ndarray:
    """Samples whose mean is zero and whose unbiased covariance is the identity, to rounding."""
    drawn = np.random.default_rng(seed).normal(size=(num_samples, width))
    drawn -= drawn.mean(axis=0)
    return np.linalg.qr(drawn)[0] * np.sqrt(num_samples - 1)


def by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    means, covariances = zip(*((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (first, second)), strict=True)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize("num_samples", [40, 9])
def test_known_gaussians_have_the_distance_of_the_closed_form(num_samples):
    """Diagonal covariances: the sum of squared differences of means and of standard deviations."""
    deviations, means = (np.array([[1.0, 2.0, 0.5], [3.0, 0.25, 0.5]]), np.array([[0.0, 1.0, -2.0], [1.0, 1.0, 2.0]]))
    first, second = (
        whitened(seed, num_samples, 3) * deviation + mean
        for seed, deviation, mean in zip((0, 1), deviations, means, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num_first", "num_second"), [(60, 50), (60, 12), (12, 60)])
def test_it_is_that_of_scipys_matrix_root_with_more_and_with_fewer_samples_than_features(num_first, num_second):
    generator = np.random.default_rng(2)
    mixing = generator.normal(size=(20, 20))
    first, second = generator.normal(size=(num_first, 20)) @ mixing, generator.normal(size=(num_second, 20)) + 0.3
    # the root of a singular matrix is exact to half the digits only
    tolerance = 1e-10 if min(num_first, num_second) > 20 else 1e-5
    assert frechet_distance(first, second) == pytest.approx(by_scipy(first, second), rel=tolerance)


def test_equal_sets_have_no_distance_and_a_shift_has_its_square():
    features = np.random.default_rng(3).normal(size=(7, 400))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(features, features + 0.1) == pytest.approx(400 * 0.01, rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (4,)])
def test_sets_without_a_covariance_or_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match="features must be n d and m d"):
        frechet_distance(np.zeros((3, 4)), np.zeros(shape))
