"""Train recipes x seeds unattended and write one table of what each is worth: `result/study.md`.

    python study.py --recipe classic="--ema 0 --id_every 1" --recipe default="" --seeds 5

Stopped at any point and started again, it goes on where it was: finished runs are kept, a
broken-off one is resumed. The error of a run is that of its test split, where the truth is known
(the same names in testA and testB); both the last weights and their moving average are judged.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import runs
import test
import utils
from models import load_generator
from utils import UserError

NETS = ("netG_A2B", "netG_B2A")


def run_once(folder: Path, options: list[str], threads: int) -> dict:
    """Train in `folder` unless that is done, and give the figures of the run."""
    done = folder / "figures.json"
    if done.exists():
        return json.loads(done.read_text())
    utils.make_folder(folder)
    again = ["--resume"] if any((folder / "models").glob("train_state*.pth")) else []
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, script, *options, "--workdir", folder, "--no_tensorboard", *again]
    with open(folder / "output.txt", "ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
    if code:
        raise UserError(f"the run in {folder} ended with code {code}: see {output.name}")
    figures = {"minutes": runs.read_log(folder / "logs" / "losses.csv")["seconds"][-1] / 60}
    models, device = folder / "models", torch.device("cpu")
    run = argparse.Namespace(**test.read_options(models))
    run.dataroot = Path(run.dataroot)
    for kind in ("last", "average"):
        paths = {name: test.find_weights(models, name, kind == "last") for name in NETS}
        nets = {name: load_generator(path) for name, path in paths.items()}
        figures[kind] = test.measure(run, nets, device, None)[0]
    utils.save_json(done, figures)
    return figures


def ratio(figures: dict, kind: str, direction: str) -> float:
    """The error of a run's translations over the error of doing nothing."""
    measures = figures[kind]
    return measures[f"error_{direction}"] / measures[f"nothing_{direction}"]


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def make_table(results: dict[str, list[dict]], commands: dict[str, str]) -> str:
    """A row for each recipe and kind of weights: mean and standard deviation over the seeds."""
    rows = [
        "| recipe | weights | A2B | B2A | seeds | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, done in results.items():
        for kind in ("last", "average"):
            cells = [spread([ratio(run, kind, way) for run in done]) for way in ("A2B", "B2A")]
            minutes = statistics.mean(run["minutes"] for run in done)
            rows.append(f"| {name} | {kind} | {' | '.join(cells)} | {len(done)} | {minutes:.1f} |")
    listed = [f"- {name}: `python train.py {command}`" for name, command in commands.items()]
    return "\n".join([*rows, "", *listed])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare recipes over several seeds.")
    parser.add_argument("--base", default="--demo", help="options of every run (--demo)")
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME=OPTIONS",
        help="a recipe and its options, as often as there are recipes (default=)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each recipe (5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--folder", type=Path, default=Path("study"), help="where runs go (study)")
    utils.add_workdir(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet, and write the table anew after every run."""
    commands = {}
    for recipe in args.recipe or ["default="]:
        name, equals, options = recipe.partition("=")
        if not equals or not name.replace("_", "").isalnum():
            raise UserError(f"--recipe {recipe} is not of the form NAME=OPTIONS")
        commands[name] = f"{args.base} {options}".strip()
    jobs = [(seed, name) for seed in range(args.seeds) for name in commands]
    results: dict[str, list[dict]] = {name: [] for name in commands}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    table = utils.make_folder(args.workdir / "result") / "study.md"

    def work(job: tuple[int, str]) -> None:
        seed, name = job
        options = [*shlex.split(commands[name]), "--seed", str(seed)]
        results[name].append(run_once(args.folder / f"{name}_{seed}", options, threads))
        written = make_table({n: done for n, done in results.items() if done}, commands)
        head = f"Error against the truth over that of doing nothing, {datetime.date.today()}:"
        with utils.atomic_write(table) as file:
            file.write(f"{head}\n\n{written}\n".encode())
        print(f"{name}, seed {seed}: done")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, jobs))
    print(table.read_text())


if __name__ == "__main__":
    utils.run(main, parse_args())
