"""Train CycleGAN on two folders of unpaired pictures (Zhu, Park, Isola, Efros 2017).

    python train.py --dataroot dataset/apple2orange --cuda
    python train.py --demo
    torchrun --nproc_per_node=4 train.py --dataroot dataset/apple2orange

From top to bottom: the objective, the step (class CycleGAN), what a run saves and shows, the loop,
the options.
"""

import argparse
import contextlib
import copy
import datetime
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import datasets
import utils
from lib import checkpoint
from lib.logger import Logger, load_samples
from models import Discriminator, init_weights, make_generator
from tools.demo import draw_demo
from utils import ReplayBuffer, UserError

# ------------------------------------------------------------------------------------------------
# The objective


def both(net: nn.Module, x: torch.Tensor, y: torch.Tensor, batched: bool) -> tuple:
    """net(x) and net(y), in one pass where that gives the same numbers: faster on every device."""
    if batched and x.shape == y.shape:
        return net(torch.cat([x, y])).chunk(2)
    return net(x), net(y)


class Generators(nn.Module):
    """Both generators and all that they draw in one step (so that ranks meet once per step)."""

    def __init__(self, netG_A2B: nn.Module, netG_B2A: nn.Module, batched: bool):
        super().__init__()
        self.netG_A2B, self.netG_B2A, self.batched = netG_A2B, netG_B2A, batched

    def draw(self, netG: nn.Module, source: torch.Tensor, target: torch.Tensor, identity: bool):
        """The translation of `source`, and what `netG` makes of a picture that needs none."""
        if identity:
            return both(netG, source, target, self.batched)
        return netG(source), None

    def forward(self, real_A: torch.Tensor, real_B: torch.Tensor, identity: bool) -> tuple:
        fake_B, idt_B = self.draw(self.netG_A2B, real_A, real_B, identity)
        fake_A, idt_A = self.draw(self.netG_B2A, real_B, real_A, identity)
        rec_A, rec_B = self.netG_B2A(fake_B), self.netG_A2B(fake_A)
        return fake_A, fake_B, rec_A, rec_B, idt_A, idt_B  # each (N, C, H, W)


class Discriminators(nn.Module):
    """Both discriminators, each on real pictures and on fakes."""

    def __init__(self, netD_A: nn.Module, netD_B: nn.Module, batched: bool):
        super().__init__()
        self.netD_A, self.netD_B, self.batched = netD_A, netD_B, batched

    def forward(self, real_A, fake_A, real_B, fake_B) -> tuple:
        scores_A = both(self.netD_A, real_A, fake_A, self.batched)
        scores_B = both(self.netD_B, real_B, fake_B, self.batched)
        return *scores_A, *scores_B  # each (N, 1, h, w)


def gan_loss(score: torch.Tensor, real: bool, mode: str, generator: bool = False) -> torch.Tensor:
    """How far the scores (N, 1, h, w) are from saying "real" or "fake", patch by patch.

    lsgan is the paper's (section 4, after Mao et al. 2017): squared distance to 1 or 0. Only hinge
    asks other things of the two players: the generator's score has no margin.
    """
    if mode == "hinge":
        return -score.mean() if generator else F.relu(1 - score if real else 1 + score).mean()
    target = torch.full_like(score, float(real))
    if mode == "vanilla":
        return F.binary_cross_entropy_with_logits(score, target)
    return F.mse_loss(score, target) if mode == "lsgan" else F.l1_loss(score, target)


