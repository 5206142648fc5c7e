"""Pictures and their translations in another light and before other backgrounds, for refinement.

A few hundred pictures show few lights and grounds: what a generator has not seen it translates
anyhow, and shadows not at all. Random ones are textures of noise (domain randomization,
Tobin et al. 2017; Baradad et al. 2021) and smooth fields of brightness; objects are cut out where
the generator changes its source (cut, paste and learn, Dwibedi et al. 2017).
"""

import math
import random

import torch
import torch.nn.functional as F

import datasets
from utils import UserError

BINS = 24  # of each of three channels


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


def log_density(domain: datasets.Domain) -> torch.Tensor:
    """The logarithm of how common each color (24^3) is, averaged over neighboring colors.

    At most 200 pictures are read, and each counts the same. Raises UserError if they are not RGB
    pictures of 8 bits.
    """
    if domain.first.dtype != torch.uint8 or len(domain.first) != 3:
        raise UserError("--refine_epochs needs RGB pictures of 8 bits: add --refine_epochs 0")
    counts = torch.zeros(BINS**3)
    for i in range(0, len(domain), math.ceil(len(domain) / 200)):
        picture = datasets.resize(domain[i].permute(1, 2, 0).numpy(), (128, 128))
        bins = color_bins(datasets.to_tensor(picture)[None])
        counts += torch.bincount(bins.flatten(), minlength=BINS**3)
    share = (counts / counts.sum()).view(1, BINS, BINS, BINS)
    for _ in range(3):
        share = F.avg_pool3d(share, 3, 1, 1, count_include_pad=False)
    return (share.flatten() + 1e-8).log()


def background_colors(target: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """How often backgrounds have each color (24^3): common ones, but not the objects' own.

    `target` and `own` are the `log_density` of pictures of the target and of the source's kind:
    what is more common in these is to change, what is eight times as common in those is what it
    becomes.
    """
    ratio = own - target
    allowed = (ratio < math.log(1.25)) & (ratio > -math.log(8))
    return (torch.maximum(target, own) / 2).exp() * allowed


class Scenes:
    """Random light and backgrounds of one size, from a seed."""

    def __init__(self, seed: int, size: tuple[int, int], colors: torch.Tensor):
        """`size`: height and width; `colors`: as `background_colors` returns them."""
        self.size, self.colors = size, colors
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=self.generator)

    def enlarge(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, self.size, mode="bicubic")

    def noise(self, slope: float) -> torch.Tensor:
        """Grains of 2 to 64 pixels (1, 1, H, W), mean 0, deviation 1; larger ones the more `slope`.

        They are stretched along one side, as fibres of wood and cloth are.
        """
        stretch, total = [1.0, math.exp(2 * self.rng.random() ** 2)], 0
        self.rng.shuffle(stretch)
        for k in range(1, 7):
            grid = [max(2, round(n / 2**k / s)) for n, s in zip(self.size, stretch, strict=True)]
            total = total + 2 ** (k * slope) * self.enlarge(self.normal(1, *grid))
        return (total - total.mean()) / total.std()

    def texture(self) -> torch.Tensor:
        """Noise between two colors (1, 3, H, W)."""
        bins = torch.multinomial(self.colors, 2, True, generator=self.generator)
        colors = torch.stack([bins // BINS**2, bins // BINS % BINS, bins % BINS], 1) + 0.5  # (2, 3)
        first, second = (colors * (2 / BINS) - 1)[:, None, :, None, None]
        if self.rng.random() < 0.6:
            second = first + 0.25 * self.normal(3, 1, 1)
        slope, contrast = self.rng.uniform(0, 1.2), math.exp(self.rng.uniform(-0.5, 1.5))
        share = torch.sigmoid(contrast * self.noise(slope))
        coarse, fine = 0.3 * self.rng.random() ** 2, 0.15 * self.rng.random() ** 3
        grain = coarse * self.noise(slope) + fine * self.normal(1, *self.size)
        return share * first + (1 - share) * second + grain

    def background(self) -> torch.Tensor:
        """One texture, or two beside each other: (1, 3, H, W) in [-1, 1]."""
        x = self.texture()
        if self.rng.random() < 0.4:
            share = torch.sigmoid(20 * self.noise(1.2) + self.rng.gauss(0, 8))
            x = share * x + (1 - share) * self.texture()
        return x.clamp(-1, 1)

    def light(self) -> torch.Tensor:
        """A smooth factor of brightness: (1, 1, H, W) in [0.35, 1.5]."""
        field = sum(self.rng.random() * self.enlarge(self.normal(1, n, n)) for n in (2, 3, 5))
        return (0.5 * (field - field.mean())).exp().clamp(0.35, 1.5)


@torch.no_grad()
def other_scenes(
    source: torch.Tensor, fake: torch.Tensor, colors: torch.Tensor, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and their translations (N, 3, H, W) in [-1, 1], both in another light and place.

    What the translation leaves as it is becomes another background for six of ten, light changes
    for half. `colors` are the `background_colors`.
    """
    device, pairs = source.device, []
    for x, y in zip(source.cpu().float().split(1), fake.cpu().float().split(1), strict=True):
        scenes = Scenes(rng.getrandbits(63), tuple(x.shape[2:]), colors)
        pair = torch.cat([x, y])
        if rng.random() < 0.6:
            mask = fill(1 - unchanged(pair[1:], x))
            mask = F.avg_pool2d(-F.max_pool2d(-mask, 5, 1, 2), 3, 1, 1, count_include_pad=False)
            pair = mask * pair + (1 - mask) * scenes.background()
        if rng.random() < 0.5:
            pair = ((pair + 1) * scenes.light()).clamp(0, 2) - 1
        pairs.append(pair)
    return tuple(torch.stack(pairs, 1).to(device))
