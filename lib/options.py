"""The options of train.py: presets, one line for each option, and which values are refused."""

import argparse
import math
import os
import sys
from pathlib import Path

from lib import devices
from utils import UserError

# photographs on two CPU cores in about ten minutes; explicit options override every preset
KEEP_SOURCE = {"lambda_cyc": 3.0, "lambda_id": 0.0}
QUICK = {"size": 128, "load_size": 172, "ngf": 32, "ndf": 32, "n_residual_blocks": 6}
QUICK |= {"upsample": "nearest", "norm": "channel", "keep_source": True, **KEEP_SOURCE}
QUICK |= {"netD": "n_layers", "n_layers_D": 2}  # 34x34 of 128x128: the paper's 70x70 of 256x256
QUICK |= {"n_epochs": None, "refine_epochs": None, "half_size": 0.8}
QUICK_ITERATIONS = {"n_epochs": 1350, "refine_epochs": 600}  # what None stands for

# small enough for two CPU cores with bf16 and six minutes
DEMO = {"size": 64, "load_size": 72, "ngf": 32, "ndf": 32, "n_residual_blocks": 1}
DEMO |= {"upsample": "nearest", "keep_source": True, "netD": "n_layers", "n_layers_D": 2}
DEMO |= {"lambda_cyc": 20.0, "detach_cycle": True, "lambda_id": 3.0, "ema": 0.99}
DEMO |= {"n_epochs": 50, "half_size": 0.92, "batch_size": 4, "lr": 4e-4, "beta2": 0.99}
DEMO |= {"id_every": 8, "sample_every": 300}

# what the paper does (section 4 and appendix 7.1) and the defaults or presets do not
CLASSIC = {"batch_size": 1, "lr": 2e-4, "beta2": 0.999, "half_size": 0.0, "ema": 0.0}
CLASSIC |= {"lambda_cyc": 10.0, "detach_cycle": False, "lambda_id": 5.0, "id_every": 1}
CLASSIC |= {"keep_source": False, "upsample": "deconv", "norm": "instance", "netD": "basic"}
CLASSIC |= {"refine_epochs": 0}

# what a resume cannot change: the saved weights would not fit, or would mean something else
FIXED = "netG n_residual_blocks ngf upsample norm dropout netD n_layers_D ndf input_nc output_nc "
FIXED += "direction keep_source range_A range_B axis"

RANGES = {  # low <= value < high
    "n_epochs batch_size accumulate size load_size ngf ndf n_residual_blocks n_layers_D input_nc "
    "output_nc log_every sample_every id_every n_val": (1, math.inf),
    "workers pool_size eval_every refine_epochs decay_epoch seed save_minutes lr lambda_cyc "
    "lambda_A lambda_B lambda_id lambda_keep lambda_views_A2B lambda_views_B2A "
    "init_gain": (0, math.inf),
    "augment_D augment_cycle ema beta1 beta2 half_size": (0, 1),
}


