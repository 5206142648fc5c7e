"""What all scripts share: errors that are one sentence, files that are whole or not there."""

import argparse
import atexit
import contextlib
import json
import os
import pickle
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
    except (UserError, RuntimeError) as error:
        if explain(error) is None:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    if dist.is_initialized():  # its threads may abort a process whose interpreter shuts down
        atexit._run_exitfuncs()  # as multiprocessing does: its temporary folders go
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
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


def load_tensors(path: Path) -> dict:
    """`torch.load(weights_only=True)` to the CPU: no code in the file is ever run.

    Raises UserError, a sentence for each case, if the file is missing, empty, truncated, a web
    page, no checkpoint at all, or a pickle that asks for code to be run.
    """
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            if head.startswith(b"PK") and zipfile.ZipFile(file).testzip():
                raise zipfile.BadZipFile  # a checksum is wrong, which torch.load does not notice
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
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
