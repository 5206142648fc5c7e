"""The losses, the step and a whole run, number by number, against plain calculations."""

import copy
import functools
import itertools
import math
import random
import shutil
import threading

import numpy as np
import pytest
import tiny as tiny_runs
import torch
import torch.nn.functional as F

import datasets
import train
from lib import metrics, options, translation, validation
from lib.augment import augment, disturb, mean_of_views
from lib.logger import Logger, read_csv
from lib.replay import ReplayBuffer
from lib.scenes import other_scenes
from lib.schedule import lr_factor
from tools.bench import Plain
from train import CycleGAN, gan_loss
from utils import UserError

CPU = torch.device("cpu")
GRAY = "--input_nc 1 --output_nc 1"


def tiny(*options: str):
    """Options of a run so small that a step takes milliseconds."""
    words = "--ngf 4 --ndf 4 --n_residual_blocks 1 --size 32 --load_size 36 --n_epochs 2"
    return train.parse_args([*words.split(), *options])


def pictures(n: int = 2, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    A, B = torch.rand(2, n, 3, 32, 32, dtype=dtype) * 2 - 1
    return A, B


def double(model: CycleGAN) -> CycleGAN:
    """In float64 rounding cannot hide a wrong formula.

    Biases before an InstanceNorm have a gradient of exactly zero; what float32 leaves of it is
    noise, which Adam turns into full steps (of no effect on any picture).
    """
    for net in model.networks().values():
        net.double()
    return model


def plain_generator_losses(model: CycleGAN, A: torch.Tensor, B: torch.Tensor) -> dict:
    G_A2B, G_B2A, D_A, D_B = model.netG_A2B, model.netG_B2A, model.netD_A, model.netD_B
    fake_A, fake_B = G_B2A(B), G_A2B(A)
    adv = (((D_A(fake_A) - 1) ** 2).mean() + ((D_B(fake_B) - 1) ** 2).mean()) / 2
    cycle = ((G_B2A(fake_B) - A).abs().mean() + (G_A2B(fake_A) - B).abs().mean()) / 2
    identity = ((G_B2A(A) - A).abs().mean() + (G_A2B(B) - B).abs().mean()) / 2
    return {"adv": adv, "cycle": cycle, "identity": identity, "G": adv + 10 * cycle + 5 * identity}


def test_generator_losses():
    model = CycleGAN(tiny(), CPU)
    A, B = pictures()
    loss, parts, fake_A, fake_B = tiny_runs.generator_losses(model, A, B)
    plain = plain_generator_losses(model, A, B)
    for name in ("adv", "cycle", "identity"):
        assert parts[name].item() == pytest.approx(plain[name].item(), rel=1e-5), name
    assert loss.item() == pytest.approx(plain["G"].item(), rel=1e-5)
    assert torch.allclose(fake_B, model.netG_A2B(A), atol=1e-6)
    assert torch.allclose(fake_A, model.netG_B2A(B), atol=1e-6)
    change = ((fake_B - A).abs().mean() + (fake_A - B).abs().mean()) / 2 * 127.5
    assert parts["change"].item() == pytest.approx(change.item(), rel=1e-5)


@pytest.mark.parametrize("options", ["", "--detach_cycle"])
def test_gradients_of_the_cycle_loss(options):
    """Through both generators of a cycle, or the second alone; its value is the same."""
    weights = "--lambda_A 3 --lambda_B 7 --lambda_id 0"
    model = double(CycleGAN(tiny(*weights.split(), *options.split()), CPU))
    A, B = pictures(dtype=torch.float64)
    G_A2B, G_B2A = model.netG_A2B, model.netG_B2A
    adv = plain_generator_losses(model, A, B)["adv"]
    first_B, first_A = G_A2B(A), G_B2A(B)
    if options:
        first_B, first_A = first_B.detach(), first_A.detach()
    cycle_A, cycle_B = (G_B2A(first_B) - A).abs().mean(), (G_A2B(first_A) - B).abs().mean()
    wanted = torch.autograd.grad(adv + (3 * cycle_A + 7 * cycle_B) / 2, model.params_G)
    loss, parts, fake_A, fake_B = tiny_runs.generator_losses(model, A, B)
    for p, q in zip(wanted, torch.autograd.grad(loss, model.params_G), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-12)
    assert parts["cycle"].item() == pytest.approx((cycle_A + cycle_B).item() / 2, rel=1e-9)
    assert fake_A.requires_grad and fake_B.requires_grad


def test_discriminator_loss():
    model = CycleGAN(tiny(), CPU)
    for netD, real in zip((model.netD_A, model.netD_B), pictures(), strict=True):
        loss = model.discriminator_loss(netD, real, real.flip(3))
        plain = ((netD(real) - 1) ** 2).mean() / 2 + (netD(real.flip(3)) ** 2).mean() / 2
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_score_map_is_not_averaged_first():
    score = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)  # its mean would be a perfect 1
    assert gan_loss(score, True, "lsgan").item() == 1.0


def plain_like(model: CycleGAN) -> Plain:
    """The plain reference with copies of the model's networks, and buffers of the same seeds."""
    plain, args = Plain(model.args, CPU), model.args
    for name, net in model.networks().items():
        setattr(plain, name, copy.deepcopy(net))
    adam = lambda params: torch.optim.Adam(params, args.lr, (args.beta1, args.beta2))
    plain.optimizer_G = adam([*plain.netG_A2B.parameters(), *plain.netG_B2A.parameters()])
    plain.optimizer_D_A = adam(plain.netD_A.parameters())
    plain.optimizer_D_B = adam(plain.netD_B.parameters())
    plain.buffer_A = ReplayBuffer(args.pool_size, 2 * args.seed)
    plain.buffer_B = ReplayBuffer(args.pool_size, 2 * args.seed + 1)
    return plain


