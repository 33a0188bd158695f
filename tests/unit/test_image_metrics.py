"""Image metrics against scikit-image, OpenCV and hand-computed values, including the overflow of DisCo's PSNR."""

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dreamdance.evaluation.image_metrics import (
    grain,
    l1,
    l1_disco,
    mean_colour,
    psnr,
    psnr_disco_overflow,
    ssim,
    ssim_disco,
)


def smooth_frames(seed: int, num_frames: int = 3, height: int = 29, width: int = 22) -> np.ndarray:
    """Pictures with structure, `f H W 3` uint8: blurred noise, stretched to the full range."""
    noise = np.random.default_rng(seed).random((num_frames, height, width, 3))
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in noise])
    low, high = blurred.min(), blurred.max()
    return np.round(255 * (blurred - low) / (high - low)).astype(np.uint8)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    return smooth_frames(0), smooth_frames(1)


def as_floats(frames: np.ndarray) -> np.ndarray:
    return (frames / 255.0).astype(np.float32)


def test_psnr_is_that_of_scikit_image(pair):
    prediction, truth = pair
    expected = np.mean([peak_signal_noise_ratio(t, p) for p, t in zip(prediction, truth, strict=True)])
    assert psnr(as_floats(prediction), as_floats(truth)) == pytest.approx(expected, rel=1e-6)


def test_ssim_is_that_of_scikit_image(pair):
    prediction, truth = (as_floats(frames) for frames in pair)
    expected = np.mean(
        [
            structural_similarity(t.astype(np.float64), p.astype(np.float64), channel_axis=2, data_range=1.0)
            for p, t in zip(prediction, truth, strict=True)
        ]
    )
    assert ssim(prediction, truth) == pytest.approx(expected, rel=1e-9)


def test_ssim_in_a_mask_is_the_mean_of_scikit_images_map_there(pair):
    prediction, truth = (as_floats(frames).astype(np.float64) for frames in pair)
    mask = np.zeros(truth.shape[:3], dtype=bool)
    mask[:, 6:20, 5:15] = True
    maps = [
        structural_similarity(t, p, channel_axis=2, data_range=1.0, full=True)[1]
        for p, t in zip(prediction, truth, strict=True)
    ]
    assert ssim(prediction, truth, mask) == pytest.approx(np.stack(maps)[mask].mean(), rel=1e-9)


def test_discos_ssim_is_that_of_its_grey_bytes(pair):
    prediction, truth = pair

    def grey(frame: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(np.ascontiguousarray(frame[..., ::-1]), cv2.COLOR_BGR2GRAY)

    expected = np.mean(
        [structural_similarity(grey(p), grey(t)) for p, t in zip(prediction, truth, strict=True)],
    )
    assert ssim_disco(prediction, truth) == pytest.approx(expected, rel=1e-9)


def test_a_shift_of_one_tenth_measures_one_tenth_and_twenty_decibel():
    truth = np.full((2, 8, 8, 3), 0.5)
    assert l1(truth + 0.1, truth) == pytest.approx(0.1)
    assert psnr(truth + 0.1, truth) == pytest.approx(20.0)


def test_pixels_outside_of_the_mask_do_not_count():
    truth = np.zeros((1, 8, 8, 3))
    prediction = truth.copy()
    prediction[:, :4] = 0.1
    prediction[:, 4:] = 1.0
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[:, :4] = True
    assert l1(prediction, truth, mask) == pytest.approx(0.1)
    assert psnr(prediction, truth, mask) == pytest.approx(20.0)
    assert l1(prediction, truth) == pytest.approx(0.55)


def test_psnr_averages_frames_and_leaves_out_those_without_a_body():
    truth = np.zeros((3, 8, 8, 3))
    prediction = truth.copy()
    prediction[0], prediction[1], prediction[2] = 0.1, 0.01, 1.0
    mask = np.ones((3, 8, 8), dtype=bool)
    mask[2] = False
    assert psnr(prediction, truth, mask) == pytest.approx((20 + 40) / 2)


def test_identical_frames_count_one_hundred_decibel_and_full_similarity(pair):
    frames = as_floats(pair[0])
    assert (l1(frames, frames), psnr(frames, frames)) == (0.0, 100.0)
    assert ssim(frames, frames) == pytest.approx(1.0, rel=1e-12)


def test_an_empty_mask_gives_no_number(pair):
    prediction, truth = (as_floats(frames) for frames in pair)
    empty = np.zeros(truth.shape[:3], dtype=bool)
    assert np.isnan([metric(prediction, truth, empty) for metric in (l1, psnr, ssim)]).all()


def test_discos_psnr_overflows_to_thirty_decibel_on_frames_far_apart(pair):
    """Known defect of that metric: unlike frames give about 28 to 30 dB, half of it from wrapped arithmetic."""
    prediction, truth = pair
    honest = psnr(as_floats(prediction), as_floats(truth))
    assert honest < 16
    assert psnr_disco_overflow(prediction, truth) > honest + 10
    black, grey = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 16, np.uint8)
    assert psnr_disco_overflow(grey, black) == 100.0  # 16 squared is 256, which wraps to 0
    assert psnr(as_floats(grey), as_floats(black)) == pytest.approx(20 * np.log10(255 / 16), rel=1e-6)


