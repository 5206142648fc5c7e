"""Translate pictures with trained generators, and compare with the truth where it is known.

python test.py                                          the test split of the run in --workdir
python test.py --input photos/ --direction A2B          one's own pictures
python test.py --weights horse2zebra.pth --input photos/     published weights
"""

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import datasets
import utils
from models import load_generator, translate
from utils import UserError

WORKERS = 4  # threads that decode and save while the network computes

# ------------------------------------------------------------------------------------------------
# Translating files


def prepare(path: Path, channels: int, options: dict, size: int | None) -> np.ndarray:
    """Decode a picture at the scale it is to be translated at, (H, W, C).

    `size` makes the shorter side that long; 0 leaves the picture as it is; None does what training
    did, without crop and flip (`options` are the run's; without any the picture is left as it is).
    """
    picture = datasets.load_image(path, channels)
    height, width = picture.shape[:2]
    if size:
        scale = size / min(height, width)
        return datasets.resize(picture, (round(width * scale), round(height * scale)))
    if size is None and options.get("preprocess") == "resize_and_crop":
        return datasets.resize(picture, (options["size"], options["size"]))
    if size is None and str(options.get("preprocess")).startswith("scale_width"):
        width, height = options["load_size"], round(height * options["load_size"] / width)
        return datasets.resize(picture, (width, max(1, height)))
    return picture


def translate_files(
    net, paths: list[Path], load, batch_size: int, device, dtype
) -> Iterator[tuple]:
    """Yield (index, source, translation) for each path, or (index, reason, None) if unreadable.

    `load` decodes a path. Decoding goes on in threads while the network computes; pictures of one
    size that follow each other go through it as a batch.
    """

    def attempt(path: Path) -> np.ndarray | str:
        try:
            return load(path)
        except datasets.UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        ahead = [pool.submit(attempt, path) for path in paths[: 2 * batch_size]]
        group: list[tuple[int, np.ndarray]] = []
        for i in range(len(paths)):
            picture = ahead[i].result()
            ahead[i] = None  # a decoded picture is kept no longer than it is needed
            if len(ahead) < len(paths):
                ahead.append(pool.submit(attempt, paths[len(ahead)]))
            if isinstance(picture, str):
                yield i, picture, None
                continue
            if group and (picture.shape != group[0][1].shape or len(group) == batch_size):
                yield from translate_group(net, group, device, dtype)
                group = []
            group.append((i, picture))
        if group:
            yield from translate_group(net, group, device, dtype)


def translate_group(net, group: list[tuple[int, np.ndarray]], device, dtype) -> Iterator[tuple]:
    x = torch.stack([datasets.to_tensor(picture) for _, picture in group]).to(device)
    x = x.contiguous(memory_format=utils.memory_layout(device))
    for (i, picture), y in zip(group, translate(net, x, dtype).cpu(), strict=True):
        deep = len(y) not in (3, 4)  # colours are saved with 8 bits, all else as it came
        yield i, picture, datasets.to_array(y, picture.dtype if deep else np.uint8)


def save_array(path: Path, picture: np.ndarray) -> None:
    """Save (H, W, C) as PNG (C of 1, 8 or 16 bits, 3 or 4) or as .npy (any other C)."""
    if picture.shape[2] in (1, 3, 4):
        utils.save_picture(
            path, Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
        )
    else:
        with utils.atomic_write(path) as file:
            np.save(file, picture)


def side_by_side(*pictures: np.ndarray) -> Image.Image:
    images = [datasets.to_rgb(picture) for picture in pictures]
    strip = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width
    return strip


# ------------------------------------------------------------------------------------------------
# The error against the truth, where the test names of A and B match


class Error:
    """Mean absolute error, in [0, 1], over the pixels where source and truth differ."""

    def __init__(self):
        self.sums = np.zeros(3)  # of |translation - truth|, of |source - truth|, of values

    def add(self, source: np.ndarray, translation: np.ndarray, truth: np.ndarray) -> None:
        differ = (source != truth).any(axis=2)
        wanted, had, made = (
            p[differ].astype(np.float64) / 255 for p in (truth, source, translation)
        )
        self.sums += abs(made - wanted).sum(), abs(had - wanted).sum(), wanted.size

    def add_file(self, source: np.ndarray, translation: np.ndarray, path: Path) -> None:
        """The same with the truth's file; if it is damaged, its own translation will tell."""
        with contextlib.suppress(datasets.UnreadableImage):
            truth = datasets.load_image(path)
            self.add(source, translation, datasets.resize(truth, translation.shape[1::-1]))

    def figures(self) -> tuple[float, float]:
        """The error of the translations, and of doing nothing; nan where nothing differs."""
        made, had, n = self.sums.tolist()
        return (made / n, had / n) if n else (float("nan"), float("nan"))


def match_names(sources: list[str], truths: list[str]) -> dict[int, str]:
    """Which truth belongs to which source: the same name, but for the ending and a last _A or _B.

    (The maps and facades sets call a pair `1_A.jpg` and `1_B.jpg`.)
    """

    def key(name: str) -> str:
        return re.sub("_[AB]$", "", name.rpartition(".")[0])

    known = {key(name): name for name in truths}
    return {i: known[key(name)] for i, name in enumerate(sources) if key(name) in known}


