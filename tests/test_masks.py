"""lib/masks.py: where a source stays as it is."""

import argparse

import numpy as np
import pytest
import torch
from painted import BROWN, ORANGE, PURPLE, RED, WHITE, paint
from PIL import Image

import datasets
from lib.masks import (
    data_colors,
    fill,
    keep_colors,
    load_colors,
    log_density,
    save_colors,
    unchanged,
)
from utils import UserError


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


def difference(picture: np.ndarray, wanted: np.ndarray, box: tuple) -> int:
    """The largest one, but for 4 pixels at the corners of a box, whose mixed colors are others'."""
    off = np.abs(picture.astype(int) - wanted).max(-1)
    top, bottom, left, right = (n * len(off) // 128 for n in box)
    for y in (top, bottom - 4):
        for x in (left, right - 4):
            off[y : y + 4, x : x + 4] = 0
    return off.max()


@pytest.mark.parametrize("size", [128, 640])
def test_colors_that_the_target_lacks_are_not_kept(size):
    """Orange became red, which the target has: kept; brown became purple: the source."""
    density = log_density([paint(WHITE, (0, 64, 0, 64, RED)), paint(BROWN, (0, 64, 0, 64, RED))])
    own = log_density([paint(WHITE, (0, 64, 0, 64, ORANGE)), paint(BROWN)])
    fruit, board = (20, 60, 30, 90), (80, 120, 10, 120)
    source = paint(WHITE, (*fruit, ORANGE), (*board, BROWN), size=size)
    fake = paint(WHITE, (*fruit, RED), (*board, PURPLE), size=size)
    wanted = paint(WHITE, (*fruit, RED), (*board, BROWN), size=size)
    made = keep_colors(fake, source, density, own)
    assert difference(made, wanted, fruit) <= (2 if size > 256 else 0)  # at the edges
    assert np.array_equal(keep_colors(source, source, density, own), source)
    lucky = log_density([paint(WHITE, (0, 64, 0, 64, RED)), paint(PURPLE, (0, 64, 0, 64, RED))])
    assert np.array_equal(keep_colors(fake, source, lucky, own), fake)  # a target that has purple
    typical = log_density([paint(BROWN)])  # much more brown than in the target
    made = keep_colors(fake, source, density, typical)
    assert np.array_equal(made[size * 100 // 128, size // 2], PURPLE)


def test_one_color_one_decision():
    """The end of a board that became red, as fruits may, stays brown as most of the board does."""
    density = log_density([paint(WHITE, (0, 64, 0, 64, RED)), paint(BROWN, (0, 64, 0, 64, RED))])
    own = log_density([paint(WHITE, (0, 64, 0, 64, ORANGE)), paint(BROWN)])
    fruit, board, end = (10, 50, 30, 90), (70, 120, 10, 120), (70, 120, 90, 120)
    source = paint(WHITE, (*fruit, ORANGE), (*board, BROWN))
    fake = paint(WHITE, (*fruit, RED), (*board, PURPLE), (*end, RED))
    made = keep_colors(fake, source, density, own)
    assert difference(made, paint(WHITE, (*fruit, RED), (*board, BROWN)), fruit) == 0
    fake = paint(WHITE, (*fruit, RED), (*board, RED), (*end, PURPLE))  # most of it is to change
    made = keep_colors(fake, source, density, own)
    assert np.array_equal(made[100, 50], RED) and np.array_equal(made[100, 115], BROWN)


def test_parts_of_what_changes_go_with_it():
    """A highlight of a rare color in a fruit is the fruit's, however large, and a narrow gap.

    What reaches its border is not.
    """
    density = log_density([paint(WHITE, (0, 64, 0, 64, RED)), paint(BROWN)])
    around, inside, gap = (20, 110, 20, 110), (40, 90, 40, 90), (62, 68, 20, 110)
    beside = (40, 90, 60, 120)
    for spot, kept in ((inside, True), (gap, True), (beside, False)):
        source = paint(WHITE, (*around, ORANGE), (*spot, BROWN))
        fake = paint(WHITE, (*around, RED), (*spot, PURPLE))
        made = keep_colors(fake, source, density, density)
        assert np.array_equal(made[65, 75], PURPLE if kept else BROWN)
        assert np.array_equal(made[30, 30], RED)


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


def test_log_density():
    """The more common, the higher, next to each other alike."""
    pictures = [paint(RED), paint(RED), paint(WHITE)]
    density = log_density(pictures).exp().view(24, 24, 24)
    assert density.sum().item() == pytest.approx(1, abs=0.3)  # near white it is not exact
    at = lambda color: density[tuple(int(c) * 24 // 256 for c in color)].item()
    assert at(RED) > at(WHITE) > 100 * at(BROWN)
    assert at(RED) > at(RED - 11) > 100 * at(ORANGE)
    white = log_density([paint(WHITE)]).exp().view(24, 24, 24)[-1, -1, -1].item()
    assert at(WHITE) == pytest.approx(white / 3, rel=1e-3)


def test_colors_of_a_training_set(tmp_path):
    """Every picture counts the same, whatever its size; a gray domain has none, nor an old file."""
    for i, (color, size) in enumerate(((RED, 128), (WHITE, 64), (BROWN, 256), (RED, 32))):
        (tmp_path / "trainA").mkdir(exist_ok=True)
        Image.fromarray(paint(color, size=size)).save(tmp_path / "trainA" / f"{i}.png")
    options = argparse.Namespace(preprocess="none", size=32, load_size=32, axis=-1)
    make = lambda channels: datasets.Domain(tmp_path, "trainA", channels, options, tmp_path / "log")
    data = datasets.UnpairedImages(make(3), make(1), 32)
    (tmp_path / "colors_B.pth").write_bytes(b"old")
    save_colors(tmp_path, {"A": data_colors(data.A), "B": data_colors(data.B)})
    wanted = log_density(paint(color) for color in (RED, WHITE, BROWN, RED))
    assert torch.equal(load_colors(tmp_path / "colors_A.pth"), wanted)
    assert not (tmp_path / "colors_B.pth").exists()
    torch.save({"log_density": wanted[1:]}, tmp_path / "colors_A.pth")
    with pytest.raises(UserError, match="colors_A.pth holds no colors: delete it"):
        load_colors(tmp_path / "colors_A.pth")
