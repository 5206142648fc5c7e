"""Measures of pictures, as functions of arrays and tensors. Errors are in gray levels, of 255."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

import datasets

CHANGED = 12  # a pixel changes between source and ground truth if a channel differs by more

# ------------------------------------------------------------------------------------------------
# One picture and its ground truth


def error_sums(picture: np.ndarray, source: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return sums of a picture's absolute error, which add up over pictures; see `masked_errors`.

    All three are (H, W, C), of any C, compared as RGB. Returns [[error, pixels] where source and
    truth differ by more than CHANGED, [error, pixels] elsewhere]; the error of a pixel is the mean
    over its channels.
    """
    x, s, t = (np.asarray(datasets.to_rgb(p), np.float64) for p in (picture, source, truth))
    changed = (np.abs(s - t) > CHANGED).any(axis=2)  # (H, W)
    error = np.abs(x - t).mean(axis=2)  # (H, W)
    return np.array([[error[mask].sum(), mask.sum()] for mask in (changed, ~changed)])


def masked_errors(sums: np.ndarray) -> dict[str, float]:
    """Return mean absolute errors from `error_sums`: mae over all pixels, changed, kept."""
    found = {"mae": sums.sum(axis=0), "changed": sums[0], "kept": sums[1]}
    return {name: float(error / pixels) for name, (error, pixels) in found.items() if pixels}


def pixel_errors(picture: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return what is published for maps (Fu et al. 2019, GcGAN), of two (H, W, 3) uint8 pictures.

    rmse: the root of the mean over pixels and channels (GcGAN's sums over the channels, so it is
    sqrt(3) times this one); under_5, under_10: shares of pixels whose largest channel error is
    below 5 or 10.
    """
    error = np.abs(picture.astype(np.float64) - truth)  # (H, W, 3)
    largest = error.max(axis=2)
    rmse = float(np.sqrt((error**2).mean()))
    return {"rmse": rmse, "under_5": (largest < 5).mean(), "under_10": (largest < 10).mean()}


def similarity(picture: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return psnr in dB (100 at most) and ssim of two (H, W, 3) uint8 pictures, by scikit-image.

    SSIM as in Wang et al. 2004: Gaussian window of 11 x 11, sigma 1.5, only where it lies within
    the picture; nan for smaller pictures.

    Raises:
        ImportError: scikit-image is not installed.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    small = min(picture.shape[:2]) < 11
    same = np.array_equal(picture, truth)
    ssim = np.nan if small else structural_similarity(picture, truth, channel_axis=2, **wang)
    return {"psnr": 100.0 if same else peak_signal_noise_ratio(truth, picture), "ssim": float(ssim)}


def change(fake: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return where a translation differs from its source, both (..., C, H, W) in [-1, 1].

    (..., 1, H, W): the mean over channels of the absolute difference, -1 (black) where there is
    none, 1 (white) from half of the range on.
    """
    return (fake - source).abs().mean(-3, keepdim=True) * 2 - 1


def draw_change(fake: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return `change` of two pictures (H, W, C) as (H, W, 1) uint8."""
    return datasets.to_array(change(datasets.to_tensor(fake), datasets.to_tensor(source)))


# ------------------------------------------------------------------------------------------------
# Sets of pictures, each a sequence of uint8 tensors (3, H, W) of one size


def flat_color(pictures: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the median of each channel over all pixels of a set, (3,) uint8."""
    counts = sum(torch.stack([c.flatten().bincount(minlength=256) for c in p]) for p in pictures)
    below = counts.cumsum(1)  # (3, 256)
    return (2 * below < below[:, -1:]).sum(1).numpy().astype(np.uint8)


def laplacian_pyramid(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the levels of a picture (3, H, W), the finest first, down to about 16 pixels."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(line, line).expand(3, 1, 5, 5)
    blur = lambda p: F.conv2d(F.pad(p[None], (2, 2, 2, 2), "reflect"), kernel, groups=3)[0]
    levels = []
    while min(x.shape[1:]) >= 32:
        small = blur(x)[:, ::2, ::2]
        large = torch.zeros_like(x)
        large[:, ::2, ::2] = 4 * small
        levels.append(x - blur(large))
        x = small
    return [*levels, x]


def sample_patches(pictures: Sequence[torch.Tensor], n: int = 8192) -> list[torch.Tensor]:
    """Return `n` patches of 7 x 7 from each level of the pictures' Laplacian pyramids.

    The same number from each picture, but for the rest, at places that depend on nothing but the
    number and size of the pictures. One tensor (n, 3, 49) for each level.
    """
    generator, levels = torch.Generator().manual_seed(0), []
    for i in range(len(pictures)):
        share = len(range(i, n, len(pictures)))
        for k, level in enumerate(laplacian_pyramid(pictures[i].float())):
            windows = level.unfold(1, 7, 1).unfold(2, 7, 1)  # (3, H - 6, W - 6, 7, 7)
            y, x = (torch.randint(m, (share,), generator=generator) for m in windows.shape[1:3])
            levels += [[]] if k == len(levels) else []
            levels[k].append(windows[:, y, x].transpose(0, 1).flatten(2))  # (share, 3, 49)
    return [torch.cat(patches) for patches in levels]


def sliced_wasserstein(patches: list, real: list, n_directions: int = 256) -> float:
    """Return the sliced Wasserstein distance of two results of `sample_patches`, times 1000.

    Karras et al. 2018, section 5: the mean over random directions in the space of patches, and
    over levels. Except for one thing: colors are normalized by the mean and the deviation of `real`
    for both sets, not of each by its own, so that a wrong color or contrast counts.
    """
    generator, distances = torch.Generator().manual_seed(0), []
    for one, other in zip(patches, real, strict=True):
        mean, std = other.mean((0, 2), keepdim=True), other.std((0, 2), keepdim=True)
        directions = F.normalize(torch.randn(147, n_directions, generator=generator), dim=0)
        one, other = (
            (((p - mean) / (std + 1e-3)).flatten(1) @ directions).T.contiguous().sort(1).values
            for p in (one, other)
        )
        distances.append(float((one - other).abs().mean()))
    return 1000 * sum(distances) / len(distances)
