"""Translate pictures of any size in bounded memory, with the result of the whole-picture pass.

Tiles that each go through the whole network show seams, because instance norm would normalize each
with statistics of its own. So the picture goes through the network layer by layer instead: for each
convolution, tiles of its input are read with a border that is wider than the kernel needs,
convolved, cropped, and written to the next feature map, while each channel's mean and variance are
added up. When all tiles are done the statistics are those of the whole picture, or of all slices
of a volume; norm and ReLU are applied when the next layer reads. The network sees tiles only.
Feature maps lie in memory or in temporary files that have no name: the system frees them when the
process ends, however it ends. Bytes alive, in units of H W ngf values:

    layer            reads                        writes            alive
    c7s1-ngf         picture                      1                 1
    two stride-2     1, then 1/2                  1/2, then 1/4     3/2, then 3/4
    block, conv 1    x                            conv 1            2/4
    block, conv 2    conv 1 (x is kept)           conv 2            3/4
    block, sum       x, conv 2                    x of the next     3/4
    two up-samplings 1/4, then 1/2                1/2, then 1       3/4, then 3/2
    c7s1             1                            a few channels    1
    output           these, picture               translation       0
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
from lib import devices
from models import Generator, ResidualBlock, UNet, UpsampleConv, mirrored
from utils import UserError

ROWS = 32  # norm and sums go through a tile in strips of so many rows, which fit into the cache
# bytes a pixel of a whole-picture pass at ngf 64, by bytes a value (measured, see docs/speed.md)
WHOLE_PASS = {Generator: {4: 940, 2: 710}, UNet: {4: 400, 2: 320}}
Box = tuple[int, int, int, int]  # y0, y1, x0, x1


class FeatureMap:
    """Values (N, H, W, C) in memory, or in a nameless file in `folder`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None):
        self.shape, self.dtype = shape, dtype
        if folder is None:
            self.file, self.values = None, torch.empty(shape, dtype=dtype)
        else:
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (freed with the map)

    def rows(self, n: int, box: Box, tile: torch.Tensor) -> Iterator[np.ndarray]:
        """The bytes of each row of a contiguous tile, while the file is where that row lies."""
        _, height, width, channels = self.shape
        for y, row in enumerate(tile.view(torch.uint8).numpy(), box[0]):
            self.file.seek(((n * height + y) * width + box[2]) * channels * self.dtype.itemsize)
            yield row

    def read(self, n: int, box: Box) -> torch.Tensor:
        y0, y1, x0, x1 = box
        if self.file is None:
            return self.values[n, y0:y1, x0:x1].clone()
        tile = torch.empty(y1 - y0, x1 - x0, self.shape[3], dtype=self.dtype)
        for row in self.rows(n, box, tile):
            if self.file.readinto(row) < row.nbytes:
                raise OSError("a temporary file is shorter than what was written to it")
        return tile  # (h, w, C)

    def write(self, n: int, box: Box, tile: torch.Tensor) -> None:
        y0, y1, x0, x1 = box
        if self.file is None:
            self.values[n, y0:y1, x0:x1] = tile
            return
        tile = tile.cpu().clone(memory_format=torch.contiguous_format)  # also the strides of C = 1
        for row in self.rows(n, box, tile):
            self.file.write(row)


class Pictures:
    """Pictures (H, W, C) of one size, each anything that is sliced like an array.

    They are read as [-1, 1], extended to a multiple by going back and forth.
    """

    def __init__(self, arrays: list[np.ndarray], multiple: int):
        self.arrays, size = arrays, arrays[0].shape
        self.rows, self.columns = (
            mirrored(n, multiple, torch.device("cpu")).numpy() for n in size[:2]
        )
        self.shape = (len(arrays), len(self.rows), len(self.columns), size[2])

    def read(self, n: int, box: Box) -> torch.Tensor:
        y, x = self.rows[box[0] : box[1]], self.columns[box[2] : box[3]]
        part = self.arrays[n][y.min() : y.max() + 1, x.min() : x.max() + 1]
        part = part[np.ix_(y - y.min(), x - x.min())]
        return datasets.to_tensor(part).permute(1, 2, 0)  # (h, w, C)


