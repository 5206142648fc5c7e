"""lib/scenes.py: pictures and their translations in another light, before another background."""

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from lib.scenes import (
    Scenes,
    background_colors,
    color_bins,
    fill,
    log_density,
    other_scenes,
    unchanged,
)
from utils import UserError

RED, ORANGE, BROWN, PURPLE = (200, 20, 30), (250, 150, 20), (190, 150, 100), (180, 90, 190)
WHITE, BLUE = (255, 255, 255), (30, 60, 160)
SQUARE = np.s_[..., 20:44, 20:44]
ANY = torch.ones(24**3)


def scene(ground: tuple, square: tuple, size: int = 64) -> np.ndarray:
    picture = np.full((size, size, 3), ground, np.uint8)
    picture[size * 20 // 64 : size * 44 // 64, size * 20 // 64 : size * 44 // 64] = square
    return picture


def tensor(picture: np.ndarray) -> torch.Tensor:
    return datasets.to_tensor(picture)[None]


def domain(folder: Path, pictures: list[np.ndarray], n_channels: int = 3) -> datasets.Domain:
    (folder / "trainA").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "trainA" / f"{i}.png")
    options = argparse.Namespace(preprocess="none", size=32, load_size=32, axis=-1)
    return datasets.Domain(folder, "trainA", n_channels, options, folder / "log")


def test_unchanged():
    """1 but where the mean over channels differs by 8 of 255; holes are filled, edges stay."""
    source = torch.zeros(1, 3, 48, 64)
    fake = source.clone()
    fake[:, :, 10:30, 20:40] = 8.5 / 127.5
    fake[:, :, 15:18, 25:29] = 0  # a hole of 4 pixels: dilated by 2 it is closed
    fake[:, :, 40:44, 50:] = 7.5 / 127.5
    fake[:, 0, :8, :8] = 3 * 7.5 / 127.5
    wanted = torch.ones(1, 1, 48, 64)
    wanted[:, :, 10:30, 20:40] = 0
    assert torch.equal(unchanged(fake, source), wanted)
    fake[:, :, 15:20, 25:30] = 0  # one of 5 is not
    wanted[:, :, 15:20, 25:30] = 1
    assert torch.equal(unchanged(fake, source), wanted)
    assert torch.equal(unchanged(source + 1, source), torch.zeros(1, 1, 48, 64))


def test_fill():
    """Holes of any size, but none that touches the border or is joined to it, if only by a path."""
    mask = torch.zeros(3, 1, 40, 60)
    mask[:, :, 5:35, 10:50], mask[:, :, 8:32, 13:47] = 1, 0  # a ring
    mask[1, :, 20, :30] = 0  # with a way out
    mask[2, :, :, 30:] = mask[0, :, :, 30:]
    mask[2, :, :, 50:] = 1  # at the border
    wanted = mask.clone()
    wanted[0, :, 5:35, 10:50] = wanted[2, :, 5:35, 10:50] = 1
    assert torch.equal(fill(mask), wanted)


def test_log_density(tmp_path):
    """The more common, the higher, next to each other alike; each picture counts the same."""
    sizes = ((RED, 128), (RED, 32), (WHITE, 256))
    density = log_density(domain(tmp_path, [scene(c, c, size) for c, size in sizes])).exp()
    density = density.view(24, 24, 24)
    assert density.sum().item() == pytest.approx(1, abs=0.3)  # near white it is not exact
    at = lambda *color: density[tuple(c * 24 // 256 for c in color)].item()
    assert at(*RED) > at(*WHITE) > 100 * at(*BROWN)
    assert at(*RED) > at(*(c - 11 for c in RED)) > 100 * at(*ORANGE)
    white = log_density(domain(tmp_path / "white", [scene(WHITE, WHITE)])).exp()
    assert at(*WHITE) == pytest.approx(white[-1].item() / 3, rel=1e-3)
    gray = domain(tmp_path / "gray", [scene(RED, RED)], 1)
    with pytest.raises(UserError, match="needs RGB pictures of 8 bits: add --refine_epochs 0"):
        log_density(gray)


def test_colors_of_backgrounds(tmp_path):
    """Common ones more often than others, but none that oranges alone have, or apples alone."""
    grounds = (WHITE, BLUE, BROWN)
    apples, oranges = (
        log_density(domain(tmp_path / str(color), [scene(ground, color) for ground in grounds]))
        for color in (RED, ORANGE)
    )
    colors = background_colors(apples, oranges)
    at = lambda color: colors[color_bins(tensor(scene(color, color))[..., :1, :1])].item()
    assert at(ORANGE) == at(RED) == 0
    assert at(WHITE) > 10 * at(PURPLE) > 0
    scenes = Scenes(0, (8, 8), colors)
    drawn = torch.multinomial(scenes.colors, 5000, True, generator=scenes.generator)
    assert (colors[drawn] > 0).all()


def test_noise_light_and_backgrounds():
    scenes = Scenes(3, (48, 64), ANY)
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
    first, again = (Scenes(3, (48, 64), ANY).background() for _ in range(2))
    assert torch.equal(first, again)


def test_other_scenes():
    """What changes keeps its change, in the light of its place; what does not is one in both."""
    x, y = tensor(scene(BLUE, ORANGE)), tensor(scene(BLUE, RED))
    seen = set()
    for seed in range(40):
        source, fake = other_scenes(x, y, ANY, random.Random(seed))
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


def test_the_callers_random_numbers_decide():
    x, y = tensor(scene(BLUE, ORANGE)), tensor(scene(BLUE, RED))
    state = torch.get_rng_state()
    draw = lambda seed: other_scenes(x, y, ANY, random.Random(seed))[0]
    drawn = [draw(seed) for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not all(torch.equal(drawn[0], other) for other in drawn[2:])
    assert torch.equal(state, torch.get_rng_state())
