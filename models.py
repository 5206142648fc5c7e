"""The networks of CycleGAN.

Pictures are (N, C, H, W) tensors in [-1, 1]. Every network keeps its layers in `model`, numbered so
that the parameter names are those of published checkpoints ("model.1.weight", ...).
"""

import torch
import torch.nn.functional as F
from torch import nn

# ------------------------------------------------------------------------------------------------
# Small parts


class ChannelNorm(nn.LayerNorm):
    """Normalizes over the channels of each pixel (HiFiC, Mentzer et al. 2020).

    So a picture's own colors are not lost, and no pixel depends on far ones. Contrast is, if all
    that comes before is linear: the first convolution of a generator has a bias (`init_weights`).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (N, C, H, W)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """instance (the paper's: no affine, no running statistics), batch, channel, or none."""
    if norm == "instance":
        return nn.InstanceNorm2d(channels)
    if norm == "channel":
        return ChannelNorm(channels, eps=1e-3)
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
    if isinstance(net, Generator) and isinstance(net.model[2], ChannelNorm):
        # without it dull colors are bright ones to the network: wood is an orange
        nn.init.normal_(net.model[1].bias, 0.0, 0.5)
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


class UpsampleConv(nn.Conv2d):
    """Nearest-neighbor upsampling by 2 and a padded 3x3 convolution (Odena et al. 2016), in one.

    The same function as a transposed 4x4 convolution, each of whose taps is the sum of the taps
    that see the same pixel: 4/9 of the multiplications, and no enlarged map between the two.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = F.pad(self.weight, (0, 1)) + F.pad(self.weight, (1, 0))  # (out, in, 3, 4)
        weight = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))  # (out, in, 4, 4)
        weight = weight.flip(2, 3).transpose(0, 1)  # as a transposed convolution has it
        return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)


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
    With `norm` mixed the upsamplings have channel norm, all else instance norm (layer norm after an
    encoder with instance norm: MUNIT, Huang et al. 2018): colors of large areas can be drawn.
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
        norm, up_norm = ("instance", "channel") if norm == "mixed" else (norm, norm)
        # as published: also what tells "none" from "instance" in a file
        bias, up_bias = norm == "instance", up_norm == "instance"

        def normed(layer: nn.Module, norm: str) -> list[nn.Module]:
            return [layer, norm_layer(norm, layer.out_channels), nn.ReLU()]

        c = ngf
        first = nn.Conv2d(input_nc, c, 7, bias=bias or norm == "channel")
        layers = [nn.ReflectionPad2d(3), *normed(first, norm)]
        for _ in range(2):
            layers += normed(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=bias), norm)
            c *= 2
        layers += [ResidualBlock(c, norm, dropout, bias) for _ in range(n_residual_blocks)]
        for _ in range(2):
            if upsample == "nearest":
                layers += [nn.Identity()]  # the names count nn.Upsample as a layer
                up = UpsampleConv(c, c // 2, 3, bias=up_bias)
            else:
                up = nn.ConvTranspose2d(c, c // 2, 3, 2, padding=1, output_padding=1, bias=up_bias)
            layers += normed(up, up_norm)
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
            n_layers = n_layers_D if netD == "n_layers" else 3
            layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            c = ndf
            for stride in [2] * (n_layers - 1) + [2 if netD == "strided" else 1]:
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
# Using a generator


@torch.no_grad()
def translate(net: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Translate pictures of any size: (N, input_nc, H, W) in [-1, 1] -> (N, output_nc, H, W).

    The picture is padded by reflection, right and below, to what the network can halve and the
    result cropped back. `net` may also be an exported generator (lib/weights.py). `dtype` is the
    autocast precision, None for float32.
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
