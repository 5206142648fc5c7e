"""Volumes, rasters and films: the files are made, and what is written is read, by the libraries."""

import argparse
import functools
import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import datasets
import test
from lib import devices, dicom, formats, metrics, units, validation
from lib.norms import SharedNorm, share_norm
from lib.translation import translate_array, translate_batch
from lib.units import UnreadableImage
from lib.weights import load_generator
from models import Generator, init_weights
from tools import export
from tools import frames as save_frames
from utils import UserError

nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
av = pytest.importorskip("av", reason="PyAV is not installed")

AFFINE = np.array([[0, -2, 0, 3], [1.5, 0, 0, 4], [0, 0.1, 3, 5], [0, 0, 0, 1.0]])  # oblique


def peak_memory(forget: bool = False) -> int:
    """The most bytes that this process has held; `forget` starts over."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# ------------------------------------------------------------------------------------------------
# Files made with the libraries


def noise(shape: tuple, dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype.startswith("f"):
        return rng.normal(0, 40, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def save_nifti(path: Path, array: np.ndarray, slope: float = 1, intercept: float = 0) -> Path:
    image = nibabel.Nifti1Image(array, AFFINE)
    image.set_qform(AFFINE, "scanner")
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(slope, intercept)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def save_dicom(path: Path, stored: np.ndarray, z: float = 0, kind="MONOCHROME2", **more) -> Path:
    """One slice (H, W), several frames (N, H, W), or RGB (H, W, 3)."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    ds.FrameOfReferenceUID, ds.Modality = "1.2.3.5", "CT"
    ds.PatientName, ds.PatientID = "Doe^Jane", "7"
    ds.ImageType, ds.SeriesDescription = ["ORIGINAL", "PRIMARY", "AXIAL"], "thorax"
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-5, 6, z]
    ds.PixelSpacing, ds.SliceThickness = [0.7, 0.8], 2.5
    ds.set_pixel_data(stored, kind, 12 if stored.dtype.itemsize == 2 else 8)
    for name, value in more.items():
        setattr(ds, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def save_raster(path: Path, bands: np.ndarray, nodata=None, **more) -> Path:
    """(C, H, W) with a CRS, a transform and tags."""
    profile = {"driver": "GTiff", "count": len(bands), "dtype": bands.dtype, "nodata": nodata}
    profile |= {"height": bands.shape[1], "width": bands.shape[2], "crs": "EPSG:32633"}
    profile["transform"] = rasterio.Affine(10, 0.5, 500_000, 0.5, -10, 5_200_000)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile | more) as raster:
        raster.write(bands)
        raster.update_tags(sensor="S2", AREA_OR_POINT="Point")
        raster.update_tags(1, wavelength="490")
        raster.descriptions = [f"band {i}" for i in range(len(bands))]
    return path


