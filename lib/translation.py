"""What test.py, training and the tools share: find a run's weights and pictures, translate them."""

import argparse
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import datasets
import utils
from lib import devices, norms, tiling, units
from lib.weights import OnnxGenerator
from models import translate
from utils import UserError

WORKERS = 4  # threads that decode and save while the network computes

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


def find_root(dataroot: Path | None, options: dict) -> Path:
    """Return the data set that is asked for, else that of the run."""
    return dataroot or Path(options.get("dataroot", "dataset/apple2orange"))


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
    path: Path, channels: int, options: dict, limits: tuple | None = None, size: int | None = None
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
    value_range = value_range or units.integer_limits(array.dtype)
    if value_range is None or array.ndim != 3 or array.shape[2] != net.input_nc:
        raise ValueError(
            f"{array.dtype} of shape {array.shape}: give (H, W, {net.input_nc}), of floats with "
            "their value_range"
        )
    x = units.to_unit(array, value_range)
    on_cpu = isinstance(net, OnnxGenerator)
    device = torch.device("cpu") if on_cpu else next(net.parameters()).device
    (y,) = translate_batch(net, [x], device, dtype, np.float32, tile=tile)
    values = units.from_unit(y, target_range or value_range, array)
    return units.to_stored(values, array.dtype)


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
    al. 2017, section 3.3): 2, its mirror image too; 8, quarter turns of both too, and of each value
    the mean of the middle four. `tile` is 0 for one whole batch, the size of the tiles that they go
    through the network in, or None: tiles only if the batch would not fit into memory. For
    `scratch` see `tiling.translate_pictures`.
    """
    shared = norms.share_norm(net) if joint else net
    if kind is None:
        colors = net.output_nc in (3, 4) and pictures[0].dtype != np.float32
        kind = np.uint8 if colors else pictures[0].dtype
    if views > 1:
        how, made = {"joint": joint, "tile": tile, **scratch}, []
        for mirror, turns in itertools.product((1, -1), range(max(1, views // 2))):
            turned = [np.rot90(picture[:, ::mirror], turns) for picture in pictures]
            fakes = translate_batch(net, turned, device, dtype, np.float32, **how)
            made.append([np.rot90(fake, -turns)[:, ::mirror] for fake in fakes])
        middle = slice(views // 4, views - views // 4)  # outliers are no part of the mean
        results = []
        for fakes in zip(*made, strict=True):
            rows = zip(*fakes, strict=True)  # row by row, so that no second copy is in memory
            mean = np.stack([np.sort(row, axis=0)[middle].mean(0) for row in rows])  # (H, W, C)
            results.append(datasets.to_array(datasets.to_tensor(mean), kind))
        return results
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
