"""DICOM files and series, by pydicom."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib import units
from lib.units import Pictures, UnreadableImage
from utils import atomic_write

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
            with contextlib.suppress(UnreadableImage), units.decoding(path):  # `read` reports it
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
    pydicom = units.need("pydicom", "DICOM")
    with units.decoding(path):
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
        units.check_size(header.Rows, header.Columns, header.get("SamplesPerPixel", 1), channels)

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
    pydicom = units.need("pydicom.pixels", "DICOM")
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
    pydicom = units.need("pydicom", "DICOM")
    dataset = read_header(origin)
    if frames.shape[3] == 1:
        stored, photometric, bits = store_gray(dataset, frames[..., 0], limits)
    else:
        stored, photometric, bits = units.to_stored(frames, np.dtype(np.uint8)), "RGB", 8
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
    stored = units.to_stored(values, np.dtype(np.int32), slope, intercept).clip(low, high)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        stored = (low + high) - stored
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        stored[stored == padding] += 1 if padding < high else -1
        stored[np.isnan(values)] = padding
    return stored.astype(dtype), dataset.PhotometricInterpretation, int(dataset.BitsStored)
