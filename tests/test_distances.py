"""Distances against scikit-image, scipy and exact values."""

import math

import numpy as np
import pytest
import scipy.linalg
from skimage import metrics

from cmd_jax.evaluation import intervals
from cmd_jax.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    psnr,
    ssim,
    warn_of_few,
)
from cmd_jax.evaluation.moments import Moments


def pairs():
    """Noise and noise; smooth and noisy; equal but for one pixel; both white. 3 x 24 x 29."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 3, 24, 29, 3))
    y, x = np.mgrid[:24, :29]
    smooth = np.stack([127 + 100 * np.sin((x + y + k) / 5) for k in range(9)], axis=-1)
    smooth = smooth.reshape(24, 29, 3, 3).transpose(2, 0, 1, 3)
    nearly = noise[0].copy()
    nearly[0, 12, 12] = 255 - nearly[0, 12, 12]
    white = np.full_like(nearly, 255)
    a = np.stack([noise[0], smooth, noise[0], white])
    b = np.stack(
        [noise[1], np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255), nearly, white]
    )
    return a.astype(np.uint8), b.astype(np.uint8)


def test_psnr_is_that_of_scikit_image():
    a, b = pairs()
    wanted = [metrics.peak_signal_noise_ratio(x, y) for x, y in zip(a[:3], b[:3])]
    np.testing.assert_allclose(psnr(a[:3], b[:3], mean=False), wanted, rtol=1e-12)
    assert psnr(a[:3], b[:3]) == pytest.approx(np.mean(wanted), rel=1e-12)
    assert psnr(a[3:], b[3:]) == math.inf


def test_ssim_is_that_of_scikit_image():
    a, b = pairs()
    settings = dict(
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=-1,
    )
    wanted = [
        np.mean([metrics.structural_similarity(x, y, **settings) for x, y in zip(p, q)])
        for p, q in zip(a, b)
    ]
    found = ssim(a, b, mean=False)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert found[3] == 1 and wanted[0] < 0.1 < wanted[1] < 0.9 < wanted[2] < 1
    assert ssim(a, b) == pytest.approx(np.mean(wanted), abs=2e-6)


@pytest.mark.usefixtures('unchecked_types')
@pytest.mark.parametrize('distance', [psnr, ssim])
def test_pairs_are_uint8_videos_of_one_shape(distance):
    a, b = pairs()
    with pytest.raises(ValueError, match='equal shape'):
        distance(a, b[:2])
    for wrong in (b / 255, b[0], b[:0], b.astype(np.int32)):
        with pytest.raises(ValueError, match='uint8'):
            distance(wrong, wrong)


def test_ssim_needs_room_for_its_window():
    a, b = pairs()
    with pytest.raises(ValueError, match='11 x 11'):
        ssim(a[:, :, :10], b[:, :, :10])


def gaussian(rng, count, spectrum):
    """Features of a random covariance with these eigenvalues."""
    basis = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))[0]
    return rng.normal(size=(count, len(spectrum))) * np.sqrt(spectrum) @ basis.T


def by_scipy(a, b):
    """The formula as it is written, its root by scipy."""
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    apart = a.mean(axis=0) - b.mean(axis=0)
    return apart @ apart + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.mark.parametrize('condition', [1, 1e3, 1e8], ids='{:g}'.format)
def test_frechet_distance_is_that_of_scipy(condition):
    rng = np.random.default_rng(1)
    spectrum = np.geomspace(1, 1 / condition, 40)
    a, b = gaussian(rng, 300, spectrum), 0.3 + gaussian(rng, 500, spectrum[::-1])
    found = frechet_distance(a, b)
    assert found == pytest.approx(by_scipy(a, b), rel=1e-6)
    assert frechet_distance(a, b) == found  # nothing was changed in place
    assert frechet_distance(b, a) == pytest.approx(found, rel=1e-9)


def test_frechet_distance_of_few_features():
    """Covariances without full rank, where scipy's root fails: in the span of the features, where
    they have it, the distance is the same."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 9, 6))
    embed = np.linalg.qr(rng.normal(size=(64, 6)))[0].T
    assert frechet_distance(a @ embed, b @ embed) == pytest.approx(by_scipy(a, b), rel=1e-9)
    many = rng.normal(size=(30, 64))
    assert abs(frechet_distance(many, many)) < 1e-9


