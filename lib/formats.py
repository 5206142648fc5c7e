"""The kinds of files: pictures, NIfTI and DICOM volumes, GeoTIFF rasters, films.

`read(paths)` gives the pictures of a file one at a time, in the file's own units and with its
geometry; `write(paths, source, pictures, ...)` puts translated pictures where the source lies.
One pair of functions a format, found by suffix in READERS and WRITERS; those of the formats that
need a library are in rooms of their own, and import it where it is used.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib import units
from lib.dicom import is_dicom, read_dicom, write_dicom
from lib.films import read_film, write_film
from lib.nifti import read_nifti, write_nifti
from lib.rasters import is_raster, read_raster, write_raster
from lib.units import Pictures, UnreadableImage
from utils import UserError, atomic_write

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
UNITS = (".npy", ".tif", ".tiff", ".nii", ".nii.gz", ".dcm")  # what may hold more than gray levels
FILMS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
STACKED = (".nii", ".nii.gz", ".dcm", ".tif", ".mp4")  # outputs that are no plain pictures
PILLOW = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")  # whatever the extension says

# ------------------------------------------------------------------------------------------------
# Pictures of 8 bits, 16 bits of gray, and .npy arrays


def read_picture(paths: list[Path], channels: int, axis: int) -> Pictures:
    """A file of one picture, uint8, or uint16 if `channels` is 1 and the file is.

    1 channel is gray, 3 are RGB, 4 RGBA. EXIF orientation is applied, alpha composited over white;
    gray, palette, CMYK and 16-bit files are converted. Any other number of channels is read from
    .npy files of shape (H, W, channels): uint8, uint16, or floats, as float32.
    """
    (path,), channels = paths, channels or 3
    if path.suffix.lower() == ".npy":
        picture = check_array(np.load(path, allow_pickle=False, mmap_mode="r"), channels)
    else:
        with Image.open(path, formats=PILLOW) as image:  # other formats, as EPS, start programs
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is {units.TOO_LARGE}")
            ImageOps.exif_transpose(image, in_place=True)
            picture = convert(image, channels)
    limits = units.integer_limits(picture.dtype)
    return Pictures(paths, 1, picture.dtype, lambda i: picture, limits)


def check_array(picture: np.ndarray, channels: int) -> np.ndarray:
    """A copy of an array from a file; ValueError if it is no picture of that many channels."""
    picture = picture[..., None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[2] != channels or not picture.size:
        raise ValueError(f"its shape is {picture.shape}, not (H, W, {channels})")
    if picture.size // channels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its shape {picture.shape} is {units.TOO_LARGE}")
    if picture.dtype.kind == "f":
        return np.array(picture, np.float32)
    if picture.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"it holds {picture.dtype}, not uint8, uint16 or floats")
    if picture.dtype == np.uint16 and channels in (3, 4):  # as from any other file in color
        return (picture >> 8).astype(np.uint8)
    return np.array(picture, picture.dtype.newbyteorder("="))


def convert(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels (H, W, channels) of an open image; ValueError if they cannot be had."""
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ValueError(f"only .npy files can have {channels} channels")
    if image.mode == "F":
        raise ValueError("it holds floating-point values: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 or 32 bits of gray
        gray = np.asarray(image)  # (H, W)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"its values, {gray.min()} to {gray.max()}, do not fit 16 bits")
        if channels == 1:
            return gray.astype(np.uint16)[..., None]
        image = Image.fromarray((gray >> 8).astype(np.uint8))
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == modes[channels] else image.convert(modes[channels])
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for y in range(0, image.height, 256):  # strips: Pillow's way to an array takes two more copies
        strip = image.crop((0, y, image.width, min(y + 256, image.height)))
        pixels[y : y + 256] = np.atleast_3d(strip)
    return pixels


def write_picture(paths, source: Pictures, pictures: Iterator, limits, note: str) -> None:
    """A PNG (8 bits, or 16 of gray) or .npy file of the values."""
    (picture,) = pictures
    dtype, _, _ = units.pick_type(source, limits)
    stored = units.to_stored(picture, dtype)
    png = dtype == np.uint8 or (dtype == np.uint16 and stored.shape[2] == 1)
    if paths[0].suffix == ".png" and not png:
        raise UserError(
            f"{paths[0]} cannot hold values from {limits[0]:g} to {limits[1]:g}: save the sources "
            "as .tif or .npy"
        )
    save_array(paths[0], stored)


def save_array(path: Path, picture: np.ndarray) -> None:
    """Save (H, W, C) as .npy, or as PNG: 8 bits, or 16 if C is 1."""
    with atomic_write(path) as file:
        if path.suffix == ".npy":
            np.save(file, picture)
        else:
            Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, "png")


def file_suffix(channels: int) -> str:
    """The kind of file that holds pictures of so many channels: .png or .npy."""
    return ".png" if channels in (1, 3, 4) else ".npy"


# ------------------------------------------------------------------------------------------------
# The table


def read_tiff(paths: list[Path], channels: int, axis: int) -> Pictures:
    """A plain picture where that is all that it is, else all bands as one picture."""
    return (read_raster if is_raster(paths[0]) else read_picture)(paths, channels, axis)


