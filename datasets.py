"""From image files to tensors: listing, decoding, the cache, and the unpaired training set.

A picture is an array (H, W, C), uint8, or uint16 where a single-channel domain keeps 16 bits; its
tensor is (C, H, W).
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.contrib.concurrent import thread_map

from lib import formats, units
from lib.processes import ignore_signals, worker_context
from lib.units import UnreadableImage
from utils import UserError, writing

EXTENSIONS = formats.PICTURES + formats.UNITS

# ------------------------------------------------------------------------------------------------
# Finding pictures


def list_images(folder: Path, suffixes: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Names of all pictures and volumes below `folder`, relative, with "/", sorted.

    No file is opened, but for those without a suffix, to see whether they are DICOM. Links are
    followed; a folder that is reached twice is listed once. Raises UserError if a folder cannot be
    read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    names, visited = [], set()
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.path.realpath(root)
        if here in visited:
            folders.clear()
            continue
        visited.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = f"{Path(root).relative_to(folder).as_posix()}/".removeprefix("./")
        names += [
            prefix + name
            for name in files
            if name.lower().endswith(suffixes) or formats.is_dicom(Path(root, name))
        ]
    return sorted(names)


def find_split(dataroot: Path, split: str) -> Path:
    """The folder of a split such as "trainA": `<dataroot>/trainA` or `<dataroot>/train/A`.

    Raises UserError if neither exists, or if it contains no picture.
    """
    folders = (dataroot / split, dataroot / split[:-1] / split[-1])
    for folder in folders:
        if folder.is_dir():
            if list_images(folder):
                return folder
            kinds = ", ".join(EXTENSIONS)
            raise UserError(f"{folder} holds no picture ({kinds}): add some, or change --dataroot")
    raise UserError(
        f"there is no folder {folders[0]} (nor {folders[1]}): `python -m tools.download "
        f"{dataroot.name or 'apple2orange'}` downloads it if it is a known set, "
        "`python -m tools.download demo` draws one, or change --dataroot"
    )


# ------------------------------------------------------------------------------------------------
# One picture


def load_image(
    path: Path,
    channels: int = 3,
    limits: tuple[float, float] | None = None,
    index: int | None = None,
    axis: int = -1,
) -> np.ndarray:
    """One picture of a file, (H, W, channels): as stored if uint8 or uint16, else in [-1, 1].

    `limits` are the values that become -1 and 1, the whole range of an integer type if None.
    `index` is the slice of a volume (across `axis`) or frame, None the one in the middle. Files are
    converted to `channels` as lib/formats.py says.

    Raises UnreadableImage if it is damaged, too large, of other channels, of floats without
    `limits`, or no picture at all; UserError if the library that reads it is missing.
    """
    source = formats.read(path, channels, axis)
    picture = source[len(source) // 2 if index is None else index]
    limits = limits or source.limits
    if limits is None:
        raise UnreadableImage("it holds floats: say their range with --range_A or --range_B")
    return units.to_unit(picture, limits)


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) to `size` = (width, height): bicubic, antialiased; same dtype.

    uint8, uint16, or floats in [-1, 1].
    """
    pixels = picture.astype(np.float32) if picture.dtype == np.uint16 else picture
    pixels = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    resized = resized[0].permute(1, 2, 0).numpy()
    if picture.dtype == np.uint16:  # PyTorch clamps uint8 only
        return resized.clip(0, 65535).round().astype(np.uint16)
    return resized if picture.dtype == np.uint8 else resized.clip(-1, 1)


