"""What a run shows while it goes on: a progress bar, CSV files, a plot of them, TensorBoard."""

import contextlib
import csv
import datetime
import os
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import utils
from lib import samples
from lib.processes import WriterThread

UNCHANGED = 0.5  # mean |G(x) - x| of 255 under which nothing is translated

# ------------------------------------------------------------------------------------------------
# CSV


def trim_csv(path: Path, iteration: int) -> None:
    """Drop the rows past `iteration` (the second column): a resumed run writes them again."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last: empty or torn
    if not lines:
        path.unlink(missing_ok=True)  # not even a header
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


def plot_losses(log: Path) -> None:
    """Plot logs/losses.csv over the iterations, beside it, where matplotlib is installed."""
    columns, names = read_csv(log), ("D", "G", "adv", "cycle", "identity")
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
    with utils.atomic_write(log.with_suffix(".png")) as file:
        figure.savefig(file, format="png", dpi=100)


# ------------------------------------------------------------------------------------------------
# The logger


class Logger(contextlib.AbstractContextManager):
    """Progress bar, CSV, plot, grids and TensorBoard; does nothing on ranks but the first."""

    def __init__(self, args, rank: int, iteration: int, remaining: int):
        """`iteration` iterations are done, `remaining` are to come."""
        self.args, self.is_main, self.board = args, rank == 0, None
        self.logs, self.thread = args.workdir / "logs", WriterThread()
        self.last_change = iteration  # the last one known to change its pictures
        self.start_epoch(iteration)
        if self.is_main:
            first, second = args.direction.split("to")
            self.real_A = samples.load(args, first, args.input_nc, args.range_A)
            self.real_B = samples.load(args, second, args.output_nc, args.range_B)
            for name in ("losses", "metrics"):
                trim_csv(self.logs / f"{name}.csv", iteration)
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
        """Append a row to logs/<name>.csv; its first columns are epoch and iteration.

        It is on disk on return; a row torn by a power cut is dropped by `trim_csv`.
        """
        if not self.is_main:
            return
        path = self.logs / f"{name}.csv"
        lines = [] if path.exists() else [",".join(row)]
        lines.append(",".join(f"{value:.6g}" for value in row.values()))
        with utils.writing(path), open(path, "a") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
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
        rate = (self.bar.n - self.bar.initial) / self.bar.format_dict["elapsed"]
        eta = datetime.timedelta(seconds=round((self.bar.total - self.bar.n) / rate))
        n_epochs = self.args.n_epochs + self.args.refine_epochs
        self.print(
            f"[Epoch {epoch}/{n_epochs}] [Batch {n_steps}/{n_steps}] "
            f"[D loss: {losses['D']:.6f}] [G loss: {losses['G']:.6f}, adv: {losses['adv']:.6f}, "
            f"cycle: {losses['cycle']:.6f}, identity: {losses['identity']:.6f}] "
            f"[lr: {lr:.6f}] ETA: {eta}\n  {seconds:.1f} s, {speed:.2f} pictures of "
            f"each domain a second, {100 * self.waited / seconds:.1f}% of the time waiting for data"
        )
        self.start_epoch(self.bar.n)

    def log_samples(self, model, *names: str) -> None:
        """Write a sample grid to images/<name>.png."""
        if self.is_main:
            columns = samples.generate(model, self.real_A, self.real_B)
            paths = [self.args.workdir / "images" / f"{name}.png" for name in names]
            self.thread.submit(self.write_grid, columns, paths, model.iteration)

    def write_grid(self, columns: dict, paths: list[Path], iteration: int) -> None:
        grid = samples.draw(columns)
        for path in paths:
            utils.save_picture(path, grid)
        if self.board:
            with utils.writing(self.logs):
                self.board.add_image("samples", np.asarray(grid), iteration, dataformats="HWC")

    def plot(self) -> None:
        """Write logs/losses.png."""
        path = self.logs / "losses.csv"
        if self.is_main and path.exists():
            self.thread.submit(plot_losses, path)

    def __exit__(self, *error) -> None:
        self.bar.close()
        try:
            self.thread.__exit__(*error)
        finally:
            try:
                if self.board:
                    self.board.close()
            except OSError as lost:  # the rows are in the CSV files: no reason to fail at the end
                print(f"TensorBoard's file in {self.logs} is incomplete ({lost})", file=sys.stderr)
