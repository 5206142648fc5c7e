"""What a run keeps and shows: its state, exported networks, sample grids, the log and its plot.

`model` is train.py's CycleGAN, `args` are the options of the run.
"""

import contextlib
import copy
import csv
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import datasets
import utils
from models import LayoutError, generator_from_state, translate
from utils import UserError

# ------------------------------------------------------------------------------------------------
# Saving and loading


def collect_state(args, model, place: dict, rank: int = 0, world: int = 1) -> dict | None:
    """All that a resume needs, as a copy on the host: training may go on while it is written.

    `place` says how far the run is: epoch (from 0), sample (within it), seconds, best. Every rank
    has to call this; all but the first get None.

    Raises:
        UserError: a weight is not finite.
    """
    for name, net in model.networks().items():
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise UserError(
                f"a weight of {name} is not finite at iteration {model.iteration}: the last good "
                "state is untouched; --resume from it with a lower --lr or --amp off"
            )
    ranks = [model.rank_state()]
    if world > 1:
        ranks = [None] * world if rank == 0 else None
        dist.gather_object(model.rank_state(), ranks)
    if rank > 0:
        return None
    return copy_to_host({**model.state_dict(), "ranks": ranks, "args": args.options, **place})


def copy_to_host(x):
    """Nested dicts and lists with every tensor in them copied."""
    if isinstance(x, torch.Tensor):
        return x.to("cpu", copy=True)
    if isinstance(x, dict):
        copied = copy.copy(x)  # of the same kind: a state_dict has versions attached
        copied.update({key: copy_to_host(value) for key, value in x.items()})
        return copied
    return [copy_to_host(value) for value in x] if isinstance(x, list) else x


def save_state(workdir: Path, state: dict) -> None:
    """Write `models/train_state.pth`, keeping the one before, then the exported networks.

    Raises:
        UserError: the disk is full, or the folder not writable.
    """
    folder = workdir / "models"
    newest, fresh = folder / "train_state.pth", folder / "train_state.new.pth"
    utils.save_tensors(fresh, state)
    if newest.exists():
        os.replace(newest, folder / "train_state.prev.pth")
    os.replace(fresh, newest)
    utils.sync_folder(folder)
    export(workdir, state)


def export(workdir: Path, state: dict) -> None:
    """Write each network as a plain state_dict (`netG_A2B.pth`, ...) and the run's options."""
    folder = workdir / "models"
    for name in ("netG_A2B", "netG_B2A", "netD_A", "netD_B", "netG_A2B_ema", "netG_B2A_ema"):
        if name in state:
            utils.save_tensors(folder / f"{name}.pth", state[name])
        else:  # an average that was here would be older than the weights, yet preferred
            (folder / f"{name}.pth").unlink(missing_ok=True)
    utils.save_json(folder / "options.json", state["args"])