def save_film(
    path: Path, frames: list[np.ndarray], rate="25", sound=None, codec="libx264", turned=0
) -> Path:
    """Frames (H, W, 3) at `rate`; `sound`: the codec of a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        track = container.add_stream(sound, rate=48_000) if sound else None
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            form = {"pcm_s16le": "s16", "libvorbis": "fltp"}.get(sound, "fltp")
            wave = np.sin(np.arange(1024) / 20) * (10_000 if form == "s16" else 0.3)
            planes = np.stack([wave, wave]).astype(np.int16 if form == "s16" else np.float32)
            planes = planes.T.reshape(1, -1) if form == "s16" else planes
            for i in range(20):
                packed = np.ascontiguousarray(planes)
                frame = av.AudioFrame.from_ndarray(packed, format=form, layout="stereo")
                frame.rate, frame.pts = 48_000, 1024 * i
                container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


def scene(t: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture with a bright bar that moves with `t`."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 3 % 256, y * 4 % 256, np.full_like(x, 90)], axis=2).astype(np.uint8)
    picture[:, (4 * t) % width : (4 * t) % width + 8] = 240
    return picture


def identity(path: Path | list[Path], target: Path | list[Path], channels: int = 0, axis: int = -1):
    """Read a file and write what was read, as a network would that changes nothing."""
    source = formats.read(path, channels, axis)
    formats.write(target, source, iter(source))
    return source


# ------------------------------------------------------------------------------------------------
# NIfTI


@pytest.mark.parametrize("axis", (0, 1, 2, -1))
@pytest.mark.parametrize(
    ("dtype", "scale", "ending"),
    [("int16", (1, 0), ".nii.gz"), ("int16", (0.25, -1024), ".nii"), ("uint8", (1, 0), ".nii")]
    + [("float32", (1, 0), ".nii.gz"), ("float64", (1, 0), ".nii"), ("uint16", (1, 0), ".nii")],
)
def test_a_volume_through_an_identity(dtype, scale, ending, axis, tmp_path):
    stored = noise((6, 9, 4), dtype)
    path = save_nifti(tmp_path / f"in{ending}", stored, *scale)
    source = identity(path, tmp_path / f"out{ending}", 1, axis)
    assert len(source) == stored.shape[axis]
    i = len(source) - 1
    expected = np.rot90(np.take(stored, i, axis)) * scale[0] + scale[1]
    assert np.allclose(source[i][..., 0], expected)
    before, after = nibabel.load(path), nibabel.load(tmp_path / f"out{ending}")
    assert after.get_data_dtype() == np.dtype(dtype) and after.shape == before.shape
    assert np.array_equal(after.affine, before.affine)
    for name in ("qform_code", "sform_code", "pixdim", "xyzt_units"):
        assert np.array_equal(after.header[name], before.header[name]), name
    assert np.array_equal(after.dataobj.get_unscaled(), stored)
    assert (after.dataobj.slope, after.dataobj.inter) == scale
    assert (
        source.limits is None
        if "float" in dtype
        else source.limits[0] == (np.iinfo(dtype).min * scale[0] + scale[1])
    )


def test_volumes_of_other_shapes(tmp_path):
    for shape, channels in (
        ((6, 9), 1),
        ((6, 9, 4, 3), 3),
        ((6, 9, 4, 1), 1),
        ((6, 9, 1, 1, 3), 3),
    ):
        path = save_nifti(tmp_path / "x.nii.gz", noise(shape, "int16"))
        source = identity(path, tmp_path / "y.nii.gz", channels)
        assert source[0].shape == (9, 6, channels)
        after = nibabel.load(tmp_path / "y.nii.gz")
        assert np.array_equal(np.asarray(after.dataobj), noise(shape, "int16"))
        with pytest.raises(UnreadableImage, match=f"has {channels} channels, not 2"):
            formats.read(path, 2)


def test_whole_ranges_stay_integers():
    """So that a resumed run, whose range comes from options.json as a list, has the same bytes."""
    for dtype, most in (("uint8", 255), ("uint16", 65535)):
        picture = noise((3, 4, 1), dtype)
        assert units.to_unit(picture, [0.0, float(most)]) is picture
        assert units.to_unit(picture, (0, most)) is picture
        assert units.to_unit(picture, (0, most - 1)).dtype == np.float32


def test_translations_in_other_units(tmp_path):
    """The type is the source's where it holds the target's range, else one that does."""
    path = save_nifti(tmp_path / "x.nii", noise((6, 5, 4), "uint8"))
    source = formats.read(path)
    for limits, dtype in (
        ((0, 255), "uint8"),
        ((-1024, 3071), "int16"),
        ((0, 65535), "uint16"),
        ((0.0, 1.0), "float32"),
        ((-1e6, 1e6), "float32"),
    ):
        values = np.linspace(*limits, 120).reshape(4, 5, 6, 1)
        formats.write(tmp_path / "y.nii", source, iter(values), limits)
        after = nibabel.load(tmp_path / "y.nii")
        assert after.get_data_dtype() == np.dtype(dtype), limits
        wanted = np.stack([np.rot90(v[..., 0], -1) for v in values], axis=2)
        step = 0.5 if "int" in dtype else (limits[1] - limits[0]) * 1e-6
        assert abs(after.get_fdata() - wanted).max() <= step


# ------------------------------------------------------------------------------------------------
# DICOM


def test_a_series_through_an_identity(tmp_path):
    hounsfield = {"RescaleSlope": 2, "RescaleIntercept": -1024, "PixelPaddingValue": 0}
    stored = noise((3, 6, 8), "uint16") % 4096
    stored[:, 0] = 0  # outside of the scanner's view
    for z, name in ((20, "IM1"), (0, "1.2.840.17"), (10, "b.dcm")):  # not in the order of names
        save_dicom(tmp_path / "ct" / name, stored[z // 10], z, **hounsfield)
    (tmp_path / "ct" / "notes").write_text("no picture")
    assert not formats.is_dicom(tmp_path / "ct" / "notes")
    save_dicom(tmp_path / "ct" / "other.dcm", stored[0], SeriesInstanceUID="9.9")
    ((tmp_path / "ct") / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM")
    names = [path for path in sorted((tmp_path / "ct").iterdir()) if formats.is_dicom(path)]
    groups = {len(group): group for group in dicom.group_series(names)}
    assert sorted(groups) == [1, 3] and len(dicom.group_series(names)) == 3
    paths = groups[3]
    assert [path.name for path in paths] == ["1.2.840.17", "b.dcm", "IM1"]
    outputs = [tmp_path / f"{i}.dcm" for i in range(3)]
    source = identity(paths, outputs, 1)
    assert source.limits == (-1024, 4095 * 2 - 1024)
    for i, output in enumerate(outputs):
        picture = source[i][..., 0]
        assert np.isnan(picture[0]).all()
        assert np.array_equal(picture[1:], stored[i, 1:].astype(float) * 2 - 1024, equal_nan=True)
        before, after = pydicom.dcmread(paths[i]), pydicom.dcmread(output)
        assert np.array_equal(after.pixel_array, stored[i])
        for name in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert after[name] == before[name]
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            assert after[name] == before[name]
        for name in ("SliceThickness", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue"):
            assert after[name] == before[name]
        assert after.SOPInstanceUID != before.SOPInstanceUID
        assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
        assert after.SourceImageSequence[0].ReferencedSOPInstanceUID == before.SOPInstanceUID
        assert list(after.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert "CycleGAN" in after.DerivationDescription and "thorax" in after.SeriesDescription
    series = {pydicom.dcmread(output).SeriesInstanceUID for output in outputs}
    assert len(series) == 1 and series != {"1.2.3.4"}


@pytest.mark.parametrize("case", ["inverted", "signed", "color", "frames", "packed", "table"])
def test_kinds_of_dicom(case, tmp_path):
    kind, more, stored = "MONOCHROME2", {}, noise((6, 8), "uint16") % 4096
    if case == "inverted":
        kind, expected = "MONOCHROME1", 4095 - stored.astype(int)
    elif case == "signed":
        stored = expected = (stored.astype(np.int16) - 2048).astype(np.int16)
    elif case == "color":
        kind, stored = "RGB", noise((6, 8, 3), "uint8")
        expected = stored
    elif case == "frames":
        stored = expected = noise((4, 6, 8), "uint8")
    elif case == "table":
        item = pydicom.Dataset()
        item.LUTDescriptor, item.ModalityLUTType = [4096, 0, 16], "HU"
        item.LUTData = np.array([v**2 % 4001 for v in range(4096)], "<u2").tobytes()
        kind, more["ModalityLUTSequence"] = "MONOCHROME1", [item]
        expected = 65535 - (stored.astype(int) ** 2 % 4001)
    path = save_dicom(tmp_path / "x.dcm", stored, kind=kind, **more)
    if case == "packed":
        ds = pydicom.dcmread(path)
        ds.compress(pydicom.uid.RLELossless)
        ds.save_as(path)
        expected = stored
    source = identity(path, tmp_path / "y.dcm")
    read = np.stack(list(source)) if case == "frames" else source[0]
    assert np.array_equal(read.squeeze(), expected)
    after = pydicom.dcmread(tmp_path / "y.dcm")
    assert after.PhotometricInterpretation == kind
    if case == "table":  # a slope in its place
        values = 65535 - pydicom.pixels.apply_modality_lut(after.pixel_array, after)
        assert "ModalityLUTSequence" not in after
        assert abs(values - expected).max() <= after.RescaleSlope / 2 + 0.01 < 9
    else:
        assert np.array_equal(after.pixel_array, stored)


def test_dicom_in_other_units(tmp_path):
    """A magnetic resonance slice that becomes Hounsfield units gets a scale that holds them."""
    path = save_dicom(tmp_path / "x.dcm", noise((5, 6), "uint16") % 4096)
    values = np.linspace(-1024, 3071, 30).reshape(5, 6, 1)
    formats.write(tmp_path / "y.dcm", formats.read(path), [values], (-1024, 3071))
    after = pydicom.dcmread(tmp_path / "y.dcm")
    got = pydicom.pixels.apply_rescale(after.pixel_array, after)
    assert abs(got - values[..., 0]).max() <= 0.5 + 1e-6
    assert (after.WindowCenter, after.WindowWidth) == (1023.5, 4095)


# ------------------------------------------------------------------------------------------------
# GeoTIFF


@pytest.mark.parametrize(
    ("dtype", "count", "nodata"),
    [("uint16", 4, 0), ("uint16", 4, None), ("int16", 1, -9999), ("float32", 2, float("nan"))]
    + [("float32", 1, -1e30), ("uint8", 3, None), ("uint8", 5, 255), ("float64", 1, None)],
)
def test_a_raster_through_an_identity(dtype, count, nodata, tmp_path):
    bands = noise((count, 20, 30), dtype)
    if nodata is not None:
        bands[0, 3:9] = nodata
    path = save_raster(tmp_path / "x.tif", bands, nodata)
    source = identity(path, tmp_path / "y.tif", count)
    picture = source[0]
    assert picture.shape == (20, 30, count) and np.isnan(picture[3:9, :, 0]).all() == (
        nodata is not None
    )
    with rasterio.open(path) as before, rasterio.open(tmp_path / "y.tif") as after:
        assert after.dtypes == before.dtypes and after.crs == before.crs
        assert after.transform == before.transform and after.descriptions == before.descriptions
        assert np.array_equal([after.nodata], [before.nodata], equal_nan=nodata is not None)
        assert after.tags()["sensor"] == "S2" and after.tags(1)["wavelength"] == "490"
        assert np.array_equal(after.read(), bands, equal_nan="f" in dtype)


def test_rasters_in_other_units(tmp_path):
    path = save_raster(tmp_path / "x.tif", noise((4, 20, 30), "uint16"), 0)
    values = np.linspace(0, 1, 600).reshape(20, 30, 1)
    values[:2] = np.nan
    formats.write(tmp_path / "y.tif", formats.read(path), [values], (0, 1))
    with rasterio.open(tmp_path / "y.tif") as after:
        assert after.dtypes == ("float32",) and after.nodata == 0
        assert after.read_masks(1).any(axis=1).tolist() == [False] * 2 + [True] * 18
        assert np.allclose(after.read(1)[2:], values[2:, :, 0])
    values = np.full((20, 30, 4), 0.2)  # rounds to the number that stands for no data
    formats.write(tmp_path / "y.tif", formats.read(path), [values], (0, 65535))
    with rasterio.open(tmp_path / "y.tif") as after:
        assert (after.read() == 1).all()


# ------------------------------------------------------------------------------------------------
# Films


def film_facts(path: Path) -> dict:
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        times = [float(f.pts * f.time_base) for f in container.decode(video)]
        facts = {"codec": video.codec_context.name, "pixels": video.pix_fmt, "times": times}
        facts |= {"rate": video.average_rate, "size": (video.height, video.width)}
    with av.open(str(path)) as container:
        tracks = container.streams.audio
        if tracks:
            facts["sound"] = tracks[0].codec_context.codec.canonical_name
            packets = [bytes(p) for p in container.demux(tracks[0]) if p.size]
            facts["packets"] = packets
    return facts


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"rate": "30000/1001", "sound": "aac"}),
        ("a.mov", {"rate": "24"}),
        ("a.mkv", {"rate": "25", "sound": "aac"}),
        ("a.webm", {"rate": "25", "sound": "libopus", "codec": "libvpx-vp9"}),
        ("a.avi", {"rate": "25", "sound": "pcm_s16le", "codec": "mpeg4"}),
        ("a.gif", {"rate": "10", "codec": "gif"}),
    ],
)
def test_a_film_through_an_identity(name, options, tmp_path):
    frames = [scene(t) for t in range(12)]
    path = save_film(tmp_path / name, frames, **options)
    source = identity(path, tmp_path / "out.mp4", 3)
    decoded = list(source)
    loss, again_loss = (25, 12) if name == "a.gif" else (6, 4)  # 256 fixed colors; yuv420p
    assert len(decoded) == 12 and abs(decoded[5].astype(int) - frames[5]).mean() < loss
    before, after = film_facts(path), film_facts(tmp_path / "out.mp4")
    assert (after["codec"], after["pixels"]) == ("h264", "yuv420p")
    assert after["rate"] == before["rate"] and after["size"] == (48, 64)
    offset = before["times"][0] - after["times"][0]
    assert np.allclose(before["times"], np.array(after["times"]) + offset, atol=1e-3)
    again = list(formats.read(tmp_path / "out.mp4"))
    assert all(
        abs(a.astype(int) - b).mean() < again_loss for a, b in zip(again, decoded, strict=True)
    )
    if "sound" in options:
        kept = options["sound"] != "pcm_s16le"  # which mp4 players do not know
        assert after["sound"] == (before["sound"] if kept else "aac")
        assert not kept or after["packets"] == before["packets"]


def test_odd_sizes_and_uneven_times(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264rgb", rate=25)
        stream.width, stream.height, stream.pix_fmt = 33, 47, "rgb24"
        stream.codec_context.time_base = Fraction(1, 1000)
        for t, time in enumerate((0, 40, 90, 300, 333)):
            frame = av.VideoFrame.from_ndarray(scene(t, 47, 33), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    identity(tmp_path / "a.mkv", tmp_path / "b.mp4", 3)
    facts = film_facts(tmp_path / "b.mp4")
    assert np.allclose(facts["times"], [0, 0.04, 0.09, 0.3, 0.333]) and facts["size"] == (48, 34)


# ------------------------------------------------------------------------------------------------
# Hostile files


def originals(folder: Path) -> dict[str, list[Path]]:
    """Sound files of each format, stored in several ways."""
    gray = noise((12, 16), "uint16") % 4096
    files = {
        "nifti": [
            save_nifti(folder / "a.nii", noise((6, 9, 4), "int16"), 0.5, -100),
            save_nifti(folder / "b.nii.gz", noise((6, 9, 4), "float32")),
        ],
        "dicom": [
            save_dicom(folder / "a.dcm", gray, RescaleSlope=2, RescaleIntercept=-1024),
            save_dicom(folder / "b.dcm", noise((4, 6, 8), "uint8")),
            save_dicom(folder / "c.dcm", noise((6, 8, 3), "uint8"), kind="RGB"),
        ],
        "raster": [
            save_raster(folder / "a.tif", noise((4, 20, 30), "uint16"), 0),
            save_raster(folder / "b.tif", noise((2, 20, 30), "float32"), compress="deflate"),
            save_raster(folder / "c.tif", noise((3, 20, 30), "uint8"), compress="lzw", tiled=False),
        ],
        "film": [
            save_film(folder / "a.mp4", [scene(t) for t in range(4)], sound="aac"),
            save_film(folder / "b.mkv", [scene(t) for t in range(4)]),
            save_film(folder / "c.gif", [scene(t) for t in range(4)], codec="gif"),
            save_film(folder / "d.avi", [scene(t) for t in range(4)], codec="mpeg4"),
            save_film(folder / "e.webm", [scene(t) for t in range(4)], codec="libvpx"),
        ],
    }
    dataset = pydicom.dcmread(files["dicom"][0])
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(folder / "d.dcm")
    files["dicom"].append(folder / "d.dcm")
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes overwritten, cut off or cut out, or a number of the header made large."""
    data, way = bytearray(data), rng.randrange(4)
    start = rng.randrange(len(data))
    if way == 0:
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif way == 1:
        del data[start:]
    elif way == 2:
        del data[start : start + rng.randrange(1, 200)]
    else:
        form = rng.choice(("<I", ">I", "<H", ">H", "<f", "<q"))
        number = rng.choice((0, 1, 2**15 - 1, 2**15, 20_000, 2**31 - 1, 2**31))
        number = float(number) if form == "<f" else number % 2 ** (8 * struct.calcsize(form))
        place = rng.randrange(min(len(data) - 8, 600))
        data[place : place + struct.calcsize(form)] = struct.pack(form, number)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # rasterio's log
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc")
@pytest.mark.parametrize("kind", ["nifti", "dicom", "raster", "film"])
def test_hostile_files(kind, tmp_path):
    """200 mutated files: each gives pictures or one line, and memory stays bounded."""
    files = originals(tmp_path)[kind]
    for path in files:
        assert len(list(formats.read(path))) >= 1, path  # sound as they are
    rng, before = random.Random(0), peak_memory(forget=True)
    read = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(200):
            path = files[i % len(files)]
            target = tmp_path / f"mutated{''.join(path.suffixes)}"
            target.write_bytes(mutate(path.read_bytes(), rng))
            try:
                if kind == "dicom":
                    dicom.group_series([target])
                for picture in formats.read(target):
                    assert picture.ndim == 3 and picture.size
                read += 1
            except UnreadableImage as error:
                assert str(error) and "\n" not in str(error)
                refused += 1
    grown = (peak_memory() - before) / 2**20
    print(f"{kind}: {read} read, {refused} refused, {grown:.0f} MiB more at most")
    assert read > 10 and refused > 30
    assert grown < 600