READERS = {
    **dict.fromkeys((*PICTURES, ".npy"), read_picture),
    **dict.fromkeys((".tif", ".tiff"), read_tiff),
    **dict.fromkeys((".nii", ".nii.gz"), read_nifti),
    **dict.fromkeys(FILMS, read_film),
    ".dcm": read_dicom,
}
WRITERS = {
    **dict.fromkeys((".png", ".npy"), write_picture),
    **dict.fromkeys((".nii", ".nii.gz"), write_nifti),
    ".tif": write_raster,
    ".mp4": write_film,
    ".dcm": write_dicom,
}


def suffix_of(path: Path) -> str:
    """What READERS calls the format of a file."""
    return ".dcm" if is_dicom(path) else split_suffix(path.name)[1].lower()


def split_suffix(name: str) -> tuple[str, str]:
    """A name and its suffix; ".nii.gz" is one, numbers (in names of DICOM files) are none."""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".gz" and stem.lower().endswith(".nii"):
        return stem[:-4], stem[-4:] + suffix
    return (name, "") if suffix[1:].isdigit() else (stem, suffix)


def read(paths: Path | list[Path], channels: int = 0, axis: int = -1) -> Pictures:
    """The pictures of a file, or of the files of a DICOM series; those of many are not decoded yet.

    `channels`: convert to that many, or refuse other numbers of them, 0: take any; `axis`: of
    volumes, across the slices.

    Raises:
        UnreadableImage: damaged, too large, or of a kind that is not read.
        UserError: the library that reads it is not installed.
    """
    paths = [paths] if isinstance(paths, Path) else paths
    with units.decoding(paths[0]):
        if paths[0].is_fifo():  # opening it would wait for ever
            raise UnreadableImage("it is a named pipe")
        return READERS.get(suffix_of(paths[0]), read_picture)(paths, channels, axis)


def output_suffix(path: Path, channels: int, in_units: bool) -> str:
    """The suffix of a translation of `path` with so many channels, in units or in gray levels."""
    suffix = suffix_of(path) if path.is_file() else ""  # a pipe would be waited for
    if suffix in (".nii", ".nii.gz", ".dcm"):
        return suffix
    if suffix in FILMS:
        return ".mp4"
    if suffix in (".tif", ".tiff"):
        with contextlib.suppress(UnreadableImage), units.decoding(path):  # `read` reports it
            if is_raster(path):
                return ".tif"
    return ".npy" if in_units and suffix == ".npy" else file_suffix(channels)


def count(path: Path, axis: int = -1) -> int:
    """How many pictures a file holds, opened only if it may be several; 1 if it is unreadable."""
    if path.name.lower().endswith((*PICTURES, ".npy", ".tif", ".tiff")):
        return 1
    with contextlib.suppress(UnreadableImage):
        return len(read(path, axis=axis))
    return 1


def write(
    paths: Path | list[Path],
    source: Pictures,
    pictures: Iterable[np.ndarray],
    limits: tuple[float, float] | None = None,
    note: str = "translated by CycleGAN",
) -> None:
    """Write translations of all pictures of `source`, in order, with its geometry.

    `pictures`: (H, W, C) in the target's units, NaN where there is no data; `limits`: the range of
    these units (None: the source's), which decides on the type that is stored; `note`: what made
    them, kept in the file. A DICOM series takes as many paths as it has files.

    Raises:
        UnreadableImage: a picture of the source cannot be decoded; nothing is written then.
        UserError: the disk is full and the like.
    """
    paths = [paths] if isinstance(paths, Path) else paths
    WRITERS[suffix_of(paths[0])](paths, source, iter(pictures), limits, note)


# ------------------------------------------------------------------------------------------------
# Ranges of values


def ask_for_range(path: Path) -> UserError:
    """The error for floats of unknown range: what values the files beside `path` hold.

    It is from 4 pictures of 16 files at most.
    """
    paths = [p for p in sorted(path.parent.iterdir()) if suffix_of(p) == suffix_of(path)]
    values = []
    for sample in paths[:: -(-len(paths) // 16)]:
        with contextlib.suppress(UnreadableImage):
            source = read(sample)
            for i in range(0, len(source), -(-len(source) // 4)):
                picture = source[i]
                picture = picture[np.isfinite(picture)]
                if picture.size:
                    values.append(np.quantile(picture, np.linspace(0, 1, 2001)))
    least, low, high, most = np.percentile(values or [0], (0, 0.5, 99.5, 100))
    return UserError(
        f"{path} holds floats: say with --range_A LO HI, or --range_B for domain B, which of them "
        f"become black and white (in {path.parent}: minimum {least:.4g}, maximum {most:.4g}, "
        f"percentiles 0.5 and 99.5: {low:.4g} and {high:.4g})"
    )


def find_limits(paths: Iterable[Path], channels: int, axis: int) -> tuple[float, float] | None:
    """The range of the first of these files that has units; None for plain pictures.

    Raises UserError if that file holds floats, which have none.
    """
    for path in paths:
        if not path.name.lower().endswith(PICTURES):
            with contextlib.suppress(UnreadableImage):
                source = read(path, channels, axis)
                if source.limits is None:
                    raise ask_for_range(path)
                return source.limits if source.geometry else None
    return None
