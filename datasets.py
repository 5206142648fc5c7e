"""From pictures on disk to tensors: listing, decoding, the cache, and the unpaired training set.

A picture is an array (H, W, C), uint8, or uint16 where a single-channel domain keeps 16 bits; a
tensor of one is (C, H, W) in [-1, 1].
"""

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".npy")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")  # whatever the name says
LONGEST_NAME = 255  # bytes; what common file systems allow

# ------------------------------------------------------------------------------------------------
# Finding pictures


def list_images(folder: Path) -> list[str]:
    """Names of all pictures below `folder`, relative, with "/", sorted; nothing is opened.

    Raises:
        UserError: a folder cannot be read.
    """
    names, waiting = [], [("", ())]
    try:
        while waiting:
            prefix, above = waiting.pop()
            info = os.stat(folder / prefix)
            if (here := (info.st_dev, info.st_ino)) in above:
                continue  # a link back to a folder that this one lies in
            with os.scandir(folder / prefix) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(EXTENSIONS):
                        names.append(prefix + entry.name)  # a folder x.jpg too: told when read
                    elif entry.is_dir() and not entry.name.startswith("."):
                        waiting.append((f"{prefix}{entry.name}/", (*above, here)))
    except OSError as error:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    names.sort()
    return names


def find_split(dataroot: Path, split: str) -> Path:
    """The folder of a split such as "trainA": `<dataroot>/trainA` or `<dataroot>/train/A`.

    Raises:
        UserError: neither folder is there, or it holds no picture.
    """
    for folder in (dataroot / split, dataroot / split[:-1] / split[-1]):
        if folder.is_dir():
            if list_images(folder):
                return folder
            raise UserError(
                f"{folder} holds no picture: put some there ({', '.join(EXTENSIONS)}), or name "
                "another --dataroot"
            )
    raise UserError(
        f"there is no folder {dataroot / split} (nor {dataroot / split[:-1] / split[-1]}): "
        f"`python -m tools.download {dataroot.name or 'apple2orange'}` fetches it if it is a known "
        "set, `python -m tools.download demo` draws one, or name another --dataroot"
    )


