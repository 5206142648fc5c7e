"""What a run shows: logs/losses.csv and its plot, metrics.csv, sample grids, TensorBoard.

`args` are the options of the run, `model` is train.py's CycleGAN.
"""

import contextlib
import csv
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid
from tqdm import tqdm

import datasets
import utils
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
    """Drop the rows past `iteration` (column 1): a resumed run writes them again."""
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
    """Plot columns of a CSV log over the iterations: each row faint, their running mean strong.

    Does nothing where matplotlib is not installed or there are fewer than two rows.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: its state is not for threads
    except ImportError:
        return
    columns = read_csv(log)
    steps = columns["iteration"]
    if len(steps) < 2:
        return
    window = max(1, len(steps) // 50)
    figure = Figure(figsize=(9, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        total = np.cumsum([0.0, *columns[name]])
        ends = np.arange(1, len(total))
        starts = np.maximum(0, ends - window)
        mean = (total[ends] - total[starts]) / (ends - starts)
        axes.plot(steps, columns[name], color=f"C{i}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, mean, color=f"C{i}", label=f"{name} {mean[-1]:.3f}")
    values = np.concatenate([columns[name] for name in names])
    top = np.quantile(values, 0.995) * 1.1  # one spike must not flatten the rest
    axes.set(xlabel="iteration", ylabel="loss", ylim=(0, max(top, 1e-9)))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    with utils.atomic_write(path) as file:
        figure.savefig(file, format="png")


# ------------------------------------------------------------------------------------------------
# Sample grids

TITLES = ("real A", "fake B", "recovered A", "real B", "fake A", "recovered B")


def load_samples(args, split: str, channels: int, n: int = 4) -> torch.Tensor:
    """The first test pictures (training pictures where there are none), (n, C, size, size)."""
    try:
        folder = datasets.find_split(args.dataroot, split)
    except UserError:
        folder = datasets.find_split(args.dataroot, split.replace("test", "train"))
    pictures = []
    for name in datasets.list_images(folder):
        with contextlib.suppress(datasets.UnreadableImage):  # Domain and test.py report it
            picture = datasets.load_image(folder / name, channels)
            pictures.append(datasets.to_tensor(datasets.resize(picture, (args.size, args.size))))
        if len(pictures) == n:
            break
    if not pictures:
        raise UserError(f"not one picture in {folder} can be read")
    return torch.stack(pictures)


def generate_samples(model, real_A: torch.Tensor, real_B: torch.Tensor) -> list[torch.Tensor]:
    """The columns named in TITLES, each (n, C, H, W), on the host."""
    nets, columns = model.best_generators(), []
    with utils.evaluating(*nets.values()):
        for x, first, second in (
            (real_A, "netG_A2B", "netG_B2A"),
            (real_B, "netG_B2A", "netG_A2B"),
        ):
            fake = translate(nets[first], x.to(model.device), model.dtype)
            rec = translate(nets[second], fake, model.dtype)
            columns += [x, fake.cpu(), rec.cpu()]
    return columns


def draw_grid(columns: list[torch.Tensor]) -> Image.Image:
    """The columns of `generate_samples` side by side, under their titles."""
    scale, gap, top = -(-128 // columns[0].shape[-1]), 4, 16  # small pictures are shown larger
    rows = zip(*columns, strict=False)  # of six pictures
    cells = [datasets.to_rgb(datasets.to_array(picture)) for row in rows for picture in row]
    cells = torch.stack([torch.from_numpy(np.array(cell)).permute(2, 0, 1) for cell in cells])
    cells = cells.repeat_interleave(scale, 2).repeat_interleave(scale, 3)  # (6 n, 3, cell, cell)
    grid = make_grid(cells, nrow=6, padding=gap, pad_value=255)
    image = Image.new("RGB", (grid.shape[2], grid.shape[1] + top), "white")
    image.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, top))
    draw = ImageDraw.Draw(image)
    for i, title in enumerate(TITLES):
        x = gap + i * (cells.shape[3] + gap) + cells.shape[3] / 2
        draw.text((x, 10), title, "#333333", anchor="mm", font_size=12)
    return image


# ------------------------------------------------------------------------------------------------
# All of it


class Logger:
    """Progress bar, CSV, plots, grids and TensorBoard of a run; silent on all ranks but the first.

    Grids and plots are written by a thread.
    """

    losses = ("D", "G", "adv", "cycle", "identity")  # columns of losses.csv, in the plot too
    header = ("epoch", "iteration", *losses, "lr", "seconds")

    def __init__(self, args, rank: int, iteration: int, total: int):
        """`iteration` of `total` are done already."""
        self.is_main, self.workdir, self.board = rank == 0, args.workdir, None
        self.path = args.workdir / "logs" / "losses.csv"
        self.thread = utils.WriterThread()
        self.bar = tqdm(
            total=total,
            initial=iteration,
            disable=not self.is_main,
            unit="it",
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no animation
            dynamic_ncols=True,
        )
        if not self.is_main:
            return
        trim_csv(self.path, iteration)
        trim_csv(self.path.with_name("metrics.csv"), iteration)
        if not self.path.exists():
            append_line(self.path, ",".join(self.header))
        if not args.no_tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.path.parent, purge_step=iteration + 1)
                self.print(f"watch with: tensorboard --logdir {self.path.parent}")

    def print(self, text: str) -> None:
        if self.is_main:
            self.bar.write(text)

    def log_losses(self, epoch: int, iteration: int, losses: dict, lr: float, seconds: float):
        """A row of logs/losses.csv."""
        if not self.is_main:
            return
        self.thread.check()
        values = [f"{losses[name]:.6f}" for name in self.losses]
        row = [str(epoch), str(iteration), *values, f"{lr:.8f}", f"{seconds:.1f}"]
        append_line(self.path, ",".join(row))
        self.bar.set_postfix({name: f"{losses[name]:.3f}" for name in ("D", "G", "cycle")})
        self.add_scalars("loss", {**losses, "lr": lr}, iteration)

    def log_metrics(self, epoch: int, iteration: int, metrics: dict[str, float]) -> None:
        """A row of logs/metrics.csv."""
        if not self.is_main:
            return
        path = self.path.with_name("metrics.csv")
        if not path.exists():
            append_line(path, ",".join(["epoch", "iteration", *metrics]))
        row = [f"{value:.6f}" for value in metrics.values()]
        append_line(path, ",".join([str(epoch), str(iteration), *row]))
        self.add_scalars("metric", metrics, iteration)

    def add_scalars(self, group: str, values: dict[str, float], iteration: int) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, iteration)

    def log_samples(self, model, samples: tuple[torch.Tensor, torch.Tensor], *names: str) -> None:
        """Write a sample grid to images/<name>.png."""
        if self.is_main:
            columns = generate_samples(model, *samples)
            paths = [self.workdir / "images" / f"{name}.png" for name in names]
            self.thread.submit(self.write_grid, columns, paths, model.iteration)

    def write_grid(self, columns: list[torch.Tensor], paths: list[Path], iteration: int) -> None:
        grid = draw_grid(columns)
        for path in paths:
            utils.save_picture(path, grid)
        if self.board:
            self.board.add_image("samples", np.asarray(grid), iteration, dataformats="HWC")

    def plot(self) -> None:
        """Write logs/losses.png."""
        if self.is_main:
            self.thread.submit(plot_losses, self.path, self.path.with_suffix(".png"), self.losses)

    def close(self) -> None:
        self.bar.close()
        self.thread.close()
        if self.board:
            self.board.close()