def measure(args, nets: dict, device: torch.device, dtype) -> tuple[dict[str, float], float]:
    """Measure generators during training (`--eval_every`) on the test split of `args.dataroot`.

    Gives the measures by name, and the one to choose the best by (lower is better): the mean error
    against the truth where names match, else the cycle error; each in [0, 1].
    """
    letters = args.direction[0] + args.direction[-1]
    folders = [datasets.find_split(args.dataroot, f"test{letter}") for letter in letters]
    names = [datasets.list_images(folder) for folder in folders]
    options, measures = vars(args), {}
    training = {name: net.training for name, net in nets.items()}
    for net in nets.values():
        net.eval()
    for i, (forth, back) in enumerate((("netG_A2B", "netG_B2A"), ("netG_B2A", "netG_A2B"))):
        truths, error, cycle = match_names(names[i], names[1 - i]), Error(), []
        channels = (args.input_nc, args.output_nc)
        load = lambda path, c=channels[i]: prepare(path, c, options, None)
        paths = [folders[i] / name for name in names[i]]
        for j, source, fake in translate_files(nets[forth], paths, load, 1, device, dtype):
            if fake is None:
                continue
            rec = translate(nets[back], datasets.to_tensor(fake)[None].to(device), dtype)[0].cpu()
            cycle.append(float((rec - datasets.to_tensor(source)).abs().mean()) / 2)
            if j in truths and channels == (3, 3):
                error.add_file(source, fake, folders[1 - i] / truths[j])
        direction = forth.removeprefix("netG_")
        if error.sums[2]:
            measures[f"error_{direction}"], measures[f"nothing_{direction}"] = error.figures()
        measures[f"cycle_{direction}"] = float(np.mean(cycle)) if cycle else float("nan")
    for name, net in nets.items():
        net.train(training[name])
    kind = "error" if "error_A2B" in measures else "cycle"
    return measures, (measures[f"{kind}_A2B"] + measures[f"{kind}_B2A"]) / 2


# ------------------------------------------------------------------------------------------------
# The script


def read_options(models: Path) -> dict:
    """What the run was trained with, from `models/options.json`; empty for weights from elsewhere.

    Raises:
        UserError: the file is damaged.
    """
    path = models / "options.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and give --dataroot") from error


def find_weights(models: Path, name: str, last: bool) -> Path:
    """The moving average of a generator where there is one, unless `last` is asked for."""
    average = models / f"{name}_ema.pth"
    return models / f"{name}.pth" if last or not average.exists() else average


def find_jobs(args: argparse.Namespace, options: dict) -> list[dict]:
    """What to translate: for each direction the weights, the sources, and the truths if known.

    Raises:
        UserError: a folder is missing or empty.
    """
    directions = ["A2B", "B2A"] if args.direction is None else [args.direction.replace("to", "2")]
    if args.input:
        if not args.input.exists():
            raise UserError(f"there is no --input {args.input}: name a picture or a folder of them")
        folder = args.input if args.input.is_dir() else args.input.parent
        names = datasets.list_images(folder) if args.input.is_dir() else [args.input.name]
        if not names:
            raise UserError(f"--input {args.input} holds no picture")
        return [{"direction": directions[0], "folder": folder, "names": names}]
    root = args.dataroot or Path(options.get("dataroot", "dataset/apple2orange"))
    trained = options.get("direction", "AtoB")  # which folder the run took for A
    folders = {
        side: datasets.find_split(root, f"test{trained[0 if side == 'A' else -1]}") for side in "AB"
    }
    names = {side: datasets.list_images(folder) for side, folder in folders.items()}
    return [
        {
            "direction": direction,
            "folder": folders[direction[0]],
            "names": names[direction[0]],
            "truth_folder": folders[direction[-1]],
            "truths": match_names(names[direction[0]], names[direction[-1]]),
        }
        for direction in directions
    ]