def refusal(path: Path) -> str:
    """The one line that a bad file gives, decoded to its end; little memory is used for it."""
    before = peak_memory(forget=True)
    with pytest.raises(UnreadableImage) as caught:
        list(formats.read(path))
    assert peak_memory() - before < 100 * 2**20
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform", "ignore:Image size")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc")
def test_lying_and_broken_files(tmp_path):
    volume = noise((6, 9, 40), "int16")
    header = nibabel.load(save_nifti(tmp_path / "a.nii", volume)).header
    header.set_data_shape((10_000, 10_000, 10_000))  # 10^12 voxels
    for name in ("lying.nii", "lying.nii.gz"):
        opened = gzip.open if name.endswith(".gz") else open
        with opened(tmp_path / name, "wb") as file:
            file.write(header.binaryblock + bytes(1000))
        assert "its header promises 2000000000000 bytes" in refusal(tmp_path / name)
    whole = save_nifti(tmp_path / "a.nii.gz", volume).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path / "cut.nii.gz")
    assert formats.read(tmp_path / "cut.nii.gz")[0].shape == (9, 6, 1)  # what is there can be had

    path = save_dicom(tmp_path / "a.dcm", noise((6, 8), "uint8"))
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(tmp_path / "empty.dcm")
    assert "pixel" in refusal(tmp_path / "empty.dcm").lower()
    del dataset.Rows
    dataset.save_as(tmp_path / "report.dcm")
    assert refusal(tmp_path / "report.dcm") == "it has no pixels"
    dataset = pydicom.dcmread(path)
    dataset.PerFrameFunctionalGroupsSequence = [pydicom.Dataset()]
    dataset.save_as(tmp_path / "enhanced.dcm")
    assert "it is an enhanced multi-frame file" in refusal(tmp_path / "enhanced.dcm")
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames = 10**9
    dataset.save_as(tmp_path / "frames.dcm")
    assert "says that it has 1000000000 frames" in refusal(tmp_path / "frames.dcm")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = bytes(100_000_000)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "bomb.dcm")
    assert (tmp_path / "bomb.dcm").stat().st_size < 200_000
    assert "deflated" in refusal(tmp_path / "bomb.dcm")

    strip = {"compress": "deflate", "tiled": False, "blockysize": 9400, "sparse_ok": True}
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint16", "height": 9400, "width": 9600}
    with rasterio.open(tmp_path / "strip.tif", "w", **profile | strip):
        pass
    assert "over Pillow's size limit" in refusal(tmp_path / "strip.tif")
    (tmp_path / "page.tif").write_text("<VRTDataset></VRTDataset>")
    assert "cannot identify" in refusal(tmp_path / "page.tif")

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        track = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.rate = 48_000
        container.mux(track.encode(frame))
        container.mux(track.encode())
    assert refusal(tmp_path / "sound.mp4") == "it has no video"
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1\n/etc/passwd\n")
    assert refusal(tmp_path / "list.mp4")


