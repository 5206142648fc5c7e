"""Train recipes x seeds unattended and write one table of what each is worth: `result/study.md`.

    python -m tools.study --recipe default="--demo" --recipe classic="--demo --classic" --seeds 5

Each run is train.py, test.py and tools/evaluate.py, in its own folder under `study/`. The same
command again continues: finished runs are kept, an unfinished one is resumed. The table holds every
finished run in the folder.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import utils
from lib import logger
from utils import UserError

ROOT = Path(__file__).parent.parent
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


def run_script(name: str, folder: Path, options: list[str], threads: int) -> None:
    """Run a script as its own process, its output to `output.txt`; UserError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with open(folder / "output.txt", "ab") as output:
        command = [sys.executable, "-m", name, *options, "--workdir", folder]
        code = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
    if code:
        raise UserError(f"{name} ended with code {code}: see {folder / 'output.txt'}")


def threads_for(args: argparse.Namespace) -> int:
    return max(1, (os.cpu_count() or 1) // args.jobs)


def run_once(folder: Path, name: str, options: str, args: argparse.Namespace, seed: int) -> None:
    """Train in `folder` and measure, unless that is done; the figures go to `figures.json`.

    Raises:
        UserError: a script failed, or the folder holds a finished run of other options.
    """
    command = f"python train.py {options}".strip()
    if (folder / "figures.json").exists():
        done = json.loads((folder / "figures.json").read_text())["command"]
        if done != command:
            raise UserError(f"{folder} is done with `{done}`: give --recipe {name} another name")
        return
    threads = threads_for(args)
    utils.make_folder(folder)
    again = ["--resume"] if any((folder / "models").glob("train_state*.pth")) else []
    typed = [*shlex.split(options), "--seed", str(seed), "--no_tensorboard", *again]
    run_script("train", folder, typed, threads)
    trained = json.loads((folder / "models" / "options.json").read_text())
    figures = {
        "data": Path(trained["dataroot"]).name,
        "recipe": name,
        "command": command,
        "minutes": logger.read_csv(folder / "logs" / "losses.csv")["seconds"][-1] / 60,
    }
    no_fid = [] if args.kid else ["--no_fid"]
    for kind, last in (("last", ["--last"]), ("average", [])):
        if kind == "last" or trained["ema"]:
            run_script("test", folder, last, threads)
            run_script("tools.evaluate", folder, [*last, *no_fid], threads)
            figures[kind] = json.loads((folder / "result" / "metrics.json").read_text())
    utils.save_json(folder / "figures.json", figures)


def spread(values: list[float], digits: int) -> str:
    """The mean, and the standard deviation where there is more than one."""
    words = f"{statistics.mean(values):.{digits}f}"
    return f"{words} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else words


def make_row(name: str, found: list[tuple[dict, dict]], done: list[dict]) -> list[str]:
    """A recipe's measures from pairs (of the translation, of identity), one pair for a run."""
    cells = [name]
    for _, key, unit, digits in MEASURES:
        values = [made.get(key) for made, _ in found]
        if key == "changed" and None not in values:
            values = [made[key] / identity[key] for made, identity in found]
        cells.append("" if None in values else spread([v / unit for v in values], digits))
    minutes = f"{statistics.mean(run['minutes'] for run in done):.1f}" if done else ""
    return [*cells, minutes, str(len(done) or "")]


def make_tables(figures: list[dict]) -> str:
    """For each data set and direction a row for each recipe and kind of weights."""
    lines = []
    for data in dict.fromkeys(run["data"] for run in figures):
        recipes: dict[str, list[dict]] = {}
        for run in figures:
            if run["data"] == data:
                recipes.setdefault(run["recipe"], []).append(run)
        for direction in ("A2B", "B2A"):
            rows = [["recipe", *(head for head, *_ in MEASURES), "minutes", "seeds"]]
            for name, done in recipes.items():
                for kind in [kind for kind in ("last", "average") if kind in done[0]]:
                    both = [run[kind][direction] for run in done]
                    found = [(one["translation"], one["identity"]) for one in both]
                    rows.append(make_row(f"{name}, {kind} weights", found, done))
            for kind, name in (("identity", "identity"), ("flat", "flat colour")):
                if both[0].get(kind):
                    rows.append(make_row(name, [(both[0][kind], both[0]["identity"])], []))
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

"""


def write_table(args: argparse.Namespace, path: Path) -> str:
    done = sorted(args.folder.glob("*/figures.json"))
    tables = make_tables([json.loads(file.read_text()) for file in done])
    machine = utils.describe(utils.pick_device(None))
    side_by_side = f"{args.jobs} at a time, threads of each: {threads_for(args)}"
    text = f"{HEAD}{tables}\n{machine}; {side_by_side}\n"
    with utils.atomic_write(path) as file:
        file.write(text.encode())
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare recipes over several seeds.")
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME=OPTIONS",
        help="a recipe and its options for train.py; give several (default=--demo)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each recipe (5)")
    parser.add_argument("--kid", action="store_true", help="KID and FID too (slow on a CPU)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--folder", type=Path, default=Path("study"), help="where runs go (study)")
    utils.add_workdir(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run what is not done yet, and write the table anew after every run."""
    recipes = {}
    for recipe in args.recipe or ["default=--demo"]:
        name, equals, options = recipe.partition("=")
        if not equals or not name.replace("_", "").isalnum():
            raise UserError(f"--recipe {recipe} is not of the form NAME=OPTIONS")
        recipes[name] = options.strip()
    jobs = [(seed, name) for seed in range(args.seeds) for name in recipes]
    table = utils.make_folder(args.workdir / "result") / "study.md"

    def work(job: tuple[int, str]) -> None:
        seed, name = job
        run_once(args.folder / f"{name}_{seed}", name, recipes[name], args, seed)
        write_table(args, table)
        print(f"{name}, seed {seed}: done")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, jobs))
    print(write_table(args, table))


if __name__ == "__main__":
    utils.run(main, parse_args())
