"""Where to compute and how precisely: the device, autocast's dtype, memory layout."""

import argparse
import contextlib
import datetime
import os
import platform
import re
from pathlib import Path

import torch

from utils import UserError, explain_out_of_memory, gpu_support


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
    except (AssertionError, RuntimeError) as error:
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


def free_memory() -> int:
    """Bytes available without swapping, also inside a container; 0 where unknown."""
    free, container = 0, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        limit = int((container / "memory.max").read_text())
        free = min(free, limit - int((container / "memory.current").read_text()))
    return free
