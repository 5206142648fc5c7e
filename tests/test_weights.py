"""Published weights: each layout is built here plainly, saved as its repo does, and used.

The networks below are written from the published layouts (names and order of layers), apart from
models.py: what they compute is what `test.py --weights` has to give.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import datasets
import models
import test as test_script
import utils
from lib import weights

# ------------------------------------------------------------------------------------------------
# The published networks


class Net(nn.Module):
    """Layers under `model`, as all of them have."""

    def __init__(self, *layers):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


class Residual(nn.Module):
    """x + layers(x), with the layers under the attribute that the repo chose."""

    def __init__(self, attribute, *layers):
        super().__init__()
        self.attribute = attribute
        self.add_module(attribute, nn.Sequential(*layers))

    def forward(self, x):
        return x + self.get_submodule(self.attribute)(x)


class Skip(Net):
    """A level of the reference repo's U-Net: its input beside what its layers make of it."""

    def forward(self, x):
        return torch.cat([x, self.model(x)], 1)


NORMS = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d, "none": lambda c: nn.Identity()}
NORMS["channel"] = lambda c: models.ChannelNorm(c, eps=1e-3)


def resnet(
    blocks=9,
    norm="instance",
    ngf=16,
    input_nc=3,
    output_nc=3,
    dropout=False,
    nearest=False,
    attribute="conv_block",
):
    """The reference repo's (and with `attribute` and `nearest` the tutorials') ResNet generator."""
    bias, normed = norm == "instance", NORMS[norm]
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(input_nc, ngf, 7, bias=bias), normed(ngf)]
    layers += [nn.ReLU(True)]
    for c in (ngf, 2 * ngf):
        layers += [nn.Conv2d(c, 2 * c, 3, 2, 1, bias=bias), normed(2 * c), nn.ReLU(True)]
    c = 4 * ngf
    for _ in range(blocks):
        half = [nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3, bias=bias), normed(c)]
        other = [nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3, bias=bias), normed(c)]
        middle = [nn.ReLU(True), nn.Dropout(0.5)] if dropout else [nn.ReLU(True)]
        layers += [Residual(attribute, *half, *middle, *other)]
    for c in (4 * ngf, 2 * ngf):
        if nearest:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c // 2, 3, padding=1, bias=bias)]
        else:
            layers += [nn.ConvTranspose2d(c, c // 2, 3, 2, 1, output_padding=1, bias=bias)]
        layers += [normed(c // 2), nn.ReLU(True)]
    return Net(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, output_nc, 7), nn.Tanh())


def unet(num_downs, norm="instance", ngf=8, input_nc=3, output_nc=3, dropout=False):
    """The reference repo's unet_256 (8 levels) and unet_128 (7), from the innermost level out."""
    bias, normed = norm == "instance", NORMS[norm]

    def down(a, b):
        return nn.Conv2d(a, b, 4, 2, 1, bias=bias)

    def up(a, b):
        return nn.ConvTranspose2d(a, b, 4, 2, 1, bias=bias)

    c = 8 * ngf
    net = Skip(nn.LeakyReLU(0.2, True), down(c, c), nn.ReLU(True), up(c, c), normed(c))
    widths = [8 * ngf] * (num_downs - 5) + [4 * ngf, 2 * ngf, ngf]
    for i, outer in enumerate(widths):
        inner = 8 * ngf if i < num_downs - 5 else 2 * outer
        layers = [nn.LeakyReLU(0.2, True), down(outer, inner), normed(inner), net, nn.ReLU(True)]
        layers += [up(2 * inner, outer), normed(outer)]
        layers += [nn.Dropout(0.5)] if dropout and i < num_downs - 5 else []
        net = Skip(*layers)
    last = nn.ConvTranspose2d(2 * ngf, output_nc, 4, 2, 1)
    whole = Net()
    whole.model = Net(down(input_nc, ngf), net, nn.ReLU(True), last, nn.Tanh())
    return whole


def filled(net, seed=0):
    """Weights and statistics that make every layer matter, in eval mode."""
    torch.manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, 0.3)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, 0, 0.1)
        elif isinstance(layer, nn.BatchNorm2d | models.ChannelNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net.eval()


# ------------------------------------------------------------------------------------------------
# What is asked of each


def write_picture(path, width, height, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None]  # (1, C, H, W)


def run_test(workdir, weights, picture):
    typed = ["--weights", weights, "--input", picture, "--workdir", workdir, "--amp", "off"]
    return test_script.main(test_script.parse_args([*map(str, typed), "--device", "cpu"]))


@torch.no_grad()
def check(folder, net, content, name="latest_net_G_A.pth", size=(64, 64), channels=3, **saving):
    """`content`, saved as a file, translates as `net` does: the tensor and the PNG of test.py."""
    torch.save(content, folder / name, **saving)
    x = write_picture(folder / "photo.png", *size, channels)
    width, height = size
    across, down = (-(-side // net_multiple(net)) * net_multiple(net) for side in size)
    pads = (0, 0), (0, 0), (0, max(8, down) - height), (0, max(8, across) - width)
    expected = net(torch.from_numpy(np.pad(x.numpy(), pads, "reflect")))[..., :height, :width]
    assert expected.std() > 0.05, "an even picture would prove nothing"

    got = models.translate(weights.load_generator(folder / name), x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4

    assert run_test(folder, folder / name, folder / "photo.png") == 0
    wanted = ((expected[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    written = np.array(Image.open(folder / "outputs" / "B" / "photo.png")).astype(float)
    assert np.abs(written.reshape(wanted.shape) - wanted).max() <= 1


def net_multiple(net):
    """4 for a ResNet; 2 to the number of levels for a U-Net."""
    levels = sum(isinstance(layer, Skip) for layer in net.modules())
    return 2 ** (levels + 1) if levels else 4  # the outermost level has no skip


# ------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("blocks", [9, 6])
def test_reference_resnet(tmp_path, blocks, norm, dropout):
    net = filled(resnet(blocks, norm, dropout=dropout))
    state = net.state_dict()
    second = "model.10.conv_block.6.weight" if dropout else "model.10.conv_block.5.weight"
    assert state[second].shape == (64, 64, 3, 3)  # the published names, or the test is no test
    assert ("model.1.bias" in state) == (norm == "instance")
    check(tmp_path, net, state)


@pytest.mark.parametrize("make", [resnet, lambda norm: unet(7, norm)])
def test_channel_norm(tmp_path, make):
    """With it the first convolution of a ResNet had no bias until 2026-12-02."""
    net = filled(make(norm="channel"))
    check(tmp_path, net, net.state_dict(), size=(128, 128))


def test_full_width(tmp_path):
    net = filled(resnet(ngf=64))
    assert sum(p.numel() for p in net.parameters()) == 11_378_179  # the published size
    check(tmp_path, net, net.state_dict())


@pytest.mark.parametrize("tracked", [False, True])
def test_model_zoo_with_running_statistics(tmp_path, tracked):
    """Before PyTorch 0.4 InstanceNorm saved statistics that it never used (0.4 counted them)."""
    net = filled(resnet(9))
    state = net.state_dict()
    for name, layer in net.named_modules():
        if isinstance(layer, nn.InstanceNorm2d):
            channels = state[f"{name.rpartition('.')[0]}.{int(name.split('.')[-1]) - 1}.bias"]
            state[f"{name}.running_mean"] = torch.randn(len(channels))
            state[f"{name}.running_var"] = torch.rand(len(channels))
            if tracked:
                state[f"{name}.num_batches_tracked"] = torch.tensor(7)
    assert {"model.2.running_mean", "model.10.conv_block.2.running_var"} <= state.keys()
    old = {"_use_new_zipfile_serialization": False}  # their file format too
    check(tmp_path, net, state, "horse2zebra.pth", **old)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("num_downs", [7, 8])
def test_reference_unet(tmp_path, num_downs, norm, dropout):
    net = filled(unet(num_downs, norm, dropout=dropout))
    names = list(net.state_dict())
    assert names[0] == "model.model.0.weight"
    innermost = "model.model.1" + ".model.3" * (num_downs - 2) + ".model.1.weight"
    assert innermost in names and "model.model.3.bias" in names
    side = 2**num_downs
    check(tmp_path, net, net.state_dict(), "latest_net_G.pth", (side, side))


def test_classic_flat_script(tmp_path):
    net = filled(resnet(9, ngf=16))
    check(tmp_path, net, net.state_dict(), "netG_A2B.pth")


def test_tutorial_with_block_and_nearest(tmp_path):
    net = filled(resnet(9, nearest=True, attribute="block"))
    names = net.state_dict()
    convolutions = {f"model.{i}.weight" for i in (1, 4, 7, 20, 24, 28)}
    assert {"model.10.block.1.weight", "model.18.block.5.bias", *convolutions} <= names.keys()
    check(tmp_path, net, names, "G_AB_199.pth")


@pytest.mark.parametrize("attribute", ["block", "conv_block"])
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_block_names_upsampling_and_dropout_mix(tmp_path, attribute, nearest, dropout):
    net = filled(resnet(3, ngf=8, nearest=nearest, attribute=attribute, dropout=dropout))
    check(tmp_path, net, net.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "netG."])
@pytest.mark.parametrize("kind", ["resnet", "unet"])
def test_prefixes(tmp_path, prefix, kind):
    net = filled(resnet(6) if kind == "resnet" else unet(7))
    state = {prefix + name: value for name, value in net.state_dict().items()}
    check(tmp_path, net, state, size=(64, 64) if kind == "resnet" else (128, 128))


@pytest.mark.parametrize("key", ["state_dict", "model", "params_ema", "netG"])
@pytest.mark.parametrize("kind", ["resnet", "unet"])
def test_nesting(tmp_path, key, kind):
    net = filled(resnet(6) if kind == "resnet" else unet(7))
    other = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    content = {"epoch": 3, "params": other, key: net.state_dict(), "optimizer": {"state": {}}}
    check(tmp_path, net, content, size=(64, 64) if kind == "resnet" else (128, 128))


def test_nesting_and_prefix_together(tmp_path):
    net = filled(resnet(6))
    inner = {f"module.{name}": value for name, value in net.state_dict().items()}
    check(tmp_path, net, {"model": {"state_dict": inner}})


@pytest.mark.parametrize("channels", [(1, 3), (3, 1), (1, 1), (4, 3)])
@pytest.mark.parametrize("kind", ["resnet", "unet"])
def test_channels(tmp_path, channels, kind):
    options = {"input_nc": channels[0], "output_nc": channels[1]}
    net = filled(resnet(2, ngf=8, **options) if kind == "resnet" else unet(7, **options))
    side = 64 if kind == "resnet" else 128
    check(tmp_path, net, net.state_dict(), size=(side, side), channels=channels[0])


@pytest.mark.parametrize("ngf", [2, 16, 24, 32])
def test_widths(tmp_path, ngf):
    net = filled(resnet(4, ngf=ngf))
    check(tmp_path, net, net.state_dict())


@pytest.mark.parametrize("size", [(61, 47), (47, 61), (5, 3), (64, 1), (8, 12)])
def test_resnet_keeps_any_size(tmp_path, size):
    net = filled(resnet(2, ngf=8))
    check(tmp_path, net, net.state_dict(), size=size)


def test_one_pixel_keeps_its_size(tmp_path):
    """Without contrast instance norm divides rounding errors by themselves: no value is right."""
    torch.save(filled(resnet(2, ngf=8)).state_dict(), tmp_path / "a.pth")
    write_picture(tmp_path / "photo.png", 1, 1)
    assert run_test(tmp_path, tmp_path / "a.pth", tmp_path / "photo.png") == 0
    assert Image.open(tmp_path / "outputs" / "B" / "photo.png").size == (1, 1)


@pytest.mark.parametrize("size", [(61, 47), (5, 3), (130, 100)])
def test_unet_keeps_any_size(tmp_path, size):
    net = filled(unet(7))
    check(tmp_path, net, net.state_dict(), size=size)


# ------------------------------------------------------------------------------------------------
# What is refused


def changed(net, **shapes):
    """The state of `net` with some weights of another shape; None removes one."""
    state = dict(net.state_dict())
    for name, shape in shapes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    return state


REFUSED = {
    "other names": ({"encoder.0.weight": torch.zeros(2, 3, 7, 7)}, "encoder.0.weight"),
    "no weights": ({"epoch": 3}, "missing"),
    "a discriminator": (models.Discriminator(ndf=4).state_dict(), "model.0.weight"),
    "another width inside": (
        changed(resnet(2, ngf=4), model__10__conv_block__5__weight=(16, 16, 5, 5)),
        "model.10.conv_block.5.weight",
    ),
    "a layer missing": (changed(resnet(2, ngf=4), model__7__bias=None), "model.7.bias"),
    "a layer too many": (changed(resnet(2, ngf=4), attention__0__weight=(4,)), "attention.0"),
    "affine instance norm": (changed(resnet(2, ngf=4), model__2__weight=(4,)), "model.2.weight"),
    "a level missing": (
        {k: v for k, v in unet(7, ngf=2).state_dict().items() if ".1.model.3.model.5." not in k},
        "model.model.1.model.3.model.5.weight",
    ),
    "the outermost level only": (
        {k: v for k, v in unet(7, ngf=2).state_dict().items() if "model.1" not in k},
        "levels",
    ),
    "a thousand levels": (
        {**unet(7, ngf=2).state_dict(), "model." * 1000 + "weight": torch.zeros(1)},
        "999 levels",
    ),
    "a flat weight": ({"model.model.0.weight": torch.zeros(3)}, "model.model.0.weight"),
    "a flat last weight": (changed(unet(7, ngf=2), model__model__3__weight=(4,)), "model.model.0"),
    "no number": ({"model.1.weight": torch.zeros(4, 3, 7, 7), "conv_block.x": torch.zeros(1)}, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_first_names(tmp_path, capsys, case):
    content, name = REFUSED[case]
    torch.save(content, tmp_path / "odd.pth")
    write_picture(tmp_path / "photo.png", 16, 16)
    typed = ["--weights", tmp_path / "odd.pth", "--input", tmp_path / "photo.png"]
    typed = [*map(str, typed), "--workdir", str(tmp_path), "--amp", "off", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        utils.run(test_script.main, test_script.parse_args(typed))
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("error: ")
    assert "odd.pth" in told[0] and name in told[0]
    assert not list((tmp_path / "outputs").rglob("*.png"))


def test_refusal_names_what_came_and_what_was_expected(tmp_path):
    state = changed(resnet(2, ngf=4), model__10__conv_block__5__weight=(16, 16, 5, 5))
    with pytest.raises(utils.UserError) as error:
        weights.generator_from_state(state)
    assert "model.10.conv_block.5.weight (16, 16, 5, 5) for (16, 16, 3, 3)" in str(error.value)


def test_generator_tells_its_channels(tmp_path):
    torch.save(resnet(2, ngf=4, input_nc=1, output_nc=5).state_dict(), tmp_path / "a.pth")
    net = weights.load_generator(tmp_path / "a.pth")
    assert (net.input_nc, net.output_nc, net.training) == (1, 5, False)
    picture = datasets.to_tensor(np.zeros((8, 8, 1), np.uint8))[None]
    assert models.translate(net, picture).shape == (1, 5, 8, 8)