def target_size(width: int, height: int, options) -> tuple[int, int]:
    """The (width, height) that a picture is resized to before a crop; see `--preprocess`."""
    preprocess, load_size, size = options.preprocess, options.load_size, options.size
    if preprocess == "resize_and_crop":
        return load_size, load_size
    if preprocess == "crop":  # not resized, unless it is smaller than the crop
        scale = max(1.0, size / min(width, height))
        return max(size, round(width * scale)), max(size, round(height * scale))
    if preprocess == "scale_width_and_crop":
        return load_size, max(size, round(height * load_size / width))
    if preprocess == "scale_width":
        width, height = load_size, height * load_size / width
    # multiples of 4 for the generators, and 32 leaves discriminators a map of 2x2
    return max(32, round(width / 4) * 4), max(32, round(height / 4) * 4)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Integers, 0 to the largest of their type, to float32 in [-1, 1]; floats are unchanged."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float() / (torch.iinfo(pixels.dtype).max / 2) - 1


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 or uint16 -> (C, H, W) float32 in [-1, 1]."""
    return to_float(torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1))


def to_array(tensor: torch.Tensor, dtype: type = np.uint8) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> (H, W, C) uint8 or uint16, rounded to the nearest; or floats."""
    values = tensor.detach().float().cpu().permute(1, 2, 0).numpy()
    if np.dtype(dtype).kind == "f":
        return values
    most = np.iinfo(dtype).max
    return ((values + 1) * (most / 2)).round().clip(0, most).astype(dtype)


def to_rgb(picture: np.ndarray) -> Image.Image:
    """An 8-bit RGB image to show of any (H, W, C): gray if C < 3, else its first three channels.

    uint8, uint16, or floats in [-1, 1].
    """
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    if picture.dtype.kind == "f":
        picture = to_array(to_tensor(picture))
    channels = [0, 0, 0] if picture.shape[2] < 3 else [0, 1, 2]
    return Image.fromarray(np.ascontiguousarray(picture[..., channels]))


# ------------------------------------------------------------------------------------------------
# The training set


def report_skipped(log: Path, picture: Path, reason: str) -> None:
    """Print that a picture is unreadable and append it to `log`, unless the log has it already."""
    line = f"{picture}: {reason}".replace("\n", " ") + "\n"
    with writing(log), open(log, "a+", encoding="utf-8", errors="surrogateescape") as file:
        file.seek(0)
        if line in file:  # from another worker, or from before a resume
            return
        file.write(line)
    print(f"\nskipped {line}".encode(errors="replace").decode(), end="", file=sys.stderr)


class Domain:
    """The pictures of one domain, decoded and resized when asked for, or all at once by `cache`.

    The slices of a volume are pictures of their own. In place of an unreadable picture, which is
    reported, comes the next readable one. `limits` are the values that become -1 and 1; None: the
    whole range of an integer type, as for 8 bits. Raises UserError if there is no folder, no
    picture, or none that can be read.
    """

    def __init__(
        self,
        dataroot: Path,
        split: str,
        channels: int,
        options,
        skip_log: Path,
        limits: tuple[float, float] | None = None,
        excluded: Sequence[str] = (),
    ):
        self.folder = find_split(dataroot, split)
        self.names = sorted({*list_images(self.folder)} - {*excluded})
        counts = [formats.count(self.folder / name, options.axis) for name in self.names]
        self.ends = np.cumsum(counts)  # of each file's pictures, so that a slice is found by number
        self.channels, self.options, self.skip_log = channels, options, skip_log
        paths = (self.folder / name for name in self.names)
        self.limits = limits or formats.find_limits(paths, channels, options.axis)
        self.cached: list[torch.Tensor | None] = []
        self.first = self[0]  # raises at the start if no picture can be read

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> torch.Tensor:
        for j in range(i, i + len(self)):
            picture = self.cached[j % len(self)] if self.cached else self.read(j % len(self))
            if picture is not None:
                return picture  # (C, h, w), uint8, uint16, or float32 in [-1, 1]
        raise UserError(f"not one picture in {self.folder} can be read: see {self.skip_log}")

    def read(self, i: int) -> torch.Tensor | None:
        file = int(np.searchsorted(self.ends, i, "right"))
        path = self.folder / self.names[file]
        index = i - int(self.ends[file])  # from the file's last picture
        try:
            picture = load_image(path, self.channels, self.limits, index, self.options.axis)
        except UnreadableImage as error:
            report_skipped(self.skip_log, path, str(error))
            return None
        height, width = picture.shape[:2]
        picture = resize(picture, target_size(width, height, self.options))
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()

    def cache(self) -> None:
        """Decode every picture now, in threads; from then on only memory is read."""
        how = {"max_workers": min(16, os.cpu_count() or 1), "leave": False, "delay": 2}
        self.cached = thread_map(
            self.read, range(len(self)), desc=f"reading {self.folder.name}", **how
        )

    def cache_bytes(self) -> int:
        """The approximate size of the cache: the first picture's bytes times their number."""
        return self.first.nbytes * len(self)


