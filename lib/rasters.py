"""GeoTIFF, and any TIFF of many bands, 16 bits or floats, by rasterio."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lib import units
from lib.units import Pictures, UnreadableImage
from utils import atomic_write

GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}
GDAL |= {"GDAL_CACHEMAX": 64}  # MiB


def is_raster(path: Path) -> bool:
    """Whether a TIFF has coordinates, floats, or bands that are no colors."""
    coordinates = {33550, 33922, 34264, 34735, 42113}  # tags of GeoTIFF, and of a nodata value
    try:
        with Image.open(path, formats=["TIFF"]) as image:
            return image.mode == "F" or bool(coordinates & set(image.tag_v2))
    except UnidentifiedImageError:  # of many bands, or damaged
        with open(path, "rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_raster(paths: list[Path], channels: int, axis: int) -> Pictures:
    """All bands as one picture."""
    (path,) = paths
    with open_raster(path) as raster:
        dtype = np.dtype(raster.dtypes[0])
        if len(set(raster.dtypes)) > 1 or dtype.kind not in "iuf":
            raise UnreadableImage(f"its bands hold {', '.join(sorted(set(raster.dtypes)))}")
        units.check_size(raster.height, raster.width, raster.count, channels)
        rows, columns = raster.block_shapes[0]
        if rows * columns > Image.MAX_IMAGE_PIXELS:
            raise UnreadableImage(f"it is stored in strips of {columns}x{rows} pixels: too large")
        nodata = raster.nodatavals
        geometry = {"raster": (raster.height, raster.width)}

    def get(i: int, window: tuple[slice, slice] | None = None) -> np.ndarray:
        with open_raster(path) as raster:
            part = window and tuple((side.start, side.stop) for side in window)
            picture = np.moveaxis(raster.read(window=part), 0, 2)  # (H, W, C)
        if all(value is None for value in nodata):
            return picture
        missing = picture == np.array([np.nan if v is None else v for v in nodata])
        return np.where(missing, np.nan, picture.astype(np.float32)) if missing.any() else picture

    limits = units.integer_limits(dtype)
    return Pictures(paths, 1, dtype, get, limits, geometry=geometry)


@contextlib.contextmanager
def open_raster(path: Path) -> Iterator:
    rasterio = units.need("rasterio", "GeoTIFF")
    with rasterio.Env(**GDAL), rasterio.open(path.absolute(), driver="GTiff") as raster:
        yield raster


def write_raster(paths, source: Pictures, pictures: Iterator, limits, note: str) -> None:
    """A TIFF with the source's CRS, transform, tags and nodata value."""
    (picture,) = pictures
    with create_raster(paths[0], source, picture.shape, limits, note, "deflate") as (raster, store):
        raster.write(store(picture))


@contextlib.contextmanager
def create_raster(
    path: Path, source: Pictures, shape: tuple, limits, note: str, compress: str | None
) -> Iterator[tuple]:
    """Yield a TIFF of `shape` (H, W, C), and what turns a picture into its bands (C, H, W)."""
    rasterio = units.need("rasterio", "GeoTIFF")
    dtype, _, _ = units.pick_type(source, limits)
    height, width, channels = shape
    with open_raster(source.paths[0]) as old, atomic_write(path) as file:
        nodata = old.nodata
        if nodata is not None and dtype.kind in "iu":
            info = np.iinfo(dtype)
            nodata = nodata if info.min <= nodata <= info.max else float(info.min)
        profile = {"driver": "GTiff", "height": height, "width": width, "count": channels}
        profile |= {"dtype": dtype.name, "nodata": nodata, "tiled": height >= 512}
        profile |= {"crs": old.crs, "transform": old.transform, "compress": compress}
        with rasterio.open(file.name, "w", bigtiff="if_safer", **profile) as raster:
            yield raster, lambda x: np.moveaxis(units.to_stored(x, dtype, nodata=nodata), 2, 0)
            raster.update_tags(**old.tags() | {"TIFFTAG_SOFTWARE": note})
            if old.gcps[0]:
                raster.gcps = old.gcps
            if channels == old.count:
                raster.descriptions, raster.colorinterp = old.descriptions, old.colorinterp
                for i in old.indexes:
                    raster.update_tags(i, **old.tags(i))


class Windows:
    """A raster that is sliced like an array (H, W, C) in [-1, 1], and read or written that way.

    Of a `target` (a raster to write, and what turns values into its bands) only slices are set.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, source: Pictures, limits: tuple, channels: int, target: tuple | None = None):
        self.source, self.limits, self.target = source, limits, target
        self.shape = (*source.geometry["raster"], channels)

    def read(self, window: tuple[slice, slice]) -> np.ndarray:
        with units.decoding(self.source.paths[0]):
            return self.source.get(0, window)

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        return units.to_unit(self.read(window), self.limits)

    def __setitem__(self, window: tuple[slice, slice], values: np.ndarray) -> None:
        raster, store = self.target
        bands = store(units.from_unit(values, self.limits, self.read(window)))
        raster.write(bands, window=tuple((part.start, part.stop) for part in window))
