"""What test.py, training and the tools share: find pictures, translate them, write them.

`outputs/index.csv` says which file test.py made from which.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import datasets
import utils
from lib import devices, formats, tiling
from lib.weights import OnnxGenerator
from models import translate
from utils import UserError

WORKERS = 4  # threads that decode and save while the network computes
LONGEST_NAME = 255  # bytes; the limit of common file systems
SHOWN = 2048  # pixels of the longer side of a picture in a comparison

# ------------------------------------------------------------------------------------------------
# A run's weights and pictures


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say which generators to use."""
    group = parser.add_argument_group("model")
    utils.add_workdir(group)
    group.add_argument("--models", type=Path, metavar="DIR", help="folder of weights (models/)")
    group.add_argument("--last", action="store_true", help="the last weights, not their average")
    return group


def read_options(models: Path) -> dict:
    """Return the options of a run, from `models/options.json`; empty for weights from elsewhere.

    Raises:
        UserError: the file is damaged.
    """
    path = models / "options.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and give --dataroot") from error


def find_weights(models: Path, name: str, last: bool) -> Path:
    """Return the file of a generator's moving average if there is one, unless `last` is asked."""
    average = models / f"{name}_ema.pth"
    return models / f"{name}.pth" if last or not average.exists() else average


def swap(letters: str, options: dict) -> str:
    """Return the folders' letters for a run's, or the reverse: `--direction BtoA` swaps A and B."""
    swapped = options.get("direction") == "BtoA"
    return letters.translate(str.maketrans("AB", "BA")) if swapped else letters


def domain_names(options: dict) -> dict[str, str]:
    """Return what A and B are called: a data set named apple2orange tells it."""
    A, _, B = Path(str(options.get("dataroot", ""))).name.partition("2")
    names = (A, B) if A.isalpha() and B else ("A", "B")
    return dict(zip(swap("AB", options), names, strict=True))


def find_split(dataroot: Path, split: str, domain: str, options: dict) -> Path:
    """Return the folder of a run's domain A or B in a split (train, val, test); see datasets."""
    return datasets.find_split(dataroot, split + swap(domain, options))


def find_pairs(source: Path, target: Path) -> list[tuple[Path, Path | None]]:
    """Return each picture in folder `source`, and its ground truth in `target` or None.

    Names match but for the ending and a last _A or _B (as in the maps and facades sets).
    """
    key = lambda name: re.sub("_[AB]$", "", name.rpartition(".")[0])
    truths = {key(name): target / name for name in datasets.list_images(target)}
    return [(source / name, truths.get(key(name))) for name in datasets.list_images(source)]


def find_ranges(options: dict, direction: str, net=None) -> tuple[tuple | None, tuple | None]:
    """Return the ranges of source and target by a run's options or an ONNX file; None: unknown."""
    ranges = [options.get(f"range_{domain}") for domain in (direction[0], direction[-1])]
    own = net.ranges if isinstance(net, OnnxGenerator) else (None, None)
    return tuple(tuple(a) if a else b for a, b in zip(ranges, own, strict=True))


# ------------------------------------------------------------------------------------------------
# Translating files


def prepare(
    path: Path,
    channels: int,
    options: dict,
    limits: tuple | None = None,
    size: int | None = None,
) -> np.ndarray:
    """Decode a picture, (H, W, channels), and resize it; see datasets.load_image and `fit`."""
    picture = datasets.load_image(path, channels, limits, axis=options.get("axis", -1))
    return fit(picture, options, size)


def fit(picture: np.ndarray, options: dict, size: int | None) -> np.ndarray:
    """Resize a decoded picture to the scale it is to be translated at.

    `size` makes the shorter side that long; 0 leaves the picture as it is; None does what training
    did, without crop and flip (`options` are the run's; without any the picture is left as it is).
    """
    height, width = picture.shape[:2]
    preprocess = options.get("preprocess", "none") if size is None else "none"
    if size:
        scale = size / min(height, width)
        width, height = round(width * scale), round(height * scale)
    elif preprocess == "resize_and_crop":
        width = height = options["size"]
    elif preprocess.startswith("scale_width"):
        width, height = options["load_size"], round(height * options["load_size"] / width)
    return datasets.resize(picture, (width, max(1, height)))


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


