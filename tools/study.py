"""Train recipes x seeds unattended and write one table of what each is worth: `result/study.md`.

    python -m tools.study --recipe default="--demo" --recipe classic="--demo --classic" --seeds 5

Each run is train.py, test.py and tools/evaluate.py, in its own process and its own folder under
`study/`. The same command again continues: finished runs are kept, an unfinished one is resumed.
The table holds every finished run in the folder. A recipe with `--eval_every` also has rows of the
epoch that it selects, and of the best one that it could have selected.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from pathlib import Path

import torch

import test
import train
import utils
from lib import checkpoint, devices, logger, validation
from lib import translation as tr
from lib.weights import load_generator
from tools import evaluate
from utils import UserError

# heading, key in result/metrics.json, what a unit of it is, decimals
MEASURES = (
    ("whole", "whole", 1, 3),
    ("changed", "changed", 1, 3),
    ("kept", "kept", 1, 1),
    ("RMSE", "rmse", 1, 1),
    ("under 5, %", "under_5", 0.01, 1),
    ("under 10, %", "under_10", 0.01, 1),
    ("cycle", "cycle", 1, 1),
    ("SWD", "swd", 1, 0),
    ("KID", "kid", 1, 4),
)
KINDS = {"last": "last weights", "average": "average weights"}
KINDS |= {"selected": "selected epoch", "oracle": "oracle's epoch"}


def run_once(folder: Path, name: str, command: str, seed: int, kid: bool) -> None:
    """Train in `folder`, or go on, and measure; the figures go to `figures.json`."""
    models, words = folder / "models", ["--workdir", str(folder)]
    typed = [*shlex.split(command)[2:], "--seed", str(seed), "--no_tensorboard", *words]
    typed += ["--resume"] if any(models.glob("train_state*.pth")) else []
    if train.main(train.parse_args(typed), keep_epoch):
        raise KeyboardInterrupt  # the run is saved
    trained = tr.read_options(models)
    pick_oracle(models, trained)
    figures = {
        "data": Path(trained["dataroot"]).name,
        "recipe": name,
        "command": command,
        "minutes": logger.read_csv(folder / "logs" / "losses.csv")["seconds"][-1] / 60,
    }
    for kind, weights, wanted in (
        ("oracle", ["--models", str(models / "oracle")], (models / "oracle").exists()),
        ("selected", ["--models", str(models / "best")], (models / "best").exists()),
        ("last", ["--last"], True),
        ("average", [], trained["ema"]),
    ):
        if wanted:
            test.main(test.parse_args([*words, *weights]))
            no_fid = [] if kid else ["--no_fid"]
            evaluate.main(evaluate.parse_args([*words, *weights, *no_fid]))
            figures[kind] = json.loads((folder / "result" / "metrics.json").read_text())
    utils.save_json(folder / "figures.json", figures)


def keep_epoch(model: train.CycleGAN, epoch: int) -> None:
    """Keep the generators of an epoch that was measured, for `pick_oracle`."""
    folder = utils.make_folder(model.args.workdir / "models" / "epochs" / f"{epoch:04d}")
    weights = {name: net.state_dict() for name, net in model.best_generators().items()}
    checkpoint.export(folder, weights, model.args.options)


def pick_oracle(models: Path, options: dict) -> None:
    """Keep as `oracle/` the epoch of the least error vs. ground truth on the test split, if known.

    The other epochs that `keep_epoch` kept are deleted.
    """
    pairs = validation.find_split_pairs(Path(options["dataroot"]), "test", options)
    pairs = {way: [pair for pair in found if pair[1]] for way, found in pairs.items()}
    device, dtype = devices.setup(argparse.Namespace(**options))
    scores, oracle = {}, models / "oracle"
    for epoch in sorted((models / "epochs").glob("*")) if all(pairs.values()) else []:
        nets = {path.stem: load_generator(path, device) for path in epoch.glob("*.pth")}
        _, scores[epoch] = validation.measure(nets, pairs, options, device, dtype)
    if scores and not oracle.exists():
        os.replace(min(scores, key=scores.get), oracle)
    shutil.rmtree(models / "epochs", ignore_errors=True)


def run_apart(threads: int, folder: Path, *more) -> None:
    """`run_once` in a process made for it, with so many threads; messages go to `output.txt`."""
    with open(folder / "output.txt", "ab") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())  # also for processes that it starts
    torch.set_num_threads(threads)
    run_once(folder, *more)


def make_row(name: str, measured: list[dict], kind: str, done: list[dict]) -> list[str]:
    """Return the cells of a row: of translation, identity or flat in each run's measures.

    A cell is a mean, with the standard deviation where there are several runs.
    """
    cells = [name]
    for _, key, unit, digits in MEASURES:
        cell = ""
        if all(key in found[kind] for found in measured):
            units = [found["identity"][key] if key == "changed" else unit for found in measured]
            values = [f[kind][key] / unit for f, unit in zip(measured, units, strict=True)]
            cell = f"{statistics.mean(values):.{digits}f}"
            cell += f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(cell)
    minutes = f"{statistics.mean(run['minutes'] for run in done):.1f}" if done else ""
    return [*cells, minutes, str(len(done) or "")]


def make_tables(figures: list[dict]) -> str:
    """Return for each data set and direction a table: a row for each recipe and kind of weights."""
    lines = []
    for data in dict.fromkeys(run["data"] for run in figures):
        recipes: dict[str, list[dict]] = {}
        for run in [run for run in figures if run["data"] == data]:
            recipes.setdefault(run["recipe"], []).append(run)
        for direction in ("A2B", "B2A"):
            rows = [["recipe", *(head for head, *_ in MEASURES), "minutes", "seeds"]]
            for name, done in recipes.items():
                for kind in [kind for kind in KINDS if kind in done[0]]:
                    measured = [run[kind][direction] for run in done]
                    rows.append(make_row(f"{name}, {KINDS[kind]}", measured, "translation", done))
            for kind, name in (("identity", "identity"), ("flat", "flat color")):
                if measured[0].get(kind):
                    rows.append(make_row(name, measured[:1], kind, []))
            columns = [c for c in zip(*rows, strict=True) if any(c[1:])]  # those with figures
            head, *rest = (f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))
            lines += [f"## {data}, {direction}", "", head, "|---" * len(columns) + "|", *rest, ""]
        lines += [f"- {name}: `{done[0]['command']}`" for name, done in recipes.items()]
        lines.append("")
    return "\n".join(lines)


HEAD = """# What each recipe is worth

