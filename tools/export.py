"""Export generators to ONNX, for onnxruntime and everything else that reads it.

python -m tools.export                                the pair of the run in --workdir
python -m tools.export --weights horse2zebra.pth      one published generator

The files take pictures of any number and size: `input` (N, C, H, W) in [-1, 1], H and W multiples
of the metadata's `multiple` and at least 8, gives `output` (N, C, H, W) in [-1, 1].
"""

import argparse
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import utils
from lib import translation as tr
from lib.weights import load_generator
from utils import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# largest accepted difference from PyTorch, of values in [-1, 1], by --fp16: float16 has eleven
# bits, and rounding errors of many layers add up
TOLERANCE = {False: 1e-3, True: 5e-2}


class Half(nn.Sequential):
    """A network that computes in float16, but takes and gives float32 like any other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.half()).float()  # (N, output_nc, H, W)


def to_onnx(net: nn.Module, fp16: bool, ranges: tuple = (None, None)) -> bytes:
    """Return a self-contained ONNX file of a generator: batch, height and width are dynamic.

    Its metadata: `value_range`, `input_channels`, `output_channels`, `input`, `output`,
    `multiple`, which H and W must be multiples of, and, where `ranges` says them, `input_range` and
    `output_range`: the values of the files (Hounsfield units and the like) that are -1 and 1.
    """
    import onnx

    m = net.multiple
    n = 2 * max(64, m)  # a U-Net halves its `multiple` to 1, which the exporter takes as fixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside of the exporter
        program = torch.onnx.export(
            Half(net.half()).eval() if fp16 else net,
            (torch.zeros(2, net.input_nc, n, n),),
            dynamo=True,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: Dim("batch"), 2: m * Dim("h"), 3: m * Dim("w")},),
            verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # stack traces, with the paths of this machine
    metadata = {"value_range": "-1..1", "multiple": str(m), "input": "input", "output": "output"}
    metadata |= {"input_channels": str(net.input_nc), "output_channels": str(net.output_nc)}
    for name, limits in zip(("input_range", "output_range"), ranges, strict=True):
        metadata |= {name: "{} {}".format(*limits)} if limits else {}
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def largest_difference(net: nn.Module, content: bytes) -> float:
    """Return how far onnxruntime is from PyTorch at most, on noise of three sizes in [-1, 1]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    m, n = net.multiple, max(64, net.multiple)  # a power of two, so n is a multiple
    for batch, height, width in ((1, n, n), (2, n, 2 * n), (1, n + 3 * m, n + m)):
        x = torch.rand(batch, net.input_nc, height, width, generator=generator) * 2 - 1
        (got,) = session.run(None, {"input": x.numpy()})
        with torch.no_grad():
            worst = max(worst, float((torch.from_numpy(got) - net(x)).abs().max()))
    return worst


def export(weights: Path, output: Path, fp16: bool, ranges: tuple = (None, None)) -> float:
    """Export one checkpoint; returns the largest difference from PyTorch.

    Raises:
        UserError: a package is missing, or it differs by too much; nothing is written then.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"export.py needs {package}: pip install {' '.join(PACKAGES)}")
    content = to_onnx(load_generator(weights), fp16, ranges)
    worst = largest_difference(load_generator(weights), content)  # Half changed the first
    if not worst <= TOLERANCE[fp16]:  # nan is not either
        raise UserError(
            f"{output} is not written: it differs from PyTorch by {worst:.1e}, more than the "
            f"{TOLERANCE[fp16]:.0e} allowed (leave out --fp16, or try another onnxruntime)"
        )
    with utils.atomic_write(output) as file:
        file.write(content)
    return worst


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export generators to ONNX.")
    group = tr.add_model_options(parser)
    group.add_argument("--weights", type=Path, metavar="FILE", help="one generator instead")
    group = parser.add_argument_group("output")
    group.add_argument("--fp16", action="store_true", help="half precision inside: half the size")
    group.add_argument("--output", type=Path, metavar="FILE", help="with --weights (beside it)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    ending = "_fp16.onnx" if args.fp16 else ".onnx"
    models = args.models or args.workdir / "models"
    if args.weights:
        jobs = {args.weights: args.output or args.weights.with_name(args.weights.stem + ending)}
    elif args.output:
        raise UserError("--output names one file: give --weights FILE too")
    else:
        names = ("netG_A2B", "netG_B2A")
        jobs = {tr.find_weights(models, n, args.last): models / (n + ending) for n in names}
        jobs = {weights: jobs[weights] for weights in jobs if weights.exists()}  # one is fine
        if not jobs:
            raise UserError(f"{models} holds no generator: train first, or name --models")
    for weights, output in jobs.items():
        if weights.suffix == ".onnx" or output.suffix != ".onnx":
            raise UserError(f"cannot export {weights} to {output}: give a .pth, and get .onnx")
        direction = "B2A" if "B2A" in weights.name else "A2B"
        ranges = tr.find_ranges(tr.read_options(weights.parent), direction)
        worst = export(weights, output, args.fp16, ranges)
        print(f"{weights} -> {output} ({worst:.0e} from PyTorch at most)")


if __name__ == "__main__":
    utils.run(main, parse_args())