@pytest.mark.parametrize(
    ("module", "name"),
    [("nibabel", "x.nii.gz"), ("pydicom", "x.dcm"), ("rasterio", "x.tif"), ("av", "x.mp4")],
)
def test_a_library_that_is_missing(module, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"II*\0")
    with pytest.raises(UserError, match=f"files need {module}: pip install {module}$"):
        formats.read(tmp_path / name)


def test_a_film_that_was_held_sideways(tmp_path):
    """Telephones store how they were held beside the frames."""
    path = save_film(tmp_path / "a.mp4", [scene(0)] * 2)
    data = bytearray(path.read_bytes())
    matrix = data.index(
        struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd")
    )
    data[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30
    )
    path.write_bytes(data)
    (first, _) = list(formats.read(path))
    assert first.shape == (64, 48, 3)
    assert abs(first.astype(int) - np.rot90(scene(0), -1)).mean() < 6  # turned clockwise to be seen
    identity(path, tmp_path / "b.mp4", 3)
    assert film_facts(tmp_path / "b.mp4")["size"] == (64, 48)


# ------------------------------------------------------------------------------------------------
# The scripts


def save_identity(path: Path, channels: int, **metadata: str) -> Path:
    """An ONNX file of a network that changes nothing."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    shape = ["batch", channels, "height", "width"]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("input", "output")
    ]
    node = onnx.helper.make_node("Identity", ["input"], ["output"])
    graph = onnx.helper.make_graph([node], "identity", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def translate(folder: Path, workdir: Path, channels: int, *more, code=0, **metadata) -> Path:
    """`test.py --weights identity.onnx --input FOLDER`; where the outputs are."""
    workdir.mkdir(exist_ok=True)
    weights = save_identity(workdir / "identity.onnx", channels, **metadata)
    words = ["--workdir", workdir, "--weights", weights, "--input", folder, *more]
    args = test.parse_args([str(word) for word in [*words, "--device", "cpu", "--amp", "off"]])
    assert test.main(args) == code
    return workdir / "outputs" / "B"


def test_the_script_through_an_identity(tmp_path, capsys):
    """Volumes, a series, rasters and pictures of one channel, damaged ones between them."""
    source, hounsfield = tmp_path / "in", {"RescaleSlope": 1, "RescaleIntercept": -1024}
    volume, stored = noise((6, 9, 4), "int16"), noise((2, 6, 8), "uint16") % 4096
    save_nifti(source / "a.nii.gz", volume)
    for z in (0, 1):
        save_dicom(source / "ct" / f"1.2.{z}", stored[z], z, **hounsfield)
    raster = noise((1, 20, 30), "uint16")
    raster[0, :5] = 0
    save_raster(source / "b.tif", raster, 0)
    Image.fromarray(noise((9, 12), "uint8")).save(source / "gray.png")
    (source / "cut.nii.gz").write_bytes((source / "a.nii.gz").read_bytes()[:200])
    (source / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM")
    out = translate(source, tmp_path / "run", 1, code=1)
    said = capsys.readouterr().out
    assert "A2B: 5 of 7 pictures translated" in said and said.count("could not be read: ") == 2
    after = nibabel.load(out / "a.nii.gz")
    assert np.allclose(after.affine, AFFINE) and after.get_data_dtype() == np.int16
    assert abs(np.asarray(after.dataobj).astype(int) - volume).max() <= 1
    for z in (0, 1):
        after = pydicom.dcmread(out / "ct" / f"1.2.{z}.dcm")
        assert abs(after.pixel_array.astype(int) - stored[z]).max() <= 1
    with rasterio.open(out / "b.tif") as after:
        assert abs(after.read().astype(int) - raster).max() <= 1 and after.crs.to_epsg() == 32633
        assert (after.read() == 0).sum() == (raster == 0).sum()
    assert np.array_equal(np.asarray(Image.open(out / "gray.png")), noise((9, 12), "uint8"))
    assert sorted(p.name for p in (tmp_path / "run" / "result").glob("A2B_*.png"))


def smooth(shape: tuple, seed: int) -> np.ndarray:
    """A few blobs in [0, 1], so that there is something to see."""
    rng = np.random.default_rng(seed)
    grids = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    blobs = [
        np.exp(-sum((g - c) ** 2 for g, c in zip(grids, rng.random(len(shape)), strict=True)) * 20)
        for _ in range(3)
    ]
    return sum(blobs) / 3


def run_twice(data: Path, tmp_path: Path, options: str, typed: bool = False) -> dict:
    """Train two epochs, and one and then another: the same bytes; then `test.py`.

    The first is `typed` as a user would, in a process of its own. Returns the options kept.
    """
    options += " --size 64 --load_size 66 --lr_policy constant --n_epochs"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums depends on it
    if typed:
        command = [sys.executable, tiny.ROOT / "train.py"]
        command += tiny.words(data, tmp_path / "whole", f"{options} 2")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
    else:
        assert tiny.run(data, tmp_path / "whole", f"{options} 2") == 0
    assert tiny.run(data, tmp_path / "parts", f"{options} 1 --cache off") == 0
    assert tiny.resume(tmp_path / "parts", "--n_epochs 2") == 0
    torch.set_num_threads(threads)
    whole, parts = (tiny.outcome(tmp_path / name) for name in ("whole", "parts"))
    assert not tiny.differences(whole, parts)
    words = ["--workdir", str(tmp_path / "whole"), "--device", "cpu", "--volume_norm"]
    assert test.main(test.parse_args(words)) == 0
    return json.loads((tmp_path / "whole" / "models" / "options.json").read_text())


def test_training_on_volumes(tmp_path, monkeypatch):
    """CT-like int16 to MR-like float32, then the test split, its volumes in the target's units."""
    data = tmp_path / "set"
    for split, n in (("train", 2), ("test", 1)):
        for i in range(n):
            hounsfield = (smooth((40, 44, 3), i) * 2000 - 1000).astype(np.int16)
            save_nifti(data / f"{split}A" / f"{i}.nii.gz", hounsfield)
            weighted = smooth((40, 44, 4), 9 + i).astype(np.float32) * 300
            save_nifti(data / f"{split}B" / f"{i}.nii", weighted)
    channels = "--input_nc 1 --output_nc 1"
    with pytest.raises(UserError, match=r"floats: say with --range_A LO HI.*maximum [\d.]+, perc"):
        tiny.run(data, tmp_path / "refused", channels)
    options = argparse.Namespace(preprocess="none", load_size=0, size=0, axis=0)
    skipped, limits = tmp_path / "skipped.txt", (-1000, 1000)
    domain = datasets.Domain(data, "trainA", 1, options, skipped, limits)
    assert len(domain) == 80  # across the first axis; the sixth slice of the second volume
    plane = formats.read(data / "trainA" / "1.nii.gz", axis=0)[5].astype(float) / 1000
    resized = datasets.resize(plane.astype(np.float32), (44, 32))  # 3 rows are too few to train on
    assert np.allclose(domain[45].permute(1, 2, 0), resized, atol=1e-5)
    options = run_twice(data, tmp_path, f"{channels} --range_A -1000 1000 --range_B 0 300")
    assert options["range_A"] == [-1000, 1000] and options["range_B"] == [0, 300]
    assert len((tmp_path / "whole" / "logs" / "losses.csv").read_text().splitlines()) == 17
    after = nibabel.load(tmp_path / "whole" / "outputs" / "B" / "0.nii.gz")
    assert after.shape == (40, 44, 3) and after.get_data_dtype() == np.int16
    assert np.allclose(after.affine, AFFINE)
    assert after.get_fdata().min() >= 0 and 10 < after.get_fdata().max() <= 300
    net = load_generator(tmp_path / "whole" / "models" / "netG_A2B_ema.pth")
    slices = [p.clip(-1000, 1000) for p in formats.read(data / "testA" / "0.nii.gz")]
    slices = [datasets.resize(p.astype(np.float32) / 1000, (64, 64)) for p in slices]
    dtype = devices.pick_precision("auto", torch.device("cpu"))
    for joint in (True, False):  # --volume_norm is what was typed
        fakes = translate_batch(net, slices, torch.device("cpu"), dtype, np.float32, joint)
        fakes = [datasets.resize(fake, (40, 44))[..., 0] for fake in fakes]
        wanted = np.stack([np.rot90(fake, -1) for fake in fakes], axis=2) * 150 + 150
        assert (abs(after.get_fdata() - wanted).max() < 1) == joint

    few = functools.partial(metrics.sample_patches, n=64)  # measures of the slices in the middle
    monkeypatch.setattr(metrics, "sample_patches", few)
    back = load_generator(tmp_path / "whole" / "models" / "netG_B2A_ema.pth")
    files = {"A2B": data / "testA" / "0.nii.gz", "B2A": data / "testB" / "0.nii"}
    pairs = {way: [(path, None)] for way, path in files.items()}
    nets, device = {"netG_A2B": net, "netG_B2A": back}, torch.device("cpu")
    measures, _ = validation.measure(nets, pairs, options, device, dtype)
    (fake,) = translate_batch(net, slices[1:2], device, dtype)
    (rec,) = translate_batch(back, [fake], device, dtype)
    cycle = abs(rec - slices[1]).mean() * 127.5
    assert measures["cycle_A2B"] == pytest.approx(float(cycle), rel=1e-4)
    real = datasets.resize(formats.read(files["B2A"])[2] / 150 - 1, (64, 64))
    patches = (metrics.sample_patches([validation.as_pixels(x, 64)]) for x in (fake, real))
    assert measures["swd_A2B"] == pytest.approx(metrics.sliced_wasserstein(*patches), rel=1e-4)
    after = nibabel.load(tmp_path / "whole" / "outputs" / "A" / "0.nii")
    assert after.get_data_dtype() == np.float32 and -1000 <= after.get_fdata().min() < 0


