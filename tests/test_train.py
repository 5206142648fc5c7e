"""The objective and the step, number by number, against plain calculations written out here."""

import copy

import pytest
import torch

import train
from train import CycleGAN, gan_loss
from utils import ReplayBuffer, lr_factor

CPU = torch.device("cpu")


def tiny(*options: str):
    """Options of a run so small that a step takes milliseconds, completed as main does."""
    words = "--ngf 4 --ndf 4 --n_residual_blocks 1 --size 32 --load_size 36 --n_epochs 2"
    args = train.parse_args([*words.split(), *options])
    train.fill_in(args)
    return args


def pictures(n: int = 2, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    A, B = torch.rand(2, n, 3, 32, 32, dtype=dtype) * 2 - 1
    return A, B


def double(model: CycleGAN) -> CycleGAN:
    """In float64 rounding cannot hide a wrong formula.

    Biases before an InstanceNorm have a gradient of exactly zero; what float32 leaves of it is
    noise, which Adam blows up to full steps (of no effect on any picture).
    """
    model.generators.double()
    model.discriminators.double()
    return model


def test_published_log_line():
    """adv 0.407010, cycle 0.026193, identity 0.096426 -> G 1.151066."""
    args = tiny()
    G = 0.407010 + args.lambda_cyc * 0.026193 + args.lambda_id * 0.096426
    assert abs(G - 1.151066) < 5e-6


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
    losses, (fake_A, fake_B) = model.generator_losses(A, B)
    plain = plain_generator_losses(model, A, B)
    assert losses.keys() == plain.keys()
    for name in plain:
        assert losses[name].item() == pytest.approx(plain[name].item(), rel=1e-5), name
    assert torch.allclose(fake_B, model.netG_A2B(A), atol=1e-6)
    assert torch.allclose(fake_A, model.netG_B2A(B), atol=1e-6)
    assert not fake_A.requires_grad


def test_discriminator_losses():
    model = CycleGAN(tiny(), CPU)
    A, B = pictures()
    fake_A, fake_B = B.flip(3), A.flip(2)
    losses = model.discriminator_losses(A, fake_A, B, fake_B)
    D_A = ((model.netD_A(A) - 1) ** 2).mean() / 2 + (model.netD_A(fake_A) ** 2).mean() / 2
    D_B = ((model.netD_B(B) - 1) ** 2).mean() / 2 + (model.netD_B(fake_B) ** 2).mean() / 2
    assert losses["D_A"].item() == pytest.approx(D_A.item(), rel=1e-5)
    assert losses["D_B"].item() == pytest.approx(D_B.item(), rel=1e-5)
    assert losses["D"].item() == pytest.approx((D_A + D_B).item() / 2, rel=1e-5)


def test_score_map_is_not_averaged_first():
    score = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)  # its mean would be a perfect 1
    assert gan_loss(score, True, "lsgan").item() == 1.0


def test_a_step_is_the_plain_step():
    """Three steps: the same new weights as separate passes, separate plain Adams, to 1e-5."""
    model = double(CycleGAN(tiny("--ema", "0"), CPU))
    plain = copy.deepcopy(model)
    generators = [*plain.netG_A2B.parameters(), *plain.netG_B2A.parameters()]
    adam = {"lr": 2e-4, "betas": (0.5, 0.999)}
    opt_G = torch.optim.Adam(generators, **adam)
    opt_D_A = torch.optim.Adam(plain.netD_A.parameters(), **adam)
    opt_D_B = torch.optim.Adam(plain.netD_B.parameters(), **adam)
    for i in range(3):  # buffers of 50 are not yet full: they give back what they get
        A, B = (x.roll(i, 3) for x in pictures(dtype=torch.float64))
        losses = model.step([(A, B)])
        opt_G.zero_grad()
        wanted = plain_generator_losses(plain, A, B)
        fake_A, fake_B = plain.netG_B2A(B).detach(), plain.netG_A2B(A).detach()
        wanted["G"].backward()
        opt_G.step()
        D = 0
        for net, opt, real, fake in (
            (plain.netD_A, opt_D_A, A, fake_A),
            (plain.netD_B, opt_D_B, B, fake_B),
        ):
            opt.zero_grad()
            scores = net(real), net(fake)
            loss = ((scores[0] - 1).square().mean() + scores[1].square().mean()) / 2
            loss.backward()
            opt.step()
            D += loss.item() / 2
        assert losses["G"].item() == pytest.approx(wanted["G"].item(), rel=1e-4)
        assert losses["D"].item() == pytest.approx(D, rel=1e-4)
    for name, net in model.networks().items():
        for p, q in zip(net.parameters(), plain.networks()[name].parameters(), strict=True):
            assert (p - q).abs().max() < 1e-5, name
    fresh = CycleGAN(tiny(), CPU)
    moved = (fresh.netG_A2B.model[1].weight - model.netG_A2B.model[1].weight).abs().max()
    assert moved > 1e-4  # the comparison above is not one of untouched weights


def test_discriminators_are_frozen_in_the_generator_step():
    model = CycleGAN(tiny(), CPU)
    model.discriminators.requires_grad_(False)
    losses, _ = model.generator_losses(*pictures())
    losses["G"].backward()
    assert all(p.grad is None for p in model.discriminators.parameters())
    assert all(p.grad is not None for p in model.generators.parameters())


