"""Weights from files: a generator of any published layout or an exported one, and `--init_from`.

Everything about a generator is read off the names and shapes of its weights.
"""

import re
from pathlib import Path

import torch
from torch import nn

from lib import devices, processes
from models import Generator, UNet
from utils import UserError, load_tensors


def load_generator(path: Path, device: torch.device | str = "cpu") -> "nn.Module | OnnxGenerator":
    """Build the generator that a checkpoint file (or .onnx file) holds, in eval mode.

    Understands the layouts named in `generator_from_state`. `net.input_nc` and `net.output_nc`
    are its channels, `net.multiple` what height and width must be a multiple of. Raises UserError
    if the file is no checkpoint, or holds no generator of a known layout.
    """
    if Path(path).suffix.lower() == ".onnx":
        return OnnxGenerator(path)
    content = load_tensors(path)
    try:
        net = generator_from_state(content).eval()
    except UserError as error:
        raise UserError(f"{path} holds no generator that is known here: {error}") from error
    return net.to(device, memory_format=devices.memory_layout(torch.device(device)))


def generator_from_state(content: dict) -> nn.Module:
    """Build a generator from a state_dict of any known layout.

    Known: ours and the reference repository's ResNet and U-Net (with or without dropout, whose
    layer shifts `conv_block.5` to `.6`, and with the running statistics that InstanceNorm once
    had), residual blocks named `block`, upsampling by nearest neighbor or transposed convolution,
    `module.` and `_orig_mod.` prefixes, and weights nested in another dict. Raises UserError with
    the names of the first weights that do not fit.
    """
    state = clean_state(content)
    biased = "model.4.bias" in state or "model.model.0.bias" in state
    affine = any(name.endswith(".weight") and value.dim() == 1 for name, value in state.items())
    counted = any(name.endswith("running_mean") for name in state)
    norm = "batch" if counted else "channel" if affine else "none"
    if biased:
        norm = "mixed" if affine else "instance"
    if norm == "channel" and "model.1.weight" in state:  # until 2026-12-02 it had no bias there
        state.setdefault("model.1.bias", torch.zeros(len(state["model.1.weight"])))
    if norm == "instance":  # before PyTorch 0.4 it kept running statistics, which were never used
        unused = ("running_mean", "running_var", "num_batches_tracked")
        state = {name: value for name, value in state.items() if not name.endswith(unused)}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    try:
        unet = "model.model.0.weight" in shapes
        net = empty_unet(shapes, norm) if unet else empty_resnet(shapes, norm)
    except (IndexError, KeyError, RuntimeError, ValueError):
        names = ", ".join(list(state)[:3]) or "missing"
        raise UserError(f"its first weights are {names}") from None
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    wrong = [
        f"{name} {shapes.get(name, 'missing')} for {expected.get(name, 'nothing')}"
        for name in {**shapes, **expected}
        if shapes.get(name) != expected.get(name)
    ]
    if wrong:
        raise UserError("these did not fit: " + ", ".join(wrong[:3]))
    net.load_state_dict(state)
    return net