def add(group, names: str, default, text: str, choices: str = "", **more) -> None:
    """Add an option whose type is that of its default; False makes a flag."""
    if default is False:
        more["action"] = "store_true"
    else:
        more.setdefault("type", type(default))
    if default is not None and default is not False:
        text += f" ({default})"
    if choices:
        more["choices"] = [more["type"](choice) for choice in choices.split()]
    elif more.get("type") in (int, float):
        more.setdefault("metavar", "N" if more["type"] is int else "X")
    group.add_argument(*names.split(), default=default, help=text, **more)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python train.py --dataroot FOLDER [options]",
        description="Train CycleGAN on two folders of unpaired pictures.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=31, width=110),
    )
    g = parser.add_argument_group("run")
    add(g, "--dataroot", Path("dataset/apple2orange"), "folder with trainA, trainB, testA, testB")
    add(g, "--demo", False, "draw a small set of pictures if need be, and train on it in minutes")
    add(g, "--quick", False, "own photographs in minutes: 128x128, narrow, --keep_source")
    add(g, "--classic", False, "the paper's recipe: batch 1, no averages, lambda_cyc 10, ...")
    add(g, "--workdir", Path("."), "where models/, images/, logs/, outputs/, result/ go")
    exclusive = g.add_mutually_exclusive_group()
    text = "go on with the run in --workdir; auto: start one if there is none"
    auto = {"nargs": "?", "const": True, "choices": ["auto"]}
    exclusive.add_argument("--resume", default=False, help=text, **auto)
    add(exclusive, "--restart", False, "overwrite the run in --workdir")
    paths = {"type": str, "nargs": "+", "metavar": "PATH"}
    add(g, "--init_from", None, "folder, or files, of weights to start from", **paths)
    add(g, "--seed", 0, "of weights, order and crops")
    add(g, "--save_minutes", 10.0, "save this often within an epoch too")
    add(g, "--log_every", 50, "iterations between rows of logs/losses.csv")
    add(g, "--sample_every", 100, "iterations between images/latest.png")
    add(g, "--eval_every", 0, "epochs between measurements that choose models/best/; 0: never")
    add(g, "--n_val", 16, "pictures of each domain set aside for them if there is no valA, valB")
    add(g, "--no_tensorboard", False, "write no TensorBoard files")

    g = parser.add_argument_group("schedule")
    add(g, "--n_epochs", 200, "epochs of training")
    add(g, "--refine_epochs", 0, "epochs more: the same translations in other light; for photos")
    add(g, "--decay_epoch", None, "lr falls from here on; step: every so many (half)", type=int)
    add(g, "--lr_policy", "linear", "how the learning rate falls", "linear step cosine constant")
    add(g, "--lr", 2e-4, "learning rate of Adam")
    add(g, "--beta1", 0.5, "first momentum of Adam")
    add(g, "--beta2", 0.999, "second; 0.99 adapts sooner, for short runs")
    add(g, "--batch_size --batchSize", 1, "pictures of each domain at a time")
    add(g, "--accumulate", 1, "batches whose gradients are averaged for one iteration")

    g = parser.add_argument_group("objective")
    add(g, "--gan_mode", "lsgan", "adversarial loss", "lsgan vanilla hinge l1")
    add(g, "--lambda_cyc", 10.0, "weight of the cycle loss")
    add(g, "--lambda_A", None, "the same for A -> B -> A alone (lambda_cyc)", type=float)
    add(g, "--lambda_B", None, "the same for B -> A -> B alone (lambda_cyc)", type=float)
    add(g, "--detach_cycle", False, "the cycle loss trains the second of its two generators alone")
    add(g, "--lambda_id", 5.0, "weight of the identity loss; 0: not computed")
    add(g, "--id_every", 1, "identity loss every K-th iteration, with K times the weight")
    add(g, "--lambda_keep", 0.0, "weight of keeping what --init_from's generators keep; 10: photos")
    add(g, "--augment_D", 0.0, "chance that D sees a picture warped; 0.7: long runs, few pictures")
    add(g, "--augment_cycle", 0.0, "strength of noise before the way back; 0.2: maps")
    add(g, "--lambda_views_A2B", 0.0, "weight of A -> B's distance from a mean of views; 100: maps")
    add(g, "--lambda_views_B2A", 0.0, "the same for B -> A")
    add(g, "--pool_size", 50, "fakes kept for each discriminator; 0: none")
    add(g, "--ema", 0.998, "moving average of the generators' weights; 0: none")

    g = parser.add_argument_group("pictures")
    ways = "resize_and_crop crop scale_width scale_width_and_crop none"
    add(g, "--preprocess", "resize_and_crop", "how a picture is brought to size", ways)
    add(g, "--load_size", 286, "what it is resized to")
    add(g, "--size --crop_size", 256, "what is cropped from it")
    add(g, "--half_size", 0.0, "share of the run, its first, that trains at half of size")
    add(g, "--no_flip", False, "no random horizontal flips")
    add(g, "--direction", "AtoB", "BtoA swaps the two folders", "AtoB BtoA")
    add(g, "--input_nc", 3, "channels of A: 1 gray (8 or 16 bits), 3 RGB, n from .npy files")
    add(g, "--output_nc", 3, "channels of B")
    units = {"type": float, "nargs": 2, "metavar": ("LO", "HI")}
    add(g, "--range_A", None, "values of A that become -1 and 1 (those of the type)", **units)
    add(g, "--range_B", None, "values of B", **units)
    add(g, "--axis", -1, "of volumes, across the slices", "-1 0 1 2")
    add(g, "--cache", "auto", "decoded pictures in memory", "auto on off")
    workers = min(4, os.cpu_count() or 1)
    add(g, "--workers --n_cpu", workers, "processes that decode what is not in memory")

    g = parser.add_argument_group("networks")
    generators = "resnet_9blocks resnet_6blocks unet_256 unet_128"
    add(g, "--netG", "resnet_9blocks", "generator", generators)
    add(g, "--n_residual_blocks", None, "instead of the 9 or 6 that --netG says", type=int)
    add(g, "--ngf", 64, "width of the generators")
    add(g, "--upsample", "deconv", "nearest: no checkerboards", "deconv nearest")
    text = "change the source instead of replacing it; with --lambda_cyc 3 --lambda_id 0"
    add(g, "--keep_source", False, text)
    add(g, "--dropout", False, "dropout in the generators' middle layers")
    add(g, "--netD", "basic", "basic: 70x70 PatchGAN", "basic n_layers pixel strided")
    add(g, "--n_layers_D", 3, "stride-2 layers of --netD n_layers")
    add(g, "--ndf", 64, "width of the discriminators")
    text = "normalization; channel keeps colors, mixed draws new ones (generators alone)"
    add(g, "--norm", "instance", text, "instance batch channel mixed none")
    inits = "normal xavier kaiming orthogonal"
    add(g, "--init_type", "normal", "distribution of the first weights", inits)
    add(g, "--init_gain", 0.02, "their scale")

    g = devices.add_device_options(parser)
    add(g, "--compile", False, "torch.compile the networks: minutes once, then faster on a GPU")
    return parser