def test_frechet_distance_of_known_gaussians():
    """|m|^2 + sum (s - r)^2 for diagonal covariances."""
    rng = np.random.default_rng(3)
    white = rng.normal(size=(100, 5))
    white = (white - white.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    s, r, m = np.array([1, 2, 3, 4, 5]), np.array([2, 2, 1, 7, 5]), np.array([0, 1, 0, 0, 2])
    assert frechet_distance(white * s, white * r + m) == pytest.approx(5 + 1 + 4 + 9, rel=1e-9)


def test_too_few_features_are_told(log):
    warn_of_few.cache_clear()
    rng = np.random.default_rng(4)
    frechet_distance(*rng.normal(size=(2, 20, 8)))
    assert not log.records
    frechet_distance(*rng.normal(size=(2, 8, 8)))
    assert 'Frechet distance of 8 features of 8 dimensions' in log.text


def test_features_that_are_not_finite_are_an_error():
    x = np.ones((4, 3))
    x[1, 2] = np.nan
    with pytest.raises(ValueError, match='1 features are not finite'):
        Moments.of(x)
    with pytest.raises(ValueError, match='1 features are not finite'):
        frechet_distance(np.ones((4, 3)), x)
    with pytest.raises(ValueError, match='1 features have no covariance'):
        frechet_distance(np.ones((1, 3)), x)


@pytest.mark.parametrize('cuts', [(2,), (50,), (3, 5, 60), (1, 89)], ids=str)
def test_moments_do_not_depend_on_the_pieces(cuts):
    x = 100 + np.random.default_rng(5).normal(size=(90, 7))
    first, *rest = (Moments.of(part) for part in np.split(x, cuts))
    kept = first.scatter.copy()
    merged = first
    for part in rest:
        merged = merged.merge(part)
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(first.scatter, kept)
    other = np.random.default_rng(6).normal(size=(80, 7))
    assert frechet_distance(merged, other) == pytest.approx(frechet_distance(x, other), rel=1e-12)


def test_kernel_distance_is_the_mean_over_pairs():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    wanted = (
        np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
        + np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
        - 2 * np.mean([k(x, y) for x in a for y in b])
    )
    assert kernel_distance(a, b) == pytest.approx(wanted, rel=1e-12)


def test_kernel_distance_has_no_bias():
    """Of equal distributions its mean over many small sets is 0, where the Frechet distance is
    far from it."""
    rng = np.random.default_rng(8)
    sets = rng.normal(size=(400, 2, 10, 4))
    found = np.array([kernel_distance(a, b) for a, b in sets])
    assert abs(found.mean()) < 3 * found.std() / 20
    assert np.mean([frechet_distance(a, b) for a, b in sets[:50]]) > 0.5


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    x = np.random.default_rng(9).normal(3, 2, 400)
    found = intervals.of_mean(x)
    assert found.value == x.mean()
    error = 1.96 * x.std() / 20
    assert found.low == pytest.approx(x.mean() - error, abs=0.25 * error)
    assert found.high == pytest.approx(x.mean() + error, abs=0.25 * error)
    assert intervals.of_mean(np.array([np.inf, 1.0])).value == np.inf


@pytest.mark.parametrize('kind', ['frechet', 'kernel'])
@pytest.mark.parametrize('scale', [1, 1.3], ids=['equal', 'apart'])
@pytest.mark.parametrize('dimensions', [4, 80])
def test_interval_of_a_distance_covers_what_other_sets_give(kind, dimensions, scale):
    """The interval of one pair of sets, as wide as the spread of independent pairs, and about the
    number measured."""
    rng = np.random.default_rng(10)
    distance = {'frechet': frechet_distance, 'kernel': kernel_distance}[kind]

    def draw():
        fake = rng.normal((scale - 1) / 2, scale, size=(60, dimensions))
        return rng.normal(size=(60, dimensions)), fake

    spread = np.std([distance(*draw()) for _ in range(100)])
    real, fake = draw()
    found = getattr(intervals, kind)(real, fake)
    assert found.value == pytest.approx(distance(real, fake), rel=1e-9)
    assert found.low < found.value < found.high
    assert 0.5 < (found.high - found.low) / (2 * 1.96 * spread) < 2
