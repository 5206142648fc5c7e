"""Translate pictures with trained generators, and compare with the ground truth where it is known.

python test.py                                          the test split of the run in --workdir
python test.py --input photos/ --direction A2B          one's own pictures
python test.py --weights horse2zebra.pth --input photos/     published weights
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import datasets
import utils
from lib import devices, formats, metrics, outputs, processes, stacks, tiling
from lib import translation as tr
from lib.weights import load_generator
from utils import UserError


def find_sources(
    args, direction: str, options: dict
) -> tuple[Path, list[tuple[Path, Path | None]]]:
    """Return the folder of the pictures to translate, and each of them with its truth or None.

    Raises:
        UserError: a folder is missing or holds no picture.
    """
    if not args.input:
        root = tr.find_root(args.dataroot, options)
        source, target = (tr.find_split(root, "test", direction[i], options) for i in (0, -1))
        return source, tr.find_pairs(source, target)
    if not args.input.exists():
        raise UserError(f"there is no --input {args.input}: name a picture or a folder of them")
    if args.input.is_file():
        return args.input.parent, [(args.input, None)]
    names = datasets.list_images(args.input, datasets.EXTENSIONS + formats.FILMS)
    if not names:
        raise UserError(f"--input {args.input} holds no picture")
    return args.input, [(args.input / name, None) for name in names]


def translate_pictures(
    args, rows: list, compared: list, bar: str | None, net, back, options: dict, how: dict
) -> tuple[dict[outputs.Translation, str], np.ndarray]:
    """Write the translations of plain pictures, and comparisons of those that are in `compared`.

    `back` is the generator of the other direction, or None; `options` are the run's; for `how` see
    `tr.translate_batch`. Returns why some sources could not be read, and the sums of
    `metrics.error_sums` over the others, of fakes and sources: (2, 2, 2).
    """
    folder, paths = args.workdir / "outputs", [Path(row.source) for row in rows]
    load = lambda path: tr.prepare(path, net.input_nc, options, size=args.size)
    fakes = tr.translate_files(net, paths, load, args.batch_size, **how)
    failed, sums, saving = {}, np.zeros((2, 2, 2)), []
    with ThreadPoolExecutor(tr.WORKERS) as pool:
        for i, source, fake in tqdm(fakes, bar, len(rows), disable=bar is None):
            row = rows[i]
            if fake is None:
                failed[row] = source
                continue
            while len(saving) > 4 * tr.WORKERS:
                saving.pop(0).result()  # so that memory stays bounded, and errors are seen
            saving.append(pool.submit(formats.save_array, folder / row.output, fake))
            truth = tr.load_truth(row.truth, fake)
            if truth is not None:
                sums += [metrics.error_sums(p, source, truth) for p in (fake, source)]
            if row in compared:
                outputs.save_comparison(args.workdir / "result", row, fake, source)
                # the way back would double the hours of a large picture
                if back is not None and not tiling.pick_tile(back, [fake], how["dtype"], args.tile):
                    (rec,) = tr.translate_batch(back, [fake], **how | {"tile": 0})
                    known = [] if truth is None else [truth]
                    outputs.save_comparison(folder / "cycle", row, source, fake, rec, *known)
        for future in saving:
            future.result()
    return failed, sums


def translate_direction(
    args, direction: str, folder: Path, pairs: list, options: dict, how: dict
) -> bool:
    """Translate the pictures that `find_sources` found, on all ranks together.

    `options` are the run's; for `how` see `tr.translate_batch`. Returns whether all could be read.
    """
    rank, world_size = processes.join_processes()
    weights = args.weights or tr.find_weights(args.models, f"netG_{direction}", args.last)
    weights_back = tr.find_weights(args.models, f"netG_{direction[::-1]}", args.last)
    net, back = load_generator(weights, how["device"]), None
    if weights_back.exists() and not args.weights:
        back = load_generator(weights_back, how["device"])
    ranges = tr.find_ranges(options, direction, net)
    rows = outputs.plan(direction, folder, pairs, net.output_nc, any(ranges))
    for parent in {(args.workdir / "outputs" / row.output).parent for row in rows}:
        utils.make_folder(parent)
    in_units = {row: any(ranges) or row.output.endswith(formats.STACKED) for row in rows}
    plain = processes.share([row for row in rows if not in_units[row]])
    groups = processes.share(stacks.group_rows([row for row in rows if in_units[row]]))
    shown = rows[: args.compare], direction if rank == 0 else None
    note = f"{weights.name} (CycleGAN)"
    failed, sums = translate_pictures(args, plain, *shown, net, back, options, how)
    failed |= stacks.translate_stacks(args, groups, *shown, net, ranges, options, note, how)
    parts = [(failed, sums)] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, (failed, sums))
    failed = {row: reason for failed, _ in parts for row, reason in failed.items()}
    if rank == 0:
        translated = [row for row in rows if row not in failed]
        outputs.write_index(args.workdir, translated, [direction])
        out = args.workdir / "outputs" / direction[-1]
        print(f"{direction}: {len(translated)} of {len(rows)} pictures translated to {out}")
        found, identity = map(metrics.masked_errors, sum(sums for _, sums in parts))
        words = {"mae": "whole picture", "changed": "where they differ", "kept": "elsewhere"}
        errors = [f"{words[k]} {found[k]:.2f} (identity {identity[k]:.2f})" for k in found]
        if errors:  # a truth is known
            print(f"{direction}: error vs. ground truth, of 255: {', '.join(errors)}")
        for row, reason in failed.items():
            line = f"could not be read: {row.source}: {reason}"
            print(line.encode(errors="replace").decode())
    return not failed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Translate pictures with trained generators.")
    group = parser.add_argument_group("input")
    group.add_argument("--dataroot", type=Path, help="folder with testA and testB (the run's)")
    group.add_argument("--input", type=Path, metavar="FILE_OR_FOLDER", help="one's own pictures")
    choices = ["A2B", "B2A", "AtoB", "BtoA"]
    direction_help = "from which folder to which, one only (both; with --input: A2B)"
    group.add_argument("--direction", choices=choices, help=direction_help)
    size_help = "length of the shorter side; 0: as it is (test split: as in training, --input: 0)"
    group.add_argument("--size", type=int, help=size_help)
    group.add_argument("--batch_size", type=int, default=0, help="pictures at once (8 on a GPU)")
    group.add_argument("--compare", type=int, default=8, help="comparison pictures in result/ (8)")
    views_help = "average over views: 2, the mirror image too; 8, quarter turns too (1)"
    group.add_argument("--views", type=int, choices=[1, 2, 8], default=1, help=views_help)
    tiling.add_options(parser)
    stacks.add_options(parser)
    group = tr.add_model_options(parser)
    group.add_argument("--weights", type=Path, metavar="FILE", help="one generator: .pth or .onnx")
    devices.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Translate; returns 1 if some pictures could not be read, else 0."""
    if args.size is not None and args.size < 0:
        raise UserError(f"--size is {args.size}, but must not be negative")
    stacks.check_options(args)
    if args.max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = args.max_pixels
    rank, _ = processes.join_processes()
    device, dtype = devices.setup(args)
    args.models = args.models or args.workdir / "models"
    if not args.models.is_dir() and not args.weights:
        raise UserError(
            f"there is no folder {args.models}: train first, or name --models or --weights"
        )
    options = tr.read_options(args.weights.parent if args.weights else args.models)
    options |= {name: vars(args)[name] for name in stacks.KEPT if vars(args)[name] is not None}
    directions = ["A2B", "B2A"]
    if args.direction or args.input or args.weights:
        directions = [tr.swap((args.direction or "A2B").replace("to", "2"), options)]
    sources = {direction: find_sources(args, direction, options) for direction in directions}
    for name in ("outputs", "outputs/cycle", "result"):
        utils.make_folder(args.workdir / name)
        utils.remove_temporary_files(args.workdir / name, seconds=60)  # of runs that were killed
    if args.size is None and args.input:
        args.size = 0
    args.batch_size = args.batch_size or (8 if device.type == "cuda" else 1)
    how = {"device": device, "dtype": dtype, "tile": args.tile, "scratch": args.scratch}
    how["views"] = args.views
    how["fallback"] = args.workdir / "outputs"
    with utils.explain_out_of_memory("lower --batch_size, or give --tile 512"):
        all_read = [
            translate_direction(args, direction, *source, options, how)
            for direction, source in sources.items()
        ]
    if rank == 0:
        from tools.report import write_report

        print(f"report: {write_report(args.workdir)}")
    return 0 if all(all_read) else 1


if __name__ == "__main__":
    utils.run(main, parse_args())