def output_names(names: list[str], suffix: str = ".png") -> list[str]:
    """One output name for each source name, all different even where letter case is ignored.

    "a.jpg" becomes "a.png"; if "a.png" is there too, that becomes "a_png.png". Names too long for
    the file system are cut and told apart by a hash.
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
    """A file that holds no picture that can be used; the message says why."""


def load_image(path: Path, channels: int = 3) -> np.ndarray:
    """Decode one picture file to (H, W, channels), uint8, or uint16 if `channels` is 1 and it is.

    EXIF orientation is applied, alpha is laid over white; grey, palette, CMYK and 16-bit files all
    become what `channels` asks for: 1 grey, 3 RGB, 4 RGBA. Any other number is read from .npy files
    of shape (H, W, channels), uint8 or uint16.

    Raises:
        UnreadableImage: damaged, truncated, too large (Pillow's limit), or not a picture at all.
    """
    try:
        if path.is_fifo():  # opening it would wait for ever
            raise ValueError("it is a named pipe")
        if str(path).lower().endswith(".npy"):
            picture = np.load(path, allow_pickle=False, mmap_mode="r")
            return check_array(picture, channels)
        with Image.open(path, formats=FORMATS) as image:  # others, as EPS, start programs
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over Pillow's size limit")
            ImageOps.exif_transpose(image, in_place=True)
            return convert(image, channels)
    except Exception as error:  # on hostile files decoders raise some twenty kinds of errors
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = reason.replace(f" {str(path)!r}", "").replace("\n", " ")
        raise UnreadableImage(reason or type(error).__name__) from error


def check_array(picture: np.ndarray, channels: int) -> np.ndarray:
    picture = picture[..., None] if picture.ndim == 2 else picture
    if picture.ndim != 3 or picture.shape[2] != channels or not picture.size:
        raise ValueError(f"its shape is {picture.shape}, not (H, W, {channels})")
    if picture.size // channels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its shape {picture.shape} is over Pillow's size limit")
    if picture.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"it holds {picture.dtype}, not uint8 or uint16")
    picture = np.array(picture, picture.dtype.newbyteorder("="))
    if picture.dtype == np.uint16 and channels in (3, 4):  # as from any other file of colours
        return (picture >> 8).astype(np.uint8)
    return picture


def convert(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits of grey
        grey = np.asarray(image).astype(np.float32)
        if image.mode == "F":
            grey = grey * 65535 if np.nanmax(grey) <= 1 else grey * 257  # 0..1, or 0..255
        grey = np.clip(np.nan_to_num(grey), 0, 65535).astype(np.uint16)  # (H, W)
        if channels == 1:
            return grey[..., None]
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if channels == 4:
        return np.array(image.convert("RGBA"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels == 1:
        return np.array(image.convert("L"))[..., None]
    if channels == 3:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    raise ValueError(f"only .npy files can have {channels} channels")


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) to `size` = (width, height): bicubic, antialiased, dtype kept."""
    if picture.shape[1::-1] == size:
        return picture
    if picture.dtype == np.uint8 and picture.shape[2] == 3:
        return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    planes = [
        np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
        for plane in np.moveaxis(picture, 2, 0).astype(np.float32)
    ]
    most = np.iinfo(picture.dtype).max
    return np.clip(np.rint(np.stack(planes, axis=2)), 0, most).astype(picture.dtype)


def target_size(
    width: int, height: int, preprocess: str, load_size: int, size: int
) -> tuple[int, int]:
    """The (width, height) that a picture is resized to before a crop; see `--preprocess`."""
    if preprocess == "resize_and_crop":
        return load_size, load_size
    if preprocess == "crop":  # kept as it is, unless it is smaller than the crop
        scale = max(1.0, size / min(width, height))
        return max(size, round(width * scale)), max(size, round(height * scale))
    if preprocess == "scale_width_and_crop":
        return load_size, max(size, round(height * load_size / width))
    if preprocess == "scale_width":
        width, height = load_size, height * load_size / width
    # what generators can halve, and discriminators too until four patches are left
    return max(32, round(width / 4) * 4), max(32, round(height / 4) * 4)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]; what is float already passes."""
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 or uint16 -> (C, H, W) float32 in [-1, 1]."""
    if picture.dtype == np.uint16:
        return torch.from_numpy(picture.astype(np.float32) / 32767.5 - 1).permute(2, 0, 1)
    return to_float(torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1))


def to_array(tensor: torch.Tensor, dtype: type = np.uint8) -> np.ndarray:
    """(C, H, W) in [-1, 1] -> (H, W, C) uint8 or uint16, rounded to the nearest."""
    most = np.iinfo(dtype).max
    values = (tensor.detach().float().cpu().permute(1, 2, 0).numpy() + 1) * (most / 2)
    return np.clip(np.rint(values), 0, most).astype(dtype)


def to_rgb(picture: np.ndarray) -> Image.Image:
    """Any (H, W, C) picture as one to look at: 8 bits; grey if C < 3, else the first three."""
    if picture.dtype == np.uint16:
        picture = (picture >> 8).astype(np.uint8)
    channels = [0, 0, 0] if picture.shape[2] < 3 else [0, 1, 2]
    return Image.fromarray(np.ascontiguousarray(picture[..., channels]))


# ------------------------------------------------------------------------------------------------
# The training set


class SkipLog:
    """Names an unreadable picture once: a line on the screen and one in `logs/skipped.txt`."""

    def __init__(self, path: Path):
        self.path, self.told, self.place = path, set(), 0

    def report(self, picture: Path, reason: str) -> None:
        line = f"{picture}: {reason}".replace("\n", " ") + "\n"
        try:
            with open(self.path, "a+", encoding="utf-8", errors="surrogateescape") as file:
                file.seek(self.place)
                self.told.update(file.readlines())  # what other workers, or the run before, told
                self.place = file.tell()
                if line in self.told:
                    return
                file.write(line)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror})") from error
        message = f"\nskipped {line}".encode(errors="replace").decode()
        print(message, end="", file=sys.stderr)


