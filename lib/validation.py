"""Measure generators during training, on pictures that they have not seen."""

from pathlib import Path

import numpy as np

import datasets
from lib import metrics
from lib import translation as tr
from utils import UserError


def find_pictures(dataroot: Path, options: dict) -> dict[str, list[tuple[Path, Path | None]]]:
    """Return for A2B and B2A the pictures to choose weights by, each with its ground truth or None.

    They are the val split's, or the test split's where there is none.
    """
    try:
        folders = {domain: tr.find_split(dataroot, "val", domain, options) for domain in "AB"}
    except UserError:
        folders = {domain: tr.find_split(dataroot, "test", domain, options) for domain in "AB"}
    pairs = {}
    for direction in ("A2B", "B2A"):
        source, target = folders[direction[0]], folders[direction[-1]]
        pairs[direction] = [
            (source / name, Path(truth) if truth else None)
            for name, truth in tr.find_pairs(source, target)
        ]
    return pairs


def measure(
    nets: dict, pairs: dict[str, list], options: dict, device, dtype
) -> tuple[dict[str, float], float]:
    """Measure generators during training; returns the measures and their score (lower is better).

    `nets` are netG_A2B and netG_B2A; `pairs` holds for A2B and B2A files that they have not seen,
    each with its ground truth or None; `options` are the run's. The score is the mean absolute
    error against the ground truth where that is known, else the cycle error; both of 255.
    """
    measures, scores = {}, []
    training = [net for net in nets.values() if net.training]
    for net in training:
        net.eval()
    for direction, files in pairs.items():
        net, back = nets[f"netG_{direction}"], nets[f"netG_{direction[::-1]}"]
        limits, target_limits = tr.find_ranges(options, direction)
        load = lambda path, channels=net.input_nc, limits=limits: tr.prepare(
            path, channels, options, None, limits
        )
        sums, cycle = np.zeros((2, 2, 2)), []
        sources = [source for source, _ in files]
        for i, source, fake in tr.translate_files(net, sources, load, 1, device, dtype):
            if fake is not None:
                (rec,) = tr.translate_batch(back, [fake], device, dtype)
                difference = datasets.to_tensor(rec) - datasets.to_tensor(source)
                cycle.append(float(difference.abs().mean()) * 127.5)
                truth = tr.load_truth(files[i][1], fake, target_limits) if files[i][1] else None
                if truth is not None:
                    sums += [metrics.error_sums(p, source, truth) for p in (fake, source)]
        found, identity = map(metrics.masked_errors, sums)
        found |= {f"identity_{name}": value for name, value in identity.items()}
        found["cycle"] = float(np.mean(cycle)) if cycle else float("nan")
        measures |= {f"{name}_{direction}": value for name, value in found.items()}
        scores.append(found.get("mae", found["cycle"]))
    for net in training:
        net.train()
    return measures, sum(scores) / len(scores)
