"""Translate a picture of any size in bounded memory, with the result of the whole-picture pass.

Tiles that each go through the whole network show seams, because instance norm would normalize each
with statistics of its own. So the picture goes through the network layer by layer instead: for each
convolution, tiles of its input are read with a border as wide as the kernel needs (3 pixels at
most), convolved, and written to the next feature map, while each channel's sum and sum of squares
are added up. When all tiles are done the statistics are those of the whole picture; norm, ReLU and
residual sum are applied when the next layer reads. No value is computed twice, and the network sees
tiles only. Feature maps lie in memory or in temporary files that have no name: the system frees
them when the process ends, however it ends. Bytes alive, in units of H W ngf values:

    layer            reads                        writes            alive
    c7s1-ngf         picture                      1                 1
    two stride-2     1, then 1/2                  1/2, then 1/4     3/2, then 3/4
    block, conv 1    sum, conv 2 of last block    sum, conv 1       4/4
    block, conv 2    conv 1                       conv 2            3/4
    two up-samplings sum, conv 2, then 1/2        1/2, then 1       1, then 3/2
    c7s1, output     1, picture                   translation       1
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
from models import Generator, ResidualBlock, UNet, mirrored
from utils import UserError

ROWS = 32  # norm and sums go through a tile in strips of so many rows, which fit into the cache
# bytes a pixel of a whole-picture pass at ngf 64, by bytes a value (measured, see docs/speed.md)
WHOLE_PASS = {Generator: {4: 940, 2: 710}, UNet: {4: 400, 2: 320}}
LAYERS = (Generator, ResidualBlock, nn.Sequential, nn.Conv2d, nn.ConvTranspose2d, nn.Upsample)
LAYERS += (nn.ReflectionPad2d, nn.InstanceNorm2d, nn.BatchNorm2d, nn.Identity, nn.ReLU, nn.Dropout)
LAYERS += (nn.Tanh,)  # what is known here
Box = tuple[int, int, int, int]  # y0, y1, x0, x1


# ------------------------------------------------------------------------------------------------
# What is stored


class FeatureMap:
    """(H, W, C) values in memory, or in a nameless file in `folder`; read and written by boxes."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None):
        self.shape, self.dtype = shape, dtype
        self.pixel = shape[2] * dtype.itemsize
        if folder is None:
            self.file, self.memory = None, np.empty((*shape[:2], self.pixel), np.uint8)
        else:
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (freed with the map)

    def read(self, box: Box) -> torch.Tensor:
        y0, y1, x0, x1 = box
        tile = torch.empty(y1 - y0, x1 - x0, self.shape[2], dtype=self.dtype)
        rows = tile.view(torch.uint8).numpy()
        if self.file is None:
            rows[...] = self.memory[y0:y1, x0:x1]
            return tile
        for y, row in enumerate(rows, y0):
            self.file.seek((y * self.shape[1] + x0) * self.pixel)
            if self.file.readinto(row) < row.nbytes:
                raise OSError("a temporary file is shorter than what was written to it")
        return tile  # (h, w, C)

    def write(self, box: Box, tile: torch.Tensor) -> None:
        y0, y1, x0, x1 = box
        tile = tile.cpu()
        if tile.stride()[1:] != (self.shape[2], 1):
            tile = tile.contiguous()
        rows = tile.view(torch.uint8).numpy()
        if self.file is None:
            self.memory[y0:y1, x0:x1] = rows
            return
        for y, row in enumerate(rows, y0):
            self.file.seek((y * self.shape[1] + x0) * self.pixel)
            self.file.write(row)


class Picture:
    """The source: any (H, W, C) array, extended to a multiple by going back and forth."""

    def __init__(self, array: np.ndarray, multiple: int):
        self.array = array
        self.rows, self.columns = (
            mirrored(n, multiple, torch.device("cpu")).numpy() for n in array.shape[:2]
        )
        self.shape = (len(self.rows), len(self.columns), array.shape[2])

    def read(self, box: Box) -> torch.Tensor:
        y, x = self.rows[box[0] : box[1]], self.columns[box[2] : box[3]]
        part = self.array[y.min() : y.max() + 1, x.min() : x.max() + 1]
        part = part[np.ix_(y - y.min(), x - x.min())]
        return datasets.to_tensor(part).permute(1, 2, 0)  # (h, w, C) in [-1, 1]


