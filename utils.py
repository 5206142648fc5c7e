"""What the scripts share: errors, safe files, device and precision, the image buffer."""

import argparse
import contextlib
import datetime
import json
import math
import os
import pickle
import platform
import random
import re
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from PIL import Image

# ------------------------------------------------------------------------------------------------
# Errors and exit codes


class UserError(Exception):
    """An error the user can fix: shown as one sentence, exit code 2, no traceback."""


def run(main: Callable, args: argparse.Namespace) -> None:
    """Run a script's `main(args)` and exit with its code; a UserError is one line and code 2."""
    # what cannot be read has messages of our own
    warnings.filterwarnings("ignore", module="PIL|pydicom|rasterio")
    try:
        code = main(args)
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads must not outlive it
    except (UserError, RuntimeError) as error:
        if explain(error) is None:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)  # outside of try: there a traceback would keep data workers alive


def explain(error: Exception) -> str | None:
    """A sentence for a UserError, an error of the GPU or a lost connection; None for others."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, UserError):  # one from a data worker begins with its traceback
        return lines[-1].removeprefix("utils.UserError: ")
    reason = lines[0].split(". ")[0]
    if isinstance(error, torch.AcceleratorError):
        return f"the GPU failed ({reason}): start again with --resume auto; {gpu_support()}"
    lost = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    if isinstance(error, dist.DistError) or any(words in str(error) for words in lost):
        return (
            f"lost another process of this run ({reason}): its own message says why; the same "
            "command with --resume auto goes on from the last save"
        )
    return None


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn a full GPU, or a full machine, into a UserError that says what would need less."""
    try:
        yield
    except RuntimeError as error:  # also of contexts, cuBLAS and NCCL; the last is the CPU's
        gpu = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
        if not gpu and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"the {'GPU' if gpu else 'machine'} is out of memory: {advice}") from error


def gpu_support() -> str:
    """For which GPUs this PyTorch was compiled, and which one is here."""
    name = "no GPU that it can use"
    with contextlib.suppress(RuntimeError, AssertionError):
        name = torch.cuda.get_device_name()
        name += " (sm_{}{})".format(*torch.cuda.get_device_capability())
    archs = " ".join(torch.cuda.get_arch_list()) or "no GPU"
    return f"this PyTorch is compiled for {archs}, and here is {name}"


# ------------------------------------------------------------------------------------------------
# Files


def add_workdir(parser: argparse._ActionsContainer) -> None:
    """Add the `--workdir` option that every script has."""
    folders = "dataset/, models/, images/, logs/, outputs/ and result/"
    parser.add_argument(
        "--workdir", type=Path, default=Path("."), metavar="DIR", help=f"where {folders} are (.)"
    )


def make_folder(path: Path) -> Path:
    """Create a folder and its parents; UserError where that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the folder {path} ({error.strerror}): choose another --workdir"
        ) from error
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk while `path` is written into a UserError that names both."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # by torch.save
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"cannot write {path} ({cause.strerror or cause}): free some space, make the folder "
            "writable or choose another --workdir; what was saved before is untouched"
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` only when it is complete and on disk.

    The bytes go to a temporary name in the same folder, are flushed and fsynced, then renamed: a
    reader, or a power cut, sees the old file or the new one and never half of one. Raises UserError
    if the disk is full or the folder cannot be written.
    """
    temporary = Path(path).parent / f".{uuid.uuid4().hex}.tmp"
    with writing(path):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(temporary.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; not every system can open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only when all is in it; UserError if it can't."""
    parent = make_folder(target.parent)
    with writing(target), tempfile.TemporaryDirectory(prefix=".", dir=parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        yield folder
        os.replace(folder, target)


def remove_temporary_files(folder: Path, seconds: float = 0) -> None:
    """Delete what a killed run left half-written, in sub-folders such as outputs/A too.

    Files that changed within the last `seconds` stay: another process may be writing them.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime <= time.time() - seconds:
                path.unlink()


def save_tensors(path: Path, content: dict) -> None:
    with atomic_write(path) as file:
        torch.save(content, file)


def save_json(path: Path, content: dict) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def save_picture(path: Path, picture: Image.Image) -> None:
    with atomic_write(path) as file:
        picture.save(file, "png")


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict:
    """`torch.load(weights_only=True)`: no code in the file is ever run.

    Raises UserError, a sentence for each case, if the file is missing, empty, truncated, a web
    page, no checkpoint at all, or a pickle that asks for code to be run.
    """
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            if head.startswith(b"PK"):  # compare the checksums, which torch.load does not
                with zipfile.ZipFile(file) as archive:
                    if archive.testzip():
                        raise zipfile.BadZipFile
            file.seek(0)
            content = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train first, or name another") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is truncated or damaged: copy or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error
    except Exception as error:  # on damaged pickles torch.load raises some ten kinds of errors
        reason = "is not a PyTorch checkpoint, or is damaged"
        if not head:
            reason = "is empty: the copy or download of it never finished"
        elif head.lstrip()[:1] == b"<":
            reason = "is a web page, not a checkpoint: download it again from a direct link"
        elif isinstance(error, pickle.UnpicklingError) and (
            head.startswith(b"\x80") or "GLOBAL" in str(error)
        ):
            reason = "is refused: it holds more than tensors (a pickle that could run code when "
            reason += "loaded); save it again as a plain state_dict"
        raise UserError(f"{path} {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
    return content


# ------------------------------------------------------------------------------------------------
# Device and precision


def add_device_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that choose where and how precisely to compute."""
    group = parser.add_argument_group("device")
    group.add_argument("--cuda", action="store_true", help="fail without a CUDA GPU")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the best there is)")
    group.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="mixed precision: auto = bf16 where the hardware has it, else fp16 on a GPU, else off",
    )
    return group