Mean ± standard deviation over the seeds, on the test split. whole: mean absolute error over that of
identity (the source as it is). changed: the same where source and truth differ by more than 12 of
255. kept: mean absolute error elsewhere, of 255. RMSE, of 255. under 5 and 10: the share of pixels
whose largest channel error is below that. cycle: mean absolute difference of a picture and its way
there and back, of 255. SWD: sliced Wasserstein distance to the targets. minutes: of training.
selected epoch: the one that `--eval_every` chose on held-out pictures; oracle's epoch: the one that
has the least error on the test split itself, so the difference is what the choice costs.

"""


def write_table(args: argparse.Namespace, threads: int) -> str:
    done = sorted(args.folder.glob("*/figures.json"))
    tables = make_tables([json.loads(file.read_text()) for file in done])
    machine = devices.describe(devices.pick_device(None))
    text = f"{HEAD}{tables}\n{machine}; {args.jobs} at a time, threads of each: {threads}\n"
    with utils.atomic_write(utils.make_folder(args.workdir / "result") / "study.md") as file:
        file.write(text.encode())
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare recipes over several seeds.")
    add = parser.add_argument
    text = "a recipe and its options for train.py; give several (default=--demo)"
    add("--recipe", action="append", metavar="NAME=OPTIONS", help=text)
    add("--seeds", type=int, default=5, help="runs of each recipe (5)")
    add("--kid", action="store_true", help="KID and FID too (slow on a CPU)")
    add("--jobs", type=int, default=1, help="runs at a time (1)")
    add("--folder", type=Path, default=Path("study"), help="where runs go (study)")
    utils.add_workdir(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet, and write the table anew after every run.

    Raises:
        UserError: a run failed, or a finished one has other options than its recipe.
    """
    recipes = {}
    for recipe in args.recipe or ["default=--demo"]:
        name, equals, options = recipe.partition("=")
        if not equals or not name.replace("_", "").isalnum():
            raise UserError(f"--recipe {recipe} is not of the form NAME=OPTIONS")
        recipes[name] = f"python train.py {options.strip()}".strip()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)

    def work(seed: int, name: str) -> None:
        folder = utils.make_folder(args.folder / f"{name}_{seed}")
        if (folder / "figures.json").exists():
            done = json.loads((folder / "figures.json").read_text())["command"]
            if done != recipes[name]:
                raise UserError(f"{folder} is done with `{done}`: give {name} another name")
            return
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                run = folder, name, recipes[name], seed, args.kid
                pool.submit(run_apart, threads, *run).result()
        except (UserError, BrokenProcessPool) as error:
            raise UserError(f"the run in {folder} failed ({error}): see its output.txt") from error
        write_table(args, threads)
        print(f"{folder} is done")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, *zip(*product(range(args.seeds), recipes), strict=True)))
    print(write_table(args, threads))


if __name__ == "__main__":
    utils.run(main, parse_args())