def clean_state(content: dict) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under their plain names."""
    for key in ("state_dict", "model", "params_ema", "netG"):
        if isinstance(content.get(key), dict):
            return clean_state(content[key])
    state = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            name = re.sub(r"^((module|_orig_mod|netG)\.)+", "", name)
            state[re.sub(r"^(model\.\d+)\.block\.", r"\1.conv_block.", name)] = value
    return state


def empty_resnet(shapes: dict[str, tuple], norm: str) -> Generator:
    convs = {  # of the outermost Sequential, by their number
        int(name.split(".")[1]): shape
        for name, shape in shapes.items()
        if re.fullmatch(r"model\.\d+\.weight", name) and len(shape) == 4
    }
    blocks = {name.split(".")[1] for name in shapes if ".conv_block." in name}
    ngf, input_nc = convs[1][:2]
    first_up = 10 + len(blocks)  # a convolution there, or an Upsample with the convolution after it
    keep_source = "keep_source" in shapes
    return Generator(
        input_nc,
        output_nc=convs[max(convs)][0] - 2 * keep_source,
        ngf=ngf,
        n_residual_blocks=len(blocks),
        norm=norm,
        upsample="deconv" if first_up in convs else "nearest",
        dropout=len(shapes.get("model.10.conv_block.6.weight", ())) == 4,
        keep_source=keep_source,
    )


def empty_unet(shapes: dict[str, tuple], norm: str) -> UNet:
    ngf, input_nc = shapes["model.model.0.weight"][:2]
    output_nc = shapes["model.model.3.weight"][1]
    levels = max(name.count("model.") for name in shapes) - 1
    if not 5 <= levels <= 10:
        raise UserError(f"it is a U-Net of {levels} levels, and those of 5 to 10 are known")
    return UNet(input_nc, output_nc, ngf, levels, norm)


class OnnxGenerator:
    """A generator exported by tools/export.py, run by onnxruntime; called like those above."""

    training = False

    def __init__(self, path: Path):
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path} needs onnxruntime: pip install onnxruntime") from None
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}: python -m tools.export writes one")
        try:
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no public base class
            raise UserError(f"{path} is not an ONNX file that onnxruntime can run") from error
        shapes = [v.shape for v in self.session.get_inputs() + self.session.get_outputs()]
        if len(shapes) != 2 or any(len(s) != 4 or not isinstance(s[1], int) for s in shapes):
            raise UserError(f"{path} does not turn pictures into pictures: tools.export's files do")
        self.input_nc, self.output_nc = shapes[0][1], shapes[1][1]
        known = self.session.get_modelmeta().custom_metadata_map
        self.multiple = int(known.get("multiple", 4))
        ranges = (known.get(name, "").split() for name in ("input_range", "output_range"))
        self.ranges = tuple(tuple(map(float, ends)) or None for ends in ranges)  # see test.py

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (result,) = self.session.run(None, {self.session.get_inputs()[0].name: x.cpu().numpy()})
        return torch.from_numpy(result)  # (N, output_nc, H, W)


# ------------------------------------------------------------------------------------------------
# Starting from weights


def load_initial(paths: list[str], model) -> None:
    """Start a CycleGAN of train.py from the weights in a folder, or in files (`--init_from`).

    They are ours, or the reference repository's. Where a folder and files are given, the files
    come first; discriminators that are not there begin anew. Raises UserError if a generator is
    missing, weights are of another architecture than the options', or a file has another name.
    """
    known = {name for network in model.networks() for name in initial_names(network)}
    for path in map(Path, paths):
        if path.suffix == ".pth" and path.name not in known:
            raise UserError(
                f"--init_from {path}: the name tells which network it is, and is none of "
                + ", ".join(sorted(known))
            )
    for name, net in model.networks().items():
        read = lambda name=name, net=net: read_initial(paths, name, net, model.args.keep_source)
        weights = processes.on_main(read)
        if weights is not None:
            net.load_state_dict(weights)
            for copies in (model.averages, model.initial):
                if name in copies:
                    copies[name].load_state_dict(weights)


def initial_names(name: str) -> list[str]:
    """The files that network `name` may start from; the last one only if it is named itself."""
    known = {"netG_A2B": "G_A", "netG_B2A": "G_B", "netD_A": "D_B", "netD_B": "D_A"}  # D_A sees B
    average = [f"{name}_ema.pth"] if name.startswith("netG") else []
    return [f"{name}.pth", f"latest_net_{known[name]}.pth", *average]


def read_initial(paths: list[str], name: str, net, keep_source: bool) -> dict | None:
    """The weights for `net` among `paths`; None if they are a discriminator's and not there."""
    names = initial_names(name)
    files = [path for path in map(Path, paths) if path.name in names]
    inside = (Path(folder) / file for folder in paths for file in names[:2])
    files += [path for path in inside if path.exists()]
    if not files:
        if name.startswith("netD"):
            return None  # published models rarely come with their discriminators
        raise UserError(f"--init_from {' '.join(paths)} has neither {names[0]} nor {names[1]}")
    path = files[0]
    state = load_tensors(path)
    try:
        if name.startswith("netG"):
            state = generator_from_state(state).state_dict()
            if keep_source and "keep_source" not in state:
                state = keep_source_state(state)
        net.load_state_dict(state)
    except (UserError, RuntimeError) as error:
        raise UserError(
            f"the weights in {path} do not fit the networks asked for "
            f"(--netG, --ngf, --norm, ...): {str(error).splitlines()[-1].strip()}"
        ) from error
    print(f"{name} starts from {path}")
    return state


def keep_source_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `keep_source` generator that begins with the pictures of a plain one."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("model."))
    weight, bias = state[f"model.{last}.weight"], state[f"model.{last}.bias"]
    state = {**state, "keep_source": torch.ones(())}
    state[f"model.{last}.weight"] = torch.cat([weight, weight.new_zeros(2, *weight.shape[1:])])
    state[f"model.{last}.bias"] = torch.cat([bias, torch.tensor([7.0, 9.0])])  # m and k near 1
    return state
