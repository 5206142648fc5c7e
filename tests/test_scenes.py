"""lib/scenes.py: pictures and their translations in another light, before another background."""

import random

import numpy as np
import pytest
import torch
from painted import BLUE, BROWN, ORANGE, PURPLE, RED, WHITE, paint

import datasets
from lib.masks import color_bins, log_density
from lib.scenes import Scenes, background_colors, other_scenes

SQUARE = np.s_[..., 20:44, 20:44]


def scene(ground: np.ndarray, square: np.ndarray) -> np.ndarray:
    return paint(ground, (40, 88, 40, 88, square), size=64)


def tensor(*pictures: np.ndarray) -> torch.Tensor:
    return torch.stack([datasets.to_tensor(picture) for picture in pictures])


APPLES = log_density([scene(WHITE, RED), scene(BLUE, RED), scene(BROWN, RED)])
ORANGES = log_density([scene(WHITE, ORANGE), scene(BLUE, ORANGE), scene(BROWN, ORANGE)])


def test_colors_of_backgrounds():
    """Common ones more often than others, but none that oranges have and apples lack."""
    colors = background_colors(APPLES, ORANGES)
    at = lambda color: colors[color_bins(tensor(color[None, None]))].item()
    assert at(ORANGE) == 0
    assert at(WHITE) > 10 * at(PURPLE) > 0
    assert at(RED) > 10 * at(PURPLE)  # an apple's color may be behind an orange
    scenes = Scenes(0, (8, 8), colors)
    drawn = torch.multinomial(scenes.colors, 5000, True, generator=scenes.generator)
    assert (colors[drawn] > 0).all()


def test_noise_light_and_backgrounds():
    scenes = Scenes(3, (48, 64), torch.ones(24**3))
    for slope in (0, 1.2):
        noise = scenes.noise(slope)
        assert noise.shape == (1, 1, 48, 64)
        assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=1e-5)
    lights = torch.cat([scenes.light() for _ in range(50)])
    assert lights.shape == (50, 1, 48, 64)
    assert 0.35 <= lights.min() < 0.5 and 1.4 < lights.max() <= 1.5
    assert lights.diff(dim=3).abs().mean() < 0.03  # smooth
    backgrounds = torch.cat([scenes.background() for _ in range(20)])
    assert backgrounds.shape == (20, 3, 48, 64)
    assert backgrounds.min() >= -1 and backgrounds.max() <= 1
    assert backgrounds.mean((2, 3)).std(0).min() > 0.2  # no two alike
    first, again = (Scenes(3, (48, 64), torch.ones(24**3)).background() for _ in range(2))
    assert torch.equal(first, again)


def test_other_scenes():
    """What changes keeps its change, in the light of its place; what does not is one in both."""
    x, y = tensor(scene(BLUE, ORANGE)), tensor(scene(BLUE, RED))
    seen = set()
    for seed in range(40):
        source, fake = other_scenes(x, y, APPLES, ORANGES, random.Random(seed))
        assert source.shape == fake.shape == x.shape
        assert torch.isfinite(source).all() and source.abs().max() <= 1
        outside = torch.ones_like(x, dtype=torch.bool)
        outside[SQUARE] = False
        assert torch.equal(source[outside], fake[outside])
        core = np.s_[..., 24:40, 24:40]
        factor = (source[core] + 1) / (x[core] + 1)  # of the light, the same in all channels
        free = (factor * (x[core] + 1) < 1.99) & (factor * (y[core] + 1) < 1.99)
        assert torch.allclose((factor * (y[core] + 1))[free], (fake[core] + 1)[free], atol=1e-4)
        lit = (source[core] - x[core]).abs().max() > 1e-4
        ground = ((source + 1) / (x + 1))[..., :16, :]
        moved = (ground.amax(1) - ground.amin(1)).max() > 1e-3  # more than light
        seen.add((bool(lit), bool(moved)))
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_what_is_not_to_change_is_not_learned():
    """Brown that became purple, which apples lack, is brown in the translation too."""
    x = tensor(scene(BROWN, ORANGE), scene(BROWN, ORANGE))
    y = tensor(scene(PURPLE, RED), scene(BROWN, RED))
    draw = lambda y, seed: other_scenes(x, y, APPLES, ORANGES, random.Random(seed))
    as_it_is = lambda seed: torch.allclose(draw(x, seed)[0], x, atol=1e-5)
    source, fake = draw(y, next(filter(as_it_is, range(99))))  # neither background nor light
    assert torch.allclose(source, x, atol=1e-5)
    corner = np.s_[:, :, :8, :8]
    assert torch.allclose(fake[corner], x[corner], atol=2 / 127.5)
    assert torch.allclose(fake[1], y[1], atol=1e-5)
    middle = np.s_[:, :, 30:34, 30:34]
    assert torch.equal(fake[middle], y[middle])


def test_the_callers_random_numbers_decide():
    x, y = tensor(scene(BLUE, ORANGE)), tensor(scene(BLUE, RED))
    state = torch.get_rng_state()
    draw = lambda seed: other_scenes(x, y, APPLES, ORANGES, random.Random(seed))[0]
    drawn = [draw(seed) for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not all(torch.equal(drawn[0], other) for other in drawn[2:])
    assert torch.equal(state, torch.get_rng_state())