def test_discos_l1_shrinks_with_the_resolution():
    small = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 20, np.uint8)
    large = np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 32, 32, 3), 20, np.uint8)
    assert l1_disco(*small) == pytest.approx(20 / 256)
    assert l1_disco(*large) == pytest.approx(l1_disco(*small) / 4)
    assert l1_disco(small[1], small[0]) == l1_disco(*small)


def test_bytes_and_floats_are_not_confused(pair):
    with pytest.raises(ValueError, match="divide bytes by 255"):
        psnr(*pair)
    with pytest.raises(ValueError, match="uint8"):
        psnr_disco_overflow(*(as_floats(frames) for frames in pair))


def test_shapes_that_differ_are_refused(pair):
    prediction, truth = (as_floats(frames) for frames in pair)
    with pytest.raises(ValueError, match="both be f H W c"):
        l1(prediction[:1], truth)
    with pytest.raises(ValueError, match="mask must be f H W"):
        l1(prediction, truth, np.ones((3, 2, 2), dtype=bool))
    with pytest.raises(ValueError, match="at least 7x7"):
        ssim(prediction[:, :5], truth[:, :5])


def test_the_mean_colour_is_that_of_the_body():
    frames = np.zeros((1, 4, 4, 3))
    frames[:, :2] = [0.2, 0.4, 0.6]
    mask = np.zeros((1, 4, 4), dtype=bool)
    mask[:, :2] = True
    np.testing.assert_allclose(mean_colour(frames, mask), [0.2, 0.4, 0.6])
    np.testing.assert_allclose(mean_colour(frames), [0.1, 0.2, 0.3])


def test_grain_is_the_energy_of_scipys_laplacian_relative_to_the_truths(pair):
    prediction, truth = (as_floats(part) for part in pair)
    energies = [
        np.mean(ndimage.laplace(part.astype(np.float64), axes=(1, 2))[:, 1:-1, 1:-1] ** 2)
        for part in (prediction, truth)
    ]
    assert grain(prediction, truth) == pytest.approx(energies[0] / energies[1], rel=1e-9)
    assert grain(truth, truth) == 1.0


def test_grain_grows_by_the_energy_of_noise_and_falls_by_blur():
    generator = np.random.default_rng(3)
    truth = generator.uniform(0.2, 0.8, (2, 200, 200, 3))
    noise = generator.normal(0, 0.05, truth.shape)
    # white noise of variance v has a Laplacian of variance (4 + 16) v, a uniform value that of its width^2 / 12
    assert grain(truth + noise, truth) == pytest.approx(1 + 0.05**2 / (0.6**2 / 12), rel=0.02)
    blurred = np.stack([cv2.blur(frame, (3, 3)) for frame in truth])
    assert grain(blurred, truth) < 0.2


def test_grain_leaves_out_the_body_and_its_rim_and_needs_detail_in_the_truth():
    truth = np.random.default_rng(4).uniform(0.2, 0.8, (2, 20, 20, 3)).astype(np.float32)
    mask = np.zeros(truth.shape[:3], dtype=np.bool_)
    mask[:, 6:12, 6:12] = True
    changed = truth.copy()
    changed[:, 7:11:2, 7:11:2] = 9.0
    assert grain(changed, truth, mask) == 1.0
    assert grain(changed, truth) > 2.0
    assert np.isnan(grain(truth, truth, np.ones_like(mask)))
    flat = np.full_like(truth, 0.5)
    assert np.isnan(grain(truth, flat))