def test_training_on_series(tmp_path):
    for letter in ("trainA", "trainB", "testA", "testB"):
        for i in range(3):
            stored = (smooth((40, 44), i) * 4000).astype(np.uint16)
            name = tmp_path / "set" / letter / f"1.2.{i}"
            save_dicom(name, stored, i, RescaleSlope=1, RescaleIntercept=-1024)
    options = run_twice(tmp_path / "set", tmp_path, "--input_nc 1 --output_nc 1")
    assert options["range_A"] == [-1024, 3071]
    made = [pydicom.dcmread(tmp_path / "whole" / "outputs" / "B" / f"1.2.{i}.dcm") for i in (0, 2)]
    assert [after.ImagePositionPatient[2] for after in made] == [0, 2]
    assert made[0].SeriesInstanceUID == made[1].SeriesInstanceUID != "1.2.3.4"
    assert made[0].RescaleIntercept == -1024 and made[0].pixel_array.std() > 10


def test_training_on_rasters(tmp_path):
    for split in ("trainA", "trainB", "testA", "testB"):
        for i in range(2):
            bands = smooth((4, 40, 44), i) * 9000 + (2000 if split[-1] == "B" else 1)
            bands[:, :4] = 0
            save_raster(tmp_path / "set" / split / f"{i}.tif", bands.astype(np.uint16), 0)
    ranges = "--range_A 0 10000 --range_B 0 12000"
    run_twice(tmp_path / "set", tmp_path, f"--input_nc 4 --output_nc 4 {ranges}", typed=True)
    with rasterio.open(tmp_path / "whole" / "outputs" / "B" / "1.tif") as after:
        assert after.shape == (40, 44) and after.dtypes == ("uint16",) * 4
        bands = after.read()
        assert after.crs.to_epsg() == 32633 and bands.max() <= 12_000
        assert (bands[:, :4] == 0).all() and (bands[:, 4:] > 0).all()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return init_weights(Generator(ngf=4, n_residual_blocks=1), init_gain=0.1).eval()