@dataclass
class Moments:
    """Sums over the pixels of each channel, about `shift` so that a large mean costs no digits."""

    n: int = 0
    shift: torch.Tensor | None = None
    sums: torch.Tensor | None = None  # (2, C): of x - shift, and of its square

    def add(self, x: torch.Tensor) -> None:
        """Take in a tile (h, w, C)."""
        for part in x.split(ROWS):
            part = part.float()
            if self.shift is None:
                self.shift, self.sums = part.mean((0, 1)), torch.zeros(2, part.shape[2]).double()
            part = part - self.shift
            sums = part.sum((0, 1)), part.square_().sum((0, 1))
            self.sums += torch.stack(sums).cpu().double()  # not every device has float64
            self.n += part.shape[0] * part.shape[1]

    def mean_var(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, square = self.sums / self.n
        var = (square - mean**2).clamp(min=0)
        return mean.float().to(self.shift.device) + self.shift, var.float().to(self.shift.device)


# ------------------------------------------------------------------------------------------------
# The network as a list of convolutions


@dataclass
class Pass:
    """A convolution, the padding or up-sampling before it, and the pointwise layers after it."""

    before: nn.Module | None
    conv: nn.Conv2d | nn.ConvTranspose2d
    after: list[nn.Module] = field(default_factory=list)
    opens: bool = False  # whether it is the first of a residual block
    closes: bool = False  # whether it is the last

    def units(self) -> tuple[int, int]:
        """How many pixels of the input, and of the output, belong together in each dimension."""
        if isinstance(self.conv, nn.ConvTranspose2d) or isinstance(self.before, nn.Upsample):
            return 1, 2
        return self.conv.stride[0], 1

    def border(self) -> tuple[int, int]:
        """How many pixels the convolution reads before and behind those of its tile."""
        if isinstance(self.conv, nn.ConvTranspose2d):
            return 0, 1  # output 2i is of input i, output 2i + 1 of inputs i and i + 1
        if isinstance(self.before, nn.Upsample):
            return 1, 1
        padding = (self.before or self.conv).padding[0]
        return padding, self.conv.kernel_size[0] - self.conv.stride[0] - padding

    def convolve(self, x: torch.Tensor, outside: tuple[int, ...]) -> torch.Tensor:
        """Convolve a tile read with its border (what is too much right and below is left on).

        `outside` is how many pixels of the border, left, right, top and bottom, are not in `x`
        because they lie outside of the picture.
        """
        if isinstance(self.conv, nn.ConvTranspose2d):
            return self.conv(x)
        if any(outside):
            reflect = isinstance(self.before, nn.ReflectionPad2d)
            x = F.pad(x, outside, "reflect" if reflect else "constant")
        if not isinstance(self.before, nn.Upsample):
            return F.conv2d(x, self.conv.weight, self.conv.bias, self.conv.stride)
        return F.conv2d(self.before(x), self.conv.weight, self.conv.bias)[:, :, 1:, 1:]


def list_passes(layers: nn.Sequential) -> list[Pass]:
    """The passes over the picture that the layers of a `Generator` need, in order."""
    passes, before = [], None
    for layer in layers:
        if isinstance(layer, ResidualBlock):
            block = list_passes(layer.conv_block)
            block[0].opens = block[-1].closes = True
            passes += block
        elif isinstance(layer, nn.ReflectionPad2d | nn.Upsample):
            before = layer
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            passes.append(Pass(before, layer))
            before = None
        else:
            passes[-1].after.append(layer)
    return passes


@dataclass
class Features:
    """What a layer reads: a stored map, the pointwise layers still to apply, what is then added."""

    stored: FeatureMap | Picture
    pointwise: list[Callable] = field(default_factory=list)
    base: "Features | None" = None

    def read(self, box: Box) -> list[torch.Tensor]:
        """Read what is stored (in a thread, beside the computing)."""
        return [self.stored.read(box), *(self.base.read(box) if self.base else [])]

    def compute(self, tiles: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        """(1, C, h, w), channels last, from what `read` gave; its first tile is overwritten."""
        x = tiles[0].to(device).permute(2, 0, 1)[None]
        base = self.base.compute(tiles[1:], device) if self.base else None
        if self.pointwise or self.base:
            for y in range(0, x.shape[2], ROWS):
                part = result = x[:, :, y : y + ROWS]
                for layer in self.pointwise:
                    result = layer(result)
                part.copy_(result if base is None else result + base[:, :, y : y + ROWS])
        return x


# ------------------------------------------------------------------------------------------------
# Running them


@dataclass
class Output:
    """Where the last convolution's tiles go: through the network's output form into `array`."""

    net: Generator
    picture: Picture
    array: np.ndarray  # (H, W, C) of uint8, uint16, or float for values in [-1, 1]

    @torch.no_grad()
    def write(self, box: Box, z: torch.Tensor) -> None:
        x = self.picture.read(box).to(z.device)
        y = self.net.output(z.permute(2, 0, 1)[None], x.permute(2, 0, 1)[None])[0].cpu()
        rows = slice(box[0], min(box[1], self.array.shape[0]))
        columns = slice(box[2], min(box[3], self.array.shape[1]))
        y = y[:, : rows.stop - rows.start, : columns.stop - columns.start]
        self.array[rows, columns] = datasets.to_array(y, self.array.dtype)


@torch.no_grad()
def translate_tiles(
    net: Generator,
    source: np.ndarray,
    target: np.ndarray,
    tile: int = 512,
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
    statistics: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Translate `source` (H, W, input_nc) into `target` (H, W, output_nc), `tile` pixels at a time.

    Both may be anything that is sliced like an array. `dtype` is the autocast precision, None for
    float32. Feature maps lie in files in `folder`, or in memory if it is None. `statistics` is the
    mean and variance of each channel for each instance norm, in their order, to be used in place
    of the picture's own; those that were used are returned.
    """
    device = next(net.parameters()).device
    picture = Picture(source, net.multiple)
    height, width = picture.shape[:2]
    passes, used = list_passes(net.model[:-1]), []
    new_map = lambda *shape: FeatureMap(shape, dtype or torch.float32, folder)
    x, block = Features(picture), None
    style = "{desc}: {percentage:.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=len(passes) + 1e-6, desc="tiles", bar_format=style, leave=False, delay=2)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, bar, autocast:
        for i, step in enumerate(passes):
            unit_in, unit_out = step.units()
            h, w = (n // unit_in for n in x.stored.shape[:2])
            # a tile holds as many values at every scale: fewer rows where there are more pixels
            rows, columns = tile // (4 * max(unit_in, unit_out)), tile * h // height
            boxes = cut(h, w, max(1, rows), max(1, columns))
            boxes = boxes[:: (-1) ** i]  # back and forth: what was written last is read first
            if step is passes[-1]:
                out = Output(net, picture, target)
            else:
                out = new_map(h * unit_out, w * unit_out, step.conv.out_channels)
            kept = new_map(*x.stored.shape) if step.opens and x.base else None
            norm = any(isinstance(layer, nn.InstanceNorm2d) for layer in step.after)
            moments = Moments() if norm and statistics is None else None
            run_pass(step, x, boxes, device, out, kept, moments, reader, writer, bar)
            if norm:
                used.append(moments.mean_var() if moments else statistics[len(used)])
            if step.opens:
                block = Features(kept) if kept else x
            x = Features(out, [apply_later(layer, used) for layer in step.after])
            if step.closes:
                x.base, block = block, None  # the maps that nothing refers to are freed
    return used


def cut(height: int, width: int, rows: int, columns: int) -> list[Box]:
    """Boxes of at most (rows, columns) that cover (height, width)."""
    corners = [(y, x) for y in range(0, height, rows) for x in range(0, width, columns)]
    return [(y, min(y + rows, height), x, min(x + columns, width)) for y, x in corners]


def apply_later(layer: nn.Module, used: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable:
    """The layer as it is, or for an instance norm one that takes the last of the statistics."""
    if not isinstance(layer, nn.InstanceNorm2d):
        return layer
    mean, var = used[-1]
    return lambda x: F.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps)


def run_pass(
    step: Pass,
    x: Features,
    boxes: list[Box],
    device: torch.device,
    out: "FeatureMap | Output",
    kept: FeatureMap | None,
    moments: Moments | None,
    reader: ThreadPoolExecutor,
    writer: ThreadPoolExecutor,
    bar: tqdm,
) -> None:
    """Convolve the tiles of `x` into `out`, and copy `x` itself to `kept`; gather the moments.

    Threads read the next tile and write the last one while this one is computed.
    """
    before, behind = step.border()
    height, width = x.stored.shape[:2]
    inputs, outputs = ([tuple(unit * v for v in box) for box in boxes] for unit in step.units())

    def load(box: Box) -> tuple[tuple[int, ...], list[torch.Tensor]]:
        y0, y1, x0, x1 = box[0] - before, box[1] + behind, box[2] - before, box[3] + behind
        inside = (max(0, y0), min(y1, height), max(0, x0), min(x1, width))
        outside = (inside[2] - x0, x1 - inside[3], inside[0] - y0, y1 - inside[1])
        return outside, x.read(inside)

    ahead, saved = reader.submit(load, inputs[0]), []
    for i, (y0, y1, x0, x1) in enumerate(inputs):
        outside, tiles = ahead.result()
        if i + 1 < len(inputs):
            ahead = reader.submit(load, inputs[i + 1])
        tile = x.compute(tiles, device)
        top, bottom, left, right = outputs[i]
        y = step.convolve(tile, outside)[0].permute(1, 2, 0)[: bottom - top, : right - left]
        if moments:
            moments.add(y)
        for future in saved:
            future.result()  # so that there is never more than one tile to write
        saved = [writer.submit(out.write, outputs[i], y)]
        if kept:
            core = tile[0].permute(1, 2, 0)[before - outside[2] :, before - outside[0] :]
            saved += [writer.submit(kept.write, inputs[i], core[: y1 - y0, : x1 - x0])]
        bar.update((y1 - y0) * (x1 - x0) / (height * width))
    for future in saved:
        future.result()


# ------------------------------------------------------------------------------------------------
# Whether and where


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for large pictures."""
    group = parser.add_argument_group("large pictures")
    text = "tiles of so many pixels, with the same result; 0: none (auto: if memory is short)"
    group.add_argument("--tile", type=read_tile, metavar="N", help=text)
    text = "put the tiles' feature maps there (memory if they fit, else outputs/)"
    group.add_argument("--scratch", type=Path, metavar="DIR", help=text)
    text = "read pictures of up to so many pixels, if you trust them (Pillow's limit)"
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
    if tile and not (
        isinstance(net, Generator) and all(isinstance(m, LAYERS) for m in net.modules())
    ):
        raise UserError(
            "the picture would have to go through this network in tiles, which only ResNet "
            "generators can (.pth, no --volume_norm or --smooth): scale it down with --size, or "
            "try --tile 0 (no tiles)"
        )
    return tile


def free_bytes(device: torch.device) -> float:
    """Free memory of a device; infinity where it is unknown."""
    if device.type != "cuda":
        return datasets.free_memory() or float("inf")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def scratch_bytes(net: Generator, height: int, width: int, dtype: torch.dtype | None) -> int:
    """What the feature maps take at most: 3/2 H W ngf values (see above)."""
    height, width = (-(-n // 4) * 4 for n in (height, width))
    return height * width * net.model[1].out_channels * (dtype or torch.float32).itemsize * 3 // 2


def translate_picture(
    net: Generator,
    picture: np.ndarray,
    kind: type,
    tile: int,
    dtype: torch.dtype | None,
    scratch: Path | None = None,
    fallback: Path | None = None,
    target: np.ndarray | None = None,
) -> np.ndarray:
    """Translate (H, W, input_nc) to (H, W, output_nc), uint8, uint16 or float32 (`kind`), by tiles.

    The result goes into `target` if that is given: anything that is sliced like an array.
    Feature maps lie in the folder `scratch` if that is given, else in memory if they take less than
    half of what is free, else in the folder `fallback` (None: the system's for temporary files).

    Raises:
        UserError: there is not enough room for them.
    """
    height, width = picture.shape[:2]
    need = scratch_bytes(net, height, width, dtype)
    if scratch is None and 2 * need > free_bytes(torch.device("cpu")):
        scratch = fallback or Path(tempfile.gettempdir())
    target = np.empty((height, width, net.output_nc), kind) if target is None else target
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(scratch).free
            if need > free:
                raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        translate_tiles(net, picture, target, tile, dtype, scratch)
    except OSError as error:
        raise UserError(
            f"{width}x{height} pixels need more scratch space than {scratch} has "
            f"({error.strerror or error}): name another folder with --scratch, or scale the "
            "picture down with --size"
        ) from error
    return target
