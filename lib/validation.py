"""Measure generators during training, on pictures that they have not seen."""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch

import datasets
from lib import metrics, processes
from lib import translation as tr
from lib.translation import find_pairs, find_split
from utils import UserError


def held_out(dataroot: Path, domain: str, options: dict) -> list[str]:
    """Return the names of training pictures that are set aside to choose weights by.

    With `--eval_every` and no val split: `--n_val` of them, a quarter at most, by the seed alone.
    """
    if not options["eval_every"]:
        return []
    with contextlib.suppress(UserError):
        find_split(dataroot, "val", domain, options)
        return []
    names = datasets.list_images(find_split(dataroot, "train", domain, options))
    if len(names) < 2:
        raise UserError(f"--eval_every needs two training pictures or more, but {domain} has one")
    rng = np.random.default_rng((options["seed"], ord(domain)))
    n = min(options["n_val"], max(1, len(names) // 4))
    return sorted(rng.permutation(names)[:n].tolist())


def find_split_pairs(
    dataroot: Path, split: str, options: dict
) -> dict[str, list[tuple[Path, Path | None]]]:
    """Return for A2B and B2A the pictures of a split, each with its ground truth or None."""
    folders = {domain: find_split(dataroot, split, domain, options) for domain in "AB"}
    return {way: find_pairs(folders[way[0]], folders[way[-1]]) for way in ("A2B", "B2A")}


def find_pictures(dataroot: Path, options: dict) -> dict[str, list[tuple[Path, Path | None]]]:
    """Return for A2B and B2A the pictures to choose weights by, each with its ground truth or None.

    They are the val split's, or those of `held_out` where there is none; never the test split's.
    """
    aside = {domain: held_out(dataroot, domain, options) for domain in "AB"}
    if not (aside["A"] or aside["B"]):
        return find_split_pairs(dataroot, "val", options)
    folders = {domain: find_split(dataroot, "train", domain, options) for domain in "AB"}
    return {way: [(folders[way[0]] / n, None) for n in aside[way[0]]] for way in ("A2B", "B2A")}


def measure(
    nets: dict, pairs: dict[str, list], options: dict, device, dtype
) -> tuple[dict[str, float], float]:
    """Measure generators during training; returns the measures and their score (lower is better).

    `nets` are netG_A2B and netG_B2A; `pairs` holds for A2B and B2A files that they have not seen,
    each with its ground truth or None; `options` are the run's. The score is the mean absolute
    error against the ground truth where that is known, else the SWD: the cycle error, which is 0 of
    generators that change nothing, ranks epochs badly (docs/results.md).
    """
    measures, scores = {}, []
    for direction, files in pairs.items():
        net, back = nets[f"netG_{direction}"], nets[f"netG_{direction[::-1]}"]
        ranges = tr.find_ranges(options, direction)
        load, load_target = (
            functools.partial(tr.prepare, channels=channels, options=options, limits=limits)
            for channels, limits in zip((net.input_nc, net.output_nc), ranges, strict=True)
        )
        sums, means = np.zeros((2, 2, 2)), np.zeros((2, 2))  # cycle and SWD: (sum, number)
        files, fakes, reals = processes.share(files), [], []
        sources = [source for source, _ in files]
        for i, source, fake in tr.translate_files(net, sources, load, 1, device, dtype):
            if fake is None:  # the training set reports it
                continue
            fakes.append(as_pixels(fake, options["size"]))
            (rec,) = tr.translate_batch(back, [fake], device, dtype)
            difference = datasets.to_tensor(rec) - datasets.to_tensor(source)
            means[0] += float(difference.abs().mean()) * 127.5, 1
            truth = tr.load_truth(files[i][1], fake, ranges[1])
            if truth is not None:
                sums += [metrics.error_sums(p, source, truth) for p in (fake, source)]
        for target, _ in pairs[direction[::-1]]:
            with contextlib.suppress(datasets.UnreadableImage):
                reals.append(as_pixels(load_target(target), options["size"]))
        if fakes and reals:  # SWD is over ranks, each of its share
            patches = [metrics.sample_patches(pictures) for pictures in (fakes, reals)]
            means[1] += metrics.sliced_wasserstein(*patches), 1
        sums, means = processes.sum_over_ranks(sums), processes.sum_over_ranks(means)
        found, identity = map(metrics.masked_errors, sums)
        found |= {f"identity_{name}": value for name, value in identity.items()}
        found["cycle"] = float("nan")  # if no picture can be read
        names = zip(("cycle", "swd"), means, strict=True)
        found |= {name: float(total / n) for name, (total, n) in names if n}
        measures |= {f"{name}_{direction}": value for name, value in found.items()}
        scores.append(found.get("mae", found.get("swd", found["cycle"])))
    return measures, sum(scores) / len(scores)


def as_pixels(picture: np.ndarray, size: int) -> torch.Tensor:
    """Return a picture (H, W, C) of any type as an RGB tensor (3, size, size), uint8."""
    pixels = datasets.resize(np.array(datasets.to_rgb(picture)), (size, size))
    return torch.from_numpy(pixels).permute(2, 0, 1)
