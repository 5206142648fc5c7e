"""Instance norm by the statistics of many pictures: slices of a volume, frames of a film."""

import copy

import torch
from torch import nn

from utils import UserError


class SharedNorm(nn.Module):
    """Instance norm by the statistics of a whole batch, averaged with those of the last batches.

    With statistics of its own for each picture, a network's brightness and colors flicker from one
    slice or frame to the next. `keep` is how much of the average stays at each batch: 0 for this
    batch alone. The first ones have equal weights, as in a plain mean.
    """

    def __init__(self, eps: float, keep: float):
        super().__init__()
        self.eps, self.keep, self.n, self.means = eps, keep, 0, 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x.float()  # (N, C, H, W)
        mean = z.mean((0, 2, 3), keepdim=True)
        square = (z - mean).square().mean((0, 2, 3), keepdim=True) + mean**2
        self.n += 1
        weight = max(1 - self.keep, 1 / self.n)
        self.means = self.means + weight * (torch.stack([mean, square]) - self.means)
        mean, square = self.means
        return ((z - mean) * (square - mean**2 + self.eps).rsqrt()).to(x.dtype)


def share_norm(net, keep: float = 0.0) -> nn.Module:
    """A copy of a generator with a `SharedNorm` for each instance norm.

    Raises:
        UserError: the network has no instance norm.
    """
    net = copy.deepcopy(net) if isinstance(net, nn.Module) else nn.Identity()
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.InstanceNorm2d)}
    if not norms:
        raise UserError(
            "--volume_norm and --smooth share the statistics of instance norm, which this network "
            "does not have: leave them out"
        )
    for name, norm in norms.items():
        net.set_submodule(name, SharedNorm(norm.eps, keep))
    return net