def test_arrays_from_many_threads(net):
    """Whole and by tiles, any type; eight threads with one network get what one gets."""
    arrays = [noise((40, 52, 3), "uint8", i) for i in range(8)]
    expected = []
    for array in arrays:
        with torch.no_grad():
            x = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
            y = (net(x)[0].permute(1, 2, 0).numpy() + 1) * 127.5
        expected.append(y.round().astype(np.uint8))
    with ThreadPoolExecutor(8) as pool:
        for tile in (0, 16):
            got = list(pool.map(lambda a, tile=tile: translate_array(net, a, tile=tile), arrays))
            for a, b in zip(got, expected, strict=True):
                assert abs(a.astype(int) - b).max() <= (1 if tile else 0)
    hounsfield = arrays[0].astype(np.float64) * 10 - 1000
    got = translate_array(net, hounsfield, (-1000, 1550), (0, 1))
    assert got.dtype == np.float64 and abs(got * 255 - expected[0]).max() <= 0.51
    hounsfield[3, 4] = np.nan
    assert np.isnan(translate_array(net, hounsfield, (-1000, 1550))).sum() == 3
    for bad in (hounsfield, arrays[0][..., :2], arrays[0][..., 0]):
        with pytest.raises(ValueError, match=r"give \(H, W, 3\)"):
            translate_array(net, bad)


