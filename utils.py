"""What the scripts share: errors, safe files, device and precision, the image buffer."""

import argparse
import contextlib
import datetime
import errno
import json
import math
import os
import pickle
import platform
import random
import shutil
import signal
import sys
import tempfile
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from PIL import Image

# ------------------------------------------------------------------------------------------------
# Errors and exit codes


class UserError(Exception):
    """A mistake that the user can mend: shown as one sentence, exit code 2, no traceback."""


def run(main: Callable, args: argparse.Namespace) -> None:
    """Run a script's `main(args)` and exit with its code; a UserError is one line and code 2."""
    warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is told by us
    try:
        code = main(args)
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads must not outlive it
    except UserError as error:  # the last line, as a data worker's comes with a traceback before
        message = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        print(f"error: {message}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)  # out here no traceback keeps data workers alive


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn the device's out-of-memory error into a UserError that says what would need less."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"the GPU is out of memory: {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how the CPU allocator puts it
            raise
        raise UserError(f"the machine is out of memory: {advice}") from error


# ------------------------------------------------------------------------------------------------
# Files

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, or the largest file allowed


def add_workdir(parser: argparse._ActionsContainer) -> None:
    """Add the `--workdir` option that every script has."""
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where dataset/, models/, images/, logs/, outputs/ and result/ are (default: .)",
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
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` only when it is complete and on disk.

    The bytes go to a temporary name in the same folder, are flushed and fsynced, then renamed: a
    reader, or a power cut, sees the old file or the new one and never half of one.

    Raises:
        UserError: disk full, folder missing or not writable.
    """
    path = Path(path)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not disk_is_full(path.parent):
            raise  # torch.save reports a full disk as a RuntimeError, and other things too
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = "the disk is full" if is_disk_full(error, path.parent) else told
        raise UserError(
            f"cannot write {path} ({reason}): free some space or make the folder writable; "
            "what was saved before is untouched"
        ) from error
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file if it is there and that is allowed."""
    with contextlib.suppress(OSError):
        path.unlink()


def is_disk_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_ROOM
    return disk_is_full(folder)


def disk_is_full(folder: Path) -> bool:
    """Whether not even one more megabyte can be written there (statvfs does not know quotas)."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(probe, "xb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in NO_ROOM
    finally:
        remove(probe)
    return False


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; not every system can open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a disk into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free some space, make the folder "
            "writable or choose another --workdir"
        ) from error


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only when all is in it; UserError if it can't."""
    make_folder(target.parent)
    with writing(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp makes it private
            yield temporary
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary_files(folder: Path) -> None:
    """Delete what a killed run left half-written, in sub-folders such as outputs/A too."""
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in folder.glob(pattern):
            remove(path)


def save_tensors(path: Path, content: dict) -> None:
    """`torch.save` through `atomic_write`."""
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

    Raises:
        UserError: the file is missing, empty, truncated, a web page, no checkpoint at all, or a
            pickle that asks for code to be run; each with its own sentence.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            file.seek(0)
            if not head:
                raise UserError(f"{path} is empty: the copy or download of it never finished")
            if head.lstrip()[:1] == b"<":
                raise UserError(
                    f"{path} is a web page, not a checkpoint: download it again from a direct link"
                )
            if head.startswith(b"PK"):
                check_zip(file)
            content = torch.load(file, map_location=device, weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train first, or name another") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is truncated or damaged: copy or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error
    except Exception as error:  # on damaged pickles torch.load raises some ten kinds of errors
        if isinstance(error, pickle.UnpicklingError) and (
            head.startswith(b"\x80") or "GLOBAL" in str(error)
        ):
            raise UserError(
                f"{path} is refused: it holds more than tensors (a pickle that could run code "
                "when loaded); save it again as a plain state_dict"
            ) from error
        raise UserError(f"{path} is not a PyTorch checkpoint, or is damaged") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
    return content


def check_zip(file: BinaryIO) -> None:
    """Compare the checksums of a zip file, which torch.load does not; BadZipFile if they differ."""
    with zipfile.ZipFile(file) as archive:
        wrong = archive.testzip()
    if wrong:
        raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
    file.seek(0)


# ------------------------------------------------------------------------------------------------
# Device, precision, processes


def add_device_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that choose where and how precisely to compute."""
    group = parser.add_argument_group("device")
    group.add_argument("--cuda", action="store_true", help="insist on a CUDA GPU")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the best there is)")
    group.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="auto",
        help="mixed precision: auto = bf16 where the hardware has it, else fp16 on a GPU, else off",
    )
    return group


def setup(args: argparse.Namespace) -> tuple[torch.device, torch.dtype | None, int, int]:
    """Set up device, precision, backends and processes; every script calls this once, first.

    `args` holds the options of `add_device_options`. Returns the device, the dtype for autocast
    (None for float32 throughout), this process's rank and the world size (0 and 1 unless started
    by torchrun).

    Raises:
        UserError: the device is not there.
    """
    device = pick_device(args.device, args.cuda)
    dtype = pick_precision(args.amp, device)
    set_backends(device, dtype)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":  # gloo too: the stop flag and buffers travel as CPU tensors
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return device, dtype, rank, world_size


def pick_device(name: str | None, cuda: bool = False) -> torch.device:
    """The device asked for, or the best at hand; under torchrun each rank gets its own GPU.

    Raises:
        UserError: the device is not there.
    """
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if cuda or torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown --device {name}: use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "CUDA was asked for, but PyTorch sees no CUDA GPU: check the driver (nvidia-smi) "
                "and that this PyTorch has CUDA, or leave out --cuda to use the CPU"
            )
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"there is no {device}: PyTorch sees {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps was asked for, but this machine has none: use --device cpu")
    return device


def describe(device: torch.device) -> str:
    """Date, device, versions: what a published number is worth nothing without."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return (
        f"{datetime.date.today()}, {device.type}: {name}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, python {platform.python_version()}"
    )


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, or None for float32 throughout."""
    if amp == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
            return torch.bfloat16 if native else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def set_backends(device: torch.device, dtype: torch.dtype | None) -> None:
    """Settings of a GPU's convolutions; `dtype` is that of autocast, None means float32 proper."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes hardly change, so searching once pays
        torch.backends.cudnn.allow_tf32 = dtype is not None


def memory_layout(device: torch.device) -> torch.memory_format:
    """channels_last is what a GPU's tensor cores want; on a CPU it was measured to be slower."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def precision_name(dtype: torch.dtype | None) -> str:
    return {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


# ------------------------------------------------------------------------------------------------
# Training parts


@contextlib.contextmanager
def evaluating(*nets: torch.nn.Module) -> Iterator[None]:
    """Put networks into eval mode, and back into the mode that each was in."""
    modes = [net.training for net in nets]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for net, mode in zip(nets, modes, strict=True):
            net.train(mode)


class WriterThread:
    """A thread that writes files while the device trains; one job at a time."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.job = self.pool.submit(int)  # nothing yet

    def submit(self, function: Callable, *arguments) -> None:
        """Wait for the last job, raise what it raised, and begin another."""
        self.job.result()
        self.job = self.pool.submit(function, *arguments)

    def check(self) -> None:
        """Raise what the last job raised, if it is done."""
        if self.job.done():
            self.job.result()

    def close(self) -> None:
        """Wait for the last job and raise what it raised."""
        self.pool.shutdown()
        self.job.result()


class StopRequest:
    """Remembers Ctrl-C or SIGTERM until the iteration is done; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal = 0
        self.alone = "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun repeats the signal to us
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT and self.alone:
            raise KeyboardInterrupt
        self.signal = number
        if int(os.environ.get("RANK", 0)) == 0:
            print("\nfinishing this iteration, then saving (Ctrl-C again: stop now)", flush=True)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class ReplayBuffer:
    """History of generated pictures (paper section 4; Shrivastava et al. 2017).

    The first `size` pictures are stored and returned. From then on each picture is, with
    probability 1/2, stored in place of a random old one, which is returned instead; otherwise it is
    returned and not stored. Choices are made on the host, so a GPU is never waited for.
    """

    def __init__(self, size: int = 50, seed: int = 0):
        self.size = size
        self.random = random.Random(seed)
        self.images: list[torch.Tensor] = []

    def query(self, images: torch.Tensor) -> torch.Tensor:
        """Take new fakes (N, C, H, W), give as many, some of them old ones; gradients are cut."""
        if self.size == 0:
            return images.detach()
        chosen = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
            elif self.random.random() < 0.5:
                i = self.random.randrange(self.size)
                image, self.images[i] = self.images[i], image.clone()
            chosen.append(image)
        return torch.stack(chosen)

    def state_dict(self) -> dict:
        images = [image.cpu() for image in self.images]  # they may have to go to another rank
        return {"images": images, "random": self.random.getstate()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.images = [image.to(device) for image in state["images"][: self.size]]
        self.random.setstate(state["random"])


def lr_factor(policy: str, epoch: int, n_epochs: int, decay_epoch: int) -> float:
    """What the learning rate is multiplied with in `epoch` (from 0).

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
