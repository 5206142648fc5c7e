"""lib/masks.py: where a source stays as it is."""

import numpy as np
import pytest
import torch

from lib.masks import keep_colors, log_density, unchanged


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


RED, ORANGE, BROWN, PURPLE, WHITE = (
    np.array(color, np.uint8)
    for color in ((200, 20, 30), (250, 150, 20), (190, 150, 100), (180, 90, 190), (255, 255, 255))
)


def paint(color: np.ndarray, *patches: tuple, size: int = 128) -> np.ndarray:
    """A picture of one color, with patches (top, bottom, left, right, color) in 128ths of it."""
    picture = np.tile(color, (size, size, 1))
    for *box, patch in patches:
        top, bottom, left, right = (n * size // 128 for n in box)
        picture[top:bottom, left:right] = patch
    return picture


@pytest.mark.parametrize("size", [128, 640])
def test_colors_that_the_target_lacks_are_not_kept(size):
    """Orange became red, which the target has: kept; brown became purple: the source."""
    density = log_density([paint(WHITE, (0, 64, 0, 64, RED)), paint(BROWN, (0, 64, 0, 64, RED))])
    fruit, board = (20, 60, 30, 90), (80, 120, 10, 120)
    source = paint(WHITE, (*fruit, ORANGE), (*board, BROWN), size=size)
    fake = paint(WHITE, (*fruit, RED), (*board, PURPLE), size=size)
    wanted = paint(WHITE, (*fruit, RED), (*board, BROWN), size=size)
    made = keep_colors(fake, source, density)
    assert np.abs(made.astype(int) - wanted).max() <= (2 if size > 256 else 0)  # at the edges
    assert np.array_equal(keep_colors(source, source, density), source)
    lucky = log_density([paint(WHITE, (0, 64, 0, 64, RED)), paint(PURPLE, (0, 64, 0, 64, RED))])
    assert np.array_equal(keep_colors(fake, source, lucky), fake)  # a target that has purple


def test_a_small_part_of_what_changes_goes_with_it():
    """A highlight of a rare color in a fruit is the fruit's, a large area is not."""
    density = log_density([paint(WHITE, (0, 64, 0, 64, RED)), paint(BROWN)])
    around = (20, 110, 20, 110)
    for width, kept in ((6, True), (50, False)):
        spot = (65 - width // 2, 65 + width // 2) * 2
        source = paint(WHITE, (*around, ORANGE), (*spot, BROWN))
        fake = paint(WHITE, (*around, RED), (*spot, PURPLE))
        made = keep_colors(fake, source, density)
        assert np.array_equal(made[65, 65], PURPLE if kept else BROWN)
        assert np.array_equal(made[30, 30], RED)


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
