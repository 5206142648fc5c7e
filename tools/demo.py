"""Draw the demo set with numpy: the same scenes as apples (A) and as oranges (B)."""

import math
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import utils

SUPERSAMPLE = 2  # samples per pixel and side, inside the fruits' boxes
LEAF_REACH = 0.85  # how far from the pole stem and leaf can get; lengths are in radii of the fruit


def draw_demo(folder: Path, seed: int = 0, n_train: int = 300, n_test: int = 50) -> None:
    """Draw trainA, trainB (different scenes), testA and testB (the same scenes, the same names).

    Deterministic in `seed`. The set is drawn beside `folder` and renamed, so it is there whole or
    not at all. Raises UserError where it cannot be written.
    """
    splits = {"trainA": ("apple", 0, n_train), "trainB": ("orange", 1, n_train)}
    splits |= {"testA": ("apple", 2, n_test), "testB": ("orange", 2, n_test)}
    files = [(s, i, scenes, fruit) for s, (fruit, scenes, n) in splits.items() for i in range(n)]
    pores = pore_slopes()
    with utils.new_folder(folder) as temporary:
        for split in splits:
            (temporary / split).mkdir()
        for split, i, scenes, fruit in tqdm(files, "demo"):
            picture = Image.fromarray(draw_scene([seed, scenes, i], fruit, pores))
            path = temporary / split / f"{i:03d}.png"
            picture.save(path, compress_level=1)  # a third of the time of the default 6


def draw_scene(seed: list[int], fruit: str, pores: np.ndarray, size: int = 128) -> np.ndarray:
    """Draw scene `seed` with every fruit an "apple" or an "orange"; (size, size, 3) uint8.

    Nothing random depends on the kind of fruit: the two drawings of a scene share background,
    light, shadows, places, leaves and ripeness, and differ in the fruits' skin and stem only.
    """
    rng = np.random.default_rng(seed)
    hue, tone = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.75)
    ground = tone * (1 + 0.2 * np.cos(hue - vector(0, 2.1, 4.2)))
    side = 1 if rng.random() < 0.5 else -1
    light = unit(side * rng.uniform(0.25, 0.8), -rng.uniform(0.6, 1), 0.85)  # x right, y down
    y, x = np.mgrid[:size, :size].astype(np.float32) / size + 0.5 / size
    glow = np.exp(-((x - 0.5 - 0.35 * light[0]) ** 2 + (y - 0.25) ** 2) / 0.35)
    floor = 1 / (1 + np.exp(-(y - rng.uniform(0.4, 0.5)) / 0.05))  # a soft horizon
    picture = (0.62 + 0.38 * glow + 0.16 * floor)[..., None] * ground  # (S, S, 3), linear light

    fruits: list[tuple[float, float, float]] = []  # where each stands, and its radius
    wanted = int(rng.integers(1, 4))
    smallest, largest = [(0.3, 0.38), (0.22, 0.26), (0.18, 0.21)][wanted - 1]
    for _ in range(400):
        r = rng.uniform(smallest, largest)
        foot, cx = rng.uniform(max(0.62, 2.35 * r), 0.95), rng.uniform(r + 0.04, 0.96 - r)
        if all(math.hypot(cx - x2, foot - r - y2 + r2) > 0.93 * (r + r2) for y2, x2, r2 in fruits):
            fruits.append((foot, cx, r))
        if len(fruits) == wanted:
            break
    for foot, cx, r in fruits:
        for shift, width, depth in ((0.65, 1.25, 0.5), (0.1, 0.7, 0.75)):  # cast, contact shadow
            dx = (x - cx + shift * r * light[0]) / (width * r)
            dy = (y - foot + 0.07 * r) / (0.3 * width * r)
            picture *= 1 - depth * np.exp(-((dx**2 + dy**2) ** 2))[..., None]
    for foot, cx, r in sorted(fruits):  # the nearest stands lowest and comes last
        chance = rng.random(10).tolist()
        disc = (cx * size, (foot - r) * size, r * size)
        paint_fruit(picture, fruit, disc, light, ground, pores, chance)
    return (255 * np.sqrt(np.clip(picture, 0, 1)) + 0.5).astype(np.uint8)  # sqrt: nearly sRGB