class Translations:
    """Arrays (H, W, C) of one size to write values in [-1, 1] to."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.shape = arrays, (len(arrays), *arrays[0].shape)

    def write(self, n: int, box: Box, tile: torch.Tensor) -> None:
        y0, y1, x0, x1 = box
        array = self.arrays[n]
        array[y0:y1, x0:x1] = datasets.to_array(tile.permute(2, 0, 1), array.dtype)


@dataclass
class Features:
    """What a layer reads: stored values, and the pointwise layers that are still to be applied."""

    stored: FeatureMap | Pictures
    pointwise: list[Callable] = field(default_factory=list)

    def apply(self, tile: torch.Tensor) -> torch.Tensor:
        """(1, C, h, w), channels last, from a tile (h, w, C), which is overwritten."""
        x = tile.permute(2, 0, 1)[None]
        if self.pointwise:
            for part in x.split(ROWS, dim=2):
                result = part
                for layer in self.pointwise:
                    result = layer(result)
                part.copy_(result)
        return x


def add_up(tile: torch.Tensor) -> torch.Tensor:
    """Sums of x and of its square over the pixels of a tile (h, w, C): (2, C), float64."""
    sums = torch.zeros(2, tile.shape[2], dtype=torch.float64)
    for part in tile.split(ROWS):
        part = part.float()
        mean = part.mean((0, 1))  # float32 loses no digits about the mean
        var = (part - mean).square_().mean((0, 1))
        mean, var = mean.cpu().double(), var.cpu().double()  # not every device has float64
        sums += part.shape[0] * part.shape[1] * torch.stack([mean, var + mean**2])
    return sums


def make_norm(layer: nn.InstanceNorm2d, moments: torch.Tensor, device) -> Callable:
    """The instance norm of pixels whose means of x and of its square are `moments`, (2, C)."""
    mean, square = moments
    mean, var = (v.float().to(device) for v in (mean, square - mean**2))
    return lambda x: F.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)


@torch.no_grad()
def translate_tiles(
    net: Generator,
    sources: list[np.ndarray],
    targets: list[np.ndarray],
    tile: int = 512,
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
) -> None:
    """Translate `sources` (H, W, input_nc) into `targets` (H, W, output_nc) by tiles.

    Both may be anything that is sliced like an array. Several sources share the statistics of
    instance norm, as if they were one picture. A tile is about `tile` pixels wide. `dtype` is the
    autocast precision, None for float32. Feature maps lie in files in `folder`, or in memory if it
    is None.
    """
    device = next(net.parameters()).device
    pictures = Pictures(sources, net.multiple)
    (count, _, width, _), layers = pictures.shape, net.model[:-1]

    def sweep(inputs: list[Features], function: Callable, out, border=0, down=1, up=1, norm=None):
        """Write to `out` what `function` makes of the inputs' tiles, which have a border.

        `down` pixels of an input become `up` pixels of `out`. Threads read the next tile and write
        the last one while this one is computed. `norm` is the instance norm that follows.
        """
        h, w = (n // up for n in out.shape[1:3])
        # a tile holds as many values at every scale: fewer rows where there are more pixels
        rows, columns = max(1, tile // (4 * max(down, up))), max(1, tile * w // width)
        boxes = [
            (n, (y, min(y + rows, h), x, min(x + columns, w)))
            for n in range(count)
            for y in range(0, h, rows)
            for x in range(0, w, columns)
        ]

        def load(n: int, box: Box) -> tuple[tuple[int, int], list[torch.Tensor]]:
            bottom, right = inputs[0].stored.shape[1:3]
            y0, y1, x0, x1 = (down * v for v in box)
            y0, y1 = max(0, y0 - border), min(y1 + border, bottom)
            x0, x1 = max(0, x0 - border), min(x1 + border, right)
            return (y0, x0), [x.stored.read(n, (y0, y1, x0, x1)) for x in inputs]

        sums, written = 0, pool.submit(int)
        ahead = pool.submit(load, *boxes[0])
        for i, (n, box) in enumerate(boxes):
            (top, left), tiles = ahead.result()
            if i + 1 < len(boxes):
                ahead = pool.submit(load, *boxes[i + 1])
            y = function(*(x.apply(t.to(device)) for x, t in zip(inputs, tiles, strict=True)))
            y0, y1, x0, x1 = (up * v for v in box)
            top, left = (up * v // down for v in (top, left))  # y begins there
            y = y[0, :, y0 - top : y1 - top, x0 - left : x1 - left].permute(1, 2, 0)
            if norm:
                sums = sums + add_up(y)
            written.result()  # so that there is never more than one tile to write
            written = pool.submit(out.write, n, (y0, y1, x0, x1), y)
            bar.update(1 / len(boxes))
        written.result()
        pixels = count * out.shape[1] * out.shape[2]
        return Features(out, [make_norm(norm, sums / pixels, device)] if norm else [])

    def new_map(h: int, w: int, channels: int) -> FeatureMap:
        return FeatureMap((count, h, w, channels), dtype or torch.float32, folder)

    def walk(layers: nn.Sequential, x: Features) -> Features:
        core = []  # a convolution, and the padding before it
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            h, w, channels = x.stored.shape[1:]
            if isinstance(layer, ResidualBlock):
                x = sweep([x, walk(layer.conv_block, x)], torch.add, new_map(h, w, channels))
            elif isinstance(layer, nn.ReflectionPad2d):
                core.append(layer)
            elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                core.append(layer)
                up = 1 + isinstance(layer, UpsampleConv | nn.ConvTranspose2d)
                down = layer.stride[0] if up == 1 else 1
                # even, as for stride 2; the layers' own padding spoils less of it than is cropped
                border = layer.kernel_size[0] // 2 + 1
                out = new_map(h * up // down, w * up // down, layer.out_channels)
                norm = following if isinstance(following, nn.InstanceNorm2d) else None
                x = sweep([x], nn.Sequential(*core), out, border, down, up, norm)
                core, out = [], None
            elif not isinstance(layer, nn.InstanceNorm2d):
                x.pointwise.append(layer)
        return x

    convs = (nn.Conv2d, nn.ConvTranspose2d, ResidualBlock)
    total = sum(isinstance(layer, convs) for layer in layers.modules()) + 1
    style = "{desc}: {percentage:.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=total + 1e-6, desc="tiles", bar_format=style, leave=False, delay=2)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with ThreadPoolExecutor(2) as pool, bar, autocast:
        z = walk(layers, Features(pictures))
        sweep([z, Features(pictures)], net.output, Translations(targets))


# ------------------------------------------------------------------------------------------------
# Whether and where


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for large pictures."""
    group = parser.add_argument_group("large pictures")
    text = "tiles of N pixels, with the same result; 0: none (auto: if memory is short)"
    group.add_argument("--tile", type=read_tile, metavar="N", help=text)
    text = "folder of the tiles' feature maps (memory if they fit, else outputs/)"
    group.add_argument("--scratch", type=Path, metavar="DIR", help=text)
    text = "read pictures of up to N pixels, if you trust them (Pillow's limit)"
    group.add_argument("--max_pixels", type=int, metavar="N", help=text)