def test_a_step_is_the_plain_step():
    """Five steps, buffers of one: the losses and weights of separate passes and plain Adams."""
    model = double(CycleGAN(tiny("--ema", "0", "--pool_size", "1"), CPU))
    plain, before = plain_like(model), copy.deepcopy(model.netG_A2B)
    for i in range(5):
        A, B = (x.roll(i, 3) for x in pictures(1, torch.float64))
        losses = model.step([(A, B)])
        for name, value in plain.step(A, B).items():
            assert losses[name].item() == pytest.approx(value, rel=1e-6), (i, name)
    for name, net in model.networks().items():
        for p, q in zip(net.parameters(), vars(plain)[name].parameters(), strict=True):
            assert (p - q).abs().max() < 1e-5, name
    moved = (before.model[1].weight - model.netG_A2B.model[1].weight).abs().max()
    assert moved > 1e-4  # the comparison above is not one of untouched weights


def test_discriminators_get_no_gradient_from_the_generators():
    """With the fakes taken out of its loss, a step moves the discriminators by nothing."""
    model = CycleGAN(tiny(), CPU)
    model.discriminator_loss = lambda netD, real, fake: 0 * netD(real).sum()
    before = [p.clone() for p in model.params_D]
    model.optimizer_D.zero_grad = lambda set_to_none: None  # what is there stays to be seen
    model.step([pictures()])
    assert all(not p.grad.any() for p in model.params_D)
    assert all(torch.equal(p, q) for p, q in zip(before, model.params_D, strict=True))
    assert all(p.requires_grad for p in model.params_D)


