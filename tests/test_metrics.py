"""lib/metrics.py against plain loops, and what the sliced Wasserstein distance can tell apart."""

import numpy as np
import pytest
import torch

from lib import metrics


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, window by window."""
    window = np.array(
        [[np.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)]
    )
    window /= window.sum()
    values = []
    for c in range(x.shape[2]):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                a = x[i : i + 11, j : j + 11, c].astype(float)
                b = y[i : i + 11, j : j + 11, c].astype(float)
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a = (window * (a - mean_a) ** 2).sum()
                var_b = (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
                values.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def test_ssim_is_wangs():
    """scikit-image's figures are those of the paper's formula, and of the code here before."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (17, 14, 3), np.uint8)
    y = np.clip(x.astype(int) + rng.integers(-40, 41, x.shape), 0, 255).astype(np.uint8)
    found = metrics.similarity(x, y)
    assert 0.3 < found["ssim"] < 0.99
    assert found["ssim"] == pytest.approx(plain_ssim(x, y), abs=1e-4)
    mse = ((x.astype(float) - y) ** 2).mean()
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-4)
    assert metrics.similarity(x, x) == pytest.approx({"psnr": 100, "ssim": 1})
    assert np.isnan(metrics.similarity(x[:5], y[:5])["ssim"])  # smaller than the window


def test_a_picture_counts_as_changed_only_beyond_12():
    source = np.zeros((1, 3, 3), np.uint8)
    truth = np.array([[[12, 12, 12], [0, 13, 0], [0, 0, 0]]], np.uint8)
    picture = np.array([[[0, 0, 0], [0, 4, 0], [30, 0, 0]]], np.uint8)
    sums = metrics.error_sums(picture, source, truth)
    assert metrics.masked_errors(sums) == pytest.approx(
        {"mae": (12 + 3 + 10) / 3, "changed": 3, "kept": (12 + 10) / 2}
    )
    assert metrics.masked_errors(np.zeros((2, 2))) == {}


def test_flat_color_is_the_median_over_all_pixels():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (7, 3, 5, 6), np.uint8)
    flat = metrics.flat_color([torch.from_numpy(picture) for picture in pictures])
    values = np.sort(pictures.transpose(1, 0, 2, 3).reshape(3, -1), axis=1)
    assert (flat == values[:, (values.shape[1] - 1) // 2]).all() and flat.dtype == np.uint8


def noise_pictures(n: int, seed: int, size: int = 40) -> list[torch.Tensor]:
    """Pictures with structure at all scales, of one distribution."""
    generator, pictures = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        x = torch.zeros(1, 3, size, size)
        for side in (4, 10, size):
            y = torch.randn(1, 3, side, side, generator=generator)
            x += 25 * torch.nn.functional.interpolate(y, (size, size), mode="nearest")
        pictures.append((x[0] + 128).clamp(0, 255).to(torch.uint8))
    return pictures


def test_swd_tells_color_contrast_blur_and_real_apart():
    one, other = noise_pictures(12, 1), noise_pictures(12, 2)
    real = metrics.sample_patches(one, 1000)
    assert [tuple(level.shape) for level in real] == [(1000, 3, 49)] * 2  # 40 and 20 pixels
    again = metrics.sample_patches(one, 1000)
    assert all(torch.equal(x, y) for x, y in zip(real, again, strict=True))
    assert metrics.sliced_wasserstein(again, real, 64) == 0

    def swd(change, pictures=other) -> float:
        changed = [change(picture.float()) for picture in pictures]
        return metrics.sliced_wasserstein(metrics.sample_patches(changed, 1000), real, 64)

    noise = swd(lambda x: x)
    assert 0 < noise < 100
    assert swd(lambda x: x + 20) > 2 * noise
    assert swd(lambda x: 128 + (x - 128) * 0.7) > 2 * noise
    assert swd(lambda x: torch.nn.functional.avg_pool2d(x[None], 3, 1, 1)[0]) > 2 * noise
    assert swd(lambda x: x, other[:3]) < 4 * noise  # fewer pictures, as many patches


def test_swd_of_a_known_change():
    """Twice the contrast and one deviation more: |p + s| of projections p, s the direction's sum.

    Both are normal with deviation 1, so its mean is sqrt(2) sqrt(2 / pi); a second level is equal.
    """
    real = [torch.randn(1000, 3, 49, generator=torch.Generator().manual_seed(0))] * 2
    expected = 1000 * np.sqrt(2) * np.sqrt(2 / np.pi) / 2
    for fake in ([2 * real[0] + 1, real[1]], [real[0], 2 * real[1] + 1]):
        assert metrics.sliced_wasserstein(fake, real, 256) == pytest.approx(expected, rel=0.1)


def test_laplacian_pyramid_adds_up():
    x = noise_pictures(1, 0, 70)[0].float()
    levels = metrics.laplacian_pyramid(x)
    assert [tuple(level.shape) for level in levels] == [(3, 70, 70), (3, 35, 35), (3, 18, 18)]
    line = np.array([1, 4, 6, 4, 1]) / 16
    padded = np.pad(x.numpy(), ((0, 0), (2, 2), (2, 2)), "reflect")
    blurred = sum(
        line[i] * line[j] * padded[:, i : i + 70, j : j + 70] for i in range(5) for j in range(5)
    )
    small = torch.zeros(1, 3, 70, 70)
    small[..., ::2, ::2] = 4 * torch.from_numpy(blurred[:, ::2, ::2]).float()
    padded = np.pad(small[0].numpy(), ((0, 0), (2, 2), (2, 2)), "reflect")
    large = sum(
        line[i] * line[j] * padded[:, i : i + 70, j : j + 70] for i in range(5) for j in range(5)
    )
    assert abs(levels[0].numpy() - (x.numpy() - large)).max() < 1e-3
