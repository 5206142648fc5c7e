"""Translate files that hold units or many pictures: volumes, DICOM series, rasters, films."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import datasets
from lib import dicom, formats, norms, rasters, tiling, units
from lib import translation as tr
from lib.films import Film
from lib.outputs import Translation, save_comparison
from lib.units import Pictures, UnreadableImage
from utils import UserError

# ------------------------------------------------------------------------------------------------
# Options of test.py

KEPT = ("range_A", "range_B", "axis")  # options of the run, which those of test.py override


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for volumes, rasters, films."""
    group = parser.add_argument_group("volumes, rasters, films")
    for domain in "AB":
        text = f"values of {domain} that become -1 and 1 (the run's)"
        pair = {"type": float, "nargs": 2, "metavar": ("LO", "HI")}
        group.add_argument(f"--range_{domain}", help=text, **pair)
    text = "axis of a volume that its slices are cut across (the run's, else the last)"
    group.add_argument("--axis", type=int, choices=[-1, 0, 1, 2], help=text)
    text = "all slices of a volume share the statistics of instance norm"
    group.add_argument("--volume_norm", action="store_true", help=text)
    text = "films: share of these statistics that is kept from frame to frame (0; try 0.9)"
    group.add_argument("--smooth", type=float, default=0.0, help=text)
    text = "films: the source and its translation in one film"
    group.add_argument("--side_by_side", action="store_true", help=text)


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError if an option is out of range."""
    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth is {args.smooth}, but must be at least 0 and below 1")
    if args.smooth and (args.tile or args.views > 1):
        raise UserError("--smooth takes each frame through once: leave out --tile and --views")
    for name in ("range_A", "range_B"):
        limits = vars(args)[name]
        if limits and not limits[0] < limits[1]:
            raise UserError(f"--{name} {limits[0]:g} {limits[1]:g}: LO must be below HI")


# ------------------------------------------------------------------------------------------------
# One file, or one series


def translate_pictures(
    net, source: Pictures, limits: tuple, fit: Callable, batch_size: int, **how
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each picture of a file and its translation, (H, W, C), both in their units.

    `limits` of the source and of the target are what the network has as -1 and 1; `fit` resizes a
    picture to what is to be translated; translations have the size of their picture again, but
    for those of films. Decoding goes on in a thread while the network computes. For `how`
    see `tr.translate_batch`.
    """
    pictures = iter(source)

    def load() -> list[tuple[np.ndarray, np.ndarray]]:
        batch = itertools.islice(pictures, batch_size)
        return [(picture, fit(units.to_unit(picture, limits[0]))) for picture in batch]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load)
        while batch := ahead.result():
            ahead = pool.submit(load)
            for _, group in itertools.groupby(batch, lambda pair: pair[1].shape):
                shown, inputs = zip(*group, strict=True)
                fakes = tr.translate_batch(net, inputs, kind=np.float32, **how)
                for picture, fake in zip(shown, fakes, strict=True):  # (h, w, C) in [-1, 1]
                    if not isinstance(source, Film):
                        fake = datasets.resize(fake, picture.shape[1::-1])
                    yield picture, units.from_unit(fake, limits[1], picture)


def translate_windows(
    net, source: Pictures, output: Path, limits: tuple, stored: tuple | None, note: str, **how
) -> tuple[np.ndarray, np.ndarray]:
    """Translate a raster of any size to `output` by tiles, of which none but a few are in memory.

    Returns a window of the source and of its translation, to show.
    """
    view = rasters.Windows(source, limits[0], net.input_nc)
    shape = (*view.shape[:2], net.output_nc)
    # not compressed: a block that is written in parts would be stored again each time
    with rasters.create_raster(output, source, shape, stored, note, None) as target:
        result = rasters.Windows(source, limits[1], net.output_nc, target)
        tiling.translate_pictures(net, [view], np.float32, targets=[result], **how)
    middle = tuple(slice(n // 2 - min(n // 2, 256), n // 2 + 256) for n in shape[:2])
    fake = formats.read(output)
    return view[middle], units.to_unit(fake.get(0, middle), limits[1])


def translate_stack(
    args, paths: list[Path], outputs: list[Path], net, ranges: tuple, options: dict, note: str,
    how: dict,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Translate one file, or one DICOM series, to `outputs`; a source and its translation to show.

    `args` are the options of test.py, `options` those of the run, `ranges` those of source and
    target, or None; `note` is kept in the file; for `how` see `tr.translate_batch`.

    Raises:
        UnreadableImage: a picture of it cannot be decoded, or is of other channels.
        UserError: floats, and no range.
    """
    source = formats.read(paths, net.input_nc, options.get("axis", -1))
    fit = lambda picture: tr.fit(picture, options, args.size)
    film = isinstance(source, Film)
    if film and net.output_nc not in (1, 3):
        raise UnreadableImage(f"a film cannot have the {net.output_nc} channels of the network")
    low, high = (source.limits, None) if film else (ranges[0] or source.limits, ranges[1])
    if low is None:
        raise formats.ask_for_range(paths[0])
    limits, batch_size = (low, high or low), args.batch_size
    if film and args.smooth:
        net, batch_size, how = norms.share_norm(net, args.smooth), 1, how | {"tile": 0}
    elif args.volume_norm and len(source) > 1 and not film:
        batch_size, how = len(source), how | {"joint": True}
    elif "raster" in source.geometry and args.size == 0:
        view = rasters.Windows(source, low, net.input_nc)
        if tile := tiling.pick_tile(net, [view], how["dtype"], how["tile"]):
            if args.views > 1:
                raise UserError(f"{paths[0]} goes through the network by tiles: leave out --views")
            how = {name: how[name] for name in ("dtype", "scratch", "fallback")} | {"tile": tile}
            return translate_windows(net, source, outputs[0], limits, high, note, **how)
    shown = []

    def translations() -> Iterator[np.ndarray]:
        pairs = translate_pictures(net, source, limits, fit, batch_size, **how)
        for i, (picture, fake) in enumerate(pairs):
            if i == len(source) // 2 or not shown:
                shown[:] = units.to_unit(picture, low), units.to_unit(fake, limits[1])
            if film and args.side_by_side:
                left = fit(picture)
                fake = np.hstack([left, np.broadcast_to(fake, left.shape)])
            yield fake

    formats.write(outputs, source, translations(), high, note)
    return shown[0], shown[1]


def group_rows(rows: list[Translation]) -> list[list[Translation]]:
    """The rows of each file, those of one DICOM series together."""
    of = {Path(row.source): row for row in rows}
    return [[of[path] for path in paths] for paths in dicom.group_series(list(of))]


def translate_stacks(
    args, groups: list[list[Translation]], compared: list, bar: str | None, *common
) -> dict[Translation, str]:
    """Translate the groups' files, and write pictures to compare of those that are in `compared`.

    For `common` see `translate_stack`. Returns why some sources could not be read.
    """
    failed = {}
    for group in tqdm(groups, bar, disable=bar is None or not groups):
        outputs = [args.workdir / "outputs" / row.output for row in group]
        try:
            paths = [Path(row.source) for row in group]
            source, fake = translate_stack(args, paths, outputs, *common)
        except UnreadableImage as error:
            failed.update(dict.fromkeys(group, str(error)))
            continue
        if group[0] in compared:
            save_comparison(args.workdir / "result", group[0], fake, source)
    return failed
