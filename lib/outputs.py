"""What test.py leaves behind: translations, pictures to compare, and which file is from which.

The last is `outputs/index.csv`.
"""

import contextlib
import csv
import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import datasets
import utils
from lib import formats
from utils import UserError

LONGEST_NAME = 255  # bytes; the limit of common file systems
SHOWN = 2048  # pixels of the longer side of a picture in a comparison


class Translation(NamedTuple):
    """A file that test.py wrote, and what it was made from: a row of `outputs/index.csv`."""

    direction: str  # of the generator: A2B or B2A
    source: str  # path
    output: str  # path in outputs/
    truth: str  # path of what the output should look like, where names match; else ""


def plan(
    direction: str, folder: Path, pairs: list[tuple], channels: int, in_units: bool
) -> list[Translation]:
    """Return the rows of pictures below `folder`, each of them with its ground truth or None.

    `channels` are those of the translations, `in_units` says whether these are in units.
    """
    names = [path.relative_to(folder).as_posix() for path, _ in pairs]
    suffixes = [formats.output_suffix(path, channels, in_units) for path, _ in pairs]
    rows = []
    for (path, truth), name in zip(pairs, output_names(names, suffixes), strict=True):
        known = str(truth.absolute()) if truth else ""
        rows.append(Translation(direction, str(path.absolute()), f"{direction[-1]}/{name}", known))
    return rows


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


def save_comparison(folder: Path, row: Translation, *pictures: np.ndarray) -> None:
    """Save pictures (H, W, C) side by side in `folder`, under the row's name."""
    utils.save_picture(folder / comparison_name(row), side_by_side(*pictures))


def side_by_side(*pictures: np.ndarray) -> Image.Image:
    """Return (H, W, C) pictures, of any C, as one RGB image: in the size of the first, or SHOWN."""
    parts = []
    for picture in pictures:
        image = datasets.to_rgb(datasets.resize(picture, pictures[0].shape[1::-1]))
        image.thumbnail((SHOWN, SHOWN))  # only ever smaller
        parts.append(np.asarray(image))
    return Image.fromarray(np.hstack(parts))