def test_ranges_of_an_exported_network(tmp_path, monkeypatch):
    """They are in the ONNX file, so it says by itself what its values mean."""
    found = []
    monkeypatch.setattr(export, "export", lambda *arguments: found.append(arguments[-1]) or 0.0)
    (tmp_path / "options.json").write_text('{"range_A": [-1000, 3000], "range_B": [0, 300.5]}')
    export.main(export.parse_args(["--weights", str(tmp_path / "netG_B2A_ema.pth")]))
    assert found == [((0, 300.5), (-1000, 3000))]

    stored = noise((9, 8, 2), "int16")
    save_nifti(tmp_path / "in" / "x.nii", stored)
    ranges = {"input_range": "-1000 3000", "output_range": "0 300.5"}
    made = nibabel.load(translate(tmp_path / "in", tmp_path / "run", 1, **ranges) / "x.nii")
    expected = (stored.clip(-1000, 3000) + 1000.0) / 4000 * 300.5
    assert made.get_data_dtype() == np.int16 and abs(made.get_fdata() - expected).max() <= 0.501
    out = translate(tmp_path / "in", tmp_path / "run", 1, "--range_B", "0", "1", **ranges)
    made = nibabel.load(out / "x.nii")
    assert made.get_data_dtype() == np.float32
    assert np.allclose(made.get_fdata(), expected / 300.5, atol=1e-5)