@pytest.mark.parametrize(
    "options", ["", "--detach_cycle --id_every 2 --accumulate 2 --augment_D 0.7"]
)
def test_threads_give_the_same_step(monkeypatch, options):
    """On a CPU the directions run side by side; a step is the same, each time to the last bit."""
    words = (*options.split(), "--pool_size", "1", "--ema", "0")
    models = []
    for threads in (1, 4, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        models.append(double(CycleGAN(tiny(*words), CPU)))
    names = set()
    for model in models:
        for netD in (model.netD_A, model.netD_B):
            netD.register_forward_hook(lambda *_: names.add(threading.current_thread().name))
    for i in range(4):
        A, B = (x.roll(i, 3) for x in pictures(1, torch.float64))
        losses = [model.step([(A, B), (B, A)][: model.args.accumulate]) for model in models]
        assert losses[1] == losses[2]
        for name, value in losses[0].items():
            assert losses[1][name].item() == pytest.approx(value.item(), rel=1e-6), name
    assert names == {"MainThread", "direction_0", "direction_1"}
    params = [model.params_G + model.params_D for model in models]
    for one, other, same in zip(*params, strict=True):
        assert torch.equal(other, same)
        assert (one - other).abs().max() < 1e-5


def test_where_directions_share_no_threads(monkeypatch):
    """Not where they would change one thing at once, nor on a GPU, whose kernels queue anyway."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert CycleGAN(tiny(), CPU, torch.bfloat16).map is not map
    for words in ("--norm batch", "--dropout", "--compile"):
        assert train.map_for(tiny(*words.split()), CPU, None) is map
    assert train.map_for(tiny(), CPU, torch.float16) is map
    assert train.map_for(tiny(), torch.device("cuda"), None) is map
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert train.map_for(tiny(), CPU, None) is map


@pytest.mark.parametrize("net", ["optimizer_G", "optimizer_D"])
def test_accumulated_batches_are_one_batch(net):
    """Two batches of 1 give the gradients and losses of one of 2 (no buffer: fakes would differ).

    Adam's first step hides the scale of a gradient, its moments do not.
    """
    A, B = pictures(2, torch.float64)
    options = ("--pool_size", "0", "--ema", "0")
    one, two = (double(CycleGAN(tiny(*options), CPU)) for _ in range(2))
    a = one.step([(A, B)])
    b = two.step([(A[:1], B[:1]), (A[1:], B[1:])])
    for name in a:
        assert b[name].item() == pytest.approx(a[name].item(), rel=1e-6), name
    moments = [
        [state["exp_avg"] for state in vars(model)[net].state.values()] for model in (one, two)
    ]
    assert len(moments[0]) > 10
    for p, q in zip(*moments, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-12)


def test_discriminators_see_what_the_buffers_return():
    """With room for one picture, fakes of the past come back; D is trained on just those."""
    model = CycleGAN(tiny("--pool_size", "1"), CPU)
    fresh, returned, seen = [], [], []
    loss = model.discriminator_loss

    def spy(query):
        def wrapped(fakes):
            fresh.append(fakes.detach().clone())
            returned.append(query(fakes))
            return returned[-1]

        return wrapped

    def spy_loss(netD, real, fake):
        seen.append(fake)
        return loss(netD, real, fake)

    model.buffer_A.query, model.buffer_B.query = map(
        spy, (model.buffer_A.query, model.buffer_B.query)
    )
    model.discriminator_loss, model.map = spy_loss, map  # one direction after the other
    for i in range(8):
        model.step([tuple(x[i % 2 :][:1] for x in pictures())])
    assert all(torch.equal(a, b) for a, b in zip(seen, returned, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(fresh, seen, strict=True))


def test_identity_every_kth_step():
    """Weight and work change with --id_every, what is logged does not jump."""
    model = CycleGAN(tiny("--id_every", "2", "--lr", "0"), CPU)
    A, B = pictures()
    plain = plain_generator_losses(model, A, B)
    base = (plain["adv"] + 10 * plain["cycle"]).item()
    for weight in (2 * 5, 0, 2 * 5):
        loss, *_ = tiny_runs.generator_losses(model, A, B)
        assert loss.item() == pytest.approx(base + weight * plain["identity"].item(), rel=1e-5)
        losses = model.step([(A, B)])
        for name in ("identity", "G"):
            assert losses[name].item() == pytest.approx(plain[name].item(), rel=1e-5), name


def test_mean_losses_are_of_all_iterations_since_the_last_call():
    model = CycleGAN(tiny(), CPU)
    steps = [model.step([pictures()]) for _ in range(3)]
    for name, value in model.mean_losses().items():
        assert value == pytest.approx(sum(s[name].item() for s in steps) / 3, rel=1e-5), name
    last = model.step([pictures()])
    assert model.mean_losses()["G"] == pytest.approx(last["G"].item(), rel=1e-5)


def test_an_infinite_gradient_is_skipped_in_float16():
    """The GradScaler lies between loss and optimizer: no weight changes, the scale is halved."""
    model = CycleGAN(tiny("--ema", "0"), CPU, torch.float16)
    scale = model.scaler.get_scale()
    before = [p.clone() for net in model.networks().values() for p in net.parameters()]
    for p in (model.params_G[0], model.params_D[0]):
        p.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    model.step([pictures()])
    after = [p for net in model.networks().values() for p in net.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert model.scaler.get_scale() == scale / 2


def test_moving_average():
    model = CycleGAN(tiny("--ema", "0.9"), CPU)
    average = model.netG_A2B.model[1].weight.detach().clone()
    for t in range(12):
        model.step([pictures()])
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * model.netG_A2B.model[1].weight.detach()
    assert torch.allclose(model.averages["netG_A2B"].model[1].weight, average, atol=1e-7)
    assert not torch.allclose(average, model.netG_A2B.model[1].weight, atol=1e-5)


def test_averages_have_the_running_statistics_of_the_networks():
    model = CycleGAN(tiny("--norm", "batch"), CPU)
    for _ in range(2):
        model.step([pictures()])
    buffers = dict(model.netG_A2B.named_buffers())
    assert buffers["model.2.running_mean"].any()
    for name, buffer in model.averages["netG_A2B"].named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_buffer_fills_then_swaps_half_the_time():
    buffer = ReplayBuffer(50, seed=3)
    for i in range(50):
        new = torch.full((1, 1, 1, 1), float(i))
        assert torch.equal(buffer.query(new), new)
    assert buffer.images.shape == (50, 1, 1, 1)
    stored = {float(image) for image in buffer.images}
    assert stored == set(map(float, range(50)))
    swaps = 0
    for i in range(50, 1050):
        before = [float(image) for image in buffer.images]
        returned = float(buffer.query(torch.full((1, 1, 1, 1), float(i))))
        after = [float(image) for image in buffer.images]
        if returned == i:
            assert after == before  # returned, not stored
        else:
            assert before.count(returned) == 1  # an old one is returned, the new one has its place
            assert after == [float(i) if value == returned else value for value in before]
            swaps += 1
    assert 430 < swaps < 570


def test_a_batch_goes_through_the_buffer_as_its_pictures_one_by_one():
    one, four = ReplayBuffer(6, seed=1), ReplayBuffer(6, seed=1)
    for batch in torch.arange(40.0).view(10, 4, 1, 1, 1):
        single = torch.cat([one.query(picture[None]) for picture in batch])
        assert torch.equal(four.query(batch), single)
    assert torch.equal(four.images, one.images)


def test_buffer_keeps_its_own_copy_and_cuts_gradients():
    buffer = ReplayBuffer(1)
    fake = torch.zeros(1, 3, 2, 2, requires_grad=True)
    assert not buffer.query(fake * 1).requires_grad
    images = torch.zeros(1, 3, 2, 2)
    kept = ReplayBuffer(1)
    kept.query(images)
    images += 1
    assert kept.images[0].sum() == 0
    none = ReplayBuffer(0)
    assert torch.equal(none.query(images), images) and none.n == 0
    larger = torch.zeros(2, 3, 4, 4)  # another shape begins a new history
    assert torch.equal(kept.query(larger)[:1], larger[:1]) and kept.images.shape == (1, 3, 4, 4)


class Fixed(random.Random):
    """Draws a given share of each limit, in the order of the draws."""

    def __init__(self, **shares: float):
        super().__init__()
        names = "angle zoom mirror x y saturation contrast brightness"
        self.shares = itertools.cycle(shares.get(name, 0.0) for name in names.split())

    def random(self) -> float:
        return 0.0

    def uniform(self, low: float, high: float) -> float:
        return next(self.shares) * high


def test_augment_moves_and_recolors_pictures():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    y = torch.rand(1, 3, 8, 16)  # a turn leaves the shapes of what is in a wide picture
    for shares, image, expected in (
        ({}, x, x),
        ({"mirror": -1}, x, x.flip(3)),
        ({"angle": 0.5}, x, x.rot90(1, (2, 3))),
        ({"angle": 0.5}, y, None),
        ({"x": 1}, x, torch.cat([x[..., 1:], x[..., -1:]], 3)),
        ({"brightness": 1}, x, x + 0.12),
        ({"contrast": 1}, x, x * math.exp(0.2)),
    ):
        found = augment(image, 0.7, Fixed(**shares))
        if expected is None:
            found, expected = found[..., 4:12], y[..., 4:12].rot90(1, (2, 3))
        assert torch.allclose(found, expected, atol=1e-5), shares
    gray = augment(x, 0.7, Fixed(saturation=1)).mean(1)
    assert torch.allclose(gray, x.mean(1), atol=1e-6)
    small = F.avg_pool2d(augment(x, 0.7, Fixed(zoom=math.log(0.5) / 0.35)), 2)  # twice as large
    assert (small - x[..., 4:12, 4:12]).abs().mean() < (x - x.mean()).abs().mean() / 2


def test_augment_changes_a_share_of_the_pictures_with_gradients_and_no_other_precision():
    x = torch.rand(200, 3, 8, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = augment(x, 0.3, random.Random(0))
    assert y.dtype == torch.float32
    same = (y - x).abs().amax((1, 2, 3)) < 1e-5
    assert 110 < same.sum() < 170
    y.sum().backward()
    assert (x.grad.amax((1, 2, 3)) > 0).all()
    assert augment(x, 0.0, random.Random(0)) is x


def test_disturb_adds_noise_to_each_picture_with_gradients_and_no_other_precision():
    flat = torch.zeros(64, 3, 24, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = disturb(flat, 0.4, random.Random(0))
    assert torch.equal(y, disturb(flat, 0.4, random.Random(0)))
    assert not torch.equal(y, disturb(flat, 0.4, random.Random(1)))
    assert y.dtype == torch.float32 and y.shape == flat.shape and y.abs().max() == 1
    amounts = y.std((1, 2, 3))
    assert (amounts > 0.3).any() and (amounts < 0.05).any() and 0.05 < amounts.mean() < 0.4
    weak = disturb(flat, 0.1, random.Random(0)).std((1, 2, 3))
    assert weak.mean() > 0.01
    assert (4 * weak > 0.85 * amounts - 1e-6).all()  # but for contrast and the clamp
    places = y.reshape(64, 3, 4, 6, 4, 10).std((1, 3, 5)).flatten(1)[amounts > 0.05]
    assert (places.amax(1) > 2 * places.amin(1)).float().mean() > 0.8  # more here and less there
    grains = (y - F.avg_pool2d(F.pad(y, [2] * 4, mode="reflect"), 5, 1)).std((1, 2, 3))
    share = grains[amounts > 0.05] / amounts[amounts > 0.05]
    assert share.min() < 0.5 and share.max() > 0.9  # coarse and fine
    y.sum().backward()
    assert (flat.grad.amax((1, 2, 3)) > 0.8).all()
    assert disturb(flat, 0.0, random.Random(0)) is flat


@pytest.mark.parametrize("strength", ["0", "0.5"])
def test_second_generator_alone_sees_disturbed_pictures(strength):
    model = CycleGAN(tiny("--augment_cycle", strength, "--pool_size", "0"), CPU)
    seen = {name: [] for name in ("netG_A2B", "netG_B2A", "netD_A", "netD_B")}
    for name, inputs in seen.items():
        note = lambda net, x, y, inputs=inputs: inputs.append(x[0].detach())
        model.networks()[name].register_forward_hook(note)
    A, B = pictures()
    model.step([(A, B)])
    # what is not in one batch with other pictures: the fakes, for D and for the second generator
    alone = {name: next(x for x in inputs if len(x) == 2) for name, inputs in seen.items()}
    pairs = (("netG_A2B", "netD_A"), ("netG_B2A", "netD_B"))
    same = [torch.equal(alone[second], alone[netD]) for second, netD in pairs]
    assert same == [strength == "0"] * 2


def test_mean_of_views():
    """Turned back: a network of single pixels makes the same of each; one of places does not."""
    x = torch.randn(2, 3, 8, 12)
    assert torch.allclose(mean_of_views(lambda y: 2 * y, x, random.Random(0)), 2 * x)
    shapes = []
    places = lambda y: shapes.append(tuple(y.shape[2:])) or torch.arange(y.shape[3]) + 0 * y
    mean = mean_of_views(places, x, random.Random(0))
    assert shapes == [(8, 12), (12, 8), (8, 12), (12, 8)]
    assert mean.shape == x.shape and mean.std((2, 3)).max() < torch.arange(12.0).std()
    found = {mean_of_views(places, x, random.Random(seed))[0, 0, 0, 0].item() for seed in range(20)}
    assert len(found) == 3  # of views two by two mirrored: both, one or none
    assert not mean_of_views(torch.nn.Conv2d(3, 3, 1), x, random.Random(0)).requires_grad


def test_refinement_is_L1_to_what_the_averages_made():
    """In --refine_epochs; D learns nothing, and the other direction's generator nothing from it."""
    A, B = pictures()
    model = CycleGAN(tiny("--refine_epochs", "1"), CPU)
    model.colors = {"A2B": torch.rand(24**3), "B2A": torch.rand(24**3)}
    model.refining = True
    for net in model.averages.values():
        for p in net.parameters():
            p.mul_(1.5)
    model.start_refining()
    rng = random.Random()
    rng.setstate(model.buffer_B.random.getstate())
    with torch.no_grad():
        fake = model.averages["netG_A2B"](A)
    source, wanted = other_scenes(A, fake, model.colors["A2B"], rng)
    loss = F.l1_loss(model.netG_A2B(source), wanted)
    assert loss > 0.01
    gradient = torch.autograd.grad(loss, model.netG_A2B.parameters())
    before = [p.clone() for p in model.params_D]
    directions = []
    model.map = lambda *of: directions.extend(map(*of)) or directions
    losses = model.step([(A, B)])
    parts, params, grads = directions[0]
    assert list(map(id, params)) == list(map(id, model.netG_A2B.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, gradient, strict=True))
    assert parts["G"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses["D"] == losses["cycle"] == losses["identity"] == 0 < losses["change"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.params_D, strict=True))


def test_refinement_needs_colors(tmp_path):
    """Those of 8 bits: light and backgrounds are not made for measured values."""
    for letter in "AB":
        (tmp_path / f"train{letter}").mkdir()
        np.save(tmp_path / f"train{letter}" / "0.npy", np.zeros((30, 30, 3), np.float32))
    options = "--refine_epochs 1 --range_A 0 1 --range_B 0 1"
    with pytest.raises(UserError, match="needs RGB pictures of 8 bits: add --refine_epochs 0"):
        tiny_runs.run(tmp_path, tmp_path, options)


@pytest.mark.parametrize("option", ["lambda_views_A2B", "lambda_keep"])
def test_what_a_generator_is_held_to(option):
    """Its gradient has that of L1 to what the average makes, or to the source where it was kept."""
    A, B = pictures()
    left_changed = lambda x: torch.cat([x[:, :, :, :16] + 1, x[:, :, :, 16:]], 3)

    def step(weight: str) -> tuple:
        model = CycleGAN(tiny(f"--{option}", weight, "--detach_cycle"), CPU)
        for p in model.averages["netG_A2B"].parameters():
            p.mul_(1.5)
        model.initial = dict.fromkeys(model.initial, left_changed)
        netG, rng = model.netG_A2B, random.Random()
        rng.setstate(model.buffer_B.random.getstate())
        if option == "lambda_keep":  # for both directions
            right = lambda net, x: 6 * (net(x) - x)[:, :, :, 16:].abs().mean() / 2
            loss, other = right(netG, A), right(model.netG_B2A, B).detach()
        else:
            loss = 6 * F.l1_loss(netG(A), mean_of_views(model.averages["netG_A2B"], A, rng))
            other = 0
        wanted = torch.autograd.grad(loss / 2, netG.parameters())
        directions = []
        model.map = lambda *of: directions.extend(map(*of)) or directions
        G = model.step([(A, B)])["G"]
        return directions[0][2], directions[1][2], G, wanted, loss.detach() + other

    changed, other, G, wanted, both = step("6")
    plain, same, before, *_ = step("0")
    for a, b, grad in zip(changed, plain, wanted, strict=False):  # netG_A2B's are the first
        assert torch.allclose(a - b, grad, atol=1e-5)
    as_it_was = all(torch.equal(a, b) for a, b in zip(other, same, strict=True))
    assert as_it_was == (option == "lambda_views_A2B")
    assert (G - before).item() == pytest.approx(both.item() / 2, rel=1e-4)


@pytest.mark.parametrize("probability", ["0", "0.99"])
def test_discriminators_alone_see_augmented_pictures(probability):
    model = CycleGAN(tiny("--augment_D", probability), CPU)
    A, B = pictures()
    seen = {"netG_A2B": [], "netD_A": []}
    for name, inputs in seen.items():
        note = lambda net, x, y, inputs=inputs: inputs.extend(x[0])
        model.networks()[name].register_forward_hook(note)
    model.step([(A, B)])
    known = {name: any(torch.equal(x, A[0]) for x in inputs) for name, inputs in seen.items()}
    assert known == {"netG_A2B": True, "netD_A": probability == "0"}


def test_linear_schedule():
    factors = [lr_factor("linear", epoch, 200, 100) for epoch in (0, 99, 100, 101, 150, 199)]
    assert factors == pytest.approx([1, 1, 1, 0.99, 0.5, 0.01])
    assert lr_factor("linear", 100.5, 200, 100) == pytest.approx(0.995)


def test_adam_is_the_papers():
    group = CycleGAN(tiny(), CPU).optimizer_D.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
    model = CycleGAN(tiny("--lr", "0.1", "--beta1", "0.3", "--beta2", "0.9"), CPU)
    for optimizer in (model.optimizer_G, model.optimizer_D):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"]) == (0.1, (0.3, 0.9))
    args = train.parse_args([])
    assert (args.n_epochs, args.batch_size, args.pool_size) == (200, 1, 50)
    assert (args.lambda_cyc, args.lambda_id, args.load_size, args.size) == (10, 5, 286, 256)


def test_ranks_share_weights_but_no_random_numbers():
    """Dropout and the buffers' choices are each rank's own."""
    models, dropout = [], []
    for rank in (0, 1):
        models.append(CycleGAN(tiny(), CPU, rank=rank, world_size=2))
        dropout.append(torch.get_rng_state())
    for name, net in models[0].networks().items():
        for p, q in zip(net.parameters(), models[1].networks()[name].parameters(), strict=True):
            assert torch.equal(p, q), name
    assert not torch.equal(*dropout)
    assert len({b.random.getstate() for m in models for b in (m.buffer_A, m.buffer_B)}) == 4


def test_compiled_networks_keep_their_names():
    """Compiled in place: nothing is compiled before the first call, so this is quick."""
    plain, compiled = CycleGAN(tiny(), CPU), CycleGAN(tiny("--compile"), CPU)
    assert compiled.netG_A2B._compiled_call_impl is not None
    for name, net in plain.networks().items():
        assert list(compiled.networks()[name].state_dict()) == list(net.state_dict())


def test_bf16_step_is_close_to_float32():
    plain, mixed = CycleGAN(tiny(), CPU), CycleGAN(tiny(), CPU, torch.bfloat16)
    types = []
    for name, net in mixed.networks().items():
        layer = net.model["G" in name]  # the first convolution
        layer.register_forward_hook(lambda layer, x, y: types.append(y.dtype))
    a, b = plain.step([pictures()]), mixed.step([pictures()])
    for name in a:
        assert b[name].dtype == torch.float32
        assert b[name].item() == pytest.approx(a[name].item(), rel=0.02), name
    assert all(p.dtype == torch.float32 for p in mixed.params_G)
    assert len(types) == 4 + 2 + 2 and set(types) == {torch.bfloat16}


def test_classic_is_short_for_its_options():
    """`--classic` is as if its options were typed; explicit options override it."""
    classic = train.parse_args(["--demo", "--classic", "--lr", "0.001"])
    assert (classic.batch_size, classic.id_every, classic.ema, classic.lr) == (1, 1, 0, 0.001)
    assert classic.n_epochs == options.DEMO["n_epochs"]  # the networks and the time of the demo

    saved = train.parse_args(["--demo"]).options
    resumed = train.parse_args(["--resume", "--classic"], saved)
    assert (resumed.batch_size, resumed.id_every, resumed.ema, resumed.lr) == (1, 1, 0, 2e-4)
    assert resumed.ngf == options.DEMO["ngf"]


def test_presets_give_way_to_what_is_typed():
    quick = train.parse_args(["--quick", "--lambda_cyc", "5"])
    assert (quick.keep_source, quick.lambda_cyc, quick.lambda_id) == (True, 5, 0)
    keep = train.parse_args(["--keep_source"])
    assert (keep.lambda_cyc, keep.lambda_id, keep.size) == (3, 0, 256)
    classic = train.parse_args(["--quick", "--classic"])
    assert (classic.keep_source, classic.lambda_cyc, classic.half_size) == (False, 10, 0)
    assert (quick.n_layers_D, classic.netD) == (2, "basic")
    assert train.parse_args(["--demo"]).detach_cycle
    older = train.parse_args(["--demo"]).options
    del older["detach_cycle"]  # the run of a version that did not have it
    assert not train.parse_args(["--demo", "--resume"], older).detach_cycle
    assert not train.parse_args(["--demo", "--classic"]).detach_cycle
    saved = train.parse_args(["--quick", "--n_epochs", "7"]).options
    resumed = train.parse_args(["--resume", "--ngf", "8"], saved)
    assert (resumed.n_epochs, resumed.ngf, resumed.lambda_cyc) == (7, 8, 3)
    one = train.parse_args(["--lambda_A", "3"])
    assert (one.lambda_A, one.lambda_B) == (3, 10)


def test_epochs_that_follow_from_other_options(dataroot, tmp_path):
    words = ["--dataroot", str(dataroot), "--workdir", str(tmp_path)]
    prepare = lambda more: train.prepare(train.parse_args([*words, *more.split()]), None)
    quick = prepare("--quick --batch_size 2")  # 1350 iterations, of five pictures
    assert (quick.n_epochs, quick.options["n_epochs"], quick.decay_epoch) == (540, 540, 432)
    refine = [prepare(f"--quick --n_epochs 9 {more}").refine_epochs for more in ("", GRAY)]
    assert refine == [options.QUICK_ITERATIONS["refine_epochs"] // 5, 0]
    assert prepare("--quick --classic").refine_epochs == prepare("--n_epochs 9").refine_epochs == 0
    assert prepare("--n_epochs 10 --half_size 0.7").decay_epoch == 7


def test_a_run_is_the_plain_loop(dataroot, tmp_path):
    """Two epochs of train.py end with the weights and the log of a loop written out here.

    Order, crops, flips, half of the size in the first half, the schedule and the averages, written
    out; five pictures of A, four of B, batches of two: the last of an epoch is filled from its
    start.
    """
    words = "--n_epochs 2 --decay_epoch 1 --batch_size 2 --pool_size 3 --ema 0.9 --seed 4"
    words += " --log_every 2 --size 48 --load_size 50 --half_size 0.5 --beta2 0.99"
    assert tiny_runs.run(dataroot, tmp_path, words) == 0

    fresh = CycleGAN(train.parse_args(tiny_runs.words(dataroot, tmp_path, words)), CPU)
    plain = plain_like(fresh)
    average = copy.deepcopy(plain.netG_A2B)

    def load(letter: str, i: int, rng, half: bool) -> torch.Tensor:
        picture = datasets.load_image(dataroot / f"train{letter}" / f"{i}.png")
        picture = datasets.resize(picture, (50, 50))
        y, x, flip = rng.random(3)
        top, left = int(y * 3), int(x * 3)  # 50 - 48 + 1 places
        window = picture[top : top + 48, left : left + 48]
        window = window[:, ::-1] if flip < 0.5 else window
        x = torch.from_numpy(window / 127.5 - 1).float().permute(2, 0, 1)
        return x.reshape(3, 24, 2, 24, 2).mean((2, 4)) if half else x

    steps = []
    for epoch in range(2):
        order = np.random.default_rng((4, epoch)).permutation(5)
        for step in range(3):
            pairs = []
            for index in (2 * step, 2 * step + 1):
                rng = np.random.default_rng((4, epoch, index))
                j = int(rng.integers(4))
                half = epoch == 0
                A = load("A", order[index % 5], rng, half)
                pairs.append((A, load("B", j, rng, half)))
            for optimizer in (plain.optimizer_G, plain.optimizer_D_A, plain.optimizer_D_B):
                factor = 1 if epoch == 0 else 1 - 2 * step / 5
                factor *= 1 if epoch == 0 else min(1, 15 * step / 5)  # warm-up at full size
                optimizer.param_groups[0]["lr"] = 2e-4 * factor
            decay = min(0.9, (1 + len(steps)) / (10 + len(steps)))
            steps.append(plain.step(*map(torch.stack, zip(*pairs, strict=True))))
            with torch.no_grad():
                for mean, p in zip(average.parameters(), plain.netG_A2B.parameters(), strict=True):
                    mean.lerp_(p, 1 - decay)
    first = {**fresh.networks(), "netG_A2B_ema": fresh.netG_A2B}
    for name, net in first.items():
        wanted = average if name == "netG_A2B_ema" else vars(plain)[name]
        saved = torch.load(tmp_path / "models" / f"{name}.pth", weights_only=True)
        apart, moved = 0, 0  # biases before an instance norm have no gradient but noise
        for key, value in wanted.state_dict().items():
            if key.endswith("weight"):
                apart += (saved[key] - value).square().sum()
                moved += (net.state_dict()[key] - value).square().sum()
        assert (apart / moved).sqrt() < 5e-3, name  # what Adam makes of rounding: 2e-3
    log = read_csv(tmp_path / "logs" / "losses.csv")
    assert log["iteration"] == [2, 3, 4, 6]  # the rows are means since the one before
    for name in steps[0]:
        losses = [losses[name] for losses in steps]
        means = [sum(losses[:2]) / 2, losses[2], losses[3], sum(losses[4:]) / 2]
        assert log[name] == pytest.approx(means, rel=1e-3), name


def test_the_best_is_kept(dataroot, tmp_path, monkeypatch):
    """Scores 3, 1, 2: models/best has the averages of epoch 2; training goes on as training."""
    scores, averages, training = iter([3.0, 1.0, 2.0, 1.5]), [], []

    def measure(nets, *more):
        averages.append({name: copy.deepcopy(net.state_dict()) for name, net in nets.items()})
        return {"cycle_A2B": 0.5}, next(scores)

    def step(model, batches, plain_step=CycleGAN.step):
        training.append(all(net.training for net in model.networks().values()))
        return plain_step(model, batches)

    monkeypatch.setattr(validation, "measure", measure)
    monkeypatch.setattr(CycleGAN, "step", step)
    assert tiny_runs.run(dataroot, tmp_path, "--eval_every 1 --sample_every 1 --ema 0.9") == 0
    assert tiny_runs.resume(tmp_path, "--n_epochs 4") == 0  # the best score is part of the state
    for name, state in averages[1].items():
        best = torch.load(tmp_path / "models" / "best" / f"{name}.pth", weights_only=True)
        assert all(torch.equal(best[key], value) for key, value in state.items())
        for other in (f"{name}.pth", f"{name}_ema.pth"):  # the last weights, the last averages
            last = torch.load(tmp_path / "models" / other, weights_only=True)
            assert not all(torch.equal(best[key], value) for key, value in last.items())
    assert tiny_runs.read_state(tmp_path)["best"] == 1.0
    assert len(training) == 16 and all(training)  # one of five pictures is set aside
    log = read_csv(tmp_path / "logs" / "metrics.csv")
    assert log == {"epoch": [1, 2, 3, 4], "iteration": [4, 8, 12, 16], "cycle_A2B": [0.5] * 4}


def test_weights_are_chosen_on_pictures_set_aside(dataroot, tmp_path, monkeypatch):
    """Neither test pictures nor those trained on are measured; a val split is, if there is one."""
    measured, trained = [], []
    translate_files, read = translation.translate_files, datasets.Domain.read

    def spy(net, paths, *more):
        measured.extend(paths)
        return translate_files(net, paths, *more)

    def spy_read(domain, i):
        trained.append(domain.folder / domain.names[i])
        return read(domain, i)

    few = functools.partial(metrics.sample_patches, n=64)
    monkeypatch.setattr(metrics, "sample_patches", few)
    monkeypatch.setattr(translation, "translate_files", spy)
    monkeypatch.setattr(datasets.Domain, "read", spy_read)
    assert tiny_runs.run(dataroot, tmp_path / "a", "--eval_every 2 --n_epochs 2") == 0
    assert {path.parent.name for path in measured} == {"trainA", "trainB"} and len(measured) == 2
    assert len(set(trained)) == 4 + 3 and not set(trained) & set(measured)
    log = read_csv(tmp_path / "a" / "logs" / "metrics.csv")
    assert {"cycle_A2B", "swd_A2B", "cycle_B2A", "swd_B2A"} <= log.keys() and log["epoch"] == [2]

    root = shutil.copytree(dataroot, tmp_path / "data")
    for letter in "AB":
        (root / f"test{letter}").rename(root / f"val{letter}")
    measured.clear()
    trained.clear()
    assert tiny_runs.run(root, tmp_path / "b", "--eval_every 1 --n_epochs 1") == 0
    assert {path.parent.name for path in measured} == {"valA", "valB"} and len(set(trained)) == 9


def test_how_many_are_set_aside(tmp_path):
    """`--n_val`, a quarter at most, and the same ones each time."""
    for domain, n in (("A", 40), ("B", 9)):
        (tmp_path / f"train{domain}").mkdir()
        for i in range(n):
            (tmp_path / f"train{domain}" / f"{i}.png").touch()
    options = {"eval_every": 1, "n_val": 8, "seed": 0}
    aside = lambda domain, **more: validation.held_out(tmp_path, domain, options | more)
    assert len(set(aside("A"))) == 8 and len(set(aside("B"))) == 2
    assert len(aside("A", n_val=16)) == 10 and aside("A", eval_every=0) == []
    assert aside("A") == aside("A") != aside("A", seed=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--beta1 2", "--beta1 is 2.0, but must be at least 0 and below 1"),
        ("--beta2 1", "--beta2 is 1.0, but must be at least 0 and below 1"),
        ("--half_size 1", "--half_size is 1.0, but must be at least 0 and below 1"),
        ("--half_size 0.5 --size 24 --load_size 24", "24, twice that with --half_size"),
        ("--ema -0.1", "--ema is -0.1, but must be at least 0 and below 1"),
        ("--lambda_cyc -1", "--lambda_cyc is -1.0, but must be at least 0"),
        ("--lambda_A -1", "--lambda_A is -1"),
        ("--lambda_B -1", "--lambda_B is -1"),
        ("--lambda_id -1", "--lambda_id is -1"),
        ("--lr nan", "--lr is nan"),
        ("--lr inf", "--lr is inf"),
        ("--n_residual_blocks 0", "--n_residual_blocks is 0, but must be at least 1"),
        ("--save_minutes -1", "--save_minutes is -1"),
        ("--lr_policy step --decay_epoch -1", "--decay_epoch is -1"),
        ("--accumulate 0", "--accumulate is 0, but must be at least 1"),
        ("--range_B 5 1", r"--range_B \[5.0, 1.0\]: LO must be below HI"),
        ("--keep_source --netG unet_256", "--keep_source needs a ResNet generator"),
        ("--norm mixed --netG unet_256", "--norm mixed needs a ResNet generator"),
        ("--lambda_keep -1", "--lambda_keep is -1"),
        ("--lambda_keep 1", "--lambda_keep keeps what trained generators keep: add --init_from"),
        ("--lambda_keep 1 --init_from x --output_nc 1", "--lambda_keep needs equal --input_nc"),
        (f"--refine_epochs 1 {GRAY}", "--refine_epochs needs RGB pictures: --input_nc 3"),
        ("--refine_epochs -1", "--refine_epochs is -1, but must be at least 0"),
        ("--lambda_views_B2A 1 --ema 0", "--lambda_views_B2A need an average: --ema 0.998"),
        ("--keep_source --output_nc 1", "equal --input_nc, --output_nc"),
        ("--half_size 0.5 --preprocess none", "--half_size 0"),
    ],
)
def test_options_out_of_range(words, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        train.main(train.parse_args([*words.split(), "--workdir", str(tmp_path)]))
    assert "\n" not in str(caught.value)


def test_a_collapse_is_said(dataroot, tmp_path, capsys, monkeypatch):
    """Generators that change nothing are noticed; that they do is a column of the log."""
    checked = []
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "check_change", lambda log, *change: checked.append(change))
        assert tiny_runs.run(dataroot, tmp_path, "--keep_source --n_epochs 1") == 0
    rows = read_csv(tmp_path / "logs" / "losses.csv")
    assert min(rows["change"]) > 0.5
    for found, *row in zip(checked, rows["iteration"], rows["change"], strict=True):
        assert found == pytest.approx(tuple(row), rel=1e-5)
    args = train.parse_args(tiny_runs.words(dataroot, tmp_path))
    with Logger(args, 0, 0, 1000) as log:
        for letter, shown in (("A", log.real_A), ("B", log.real_B)):  # the test split's
            picture = datasets.load_image(dataroot / f"test{letter}" / "1.png")
            picture = datasets.to_tensor(datasets.resize(picture, (24, 24)))
            assert len(shown) == 2 and torch.equal(shown[1], picture)
        for iteration, change in ((100, 0.6), (200, 0.4), (350, 0.3), (399, 0.1)):
            log.check_change(iteration, change)
        assert "collapsed" not in capsys.readouterr().out
        log.check_change(400, 0.1)
        message = capsys.readouterr().out
        assert "since iteration 100" in message and "lower --lambda_cyc" in message
        log.check_change(450, 0.1)
        log.args.output_nc = 1  # nothing to compare with
        log.check_change(9000, 0.0)
    assert "collapsed" not in capsys.readouterr().out, "printed once, not at every row"
