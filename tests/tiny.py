"""Runs so small that one takes a second, for the tests of whole runs."""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train

ROOT = Path(__file__).resolve().parent.parent
TINY = "--size 24 --load_size 26 --ngf 2 --ndf 2 --n_residual_blocks 1 --no_tensorboard --amp off "
TINY += "--device cpu --workers 0 --log_every 1 --sample_every 1000 --n_epochs 3"
NETWORKS = ("netG_A2B", "netG_B2A", "netD_A", "netD_B")


def draw(path: Path, seed: int, size: int = 28) -> None:
    """Save a small picture of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def draw_set(root: Path, n_A: int = 5, n_B: int = 4) -> Path:
    """A data set of `n_A` and `n_B` training pictures and two test pictures of each kind."""
    for i in range(n_A):
        draw(root / "trainA" / f"{i}.png", i)
    for i in range(n_B):
        draw(root / "trainB" / f"{i}.png", 100 + i)
    for i in range(2):
        draw(root / "testA" / f"{i}.png", 200 + i)
        draw(root / "testB" / f"{i}.png", 300 + i)
    return root


def words(dataroot: Path, workdir: Path, more: str = "") -> list[str]:
    """What a user would type after train.py for a tiny run."""
    return ["--dataroot", str(dataroot), "--workdir", str(workdir), *TINY.split(), *more.split()]


def run(dataroot: Path, workdir: Path, more: str = "") -> int:
    """A tiny run in this process; its exit code."""
    return train.main(train.parse_args(words(dataroot, workdir, more)))


def resume(workdir: Path, more: str = "") -> int:
    return train.main(train.parse_args(["--workdir", str(workdir), "--resume", *more.split()]))


def read_state(workdir: Path) -> dict:
    return torch.load(workdir / "models" / "train_state.pth", weights_only=True)


def plain(value, name: str = "") -> dict[str, bytes | str]:
    """All that a state holds, flat, tensors as their bytes: equal only if all bits are."""
    if isinstance(value, torch.Tensor):
        return {name: value.contiguous().numpy().tobytes()}
    if isinstance(value, dict):
        return {k: v for key in value for k, v in plain(value[key], f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return plain(dict(enumerate(value)), name)
    return {name: repr(value)}


def outcome(workdir: Path) -> dict:
    """All that a run ended with, but for the seconds it took: state, exported weights, log."""
    state = read_state(workdir)
    del state["seconds"], state["args"]
    result = plain(state)
    for path in sorted((workdir / "models").glob("net*.pth")):
        result |= plain(torch.load(path, weights_only=True), path.name)
    log = workdir / "logs" / "losses.csv"  # not there yet when a run saves its first state
    rows = log.read_text().splitlines() if log.exists() else []
    return result | {f"row {i}": row.rpartition(",")[0] for i, row in enumerate(rows)}


def differences(a: dict, b: dict) -> list[str]:
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def copy_run(workdir: Path, to: Path) -> Path:
    return Path(shutil.copytree(workdir, to))


def generator_losses(model, A: torch.Tensor, B: torch.Tensor) -> tuple:
    """The sum of both directions' losses, the means of its parts, fake_A and fake_B."""
    (one, parts, fake_B), (two, others, fake_A) = (
        model.generator_loss(G, back, D, x, y, weight)
        for G, back, D, x, y, weight in (
            (model.netG_A2B, model.netG_B2A, model.netD_B, A, B, model.args.lambda_A),
            (model.netG_B2A, model.netG_A2B, model.netD_A, B, A, model.args.lambda_B),
        )
    )
    means = {name: (value + others[name]) / 2 for name, value in parts.items()}
    return one + two, means, fake_A, fake_B
