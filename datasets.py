"""From image files to tensors: listing, decoding, the cache, and the unpaired training set.

A picture is an array (H, W, C), uint8, or uint16 where a single-channel domain keeps 16 bits; its
tensor is (C, H, W).
"""

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from tqdm import tqdm

from utils import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".npy")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")  # whatever the extension says
LONGEST_NAME = 255  # bytes; the limit of common file systems

# ------------------------------------------------------------------------------------------------
# Finding pictures


def list_images(folder: Path) -> list[str]:
    """Names of all pictures below `folder`, relative, with "/", sorted; no file is opened.

    Links are followed; a folder that is reached twice is listed once. Raises UserError if a folder
    cannot be read.
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
        names += [prefix + name for name in files if name.lower().endswith(EXTENSIONS)]
    return sorted(names)


def find_split(dataroot: Path, split: str) -> Path:
    """The folder of a split such as "trainA": `<dataroot>/trainA` or `<dataroot>/train/A`.

    Raises UserError if neither exists, or if it contains no picture.
    """
    folders = (dataroot / split, dataroot / split[:-1] / split[-1])
    for folder in folders:
        if folder.is_dir() and list_images(folder):
            return folder
        if folder.is_dir():
            kinds = ", ".join(EXTENSIONS)
            raise UserError(f"{folder} holds no picture ({kinds}): add some, or change --dataroot")
    raise UserError(
        f"there is no folder {folders[0]} (nor {folders[1]}): `python -m tools.download "
        f"{dataroot.name or 'apple2orange'}` downloads it if it is a known set, "
        "`python -m tools.download demo` draws one, or change --dataroot"
    )


def output_names(names: list[str], suffix: str = ".png") -> list[str]:
    """One output name for each source name, all different even where letter case is ignored.

    "a.jpg" becomes "a.png"; if "a.png" is there too, that becomes "a_png.png". Names too long for
    the file system are cut and end in a hash.
    """
    taken: set[str] = set()
    outputs = []
    for name in names:
        stem, extension = os.path.splitext(name)
        candidate, number = stem, 1
        while (output := shorten(candidate, suffix)).lower() in taken:
            candidate = f"{stem}_{extension[1:]}" + (f"_{number}" if number > 1 else "")
            number += 1
        taken.add(output.lower())
        outputs.append(output)
    return outputs


def shorten(stem: str, suffix: str, prefix: str = "") -> str:
    """`prefix + stem + suffix` with the last part cut to what a file system allows."""
    folder, _, last = stem.rpartition("/")
    name = f"{prefix}{last}{suffix}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        mark = "~" + hashlib.sha256(os.fsencode(last)).hexdigest()[:8]
        room = LONGEST_NAME - len(os.fsencode(prefix + mark + suffix))
        name = f"{prefix}{os.fsencode(last)[:room].decode('utf-8', 'ignore')}{mark}{suffix}"
    return f"{folder}/{name}" if folder else name


# ------------------------------------------------------------------------------------------------
# One picture


class UnreadableImage(Exception):
    """A file that is not a usable picture; the message says why."""


def load_image(path: Path, channels: int = 3) -> np.ndarray:
    """Decode one file to (H, W, channels), uint8, or uint16 if `channels` is 1 and the file is.

    EXIF orientation is applied, alpha is composited over white; grey, palette, CMYK and 16-bit
    files are converted to `channels`: 1 grey, 3 RGB, 4 RGBA. Any other number of channels is read
    from .npy files of shape (H, W, channels), uint8 or uint16. Raises UnreadableImage if the file
    is damaged, too large (Pillow's limit), of floating-point values, or not a picture at all.
    """
    try:
        if path.is_fifo():  # opening it would block for ever
            raise ValueError("it is a named pipe")
        if str(path).lower().endswith(".npy"):
            return check_array(np.load(path, allow_pickle=False, mmap_mode="r"), channels)
        with Image.open(path, formats=FORMATS) as image:  # other formats, as EPS, start programs
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over Pillow's size limit")
            ImageOps.exif_transpose(image, in_place=True)
            return convert(image, channels)
    except Exception as error:  # decoders raise some twenty kinds of errors on corrupt files
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = reason.replace(f" {str(path)!r}", "").replace("\n", " ")
        raise UnreadableImage(reason or type(error).__name__) from error


def check_array(picture: np.ndarray, channels: int) -> np.ndarray:
    """A copy of an array from a file; ValueError if it is no picture of that many channels."""
    picture = picture[..., None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[2] != channels or not picture.size:
        raise ValueError(f"its shape is {picture.shape}, not (H, W, {channels})")
    if picture.size // channels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its shape {picture.shape} is over Pillow's size limit")
    if picture.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"it holds {picture.dtype}, not uint8 or uint16")
    if picture.dtype == np.uint16 and channels in (3, 4):  # as from any other file in colour
        return (picture >> 8).astype(np.uint8)
    return np.array(picture, picture.dtype.newbyteorder("="))


def convert(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels (H, W, channels) of an open image; ValueError if they cannot be had."""
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ValueError(f"only .npy files can have {channels} channels")
    if image.mode == "F":
        raise ValueError("it holds floating-point values: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 or 32 bits of grey
        grey = np.asarray(image)  # (H, W)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"its values, {grey.min()} to {grey.max()}, do not fit 16 bits")
        if channels == 1:
            return grey.astype(np.uint16)[..., None]
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.atleast_3d(np.array(image.convert(modes[channels])))


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) to `size` = (width, height): bicubic, antialiased, same dtype."""
    if picture.dtype == np.uint16:  # torchvision clamps uint8 only
        resized = resize(picture.astype(np.float32), size)
        return resized.clip(0, 65535).round().astype(np.uint16)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    return F.resize(pixels, size[::-1], InterpolationMode.BICUBIC).permute(1, 2, 0).numpy()


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
    """(C, H, W) in [-1, 1] -> (H, W, C) uint8 or uint16, rounded to the nearest."""
    most = np.iinfo(dtype).max
    values = (tensor.detach().float().cpu().permute(1, 2, 0).numpy() + 1) * (most / 2)
    return values.round().clip(0, most).astype(dtype)


def to_rgb(picture: np.ndarray) -> Image.Image:
    """An 8-bit RGB image to show of any (H, W, C): grey if C < 3, else its first three channels."""
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    channels = [0, 0, 0] if picture.shape[2] < 3 else [0, 1, 2]
    return Image.fromarray(np.ascontiguousarray(picture[..., channels]))


# ------------------------------------------------------------------------------------------------
# The training set


def report_skipped(log: Path, picture: Path, reason: str) -> None:
    """Print that a picture is unreadable and append it to `log`, unless the log has it already."""
    line = f"{picture}: {reason}".replace("\n", " ") + "\n"
    try:
        with open(log, "a+", encoding="utf-8", errors="surrogateescape") as file:
            file.seek(0)
            if line in file:  # from another worker, or from before a resume
                return
            file.write(line)
    except OSError as error:
        raise UserError(f"cannot write {log} ({error.strerror})") from error
    print(f"\nskipped {line}".encode(errors="replace").decode(), end="", file=sys.stderr)


class Domain:
    """The pictures of one domain, decoded and resized when asked for, or all at once by `cache`.

    In place of an unreadable picture, which is reported, comes the next readable one. Raises
    UserError if there is no folder, no picture, or none that can be read.
    """

    def __init__(self, dataroot: Path, split: str, channels: int, options, skip_log: Path):
        self.folder = find_split(dataroot, split)
        self.names = list_images(self.folder)
        self.channels, self.options, self.skip_log = channels, options, skip_log
        self.cached: list[torch.Tensor | None] = []
        self.first = self[0]  # raises at the start if no picture can be read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> torch.Tensor:
        for j in range(i, i + len(self)):
            picture = self.cached[j % len(self)] if self.cached else self.read(j % len(self))
            if picture is not None:
                return picture  # (C, h, w), uint8 or uint16
        names = f"{len(self)} pictures in {self.folder}"
        raise UserError(f"not one of the {names} can be read: see {self.skip_log}")

    def read(self, i: int) -> torch.Tensor | None:
        path = self.folder / self.names[i]
        try:
            picture = load_image(path, self.channels)
        except UnreadableImage as error:
            report_skipped(self.skip_log, path, str(error))
            return None
        height, width = picture.shape[:2]
        picture = resize(picture, target_size(width, height, self.options))
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()

    def cache(self) -> None:
        """Decode every picture now, in threads; from then on only memory is read."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            pictures = pool.map(self.read, range(len(self)))
            bar = tqdm(pictures, f"reading {self.folder.name}", len(self), leave=False, delay=2)
            self.cached = list(bar)

    def cache_bytes(self) -> int:
        """The approximate size of the cache: the first picture's bytes times their number."""
        return self.first.nbytes * len(self)


def free_memory() -> int:
    """Bytes available without swapping, also inside a container; 0 where unknown."""
    meminfo, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():
        return 0
    free = 1024 * int(meminfo.read_text().partition("MemAvailable:")[2].split()[0])
    limit = container / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int((container / "memory.current").read_text()))
    return free