def paint_fruit(picture, fruit, disc, light, ground, pores, chance) -> None:
    """Paint one fruit onto picture (S, S, 3).

    disc is (x, y, radius) in pixels; light a direction; ground the color below, (3,); chance ten
    numbers in [0, 1) that are all that is particular about this fruit.
    """
    size, (cx, cy, r) = len(picture), disc
    left, right = max(0, int(cx - 1.35 * r)), min(size, int(cx + 1.35 * r) + 1)
    top, bottom = max(0, int(cy - 1.65 * r)), min(size, int(cy + 1.05 * r) + 2)
    xs = (np.arange(left * SUPERSAMPLE, right * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
    ys = (np.arange(top * SUPERSAMPLE, bottom * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
    x, y = np.meshgrid((xs - cx) / r, (ys - cy) / r)  # (H, W); the fruit is the unit disc
    sharp = SUPERSAMPLE * r  # every outline is one sample soft

    lean, ripe = 0.9 * (chance[0] - 0.5), chance[2]  # one ripeness sets both fruits' colors
    pole = unit(lean, -0.8, 0.35 + 0.5 * chance[1])  # where the stem is
    near = (x**2 + y**2 < 1.1) | ((x - pole[0]) ** 2 + (y - pole[1]) ** 2 < LEAF_REACH**2)
    x, y = x[near], y[near]  # (N,): only what can be covered is worked out
    radius = np.sqrt(x**2 + y**2)
    z = np.sqrt(np.maximum(1 - radius**2, 0))
    normal = np.stack((x, y, z))  # (3, N)
    east = unit(*np.cross(pole, (0, 0, 1)))
    angle = np.arccos(np.clip(pole @ normal, -1, 1))  # 0 at the pole
    turn = np.arctan2(np.cross(pole, east) @ normal, east @ normal)  # around it

    if fruit == "apple":
        dimple = 0.9 * np.exp(-((angle / 0.42) ** 2)) * np.minimum(angle / 0.2, 1)
        normal += dimple * (pole[:, None] - normal * np.cos(angle))
        waves = [np.cos(k * turn + 6.3 * chance[3]) for k in (11, 17, 29)]
        streak = np.clip(0.5 + 0.13 * sum(waves), 0, 1)
        yellow = np.exp(-((angle / (0.7 - 0.25 * ripe)) ** 2)) * (0.3 + 0.6 * streak)
        yellow += (0.18 - 0.13 * ripe) * streak * (0.3 + 0.7 * np.sin(angle))
        red = color_of(0.52 - 0.2 * ripe, 0.016 - 0.008 * ripe, 0.016)
        skin = mix(red, color_of(0.8, 0.5 - 0.12 * ripe, 0.07), np.clip(0.9 * yellow, 0, 1))
        skin *= 1 - 0.75 * np.exp(-((angle / 0.17) ** 2))  # dark at the dimple's bottom
        gloss, shine, sheen = 0.9, 90, 0.12
    else:
        bend = np.arcsin(np.minimum(radius, 1)) / np.maximum(radius, 1e-6)  # flat skin to ball
        side = pores.shape[-1]
        u = (side / 4 * (bend * x + 9 + 9 * chance[3])).astype(int) % side
        v = (side / 4 * (bend * y + 9 + 9 * chance[4])).astype(int) % side
        normal[:2] -= 0.1 * pores[:, v, u]
        rays = np.cos(5 * turn + 6.3 * chance[3])
        star = np.exp(-((angle / 0.3) ** 2)) * (0.5 + 0.5 * rays)
        skin = color_of(0.95, 0.4 - 0.17 * ripe, 0.012) * (1 - 0.4 * star)
        skin = mix(skin, color_of(0.75, 0.5, 0.06), 0.35 * np.exp(-((angle / 0.35) ** 2)))
        navel = (0.13 + 0.03 * rays - angle) * sharp + 0.5
        skin = mix(skin, color_of(0.16, 0.2, 0.05), np.clip(navel, 0, 1))
        gloss, shine, sheen = 0.22, 22, 0.05
    normal /= np.sqrt((normal**2).sum(0))

    # A wide lamp, the sky, what the ground throws back; then highlight and rim on top of it.
    lamp = np.clip(0.88 * (light @ normal) + 0.12, 0, None)
    up = 0.5 - 0.5 * normal[1]
    open_sky = 1 - 0.6 * np.clip((y - 0.45) / 0.55, 0, 1) ** 2  # less near the ground
    glare = unit(light[0], light[1], light[2] + 1) @ normal - 1  # 0 where the lamp is mirrored
    color = skin * (1.05 * lamp + 0.3 * up * open_sky)
    color += skin * (0.3 * ground[:, None]) * ((1 - up) * open_sky)
    rim = sheen * (1 - z) ** 2 * (1 - z) * open_sky
    color += gloss * np.exp(shine * glare) + 0.5 * sheen * np.exp(9 * glare) + rim
    alpha = np.clip((1 - radius) * sharp + 0.5, 0, 1)

    def strip(direction: float, length: float, bend: float) -> tuple[np.ndarray, np.ndarray]:
        """How far along (0 to 1) and beside a bent strip from the pole each sample lies."""
        dx, dy = x - 0.97 * pole[0], y - 0.97 * pole[1]
        along = (dx * np.sin(direction) - dy * np.cos(direction)) / length
        return along, dx * np.cos(direction) + dy * np.sin(direction) - bend * along**2

    parts = []
    if chance[5] < 0.5:  # a leaf, the same on both fruits
        side = 1 if chance[6] < 0.5 else -1
        along, beside = strip(side * (0.9 + 0.5 * chance[7]), 0.75, 0.12)
        half = 0.19 * np.sqrt(np.clip(4 * along * (1 - along), 0, 1)) * (1 - 0.4 * along)
        lit = 0.55 + 0.5 * np.clip(0.5 + 2.2 * beside * np.sign(light[0]), 0, 1)
        ribs = 0.4 * np.exp(2 * np.cos(68 * (along - 1.2 * np.abs(beside))) - 2)
        lit *= 1.1 + 0.45 * (np.exp(-((beside / 0.018) ** 2)) + ribs)
        parts.append((color_of(0.07, 0.22 + 0.08 * chance[8], 0.03), along, beside, half, lit))
    if fruit == "apple":
        along, beside = strip(0.8 * lean, 0.5, 0.2 * (chance[9] - 0.5))
        half = 0.045 + 0.03 * np.clip(along, 0, 1) ** 2
        lit = 0.9 + 0.45 * np.clip(beside / half * np.sign(light[0]), -1, 1)
        parts.append((color_of(0.2, 0.11, 0.045), along, beside, half, lit))
    for tone, along, beside, half, lit in parts:
        cover = np.clip((half - np.abs(beside)) * sharp + 0.5, 0, 1)
        cover *= np.clip(along * sharp, 0, 1) * np.clip((1 - along) * sharp * 0.5, 0, 1)
        color, alpha = mix(color, tone * lit, cover), np.maximum(alpha, cover)

    layer = np.zeros((4, *near.shape), np.float32)
    layer[:, near] = np.concatenate((color * alpha, alpha[None]))
    height, width = bottom - top, right - left
    layer = layer.reshape(4, height, SUPERSAMPLE, width, SUPERSAMPLE).mean((2, 4))
    layer = layer.transpose(1, 2, 0)  # (h, w, 4): color times cover, cover
    under = picture[top:bottom, left:right]
    under[:] = under * (1 - layer[..., 3:]) + layer[..., :3]


def pore_slopes(side: int = 256) -> np.ndarray:
    """The slopes of a tileable skin of small bumps in no order: (2, side, side), x and y."""
    frequency = side * np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    noise = np.fft.fft2(np.random.default_rng(7).standard_normal((side, side)))
    height = np.fft.ifft2(noise * np.exp(-(((frequency - 40) / 12) ** 2))).real  # one size of bump
    slopes = [np.roll(height, -1, axis) - np.roll(height, 1, axis) for axis in (1, 0)]
    return (np.stack(slopes) / height.std()).astype(np.float32)


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def unit(*values: float) -> np.ndarray:
    return vector(*values) / np.linalg.norm(values)


def color_of(red: float, green: float, blue: float) -> np.ndarray:
    """A color in linear light that broadcasts over samples, (3, 1)."""
    return vector(red, green, blue)[:, None]


def mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`a` (3, N) where weight (N,) is 0, `b` where it is 1."""
    return a + (b - a) * weight