class CycleGAN:
    """Four networks, their optimizers and buffers; `step` is one iteration of training."""

    def __init__(self, args, device: torch.device, dtype=None, rank=0, world=1):
        """`args`: the options of `parse_args`; `dtype`: autocast precision, None for float32."""
        self.args, self.device, self.dtype, self.iteration = args, device, dtype, 0
        A, B = args.input_nc, args.output_nc
        torch.manual_seed(args.seed)
        options = {"norm": args.norm, "upsample": args.upsample, "dropout": args.dropout}
        options |= {"ngf": args.ngf, "n_residual_blocks": args.n_residual_blocks}
        self.netG_A2B = make_generator(args.netG, A, B, **options)
        self.netG_B2A = make_generator(args.netG, B, A, **options)
        options = {"ndf": args.ndf, "netD": args.netD, "n_layers_D": args.n_layers_D}
        self.netD_A = Discriminator(A, norm=args.norm, **options)
        self.netD_B = Discriminator(B, norm=args.norm, **options)
        self.layout = utils.memory_layout(device)
        for net in self.networks().values():
            init_weights(net, args.init_type, args.init_gain)
            net.to(device, memory_format=self.layout)
        self.averages = {}
        if args.ema:
            for name in ("netG_A2B", "netG_B2A"):
                average = copy.deepcopy(self.networks()[name])
                self.averages[name] = average.requires_grad_(False).eval()
        if args.compile:
            for net in self.networks().values():
                net.compile()  # in place: the names of the weights stay as they are
        torch.manual_seed(args.seed + rank)  # the same weights, but each rank its own dropout

        batched = args.norm != "batch"  # batch statistics of two kinds of picture must not mix
        self.generators = Generators(self.netG_A2B, self.netG_B2A, batched)
        self.discriminators = Discriminators(self.netD_A, self.netD_B, batched)
        if world > 1:
            on = [device.index] if device.type == "cuda" else None
            self.generators = DistributedDataParallel(self.generators, on)
            self.discriminators = DistributedDataParallel(self.discriminators, on)

        adam = {"lr": args.lr, "betas": (args.beta1, 0.999)}
        adam["fused"] = device.type in ("cpu", "cuda")  # one pass over memory; the same numbers
        self.optimizer_G = torch.optim.Adam(self.generators.parameters(), **adam)
        self.optimizer_D = torch.optim.Adam(self.discriminators.parameters(), **adam)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.buffer_A = ReplayBuffer(args.pool_size, seed=2 * (args.seed + rank))
        self.buffer_B = ReplayBuffer(args.pool_size, seed=2 * (args.seed + rank) + 1)
        self.last_identity = torch.zeros((), device=device)
        self.start_epoch(0)

    def networks(self) -> dict[str, nn.Module]:
        return {
            "netG_A2B": self.netG_A2B,
            "netG_B2A": self.netG_B2A,
            "netD_A": self.netD_A,
            "netD_B": self.netD_B,
        }

    def start_epoch(self, epoch: int) -> None:
        """Set the learning rate of `epoch` (from 0); it depends on nothing that came before."""
        args = self.args
        for optimizer in (self.optimizer_G, self.optimizer_D):
            for group in optimizer.param_groups:  # a resumed run may have other ones
                group.update(initial_lr=args.lr, betas=(args.beta1, 0.999))
            factor = lambda e: utils.lr_factor(args.lr_policy, e, args.n_epochs, args.decay_epoch)
            LambdaLR(optimizer, factor, last_epoch=epoch - 1)  # sets it as it is made

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def generator_losses(self, real_A: torch.Tensor, real_B: torch.Tensor) -> tuple[dict, tuple]:
        """The generators' losses on real pictures (N, C, H, W) and the fakes; paper eq. 1 to 3.

        Least squares against the discriminators (section 4), both cycles (3.2), and identity
        (5.2): a picture that is already of the wanted kind should stay as it is.
        """
        args = self.args
        identity = args.lambda_id > 0 and self.iteration % args.id_every == 0
        with self.autocast():
            drawn = self.generators(real_A, real_B, identity)
            fake_A, fake_B, rec_A, rec_B, idt_A, idt_B = drawn
            score_A, score_B = self.netD_A(fake_A), self.netD_B(fake_B)
        adv_A = gan_loss(score_A, True, args.gan_mode, generator=True)
        adv_B = gan_loss(score_B, True, args.gan_mode, generator=True)
        cycle_A, cycle_B = F.l1_loss(rec_A, real_A), F.l1_loss(rec_B, real_B)
        losses = {"adv": (adv_A + adv_B) / 2, "cycle": (cycle_A + cycle_B) / 2}
        losses["G"] = losses["adv"] + (args.lambda_A * cycle_A + args.lambda_B * cycle_B) / 2
        if identity:  # computed every id_every-th step, as many times as heavy
            losses["identity"] = (F.l1_loss(idt_A, real_A) + F.l1_loss(idt_B, real_B)) / 2
            losses["G"] = losses["G"] + args.lambda_id * args.id_every * losses["identity"]
        return losses, (fake_A.detach(), fake_B.detach())

    def discriminator_losses(self, real_A, fake_A, real_B, fake_B) -> dict:
        """The discriminators' losses on real pictures and on fakes from the buffers."""
        mode = self.args.gan_mode
        with self.autocast():
            scores = self.discriminators(real_A, fake_A, real_B, fake_B)
        on_real_A, on_fake_A, on_real_B, on_fake_B = scores
        D_A = (gan_loss(on_real_A, True, mode) + gan_loss(on_fake_A, False, mode)) / 2
        D_B = (gan_loss(on_real_B, True, mode) + gan_loss(on_fake_B, False, mode)) / 2
        return {"D_A": D_A, "D_B": D_B, "D": (D_A + D_B) / 2}

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One iteration on one pair of batches (real_A, real_B), or on several whose gradients add.

        First the generators against frozen discriminators, then the discriminators against fakes
        old and new (section 4). Gives the mean losses, still on the device: nothing waits for it.
        """
        total, fakes, n = {}, [], len(batches)
        self.discriminators.requires_grad_(False)
        for i, (real_A, real_B) in enumerate(batches):
            with gradients_stay_here(self.generators, i < n - 1):
                losses, fake = self.generator_losses(real_A, real_B)
                self.scaler.scale(losses["G"] / n).backward()
            fakes.append(fake)
            add_losses(total, losses, n)
        self.update(self.optimizer_G)
        self.discriminators.requires_grad_(True)
        for i, ((real_A, real_B), (fake_A, fake_B)) in enumerate(zip(batches, fakes, strict=True)):
            with gradients_stay_here(self.discriminators, i < n - 1):
                old_A, old_B = self.buffer_A.query(fake_A), self.buffer_B.query(fake_B)
                losses = self.discriminator_losses(real_A, old_A, real_B, old_B)
                self.scaler.scale((losses["D_A"] + losses["D_B"]) / n).backward()
            add_losses(total, losses, n)
        self.update(self.optimizer_D)
        self.scaler.update()
        self.average()
        self.iteration += 1
        self.last_identity = total.setdefault("identity", self.last_identity)
        return total

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)
        optimizer.zero_grad()

    def average(self) -> None:
        """Move the averages towards the weights; early on faster, so that they soon mean something.

        The moving average of a generator's weights (Yazici et al. 2019) draws steadier pictures.
        """
        decay = min(self.args.ema, (1 + self.iteration) / (10 + self.iteration))
        for name, average in self.averages.items():
            net = self.networks()[name]
            move = get_ema_multi_avg_fn(decay)
            move(list(average.parameters()), list(net.parameters()), None)
            for old, new in zip(average.buffers(), net.buffers(), strict=True):
                old.copy_(new)

    def best_generators(self) -> dict[str, nn.Module]:
        """The generators to draw with: the moving averages where there are any."""
        return self.averages or {"netG_A2B": self.netG_A2B, "netG_B2A": self.netG_B2A}

    def state_dict(self) -> dict:
        """All that is the same on every rank."""
        return {
            **{name: net.state_dict() for name, net in self.networks().items()},
            **{f"{name}_ema": net.state_dict() for name, net in self.averages.items()},
            "optimizer_G": self.optimizer_G.state_dict(),
            "optimizer_D": self.optimizer_D.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iteration,
            "last_identity": self.last_identity,
        }

    def rank_state(self) -> dict:
        """What each rank has of its own: image buffers and random states."""
        cuda = self.device.type == "cuda"
        return {
            "buffer_A": self.buffer_A.state_dict(),
            "buffer_B": self.buffer_B.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def load_state_dict(self, state: dict, mine: dict) -> None:
        """Undo `state_dict` and `rank_state`; weights and optimizers move to this device."""
        for name, net in self.networks().items():
            net.load_state_dict(state[name])
        for name, net in self.averages.items():  # --ema may be new to the run
            net.load_state_dict(state.get(f"{name}_ema", state[name]))
        self.optimizer_G.load_state_dict(state["optimizer_G"])
        self.optimizer_D.load_state_dict(state["optimizer_D"])
        if state["scaler"]:  # empty if the run was not in fp16 until now
            self.scaler.load_state_dict(state["scaler"])
        self.iteration = state["iteration"]
        self.last_identity = state["last_identity"].to(self.device)
        self.buffer_A.load_state_dict(mine["buffer_A"], self.device)
        self.buffer_B.load_state_dict(mine["buffer_B"], self.device)
        torch.set_rng_state(mine["random"])
        if self.device.type == "cuda" and mine["cuda_random"] is not None:
            torch.cuda.set_rng_state(mine["cuda_random"], self.device)


def gradients_stay_here(net: nn.Module, yes: bool) -> contextlib.AbstractContextManager:
    """Ranks exchange gradients once per step: with the last of the batches that are accumulated."""
    return net.no_sync() if yes and hasattr(net, "no_sync") else contextlib.nullcontext()


def add_losses(total: dict, losses: dict, n: int) -> None:
    for name, value in losses.items():
        total[name] = total.get(name, 0) + value.detach() / n


# ------------------------------------------------------------------------------------------------
# The loop


def load_data(args) -> tuple[datasets.UnpairedImages, tuple[torch.Tensor, torch.Tensor]]:
    """The training set, in memory if it fits, and the pictures that sample grids are made of."""
    skip_log = args.workdir / "logs" / "skipped.txt"
    first, second = "AB" if args.direction == "AtoB" else "BA"
    A = datasets.Domain(args.dataroot, f"train{first}", args.input_nc, args, skip_log)
    B = datasets.Domain(args.dataroot, f"train{second}", args.output_nc, args, skip_log)
    real_A = load_samples(args, f"test{first}", args.input_nc)
    real_B = load_samples(args, f"test{second}", args.output_nc)
    need = A.cache_bytes() + B.cache_bytes()
    share = datasets.free_memory() / 4 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.cache == "on" or (args.cache == "auto" and need < share):
        A.cache()
        B.cache()
    data = datasets.UnpairedImages(A, B, args.size, not args.no_flip, args.seed)
    return data, (real_A, real_B)


def restore(model: CycleGAN, state: dict, rank: int, n_samples: int) -> dict:
    """Put a saved state into the model; gives the place in the run at which it was saved.

    Raises:
        UserError: the state does not fit the model.
    """
    try:
        model.load_state_dict(state, state["ranks"][rank % len(state["ranks"])])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            "cannot resume: the saved state does not fit its own options, so it is damaged or "
            f"from another version ({str(error).splitlines()[-1].strip()})"
        ) from error
    place = {name: state[name] for name in ("epoch", "sample", "seconds", "best")}
    if place["sample"] >= n_samples:  # there are fewer pictures now
        place.update(epoch=place["epoch"] + 1, sample=0)
    return place


def train(args, state: dict | None) -> int:
    """Run from `state` (or from nothing) to the end; returns the exit code."""
    device, dtype, rank, world = utils.setup(args)
    chief = rank == 0

    data, shown = load_data(args)
    model = CycleGAN(args, device, dtype, rank, world)
    place = {"epoch": 0, "sample": 0, "seconds": 0.0, "best": None}
    if state:
        place = restore(model, state, rank, len(data))
    elif args.init_from:
        checkpoint.load_initial(args.init_from, model)
    per_step = args.batch_size * args.accumulate * world  # samples
    n_steps = -(-len(data) // per_step)  # per epoch
    epochs = range(place["epoch"], args.n_epochs)
    sampler = datasets.RunSampler(
        len(data), args.batch_size, per_step, epochs, place["sample"], rank, world
    )
    stop = (
        utils.StopRequest()
    )  # before there are workers, so that a signal does not end them either
    pin = device.type == "cuda"
    batches = iter(datasets.make_loader(data, sampler, args.workers, pin))

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            datasets.to_float(x.to(device, non_blocking=True)).contiguous(
                memory_format=model.layout
            )
            for x in next(batches)
        )

    remaining = max(0, steps_left(place, args.n_epochs, len(data), per_step))
    log = Logger(args, rank, model.iteration, model.iteration + remaining)
    saver = checkpoint.Saver(args, rank, world)
    if chief:
        log.print(
            f"{len(data.A)} pictures of A, {len(data.B)} of B; {args.n_epochs} epochs of {n_steps} "
            f"iterations on {world} x {device.type}, {utils.precision_name(dtype)}"
            f"{', compiled' if args.compile else ''}"
            f"{', pictures in memory' if data.A.cached else ''}"
        )
        if not epochs:
            log.print(f"all {args.n_epochs} epochs are done: a larger --n_epochs extends this run")
    saved = time.time()
    began = saved - place["seconds"]

    def save() -> None:
        nonlocal saved
        saver.save(model, place)
        log.plot()
        saved = time.time()

    try:
        if not state:
            save()
        elif chief:
            # killed right after its last save, a run has not done so yet
            checkpoint.export(args.workdir, {**state, "args": args.options})
        for epoch in epochs:
            model.start_epoch(epoch)
            lr = model.optimizer_G.param_groups[0]["lr"]
            start, waited, fresh = time.time(), 0.0, place["sample"]
            while place["sample"] < len(data):
                before = time.time()
                inputs = [next_batch() for _ in range(args.accumulate)]
                waited += time.time() - before
                losses = model.step(inputs)
                place["sample"] += per_step
                place["seconds"] = time.time() - began
                done = place["sample"] >= len(data)
                log.bar.update()
                if model.iteration % args.log_every == 0 or done:
                    values = read_losses(losses, model.iteration, world)
                    saver.check()
                    log.log_losses(epoch + 1, model.iteration, values, lr, place["seconds"])
                if model.iteration % args.sample_every == 0:
                    log.log_samples(model, shown, "latest")
                due = time.time() - saved > 60 * args.save_minutes
                asked_to_stop, due = agree(world, stop.signal, due)
                if asked_to_stop or done:
                    break
                if due:
                    save()
            if place["sample"] < len(data):
                break  # asked to stop in the middle of an epoch
            seconds, samples = time.time() - start, place["sample"] - fresh
            if chief:
                report_epoch(args, epoch, n_steps, values, lr, log.bar)
                waiting = 100 * waited / max(seconds, 1e-9)
                log.print(
                    f"  {seconds:.1f} s, {samples / max(seconds, 1e-9):.2f} pictures of each "
                    f"domain a second, {waiting:.1f}% of the time waiting for data"
                )
            log.log_samples(model, shown, f"epoch_{epoch + 1:03d}", "latest")
            place.update(epoch=epoch + 1, sample=0)
            if chief and args.eval_every and (epoch + 1) % args.eval_every == 0:
                place["best"] = keep_best(args, model, log, epoch + 1, place["best"])
            save()
            if asked_to_stop:
                break
        number = agree(world, stop.signal)[0]
        if number and place["sample"]:
            save()
        saver.close()  # what is said to be saved is on disk
        agree(world, 0)  # the other ranks wait for it
        if number:
            if chief:
                log.print(
                    f"stopped and saved at epoch {place['epoch'] + 1}, iteration "
                    f"{model.iteration}; go on with --workdir {args.workdir} --resume"
                )
            return 128 + number
        return 0
    finally:
        stop.restore()
        log.close()
        saver.close()


def steps_left(place: dict, n_epochs: int, length: int, per_step: int) -> int:
    rest = -(-(length - place["sample"]) // per_step)
    return rest + (n_epochs - place["epoch"] - 1) * -(-length // per_step)


def agree(world: int, *numbers: int) -> list[int]:
    """The largest of each number over all ranks: what one of them knows, all do together."""
    if world == 1:
        return list(numbers)
    shared = torch.tensor(numbers)
    dist.all_reduce(shared, dist.ReduceOp.MAX)  # a CPU tensor: gloo, so no wait for the GPU
    return shared.tolist()


def read_losses(losses: dict, iteration: int, world: int) -> dict[str, float]:
    """Bring the losses to the host (the only wait for the device), averaged over ranks.

    Raises:
        UserError: one of them is not finite.
    """
    values = torch.stack([value.float() for value in losses.values()])
    if world > 1:
        dist.all_reduce(values)
    told = dict(zip(losses, (values / world).tolist(), strict=True))
    for name, value in told.items():
        if value - value != 0:  # nan or infinite
            raise UserError(
                f"the loss {name} is {value} at iteration {iteration}: the run has diverged; the "
                "last good state is untouched; --resume from it with a lower --lr or --amp off"
            )
    return told


def keep_best(args, model: CycleGAN, log: Logger, epoch: int, best: float | None) -> float | None:
    """Measure on the test split, log it, and keep the best generators in `models/best/`."""
    import test  # test.py, which imports nothing from here

    measures, score = test.measure(args, model.best_generators(), model.device, model.dtype)
    log.log_metrics(epoch, model.iteration, measures)
    if best is not None and score >= best:
        return best
    folder = utils.make_folder(args.workdir / "models" / "best")
    for name, net in model.best_generators().items():
        utils.save_tensors(folder / f"{name}.pth", net.state_dict())
    utils.save_json(folder / "options.json", args.options)
    return score


def report_epoch(args, epoch: int, n_steps: int, values: dict, lr: float, bar: tqdm) -> None:
    rate = bar.format_dict["rate"] or (bar.n - bar.initial) / max(bar.format_dict["elapsed"], 1e-9)
    eta = datetime.timedelta(seconds=round((bar.total - bar.n) / max(rate, 1e-9)))
    bar.write(
        f"[Epoch {epoch + 1}/{args.n_epochs}] [Batch {n_steps}/{n_steps}] "
        f"[D loss: {values['D']:.6f}] [G loss: {values['G']:.6f}, adv: {values['adv']:.6f}, "
        f"cycle: {values['cycle']:.6f}, identity: {values['identity']:.6f}] "
        f"[lr: {lr:.6f}] ETA: {eta}"
    )


# ------------------------------------------------------------------------------------------------
# Options

# small enough for two CPU cores and six minutes; what is typed beside --demo overrides it
DEMO = {"size": 64, "load_size": 72, "ngf": 32, "ndf": 32, "n_residual_blocks": 4}
DEMO |= {"n_epochs": 16, "batch_size": 4, "lr": 4e-4, "id_every": 4}

# what the paper does (section 4 and appendix 7.1) and the defaults or the demo do not
CLASSIC = {"batch_size": 1, "lr": 2e-4, "id_every": 1, "ema": 0.0}


def option(group, names: str, default, words: str, **more) -> None:
    """Add an option whose type is that of its default; False makes a flag."""
    if default is False:
        more["action"] = "store_true"
    elif "type" not in more:
        more["type"] = type(default)
    if default is not None and default is not False:
        words += f" ({default})"
    group.add_argument(*names.split(), default=default, help=words, **more)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python train.py --dataroot FOLDER [options]",
        description="Train CycleGAN on two folders of unpaired pictures.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    g = parser.add_argument_group("run")
    data = Path("dataset/apple2orange")
    option(g, "--dataroot", data, "folder with trainA, trainB, testA, testB")
    option(
        g, "--demo", False, "draw a small set of pictures if need be, and train on it in minutes"
    )
    option(g, "--classic", False, "the paper: --batch_size 1 --lr 2e-4 --id_every 1 --ema 0")
    option(g, "--workdir", Path("."), "where models/, images/, logs/, outputs/, result/ go")
    option(g, "--resume", False, "go on with the run in --workdir")
    option(g, "--restart", False, "overwrite the run in --workdir")
    option(g, "--init_from", None, "folder of weights to start from (fine-tuning)", type=Path)
    option(g, "--seed", 0, "of weights, order and crops")
    option(g, "--save_minutes", 10.0, "save this often within an epoch too")
    option(g, "--log_every", 50, "iterations between rows of logs/losses.csv")
    option(g, "--sample_every", 100, "iterations between images/latest.png")
    option(g, "--eval_every", 0, "epochs between measurements on the test split; 0: never")
    option(g, "--no_tensorboard", False, "write no TensorBoard files")

    g = parser.add_argument_group("schedule")
    policies = ["linear", "step", "cosine", "constant"]
    option(g, "--n_epochs", 200, "epochs in all")
    option(g, "--decay_epoch", None, "lr falls from here on; step: every so many (half)", type=int)
    option(g, "--lr_policy", "linear", "how the learning rate falls", choices=policies)
    option(g, "--lr", 2e-4, "learning rate of Adam")
    option(g, "--beta1", 0.5, "first momentum of Adam")
    option(g, "--batch_size --batchSize", 1, "pictures of each domain at a time")
    option(g, "--accumulate", 1, "batches whose gradients are added up for one iteration")

    g = parser.add_argument_group("objective")
    modes = ["lsgan", "vanilla", "hinge", "l1"]
    option(g, "--gan_mode", "lsgan", "adversarial loss", choices=modes)
    option(g, "--lambda_cyc", 10.0, "weight of the cycle loss")
    option(g, "--lambda_A", None, "the same for A -> B -> A alone (lambda_cyc)", type=float)
    option(g, "--lambda_B", None, "the same for B -> A -> B alone (lambda_cyc)", type=float)
    option(g, "--lambda_id", 5.0, "weight of the identity loss; 0: not computed")
    option(g, "--id_every", 1, "identity loss every K-th iteration, K times as heavy")
    option(g, "--pool_size", 50, "fakes kept for each discriminator; 0: none")
    option(g, "--ema", 0.998, "moving average of the generators' weights; 0: none")

    g = parser.add_argument_group("pictures")
    ways = ["resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"]
    option(g, "--preprocess", ways[0], "how a picture is brought to size", choices=ways)
    option(g, "--load_size", 286, "what it is resized to")
    option(g, "--size --crop_size", 256, "what is cropped from it")
    option(g, "--no_flip", False, "no random horizontal flips")
    option(g, "--direction", "AtoB", "BtoA swaps the two folders", choices=["AtoB", "BtoA"])
    option(g, "--input_nc", 3, "channels of A: 1 grey (8 or 16 bits), 3 RGB, n from .npy files")
    option(g, "--output_nc", 3, "channels of B")
    option(g, "--cache", "auto", "decoded pictures in memory", choices=["auto", "on", "off"])
    workers = min(4, os.cpu_count() or 1)
    option(g, "--workers --n_cpu", workers, "processes that decode what is not in memory")

    g = parser.add_argument_group("networks")
    generators = ["resnet_9blocks", "resnet_6blocks", "unet_256", "unet_128"]
    judges = ["basic", "n_layers", "pixel", "strided"]
    inits = ["normal", "xavier", "kaiming", "orthogonal"]
    option(g, "--netG", generators[0], "generator", choices=generators)
    option(g, "--n_residual_blocks", None, "instead of the 9 or 6 that --netG says", type=int)
    option(g, "--ngf", 64, "width of the generators")
    option(g, "--upsample", "deconv", "nearest: no checkerboards", choices=["deconv", "nearest"])
    option(g, "--dropout", False, "dropout in the generators' middle layers")
    option(g, "--netD", "basic", "discriminator; basic: 70x70 PatchGAN", choices=judges)
    option(g, "--n_layers_D", 3, "stride-2 layers of --netD n_layers")
    option(g, "--ndf", 64, "width of the discriminators")
    option(g, "--norm", "instance", "normalisation", choices=["instance", "batch", "none"])
    option(g, "--init_type", "normal", "how first weights are drawn", choices=inits)
    option(g, "--init_gain", 0.02, "their scale")

    g = utils.add_device_options(parser)
    option(g, "--compile", False, "torch.compile the networks: minutes once, then faster on a GPU")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a run; `given` names those that were typed."""
    parser, untyped = make_parser(), object()
    args = parser.parse_args(argv)
    marked = argparse.Namespace(**dict.fromkeys(vars(args), untyped))
    typed = vars(parser.parse_args(argv, marked))
    args.given = [name for name in typed if typed[name] is not untyped]
    if args.classic:  # as if these had been typed, so that a resume takes them too
        preset = {k: v for k, v in CLASSIC.items() if k not in args.given}
        vars(args).update(preset)
        args.given += preset
    if args.demo:
        preset = {"dataroot": args.workdir / "dataset" / "demo", **DEMO}
        vars(args).update({k: v for k, v in preset.items() if k not in args.given})
    return args