class UnpairedImages(Dataset):
    """Pairs of unrelated pictures, one of A and one of B, for one epoch after another.

    `self[epoch, index]` is a pair of (C, size, size) tensors, uint8 in [0, 255] (float32 in [-1, 1]
    if a domain has other than 3 channels), and is a function of (seed, epoch, index) alone:
    A comes in shuffled order, B is drawn independently, both randomly cropped and flipped (paper
    section 7.1). An epoch has `len(self)` = max(|A|, |B|) samples; a larger index starts over.
    """

    def __init__(self, A: Domain, B: Domain, size: int, flip: bool = True, seed: int = 0):
        self.A, self.B, self.size, self.flip, self.seed = A, B, size, flip, seed
        self.crop = A.options.preprocess in ("resize_and_crop", "crop", "scale_width_and_crop")
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
            picture = F.crop(picture, top, left, self.size, self.size)
        if self.flip and flip < 0.5:
            picture = F.horizontal_flip(picture)
        # RGB stays uint8 until it is on the device: a quarter of the bytes to copy
        return picture if len(picture) == 3 else to_float(picture)


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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.first_sample
        for epoch in self.epochs:
            for step in range(start, self.length, self.per_step):
                mine, stride = self.rank * self.batch_size, self.world_size * self.batch_size
                for first in range(step + mine, step + self.per_step, stride):
                    yield [(epoch, first + i) for i in range(self.batch_size)]
            start = 0


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
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )


def ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: the main process may need data until it has saved.

    30 seconds after SIGTERM the worker exits, in case the main process did not end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave = threading.Timer(30, os._exit, (0,))
    leave.daemon = True
    signal.signal(signal.SIGTERM, lambda *_: leave.is_alive() or leave.start())
