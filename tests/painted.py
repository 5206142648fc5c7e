"""Pictures of flat colors, for the tests of masks and scenes."""

import numpy as np

RED, ORANGE, BROWN, PURPLE, WHITE, BLUE = (
    np.array(color, np.uint8)
    for color in (
        (200, 20, 30),
        (250, 150, 20),
        (190, 150, 100),
        (180, 90, 190),
        (255, 255, 255),
        (30, 60, 160),
    )
)


def paint(color: np.ndarray, *patches: tuple, size: int = 128) -> np.ndarray:
    """A picture of one color, with patches (top, bottom, left, right, color) in 128ths of it."""
    picture = np.tile(color, (size, size, 1))
    for *box, patch in patches:
        top, bottom, left, right = (n * size // 128 for n in box)
        picture[top:bottom, left:right] = patch
    return picture
