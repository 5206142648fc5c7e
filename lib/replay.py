"""The fakes that the discriminators see again."""

import random

import torch


class ReplayBuffer:
    """History of generated pictures (paper section 4; Shrivastava et al. 2017).

    The first `size` pictures are stored and returned. From then on each picture is, with
    probability 1/2, swapped for a random stored one, or else returned and not stored. Pictures of
    another shape begin a new history. Choices are made on the host: a GPU is never waited for.
    """

    def __init__(self, size: int = 50, seed: int = 0):
        self.size, self.random = size, random.Random(seed)
        self.images, self.n = torch.empty(0), 0  # (size, C, H, W), of which n are filled

    def query(self, fakes: torch.Tensor) -> torch.Tensor:
        """Take new fakes (N, C, H, W), return as many, some of them old ones, without gradients."""
        fakes = fakes.detach()
        result = fakes.clone()
        if fakes.shape[1:] != self.images.shape[1:]:
            self.images, self.n = fakes.new_zeros(self.size, *fakes.shape[1:]), 0
        for k in range(len(fakes) if self.size else 0):
            if self.n < self.size:
                self.images[self.n] = fakes[k]
                self.n += 1
            elif self.random.random() < 0.5:
                i = self.random.randrange(self.size)
                result[k] = self.images[i]
                self.images[i] = fakes[k]
        return result

    def state_dict(self) -> dict:
        return {"images": self.images[: self.n], "random": self.random.getstate()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        images = state["images"][: self.size]
        self.images = torch.zeros(self.size, *images.shape[1:], device=device)
        self.n = len(images)
        self.images[: self.n] = images
        self.random.setstate(state["random"])
