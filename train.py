"""Train CycleGAN on two folders of unpaired pictures (Zhu, Park, Isola, Efros 2017).

    python train.py --dataroot dataset/apple2orange --cuda
    python train.py --quick --dataroot dataset/mine
    torchrun --nproc_per_node=4 train.py --dataroot dataset/apple2orange

From top to bottom: the losses and the step (class CycleGAN), the loop, what happens around it. The
options are in lib/options.py.
"""

import argparse
import copy
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import datasets
import utils
from lib import checkpoint, devices, processes, schedule, validation, weights
from lib.augment import augment, disturb, mean_of_views
from lib.logger import Logger
from lib.options import QUICK_ITERATIONS, check_options, check_saved, parse_args
from lib.replay import ReplayBuffer
from lib.scenes import background_colors, log_density, other_scenes, unchanged
from models import Discriminator, init_weights, make_generator
from tools.demo import draw_demo
from utils import UserError

# ------------------------------------------------------------------------------------------------
# Losses and the step

LOSSES = ("D", "D_A", "D_B", "G", "adv", "cycle", "identity", "change")


def gan_loss(score: torch.Tensor, real: bool, mode: str, generator: bool = False) -> torch.Tensor:
    """The loss of scores (N, 1, h, w) that should say "real" or "fake", patch by patch.

    lsgan is the paper's (section 4, after Mao et al. 2017): squared distance to 1 or 0. Only hinge
    differs between the players: the generator's score has no margin.
    """
    if mode == "hinge":
        return -score.mean() if generator else F.relu(1 - score if real else 1 + score).mean()
    target = torch.full_like(score, float(real))
    if mode == "vanilla":
        return F.binary_cross_entropy_with_logits(score, target)
    return F.mse_loss(score, target) if mode == "lsgan" else F.l1_loss(score, target)


