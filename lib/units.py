"""The pictures of a file in the file's own units, and their values in a network and as stored.

Gray levels, Hounsfield units, reflectance: what a number means is kept from the source to its
translation. The kinds of files are in lib/formats.py.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from utils import UserError

TOO_LARGE = "over Pillow's size limit (test.py --max_pixels N raises it, for files you trust)"


class UnreadableImage(Exception):
    """A file that is not a usable picture; the message says why."""


@dataclass
class Pictures:
    """The pictures of one file, or of a DICOM series; decoded one at a time by `pictures[i]`.

    A picture is (H, W, C) in the file's units (gray levels, Hounsfield units, reflectance), NaN
    where a file says that it has no data. `limits` are the smallest and the largest value that an
    integer type holds, in the same units; None for floats, which have none. `slope` and
    `intercept` turn a stored number of type `dtype` into units.
    """

    paths: list[Path]
    count: int
    dtype: np.dtype
    get: Callable[[int], np.ndarray]
    limits: tuple[float, float] | None = None
    slope: float = 1.0
    intercept: float = 0.0
    geometry: dict = field(default_factory=dict)  # what the writer copies; a plain picture has none

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        """Picture i; raises UnreadableImage."""
        with decoding(self.paths[0]):
            return self.get(i)

    def __iter__(self) -> Iterator[np.ndarray]:
        """All pictures in order; raises UnreadableImage."""
        return (self[i] for i in range(self.count))


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into UnreadableImage with one line."""
    try:
        yield
    except (UserError, UnreadableImage):
        raise
    except Image.DecompressionBombError as error:  # over twice the limit
        raise UnreadableImage(f"it is {TOO_LARGE}") from error
    except Exception as error:  # on hostile files decoders raise some twenty kinds of errors
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = " ".join(reason.replace(f" {str(path)!r}", "").split())
        raise UnreadableImage(reason or type(error).__name__) from error


def need(module: str, files: str):
    """The module, imported; a UserError with the pip line where it is not installed."""
    logging.getLogger(module).setLevel(logging.CRITICAL)  # what cannot be read is reported here
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{files} files need {module}: pip install {module}") from None


def check_size(height: int, width: int, channels: int, wanted: int) -> None:
    """Refuse a picture before it is decoded; `wanted` channels, 0 for any."""
    if not 0 < height * width <= Image.MAX_IMAGE_PIXELS:
        raise UnreadableImage(f"its size of {width}x{height} pixels is zero or {TOO_LARGE}")
    if wanted and channels != wanted or not channels:
        raise UnreadableImage(
            f"it has {channels} channels, not {wanted}: see --input_nc and --output_nc"
        )
    if height * width * channels > 16 * Image.MAX_IMAGE_PIXELS:
        raise UnreadableImage(f"{width}x{height} pixels of {channels} channels are too many")


def integer_limits(
    dtype: np.dtype, slope: float = 1.0, intercept: float = 0.0
) -> tuple[float, float] | None:
    """The smallest and the largest value of an integer type, in units; None for floats."""
    if dtype.kind not in "iu":
        return None
    ends = [v * slope + intercept for v in (np.iinfo(dtype).min, np.iinfo(dtype).max)]
    return min(ends), max(ends)


# ------------------------------------------------------------------------------------------------
# Values: of a file, of a network, as stored


def to_unit(picture: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Values in `limits` (low, high) to float32 in [-1, 1], clipped; NaN to -1.

    Of uint8 and uint16 with their whole range, which is what datasets.to_float expects, nothing is
    changed.
    """
    low, high = limits
    if picture.dtype in (np.uint8, np.uint16) and (low, high) == (0, np.iinfo(picture.dtype).max):
        return picture
    values = (picture.astype(np.float32) - low) * (2 / (high - low)) - 1
    return np.nan_to_num(values.clip(-1, 1), nan=-1.0)


def from_unit(values: np.ndarray, limits: tuple[float, float], source: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] to those in `limits`; NaN where the picture `source` has no data."""
    low, high = limits
    values = low + (values + 1) * ((high - low) / 2)
    if source.dtype.kind == "f":
        missing = np.isnan(source)
        same = source.shape == values.shape
        values = np.where(missing if same else missing.all(2, keepdims=True), np.nan, values)
    return values  # (H, W, C)


def pick_type(
    source: Pictures, limits: tuple[float, float] | None
) -> tuple[np.dtype, float, float]:
    """(type, slope, intercept) for values in `limits`: the source's where it holds them.

    Otherwise a 16-bit integer, or float32 where `limits` span fewer than 255 units.
    """
    kept = source.dtype, source.slope, source.intercept
    if limits is None or source.limits is None:
        return kept
    low, high = limits
    inside = source.limits[0] <= low and high <= source.limits[1]
    if inside and (high - low) / abs(source.slope) >= 255:
        return kept
    for dtype in (np.dtype(np.int16), np.dtype(np.uint16)):
        info = np.iinfo(dtype)
        if info.min <= low and high <= info.max and high - low >= 255:
            return dtype, 1.0, 0.0
    return np.dtype(np.float32), 1.0, 0.0


def to_stored(
    picture: np.ndarray,
    dtype: np.dtype,
    slope: float = 1.0,
    intercept: float = 0.0,
    nodata: float | None = None,
) -> np.ndarray:
    """Values in units as a file stores them: rounded and clipped for integers, NaN as `nodata`."""
    missing = np.isnan(picture)
    if dtype.kind not in "iu":
        return np.where(missing, np.nan if nodata is None else nodata, picture).astype(dtype)
    info = np.iinfo(dtype)
    values = np.rint((np.where(missing, 0, picture).astype(np.float64) - intercept) / slope)
    values = np.clip(values, info.min, info.max)
    if nodata is not None:  # a translated value must not turn into "no data" by accident
        values[values == nodata] += 1 if nodata < info.max else -1
    values[missing] = info.min if nodata is None else nodata
    return values.astype(dtype)
