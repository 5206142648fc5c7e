"""Measure the translations that test.py wrote, which `outputs/index.csv` lists.

python -m tools.evaluate                                      the run in --workdir
python -m tools.evaluate --inception weights-inception.pth    where the weights cannot be fetched

Two baselines stand beside them: identity, the source as it is, and one flat color, the median of
the target's training pixels.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import datasets
import utils
from lib import devices, formats, metrics
from lib import translation as tr
from lib.outputs import read_index
from lib.weights import load_generator
from tools.report import format_measures, write_report
from utils import UserError

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # among torch-fidelity's releases
N_TRAIN = 500  # training pictures that stand for all, at most


def load_rgb(path: Path | str, channels: int, size: tuple | None = None) -> np.ndarray:
    """Return a picture as (H, W, 3) uint8: gray is repeated, of more channels three are taken.

    It is resized to `size` = (width, height) if that is given.

    Raises:
        UnreadableImage: see datasets.load_image.
    """
    picture = datasets.load_image(Path(path), channels)
    return np.array(datasets.to_rgb(datasets.resize(picture, size or picture.shape[1::-1])))


class Pictures(Dataset):
    """The readable pictures of a set, resized to `size` = (width, height): (3, H, W), uint8."""

    def __init__(self, paths: list, channels: int):
        self.paths, self.channels, self.size = [], channels, None
        for path in paths:
            with contextlib.suppress(datasets.UnreadableImage):  # test.py has reported it
                datasets.load_image(Path(path), channels)
                self.paths.append(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(load_rgb(self.paths[i], self.channels, self.size)).permute(2, 0, 1)


def measure_pairs(rows: list, channels: tuple[int, int], flat: torch.Tensor | None) -> dict:
    """Return the errors (lib/metrics.py) of translation, identity and flat where truth is known.

    Source and truth are resized to the translation; `flat` is a picture (3, H, W) of one color.
    `whole` is mae over that of identity.
    """
    sums, tables = {}, {}
    for row in tqdm([row for row in rows if row.truth], "pairs", leave=False):
        try:
            fake = load_rgb(row.output, channels[1])
            source = load_rgb(row.source, channels[0], fake.shape[1::-1])
            truth = load_rgb(row.truth, channels[1], fake.shape[1::-1])
        except datasets.UnreadableImage:
            continue  # test.py has reported it
        pictures = {"translation": fake, "identity": source}
        if flat is not None:
            pictures["flat"] = np.broadcast_to(flat[:, 0, 0].numpy(), fake.shape)
        for kind, picture in pictures.items():
            errors = metrics.pixel_errors(picture, truth)
            with contextlib.suppress(ImportError):  # no scikit-image
                errors |= metrics.similarity(picture, truth)
            tables.setdefault(kind, []).append(errors)
            sums[kind] = sums.get(kind, 0) + metrics.error_sums(picture, source, truth)
    found = {kind: metrics.masked_errors(sums[kind]) for kind in tables}
    for kind, table in tables.items():
        found[kind] |= {key: float(np.mean([errors[key] for errors in table])) for key in table[0]}
        if found["identity"]["mae"]:
            found[kind]["whole"] = found[kind]["mae"] / found["identity"]["mae"]
        found["translation"]["n_pairs"] = len(table)
    return found


def cycle_error(rows: list, back, device: torch.device, dtype) -> dict[str, float]:
    """Return the mean absolute difference of sources and translations translated back, of 255."""
    paths, errors = [Path(row.output) for row in rows], []
    load = lambda path: datasets.load_image(path, back.input_nc)
    done = tr.translate_files(back, paths, load, 8 if device.type == "cuda" else 1, device, dtype)
    for i, fake, rec in tqdm(done, "cycle", len(rows), leave=False):
        with contextlib.suppress(datasets.UnreadableImage):
            source = datasets.load_image(Path(rows[i].source), back.output_nc)
            if rec is not None:  # None: the translation itself is unreadable
                source = datasets.to_tensor(datasets.resize(source, fake.shape[1::-1]))
                errors.append(float((datasets.to_tensor(rec) - source).abs().mean()) * 127.5)
    return {"cycle": float(np.mean(errors))} if errors else {}


def find_sets(root: Path | None, index: dict, options: dict, channels: dict) -> dict:
    """Return the sets fake_A, fake_B and, if there is a `root`, real, train and flat of A and B.

    real is the test split; train is every k-th training picture, N_TRAIN at most; flat is one
    picture of their median color. Sets of which no picture can be read are left out. All have the
    size of the first translation.

    Raises:
        UserError: `root` has no test split.
    """
    paths = {f"fake_{way[-1]}": [row.output for row in rows] for way, rows in index.items()}
    for domain in "AB" if root else "":
        folder = tr.find_split(root, "test", domain, options)
        paths[f"real_{domain}"] = [folder / name for name in datasets.list_images(folder)]
        with contextlib.suppress(UserError):
            folder = tr.find_split(root, "train", domain, options)
            names = datasets.list_images(folder)
            names = names[:: -(-len(names) // N_TRAIN)]
            paths[f"train_{domain}"] = [folder / name for name in names]
    sets = {name: Pictures(found, channels[name[-1]]) for name, found in paths.items()}
    sets = {name: pictures for name, pictures in sets.items() if len(pictures)}
    for pictures in sets.values():
        pictures.size = next(iter(sets.values()))[0].shape[2:0:-1]
    for name in [name for name in sets if name.startswith("train")]:
        color = torch.from_numpy(metrics.flat_color(sets[name]))  # (3,)
        sets[name.replace("train", "flat")] = [color[:, None, None].expand_as(sets[name][0])]
    return sets


def measure_swd(direction: str, sets: dict) -> dict[str, dict[str, float]]:
    """Return the sliced Wasserstein distance (lib/metrics.py) to the targets of the test split.

    Of the translations, of identity, of one flat color, and of the targets of the train split:
    that one (real) is as near as two sets of real pictures are.
    """
    source, target = direction[0], direction[-1]
    kinds = {"translation": f"fake_{target}", "identity": f"real_{source}"}
    kinds |= {"flat": f"flat_{target}", "real": f"train_{target}"}
    real = metrics.sample_patches(sets[f"real_{target}"])
    return {
        kind: {"swd": metrics.sliced_wasserstein(metrics.sample_patches(sets[name]), real)}
        for kind, name in kinds.items()
        if name in sets
    }


def measure_inception(ways: list, sets: dict, inception: Path | None, device) -> dict:
    """Return KID, its deviation, and FID by direction, of translation and identity to the targets.

    And source_kid, ... of the translations to the sources. Binkowski et al. 2018 and Heusel et al.
    2017, by torch-fidelity. KID is the mean over 100 random subsets, each of half the smaller set
    (1000 pictures at most): subsets as large as the set would all be the same. If they cannot be
    measured, it prints why and returns {}.
    """

    def distance(one: str, other: str, prefix: str = "") -> dict[str, float]:
        found = fidelity.calculate_metrics(
            input1=sets[one],
            input2=sets[other],
            input1_cache_name=one,
            input2_cache_name=other,
            cache_root=cache,
            kid=True,
            fid=True,
            kid_subset_size=max(2, min(1000, len(sets[one]) // 2, len(sets[other]) // 2)),
            feature_extractor_weights_path=str(inception) if inception else None,
            cuda=device.type == "cuda",
            batch_size=32,
            save_cpu_ram=True,  # that is, no loader processes, for which /dev/shm can be short
            verbose=False,
        )
        keys = {"kid": fidelity.KEY_METRIC_KID_MEAN, "kid_std": fidelity.KEY_METRIC_KID_STD}
        keys["fid"] = fidelity.KEY_METRIC_FID
        return {prefix + name: found[key] for name, key in keys.items()}

    measures, reason = {}, "they need at least two pictures of each kind"
    needed = ["real_A", "real_B", *(f"fake_{way[-1]}" for way in ways)]
    if min(len(sets.get(name, [])) for name in needed) >= 2:
        try:
            import torch_fidelity as fidelity

            with tempfile.TemporaryDirectory() as cache:  # features of a set are computed once
                for way in tqdm(ways, "KID and FID", leave=False):
                    fake, source, real = f"fake_{way[-1]}", f"real_{way[0]}", f"real_{way[-1]}"
                    found = distance(fake, real) | distance(fake, source, "source_")
                    measures[way] = {"translation": found, "identity": distance(source, real)}
            print("FID comes out too high for so few pictures, and more so the fewer: compare KID")
            return measures
        except ImportError:
            reason = "pip install torch-fidelity"
        except OSError as error:
            reason = f"Inception's weights could not be fetched ({error}); with torch-fidelity's "
            reason += f"{INCEPTION} at hand: --inception FILE"
    print(f"KID and FID are left out: {reason}")
    return {}


def measure(args: argparse.Namespace, index: dict, device: torch.device, dtype) -> dict:
    """Return all measures: by direction, then translation, identity, flat or real, then name."""
    models = args.models or args.workdir / "models"
    options = tr.read_options(models)
    root = args.dataroot or (Path(options["dataroot"]) if "dataroot" in options else None)
    channels = {"A": options.get("input_nc", 3), "B": options.get("output_nc", 3)}
    sets, measures = find_sets(root, index, options, channels), {}

    def add(way: str, found: dict[str, dict]) -> None:
        for kind, figures in found.items():
            measures[way].setdefault(kind, {}).update(figures)

    for way, rows in index.items():
        (source, target), ours = way.split("2"), {"n": len(rows)}
        measures[way] = {"translation": ours, "identity": {}}
        flat = sets.get(f"flat_{target}")
        add(way, measure_pairs(rows, (channels[source], channels[target]), flat and flat[0]))
        weights = tr.find_weights(models, f"netG_{target}2{source}", args.last)
        if weights.exists():
            ours |= cycle_error(rows, load_generator(weights, device), device, dtype)
        if f"real_{target}" in sets:
            ours["n_real"] = len(sets[f"real_{target}"])
            add(way, measure_swd(way, sets))
        if "n_pairs" in ours and "ssim" not in ours:
            print("SSIM and PSNR are left out: pip install scikit-image")
    if root and not args.no_fid:
        for way, found in measure_inception(list(index), sets, args.inception, device).items():
            add(way, found)
    return measures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what test.py wrote to outputs/.")
    group = parser.add_argument_group("input")
    group.add_argument("--dataroot", type=Path, help="folder of the real pictures (the run's)")
    tr.add_model_options(parser)
    group = parser.add_argument_group("metrics")
    group.add_argument("--inception", type=Path, metavar="FILE", help="weights for KID and FID")
    group.add_argument("--no_fid", action="store_true", help="no KID and FID (slow on a CPU)")
    devices.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print the table, write `result/metrics.json` and the report."""
    device, dtype = devices.setup(args)
    outputs, index = args.workdir / "outputs", {}
    for row in read_index(args.workdir):
        if (outputs / row.output).exists() and not row.output.endswith(formats.STACKED):
            row = row._replace(output=str(outputs / row.output))
            index.setdefault(row.direction, []).append(row)
    if not index:
        raise UserError(
            f"there are no translated pictures in {outputs} (volumes, rasters and films are not "
            "measured): run `python test.py` first"
        )
    if args.inception:
        if not args.inception.is_file():
            raise UserError(f"there is no --inception {args.inception}: name the file {INCEPTION}")
        weights = utils.load_tensors(args.inception)  # refuses code, which torch-fidelity would run
        if np.shape(weights.get("fc.weight")) != (1008, 2048):  # torchvision's has 1000
            raise UserError(f"--inception {args.inception} is not torch-fidelity's {INCEPTION}")
    with utils.explain_out_of_memory("end what else uses it, or give --device cpu"):
        measures = measure(args, index, device, dtype)
    path = utils.make_folder(args.workdir / "result") / "metrics.json"
    utils.save_json(path, measures)
    for table in format_measures(measures).values():
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for name, *cells in table:
            right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            print(name.ljust(widths[0]), *right, sep="  ")
        print()
    print(f"report: {write_report(args.workdir)}")


if __name__ == "__main__":
    utils.run(main, parse_args())
