"""The kinds of files: pictures, NIfTI and DICOM volumes, GeoTIFF rasters, films.

`read(paths)` gives the pictures of a file one at a time, in the file's own units and with its
geometry; `write(paths, source, pictures, ...)` puts translated pictures where the source lies.
One pair of functions a format, found by suffix in READERS and WRITERS. Each library is imported
where it is used: nibabel, pydicom, rasterio, PyAV.
"""

import contextlib
import functools
import gzip
import heapq
import importlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import UserError, atomic_write

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
UNITS = (".npy", ".tif", ".tiff", ".nii", ".nii.gz", ".dcm")  # what may hold more than gray levels
FILMS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
TOO_LARGE = "over Pillow's size limit (test.py --max_pixels N raises it, for files you trust)"
PILLOW = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")  # whatever the extension says
GZIP_RATIO = 1032  # deflate cannot do better: what a compressed header may promise at most


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
                raise ValueError(f"{image.width}x{image.height} is {TOO_LARGE}")
            ImageOps.exif_transpose(image, in_place=True)
            picture = convert(image, channels)
    limits = integer_limits(picture.dtype)
    return Pictures(paths, 1, picture.dtype, lambda i: picture, limits)


def check_array(picture: np.ndarray, channels: int) -> np.ndarray:
    """A copy of an array from a file; ValueError if it is no picture of that many channels."""
    picture = picture[..., None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[2] != channels or not picture.size:
        raise ValueError(f"its shape is {picture.shape}, not (H, W, {channels})")
    if picture.size // channels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its shape {picture.shape} is {TOO_LARGE}")
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
    dtype, _, _ = pick_type(source, limits)
    stored = to_stored(picture, dtype)
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
# NIfTI


@functools.lru_cache(maxsize=64)
def open_nifti(path: Path, changed: int) -> tuple:
    """The image of a file, and a proxy of its data: at least three dimensions, nothing read yet.

    The proxy remembers places in the gzip stream, so that it is kept.
    """
    image = need("nibabel", "NIfTI").load(path)
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
    check_size(height, width, math.prod(shape[3:]), channels)

    def get(i: int) -> np.ndarray:
        plane = np.asarray(data[(*[slice(None)] * axis, i)])
        plane = plane.reshape(*plane.shape[:2], -1)  # (first, second, C)
        return np.rot90(plane if plane.dtype == dtype else plane.astype(np.float32))

    slope, intercept = float(data.slope), float(data.inter)
    limits = integer_limits(dtype, slope, intercept)
    geometry = {"image": image, "axis": axis, "shape": shape}
    return Pictures(paths, shape[axis], dtype, get, limits, slope, intercept, geometry)


def write_nifti(paths, source: Pictures, pictures: Iterator, limits, note: str) -> None:
    """A volume with the source's affine and header, whichever way it was cut into slices."""
    image, axis = source.geometry["image"], source.geometry["axis"]
    dtype, slope, intercept = pick_type(source, limits)
    planes = [np.rot90(to_stored(p, dtype, slope, intercept), -1) for p in pictures]
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


# ------------------------------------------------------------------------------------------------
# DICOM

DEFLATED = "1.2.840.10008.1.2.1.99"
HEADER = ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber")


def is_dicom(path: Path) -> bool:
    """Whether a file is called .dcm, or has no suffix of letters and begins as DICOM files do."""
    if path.suffix[1:].isalpha() or not path.is_file():  # a pipe would be waited for
        return path.suffix.lower() == ".dcm"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def group_series(paths: list[Path]) -> list[list[Path]]:
    """The files, those of one DICOM series together and sorted by position, all others alone."""
    groups: dict[object, list[tuple[tuple, Path]]] = {}
    for path in paths:
        key, place = path, ()
        if is_dicom(path):
            with contextlib.suppress(UnreadableImage), decoding(path):  # `read` reports it
                header = read_header(path, specific_tags=list(HEADER))
                key = path.parent, str(header.get("SeriesInstanceUID", path))
                place = slice_position(header)
        groups.setdefault(key, []).append((place, path))
    return [[path for _, path in sorted(group)] for group in groups.values()]


def slice_position(header) -> tuple[float, float]:
    """How far along its normal a slice lies, in mm, and its number in the series."""
    number = float(header.get("InstanceNumber") or 0)
    position, orientation = (header.get(name) for name in HEADER[1:3])
    if position is None or orientation is None:
        return 0.0, number
    normal = np.cross(np.array(orientation[:3], float), np.array(orientation[3:], float))
    return float(normal @ np.array(position, float)), number


def read_header(path: Path, **options):
    """A DICOM file without its pixels."""
    pydicom = need("pydicom", "DICOM")
    with decoding(path):
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DEFLATED:  # would be unpacked whole, however large
            raise UnreadableImage("it is deflated as a whole: convert it, as with dcmconv +te")
        return pydicom.dcmread(path, stop_before_pixels=True, **options)


def read_dicom(paths: list[Path], channels: int, axis: int) -> Pictures:
    """The slices of a series, or the frames of one file; Hounsfield units and the like."""
    headers = [read_header(path) for path in paths]
    frames: list[tuple[int, int]] = []  # (which file, which of its frames)
    for k, (path, header) in enumerate(zip(paths, headers, strict=True)):
        count = int(header.get("NumberOfFrames") or 1)
        if not 0 < count <= path.stat().st_size:
            raise UnreadableImage(f"it says that it has {count} frames")
        frames += [(k, i) for i in range(count)]
        if "Rows" not in header or "Columns" not in header:
            raise UnreadableImage("it has no pixels")
        if "PerFrameFunctionalGroupsSequence" in header:
            raise UnreadableImage("it is an enhanced multi-frame file: convert it to single frames")
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            raise UnreadableImage("its colors are a palette, which is not read")
        check_size(header.Rows, header.Columns, header.get("SamplesPerPixel", 1), channels)

    def get(i: int) -> np.ndarray:
        k, frame = frames[i]
        return decode_dicom(paths[k], headers[k], frame)

    dtype, _, _ = stored_type(headers[0])
    slope, intercept, limits = read_scale(headers[0])
    return Pictures(paths, len(frames), dtype, get, limits, slope, intercept, {"headers": headers})


def stored_type(header) -> tuple[np.dtype, int, int]:
    """The integer type of a DICOM file's pixels, and the smallest and largest of BitsStored."""
    signed = int(header.get("PixelRepresentation", 0))
    bits = int(header.BitsStored)
    if header.BitsAllocated not in (8, 16) or not 1 <= bits <= header.BitsAllocated:
        raise UnreadableImage(f"its pixels have {bits} of {header.BitsAllocated} bits: not 8 or 16")
    low = -(2 ** (bits - 1)) if signed else 0
    return np.dtype(f"{'i' if signed else 'u'}{header.BitsAllocated // 8}"), low, low + 2**bits - 1


def read_scale(header) -> tuple[float, float, tuple[float, float]]:
    """Slope and intercept of a DICOM file's units, and the smallest and largest value in units."""
    if header.get("ModalityLUTSequence"):
        return 1.0, 0.0, (0.0, 2.0 ** int(header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
    slope = float(header.get("RescaleSlope") or 1)
    intercept = float(header.get("RescaleIntercept") or 0)
    ends = [v * slope + intercept for v in stored_type(header)[1:]]
    return slope, intercept, (min(ends), max(ends))


def decode_dicom(path: Path, header, frame: int) -> np.ndarray:
    """(H, W, C) in units; padding is NaN, MONOCHROME1 (low is white) inverted."""
    pydicom = need("pydicom.pixels", "DICOM")
    pixels = pydicom.pixel_array(path, index=frame).reshape(header.Rows, header.Columns, -1)
    if pixels.shape[2] > 1:
        return pixels  # RGB
    slope, intercept, limits = read_scale(header)
    missing = pixels == header.get("PixelPaddingValue")  # False if there is none
    if header.get("ModalityLUTSequence"):
        pixels = pydicom.apply_modality_lut(pixels, header)
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    if (slope, intercept, inverted) == (1, 0, False) and not np.any(missing):
        return pixels
    values = pixels.astype(np.float32) * slope + intercept
    return np.where(missing, np.nan, sum(limits) - values if inverted else values)


def write_dicom(paths, source: Pictures, pictures: Iterator, limits, note: str) -> None:
    """A derived series: the source's patient, study and geometry, new UIDs; one file a source."""
    try:
        for path, old, header in zip(paths, source.paths, source.geometry["headers"], strict=True):
            frames = [next(pictures) for _ in range(int(header.get("NumberOfFrames") or 1))]
            dataset = derive(old, np.stack(frames), limits, note)
            with atomic_write(path) as file:
                dataset.save_as(file, enforce_file_format=True)
    except UnreadableImage:
        for path in paths:  # no half of a series
            path.unlink(missing_ok=True)
        raise


def derive(origin: Path, frames: np.ndarray, limits, note: str):
    """The dataset of a DICOM file with `frames` (N, H, W, C) for its pixels."""
    pydicom = need("pydicom", "DICOM")
    dataset = read_header(origin)
    if frames.shape[3] == 1:
        stored, photometric, bits = store_gray(dataset, frames[..., 0], limits)
    else:
        stored, photometric, bits = to_stored(frames, np.dtype(np.uint8)), "RGB", 8
    old_series, old_instance = dataset.get("SeriesInstanceUID", ""), dataset.get("SOPInstanceUID")
    dataset.set_pixel_data(
        stored if len(stored) > 1 else stored[0], photometric, bits, generate_instance_uid=False
    )
    uid = lambda old: pydicom.uid.generate_uid(entropy_srcs=[str(old), note])  # the same again
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = uid(old_instance), uid(old_series)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    kind = dataset.get("ImageType") or []
    kind = [kind] if isinstance(kind, str) else list(kind)
    dataset.ImageType = ["DERIVED", "SECONDARY", *kind[2:]]
    dataset.SeriesDescription = f"{dataset.get('SeriesDescription', '')} {note}".strip()[:64]
    dataset.DerivationDescription = note
    reference = pydicom.Dataset()
    reference.ReferencedSOPClassUID = dataset.get("SOPClassUID", "")
    reference.ReferencedSOPInstanceUID = old_instance or ""
    dataset.SourceImageSequence = [reference]
    for name in ("SmallestImagePixelValue", "LargestImagePixelValue", "ModalityLUTSequence"):
        if name in dataset:
            delattr(dataset, name)
    return dataset


def store_gray(dataset, values: np.ndarray, limits) -> tuple[np.ndarray, str, int]:
    """Values (N, H, W) in units as stored numbers, photometric interpretation and BitsStored.

    The dataset's slope and intercept stay where they hold the range `limits`; else they are set.
    """
    dtype, low, high = stored_type(dataset)
    slope, intercept, wanted = read_scale(dataset)
    wanted = limits or wanted
    ends = sorted(v * slope + intercept for v in (low, high))
    fits = ends[0] <= wanted[0] and wanted[1] <= ends[1]
    if not fits or (wanted[1] - wanted[0]) / abs(slope) < 255:
        slope = float(f"{(wanted[1] - wanted[0]) / (high - low):.10g}")  # 16 letters at most
        intercept = float(f"{wanted[0] - low * slope:.10g}")
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        dataset.RescaleType = "US"  # unspecified
        dataset.WindowCenter, dataset.WindowWidth = sum(wanted) / 2, wanted[1] - wanted[0]
    stored = to_stored(values, np.dtype(np.int32), slope, intercept).clip(low, high)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        stored = (low + high) - stored
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        stored[stored == padding] += 1 if padding < high else -1
        stored[np.isnan(values)] = padding
    return stored.astype(dtype), dataset.PhotometricInterpretation, int(dataset.BitsStored)


# ------------------------------------------------------------------------------------------------
# GeoTIFF, and any TIFF of many bands, 16 bits or floats

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


def read_tiff(paths: list[Path], channels: int, axis: int) -> Pictures:
    """A plain picture where that is all that it is, else all bands as one picture."""
    (path,) = paths
    if not is_raster(path):
        return read_picture(paths, channels, axis)
    with open_raster(path) as raster:
        dtype = np.dtype(raster.dtypes[0])
        if len(set(raster.dtypes)) > 1 or dtype.kind not in "iuf":
            raise UnreadableImage(f"its bands hold {', '.join(sorted(set(raster.dtypes)))}")
        check_size(raster.height, raster.width, raster.count, channels)
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

    limits = integer_limits(dtype)
    return Pictures(paths, 1, dtype, get, limits, geometry=geometry)


@contextlib.contextmanager
def open_raster(path: Path) -> Iterator:
    rasterio = need("rasterio", "GeoTIFF")
    with rasterio.Env(**GDAL), rasterio.open(path.absolute(), driver="GTiff") as raster:
        yield raster


def write_tiff(paths, source: Pictures, pictures: Iterator, limits, note: str) -> None:
    """A TIFF with the source's CRS, transform, tags and nodata value."""
    (picture,) = pictures
    with create_raster(paths[0], source, picture.shape, limits, note, "deflate") as (raster, store):
        raster.write(store(picture))


@contextlib.contextmanager
def create_raster(
    path: Path, source: Pictures, shape: tuple, limits, note: str, compress: str | None
) -> Iterator[tuple]:
    """Yield a TIFF of `shape` (H, W, C), and what turns a picture into its bands (C, H, W)."""
    rasterio = need("rasterio", "GeoTIFF")
    dtype, _, _ = pick_type(source, limits)
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
            yield raster, lambda x: np.moveaxis(to_stored(x, dtype, nodata=nodata), 2, 0)
            raster.update_tags(**old.tags() | {"TIFFTAG_SOFTWARE": note})
            if old.gcps[0]:
                raster.gcps = old.gcps
            if channels == old.count:
                raster.descriptions, raster.colorinterp = old.descriptions, old.colorinterp
                for i in old.indexes:
                    raster.update_tags(i, **old.tags(i))


# ------------------------------------------------------------------------------------------------
# Films

DEMUXERS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska"}
DEMUXERS |= {".avi": "avi", ".gif": "gif"}  # by name, or a playlist could open other files
COPIED = ("aac", "mp3", "ac3", "eac3", "opus", "alac", "flac")  # sound that mp4 players know


@dataclass
class Film(Pictures):
    """The frames of a film, in order only; `times` are those read so far, in `time_base`."""

    times: list[int] = field(default_factory=list)
    time_base: Fraction = Fraction(1, 25)

    def __iter__(self) -> Iterator[np.ndarray]:
        self.times.clear()
        with decoding(self.paths[0]), open_film(self.paths[0]) as (container, stream):
            for k, frame in enumerate(container.decode(stream)):
                if frame.width * frame.height > Image.MAX_IMAGE_PIXELS:
                    raise UnreadableImage(f"a frame is {TOO_LARGE}")
                self.times.append(k if frame.pts is None else frame.pts)
                turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                yield np.ascontiguousarray(turned)  # (H, W, 3)


@contextlib.contextmanager
def open_film(path: Path) -> Iterator[tuple]:
    """The container and its first video stream."""
    av = need("av", "film")
    with av.open(str(path.absolute()), format=DEMUXERS[path.suffix.lower()]) as container:
        if not container.streams.video:
            raise UnreadableImage("it has no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnreadableImage("its video is of a kind that PyAV does not decode")
        check_size(stream.height, stream.width, 3, 3)
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}
        yield container, stream


def read_film(paths: list[Path], channels: int, axis: int) -> Pictures:
    """The frames of a film; `count` is what its header says, 0 where it says nothing."""
    (path,) = paths
    if channels not in (0, 3):
        raise UnreadableImage(f"a film has 3 channels, not {channels}")
    with open_film(path) as (_, stream):
        film = Film(paths, stream.frames, np.dtype(np.uint8), None, (0.0, 255.0))
        film.time_base = stream.time_base
        film.get = lambda i: next(itertools.islice(film, i, None))
        film.geometry = {"rate": stream.average_rate or stream.guessed_rate}
        film.geometry["aspect"] = stream.codec_context.sample_aspect_ratio
    return film


def write_film(paths, source: Film, pictures: Iterator, limits, note: str) -> None:
    """H.264 in mp4, yuv420p, each frame at its time in the source; the sound as it is."""
    av = need("av", "film")
    first = next(pictures, None)
    if first is None:
        raise UnreadableImage("it has no frames")
    height, width = (-(-n // 2) * 2 for n in first.shape[:2])  # yuv420p halves them
    with (
        atomic_write(paths[0]) as file,
        av.open(file.name, "w", format="mp4", options={"movflags": "faststart"}) as target,
        open_film(source.paths[0]) as (sound, _),
    ):
        stream = target.add_stream("libx264", rate=source.geometry["rate"])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18"}
        stream.codec_context.time_base = source.time_base
        if source.geometry["aspect"]:
            stream.codec_context.sample_aspect_ratio = source.geometry["aspect"]  # of a pixel
        target.metadata["comment"] = note

        def encode() -> Iterator[tuple[float, list]]:
            for k, picture in enumerate(itertools.chain([first], pictures)):
                pixels = to_stored(picture, np.dtype(np.uint8))
                pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
                edge = [(0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)]
                frame = av.VideoFrame.from_ndarray(np.pad(pixels, edge, "edge"), format="rgb24")
                frame.pts, frame.time_base = source.times[k], source.time_base
                yield frame.time, stream.encode(frame)
            yield math.inf, stream.encode()  # what it still holds

        # the sound first: its track must be there before the first frame is written
        packets = heapq.merge(copy_sound(target, sound), encode(), key=lambda pair: pair[0])
        for _, group in packets:
            target.mux(group)


def copy_sound(target, source) -> Iterator[tuple[float, object]]:
    """(seconds, packets) of the first sound track; as AAC if mp4 players may not know it."""
    if not source.streams.audio:
        return
    track = source.streams.audio[0]
    if track.codec_context.codec.canonical_name in COPIED:
        copy = target.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.dts is not None:  # the last one is empty
                seconds = float(packet.dts * packet.time_base)
                packet.stream = copy
                yield seconds, packet
        return
    encoder = target.add_stream("aac", rate=track.rate)
    for frame in itertools.chain(source.decode(track), [None]):  # None: what it still holds
        yield (frame.time or 0.0) if frame else math.inf, encoder.encode(frame)


# ------------------------------------------------------------------------------------------------
# The table

READERS = {".nii": read_nifti, ".nii.gz": read_nifti, ".dcm": read_dicom, ".tif": read_tiff}
READERS |= {".tiff": read_tiff, ".npy": read_picture, **dict.fromkeys(PICTURES, read_picture)}
READERS |= dict.fromkeys(FILMS, read_film)
WRITERS = {".nii": write_nifti, ".nii.gz": write_nifti, ".dcm": write_dicom, ".mp4": write_film}
WRITERS |= {".tif": write_tiff, ".png": write_picture, ".npy": write_picture}


STACKED = (".nii", ".nii.gz", ".dcm", ".tif", ".mp4")  # outputs that are no plain pictures


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
    with decoding(paths[0]):
        if paths[0].is_fifo():  # opening it would wait for ever
            raise UnreadableImage("it is a named pipe")
        return READERS.get(suffix_of(paths[0]), read_picture)(paths, channels, axis)


def output_suffix(path: Path, channels: int, units: bool) -> str:
    """The suffix of a translation of `path` with so many channels, in units or in gray levels."""
    suffix = suffix_of(path) if path.is_file() else ""  # a pipe would be waited for
    if suffix in (".nii", ".nii.gz", ".dcm"):
        return suffix
    if suffix in FILMS:
        return ".mp4"
    if suffix in (".tif", ".tiff"):
        with contextlib.suppress(UnreadableImage), decoding(path):  # `read` reports it
            if is_raster(path):
                return ".tif"
    return ".npy" if units and suffix == ".npy" else file_suffix(channels)


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