def parse_args(argv: list[str] | None = None, saved: dict | None = None) -> argparse.Namespace:
    """The explicit options, and for the others those of presets, of a `saved` run, or defaults."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    if saved:  # by an older version, it may lack an option that a preset has
        presets = [(True, saved)]
    else:
        presets = [
            (args.keep_source, KEEP_SOURCE),
            (args.quick, QUICK),
            (args.demo, {**DEMO, "dataroot": args.workdir / "dataset" / "demo"}),
        ]
    presets += [(args.classic, CLASSIC)]
    for chosen, preset in presets:  # a later one overrides an earlier one
        if chosen:
            parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    here = ("workdir", "resume", "restart")  # not of the run, but of this call
    options = {name: value for name, value in vars(args).items() if name not in here}
    args.options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    args.argv = argv
    args.lambda_A = args.lambda_cyc if args.lambda_A is None else args.lambda_A
    args.lambda_B = args.lambda_cyc if args.lambda_B is None else args.lambda_B
    return args


def check_options(args: argparse.Namespace) -> None:
    """Raise a UserError if an option is out of range or contradicts another."""
    for names, (low, high) in RANGES.items():
        for name in names.split():
            value = vars(args)[name]
            if value is not None and not low <= value < high:
                below = "" if high == math.inf else f" and below {high}"
                raise UserError(f"--{name} is {value}, but must be at least {low}{below}")
    for name in ("range_A", "range_B"):
        limits = vars(args)[name]
        if limits and not limits[0] < limits[1]:
            raise UserError(f"--{name} {limits}: LO must be below HI")
    if args.lr_policy == "linear" and args.decay_epoch >= args.n_epochs:
        raise UserError(
            f"--decay_epoch {args.decay_epoch} must be below --n_epochs {args.n_epochs}"
        )
    size, channels = args.size, (args.input_nc, args.output_nc)
    if args.preprocess.endswith("_and_crop") and size > args.load_size:
        raise UserError(f"--size {size} must be at most --load_size, which is {args.load_size}")
    multiple = {"unet_256": 256, "unet_128": 128}.get(args.netG, 4)
    least = {"basic": 24, "pixel": 16, "strided": 32}  # so that the last normed map is not 1x1
    least = least.get(args.netD, max(16, 3 * 2**args.n_layers_D))
    scale = 2 if args.half_size else 1
    if size % (scale * multiple) or size < scale * least:
        raise UserError(
            f"--size is {size}, but --netG {args.netG} needs a multiple of {multiple} and "
            f"--netD {args.netD} at least {least}" + ", twice that with --half_size" * (scale - 1)
        )
    if args.preprocess in ("none", "scale_width"):  # pictures of different sizes
        if args.batch_size > 1 or args.half_size:
            raise UserError(
                f"--preprocess {args.preprocess} leaves pictures of different sizes, which do not "
                "go into one batch: use --batch_size 1 (and --accumulate), --half_size 0"
            )
        if multiple > 4:
            raise UserError(
                f"--preprocess {args.preprocess} leaves sizes that --netG {args.netG} cannot "
                f"halve: use --preprocess crop with --size {multiple}"
            )
    if args.keep_source and (multiple > 4 or channels[0] != channels[1]):
        raise UserError("--keep_source needs a ResNet generator and equal --input_nc, --output_nc")
    if args.lambda_keep > 0 and channels[0] != channels[1]:
        raise UserError("--lambda_keep needs equal --input_nc and --output_nc")
    if args.refine_epochs > 0 and channels != (3, 3):
        raise UserError("--refine_epochs needs RGB pictures: --input_nc 3 --output_nc 3")
    if args.norm == "mixed" and multiple > 4:
        raise UserError("--norm mixed needs a ResNet generator")
    if args.lambda_id > 0 and channels[0] != channels[1]:
        raise UserError(
            f"the identity loss needs equal channels, but --input_nc is {channels[0]} and "
            f"--output_nc {channels[1]}: add --lambda_id 0"
        )
    if (args.lambda_views_A2B or args.lambda_views_B2A) and not args.ema:
        raise UserError("--lambda_views_A2B and --lambda_views_B2A need an average: --ema 0.998")


def check_saved(args: argparse.Namespace, saved: dict) -> None:
    """Print which options differ from the saved run's; UserError where its weights forbid it."""
    for name, old in saved.items():
        new = args.options.get(name)
        if new != old and name in FIXED.split():
            raise UserError(
                f"--{name} is {old} in the run in {args.workdir} and cannot become {new}: its "
                "weights would not fit; start another run in another --workdir"
            )
        if new != old:
            print(f"--{name} is now {new} (the run had {old})")