class UnpairedImages(Dataset):
    """Pairs of unrelated pictures, one of A and one of B, for one epoch after another.

    `self[epoch, index]` is a pair of (C, size, size) tensors, uint8 in [0, 255] (float32 in [-1, 1]
    if a domain has other than 3 channels), and is a function of (seed, epoch, index) alone:
    A comes in shuffled order, B is drawn independently, both randomly cropped and flipped (paper
    section 7.1). An epoch has `len(self)` = max(|A|, |B|) samples; a larger index starts over.
    """

    def __init__(self, A: Domain, B: Domain, size: int, flip: bool = True, seed: int = 0):
        self.A, self.B, self.size, self.flip, self.seed = A, B, size, flip, seed
        self.crop = A.options.preprocess.endswith("crop")
        self.epoch = None  # the epoch of self.order

    def __len__(self) -> int:
        return max(len(self.A), len(self.B))

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key
        if epoch != self.epoch:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
            self.epoch = epoch
        i = int(self.order[index % len(self)]) % len(self.A)
        rng = np.random.default_rng((self.seed, epoch, index))
        j = int(rng.integers(len(self.B)))
        return self.augment(self.A[i], rng), self.augment(self.B[j], rng)

    def augment(self, picture: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """A random crop of `picture` (C, h, w), flipped with probability 1/2."""
        _, height, width = picture.shape
        y, x, flip = rng.random(3)
        if self.crop:
            top, left = int(y * (height - self.size + 1)), int(x * (width - self.size + 1))
            picture = picture[:, top : top + self.size, left : left + self.size]
        # RGB stays uint8 until it is on the device: a quarter of the bytes to copy
        if len(picture) != 3 or picture.dtype != torch.uint8:
            picture = to_float(picture)  # torch.flip takes no uint16 in PyTorch 2.11
        return picture.flip(-1) if self.flip and flip < 0.5 else picture


@dataclass
class RunSampler:
    """The keys (epoch, index) of one rank's batches, from a given sample to the end of the run.

    Ranks take batches in turn. Every batch is full: the last of an epoch is filled from its start.
    """

    length: int  # samples in an epoch
    batch_size: int
    per_step: int  # samples in one optimizer step of all ranks together
    epochs: range
    first_sample: int = 0  # of the first epoch
    rank: int = 0
    world_size: int = 1

    def steps(self) -> Iterator[tuple[int, int]]:
        """(epoch, number of its first sample) of each step."""
        first = self.first_sample
        for epoch in self.epochs:
            for sample in range(first, self.length, self.per_step):
                yield epoch, sample
            first = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        mine, stride = self.rank * self.batch_size, self.world_size * self.batch_size
        for epoch, sample in self.steps():
            for first in range(sample + mine, sample + self.per_step, stride):
                yield [(epoch, first + i) for i in range(self.batch_size)]


def make_loader(data: UnpairedImages, sampler: RunSampler, workers: int, pin: bool) -> DataLoader:
    """A loader of batches from background processes, or from this one if pictures are cached.

    It has a random generator of its own, so that PyTorch's is the same after a resume.
    """
    workers = 0 if data.A.cached else workers
    return DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=ignore_signals,
        multiprocessing_context=worker_context() if workers else None,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )
