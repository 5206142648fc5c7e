"""Random changes of what networks see: for discriminators, before the way back, for averages."""

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F


def augment(x: torch.Tensor, probability: float, rng: random.Random) -> torch.Tensor:
    """Turn, mirror, zoom, shift and slightly recolor pictures (N, C, H, W) in [-1, 1].

    Each is changed with the given probability, differentiably: by any angle, 1.4 times in size and
    a sixteenth of the side at most; what comes into view is the mirrored picture. Real pictures and
    fakes are changed alike, so the generators need not draw the changes (Karras et al. 2020,
    section 2.2; Zhao et al. 2020). Colors may leave [-1, 1] a little. The result is float32 at
    least.
    """
    if not probability:
        return x
    height, width = x.shape[2:]
    thetas, colors = [], []
    for _ in x:
        on = float(rng.random() < probability)
        u = lambda most, on=on: on * rng.uniform(-most, most)
        angle, zoom, mirror = u(math.pi), math.exp(u(0.35)), -1.0 if u(1) < 0 else 1.0
        c, s = zoom * math.cos(angle), zoom * math.sin(angle)
        thetas.append([[c * mirror, -s * height / width, u(0.125)]])
        thetas[-1].append([s * mirror * width / height, c, u(0.125)])
        colors.append([math.exp(u(0.2)), math.exp(u(0.2)), u(0.12)])
    with torch.autocast(x.device.type, enabled=False):  # bf16 would round to a quarter of a pixel
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        grid = F.affine_grid(x.new_tensor(thetas), list(x.shape), align_corners=False)
        y = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        saturation, contrast, brightness = x.new_tensor(colors).T.reshape(3, -1, 1, 1, 1)
        gray = y.mean(1, keepdim=True)  # (N, 1, H, W)
        return (gray + (y - gray) * saturation) * contrast + brightness


def disturb(x: torch.Tensor, strength: float, rng: random.Random) -> torch.Tensor:
    """Add noise of several sizes, more here and less there, to pictures (N, C, H, W) in [-1, 1].

    Contrast and brightness change a little too. The translations of a generator are smoother than
    real pictures: what learns from them to translate back would take that for a sign (a flat area
    for a park). Noise in the input of back-translation: Lample et al. 2018; random textures: domain
    randomization, Tobin et al. 2017. The result is within [-1, 1] and float32 at least.
    """
    if not strength:
        return x
    generator = torch.Generator(x.device).manual_seed(rng.getrandbits(63))

    def draw(function: Callable, c: int, h: int = 1, w: int = 1) -> torch.Tensor:  # (N, c, h, w)
        return function(len(x), c, h, w, generator=generator, device=x.device)

    def smooth(c: int, h: int, w: int) -> torch.Tensor:  # (N, c, H, W)
        return F.interpolate(draw(torch.randn, c, h, w), x.shape[2:], mode="bicubic")

    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for size in (1, 2, 4, 8):  # of a grain, in pixels
        grid = [max(1, side // size) for side in x.shape[2:]]
        grains = smooth(1, *grid) + smooth(x.shape[1], *grid) / 4  # more gray than colored
        on = draw(torch.rand, 1) < 0.5
        amount = strength * on * draw(torch.rand, 1).square() * (2 * smooth(1, 6, 6)).sigmoid()
        y = y + 1.5 * amount * grains
    change = 0.3 * strength * (2 * draw(torch.rand, 2) - 1)
    contrast, brightness = change.chunk(2, dim=1)  # (N, 1, 1, 1)
    return ((1 + contrast) * y + brightness).clamp(-1, 1)


@torch.no_grad()
def mean_of_views(net: Callable, x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Return the mean of what a network makes of four views of pictures (N, C, H, W), turned back.

    They are the quarter turns, each mirrored or not. What holds for one view alone, such as a bend
    in a street, fades in the mean (self-ensemble, Lim et al. 2017, section 3.3).
    """
    fakes = []
    for turns in range(4):
        mirror = [3] if rng.random() < 0.5 else []
        y = net(torch.rot90(x.flip(mirror), turns, (2, 3)))
        fakes.append(torch.rot90(y, -turns, (2, 3)).flip(mirror))
    return sum(fakes) / 4