class Writer:
    """A thread that writes files while the device trains; one job at a time."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.job = self.pool.submit(int)  # nothing yet

    def submit(self, function, *arguments) -> None:
        """Wait for the last job, raise what it raised, and begin another."""
        self.job.result()
        self.job = self.pool.submit(function, *arguments)

    def check(self) -> None:
        """Raise what the last job raised, if it is done."""
        if self.job.done():
            self.job.result()

    def close(self) -> None:
        self.pool.shutdown()
        self.job.result()


def load_run(workdir: Path) -> dict:
    """The newest state of a run that can be read.

    Raises:
        UserError: there is none.
    """
    problems = []
    for name in ("train_state.pth", "train_state.new.pth", "train_state.prev.pth"):
        path = workdir / "models" / name
        try:
            state = utils.load_tensors(path)
            if not {"netG_A2B", "optimizer_G", "ranks", "args", "epoch", "sample"} <= state.keys():
                raise UserError(f"{path} is a checkpoint, but not the state of a run of train.py")
            if problems:
                print(f"{problems[0]}; going on from the other state, {path}")
            return state
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"cannot resume: {problems[0]}")


def load_initial(folder: Path, model) -> None:
    """Start from the weights in `folder` (`--init_from`): ours, or the reference repository's.

    Raises:
        UserError: no generators there, or of another architecture than the options ask for.
    """
    known = {"netG_A2B": "latest_net_G_A.pth", "netG_B2A": "latest_net_G_B.pth"}
    known |= {"netD_A": "latest_net_D_B.pth", "netD_B": "latest_net_D_A.pth"}  # theirs is swapped
    for name, net in model.networks().items():
        paths = [folder / f"{name}.pth", folder / known[name]]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            if name.startswith("netD"):
                continue  # published models rarely come with their discriminators
            raise UserError(f"--init_from {folder} has neither {paths[0].name} nor {paths[1].name}")
        try:
            state = utils.load_tensors(path)
            if name.startswith("netG"):
                state = generator_from_state(state).state_dict()
            net.load_state_dict(state)
        except (LayoutError, RuntimeError) as error:
            raise UserError(
                f"the weights in {path} do not fit the networks asked for "
                f"(--netG, --ngf, --norm, ...): {str(error).splitlines()[-1].strip()}"
            ) from error
        if name in model.averages:
            model.averages[name].load_state_dict(net.state_dict())
        print(f"{name} starts from {path}")


def clear_run(workdir: Path) -> None:
    """Forget the run that `workdir` holds (`--restart`)."""
    old = ["models/train_state*.pth", "models/net*.pth", "models/best/*", "images/*.png"]
    old += ["logs/losses.*", "logs/metrics.csv", "logs/skipped.txt", "logs/events.*"]
    old += ["outputs/cycle/*.png", "result/[AB]2[AB]_*.png", "result/metrics.json"]
    for pattern in old:
        for path in workdir.glob(pattern):
            path.unlink()


def keep_best(args, model, log: "Log", epoch: int, best: float | None) -> float | None:
    """Measure on the test split, log it, and keep the best generators in `models/best/`."""
    import test  # test.py, which imports nothing from here

    measures, score = test.measure(args, model.best_generators(), model.device, model.dtype)
    log.write_measures(epoch, model.iteration, measures)
    if best is not None and score >= best:
        return best
    folder = utils.make_folder(args.workdir / "models" / "best")
    for name, net in model.best_generators().items():
        utils.save_tensors(folder / f"{name}.pth", net.state_dict())
    utils.save_json(folder / "options.json", args.options)
    return score


# ------------------------------------------------------------------------------------------------
# Pictures


def sample_pictures(args, split: str, channels: int, n: int = 4) -> torch.Tensor:
    """The first test pictures (training pictures where there are none), (n, C, size, size)."""
    try:
        folder = datasets.find_split(args.dataroot, split)
    except UserError:
        folder = datasets.find_split(args.dataroot, split.replace("test", "train"))
    pictures = []
    for name in datasets.list_images(folder):
        try:
            picture = datasets.load_image(folder / name, channels)
        except datasets.UnreadableImage:
            continue  # Domain and test.py report it
        pictures.append(datasets.to_tensor(datasets.resize(picture, (args.size, args.size))))
        if len(pictures) == n:
            break
    if not pictures:
        raise UserError(f"not one picture in {folder} can be read")
    return torch.stack(pictures)


def draw_samples(model, real_A: torch.Tensor, real_B: torch.Tensor) -> list[torch.Tensor]:
    """real A, fake B, recovered A, real B, fake A, recovered B: each (n, C, H, W), on the host."""
    nets = model.best_generators()
    training = {name: net.training for name, net in nets.items()}
    columns = []
    for net in nets.values():
        net.eval()
    for x, forth, back in ((real_A, "netG_A2B", "netG_B2A"), (real_B, "netG_B2A", "netG_A2B")):
        fake = translate(nets[forth], x.to(model.device), model.dtype)
        columns += [x, fake.cpu(), translate(nets[back], fake, model.dtype).cpu()]
    for name, net in nets.items():
        net.train(training[name])
    return columns


def make_grid(columns: list[torch.Tensor]) -> Image.Image:
    """The columns of `draw_samples` side by side, under their titles."""
    titles = ("real A", "fake B", "recovered A", "real B", "fake A", "recovered B")
    size = columns[0].shape[-1]
    cell, gap, top = size * -(-128 // size), 4, 20  # small pictures are shown larger
    rows = max(map(len, columns))
    grid = Image.new("RGB", (6 * (cell + gap) + gap, rows * (cell + gap) + top), "white")
    draw = ImageDraw.Draw(grid)
    for i, (title, column) in enumerate(zip(titles, columns, strict=True)):
        x = gap + i * (cell + gap)
        draw.text((x + cell / 2, top / 2), title, "#333333", anchor="mm", font_size=12)
        for j, picture in enumerate(column):
            picture = datasets.to_rgb(datasets.to_array(picture))
            picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            grid.paste(picture, (x, top + j * (cell + gap)))
    return grid


# ------------------------------------------------------------------------------------------------
# The log


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; a torn last line, should the power fail, is dropped by `trim_log`."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): free some space") from error


def trim_log(path: Path, iteration: int) -> None:
    """Drop the rows of a CSV log past `iteration`: a resumed run will write them again."""
    if not path.exists():
        return
    lines = path.read_text().split("\n")[:-1]  # what has no end of line was torn
    if not lines:
        path.unlink()  # not even a header
        return
    kept = lines[:1] + [line for line in lines[1:] if int(line.split(",")[1]) <= iteration]
    with utils.atomic_write(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def read_log(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV log."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return {
        name: [float(row[i]) for row in rows[1:] if len(row) == len(rows[0])]
        for i, name in enumerate(rows[0])
    }


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")


def plot_losses(log: Path, path: Path, names: tuple[str, ...]) -> None:
    """Draw columns of a CSV log over the iterations, with Pillow alone (no plotting library).

    The faint line is the logged value, the strong one its running mean over a 50th of the run.
    """
    columns = read_log(log)
    steps = columns["iteration"]
    if len(steps) < 2:
        return
    scale = 2  # drawn twice as large and shrunk: Pillow's lines are not antialiased
    width, height, left, right, top, bottom = 900, 420, 56, 130, 34, 44
    picture = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(picture)

    def text(x, y, words, fill="#333333", anchor="la", size=13):
        draw.text((x * scale, y * scale), words, fill, anchor=anchor, font_size=size * scale)

    values = sorted(value for name in names for value in columns[name])
    peak = values[int(0.995 * len(values))] * 1.1  # one spike shall not flatten the rest
    unit = 10 ** math.floor(math.log10(max(peak, 1e-9)))
    tick = next(unit * f for f in (0.1, 0.2, 0.5, 1, 2) if peak / (unit * f) <= 8)
    span = max(steps[-1] - steps[0], 1)

    def place(step, value):
        x = left + (width - left - right) * (step - steps[0]) / span
        y = height - bottom - (height - top - bottom) * min(value, peak) / peak
        return x * scale, y * scale

    for i in range(int(peak / tick) + 1):
        (x0, y), (x1, _) = place(steps[0], i * tick), place(steps[-1], i * tick)
        draw.line((x0, y, x1, y), "#e6e6e6", scale)
        text(left - 6, y / scale, f"{i * tick:.4g}", anchor="rm")
    for i in range(6):
        step = steps[0] + span * i / 5
        text(place(step, 0)[0] / scale, height - bottom + 8, f"{step:.0f}", anchor="ma")
    text((left + width - right) / 2, height - 18, "iteration", anchor="ma")
    text(left, 10, "losses")
    window = max(1, len(steps) // 50)
    for number, name in enumerate(names):
        values, colour = columns[name], COLOURS[number % len(COLOURS)]
        mean, total = [], 0.0
        for i, value in enumerate(values):
            total += value - (values[i - window] if i >= window else 0)
            mean.append(total / min(i + 1, window))
        faint = Image.blend(
            Image.new("RGB", (1, 1), colour), Image.new("RGB", (1, 1), "white"), 0.7
        )
        draw.line(
            [place(*p) for p in zip(steps, values, strict=True)], faint.getpixel((0, 0)), scale
        )
        draw.line([place(*p) for p in zip(steps, mean, strict=True)], colour, 2 * scale)
        text(width - right + 12, top + 20 * number, f"{name} {mean[-1]:.3f}", colour)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    utils.save_picture(path, picture)


class Log:
    """The losses of a run: `logs/losses.csv`, its plot, TensorBoard where it is installed."""

    names = ("epoch", "iteration", "D", "G", "adv", "cycle", "identity", "lr", "seconds")

    def __init__(self, args, iteration: int):
        self.path = args.workdir / "logs" / "losses.csv"
        trim_log(self.path, iteration)
        trim_log(self.path.with_name("metrics.csv"), iteration)
        if not self.path.exists():
            self.append(self.names)
        self.writer = Writer()
        self.board = None
        if not args.no_tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.path.parent, purge_step=iteration + 1)
                print(f"watch with: tensorboard --logdir {self.path.parent}")

    def append(self, row) -> None:
        append_line(self.path, ",".join(str(value) for value in row))

    def write(self, epoch: int, iteration: int, losses: dict, lr: float, seconds: float) -> None:
        values = [f"{losses[name]:.6f}" for name in self.names[2:7]]
        self.append([epoch, iteration, *values, f"{lr:.8f}", f"{seconds:.1f}"])
        if self.board:
            for name, value in losses.items():
                self.board.add_scalar(f"loss/{name}", value, iteration)
            self.board.add_scalar("lr", lr, iteration)

    def write_measures(self, epoch: int, iteration: int, measures: dict) -> None:
        """A row of `logs/metrics.csv`."""
        path = self.path.with_name("metrics.csv")
        if not path.exists():
            append_line(path, ",".join(["epoch", "iteration", *measures]))
        row = [f"{value:.6f}" for value in measures.values()]
        append_line(path, ",".join([str(epoch), str(iteration), *row]))
        if self.board:
            for name, value in measures.items():
                self.board.add_scalar(f"measure/{name}", value, iteration)

    def show(self, columns: list[torch.Tensor], paths: list[Path], iteration: int) -> None:
        """Write the grid of `draw_samples` to `paths`."""
        self.writer.submit(self.write_grid, columns, paths, iteration)

    def write_grid(self, columns: list[torch.Tensor], paths: list[Path], iteration: int) -> None:
        grid = make_grid(columns)
        for path in paths:
            utils.save_picture(path, grid)
        if self.board:
            self.board.add_image("samples", np.asarray(grid), iteration, dataformats="HWC")

    def plot(self) -> None:
        path = self.path.with_suffix(".png")
        self.writer.submit(plot_losses, self.path, path, self.names[2:7])

    def close(self) -> None:
        self.writer.close()
        if self.board:
            self.board.close()


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