class Domain:
    """The pictures of one domain, decoded and resized when asked for, or all at once by `cache`.

    An unreadable picture is reported and the next readable one is given in its place.

    Raises:
        UserError: no folder, no pictures, or not one that can be read.
    """

    def __init__(self, dataroot: Path, split: str, channels: int, options, skip_log: Path):
        self.folder = find_split(dataroot, split)
        self.names = list_images(self.folder)
        self.channels, self.skip_log = channels, SkipLog(skip_log)
        self.preprocess, self.load_size = options.preprocess, options.load_size
        self.size = options.size
        self.cached: list[np.ndarray | None] = []
        self.first = self[0]  # reads on until one can be read, so a domain of wrecks stops here

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> np.ndarray:
        for j in range(i, i + len(self)):
            picture = self.cached[j % len(self)] if self.cached else self.read(j % len(self))
            if picture is not None:
                return picture  # (h, w, C)
        raise UserError(
            f"not one of the {len(self)} pictures in {self.folder} can be read: see "
            f"{self.skip_log.path}"
        )

    def read(self, i: int) -> np.ndarray | None:
        path = self.folder / self.names[i]
        try:
            picture = load_image(path, self.channels)
        except UnreadableImage as error:
            self.skip_log.report(path, str(error))
            return None
        height, width = picture.shape[:2]
        return resize(
            picture, target_size(width, height, self.preprocess, self.load_size, self.size)
        )

    def cache(self) -> None:
        """Decode every picture now, in threads; from then on memory alone is read."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            pictures = pool.map(self.read, range(len(self)))
            bar = tqdm(pictures, f"reading {self.folder.name}", len(self), leave=False, delay=2)
            self.cached = list(bar)

    def cache_bytes(self) -> int:
        """About what the cache would take: the first picture's size times their number."""
        return self.first.nbytes * len(self)


def free_memory() -> int:
    """Bytes that can be had without swapping, also inside a container; 0 where unknown."""
    free = 0
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(used))
    except OSError:
        pass  # no such files on this system: what was found so far is the answer
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
        self.crop = A.preprocess in ("resize_and_crop", "crop", "scale_width_and_crop")
        self.order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return max(len(self.A), len(self.B))

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key
        if self.order is None or self.order[0] != epoch:
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(len(self))
            self.order = (epoch, shuffled)
        i = int(self.order[1][index % len(self)]) % len(self.A)
        rng = np.random.default_rng((self.seed, epoch, index))
        j = int(rng.integers(len(self.B)))
        return self.augment(self.A[i], rng), self.augment(self.B[j], rng)

    def augment(self, picture: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        height, width = picture.shape[:2]
        y, x, flip = rng.random(3)
        if self.crop:
            top, left = int(y * (height - self.size + 1)), int(x * (width - self.size + 1))
            picture = picture[top : top + self.size, left : left + self.size]
        if self.flip and flip < 0.5:
            picture = picture[:, ::-1]
        if picture.shape[2] == 3:  # stays bytes until it is on the device: a quarter of the copying
            return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
        return to_tensor(picture)  # (C, size, size)


class RunSampler:
    """The keys (epoch, index) of one rank's batches, from a given place to the end of the run.

    Ranks take batches in turn. Every batch is full: the last of an epoch is filled from its start.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        per_step: int,
        epochs: range,
        first_sample: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.length, self.batch_size, self.per_step = length, batch_size, per_step
        self.epochs, self.first_sample = epochs, first_sample
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.first_sample
        for epoch in self.epochs:
            while start < self.length:  # one optimizer step of all ranks together
                mine = start + self.rank * self.batch_size
                for first in range(mine, start + self.per_step, self.world * self.batch_size):
                    yield [(epoch, first + i) for i in range(self.batch_size)]
                start += self.per_step
            start = 0


def make_loader(
    dataset: UnpairedImages, sampler: RunSampler, workers: int, pin: bool
) -> DataLoader:
    """Batches in background processes; from the cache they come at once and need none.

    It draws from a generator of its own, so that a resumed run finds PyTorch's as it was.
    """
    workers = 0 if dataset.A.cached else workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=stay_for_a_while,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )


def stay_for_a_while(worker: int) -> None:
    """Ctrl-C or SIGTERM may reach all processes: the main one decides, and may need data till then.

    Half a minute after SIGTERM a worker goes by itself, should the main process not end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave = threading.Timer(30, os._exit, (0,))
    leave.daemon = True
    signal.signal(signal.SIGTERM, lambda *_: leave.is_alive() or leave.start())
