"""Score the translations that test.py wrote against the real pictures of the test split.

python -m tools.evaluate                                      the run in --workdir
python -m tools.evaluate --inception weights-inception.pth    where the weights cannot be fetched
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

import datasets
import utils
from models import load_generator
from test import Error, find_jobs, find_weights, read_options, translate_files
from tools.report import metrics_rows, write_report
from utils import UserError

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # among torch-fidelity's releases

# ------------------------------------------------------------------------------------------------
# Two pictures


def ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Structural similarity of two (H, W, C) uint8 pictures, 1 if they are the same.

    Wang et al. 2004: Gaussian window of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03; only windows that
    lie within the picture; the mean over places and channels.
    """
    a, b = (torch.from_numpy(p / 255).permute(2, 0, 1)[:, None] for p in (x, y))  # (C, 1, H, W)
    n = min(11, *x.shape[:2])
    line = torch.exp(-((torch.arange(n, dtype=a.dtype) - (n - 1) / 2) ** 2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(p: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(p, line.view(1, 1, n, 1)), line.view(1, 1, 1, n))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    likeness /= (mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)
    return float(likeness.mean())


def compare(x: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Measures of one (H, W, C) uint8 picture against the truth.

    mae in [0, 1]; psnr in dB, 100 at most (what equal pictures get); ssim; and those used for maps
    (Fu et al. 2019, GcGAN): rmse over 0 to 255, under_5 and under_10 the shares of pixels
    whose largest channel error is below 5 and 10.
    """
    error = np.abs(x.astype(np.float64) - truth)  # (H, W, C)
    mse = (error**2).mean()
    worst = error.max(axis=2)
    return {
        "mae": error.mean() / 255,
        "psnr": 10 * np.log10(1 / max(mse / 255**2, 1e-10)),
        "ssim": ssim(x, truth),
        "rmse": np.sqrt(mse),
        "under_5": (worst < 5).mean(),
        "under_10": (worst < 10).mean(),
    }


def load_rgb(path: Path, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as (H, W, 3) uint8: grey is repeated, of more channels the first three are taken.

    Raises:
        UnreadableImage: see datasets.load_image.
    """
    picture = datasets.load_image(path, channels)
    return np.array(datasets.to_rgb(datasets.resize(picture, size or picture.shape[1::-1])))


# ------------------------------------------------------------------------------------------------
# One direction


def compare_pairs(job: dict) -> dict:
    """Means over the pictures whose truth is known, of the translations and of doing nothing.

    Source and truth are resized to the translation. Besides what `compare` measures: error, the
    mean absolute error where source and truth differ, which test.py prints too.
    """
    made, nothing, error = [], [], Error()
    pairs = [i for i in job["outputs"] if i in job["truths"]]
    for i in tqdm(pairs, f"{job['direction']} pairs", leave=False):
        try:
            fake = load_rgb(job["outputs"][i], job["channels"][1])
            size = fake.shape[1::-1]
            source = load_rgb(job["folder"] / job["names"][i], job["channels"][0], size)
            truth = load_rgb(job["truth_folder"] / job["truths"][i], job["channels"][1], size)
        except datasets.UnreadableImage:
            continue  # test.py has named it
        made.append(compare(fake, truth))
        nothing.append(compare(source, truth))
        error.add(source, fake, truth)
    if not made:
        return {}
    figures = {"n_pairs": len(made)}
    for name, all in (("translation", made), ("nothing", nothing)):
        figures[name] = {key: float(np.mean([one[key] for one in all])) for key in all[0]}
    if error.sums[2]:
        figures["translation"]["error"], figures["nothing"]["error"] = error.figures()
    return figures


def cycle_error(job: dict, back, device: torch.device, dtype: torch.dtype | None) -> dict:
    """Mean absolute difference, in [0, 1], of the sources and the translations translated back."""
    indices, paths, errors = list(job["outputs"]), list(job["outputs"].values()), []
    load = lambda path: datasets.load_image(path, back.input_nc)
    done = translate_files(back, paths, load, 8 if device.type == "cuda" else 1, device, dtype)
    for k, fake, rec in tqdm(done, f"{job['direction']} cycle", len(paths), leave=False):
        try:
            path = job["folder"] / job["names"][indices[k]]
            source = datasets.load_image(path, back.output_nc)
        except datasets.UnreadableImage:
            continue
        if rec is not None:  # None: the translation itself is unreadable
            source = datasets.to_tensor(datasets.resize(source, fake.shape[1::-1]))
            errors.append(float((datasets.to_tensor(rec) - source).abs().mean()) / 2)
    return {"cycle": float(np.mean(errors))} if errors else {}


# ------------------------------------------------------------------------------------------------
# Sets of pictures: KID and FID


class Pictures(Dataset):
    """The readable pictures of a set as torch-fidelity wants them, all resized to `size`."""

    def __init__(self, paths: list[Path], channels: int):
        self.paths, self.channels, self.size = [], channels, None
        for path in paths:
            with contextlib.suppress(datasets.UnreadableImage):  # test.py has named it
                datasets.load_image(path, channels)
                self.paths.append(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        pixels = load_rgb(self.paths[i], self.channels, self.size)
        return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, height, width), uint8


def distances(sets: dict[str, Pictures], pairs: list[tuple[str, str]], **options) -> list[dict]:
    """KID with its standard deviation, and FID, of the pairs of sets that `pairs` names.

    Binkowski et al. 2018 and Heusel et al. 2017, by torch-fidelity, which gets `options`. KID is
    the mean over 100 random subsets, each of half the smaller set (1000 pictures at most): subsets
    as large as the set would all be the same, and their standard deviation 0.

    Raises:
        ImportError: torch-fidelity is not installed.
        OSError: Inception's weights cannot be fetched.
    """
    import torch_fidelity as fidelity

    found = []
    with tempfile.TemporaryDirectory() as cache:  # the features of each set are computed once
        for one, other in tqdm(pairs, "KID and FID", leave=False):
            half = min(len(sets[one]), len(sets[other])) // 2
            result = fidelity.calculate_metrics(
                input1=sets[one],
                input2=sets[other],
                input1_cache_name=one,
                input2_cache_name=other,
                cache_root=cache,
                kid=True,
                fid=True,
                kid_subset_size=max(2, min(1000, half)),
                save_cpu_ram=True,  # that is, no loader processes, for which /dev/shm can be short
                verbose=False,
                **options,
            )
            found.append(
                {
                    "kid": result[fidelity.KEY_METRIC_KID_MEAN],
                    "kid_std": result[fidelity.KEY_METRIC_KID_STD],
                    "fid": result[fidelity.KEY_METRIC_FID],
                }
            )
    return found


def compare_sets(jobs: list[dict], inception: Path | None, device: torch.device) -> dict:
    """KID and FID by direction: translations to targets and to sources, and sources to targets.

    All pictures are resized to the first translation. Gives {} after a line that says why, if
    torch-fidelity or Inception's weights are missing.

    Raises:
        UserError: `inception` is given, but holds something else.
    """
    done = [job for job in jobs if job["outputs"]]
    sets, pairs = {}, [("real_A", "real_B")]  # doing nothing: the same in both directions
    for job in jobs:
        source, target = job["direction"][0], job["direction"][-1]
        paths = [job["folder"] / name for name in job["names"]]
        sets[f"real_{source}"] = Pictures(paths, job["channels"][0])
        if job in done:
            paths = list(job["outputs"].values())
            sets[f"fake_{target}"] = Pictures(paths, job["channels"][1])
            pairs += [(f"fake_{target}", f"real_{side}") for side in (target, source)]
    options = {"cuda": device.type == "cuda", "batch_size": 32}
    options["feature_extractor_weights_path"] = str(inception) if inception else None
    left_out = "KID and FID are left out:"
    if min(map(len, sets.values())) < 2:
        print(f"{left_out} they need at least two pictures of each kind")
        return {}
    first = sets[f"fake_{done[0]['direction'][-1]}"]
    size = load_rgb(first.paths[0], first.channels).shape[1::-1]
    for pictures in sets.values():
        pictures.size = size
    try:
        nothing, *found = distances(sets, pairs, **options)
    except ImportError:
        print(f"{left_out} pip install torch-fidelity")
        return {}
    except OSError as error:
        print(
            f"{left_out} Inception's weights could not be fetched ({error}); with torch-fidelity's "
            f"{INCEPTION} at hand: --inception FILE"
        )
        return {}
    except RuntimeError as error:
        if not inception or "loading state_dict" not in str(error):
            raise
        raise UserError(
            f"--inception {inception} holds other weights than torch-fidelity's {INCEPTION}"
        ) from error
    measures = {}
    for job, to_target, to_source in zip(done, found[::2], found[1::2], strict=True):
        made = to_target | {f"source_{name}": value for name, value in to_source.items()}
        n_real = len(sets[f"real_{job['direction'][-1]}"])
        measures[job["direction"]] = {"n_real": n_real, "translation": made, "nothing": nothing}
    return measures


# ------------------------------------------------------------------------------------------------
# The script


def find_outputs(args: argparse.Namespace, options: dict) -> list[dict]:
    """test.py's jobs, each with the files in `outputs/` that it has made.

    Raises:
        UserError: there are none.
    """
    outputs = args.workdir / "outputs"
    if not any((outputs / side).is_dir() for side in "AB"):
        raise UserError(f"there are no translations in {outputs}: run `python test.py` first")
    wanted = argparse.Namespace(direction=None, input=None, dataroot=args.dataroot)
    jobs = find_jobs(wanted, options)
    channels = {"A": options.get("input_nc", 3), "B": options.get("output_nc", 3)}
    for job in jobs:
        source, target = job["direction"][0], job["direction"][-1]
        job["channels"] = (channels[source], channels[target])
        suffix = ".png" if channels[target] in (1, 3, 4) else ".npy"
        paths = [outputs / target / name for name in datasets.output_names(job["names"], suffix)]
        job["outputs"] = {i: path for i, path in enumerate(paths) if path.exists()}
    if not any(job["outputs"] for job in jobs):
        raise UserError(
            f"the translations in {outputs} are not of {jobs[0]['folder']} or "
            f"{jobs[1]['folder']}: run `python test.py` first, or name another --dataroot"
        )
    return jobs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score what test.py wrote to outputs/.")
    group = parser.add_argument_group("what")
    utils.add_workdir(group)
    group.add_argument("--dataroot", type=Path, help="folder with testA and testB (the run's)")
    group.add_argument("--models", type=Path, metavar="DIR", help="folder of weights (models/)")
    group.add_argument("--last", action="store_true", help="the last weights, not their average")
    group = parser.add_argument_group("how")
    group.add_argument("--inception", type=Path, metavar="FILE", help="weights for KID and FID")
    group.add_argument("--no_fid", action="store_true", help="no KID and FID (slow on a CPU)")
    utils.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device, dtype, _, _ = utils.setup(args)
    models = args.models or args.workdir / "models"
    jobs, metrics = find_outputs(args, read_options(models)), {}
    if args.inception:
        if not args.inception.is_file():
            raise UserError(f"there is no --inception {args.inception}: name the file {INCEPTION}")
        utils.load_tensors(args.inception)  # refuses code, which torch-fidelity would run
    with utils.explain_out_of_memory("end what else uses it, or give --device cpu"):
        for job in jobs:
            direction, n, of = job["direction"], len(job["outputs"]), len(job["names"])
            if n < of:
                print(f"{direction}: {n} of {of} pictures are translated")
            if n == 0:
                continue
            metrics[direction] = {"n": n, "translation": {}, "nothing": {}} | compare_pairs(job)
            weights = find_weights(models, f"netG_{direction[::-1]}", args.last)
            if weights.exists():
                back = load_generator(weights, device)
                metrics[direction]["translation"] |= cycle_error(job, back, device, dtype)
        measures = {} if args.no_fid else compare_sets(jobs, args.inception, device)
    for direction, found in measures.items():
        metrics[direction]["n_real"] = found["n_real"]
        for kind in ("translation", "nothing"):
            metrics[direction][kind] |= found[kind]
    path = utils.make_folder(args.workdir / "result") / "metrics.json"
    utils.save_json(path, metrics)
    rows = metrics_rows(metrics)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row[1:], widths[1:], strict=True)
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in cells), sep="  ")
    if measures:
        print("FID comes out too high for so few pictures, and more so the fewer: compare KID")
    print(f"report: {write_report(args.workdir)}")


if __name__ == "__main__":
    utils.run(main, parse_args())