def run_job(
    args, job: dict, net, back, options: dict, device, dtype, rank: int, world: int
) -> dict:
    """Translate one direction's files into `outputs/`, a few of them into `result/` too."""
    direction, folder, names = job["direction"], job["folder"], job["names"]
    suffix = ".png" if net.output_nc in (1, 3, 4) else ".npy"
    outputs = datasets.output_names(names, suffix)
    out = args.workdir / "outputs" / direction[-1]
    for parent in {(out / name).parent for name in outputs}:
        utils.make_folder(parent)
    size = args.size if args.size is not None else 0 if args.input else None
    mine = list(range(rank, len(names), world))
    load = lambda path: prepare(path, net.input_nc, options, size)
    batch_size = args.batch_size or (8 if device.type == "cuda" else 1)
    failed, error, saving = [], Error(), []
    paths = [folder / names[i] for i in mine]
    done = translate_files(net, paths, load, batch_size, device, dtype)
    with ThreadPoolExecutor(WORKERS) as pool:
        for k, source, fake in tqdm(done, direction, len(mine), disable=rank > 0):
            i = mine[k]
            if fake is None:
                failed.append(f"{folder / names[i]}: {source}")
                continue
            while len(saving) > 4 * WORKERS:
                saving.pop(0).result()  # so that memory stays bounded, and errors are seen
            saving.append(pool.submit(save_array, out / outputs[i], fake))
            if i < args.compare:
                stem = outputs[i].removesuffix(suffix).replace("/", "_")
                name = datasets.shorten(stem, ".png", f"{direction}_")
                utils.save_picture(args.workdir / "result" / name, side_by_side(fake, source))
                if back is not None:
                    x = datasets.to_tensor(fake)[None].to(device)
                    rec = datasets.to_array(translate(back, x, dtype)[0])
                    strip = side_by_side(source, fake, rec)
                    utils.save_picture(args.workdir / "outputs" / "cycle" / name, strip)
            if i in job.get("truths", {}) and source.shape[2] == fake.shape[2] == 3:
                error.add_file(source, fake, job["truth_folder"] / job["truths"][i])
        for future in saving:
            future.result()
    return {"direction": direction, "n": len(mine), "failed": failed, "sums": error.sums.tolist()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Translate pictures with trained generators.")
    group = parser.add_argument_group("what")
    group.add_argument("--dataroot", type=Path, help="folder with testA and testB (the run's)")
    group.add_argument("--input", type=Path, metavar="FILE_OR_FOLDER", help="one's own pictures")
    directions = ["A2B", "B2A", "AtoB", "BtoA"]
    group.add_argument("--direction", choices=directions, help="one only (both; with --input: A2B)")
    size_help = "length of the shorter side; 0: as it is (test split: as in training, --input: 0)"
    group.add_argument("--size", type=int, help=size_help)
    group.add_argument("--compare", type=int, default=8, help="comparison pictures in result/ (8)")
    group = parser.add_argument_group("with")
    utils.add_workdir(group)
    group.add_argument("--models", type=Path, metavar="DIR", help="folder of weights (models/)")
    group.add_argument("--weights", type=Path, metavar="FILE", help="one generator: .pth or .onnx")
    group.add_argument("--last", action="store_true", help="the last weights, not their average")
    group.add_argument("--batch_size", type=int, default=0, help="pictures at once (8 on a GPU)")
    utils.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Translate; returns 1 if some pictures could not be read, else 0."""
    if args.size is not None and args.size < 0:
        raise UserError(f"--size is {args.size}, but must not be negative")
    device, dtype, rank, world = utils.setup(args)
    models = args.models or args.workdir / "models"
    if not models.is_dir() and not args.weights:
        raise UserError(f"there is no folder {models}: train first, or name --models or --weights")
    options = read_options(args.weights.parent if args.weights else models)
    if args.weights and not args.input and args.direction is None:
        args.direction = "A2B"  # one generator goes one way
    jobs = find_jobs(args, options)
    for name in ("outputs", "outputs/cycle", "result"):
        utils.make_folder(args.workdir / name)
    results = []
    advice = "lower --batch_size, or give --size 512 or so"
    with utils.explain_out_of_memory(advice):
        for job in jobs:
            nets = []
            for way in (job["direction"], job["direction"][::-1]):
                path = args.weights or find_weights(models, f"netG_{way}", args.last)
                if way == job["direction"] or (path.exists() and not args.weights):
                    nets.append(load_generator(path, device))
            back = nets[1] if len(nets) > 1 else None
            results.append(run_job(args, job, nets[0], back, options, device, dtype, rank, world))
    if world > 1:
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(results, gathered)
        if rank > 0:
            return 0
        results = [merge([of_rank[i] for of_rank in gathered]) for i in range(len(results))]
    return report(args, results)


def merge(parts: list[dict]) -> dict:
    """The results of all ranks for one direction, as one."""
    return {
        "direction": parts[0]["direction"],
        "n": sum(part["n"] for part in parts),
        "failed": [line for part in parts for line in part["failed"]],
        "sums": np.sum([part["sums"] for part in parts], axis=0).tolist(),
    }


def report(args: argparse.Namespace, results: list[dict]) -> int:
    """Print what was done and write `result/report.html`."""
    for result in results:
        done = result["n"] - len(result["failed"])
        folder = args.workdir / "outputs" / result["direction"][-1]
        print(f"{result['direction']}: {done} of {result['n']} pictures translated to {folder}")
    for result in results:
        error = Error()
        error.sums = np.array(result["sums"])
        made, nothing = error.figures()
        if error.sums[2]:
            print(
                f"{result['direction']}: error against the truth {made:.3f}, of doing nothing "
                f"{nothing:.3f} (ratio {made / nothing:.3f}; mean absolute difference in [0, 1], "
                "where the two pictures differ)"
            )
    failed = [line for result in results for line in result["failed"]]
    for line in failed:
        print(f"could not be read: {line}".encode(errors="replace").decode())
    from tools.report import write_report

    print(f"report: {write_report(args.workdir)}")
    return 1 if failed else 0


if __name__ == "__main__":
    utils.run(main, parse_args())