def test_films_and_their_frames(net, tmp_path, capsys):
    film = [*(scene(t) for t in range(7)), scene(7) // 4]  # dark at the end
    film = save_film(tmp_path / "clip.webm", film, "4", codec="libvpx")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    words = ["--workdir", tmp_path, "--weights", tmp_path / "net.pth", "--input", film]
    words = [str(word) for word in [*words, "--device", "cpu", "--amp", "off"]]
    for other in (["--tile", "64"], ["--views", "2"]):
        with pytest.raises(UserError, match="leave out --tile and --views$"):
            test.main(test.parse_args([*words, "--smooth", "0.9", *other]))
    assert test.main(test.parse_args([*words, "--side_by_side", "--smooth", "0.9"])) == 0
    frames = list(formats.read(tmp_path / "outputs" / "B" / "clip.mp4"))
    assert len(frames) == 8 and frames[0].shape == (48, 128, 3)
    assert abs(frames[5][:, :64].astype(int) - scene(5)).mean() < 6
    first = translate_array(net, next(iter(formats.read(film))))  # its statistics are its own
    blocks = lambda p: p.astype(float).reshape(6, 8, 8, 8, 3).mean((1, 3))  # a film keeps these
    assert abs(blocks(frames[0][:, 64:]) - blocks(first)).max() < 6 < blocks(first).std()
    for keep in (0.9, 0):  # as typed; the dark frame's own statistics would make it bright
        moving = share_norm(net, keep)
        last = [translate_array(moving, picture) for picture in formats.read(film)][-1]
        assert (abs(blocks(frames[7][:, 64:]) - blocks(last)).max() < 6) == (keep == 0.9)
    assert (tmp_path / "result" / "A2B_clip.png").exists()

    save_frames.main(
        save_frames.parse_args([str(film), str(tmp_path / "set" / "trainA"), "--every", "0.5"])
    )
    assert "4 pictures saved" in capsys.readouterr().out
    names = [f"clip_0000{i // 2}.{i % 2 * 5}0.png" for i in range(4)]
    assert sorted(p.name for p in (tmp_path / "set" / "trainA").iterdir()) == names
    taken = np.asarray(Image.open(tmp_path / "set" / "trainA" / names[3]))
    assert abs(taken.astype(int) - scene(6)).mean() < 6


def test_smooth_is_a_moving_average(net):
    """Of a batch alone, or with what is kept of those before; (--volume_norm: test_tiling.py)."""
    x = [torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    moving = share_norm(net, 0.5)
    with torch.no_grad():
        assert torch.allclose(moving(x[0]), net(x[0]), atol=1e-5)
        for picture in x[1:]:
            moving(picture)
        z = torch.stack([net.model[1](net.model[0](p)) for p in x])  # (3, 1, C, H, W)
    first = next(m for m in moving.modules() if isinstance(m, SharedNorm))
    expected = [
        0.25 * v[0] + 0.25 * v[1] + 0.5 * v[2]
        for v in (z.mean((1, 3, 4)), z.square().mean((1, 3, 4)))
    ]
    assert torch.allclose(first.means.squeeze(), torch.stack(expected), atol=1e-6)
    with pytest.raises(UserError, match="does not have: leave them out"):
        share_norm(Generator(norm="batch", ngf=2, n_residual_blocks=1))


def test_a_raster_by_windows(tmp_path):
    """By tiles it is read and written in windows, with the result of the whole pass."""
    bands = (smooth((3, 90, 120), 1) * 9000).astype(np.uint16) + 1
    bands[:, 20:40, 30:60] = 0
    save_raster(tmp_path / "in" / "x.tif", bands, 0)
    torch.manual_seed(0)
    net = init_weights(Generator(3, 2, ngf=4, n_residual_blocks=1), init_gain=0.1)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    made = []
    for tile in (0, 32):
        run = tmp_path / str(tile)
        words = ["--workdir", run, "--weights", tmp_path / "net.pth", "--input", tmp_path / "in"]
        words += ["--range_A", 0, 9000, "--range_B", -500, 1500, "--tile", tile]
        args = test.parse_args([str(w) for w in [*words, "--device", "cpu", "--amp", "off"]])
        assert test.main(args) == 0
        with rasterio.open(run / "outputs" / "B" / "x.tif") as raster:
            assert raster.dtypes == ("int16",) * 2 and raster.crs.to_epsg() == 32633
            made.append(raster.read().astype(int))
            assert (made[-1][:, 20:40, 30:60] == raster.nodata).all()
            assert (raster.read_masks(1) == 0).sum() == 600
        assert (run / "result" / "A2B_x.png").exists()
    assert abs(made[0] - made[1]).max() <= 1 and made[0].std() > 50