def setup(args, fixed_sizes: bool = False) -> tuple[torch.device, torch.dtype | None]:
    """Set up device, precision and backends; every script calls this once, first.

    `args` holds the options of `add_device_options`; `fixed_sizes` says that all batches have the
    same size. Returns the device and the dtype for autocast (None for float32 throughout). Raises
    UserError if the device cannot be used.
    """
    device = pick_device(args.device, args.cuda)
    dtype = pick_precision(args.amp, device)
    set_backends(device, dtype, fixed_sizes)
    return device, dtype


def pick_device(name: str | None, cuda: bool = False) -> torch.device:
    """The device asked for, or the best at hand; each rank of a machine has its own GPU."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if cuda or has_gpu() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        with explain_out_of_memory(f"other processes use {name}, see nvidia-smi"):
            torch.zeros(1, device=device)  # no driver, no such GPU, a GPU too old: it fails here
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"cannot use the device {name} ({str(error).splitlines()[0]}; {gpu_support()}): update "
            "the driver (see nvidia-smi), install a PyTorch for this GPU, or compute on the CPU "
            "with --device cpu"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def has_gpu() -> bool:
    """Whether there is a CUDA GPU, be it one that PyTorch cannot use (a driver too old, ...)."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # the first: this PyTorch is without CUDA
        absent = ("no NVIDIA driver", "No CUDA GPUs", "not compiled")
        return not any(words in str(error) for words in absent)
    return True


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, or None for float32 throughout."""
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    flags = Path("/proc/cpuinfo")  # emulated, bf16 is slower than float32
    native = device.type == "cpu" and flags.exists() and "_bf16" in flags.read_text()
    return torch.bfloat16 if native else None


def set_backends(device: torch.device, dtype: torch.dtype | None, fixed_sizes=True) -> None:
    """Settings of a GPU's convolutions; `dtype` is that of autocast, None means float32 proper."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = fixed_sizes  # a search for each size: worth it for one
        torch.backends.cudnn.allow_tf32 = dtype is not None


def describe(device: torch.device) -> str:
    """Date, device and versions, for the head of a table of measurements."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    elif Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = models[0] if models else name
    return (
        f"{datetime.date.today()}, {device.type}: {name}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, python {platform.python_version()}"
    )


def memory_layout(device: torch.device) -> torch.memory_format:
    """channels_last is what a GPU's tensor cores want; on a CPU it was measured to be slower."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def precision_name(dtype: torch.dtype | None) -> str:
    return {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


# ------------------------------------------------------------------------------------------------
# Training parts


class ReplayBuffer:
    """History of generated pictures (paper section 4; Shrivastava et al. 2017).

    The first `size` pictures are stored and returned. From then on each picture is, with
    probability 1/2, swapped for a random stored one, or else returned and not stored. Pictures of
    another shape begin a new history. Choices are made on the host: a GPU is never waited for.
    """

    def __init__(self, size: int = 50, seed: int = 0):
        self.size, self.random = size, random.Random(seed)
        self.images, self.n = torch.empty(0), 0  # (size, C, H, W), of which n are filled

    def query(self, fakes: torch.Tensor) -> torch.Tensor:
        """Take new fakes (N, C, H, W), return as many, some of them old ones, without gradients."""
        fakes = fakes.detach()
        result = fakes.clone()
        if fakes.shape[1:] != self.images.shape[1:]:
            self.images, self.n = fakes.new_zeros(self.size, *fakes.shape[1:]), 0
        for k in range(len(fakes) if self.size else 0):
            if self.n < self.size:
                self.images[self.n] = fakes[k]
                self.n += 1
            elif self.random.random() < 0.5:
                i = self.random.randrange(self.size)
                result[k] = self.images[i]
                self.images[i] = fakes[k]
        return result

    def state_dict(self) -> dict:
        return {"images": self.images[: self.n], "random": self.random.getstate()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        images = state["images"][: self.size]
        self.images = torch.zeros(self.size, *images.shape[1:], device=device)
        self.n = len(images)
        self.images[: self.n] = images
        self.random.setstate(state["random"])


def lr_factor(policy: str, epoch: float, n_epochs: int, decay_epoch: int) -> float:
    """What the learning rate is multiplied with after `epoch` epochs, a fraction within one.

    linear is the paper's (section 4): constant until `decay_epoch`, then straight towards 0.
    step divides by ten every `decay_epoch` epochs, cosine is half a wave, constant is 1.
    """
    if policy == "linear":
        return 1 - max(0, epoch - decay_epoch) / (n_epochs - decay_epoch)
    if policy == "step":
        return 0.1 ** (epoch // max(1, decay_epoch))
    if policy == "cosine":
        return (1 + math.cos(math.pi * epoch / n_epochs)) / 2
    return 1.0
