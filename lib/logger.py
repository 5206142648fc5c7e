"""What a run shows: CSV files in logs/, a plot of the losses, sample grids, TensorBoard."""

import contextlib
import csv
import datetime
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid
from tqdm import tqdm

import datasets
import utils
from lib import metrics
from lib.checkpoint import WriterThread
from models import translate
from utils import UserError

# ------------------------------------------------------------------------------------------------
# CSV


def append_line(path: Path, line: str) -> None:
    """Append a line and fsync it; a last line torn by a power cut is dropped by `trim_csv`."""
    with utils.writing(path), open(path, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def trim_csv(path: Path, iteration: int) -> None:
    """Drop the rows past `iteration` (the second column): a resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text().split("\n")[:-1]  # a line without an end was torn
    if not lines:
        path.unlink()  # not even a header
        return
    kept = lines[:1] + [line for line in lines[1:] if int(line.split(",")[1]) <= iteration]
    with utils.atomic_write(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def read_csv(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV log."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    rows = [row for row in rows if len(row) == len(header)]
    return {name: [float(row[i]) for row in rows] for i, name in enumerate(header)}


def plot_losses(log: Path, path: Path, names: tuple[str, ...]) -> None:
    """Plot columns of a CSV log over the iterations, where matplotlib is installed."""
    columns = read_csv(log)
    if len(columns["iteration"]) < 2:
        return
    try:
        from matplotlib.figure import Figure  # pyplot is not for threads
    except ImportError:
        return
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    below.plot(columns["iteration"], columns["change"], linewidth=1)
    below.set(xlabel="iteration", ylabel="mean |G(x) - x|, of 255", ylim=(0, None))
    below.grid(alpha=0.3)
    for name in names:
        axes.plot(columns["iteration"], columns[name], label=name, linewidth=1)
    top = np.quantile([columns[name] for name in names], 0.995)  # one spike must not flatten all
    axes.set(ylabel="loss", ylim=(0, max(1.1 * top, 1e-9)))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", ncols=len(names))
    with utils.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


# ------------------------------------------------------------------------------------------------
# Sample grids

UNCHANGED = 0.5  # mean |G(x) - x| of 255 under which nothing is translated


def load_samples(args, letter: str, channels: int, limits=None, n: int = 4) -> torch.Tensor:
    """The first test pictures (training pictures where there are none), (n, C, size, size)."""
    try:
        folder = datasets.find_split(args.dataroot, f"test{letter}")
    except UserError:
        folder = datasets.find_split(args.dataroot, f"train{letter}")
    pictures = []
    for name in datasets.list_images(folder):
        with contextlib.suppress(datasets.UnreadableImage):  # Domain and test.py report it
            picture = datasets.load_image(folder / name, channels, limits, axis=args.axis)
            pictures.append(datasets.to_tensor(datasets.resize(picture, (args.size, args.size))))
        if len(pictures) == n:
            break
    if not pictures:
        raise UserError(f"not one picture in {folder} can be read")
    return torch.stack(pictures)


def generate_samples(model, real_A: torch.Tensor, real_B: torch.Tensor) -> dict:
    """The columns of a grid by their titles, each (n, C, H, W), on the host.

    With `--keep_source` also where and how much the picture was changed: black is not at all.
    """
    A2B, B2A = model.best_generators().values()
    columns = {}
    for A, B, real, net, back in (("A", "B", real_A, A2B, B2A), ("B", "A", real_B, B2A, A2B)):
        fake = translate(net, real.to(model.device), model.dtype)
        columns |= {f"real {A}": real, f"fake {B}": fake.cpu()}
        if model.args.keep_source:
            columns[f"change of {A}"] = metrics.change(fake.cpu(), real)
        columns[f"recovered {A}"] = translate(back, fake, model.dtype).cpu()
    return columns


def draw_grid(columns: dict) -> Image.Image:
    """The columns of `generate_samples` side by side, under their titles."""
    rows = zip(*columns.values(), strict=False)
    cells = [datasets.to_rgb(datasets.to_array(picture)) for row in rows for picture in row]
    side = cells[0].width * -(-128 // cells[0].width)  # small pictures are shown larger
    cells = [np.array(cell.resize((side, side), Image.Resampling.NEAREST)) for cell in cells]
    grid = torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2)  # (cells, 3, side, side)
    grid = make_grid(grid, nrow=len(columns), padding=4, pad_value=255)
    image = Image.new("RGB", (grid.shape[2], grid.shape[1] + 16), "white")
    image.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, 16))
    for i, title in enumerate(columns):
        x = 4 + i * (side + 4) + side / 2
        ImageDraw.Draw(image).text((x, 10), title, "#333333", anchor="mm", font_size=12)
    return image


# ------------------------------------------------------------------------------------------------
# The logger


class Logger:
    """Progress bar, CSV, plot, grids and TensorBoard; does nothing on ranks but the first."""

    plotted = ("D", "G", "adv", "cycle", "identity")

    def __init__(self, args, rank: int, iteration: int, remaining: int):
        """`iteration` iterations are done, `remaining` are to come."""
        self.args, self.is_main, self.board = args, rank == 0, None
        self.logs, self.thread = args.workdir / "logs", WriterThread()
        self.last_change = iteration  # the last one known to change its pictures
        self.start_epoch(iteration)
        if self.is_main:
            first, second = args.direction.split("to")
            self.real_A = load_samples(args, first, args.input_nc, args.range_A)
            self.real_B = load_samples(args, second, args.output_nc, args.range_B)
            trim_csv(self.logs / "losses.csv", iteration)
            trim_csv(self.logs / "metrics.csv", iteration)
        self.bar = tqdm(
            total=iteration + remaining,
            initial=iteration,
            disable=not self.is_main,
            unit="it",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no animation
            dynamic_ncols=True,
        )
        if self.is_main and not args.no_tensorboard:
            with contextlib.suppress(ImportError), utils.writing(self.logs):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.logs, purge_step=iteration + 1)
                self.print(f"watch with: tensorboard --logdir {self.logs}")

    def print(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)

    def log(self, name: str, row: dict[str, float]) -> None:
        """Append a row to logs/<name>.csv; its first columns are epoch and iteration."""
        if not self.is_main:
            return
        path = self.logs / f"{name}.csv"
        if not path.exists():
            append_line(path, ",".join(row))
        append_line(path, ",".join(f"{value:.6g}" for value in row.values()))
        if self.board:
            with utils.writing(self.logs):
                for key in list(row)[2:]:
                    self.board.add_scalar(f"{name}/{key}", row[key], row["iteration"])
        self.bar.set_postfix({k: f"{row[k]:.3f}" for k in ("D", "G", "cycle") if k in row})

    def check_change(self, iteration: int, change: float) -> None:
        """Warn if the translations have been the same as their sources for a while."""
        if change >= UNCHANGED or self.args.input_nc != self.args.output_nc:
            self.last_change = iteration
        elif iteration - self.last_change >= 300:
            self.print(
                f"the translations are the same as their sources (mean change {change:.2f} of 255, "
                f"under {UNCHANGED} since iteration {self.last_change}): the run has collapsed; "
                "--restart it with a lower --lambda_cyc and --lambda_id 0"
            )
            self.last_change = iteration

    def start_epoch(self, iteration: int) -> None:
        self.began, self.first = time.time(), iteration
        self.waited = 0.0  # seconds spent waiting for data

    def log_epoch(self, epoch: int, n_steps: int, per_step: int, losses: dict, lr: float) -> None:
        """Print the losses, the time that is left, and what the epoch's time went to."""
        if not self.is_main:
            return
        seconds = time.time() - self.began
        speed = (self.bar.n - self.first) * per_step / seconds
        rate = (self.bar.n - self.bar.initial) / max(self.bar.format_dict["elapsed"], 1e-9)
        eta = datetime.timedelta(seconds=round((self.bar.total - self.bar.n) / max(rate, 1e-9)))
        self.print(
            f"[Epoch {epoch}/{self.args.n_epochs}] [Batch {n_steps}/{n_steps}] "
            f"[D loss: {losses['D']:.6f}] [G loss: {losses['G']:.6f}, adv: {losses['adv']:.6f}, "
            f"cycle: {losses['cycle']:.6f}, identity: {losses['identity']:.6f}] "
            f"[lr: {lr:.6f}] ETA: {eta}\n  {seconds:.1f} s, {speed:.2f} pictures of "
            f"each domain a second, {100 * self.waited / seconds:.1f}% of the time waiting for data"
        )
        self.start_epoch(self.bar.n)

    def log_samples(self, model, *names: str) -> None:
        """Write a sample grid to images/<name>.png."""
        if self.is_main:
            columns = generate_samples(model, self.real_A, self.real_B)
            paths = [self.args.workdir / "images" / f"{name}.png" for name in names]
            self.thread.submit(self.write_grid, columns, paths, model.iteration)

    def write_grid(self, columns: dict, paths: list[Path], iteration: int) -> None:
        grid = draw_grid(columns)
        for path in paths:
            utils.save_picture(path, grid)
        if self.board:
            with utils.writing(self.logs):
                self.board.add_image("samples", np.asarray(grid), iteration, dataformats="HWC")

    def plot(self) -> None:
        """Write logs/losses.png."""
        path = self.logs / "losses.csv"
        if self.is_main and path.exists():
            self.thread.submit(plot_losses, path, path.with_suffix(".png"), self.plotted)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.bar.close()
        try:
            self.thread.__exit__(kind, error, traceback)
        finally:
            if self.board:
                self.close_board()

    def close_board(self) -> None:
        try:
            self.board.close()
        except OSError as error:  # the rows are in the CSV files: no reason to fail at the end
            print(f"TensorBoard's file in {self.logs} is incomplete ({error})", file=sys.stderr)
