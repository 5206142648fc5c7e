"""Random views of what the discriminators see, so that they cannot learn a small set by heart."""

import math
import random

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