# what a resume cannot change, because the saved weights would not fit or would mean something else
FIXED = ("netG", "n_residual_blocks", "ngf", "upsample", "norm", "dropout", "netD", "n_layers_D")
FIXED += ("ndf", "input_nc", "output_nc", "direction")


def resume(args: argparse.Namespace, state: dict) -> argparse.Namespace:
    """The run's own options, but for those typed again; says which changed.

    Raises:
        UserError: an option that the saved weights depend on was typed with another value.
    """
    run = argparse.Namespace(**{**vars(args), **state["args"]})
    for name in ("dataroot", "init_from"):
        setattr(run, name, Path(vars(run)[name]) if vars(run)[name] else None)
    for name in args.given:
        old, new = vars(run)[name], vars(args)[name]
        if old != new and name in FIXED:
            raise UserError(
                f"--{name} is {old} in the run in {args.workdir} and cannot become {new}: its "
                "weights would not fit; start another run in another --workdir"
            )
        if old != new and name not in ("workdir", "resume"):
            print(f"--{name} is now {new} (the run had {old})")
        setattr(run, name, new)
    run.workdir, run.given, run.resume, run.restart = args.workdir, args.given, True, False
    return run


def fill_in(args: argparse.Namespace) -> None:
    """Set the options that follow others unless they were typed."""
    if args.decay_epoch is None:
        args.decay_epoch = args.n_epochs // 2
    args.lambda_A = args.lambda_cyc if args.lambda_A is None else args.lambda_A
    args.lambda_B = args.lambda_cyc if args.lambda_B is None else args.lambda_B


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is done.

    Raises:
        UserError: says which, and what would do.
    """
    positive = ("n_epochs", "batch_size", "accumulate", "size", "load_size", "ngf", "ndf")
    positive += ("log_every", "sample_every", "id_every", "input_nc", "output_nc", "n_layers_D")
    for name in positive:
        if vars(args)[name] < 1:
            raise UserError(f"--{name} is {vars(args)[name]}, but must be at least 1")
    for name in ("workers", "pool_size", "eval_every", "lambda_id", "lr", "seed"):
        if vars(args)[name] < 0:
            raise UserError(f"--{name} is {vars(args)[name]}, but must not be negative")
    if not 0 <= args.ema < 1:
        raise UserError(f"--ema is {args.ema}, but must be at least 0 and below 1")
    if args.lr_policy == "linear" and not 0 <= args.decay_epoch < args.n_epochs:
        raise UserError(
            f"--decay_epoch {args.decay_epoch} is not before the end: choose one from 0 to "
            f"{args.n_epochs - 1} (--n_epochs is {args.n_epochs})"
        )
    if args.preprocess.endswith("_and_crop") and args.size > args.load_size:
        raise UserError(
            f"--size {args.size} cannot be cropped from pictures of --load_size {args.load_size}: "
            "make --load_size at least as large"
        )
    multiple = {"unet_256": 256, "unet_128": 128}.get(args.netG, 4)
    least = {"basic": 24, "pixel": 16, "strided": 32}  # so that the last normed map is not 1x1
    least = least.get(args.netD, max(16, 3 * 2**args.n_layers_D))
    if args.size % multiple or args.size < least:
        raise UserError(
            f"--size is {args.size}, but --netG {args.netG} needs a multiple of {multiple} and "
            f"--netD {args.netD} at least {least}"
        )
    if args.preprocess in ("none", "scale_width") and args.batch_size > 1:
        raise UserError(
            f"--preprocess {args.preprocess} keeps pictures of different sizes, which do not go "
            "into one batch: use --batch_size 1 (and --accumulate)"
        )
    if args.preprocess in ("none", "scale_width") and multiple > 4:
        raise UserError(
            f"--preprocess {args.preprocess} leaves sizes that --netG {args.netG} cannot halve: "
            f"use --preprocess crop or scale_width_and_crop with --size {multiple}"
        )
    if args.input_nc != args.output_nc and args.lambda_id > 0:
        raise UserError(
            f"the identity loss needs equal channels, but --input_nc is {args.input_nc} and "
            f"--output_nc {args.output_nc}: add --lambda_id 0"
        )


def main(args: argparse.Namespace) -> int:
    """Train as the options say; returns 0, or 130 / 143 after Ctrl-C / SIGTERM."""
    models, state = args.workdir / "models", None
    chief = int(os.environ.get("RANK", 0)) == 0
    if args.resume and args.restart:
        raise UserError("--resume and --restart are opposites: give one of them")
    if args.resume:
        state = checkpoint.load_run(args.workdir)
        args = resume(args, state)
    elif any(models.glob("train_state*.pth")) and chief and not args.restart:
        raise UserError(
            f"{models} already holds a run: --resume goes on with it, --restart overwrites it, "
            "another --workdir leaves it alone"
        )
    args.options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("given", "resume", "restart", "workdir", "options")
    }
    fill_in(args)
    check_options(args)
    if args.demo and chief and not args.dataroot.exists():
        draw_demo(args.dataroot)
    for split in ("trainA", "trainB", *(("testA", "testB") if args.eval_every else ())):
        datasets.find_split(args.dataroot, split)
    for name in ("dataset", "models", "images", "logs", "outputs", "result"):
        folder = utils.make_folder(args.workdir / name)
        if chief:
            utils.remove_temporary_files(folder)
    if args.restart and chief:
        checkpoint.clear_run(args.workdir)
    advice = "lower --size, --batch_size or --ngf, try --amp auto, or --accumulate small batches"
    with utils.explain_out_of_memory(advice):
        code = train(args, state)
    if args.demo and code == 0:
        import test  # test.py, which imports nothing from here

        code = test.main(test.parse_args(["--workdir", str(args.workdir)]))
    return code


if __name__ == "__main__":
    utils.run(main, parse_args())