def test_accumulated_batches_are_one_batch():
    """Two batches of 1 give the weights of one batch of 2 (no buffer: its fakes would differ)."""
    A, B = pictures(2, torch.float64)
    options = ("--pool_size", "0", "--ema", "0")
    one, two = (double(CycleGAN(tiny(*options), CPU)) for _ in range(2))
    one.step([(A, B)])
    two.step([(A[:1], B[:1]), (A[1:], B[1:])])
    for p, q in zip(one.generators.parameters(), two.generators.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5
    for p, q in zip(one.discriminators.parameters(), two.discriminators.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5


def test_identity_every_kth_step():
    model = CycleGAN(tiny("--id_every", "2"), CPU)
    A, B = pictures()
    plain = plain_generator_losses(model, A, B)
    losses, _ = model.generator_losses(A, B)
    heavy = plain["adv"] + 10 * plain["cycle"] + 2 * 5 * plain["identity"]
    assert losses["G"].item() == pytest.approx(heavy.item(), rel=1e-5)
    model.iteration = 1
    losses, _ = model.generator_losses(A, B)
    assert "identity" not in losses
    light = plain["adv"] + 10 * plain["cycle"]
    assert losses["G"].item() == pytest.approx(light.item(), rel=1e-5)


def test_moving_average():
    model = CycleGAN(tiny("--ema", "0.9"), CPU)
    average = model.netG_A2B.model[1].weight.detach().clone()
    for t in range(12):
        model.step([pictures()])
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * model.netG_A2B.model[1].weight.detach()
    assert torch.allclose(model.averages["netG_A2B"].model[1].weight, average, atol=1e-7)
    assert not torch.allclose(average, model.netG_A2B.model[1].weight, atol=1e-5)


def test_buffer_fills_then_swaps_half_the_time():
    buffer = ReplayBuffer(50, seed=3)
    for i in range(50):
        new = torch.full((1, 1, 1, 1), float(i))
        assert torch.equal(buffer.query(new), new)
    stored = {float(image) for image in buffer.images}
    assert stored == set(map(float, range(50)))
    swaps = 0
    for i in range(50, 1050):
        before = [float(image) for image in buffer.images]
        given = float(buffer.query(torch.full((1, 1, 1, 1), float(i))))
        after = [float(image) for image in buffer.images]
        if given == i:
            assert after == before  # returned, not stored
        else:
            assert before.count(given) == 1  # an old one is returned, the new one has its place
            assert after == [float(i) if value == given else value for value in before]
            swaps += 1
    assert 430 < swaps < 570


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
    assert torch.equal(none.query(images), images) and none.images == []


def test_linear_schedule():
    factors = [lr_factor("linear", epoch, 200, 100) for epoch in (0, 99, 100, 101, 150, 199)]
    assert factors == pytest.approx([1, 1, 1, 0.99, 0.5, 0.01])
    model = CycleGAN(tiny(), CPU)  # two epochs, decay from epoch 1 on
    model.start_epoch(1)
    assert model.optimizer_G.param_groups[0]["lr"] == pytest.approx(2e-4)
    model.args.n_epochs, model.args.decay_epoch = 4, 0
    for epoch, factor in enumerate((1, 0.75, 0.5, 0.25)):
        model.start_epoch(epoch)
        for optimizer in (model.optimizer_G, model.optimizer_D):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4 * factor)


def test_adam_is_the_papers():
    group = CycleGAN(tiny(), CPU).optimizer_D.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
    args = train.parse_args([])
    assert (args.n_epochs, args.batch_size, args.pool_size) == (200, 1, 50)
    assert (args.lambda_cyc, args.lambda_id, args.load_size, args.size) == (10, 5, 286, 256)


def test_compiled_networks_keep_their_names():
    """Compiled in place: nothing is compiled before the first call, so this is quick."""
    plain, compiled = CycleGAN(tiny(), CPU), CycleGAN(tiny("--compile"), CPU)
    assert compiled.netG_A2B._compiled_call_impl is not None
    for name, state in plain.state_dict().items():
        if name.startswith("net"):
            assert list(compiled.state_dict()[name]) == list(state)


def test_bf16_step_is_close_to_float32():
    plain, mixed = CycleGAN(tiny(), CPU), CycleGAN(tiny(), CPU, torch.bfloat16)
    a, b = plain.step([pictures()]), mixed.step([pictures()])
    for name in a:
        assert b[name].dtype == torch.float32
        assert b[name].item() == pytest.approx(a[name].item(), rel=0.02), name
    assert all(p.dtype == torch.float32 for p in mixed.generators.parameters())


def test_classic_is_short_for_its_options():
    """`--classic` is as if its options were typed; what is typed beside it goes first."""
    classic = train.parse_args(["--demo", "--classic", "--lr", "0.001"])
    assert (classic.batch_size, classic.id_every, classic.ema, classic.lr) == (1, 1, 0, 0.001)
    assert classic.n_epochs == train.DEMO["n_epochs"]  # the networks and the time of the demo

    run = train.parse_args(["--demo"])
    resumed = train.resume(train.parse_args(["--resume", "--classic"]), {"args": vars(run)})
    assert (resumed.batch_size, resumed.id_every, resumed.ema, resumed.lr) == (1, 1, 0, 2e-4)
    assert resumed.ngf == train.DEMO["ngf"]
