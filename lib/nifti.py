"""NIfTI volumes, by nibabel."""

import functools
import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib import units
from lib.units import Pictures, UnreadableImage
from utils import atomic_write

GZIP_RATIO = 1032  # deflate cannot do better: what a compressed header may promise at most


@functools.lru_cache(maxsize=64)
def open_nifti(path: Path, changed: int) -> tuple:
    """The image of a file, and a proxy of its data: at least three dimensions, nothing read yet.

    The proxy remembers places in the gzip stream, so that it is kept.
    """
    image = units.need("nibabel", "NIfTI").load(path)
    return image, image.dataobj.reshape((*image.shape, 1)[: max(3, len(image.shape))])


def read_nifti(paths: list[Path], channels: int, axis: int) -> Pictures:
    """The slices of a volume across `axis`; of a fourth dimension, the channels."""
    (path,) = paths
    image, data = open_nifti(path, path.stat().st_mtime_ns)
    dtype, shape = image.get_data_dtype(), data.shape
    if dtype.kind not in "iuf" or len(image.shape) < 2:
        raise UnreadableImage(f"it holds {dtype} of shape {image.shape}, not a volume of numbers")
    promised = math.prod(int(n) for n in shape) * dtype.itemsize
    ratio = GZIP_RATIO if path.suffix.lower() == ".gz" else 1
    if not 0 < promised <= path.stat().st_size * ratio:
        raise UnreadableImage(f"its header promises {promised} bytes, the file is shorter")
    axis = range(3)[axis]
    height, width = (n for i, n in enumerate(shape[:3]) if i != axis)
    units.check_size(height, width, math.prod(shape[3:]), channels)

    def get(i: int) -> np.ndarray:
        plane = np.asarray(data[(*[slice(None)] * axis, i)])
        plane = plane.reshape(*plane.shape[:2], -1)  # (first, second, C)
        return np.rot90(plane if plane.dtype == dtype else plane.astype(np.float32))

    slope, intercept = float(data.slope), float(data.inter)
    limits = units.integer_limits(dtype, slope, intercept)
    geometry = {"image": image, "axis": axis, "shape": shape}
    return Pictures(paths, shape[axis], dtype, get, limits, slope, intercept, geometry)


def write_nifti(paths, source: Pictures, pictures: Iterator, limits, note: str) -> None:
    """A volume with the source's affine and header, whichever way it was cut into slices."""
    image, axis = source.geometry["image"], source.geometry["axis"]
    dtype, slope, intercept = units.pick_type(source, limits)
    planes = [np.rot90(units.to_stored(p, dtype, slope, intercept), -1) for p in pictures]
    volume = np.stack(planes, axis)
    same = volume.size == math.prod(source.geometry["shape"])
    volume = volume.reshape(image.shape if same else volume.shape)
    result = type(image)(volume, image.affine, image.header)
    result.header.set_data_dtype(dtype)
    result.header.set_slope_inter(slope, intercept)  # the numbers are stored ones already
    result.header["cal_min"] = result.header["cal_max"] = 0  # the source's display window
    result.header["descrip"] = note.encode("ascii", "replace")[:79]
    with atomic_write(paths[0]) as file:
        if paths[0].suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                result.to_stream(packed)
        else:
            result.to_stream(file)
