"""Shapes, counts, names and first weights of the networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.weights import generator_from_state, keep_source_state
from models import (
    Clamp,
    Discriminator,
    Generator,
    UNet,
    UpsampleConv,
    init_weights,
    make_generator,
    translate,
)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_generator_is_the_papers():
    net = Generator()
    assert count(net) == 11_378_179
    convs = [1, 4, 7, *[f"{i}.conv_block.{j}" for i in range(10, 19) for j in (1, 5)], 19, 22, 26]
    names = [f"model.{layer}.{part}" for layer in convs for part in ("weight", "bias")]
    assert list(net.state_dict()) == names
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["model.1.weight"] == (64, 3, 7, 7)
    assert shapes["model.7.weight"] == (256, 128, 3, 3)
    assert shapes["model.19.weight"] == (256, 128, 3, 3)  # transposed: in, out
    assert shapes["model.26.weight"] == (3, 64, 7, 7)
    assert not any(layer.affine for layer in net.modules() if "InstanceNorm" in str(type(layer)))


def test_discriminator_is_the_papers():
    net = Discriminator()
    assert count(net) == 2_764_737
    layers = (0, 2, 5, 8, 11)
    assert list(net.state_dict()) == [f"model.{i}.{p}" for i in layers for p in ("weight", "bias")]
    assert [net.model[i].stride[0] for i in layers] == [2, 2, 2, 1, 1]
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
        z = x = torch.rand(2, 3, 40, 40)
        for i in layers:  # no norm on the first, slopes of 0.2, nothing on the last
            z = F.conv2d(z, net.model[i].weight, net.model[i].bias, net.model[i].stride, 1)
            z = F.instance_norm(z) if 0 < i < 11 else z
            z = F.leaky_relu(z, 0.2) if i < 11 else z
        assert torch.allclose(net(x), z, atol=1e-5)


def test_patch_is_70_pixels_wide():
    net = Discriminator(ndf=2, norm="none")
    x = torch.zeros(1, 3, 256, 256, requires_grad=True)
    init_weights(net, init_gain=1.0)
    net(x)[0, 0, 15, 15].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize(
    ("netD", "n_layers_D", "height"),
    [("basic", 3, 6), ("n_layers", 2, 14), ("n_layers", 4, 2), ("pixel", 3, 64), ("strided", 3, 4)],
)
def test_discriminator_maps(netD, n_layers_D, height):
    net = Discriminator(1, 4, netD, n_layers_D)
    assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 1, height, height)
    widths = [layer.out_channels for layer in net.model if isinstance(layer, torch.nn.Conv2d)]
    assert widths == ([4, 8, 1] if netD == "pixel" else [4, 8, 16, 32, 32][: len(widths) - 1] + [1])


def test_generator_range_and_residual():
    torch.manual_seed(0)
    net = Generator(ngf=4, n_residual_blocks=2)
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    y = net(x)
    assert y.shape == x.shape and y.abs().max() <= 1
    block = net.model[10]
    h = torch.randn(1, 16, 8, 8)
    assert torch.equal(block(h), h + block.conv_block(h))  # no ReLU after the sum
    assert (block(h) < 0).any()


def test_first_weights():
    torch.manual_seed(0)
    net = init_weights(Generator())
    weights = torch.cat([p.flatten() for n, p in net.named_parameters() if n.endswith("weight")])
    assert abs(weights.mean()) < 1e-4 and abs(weights.std() - 0.02) < 1e-4
    assert all((p == 0).all() for n, p in net.named_parameters() if n.endswith("bias"))


def test_unet_halves_eight_times():
    net = make_generator("unet_256", 3, 1, ngf=2, norm="instance", dropout=False)
    assert isinstance(net, UNet) and net.multiple == 256
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 256, 256)


@pytest.mark.parametrize("size", [(64, 64), (61, 47), (5, 3), (1, 1)])
def test_translate_any_size(size):
    torch.manual_seed(0)
    net = Generator(ngf=4, n_residual_blocks=1)
    x = torch.rand(1, 3, *size)
    y = translate(net, x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    if size == (61, 47):  # padded by reflection, right and below, and cropped back
        padded = torch.nn.functional.pad(x, (0, 1, 0, 3), mode="reflect")
        assert torch.allclose(y, net(padded)[..., :61, :47], atol=1e-6)


def test_bf16_output_is_float32():
    net = Generator(ngf=4, n_residual_blocks=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
        assert Discriminator(ndf=4)(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------
# --keep_source: the generator changes its source


def keeping(**options) -> Generator:
    torch.manual_seed(0)
    return init_weights(Generator(ngf=4, n_residual_blocks=1, keep_source=True, **options)).eval()


def set_head(net: Generator, mask: float, paint: float) -> None:
    """Fix the mask m = sigmoid(mask) and k = sigmoid(paint - 2), whatever the picture."""
    with torch.no_grad():
        net.model[-2].weight[-2:] = 0
        net.model[-2].bias[-2:] = torch.tensor([mask, paint])


def test_keep_source_formula():
    net, x = keeping(), torch.rand(2, 3, 16, 20) * 2 - 1
    with torch.no_grad():
        z = net.model[:-1](x).double().numpy()
        y = net(x)
    z, m, k = z[:, :3], 1 / (1 + np.exp(-z[:, 3:4])), 1 / (1 + np.exp(2 - z[:, 4:]))
    change = (2 - k) * np.tanh(z / (2 - k)) - k * x.double().numpy()
    expected = np.clip(x.double().numpy() + m * change, -1, 1)
    assert np.abs(y.double().numpy() - expected).max() < 1e-5
    assert np.abs(y - x).mean() > 0.01


def test_keep_source_reaches_from_the_source_to_the_paper():
    net, x = keeping(), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        set_head(net, mask=-40, paint=0)
        assert torch.equal(net(x), x)
        set_head(net, mask=40, paint=40)
        assert torch.allclose(net(x), torch.tanh(net.model[:-1](x)[:, :3]), atol=1e-6)


def test_clamp_lets_gradients_back_into_the_range():
    x = torch.tensor([-2.0, -2.0, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # a positive one lowers x
    y = Clamp.apply(x)
    y.backward(grad)
    assert y.tolist() == [-1, -1, 0.5, 0.5, 1, 1]
    assert x.grad.tolist() == [0, -1, 1, -1, 1, 0]


def test_saturated_pixels_are_trained_back_into_the_range():
    net, x = keeping().train(), torch.full((1, 3, 16, 16), 0.9)
    set_head(net, mask=40, paint=-40)  # x + 2 tanh(z / 2), far above 1
    bias = net.model[-2].bias
    bias.data[:3] = 1
    for sign in (1, -1):
        y = net(x)
        assert (y == 1).all()
        (grad,) = torch.autograd.grad(sign * y.mean(), bias)
        assert (grad[:3] > 0.1).all() if sign == 1 else not grad.any()


@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
@pytest.mark.parametrize("norm", ["instance", "batch", "mixed"])
def test_keep_source_is_read_from_the_file(upsample, norm):
    net = keeping(upsample=upsample, norm=norm, dropout=True, input_nc=2, output_nc=2)
    read, x = generator_from_state(net.state_dict()).eval(), torch.rand(1, 2, 16, 16)
    assert read.output_nc == 2 and torch.equal(read(x), net(x))
    plain = Generator(ngf=4, n_residual_blocks=1).state_dict()
    assert "keep_source" not in plain and generator_from_state(plain).keep_source is None


def test_keep_source_starts_from_published_pictures():
    torch.manual_seed(1)
    published = init_weights(Generator(ngf=4, n_residual_blocks=1)).eval()
    start = keep_source_state(published.state_dict())
    net, x = generator_from_state(start).eval(), torch.rand(1, 3, 16, 16) * 2 - 1
    assert net.keep_source is not None
    assert (net(x) - published(x)).abs().max() < 0.01


def test_upsampling_and_convolution_in_one():
    """The same as nn.Upsample and a 3x3 convolution, and so are the gradients."""
    torch.manual_seed(0)
    layer = UpsampleConv(6, 4, 3).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
    made = layer(x)
    assert made.shape == (2, 4, 10, 14)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    sources, weight = (x, layer.weight, layer.bias), torch.randn_like(made)
    gradients = (torch.autograd.grad((y * weight).sum(), sources) for y in (made, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