def translate_array(
    net,
    array: np.ndarray,
    value_range: tuple[float, float] | None = None,
    target_range: tuple[float, float] | None = None,
    tile: int = 0,
    dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Translate one picture (H, W, input_nc) of any type; returns (H, W, output_nc) of that type.

    `net` comes from lib.weights. `value_range` (low, high) are the values that the
    network has as -1 and 1; None: the whole range of an integer type. Those of the result are in
    `target_range`, None: the same; integers are rounded and clipped. `tile`: go through the network
    by tiles of so many pixels, with the same result in bounded memory (lib/tiling.py). `dtype` is
    the autocast precision, None for float32. Many threads may call it with one network at once.

    Raises:
        ValueError: floats and no `value_range`, or not the channels of the network.
    """
    value_range = value_range or formats.integer_limits(array.dtype)
    if value_range is None or array.ndim != 3 or array.shape[2] != net.input_nc:
        raise ValueError(
            f"{array.dtype} of shape {array.shape}: give (H, W, {net.input_nc}), of floats with "
            "their value_range"
        )
    x = formats.to_unit(array, value_range)
    on_cpu = isinstance(net, OnnxGenerator)
    device = torch.device("cpu") if on_cpu else next(net.parameters()).device
    (y,) = translate_batch(net, [x], device, dtype, np.float32, tile=tile)
    values = formats.from_unit(y, target_range or value_range, array)
    return formats.to_stored(values, array.dtype)


def translate_batch(
    net,
    pictures: list[np.ndarray],
    device,
    dtype,
    kind: type | None = None,
    joint: bool = False,
    views: int = 1,
    tile: int | None = None,
    **scratch: Path | None,
) -> list[np.ndarray]:
    """Translate pictures of one size, (H, W, input_nc) -> (H, W, output_nc) each.

    The type of the results is `kind`; None: that of the pictures, but for colors, which are saved
    with 8 bits. With `joint` all share the statistics of instance norm, as if they were one
    picture. `views` is how many views of each are translated and averaged (self-ensemble, Lim et
    al. 2017, section 3.3): 2, its mirror image too; 8, quarter turns of both too. `tile` is 0 for
    one whole batch, the size of the tiles that they go through the network in, or None: tiles only
    if the batch would not fit into memory. For `scratch` see `tiling.translate_pictures`.
    """
    shared = share_norm(net) if joint else net
    if kind is None:
        colors = net.output_nc in (3, 4) and pictures[0].dtype != np.float32
        kind = np.uint8 if colors else pictures[0].dtype
    if views > 1:
        how, means = {"joint": joint, "tile": tile, **scratch}, [0.0] * len(pictures)
        for mirror, turns in itertools.product((1, -1), range(max(1, views // 2))):
            turned = [np.rot90(picture[:, ::mirror], turns) for picture in pictures]
            fakes = translate_batch(net, turned, device, dtype, np.float32, **how)
            fakes = [np.rot90(fake, -turns)[:, ::mirror] / views for fake in fakes]
            means = [mean + fake for mean, fake in zip(means, fakes, strict=True)]
        return [datasets.to_array(datasets.to_tensor(mean), kind) for mean in means]
    if tile := tiling.pick_tile(net, pictures, dtype, tile):
        groups = [pictures] if joint else [[picture] for picture in pictures]
        fakes = [tiling.translate_pictures(net, g, kind, tile, dtype, **scratch) for g in groups]
        return list(itertools.chain(*fakes))
    x = torch.stack([datasets.to_tensor(picture) for picture in pictures]).to(device)
    x = x.contiguous(memory_format=devices.memory_layout(device))  # (N, input_nc, H, W)
    return [datasets.to_array(y, kind) for y in translate(shared, x, dtype)]


def translate_files(
    net, paths: list[Path], load: Callable, batch_size: int, device, dtype, **tiles
) -> Iterator[tuple]:
    """Yield (index, source, translation) for each path, or (index, reason, None) if unreadable.

    `load` decodes a path. Decoding goes on in threads while the network computes; pictures of one
    size that follow each other go through it as a batch. For `tiles` see `translate_batch`.
    """

    def attempt(path: Path) -> np.ndarray | str:
        try:
            return load(path)
        except datasets.UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        ahead = pool.map(attempt, paths[:batch_size])
        for start in range(0, len(paths), batch_size):
            i, pictures, end = start, list(ahead), start + batch_size
            ahead = pool.map(attempt, paths[end : end + batch_size])  # while the network computes
            for shape, group in itertools.groupby(pictures, np.shape):  # () if unreadable
                batch = list(group)
                fakes = [None] * len(batch)
                if shape:
                    fakes = translate_batch(net, batch, device, dtype, **tiles)
                yield from zip(itertools.count(i), batch, fakes)
                i += len(batch)


def load_truth(
    path: str | Path | None, fake: np.ndarray, limits: tuple | None = None
) -> np.ndarray | None:
    """Return a ground truth in the size of its translation; None: there is none that can be read.

    (Where it is itself a source, that is reported.)
    """
    with contextlib.suppress(datasets.UnreadableImage):
        if path:
            truth = datasets.load_image(Path(path), fake.shape[2], limits)
            return datasets.resize(truth, fake.shape[1::-1])
    return None


def side_by_side(*pictures: np.ndarray) -> Image.Image:
    """Return (H, W, C) pictures, of any C, as one RGB image: in the size of the first, or SHOWN."""
    parts = []
    for picture in pictures:
        image = datasets.to_rgb(datasets.resize(picture, pictures[0].shape[1::-1]))
        image.thumbnail((SHOWN, SHOWN))  # only ever smaller
        parts.append(np.asarray(image))
    return Image.fromarray(np.hstack(parts))


# ------------------------------------------------------------------------------------------------
# outputs/index.csv


class Translation(NamedTuple):
    """A file that test.py wrote, and what it was made from: a row of `outputs/index.csv`."""

    direction: str  # of the generator: A2B or B2A
    source: str  # path
    output: str  # path in outputs/
    truth: str  # path of what the output should look like, where names match; else ""


def comparison_name(row: Translation) -> str:
    """Return the name of a row's comparison picture in `result/` and in `outputs/cycle/`."""
    stem = row.output.partition("/")[2].rpartition(".")[0]
    return shorten(stem.replace("/", "_"), ".png", f"{row.direction}_")


def output_names(names: list[str], suffixes: list[str] | None = None) -> list[str]:
    """Return one output name for each source name, all different even where letter case is ignored.

    "a.jpg" becomes "a.png" (or has another suffix, one for each name in `suffixes`); if "a.png" is
    there too, that becomes "a_png.png". Names too long for the file system are cut and end in a
    hash.
    """
    suffixes = suffixes or [".png"] * len(names)
    taken: set[str] = set()
    outputs = []
    for name, suffix in zip(names, suffixes, strict=True):
        stem, extension = formats.split_suffix(name)
        candidate, number = stem, 1
        while (output := shorten(candidate, suffix)).lower() in taken:
            candidate = f"{stem}_{extension[1:]}" + (f"_{number}" if number > 1 else "")
            number += 1
        taken.add(output.lower())
        outputs.append(output)
    return outputs


def shorten(stem: str, suffix: str, prefix: str = "") -> str:
    """Return `prefix + stem + suffix` with the last part cut to what a file system allows."""
    folder, _, last = stem.rpartition("/")
    name = f"{prefix}{last}{suffix}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        mark = "~" + hashlib.sha256(os.fsencode(last)).hexdigest()[:8]
        room = LONGEST_NAME - len(os.fsencode(prefix + mark + suffix))
        name = f"{prefix}{os.fsencode(last)[:room].decode('utf-8', 'ignore')}{mark}{suffix}"
    return f"{folder}/{name}" if folder else name


def write_index(workdir: Path, rows: list[Translation], directions: list[str]) -> None:
    """Write the rows of these directions to `outputs/index.csv`; those of the other one stay."""
    with contextlib.suppress(UserError):  # a damaged index is replaced
        rows = [row for row in read_index(workdir) if row.direction not in directions] + rows
    text = io.StringIO(newline="")
    csv.writer(text).writerows([Translation._fields, *rows])
    with utils.atomic_write(workdir / "outputs" / "index.csv") as file:
        file.write(os.fsencode(text.getvalue()))


def read_index(workdir: Path) -> list[Translation]:
    """Return the rows of `outputs/index.csv`; none if test.py has not run yet.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / "outputs" / "index.csv"
    try:
        text = os.fsdecode(path.read_bytes()) if path.exists() else ""
        return [Translation(*row) for row in csv.reader(io.StringIO(text, newline=""))][1:]
    except (OSError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): run `python test.py` again") from error
