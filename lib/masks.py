"""Where a source should stay as it is: what a generator keeps, colors that the target lacks."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import datasets
from utils import UserError, load_tensors, save_tensors

BINS = 24  # of each of three channels
SIDE = 256  # the longer one of the pictures that masks are made of
WINDOW = 17  # pixels of it


def close(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Close masks (N, 1, H, W) of 0 and 1: dilate, then erode, so that narrow holes are filled."""
    dilated = F.max_pool2d(mask, width, 1, width // 2)
    return -F.max_pool2d(-dilated, width, 1, width // 2)


def fill(mask: torch.Tensor) -> torch.Tensor:
    """Fill the holes of masks (N, 1, H, W): zeros that no path of zeros joins to the border."""
    outside, last = F.pad(torch.zeros_like(mask), (1, 1, 1, 1), value=1), None
    inside = F.pad(mask, (1, 1, 1, 1))
    while last is None or not torch.equal(outside, last):
        last, outside = outside, F.max_pool2d(outside, 3, 1, 1) * (1 - inside)
    return 1 - outside[:, :, 1:-1, 1:-1]


def unchanged(fake: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """1 where pictures (N, C, H, W) in [-1, 1] differ by less than 8 of 255, else 0: (N, 1, H, W).

    What differs is closed by a 32nd of the width to both sides: a highlight in the middle of
    something that changes is part of it.
    """
    changed = ((fake - source).abs().mean(1, keepdim=True) > 8 / 127.5).float()
    return 1 - close(changed, source.shape[-1] // 32 * 2 + 1)


def color_bins(x: torch.Tensor) -> torch.Tensor:
    """The bins (N, H, W), from 0, that the colors of pictures (N, 3, H, W) in [-1, 1] are in."""
    r, g, b = ((x + 1) * (BINS / 2)).long().clamp(0, BINS - 1).unbind(1)
    return (r * BINS + g) * BINS + b


def log_density(pictures: Iterable[np.ndarray]) -> torch.Tensor:
    """The logarithm of how common each color is in pictures (H, W, 3): of 24^3 bins, smoothed.

    Each pixel counts the same: give pictures of one size.
    """
    counts = torch.zeros(BINS**3)
    for picture in pictures:
        bins = color_bins(datasets.to_tensor(picture)[None])
        counts += torch.bincount(bins.flatten(), minlength=BINS**3)
    return (smooth(counts / counts.sum()) + 1e-8).log()


def smooth(counts: torch.Tensor) -> torch.Tensor:
    """Counts (24^3) of colors, averaged over neighboring colors."""
    counts = counts.view(1, BINS, BINS, BINS)
    for _ in range(3):
        counts = F.avg_pool3d(counts, 3, 1, 1, count_include_pad=False)
    return counts.flatten()


def sample(n: int) -> range:
    """The numbers of at most 200 of `n` pictures, evenly spread: enough for a `log_density`."""
    return range(0, n, math.ceil(n / 200))


def data_colors(domain: datasets.Domain) -> torch.Tensor | None:
    """The `log_density` of a `sample` of pictures; None if they are not RGB of 8 bits."""
    if domain.first.dtype != torch.uint8 or len(domain.first) != 3:
        return None
    pictures = (domain[i].permute(1, 2, 0).numpy() for i in sample(len(domain)))
    return log_density(datasets.resize(picture, (128, 128)) for picture in pictures)


def save_colors(folder: Path, colors: dict[str, torch.Tensor | None]) -> None:
    """Write the `data_colors` of A and of B to `colors_A.pth` and `colors_B.pth`.

    Where they are None, an old file is deleted.
    """
    for name, density in colors.items():
        path = folder / f"colors_{name}.pth"
        if density is None:
            path.unlink(missing_ok=True)
        else:
            save_tensors(path, {"log_density": density})


def load_colors(path: Path) -> torch.Tensor:
    """The `log_density` that `save_colors` wrote; UserError if the file holds none."""
    density = load_tensors(path).get("log_density")
    if not isinstance(density, torch.Tensor) or density.shape != (BINS**3,):
        raise UserError(f"{path} holds no colors: delete it, and name the data set by --dataroot")
    return density


def translation_mask(
    source: torch.Tensor, fake: torch.Tensor, target: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (1, 1, H, W) of 0 and 1 for pictures (1, 3, H, W): what changes, what is to change.

    Where what changes within 17 pixels becomes rarer in the target, on average, it is no
    translation but what the network makes of things it has not seen: purple of brown, where orange
    became red; nor is what changes elsewhere, if most of its color in the picture is such. But what
    is twice as common in its own kind as in the target is to change; so are narrow gaps in all
    that, and what it encloses.
    """
    mean = lambda z, k: F.avg_pool2d(z, k, 1, k // 2, count_include_pad=False)
    average = lambda z, weight, k: mean(z.clamp(-6, 6) * weight, k) / mean(weight, k)
    change = (fake - source).abs().mean(1, keepdim=True) + 1e-3  # (1, 1, H, W)
    changed = (change > 6 / 127.5).float()
    before, after = color_bins(source)[:, None], color_bins(fake)[:, None]
    gained = average(target[after] - target[before], change, WINDOW)
    typical = average(own[before] - target[before], changed + 1e-6, WINDOW // 2 + 1)
    mask = changed * ((gained > -0.5) | (typical > math.log(2)))
    count = lambda m: smooth(torch.bincount(before.flatten(), m.flatten(), BINS**3))[before]
    mask = mask * (count(mask) > count(changed) / 2)
    return changed, fill(close(mask, WINDOW))


def rare_changes(
    source: torch.Tensor, fake: torch.Tensor, target: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """How much of the source is to stay (1, 1, H, W), from 0 to 1: soft at the edges."""
    changed, mask = translation_mask(source, fake, target, own)
    rare = F.max_pool2d(changed * (1 - mask), 9, 1, 4) * (1 - mask)  # 4 wider, for soft edges
    for _ in range(2):
        rare = F.avg_pool2d(rare, 5, 1, 2, count_include_pad=False)
    return rare


def keep_colors(
    fake: np.ndarray, source: np.ndarray, target: torch.Tensor, own: torch.Tensor
) -> np.ndarray:
    """A translation (H, W, 3), but the source where colors change that are not to change.

    `target` and `own` are the `log_density` of pictures of the target and of the source's kind.
    Source and fake are of one size and type.
    """
    x, y = (datasets.to_tensor(picture)[None] for picture in (source, fake))  # (1, 3, H, W)
    scale = SIDE / max(x.shape[2:])
    size = [max(1, round(side * scale)) for side in x.shape[2:]]
    small = [F.interpolate(z, size, mode="bicubic", antialias=True).clamp(-1, 1) for z in (x, y)]
    rare = F.interpolate(rare_changes(*small, target, own), x.shape[2:], mode="bilinear")
    return datasets.to_array((y + rare * (x - y))[0], fake.dtype)