def map_for(args, device: torch.device, dtype: torch.dtype | None) -> Callable:
    """The `map` that calls both directions: on a CPU in two threads, each with half of the cores.

    Not where threads would share what they change: running statistics, the random numbers of
    dropout, torch.compile, the scale of float16.
    """
    n, shared = torch.get_num_threads(), args.norm == "batch" or args.dropout or args.compile
    if device.type != "cpu" or n == 1 or shared or dtype == torch.float16:
        return map
    return ThreadPoolExecutor(2, "direction", torch.set_num_threads, (n // 2,)).map


class CycleGAN:
    """Four networks, their optimizers and buffers; `step` is one iteration of training."""

    def __init__(self, args, device: torch.device, dtype=None, rank=0, world_size=1):
        """`args`: the options of `parse_args`; `dtype`: autocast precision, None for float32."""
        self.args, self.device, self.dtype = args, device, dtype
        self.rank, self.world_size = rank, world_size
        self.iteration, self.layout = 0, devices.memory_layout(device)
        self.batched = args.norm != "batch"  # batch statistics of two kinds of picture must not mix
        self.map = map_for(args, device, dtype)
        torch.manual_seed(args.seed)
        names = ("ngf", "n_residual_blocks", "norm", "upsample", "dropout", "keep_source")
        options = {name: vars(args)[name] for name in names}
        self.netG_A2B = make_generator(args.netG, args.input_nc, args.output_nc, **options)
        self.netG_B2A = make_generator(args.netG, args.output_nc, args.input_nc, **options)
        # channel norm in D too made all translations one even gray (docs/experiments.md)
        norm_D = "instance" if args.norm in ("channel", "mixed") else args.norm
        options = {"netD": args.netD, "n_layers_D": args.n_layers_D, "norm": norm_D}
        self.netD_A = Discriminator(args.input_nc, args.ndf, **options)
        self.netD_B = Discriminator(args.output_nc, args.ndf, **options)
        for net in self.networks().values():
            init_weights(net, args.init_type, args.init_gain)
            net.to(device, memory_format=self.layout)
        torch.manual_seed(args.seed + rank)  # the same weights, but each rank its own dropout
        self.averages = copy.deepcopy(self.generators()) if args.ema else {}
        teaching = args.lambda_keep or args.refine_epochs
        self.initial = copy.deepcopy(self.generators()) if teaching else {}
        self.refining, self.colors = False, {}  # by --refine_epochs; the `background_colors`
        for net in (*self.averages.values(), *self.initial.values()):
            net.requires_grad_(False).eval()
        if args.compile:
            for net in self.networks().values():
                net.compile(dynamic=False)  # in place: the names of the weights stay

        adam = {"lr": args.lr, "betas": (args.beta1, args.beta2)}
        adam["fused"] = device.type in ("cpu", "cuda")  # one pass over memory; the same numbers
        self.params_G = [*self.netG_A2B.parameters(), *self.netG_B2A.parameters()]
        self.params_D = [*self.netD_A.parameters(), *self.netD_B.parameters()]
        self.optimizer_G = torch.optim.Adam(self.params_G, **adam)
        self.optimizer_D = torch.optim.Adam(self.params_D, **adam)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.buffer_A = ReplayBuffer(args.pool_size, seed=2 * (args.seed + rank))
        self.buffer_B = ReplayBuffer(args.pool_size, seed=2 * (args.seed + rank) + 1)
        for p in self.params_G + self.params_D:
            p.grad = torch.zeros_like(p)  # `step` adds to it
        self.identity = torch.zeros((), device=device)  # the last identity loss computed
        self.loss_sums, self.n_summed = torch.zeros(len(LOSSES), device=device), 0

    def networks(self) -> dict[str, nn.Module]:
        return {name: vars(self)[name] for name in ("netG_A2B", "netG_B2A", "netD_A", "netD_B")}

    def generators(self) -> dict[str, nn.Module]:
        return {name: vars(self)[name] for name in ("netG_A2B", "netG_B2A")}

    def best_generators(self) -> dict[str, nn.Module]:
        """The moving averages where there are any, else the generators; not compiled."""
        return self.averages or {name: copy.copy(net) for name, net in self.generators().items()}

    def forward_pair(self, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple:
        """net(x) and net(y), in one batch where that computes the same: it is faster."""
        if self.batched and x.shape == y.shape:
            return net(torch.cat([x, y])).chunk(2)
        return net(x), net(y)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def generator_loss(
        self,
        netG: nn.Module,
        back: Callable,
        netD: Callable,
        source: torch.Tensor,
        target: torch.Tensor,
        lambda_cyc: float,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The loss of one direction on real pictures (N, C, H, W), its parts, and the fakes.

        `netG` translates `source`, `back` the other way, `netD` knows `target` from fakes.
        Paper eq. 1 to 3: least squares against the discriminator of the target (section 4), the
        cycle there and back (3.2), and identity (5.2): a picture that is already of the wanted
        kind should stay as it is. Both directions' mean is what is minimized. `--id_every` K
        computes identity in each K-th iteration only, with K times the weight. `--detach_cycle`:
        the cycle loss has no gradient in the first of its two generators, which would learn to
        hide in the translation what the way back needs (Chu et al. 2017); it trains the second
        one on pairs of a translation and its real source (back-translation, Lample et al. 2018).
        """
        args, idt = self.args, None
        with self.autocast():
            if args.lambda_id > 0 and self.iteration % args.id_every == 0:
                fake, idt = self.forward_pair(netG, source, target)
            else:
                fake = netG(source)
            rec = back(fake.detach() if args.detach_cycle else fake)
            score = netD(fake)
        adv = gan_loss(score, True, args.gan_mode, generator=True)
        cycle = F.l1_loss(rec, source)
        loss = adv + lambda_cyc * cycle
        parts = {"adv": adv, "cycle": cycle, "G": loss, "change": torch.zeros_like(loss)}
        if idt is not None:
            parts["identity"] = F.l1_loss(idt, target)
            loss = loss + args.lambda_id * args.id_every * parts["identity"]
        if fake.shape == source.shape:  # mean |G(x) - x| in gray levels of 255
            parts["change"] = 127.5 * F.l1_loss(fake.detach(), source)
        return loss / 2, parts, fake

    def discriminator_loss(
        self, netD: Callable, real: torch.Tensor, fake: torch.Tensor
    ) -> torch.Tensor:
        """The loss of one discriminator on real pictures and fakes from its buffer."""
        with self.autocast():
            real_score, fake_score = self.forward_pair(netD, real, fake)
        mode = self.args.gan_mode
        return (gan_loss(real_score, True, mode) + gan_loss(fake_score, False, mode)) / 2

    def direction(self, name, netG, back, netD, buffer, source, target, lambda_cyc) -> tuple:
        """The losses of one direction, the parameters they train, and their gradients.

        First the generators against the frozen discriminator, then the discriminator against
        fakes old and new (section 4). `--lambda_views_A2B` holds a generator to what its moving
        average makes of the source turned and mirrored (mean teacher, Tarvainen & Valpola 2017),
        `--lambda_keep` to the source where the generator that the run began with leaves it as it
        is: what a short run keeps a long one would change, to show what discriminators know.
        """
        if self.refining:
            return self.refine(name, netG, buffer, source)
        args, lambda_views = self.args, vars(self.args)[f"lambda_views_{name}"]
        score = lambda x: netD(augment(x, args.augment_D, buffer.random))
        way_back = lambda x: back(disturb(x, args.augment_cycle, buffer.random))
        netD.requires_grad_(False)
        loss, parts, fake = self.generator_loss(netG, way_back, score, source, target, lambda_cyc)
        if lambda_views:
            with self.autocast():
                mean = mean_of_views(self.averages[f"netG_{name}"], source, buffer.random)
            views = lambda_views * F.l1_loss(fake, mean)
            loss, parts["G"] = loss + views / 2, parts["G"] + views
        if args.lambda_keep:
            with torch.no_grad(), self.autocast():
                mask = unchanged(self.initial[f"netG_{name}"](source), source)
            keep = args.lambda_keep * (mask * (fake - source).abs()).mean()
            loss, parts["G"] = loss + keep / 2, parts["G"] + keep
        grads = torch.autograd.grad(self.scaler.scale(loss), self.params_G)
        netD.requires_grad_(True)
        parts["D"] = self.discriminator_loss(score, target, buffer.query(fake))
        params_D = list(netD.parameters())
        grads += torch.autograd.grad(self.scaler.scale(parts["D"]), params_D)
        parts = {name: value.detach() for name, value in parts.items()}
        return parts, self.params_G + params_D, grads

    def start_refining(self) -> None:
        """Let the generators go on from their averages, and learn from these as they are now."""
        for name, net in self.best_generators().items():
            self.initial[name].load_state_dict(net.state_dict())
            self.networks()[name].load_state_dict(net.state_dict())

    def refine(self, name, netG, buffer, source) -> tuple:
        """`direction` in --refine_epochs: the same translation in another light and place.

        A small set shows few lights and backgrounds; here the generator learns from translations
        of its own what it makes of them elsewhere (noisy student, Xie et al. 2020).
        """
        with torch.no_grad(), self.autocast():
            fake = self.initial[f"netG_{name}"](source)
        source, wanted = other_scenes(source, fake, self.colors[name], buffer.random)
        with self.autocast():
            fake = netG(source)
        loss, params = F.l1_loss(fake, wanted), list(netG.parameters())
        parts = dict.fromkeys(("D", "adv", "cycle", "identity"), torch.zeros_like(loss))
        parts |= {"G": loss.detach(), "change": 127.5 * F.l1_loss(fake.detach(), source)}
        return parts, params, torch.autograd.grad(self.scaler.scale(loss), params)

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One iteration on a batch (real_A, real_B), or on several whose gradients are averaged.

        Returns the mean losses, still on the device: nothing waits for it. The log's identity
        loss is the last one computed.
        """
        args, parts = self.args, []
        A2B, B2A = (self.netG_A2B, self.netG_B2A), (self.netG_B2A, self.netG_A2B)
        for A, B in batches:
            directions = (
                ("A2B", *A2B, self.netD_B, self.buffer_B, A, B, args.lambda_A),
                ("B2A", *B2A, self.netD_A, self.buffer_A, B, A, args.lambda_B),
            )
            for one, params, grads in self.map(self.direction, *zip(*directions, strict=True)):
                parts.append(one)
                for p, grad in zip(params, grads, strict=True):
                    p.grad.add_(grad, alpha=1 / len(batches))
        trained = [(self.optimizer_G, self.params_G)]
        if not self.refining:
            trained.append((self.optimizer_D, self.params_D))
        for optimizer, params in trained:
            self.average_gradients(params)
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
        self.scaler.update()
        self.update_averages()
        self.iteration += 1
        losses = {name: sum(one[name] for one in parts) / len(parts) for name in parts[0]}
        for name, each in (("D_B", parts[::2]), ("D_A", parts[1::2])):
            losses[name] = sum(one["D"] for one in each) / len(each)
        self.identity = losses.setdefault("identity", self.identity)
        losses["G"] = losses["G"] + args.lambda_id * self.identity
        self.loss_sums += torch.stack([losses[name] for name in LOSSES])
        self.n_summed += 1
        return losses

    def average_gradients(self, params: list[nn.Parameter]) -> None:
        """Average the gradients over all ranks."""
        if self.world_size > 1:
            flat = torch.cat([p.grad.flatten() for p in params])
            dist.all_reduce(flat)
            for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad.copy_(grad.view_as(p) / self.world_size)

    @torch.no_grad()
    def update_averages(self) -> None:
        """Move the averages towards the weights; early on faster, so that they soon mean something.

        The moving average of a generator's weights (Yazici et al. 2019) gives steadier pictures.
        """
        update = get_ema_multi_avg_fn(
            min(self.args.ema, (1 + self.iteration) / (10 + self.iteration))
        )
        for name, average in self.averages.items():
            net = self.networks()[name]
            update(list(average.parameters()), list(net.parameters()), None)
            for old, new in zip(average.buffers(), net.buffers(), strict=True):
                old.copy_(new)

    def mean_losses(self) -> dict[str, float]:
        """Mean losses since the last call, over iterations and ranks: the only wait for the device.

        Raises UserError if one of them is not finite.
        """
        means = self.loss_sums / self.n_summed / self.world_size
        if self.world_size > 1:
            dist.all_reduce(means)
        self.loss_sums, self.n_summed = torch.zeros_like(self.loss_sums), 0
        losses = dict(zip(LOSSES, means.tolist(), strict=True))
        for name, value in losses.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the loss {name} is {value} at iteration {self.iteration}: the run has "
                    "diverged; the last good state is untouched; --resume from it with a lower "
                    "--lr or --amp off"
                )
        return losses

    def parts(self) -> dict:
        """All that has a state and is the same on every rank, by its name in a checkpoint."""
        averages = {f"{name}_ema": net for name, net in self.averages.items()}
        averages |= {f"{name}_initial": net for name, net in self.initial.items()}
        parts = {"optimizer_G": self.optimizer_G, "optimizer_D": self.optimizer_D}
        return {**self.networks(), **averages, **parts, "scaler": self.scaler}


# ------------------------------------------------------------------------------------------------
# The loop


def train(args, state: dict | None, after_evaluation: Callable | None = None) -> int:
    """Run from `state` (or from nothing) to the end; returns the exit code. See `main`."""
    one_size = args.preprocess not in ("none", "scale_width")
    rank, world_size = processes.join_processes()
    device, dtype = devices.setup(args, fixed_sizes=one_size)
    data = load_data(args)
    model = CycleGAN(args, device, dtype, rank, world_size)
    progress = {"epoch": 0, "sample": 0, "seconds": 0.0, "best": None}
    if state:
        checkpoint.restore(model, state)
        progress = {name: state[name] for name in progress}
    elif args.init_from:
        weights.load_initial(args.init_from, model)
    per_step = args.batch_size * args.accumulate * world_size  # samples
    n_steps = math.ceil(len(data) / per_step)  # in an epoch
    n_epochs = args.n_epochs + args.refine_epochs
    epochs = range(progress["epoch"], n_epochs)
    sampler = datasets.RunSampler(
        len(data), args.batch_size, per_step, epochs, progress["sample"], rank, world_size
    )
    stop = processes.StopRequest()  # before workers start, so that signals do not end them
    loader = iter(datasets.make_loader(data, sampler, args.workers, device.type == "cuda"))

    def next_batch(scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = (datasets.to_float(x.to(device, non_blocking=True)) for x in next(loader))
        pair = (F.avg_pool2d(x, scale) if scale > 1 else x for x in pair)
        return tuple(x.contiguous(memory_format=model.layout) for x in pair)  # real_A, real_B

    remaining = len(epochs) * n_steps - progress["sample"] // per_step
    log = Logger(args, rank, model.iteration, remaining)
    with stop, log, processes.WriterThread() as writer:
        log.print(
            f"{len(data.A)} pictures of A, {len(data.B)} of B; {n_epochs} epochs of {n_steps} "
            f"iterations on {world_size} x {device.type}, {devices.precision_name(dtype)}"
            + ", compiled" * args.compile
            + ", pictures in memory" * bool(data.A.cached)
        )
        if not epochs:
            log.print(f"all {n_epochs} epochs are done: a larger --n_epochs extends this run")
        if args.refine_epochs:
            A, B = log_density(data.A), log_density(data.B)
            model.colors = {"A2B": background_colors(B, A), "B2A": background_colors(A, B)}
        stopping, saved, began = 0, time.time(), time.time() - progress["seconds"]
        if not state:
            checkpoint.save(model, progress, writer)
        for epoch, sample in sampler.steps():
            done = epoch + sample / len(data)  # epochs, with their fraction
            lr, scale = schedule.at(args, done)
            for group in (*model.optimizer_G.param_groups, *model.optimizer_D.param_groups):
                group["lr"] = lr
            model.refining = epoch >= args.n_epochs
            if (epoch, sample) == (args.n_epochs, 0):
                log.print("from here on: the same translations in other light, --refine_epochs")
                model.start_refining()
            start = time.time()
            batches = [next_batch(scale) for _ in range(args.accumulate)]
            log.waited += time.time() - start
            model.step(batches)
            log.bar.update()

            last = sample + per_step >= len(data)  # of the epoch
            progress |= {"epoch": epoch, "sample": sample + per_step}
            progress["seconds"] = time.time() - began
            if model.iteration % args.log_every == 0 or last:
                losses = model.mean_losses()
                row = {"epoch": epoch + 1, "iteration": model.iteration, **losses, "lr": lr}
                log.log("losses", {**row, "seconds": progress["seconds"]})
                log.check_change(model.iteration, losses["change"])
            # an epoch shorter than --sample_every has a grid only if one is due, or as the last
            grid = last and (n_steps >= args.sample_every or epoch + 1 == n_epochs)
            drawn = grid or model.iteration % args.sample_every == 0
            if drawn:
                log.log_samples(model, "latest", *([f"epoch_{epoch + 1:03d}"] if last else []))
            if last:
                log.log_epoch(epoch + 1, n_steps, per_step, losses, lr)
                progress |= {"epoch": epoch + 1, "sample": 0}
                if args.eval_every and (epoch + 1) % args.eval_every == 0:
                    progress["best"] = evaluate(model, log, epoch + 1, progress["best"])
                    if after_evaluation:
                        after_evaluation(model, epoch + 1)
            stopping, due = stop.agree(time.time() - saved > 60 * args.save_minutes)
            if last or due or stopping:
                checkpoint.save(model, progress, writer)
                saved = time.time()
            if drawn or stopping:
                log.plot()
            if stopping:
                break
        writer.wait()
        processes.all_ranks(True)  # all is on disk
        if stopping:  # signals are still caught: torchrun sends them again
            log.print(
                f"stopped and saved at epoch {progress['epoch'] + 1}, iteration {model.iteration}; "
                f"go on with --workdir {args.workdir} --resume"
            )
    return 128 + stopping if stopping else 0


# ------------------------------------------------------------------------------------------------
# Before, after and beside the loop

FOLDERS = ("dataset", "models", "images", "logs", "outputs", "result")  # in --workdir


def load_data(args) -> datasets.UnpairedImages:
    """The training set, in memory if it fits."""
    domains, skip_log, options = [], args.workdir / "logs" / "skipped.txt", vars(args)
    channels, folders = (args.input_nc, args.output_nc), args.direction.split("to")
    for name, n_channels, folder in zip("AB", channels, folders, strict=True):
        aside, limits = validation.held_out(args.dataroot, name, options), f"range_{name}"
        where = (args.dataroot, f"train{folder}")
        domain = datasets.Domain(*where, n_channels, args, skip_log, options[limits], aside)
        # the values that test.py returns to
        options[limits] = args.options[limits] = domain.limits and list(domain.limits)
        domains.append(domain)
    share = devices.free_memory() / 4 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fits = sum(domain.cache_bytes() for domain in domains) < share
    if args.cache == "on" or (args.cache == "auto" and fits):
        for domain in domains:
            domain.cache()
    return datasets.UnpairedImages(*domains, args.size, not args.no_flip, args.seed)


def evaluate(model: CycleGAN, log: Logger, epoch: int, best: float | None) -> float:
    """Measure on unseen pictures, keep the best generators in models/best/; the best score yet."""
    args, nets, options = model.args, model.best_generators(), vars(model.args)
    pairs = validation.find_pictures(args.dataroot, options)
    metrics, score = validation.measure(nets, pairs, options, model.device, model.dtype)
    log.log("metrics", {"epoch": epoch, "iteration": model.iteration, **metrics})
    if best is not None and score >= best:
        return best
    if model.rank == 0:
        folder = utils.make_folder(args.workdir / "models" / "best")
        checkpoint.export(folder, {k: net.state_dict() for k, net in nets.items()}, args.options)
    return score


def prepare(args: argparse.Namespace, saved: dict | None) -> argparse.Namespace:
    """Check and complete the options, draw the demo set, make the folders and clean them up."""
    if saved is not None:
        check_saved(args, saved)
    elif not args.restart and checkpoint.exists(args.workdir):
        raise UserError(
            f"{args.workdir / 'models'} already holds a run: --resume goes on with it, --restart "
            "overwrites it, another --workdir leaves it alone"
        )
    if args.demo and not args.dataroot.exists():
        draw_demo(args.dataroot)
    unset = [name for name in QUICK_ITERATIONS if vars(args)[name] is None]
    if unset:
        folders = [datasets.find_split(args.dataroot, split) for split in ("trainA", "trainB")]
        n = max(len(datasets.list_images(folder)) for folder in folders)
        for name in unset:
            n_epochs = max(1, round(QUICK_ITERATIONS[name] * args.batch_size / n))
            if name == "refine_epochs" and {args.input_nc, args.output_nc} != {3}:
                n_epochs = 0  # it is for RGB pictures
            vars(args)[name] = args.options[name] = n_epochs
    if args.decay_epoch is None:
        args.decay_epoch = int(args.n_epochs * max(0.5, args.half_size))
    check_options(args)
    if args.lambda_keep and saved is None and not args.init_from:
        raise UserError(
            "--lambda_keep keeps what trained generators keep: add --init_from FOLDER, or give it "
            "to the --resume of a run"
        )
    for split in ("trainA", "trainB"):
        datasets.find_split(args.dataroot, split)
    for name in FOLDERS:
        utils.remove_temporary_files(utils.make_folder(args.workdir / name))
    if args.restart and saved is None:
        checkpoint.clear_run(args.workdir)
    return args


def main(args: argparse.Namespace, after_evaluation: Callable | None = None) -> int:
    """Train as the options say; returns 0, or 130 / 143 after Ctrl-C / SIGTERM.

    `after_evaluation(model, epoch)` is called every `--eval_every` epochs (by tools/study.py).
    """
    (rank, _), state, saved = processes.join_processes(), None, None
    auto = args.resume == "auto" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if args.resume is True or (auto and processes.on_main(lambda: checkpoint.exists(args.workdir))):
        state = checkpoint.load_run(args.workdir, rank)
        saved = state["args"]
        args = parse_args(args.argv, saved)
        half = saved.get("half_size", 0)
        longer = args.n_epochs > saved["n_epochs"] <= state["epoch"]
        if longer and args.half_size == half:  # a run that ended at full size goes on at it
            args.half_size *= saved["n_epochs"] / args.n_epochs
            args.options["half_size"] = args.half_size
    args = processes.on_main(lambda: prepare(args, saved))
    for name in FOLDERS:  # where the first rank's disk is not this one's
        utils.make_folder(args.workdir / name)
    advice = "lower --size, --batch_size or --ngf, try --amp auto, or --accumulate small batches"
    with utils.explain_out_of_memory(advice):
        code = train(args, state, after_evaluation)
    if args.demo and code == 0 and rank == 0:
        test = [sys.executable, Path(__file__).with_name("test.py"), "--workdir", args.workdir]
        ranks = ("RANK", "SLURM_STEP_NUM_TASKS")
        alone = {name: value for name, value in os.environ.items() if name not in ranks}
        code = subprocess.run(test, env=alone).returncode
    return code


if __name__ == "__main__":
    utils.run(main, parse_args())