def read_tile(text: str) -> int | None:
    """The value of --tile; None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or 0 < int(text) < 16:
        raise argparse.ArgumentTypeError(f"{text} is not auto, 0, or at least 16")
    return int(text)


def pick_tile(
    net, pictures: list[np.ndarray], dtype: torch.dtype | None, tile: int | None = None
) -> int:
    """The size of the tiles for pictures of one size (H, W, C), 0 for a whole pass: `tile`, or if
    that is None (auto) 512 where a whole pass is estimated to take over 0.8 of the free memory.

    Raises:
        UserError: tiles are needed, but the network is no ResNet generator.
    """
    if tile is None:
        tile = 0
        if type(net) in WHOLE_PASS:
            conv = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d))
            pixels = len(pictures) * pictures[0].shape[0] * pictures[0].shape[1]
            peak = pixels * WHOLE_PASS[type(net)][(dtype or torch.float32).itemsize]
            if peak * conv.out_channels / 64 > 0.8 * free_bytes(conv.weight.device):
                tile = 512
    if tile and not isinstance(net, Generator):
        raise UserError(
            "the picture would have to go through this network in tiles, which only ResNet "
            "generators can (.pth): scale it down with --size, or try --tile 0 (no tiles)"
        )
    return tile


def free_bytes(device: torch.device) -> float:
    """Free memory of a device; infinity where it is unknown."""
    if device.type != "cuda":
        return devices.free_memory() or float("inf")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def scratch_bytes(net: Generator, shape: tuple[int, ...], dtype: torch.dtype | None) -> int:
    """What the feature maps of pictures (N, H, W) take at most (see above)."""
    n, height, width = shape
    height, width = (max(8, -(-n // 4) * 4) for n in (height, width))
    first, last = net.model[1].out_channels, net.model[-2].out_channels
    values = max(first * 3 // 2, first + last)
    return n * height * width * values * (dtype or torch.float32).itemsize


def translate_pictures(
    net: Generator,
    pictures: list[np.ndarray],
    kind: type,
    tile: int,
    dtype: torch.dtype | None,
    scratch: Path | None = None,
    fallback: Path | None = None,
    targets: list[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Translate (H, W, input_nc) to (H, W, output_nc), uint8, uint16 or float32 (`kind`), by tiles.

    All have one size, and share the statistics of instance norm. The results go into `targets` if
    they are given: anything that is sliced like an array. Feature maps lie in the folder `scratch`
    if that is given, else in memory if they take less than half of what is free, else in the folder
    `fallback` (None: the system's for temporary files).

    Raises:
        UserError: there is not enough room for them.
    """
    height, width = pictures[0].shape[:2]
    need = scratch_bytes(net, (len(pictures), height, width), dtype)
    if scratch is None and 2 * need > free_bytes(torch.device("cpu")):
        scratch = fallback or Path(tempfile.gettempdir())
    targets = targets or [np.empty((height, width, net.output_nc), kind) for _ in pictures]
    training = net.training  # dropout and batch statistics are for training alone
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(scratch).free
            if need > free:
                raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        translate_tiles(net.eval(), pictures, targets, tile, dtype, scratch)
    except OSError as error:
        raise UserError(
            f"{width}x{height} pixels need more scratch space than {scratch} has "
            f"({error.strerror or error}): name another folder with --scratch, or scale the "
            "picture down with --size"
        ) from error
    finally:
        net.train(training)
    return targets
