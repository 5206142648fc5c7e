"""The networks of CycleGAN, and reading one back from any published checkpoint.

Pictures are (N, C, H, W) tensors in [-1, 1]. Every network keeps its layers in `model`, numbered so
that the parameter names are those of published checkpoints ("model.1.weight", ...).
"""

import re
from pathlib import Path

import torch
from torch import nn

from utils import UserError, load_tensors, memory_layout

# ------------------------------------------------------------------------------------------------
# Small parts


def norm_layer(norm: str, channels: int) -> nn.Module:
    """instance (the paper's: no affine, no running statistics), batch, or none."""
    if norm == "instance":
        return nn.InstanceNorm2d(channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def init_weights(net: nn.Module, init_type: str = "normal", init_gain: float = 0.02) -> nn.Module:
    """Initialize all weights; normal with deviation 0.02 is the paper's (section 7.1)."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            if init_type == "normal":
                nn.init.normal_(layer.weight, 0.0, init_gain)
            elif init_type == "xavier":
                nn.init.xavier_normal_(layer.weight, init_gain)
            elif init_type == "kaiming":
                nn.init.kaiming_normal_(layer.weight)
            else:
                nn.init.orthogonal_(layer.weight, init_gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, init_gain)
            nn.init.zeros_(layer.bias)
    return net


# ------------------------------------------------------------------------------------------------
# Generators


class ResidualBlock(nn.Module):
    """x + two padded 3x3 convolutions of x; no ReLU after the sum (paper section 7.2)."""

    def __init__(self, channels: int, norm: str, dropout: bool, bias: bool):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            norm_layer(norm, channels),
            nn.ReLU(),
            *([nn.Dropout(0.5)] if dropout else []),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            norm_layer(norm, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_block(x)  # (N, C, H, W)


class Clamp(torch.autograd.Function):
    """x clamped to [-1, 1]; outside, a gradient passes if it leads back into the range."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * (((x <= 1) | (grad > 0)) & ((x >= -1) | (grad < 0)))


class Generator(nn.Module):
    """The paper's ResNet generator (section 7.2, after Johnson et al. 2016).

    (N, input_nc, H, W) in [-1, 1] -> (N, output_nc, H, W) in [-1, 1]; H and W multiples of 4.
    c7s1-ngf, two stride-2 convolutions, residual blocks, two upsamplings, c7s1-output_nc, tanh.

    With `keep_source` the last convolution has two channels more, and `output` changes the input
    instead of replacing it: what need not change stays, which instance norm would not allow.
    """

    multiple = 4  # H and W must be multiples of it

    def __init__(
        self,
        input_nc: int = 3,
        output_nc: int = 3,
        ngf: int = 64,
        n_residual_blocks: int = 9,
        norm: str = "instance",
        upsample: str = "deconv",
        dropout: bool = False,
        keep_source: bool = False,
    ):
        super().__init__()
        self.input_nc, self.output_nc = input_nc, output_nc
        # its name in the file says which form the weights are for; None is not saved
        self.register_buffer("keep_source", torch.ones(()) if keep_source else None)
        bias = norm == "instance"  # as published: also what tells "none" from "instance" in a file

        def normed(layer: nn.Module) -> list[nn.Module]:
            return [layer, norm_layer(norm, layer.out_channels), nn.ReLU()]

        c = ngf
        layers = [nn.ReflectionPad2d(3), *normed(nn.Conv2d(input_nc, c, 7, bias=bias))]
        for _ in range(2):
            layers += normed(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=bias))
            c *= 2
        layers += [ResidualBlock(c, norm, dropout, bias) for _ in range(n_residual_blocks)]
        for _ in range(2):
            if upsample == "nearest":
                layers += [nn.Upsample(scale_factor=2)]
                layers += normed(nn.Conv2d(c, c // 2, 3, padding=1, bias=bias))
            else:
                up = nn.ConvTranspose2d(c, c // 2, 3, 2, padding=1, output_padding=1, bias=bias)
                layers += normed(up)
            c //= 2
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(c, output_nc + 2 * keep_source, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x
        for layer in self.model[:-1]:
            z = layer(z)  # (N, ngf, H, W) ... (N, 4 ngf, H/4, W/4) ... (N, output_nc, H, W)
        return self.output(z, x)

    def output(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The translation, pixel by pixel, from the last convolution's `z` and the source `x`.

        tanh(z), or with `keep_source` clamp(x + m ((2 - k) tanh(z / (2 - k)) - k x)): the mask m
        says where to change, k how much of the source is painted over. m = k = 1 gives tanh(z);
        k = 0 a residual of up to 2, which reaches every color. (Masks: GANimation, Pumarola et al.
        2018; gradients pass the clamp where they lead back into [-1, 1].)
        """
        # under autocast z is bf16, in which tanh could not tell two neighboring grays
        z, x = z.to(self.model[1].weight.dtype), x.to(self.model[1].weight.dtype)
        if self.keep_source is None:
            return self.model[-1](z)  # (N, output_nc, H, W)
        z, m, k = z.split([self.output_nc, 1, 1], dim=1)
        m, k = m.sigmoid(), (k - 2).sigmoid()  # k begins at 0.12
        y = x + m * ((2 - k) * torch.tanh(z / (2 - k)) - k * x)
        return Clamp.apply(y) if self.training else y.clamp(-1, 1)  # (N, output_nc, H, W)


class UNetBlock(nn.Module):
    """One level of a U-Net: down, the levels below, up; joined with its input by a skip."""

    def __init__(
        self,
        outer: int,
        inner: int,
        below: nn.Module | None,
        norm: str,
        dropout: bool = False,
        input_nc: int | None = None,
    ):
        super().__init__()
        self.outermost = input_nc is not None
        bias = norm == "instance"
        down = nn.Conv2d(input_nc or outer, inner, 4, stride=2, padding=1, bias=bias)
        width = inner if below is None else 2 * inner
        up = nn.ConvTranspose2d(width, outer, 4, 2, padding=1, bias=bias or self.outermost)
        if self.outermost:
            layers = [down, below, nn.ReLU(), up, nn.Tanh()]
        elif below is None:
            layers = [nn.LeakyReLU(0.2), down, nn.ReLU(), up, norm_layer(norm, outer)]
        else:
            layers = [nn.LeakyReLU(0.2), down, norm_layer(norm, inner), below]
            layers += [nn.ReLU(), up, norm_layer(norm, outer)]
            layers += [nn.Dropout(0.5)] if dropout else []
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.outermost:
            return torch.cat([x, self.model(x)], dim=1)  # (N, 2 outer, H, W)
        for layer in self.model[:-1]:
            x = layer(x)
        return self.model[-1](x.to(self.model[0].weight.dtype))  # (N, output_nc, H, W)


class UNet(nn.Module):
    """U-Net generator (Isola et al. 2017, section 6.1.1), H and W multiples of 2 ** num_downs."""

    def __init__(
        self,
        input_nc: int = 3,
        output_nc: int = 3,
        ngf: int = 64,
        num_downs: int = 8,
        norm: str = "instance",
        dropout: bool = False,
    ):
        super().__init__()
        self.input_nc, self.output_nc, self.multiple = input_nc, output_nc, 2**num_downs
        block = UNetBlock(8 * ngf, 8 * ngf, None, norm)
        for _ in range(num_downs - 5):
            block = UNetBlock(8 * ngf, 8 * ngf, block, norm, dropout)
        for outer in (4 * ngf, 2 * ngf, ngf):
            block = UNetBlock(outer, 2 * outer, block, norm)
        self.model = UNetBlock(output_nc, ngf, block, norm, input_nc=input_nc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def make_generator(
    netG: str, input_nc: int, output_nc: int, n_residual_blocks: int | None = None, **options
) -> nn.Module:
    """The generator that `--netG` names: resnet_9blocks, resnet_6blocks, unet_256 or unet_128."""
    if netG.startswith("unet"):
        for name in ("upsample", "keep_source"):  # a U-Net has no such choices
            options.pop(name, None)
        num_downs = 8 if netG == "unet_256" else 7
        return UNet(input_nc, output_nc, num_downs=num_downs, **options)
    blocks = n_residual_blocks or (6 if netG == "resnet_6blocks" else 9)
    return Generator(input_nc, output_nc, n_residual_blocks=blocks, **options)


# ------------------------------------------------------------------------------------------------
# Discriminators


class Discriminator(nn.Module):
    """Scores of overlapping patches, (N, input_nc, H, W) -> (N, 1, h, w), no sigmoid.

    basic: the 70x70 PatchGAN of the paper (section 7.2), n_layers = 3: h = H/8 - 2.
    n_layers: the same with more or fewer stride-2 layers, so larger or smaller patches.
    pixel: 1x1 convolutions that see each pixel alone, h = H.
    strided: four stride-2 blocks and a padded 4x4 convolution, h = H/16.
    """

    def __init__(
        self,
        input_nc: int = 3,
        ndf: int = 64,
        netD: str = "basic",
        n_layers_D: int = 3,
        norm: str = "instance",
    ):
        super().__init__()
        bias = norm == "instance"

        def block(conv: nn.Conv2d) -> list[nn.Module]:
            return [conv, norm_layer(norm, conv.out_channels), nn.LeakyReLU(0.2)]

        if netD == "pixel":
            layers = [nn.Conv2d(input_nc, ndf, 1), nn.LeakyReLU(0.2)]
            layers += block(nn.Conv2d(ndf, 2 * ndf, 1, bias=bias))
            layers += [nn.Conv2d(2 * ndf, 1, 1, bias=bias)]
        else:
            strides = {"basic": [2, 2, 1], "strided": [2, 2, 2]}.get(
                netD, [2] * (n_layers_D - 1) + [1]
            )
            layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            c = ndf
            for stride in strides:
                wider = min(2 * c, 8 * ndf)
                layers += block(nn.Conv2d(c, wider, 4, stride, padding=1, bias=bias))
                c = wider
            if netD == "strided":
                layers += [nn.ZeroPad2d((1, 0, 1, 0))]
            layers += [nn.Conv2d(c, 1, 4, padding=1)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # (N, 1, h, w) in the precision of the weights: losses are not for bf16
        return self.model(x).to(self.model[0].weight.dtype)


# ------------------------------------------------------------------------------------------------
# Published weights: everything about a generator is read off the names and shapes of its weights


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
    return net.to(device, memory_format=memory_layout(torch.device(device)))


@torch.no_grad()
def translate(
    net: "nn.Module | OnnxGenerator", x: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Translate pictures of any size: (N, input_nc, H, W) in [-1, 1] -> (N, output_nc, H, W).

    The picture is padded by reflection, right and below, to what the network can halve and the
    result cropped back. `dtype` is the autocast precision, None for float32.
    """
    if net.training:  # dropout and batch statistics are for training alone
        y = translate(net.eval(), x, dtype)
        net.train()
        return y
    height, width = x.shape[2:]
    x = x[:, :, mirrored(height, net.multiple, x.device)]
    x = x[..., mirrored(width, net.multiple, x.device)]
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        return net(x)[..., :height, :width].float()


def mirrored(length: int, multiple: int, device: torch.device) -> torch.Tensor:
    """Indices that extend `length` to a multiple (8 at least) by going back and forth."""
    total = max(8, -(-length // multiple) * multiple)
    there_and_back = max(1, 2 * (length - 1))
    i = torch.arange(total, device=device) % there_and_back
    return torch.minimum(i, there_and_back - i)


def generator_from_state(content: dict) -> nn.Module:
    """Build a generator from a state_dict of any known layout.

    Known: ours and the reference repository's ResNet and U-Net (with or without dropout, whose
    layer shifts `conv_block.5` to `.6`, and with the running statistics that InstanceNorm once
    had), residual blocks named `block`, upsampling by nearest neighbor or transposed convolution,
    `module.` and `_orig_mod.` prefixes, and weights nested in another dict. Raises UserError with
    the names of the first weights that do not fit.
    """
    state = clean_state(content)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    biased = any(f"model.{name}.bias" in shapes for name in ("1", "model.0"))
    affine = any(name.endswith(".weight") for name in vectors)
    norm = "instance" if biased else "batch" if affine else "none"
    if norm == "instance":  # before PyTorch 0.4 it kept running statistics, which were never used
        unused = ("running_mean", "running_var", "num_batches_tracked")
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(unused)}
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
    net.load_state_dict({name: state[name] for name in expected})
    return net


def keep_source_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `keep_source` generator that begins with the pictures of a plain one."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("model."))
    weight, bias = state[f"model.{last}.weight"], state[f"model.{last}.bias"]
    state = {**state, "keep_source": torch.ones(())}
    state[f"model.{last}.weight"] = torch.cat([weight, weight.new_zeros(2, *weight.shape[1:])])
    state[f"model.{last}.bias"] = torch.cat([bias, torch.tensor([7.0, 9.0])])  # m and k near 1
    return state


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
