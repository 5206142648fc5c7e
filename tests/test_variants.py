"""Every value of every option of the networks, losses, schedules and pictures, at work.

Each is trained with for one tiny epoch, as typed, and its checkpoint translates in test.py as the
generator in memory does; what an option computes is held against plain formulas.
"""

import copy
import json
import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import datasets
import models
import test as test_script
import train
import utils
from lib import logger, schedule, weights

CPU = torch.device("cpu")
TINY = "--ngf 4 --ndf 4 --size 32 --load_size 36 --n_epochs 1 --no_tensorboard --amp off "
TINY += "--device cpu --cache off --workers 0"


# ------------------------------------------------------------------------------------------------
# Data, one training, one round trip


def save_pixels(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


def draw_set(root, channels=(3, 3), dtype=np.uint8, n=2):
    """Dark pictures in A, bright ones in B, wider than high; n channels other than 1, 3 as .npy."""
    rng = np.random.default_rng(0)
    most = np.iinfo(dtype).max
    for side, c in zip("AB", channels, strict=True):
        for split, count in (("train", n), ("test", 2)):
            for i in range(count):
                low, high = (0, most // 2) if side == "A" else (most // 2 + 1, most)
                pixels = rng.integers(low, high, (36, 44, c), dtype, endpoint=True)
                suffix = ".png" if c in (1, 3) else ".npy"
                save_pixels(root / f"{split}{side}" / f"{side.lower()}{i}{suffix}", pixels)
    return root


@pytest.fixture(scope="session")
def rgb(tmp_path_factory):
    return draw_set(tmp_path_factory.mktemp("rgb"))


class Kept(train.CycleGAN):
    """Remembers the model that `train.main` makes, its first weights and its first batch."""

    def __init__(self, *args):
        super().__init__(*args)
        Kept.model, self.seen = self, []
        self.first = {name: copy.deepcopy(net) for name, net in self.networks().items()}

    def step(self, batches):
        self.seen += batches
        return super().step(batches)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Train as typed and give the model: `run(dataroot, "--netD pixel", workdir)`."""
    monkeypatch.setattr(train, "CycleGAN", Kept)

    def train_once(dataroot, options="", workdir=tmp_path):
        typed = f"--dataroot {dataroot} --workdir {workdir} --n_residual_blocks 1 {TINY} {options}"
        assert train.main(train.parse_args(typed.split())) == 0
        return Kept.model

    return train_once


def refused(options, words):
    with pytest.raises(utils.UserError, match=words):
        train.main(train.parse_args(f"{TINY} {options}".split()))


def as_trained(picture, args):
    """The size that test.py gives a picture of the test split, by the rule of `--preprocess`."""
    height, width = picture.shape[:2]
    size = {
        "resize_and_crop": (args.size, args.size),
        "scale_width": (args.load_size, round(height * args.load_size / width)),
        "scale_width_and_crop": (args.load_size, round(height * args.load_size / width)),
    }.get(args.preprocess, (width, height))
    return datasets.resize(picture, size)


def read(path):
    pixels = np.load(path) if path.suffix == ".npy" else np.array(Image.open(path))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def round_trip(model, workdir, nets=None, options=()):
    """What test.py writes from the checkpoints is what the generators in memory give."""
    typed = ["--workdir", str(workdir), "--amp", "off", "--device", "cpu", *options]
    assert test_script.main(test_script.parse_args(typed)) == 0
    args, nets = model.args, nets or model.best_generators()
    first, second = args.direction[0], args.direction[-1]
    for folder, name, out in ((first, "netG_A2B", "B"), (second, "netG_B2A", "A")):
        net = nets[name].eval()
        sources = sorted((args.dataroot / f"test{folder}").iterdir())
        assert len(sources) == 2
        for source in sources:
            picture = as_trained(read(source), args)
            most = np.iinfo(picture.dtype).max
            x = torch.from_numpy(picture / (most / 2) - 1).float().permute(2, 0, 1)[None]
            height, width = picture.shape[:2]
            pads = (0, 0), (0, 0), (0, -height % net.multiple), (0, -width % net.multiple)
            with torch.no_grad():
                y = net(torch.from_numpy(np.pad(x.numpy(), pads, "reflect")))
            y = y[0, :, :height, :width].permute(1, 2, 0).numpy()
            suffix = ".png" if y.shape[2] in (1, 3, 4) else ".npy"
            written = read(workdir / "outputs" / out / (source.stem + suffix))
            most = np.iinfo(written.dtype).max
            assert written.shape == y.shape
            assert written.std() > 0.01 * most, "an even picture proves nothing"
            assert np.abs(written - (y + 1) * (most / 2)).max() <= max(0.6, most * 1e-4)
    return workdir / "outputs"


# ------------------------------------------------------------------------------------------------
# One step and a round trip with each value of each option

VALUES = [
    "--netD basic --upsample deconv --norm instance --init_type normal --gan_mode lsgan "
    "--lr_policy linear --preprocess resize_and_crop --direction AtoB",
    "--netG unet_128 --size 128 --load_size 128 --ngf 2 --ndf 2",
    "--netG unet_128 --size 128 --load_size 128 --ngf 2 --ndf 2 --dropout --norm batch "
    "--init_type kaiming",
    "--netG unet_256 --size 256 --load_size 256 --ngf 2 --ndf 2",
    "--upsample nearest",
    "--netD basic --size 24",
    "--netD n_layers --n_layers_D 1 --size 16",
    "--netD n_layers --n_layers_D 2 --size 16",
    "--netD n_layers --n_layers_D 4 --size 48 --load_size 48",
    "--netD pixel --size 16",
    "--netD strided",
    "--norm batch --init_type kaiming",
    "--norm none --init_type kaiming",
    "--norm channel --keep_source --upsample nearest",
    "--norm mixed --keep_source",
    "--norm batch --init_type kaiming --netD pixel --upsample nearest",
    "--norm none --init_type kaiming --netD strided --dropout",
    "--init_type normal --init_gain 0.1",
    "--init_type xavier --init_gain 1",
    "--init_type kaiming",
    "--init_type orthogonal --init_gain 1",
    "--gan_mode vanilla",
    "--gan_mode hinge",
    "--gan_mode l1",
    "--lr_policy step",
    "--lr_policy cosine",
    "--lr_policy constant",
    "--preprocess crop",
    "--preprocess scale_width",
    "--preprocess scale_width_and_crop",
    "--preprocess none",
    "--no_flip",
    "--direction BtoA",
    "--pool_size 0",
    "--pool_size 1",
    "--lambda_A 3 --lambda_B 7",
    "--detach_cycle --augment_D 0.7 --augment_cycle 0.2",
    "--lambda_id 0",
    "--dropout",
    "--ema 0",
]


@pytest.mark.parametrize("options", VALUES)
def test_trains_and_round_trips(run, rgb, tmp_path, options):
    model = run(rgb, options)
    assert model.iteration == 2
    for name, net in model.networks().items():
        pairs = zip(net.parameters(), model.first[name].parameters(), strict=True)
        assert any(not torch.equal(new, old) for new, old in pairs), f"{name} learned nothing"
    log = logger.read_csv(tmp_path / "logs" / "losses.csv")
    assert all(math.isfinite(log[name][-1]) for name in ("D", "G", "adv", "cycle", "identity"))
    round_trip(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "height"),
    [
        ("--netD basic", 6),
        ("--netD n_layers --n_layers_D 2", 14),
        ("--netD pixel", 64),
        ("--netD strided", 4),
    ],
)
def test_netD_reaches_the_discriminators(options, height):
    model = make_model(options)
    for net in (model.netD_A, model.netD_B):
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 1, height, height)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ("--norm instance", nn.InstanceNorm2d),
        ("--norm batch", nn.BatchNorm2d),
        ("--norm none", nn.Identity),
    ],
)
def test_norm_reaches_every_network(options, kind):
    for net in make_model(options).networks().values():
        norms = nn.InstanceNorm2d | nn.BatchNorm2d | nn.Identity
        found = [type(layer) for layer in net.modules() if isinstance(layer, norms)]
        assert len(found) >= 3 and set(found) == {kind}


def test_channel_norm_is_for_generators():
    for name, net in make_model("--norm channel").networks().items():
        kind = models.ChannelNorm if name.startswith("netG") else nn.InstanceNorm2d
        norms = (models.ChannelNorm, nn.InstanceNorm2d)
        found = [type(layer) for layer in net.modules() if isinstance(layer, norms)]
        assert len(found) >= 3 and set(found) == {kind}


def test_mixed_norm_is_channel_norm_where_the_size_grows():
    for name, net in make_model("--norm mixed --n_residual_blocks 1").networks().items():
        norms = (models.ChannelNorm, nn.InstanceNorm2d)
        found = [type(layer) for layer in net.modules() if isinstance(layer, norms)]
        up = [models.ChannelNorm] * 2 if name.startswith("netG") else []
        assert found == [nn.InstanceNorm2d] * (len(found) - len(up)) + up and len(found) >= 3


def test_mixed_norm_leaves_the_mean_of_the_last_maps_free():
    """An instance norm there takes it away, and with it the color of a large area."""
    torch.manual_seed(0)
    for norm, least, most in (("mixed", 0.01, 1), ("instance", 0, 1e-5)):
        net = models.Generator(ngf=4, n_residual_blocks=1, norm=norm)
        models.init_weights(net, "kaiming")
        with torch.no_grad():
            means = net.model[:16](torch.rand(1, 3, 32, 32)).mean((2, 3))  # before the last ReLU
        assert least <= means.abs().max() < most


def test_channel_norm_sees_no_far_pixels():
    """What is outside of the convolutions' reach changes nothing; with instance norm it does."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 96) / 2
    y = x.clone()
    y[..., 80:] = 0.7
    for norm, far in (("channel", False), ("instance", True)):
        torch.manual_seed(0)
        net = models.Generator(ngf=4, n_residual_blocks=1, norm=norm)
        models.init_weights(net, "kaiming")
        with torch.no_grad():
            difference = (net(x) - net(y)).abs().amax((0, 1, 2))  # (W,)
        assert difference[80:].min() > 1e-2 and (difference[:40].max() > 1e-3) == far


def test_channel_norm_leaves_contrast():
    """Orange and dull orange, wood's color, differ to the layers that follow: by the bias."""
    orange = torch.tensor([1.0, 0.1, -0.9])[:, None, None].expand(1, 3, 16, 16)
    torch.manual_seed(0)
    net = models.Generator(ngf=8, n_residual_blocks=1, norm="channel")
    models.init_weights(net, "kaiming")
    with torch.no_grad():
        difference = lambda: (net.model[:3](orange) - net.model[:3](orange / 2)).abs().mean()
        assert difference() > 0.1
        net.model[1].bias.zero_()
        assert difference() < 0.01


def test_generator_options_reach_the_generators():
    for name in ("netG_A2B", "netG_B2A"):
        nearest = make_model("--upsample nearest").networks()[name].modules()
        assert sum(isinstance(layer, models.UpsampleConv) for layer in nearest) == 2
        transposed = make_model("--upsample deconv").networks()[name].modules()
        assert sum(isinstance(layer, nn.ConvTranspose2d) for layer in transposed) == 2
        for netG, multiple in (("unet_128", 128), ("unet_256", 256)):
            assert make_model(f"--netG {netG} --ngf 1").networks()[name].multiple == multiple


@pytest.mark.parametrize(("netG", "blocks"), [("resnet_9blocks", 9), ("resnet_6blocks", 6)])
def test_blocks_of_the_named_resnets(run, rgb, tmp_path, monkeypatch, netG, blocks):
    monkeypatch.setattr(train, "CycleGAN", Kept)
    typed = f"--dataroot {rgb} --workdir {tmp_path} {TINY} --netG {netG}"
    assert train.main(train.parse_args(typed.split())) == 0
    net = Kept.model.netG_A2B
    assert sum(isinstance(layer, models.ResidualBlock) for layer in net.modules()) == blocks
    round_trip(Kept.model, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--size 20 --netD basic", "--netD basic at least 24"),
        ("--size 28 --netD strided", "at least 32"),
        ("--netD n_layers --n_layers_D 4", "at least 48"),
        ("--size 33 --load_size 33", "multiple of 4"),
        ("--netG unet_128", "multiple of 128"),
        ("--netG unet_256 --size 128 --load_size 128", "multiple of 256"),
        ("--netG unet_128 --size 128 --load_size 128 --preprocess none", "halve"),
        ("--preprocess scale_width_and_crop --size 40", "--load_size"),
        ("--preprocess none --batch_size 2", "--batch_size 1"),
        ("--input_nc 1", "--lambda_id 0"),
        ("--lambda_id -1", "--lambda_id"),
        ("--decay_epoch 1", "--decay_epoch"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, rgb, options, words):
    refused(f"--dataroot {rgb} --workdir {tmp_path} {options}", words)
    assert not (tmp_path / "models").exists()


def test_default_weights_of_the_losses(run, rgb):
    args = run(rgb).args
    assert (args.lambda_A, args.lambda_B, args.lambda_id) == (10, 10, 5)
    assert (args.pool_size, args.gan_mode, args.lr_policy) == (50, "lsgan", "linear")


def test_averages_are_preferred_to_the_last_weights(run, rgb, tmp_path):
    model = run(rgb, "--lr 0.01")
    outputs = round_trip(model, tmp_path)
    average = read(outputs / "B" / "a0.png").astype(int)
    round_trip(model, tmp_path, model.networks(), ["--last"])
    assert np.abs(read(outputs / "B" / "a0.png") - average).max() > 1


# ------------------------------------------------------------------------------------------------
# Channels


def test_grey_16_bits_in_and_out(run, tmp_path):
    root = draw_set(tmp_path / "grey", (1, 1), np.uint16)
    model = run(root, "--input_nc 1 --output_nc 1")
    A, B = model.seen[0]
    assert A.shape == (1, 1, 32, 32) and A.mean() < -0.4 and B.mean() > 0.4
    assert len(np.unique(A.numpy())) > 800  # 1024 pixels, and 8 bits would leave 128 values
    outputs = round_trip(model, tmp_path)  # to 1e-4 of 65535
    written = Image.open(outputs / "B" / "a0.png")
    assert written.mode.startswith("I") and len(np.unique(np.array(written))) > 300


def test_grey_8_bits_stays_8_bits(run, tmp_path):
    model = run(draw_set(tmp_path / "grey", (1, 1)), "--input_nc 1 --output_nc 1")
    outputs = round_trip(model, tmp_path)
    assert Image.open(outputs / "A" / "b1.png").mode == "L"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_five_channels(run, tmp_path, dtype):
    root = draw_set(tmp_path / "five", (5, 5), dtype)
    model = run(root, "--input_nc 5 --output_nc 5")
    outputs = round_trip(model, tmp_path)
    assert np.load(outputs / "B" / "a0.npy").dtype == dtype


@pytest.mark.parametrize("channels", [(1, 3), (3, 1), (5, 3), (2, 1)])
def test_unequal_channels(run, tmp_path, channels):
    root = draw_set(tmp_path / "mixed", channels)
    options = f"--input_nc {channels[0]} --output_nc {channels[1]}"
    refused(f"--dataroot {root} --workdir {tmp_path} {options}", "--lambda_id 0")
    model = run(root, f"{options} --lambda_id 0")
    assert (model.netG_A2B.input_nc, model.netG_A2B.output_nc) == channels
    round_trip(model, tmp_path)


def test_16_bit_array_of_colours_is_read_as_8_bits(run, tmp_path):
    root = draw_set(tmp_path / "set", (3, 3))
    wide = np.random.default_rng(0).integers(0, 65536, (40, 40, 3), np.uint16)
    save_pixels(root / "trainA" / "wide.npy", wide)
    picture = datasets.load_image(root / "trainA" / "wide.npy", 3)
    assert picture.dtype == np.uint8 and np.array_equal(picture, wide // 256)
    assert run(root, "--batch_size 3").iteration == 1


# ------------------------------------------------------------------------------------------------
# Pictures


def test_direction_swaps_the_folders(run, rgb, tmp_path):
    model = run(rgb, "--direction BtoA")
    for A, B in model.seen:  # the set's A is dark, its B bright
        assert A.mean() > 0.4 and B.mean() < -0.4
    outputs = round_trip(model, tmp_path)
    assert sorted(p.name for p in (outputs / "B").iterdir()) == ["b0.png", "b1.png"]
    assert sorted(p.name for p in (outputs / "A").iterdir()) == ["a0.png", "a1.png"]
    assert json.loads((tmp_path / "models" / "options.json").read_text())["direction"] == "BtoA"
    grid = np.asarray(Image.open(tmp_path / "images" / "latest.png"))
    columns = [grid[20:148, 4 + 132 * i :][:, :128].mean() for i in (0, 3)]  # real A, real B
    assert columns[0] > 170 and columns[1] < 85


@pytest.mark.parametrize(
    ("preprocess", "shape"),
    [
        ("resize_and_crop", (32, 32)),
        ("crop", (32, 32)),
        ("scale_width", (44, 52)),  # 36 x 52 / 44 = 42.5, to a multiple of 4
        ("scale_width_and_crop", (32, 32)),
        ("none", (36, 44)),
    ],
)
def test_preprocess_sizes(run, rgb, preprocess, shape):
    model = run(rgb, f"--load_size 52 --preprocess {preprocess} --no_flip")
    assert model.seen[0][0].shape == (1, 3, *shape)


def test_no_flip_and_no_crop_leave_pixels_alone(run, rgb):
    model = run(rgb, "--preprocess none --no_flip")
    known = [read(path) for path in sorted((rgb / "trainA").iterdir())]
    for A, _ in model.seen:
        pixels = datasets.to_array(A[0])
        assert any(np.array_equal(pixels, picture) for picture in known)


def test_crop_takes_a_part_of_the_picture_as_it_is(run, rgb):
    model = run(rgb, "--preprocess crop --no_flip")
    known = [read(path) for path in sorted((rgb / "trainB").iterdir())]
    windows = [p[i : i + 32, j : j + 32] for p in known for i in range(5) for j in range(13)]
    for _, B in model.seen:
        assert any(np.array_equal(datasets.to_array(B[0]), window) for window in windows)


def test_tiny_pictures_as_they_are(run, tmp_path):
    root = draw_set(tmp_path / "set")
    for side in "AB":
        save_pixels(root / f"train{side}" / "tiny.png", np.zeros((5, 3, 3), np.uint8))
    assert run(root, "--preprocess none --netD strided").iteration == 3


# ------------------------------------------------------------------------------------------------
# Losses and schedules against plain formulas


def make_model(options=""):
    typed = f"{TINY} --n_residual_blocks 1 --decay_epoch 0 --lambda_A 10 --lambda_B 10 {options}"
    return train.CycleGAN(train.parse_args(typed.split()), CPU)


def random_pictures(n=2):
    return torch.rand(2, n, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def mean(x):
    return x.mean().item()


PLAIN = {  # of scores s: for real ones, for fakes, for the generator's fakes
    "lsgan": (lambda s: (s - 1) ** 2, lambda s: s**2, lambda s: (s - 1) ** 2),
    "vanilla": (
        lambda s: -(1 / (1 + (-s).exp())).log(),
        lambda s: -(1 - 1 / (1 + (-s).exp())).log(),
        lambda s: -(1 / (1 + (-s).exp())).log(),
    ),
    "hinge": (lambda s: (1 - s).clamp(min=0), lambda s: (1 + s).clamp(min=0), lambda s: -s),
    "l1": (lambda s: (s - 1).abs(), lambda s: s.abs(), lambda s: (s - 1).abs()),
}


@pytest.mark.parametrize("mode", PLAIN)
def test_gan_modes(mode):
    score = torch.randn(2, 1, 5, 4, dtype=torch.double) * 2
    real, fake, generator = PLAIN[mode]
    assert train.gan_loss(score, True, mode).item() == pytest.approx(mean(real(score)))
    assert train.gan_loss(score, False, mode).item() == pytest.approx(mean(fake(score)))
    made = train.gan_loss(score, True, mode, generator=True)
    assert made.item() == pytest.approx(mean(generator(score)))


@pytest.mark.parametrize("mode", PLAIN)
def test_gan_modes_in_the_losses(mode):
    model = make_model(f"--gan_mode {mode} --lambda_id 0 --init_gain 0.2")
    A, B = random_pictures()
    real, fake, generator = PLAIN[mode]
    _, losses, fake_A, fake_B = tiny.generator_losses(model, A, B)
    D_A, D_B = model.netD_A, model.netD_B
    adv = (mean(generator(D_A(fake_A))) + mean(generator(D_B(fake_B)))) / 2
    assert losses["adv"].item() == pytest.approx(adv, rel=1e-4)
    for netD, x, y in ((D_A, A, fake_A), (D_B, B, fake_B)):
        loss = model.discriminator_loss(netD, x, y).item()
        assert loss == pytest.approx((mean(real(netD(x))) + mean(fake(netD(y)))) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ("--lambda_A 3 --lambda_B 7 --lambda_id 2", (3, 7, 2)),
        ("--lambda_A 0 --lambda_B 1 --lambda_id 0", (0, 1, 0)),
    ],
)
def test_weights_of_the_losses(options, weights):
    model = make_model(options)
    A, B = random_pictures()
    loss, losses, _, _ = tiny.generator_losses(model, A, B)
    forth, back = model.netG_A2B, model.netG_B2A
    cycle_A, cycle_B = mean((back(forth(A)) - A).abs()), mean((forth(back(B)) - B).abs())
    identity = (mean((back(A) - A).abs()) + mean((forth(B) - B).abs())) / 2
    lambda_A, lambda_B, lambda_id = weights
    total = losses["adv"].item() + (lambda_A * cycle_A + lambda_B * cycle_B) / 2
    assert abs(cycle_A - cycle_B) > 1e-4  # else swapped weights would not show
    assert loss.item() == pytest.approx(total + lambda_id * identity, rel=1e-5)
    losses = model.step([(A, B)])
    assert losses["G"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert (losses["identity"].item() > 0) == (lambda_id > 0)


def test_identity_pass_is_not_computed_at_0():
    passes = []
    for options in ("--lambda_id 5", "--lambda_id 0"):
        model = make_model(options)
        count = []
        model.netG_A2B.register_forward_hook(lambda net, x, y, c=count: c.append(len(x[0])))
        tiny.generator_losses(model, *random_pictures(1))
        passes.append(sum(count))
    assert passes == [3, 2]  # pictures through the generator


@pytest.mark.parametrize(
    ("policy", "n_epochs", "decay_epoch", "factors"),
    [
        ("linear", 10, 5, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 4, 0, [1, 0.75, 0.5, 0.25]),
        ("step", 6, 2, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", 4, 2, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant", 3, 1, [1, 1, 1]),
    ],
)
def test_lr_policies(policy, n_epochs, decay_epoch, factors):
    """The factor at each epoch's start."""
    for epoch, factor in enumerate(factors):
        got = schedule.lr_factor(policy, epoch, n_epochs, decay_epoch)
        assert got == pytest.approx(factor)


def test_steps_have_the_scheduled_rate(run, rgb, monkeypatch):
    """In both optimizers."""
    used, step = [], train.CycleGAN.step

    def note(model, batches):
        optimizers = (model.optimizer_G, model.optimizer_D)
        used.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        return step(model, batches)

    monkeypatch.setattr(train.CycleGAN, "step", note)
    run(rgb, "--lr_policy step --n_epochs 4 --decay_epoch 2 --lr 0.5")
    assert len(used) == 8  # two in an epoch
    for epoch, factor in enumerate([1, 1, 0.1, 0.1]):
        assert used[2 * epoch] == pytest.approx([0.5 * factor] * 2)


@pytest.mark.parametrize("size", [0, 1, 50])
def test_pool_size(run, rgb, size):
    model = run(rgb, f"--pool_size {size}")
    assert [len(model.buffer_A.images), len(model.buffer_B.images)] == [size] * 2
    assert [model.buffer_A.n, model.buffer_B.n] == [min(size, 2)] * 2


def test_without_a_pool_the_discriminators_see_the_new_fakes(monkeypatch):
    model = make_model("--pool_size 0")
    made, seen = [], []
    generator_loss, discriminator_loss = model.generator_loss, model.discriminator_loss

    def note_made(*args):
        result = generator_loss(*args)
        made.append(result[2])
        return result

    def note_judged(netD, real, fake):
        seen.append(fake)
        return discriminator_loss(netD, real, fake)

    monkeypatch.setattr(model, "generator_loss", note_made)
    monkeypatch.setattr(model, "discriminator_loss", note_judged)
    monkeypatch.setattr(model, "map", map)
    for _ in range(4):
        model.step([tuple(random_pictures())])
    assert len(made) == 8
    assert all(torch.equal(new, used) for new, used in zip(made, seen, strict=True))


# ------------------------------------------------------------------------------------------------
# First weights, norms, dropout


@pytest.mark.parametrize("layer", [nn.Conv2d(64, 32, 3), nn.ConvTranspose2d(64, 32, 3)])
@pytest.mark.parametrize("init_type", ["normal", "xavier", "kaiming", "orthogonal"])
def test_init_types(layer, init_type):
    torch.manual_seed(0)
    models.init_weights(nn.Sequential(layer), init_type, 0.3)
    assert not layer.bias.any()
    weight = layer.weight.detach()  # (out, in, 3, 3), or (in, out, 3, 3) when transposed
    into, out = weight[0].numel(), weight[:, 0].numel()
    if init_type == "orthogonal":
        rows = weight.flatten(1)
        assert torch.allclose(rows @ rows.T, 0.09 * torch.eye(len(rows)), atol=1e-5)
        return
    std = {"normal": 0.3, "xavier": 0.3 * (2 / (into + out)) ** 0.5, "kaiming": (2 / into) ** 0.5}
    assert weight.std().item() == pytest.approx(std[init_type], rel=0.03)
    assert abs(weight.mean().item()) < 0.03 * std[init_type]


@pytest.mark.parametrize("init_type", ["normal", "xavier", "kaiming", "orthogonal"])
def test_init_reaches_every_network(init_type):
    model = make_model(f"--init_type {init_type} --init_gain 0.3 --ngf 16 --ndf 16 --norm batch")
    for net in model.networks().values():
        alone = copy.deepcopy(net)
        torch.manual_seed(0)
        models.init_weights(alone, init_type, 0.3)
        for one, other in zip(net.modules(), alone.modules(), strict=True):
            if isinstance(one, nn.Conv2d | nn.ConvTranspose2d) and one.weight.numel() > 2000:
                assert one.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.15)
            if isinstance(one, nn.BatchNorm2d):
                assert abs(one.weight.mean().item() - 1) < 0.4 and one.weight.std() > 0.1
                assert not one.bias.any()


def test_batch_norm_does_not_mix_passes():
    """Each pass of a step gives each picture what it gives pictures of its kind alone.

    Batch statistics are those of one kind of picture; instance norm may take two kinds at once.
    """
    for norm in ("batch", "instance", "channel", "mixed", "none"):
        model, passes = make_model(f"--norm {norm} --init_gain 0.3"), []
        A, B = random_pictures()
        B = B * 0.1 + 0.5
        note = lambda net, x, y, passes=passes: passes.append((net, x[0], y))
        hooks = [net.register_forward_hook(note) for net in model.networks().values()]
        *_, fake_A, fake_B = tiny.generator_losses(model, A, B)
        model.discriminator_loss(model.netD_A, A, fake_A.detach())
        model.discriminator_loss(model.netD_B, B, fake_B.detach())
        for hook in hooks:
            hook.remove()
        for net in model.networks().values():  # fake, rec, idt; fake for G, real, fake for D
            assert sum(len(x) for other, x, _ in passes if other is net) == 3 * 2
        for net, x, y in passes:
            for kind, got in zip(x.split(2), y.split(2), strict=True):
                apart = (got - net(kind)).abs().amax((2, 3))  # (2, C)
                assert (apart < 1e-4).all(), (norm, apart)
    model = make_model("--norm batch")
    apart = model.forward_pair(model.netD_A, A, B)
    model.batched = True
    mixed = model.forward_pair(model.netD_A, A, B)
    for one, other in zip(apart, mixed, strict=True):  # what the test above would catch
        assert ((one - other).abs().amax((2, 3)) > 1e-4).all()


@pytest.mark.parametrize("norm", ["instance", "batch", "channel", "none"])
def test_bias_only_where_published(norm):
    """Before a norm of its own bias, none; the reference repo keeps it with instance norm alone."""
    kept = norm == "instance"
    resnet = models.Generator(ngf=4, n_residual_blocks=1, norm=norm)
    assert (resnet.model[1].bias is not None) == (kept or norm == "channel")
    assert (resnet.model[10].conv_block[1].bias is not None) == kept
    assert resnet.model[-2].bias is not None
    for netD in ("basic", "n_layers", "strided"):
        layers = models.Discriminator(ndf=4, netD=netD, norm=norm).model
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        biased = [layer.bias is not None for layer in convolutions]
        assert biased == [True, *[kept] * (len(biased) - 2), True]
    layers = models.Discriminator(ndf=4, netD="pixel", norm=norm).model
    biased = [layer.bias is not None for layer in layers if isinstance(layer, nn.Conv2d)]
    assert biased == [True, kept, kept]


@pytest.mark.parametrize("netG", ["resnet_9blocks", "unet_128 --size 128 --load_size 128"])
def test_dropout_only_in_training(run, rgb, tmp_path, netG):
    model = run(rgb, f"--dropout --ema 0 --netG {netG}")
    net = model.netG_A2B
    assert net.training and sum(isinstance(layer, nn.Dropout) for layer in net.modules()) in (1, 2)
    x = torch.rand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        assert not torch.equal(net(x), net(x))
        read_back = weights.load_generator(tmp_path / "models" / "netG_A2B.pth")
        assert torch.equal(read_back(x), read_back(x))
        net.eval()
        assert torch.allclose(read_back(x), net(x), atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Starting from weights


def same_weights(net, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_init_from_our_own_weights(run, rgb, tmp_path):
    old = run(rgb, "--ema 0", tmp_path / "old")
    new = run(rgb, f"--init_from {tmp_path / 'old' / 'models'} --lr 0 --seed 5", tmp_path / "new")
    for name, net in new.networks().items():
        assert same_weights(net, old.networks()[name])
        assert not same_weights(net, new.first[name])
    for name, average in new.averages.items():
        assert all(
            torch.allclose(x, y, atol=1e-6)
            for x, y in zip(average.parameters(), new.networks()[name].parameters(), strict=True)
        )


def test_init_from_files(run, rgb, tmp_path):
    """Of two runs and an average, without one discriminator; a file comes before a folder."""
    models = [tmp_path / name / "models" for name in "12"]
    first, second = run(rgb, "", models[0].parent), run(rgb, "--seed 1", models[1].parent)
    files = f"{models[0] / 'netG_A2B_ema.pth'} {models[1] / 'netG_B2A.pth'}"
    new = run(rgb, f"--init_from {files} {models[0] / 'netD_A.pth'} --lr 0", tmp_path / "3")
    assert same_weights(new.netG_A2B, first.averages["netG_A2B"])
    assert same_weights(new.netG_B2A, second.netG_B2A)
    assert same_weights(new.netD_A, first.netD_A)
    assert same_weights(new.netD_B, new.first["netD_B"])
    new = run(rgb, f"--init_from {models[1]} {models[0] / 'netG_A2B.pth'} --lr 0", tmp_path / "4")
    assert same_weights(new.netG_A2B, first.netG_A2B)
    assert same_weights(new.netD_B, second.netD_B)


@pytest.mark.parametrize("discriminators", [True, False])
def test_init_from_the_reference_repo(run, rgb, tmp_path, discriminators):
    """Its D_A sees B: there, D_A is what G_A plays against."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    theirs = make_model("--seed 9 --init_gain 0.5").networks()
    names = {"netG_A2B": "G_A", "netG_B2A": "G_B"}
    names |= {"netD_B": "D_A", "netD_A": "D_B"} if discriminators else {}
    for name, published in names.items():
        torch.save(theirs[name].state_dict(), folder / f"latest_net_{published}.pth")
    model = run(rgb, f"--init_from {folder} --lr 0")
    for name, net in model.networks().items():
        assert same_weights(net, theirs[name]) == (name in names)
    round_trip(model, tmp_path)
    keeping, (x, _) = make_model("--keep_source").netG_A2B, random_pictures()
    keeping.load_state_dict(weights.read_initial([str(folder)], "netG_A2B", keeping, True))
    assert (keeping(x) - theirs["netG_A2B"](x)).abs().max() < 0.01


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ("", "--ngf 8", "do not fit the networks asked for"),
        ("", "--norm batch", "do not fit"),
        ("", "--netG unet_128 --size 128 --load_size 128", "do not fit"),
        ("", "--upsample nearest", "do not fit"),
        ("", "--n_residual_blocks 2", "do not fit"),
        ("", "--ndf 8", "netD_A.pth do not fit"),
        ("netG_A2B.pth", "", "has neither netG_B2A.pth nor latest_net_G_B.pth"),
        ("netG_A2B.pth netG_B2A.pth horse2zebra.pth", "", "horse2zebra.pth: the name tells which"),
        ("netG_A2B.pth lost/netG_B2A.pth", "", "there is no checkpoint .*lost/netG_B2A.pth"),
    ],
)
def test_init_from_other_networks_is_refused(tmp_path, rgb, files, options, words):
    for name, net in make_model().networks().items():
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
    paths = " ".join(str(tmp_path / file) for file in files.split()) or tmp_path
    where = f"--dataroot {rgb} --workdir {tmp_path / 'run'} --n_residual_blocks 1"
    refused(f"{where} --init_from {paths} {options}", words)
    assert not list((tmp_path / "run" / "models").glob("*"))


def test_init_from_an_empty_folder_is_refused(tmp_path, rgb):
    typed = f"--dataroot {rgb} --workdir {tmp_path / 'run'} --init_from {tmp_path}"
    refused(typed, "neither netG_A2B.pth nor latest_net_G_A.pth")
