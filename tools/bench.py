"""Measure the speed of training and translation on this device, beside the plain way.

    python -m tools.bench                        plain PyTorch and ours, training, then translation
    python -m tools.bench --each                 what each optimization adds alone
    python -m tools.bench --data dataset/demo    the loader alone

"plain" is the iteration of the classic scripts with PyTorch's defaults (on a GPU, convolutions in
TF32), "strict" the same in strict float32, "ours" what train.py and test.py do. Plain and another
run in turn, each in its own process, so that neither sees the other's memory or settings.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import datasets
import train
import utils
from lib import devices
from lib.replay import ReplayBuffer
from models import Discriminator, init_weights, make_generator, translate
from utils import UserError

LOADER_SECONDS = 4.0  # of measuring, for each row of --data


class Plain:
    """Four networks, three optimizers, and the iteration of CycleGAN call by call, in float32.

    The reference for the speed of train.py, and for its results in the tests.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        """`args`: the options of train.py."""
        torch.manual_seed(args.seed)
        self.args = args
        nets = [make_generator(args.netG, 3, 3, ngf=args.ngf) for _ in "AB"]
        nets += [Discriminator(3, args.ndf) for _ in "AB"]
        nets = [init_weights(net).to(device) for net in nets]
        self.netG_A2B, self.netG_B2A, self.netD_A, self.netD_B = nets
        adam = lambda params: torch.optim.Adam(params, args.lr, (args.beta1, args.beta2))
        self.optimizer_G = adam([*self.netG_A2B.parameters(), *self.netG_B2A.parameters()])
        self.optimizer_D_A = adam(self.netD_A.parameters())
        self.optimizer_D_B = adam(self.netD_B.parameters())
        self.buffer_A, self.buffer_B = ReplayBuffer(args.pool_size), ReplayBuffer(args.pool_size)

    def step(self, real_A: torch.Tensor, real_B: torch.Tensor) -> dict[str, float]:
        """One iteration on real pictures (N, 3, H, W) in [-1, 1]; returns the losses."""
        args = self.args
        gan_loss = lambda score, label: F.mse_loss(score, torch.full_like(score, label))
        self.optimizer_G.zero_grad()
        idt_A, idt_B = self.netG_B2A(real_A), self.netG_A2B(real_B)
        identity = (F.l1_loss(idt_A, real_A) + F.l1_loss(idt_B, real_B)) / 2
        fake_B, fake_A = self.netG_A2B(real_A), self.netG_B2A(real_B)
        adv = (gan_loss(self.netD_A(fake_A), 1) + gan_loss(self.netD_B(fake_B), 1)) / 2
        rec_A, rec_B = self.netG_B2A(fake_B), self.netG_A2B(fake_A)
        cycle = (F.l1_loss(rec_A, real_A) + F.l1_loss(rec_B, real_B)) / 2
        loss_G = adv + args.lambda_cyc * cycle + args.lambda_id * identity
        loss_G.backward()
        self.optimizer_G.step()
        losses = {"G": loss_G, "adv": adv, "cycle": cycle, "identity": identity}
        for name, netD, optimizer, real, fake in (
            ("D_A", self.netD_A, self.optimizer_D_A, real_A, self.buffer_A.query(fake_A)),
            ("D_B", self.netD_B, self.optimizer_D_B, real_B, self.buffer_B.query(fake_B)),
        ):
            optimizer.zero_grad()
            losses[name] = (gan_loss(netD(real), 1) + gan_loss(netD(fake), 0)) / 2
            losses[name].backward()
            optimizer.step()
        return {name: value.item() for name, value in losses.items()}


# ------------------------------------------------------------------------------------------------
# What is measured


@dataclass(frozen=True)
class Case:
    """One thing to measure: plain, strict, ours, or plain with one of `optimizations` alone."""

    task: str  # train or translate
    name: str
    device: torch.device
    size: int
    batch: int = 1
    dtype: torch.dtype | None = None  # of autocast, where it is used
    ngf: int = 64
    compile: bool = False  # of ours


def optimizations(case: Case) -> list[str]:
    names = ["batched", "fused"] if case.task == "train" else []
    names += ["threads"] if case.task == "train" and case.device.type == "cpu" else []
    names += ["amp"] if case.dtype else []
    names += ["benchmark"] if case.device.type == "cuda" else []
    return [*names, "channels_last", "compile"]


def precision_of(case: Case) -> str:
    if case.name in ("ours", "amp"):
        return devices.precision_name(case.dtype)
    return "tf32" if case.device.type == "cuda" and case.name != "strict" else "float32"


@functools.cache
def make_step(case: Case) -> Callable[[], object]:
    """Return the function to time: a training step or a translation."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = case.name != "strict"  # PyTorch's default is True
    torch.backends.cudnn.benchmark = case.name == "benchmark"
    ours, plain = case.name == "ours", case.name in ("plain", "strict")
    compiled = case.name == "compile" or (ours and case.compile)
    dtype = case.dtype if case.name in ("ours", "amp") else None
    layout = torch.channels_last if case.name == "channels_last" else torch.contiguous_format
    if ours:
        devices.set_backends(case.device, dtype)
        layout = devices.memory_layout(case.device)
    x, y = torch.rand(2, case.batch, 3, case.size, case.size, device=case.device) * 2 - 1
    x, y = (t.contiguous(memory_format=layout) for t in (x, y))
    if case.task == "translate":
        net = init_weights(make_generator("resnet_9blocks", 3, 3, ngf=case.ngf)).eval()
        net.to(case.device, memory_format=layout)
        if compiled:
            net.compile()
        return torch.no_grad()(lambda: net(x) if plain else translate(net, x, dtype))
    options = f"--ngf {case.ngf} --ndf {case.ngf}" + " --ema 0" * (not ours)
    args = train.parse_args((options + " --compile" * compiled).split())
    if plain:
        return functools.partial(Plain(args, case.device).step, x, y)
    model = train.CycleGAN(args, case.device, dtype)
    if not ours:
        keep_one(model, case.name)
    return functools.partial(model.step, [(x, y)])


def keep_one(model: train.CycleGAN, name: str) -> None:
    """Undo what CycleGAN chose for the device, except for the optimization `name`."""
    model.batched, args = name == "batched", model.args
    model.map = model.map if name == "threads" else map
    layout = torch.channels_last if name == "channels_last" else torch.contiguous_format
    for net in model.networks().values():
        net.to(memory_format=layout)
    adam = {"lr": args.lr, "betas": (args.beta1, args.beta2), "fused": name == "fused"}
    model.optimizer_G = torch.optim.Adam(model.params_G, **adam)
    model.optimizer_D = torch.optim.Adam(model.params_D, **adam)


def count_flops(task: str, size: int, ngf: int) -> int:
    """Return the floating point operations for one picture (of each domain); a MAC is two.

    An iteration is six passes of a generator forwards, and backwards for two passes' worth each;
    two passes of a discriminator for the generators, which need its input's gradient alone, and
    four for itself. Gradients that plain computes and nobody uses are not counted.
    """
    flops = []
    with torch.device("meta"), torch.no_grad():
        for net in (make_generator("resnet_9blocks", 3, 3, ngf=ngf), Discriminator(3, ngf)):
            with FlopCounterMode(display=False) as counter:
                net(torch.empty(1, 3, size, size))
            flops.append(counter.get_total_flops())
    netG, netD = flops
    return 6 * 3 * netG + (2 * 2 + 4 * 3) * netD if task == "train" else netG


# ------------------------------------------------------------------------------------------------
# Measuring


def time_steps(step: Callable[[], object], n: int, device: torch.device) -> float:
    """Return the seconds that n steps take."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(n):
        step()
    wait()
    return time.perf_counter() - start


def run_steps(case: Case, n: int) -> tuple[float, int]:
    """Take n steps in this process; returns seconds and the peak bytes of memory.

    The bytes are of tensors on a GPU, elsewhere of the whole process.
    """
    with utils.explain_out_of_memory("a smaller batch needs less"):
        seconds = time_steps(make_step(case), n, case.device)
    if case.device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(case.device)
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(cases: list[Case], rounds: int, steps: int) -> list[tuple[float, float, int]]:
    """Run cases in turn; returns for each the seconds of a step, of the first step, and bytes.

    Raises UserError if a case ran out of memory, or its process died.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would share our memory and GPU
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in cases]
        turns = []
        try:
            for n in [1, *[steps] * rounds]:
                jobs = zip(pools, cases, strict=True)
                turns.append([pool.submit(run_steps, case, n).result() for pool, case in jobs])
        except BrokenProcessPool as error:
            raise UserError("a process died: out of memory, or see above") from error
    results = []
    for first, *rest in zip(*turns, strict=True):
        seconds = statistics.median(seconds for seconds, _ in rest) / steps
        results.append((seconds, first[0], rest[-1][1]))
    return results


@functools.cache
def matmul_rate(device: torch.device, precision: str) -> float:
    """Return the operations per second of a large matrix product: the most the device can do."""
    n, steps = (8192, 10) if device.type == "cuda" else (2048, 1)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 * steps / min(time_steps(lambda: a @ a, steps, device) for _ in range(5))


# ------------------------------------------------------------------------------------------------
# The command


def print_row(*cells) -> None:
    print("| " + " | ".join(f"{cell!s:<9}" for cell in cells) + " |", flush=True)


def compare(args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> None:
    """Print a row for each task, size, batch and way; each way is measured in turn with plain."""
    head = ("task", "step", "precision", "size", "batch", "s/step", "images/s", "peak GB")
    head += ("first s", "of matmul rate", "speed")
    print_row(*head)
    print_row(*["---"] * len(head))
    for task, size, batch in product(("train", "translate"), args.sizes, args.batches):
        plain = Case(task, "plain", device, size, batch, dtype, args.ngf, args.compile)
        ways = (["strict"] if device.type == "cuda" else []) + ["ours"]
        ways += optimizations(plain) if args.each else []
        for way in ways:
            cases = [plain, replace(plain, name=way)]
            try:
                results = measure(cases, args.rounds, args.steps)
            except UserError as error:
                print_row(task, way, "", size, batch, error, *[""] * 5)
                continue
            for case, (seconds, first, memory) in zip(cases, results, strict=True):
                if case == plain and way != ways[0]:
                    continue  # plain has its row, beside the first way
                rate = matmul_rate(device, precision_of(case))
                share = count_flops(task, size, args.ngf) * batch / seconds / rate
                print_row(
                    *(task, case.name, precision_of(case), size, batch, f"{seconds:.4f}"),
                    *(f"{batch / seconds:.2f}", f"{memory / 1e9:.2f}", f"{first:.1f}"),
                    *(f"{share:.0%} of {rate / 1e9:.0f} GFLOP/s", f"{results[0][0] / seconds:.2f}"),
                )
    memory = "tensors" if device.type == "cuda" else "the whole process"
    print(f"\npeak GB: of {memory}; first s: the first step, with compiling and searching;")
    print("speed: plain's seconds, measured in turn with the row's, over the row's")


def bench_data(dataroot: Path, size: int) -> None:
    """Print the pictures per second that the loader gives at batch 1, from disk and from memory."""
    args = train.parse_args(["--size", str(size), "--load_size", str(round(size * 286 / 256))])
    A, B = (datasets.Domain(dataroot, f"train{x}", 3, args, Path(os.devnull)) for x in "AB")
    data = datasets.UnpairedImages(A, B, size)
    sampler = datasets.RunSampler(len(data), 1, 1, range(10**9))
    print("| loader | size | pictures/s |\n|---|---|---|")
    for way, workers in (("not cached", 0), ("not cached", args.workers), ("cached", 0)):
        start = time.perf_counter()
        if way == "cached":
            A.cache()
            B.cache()
            way += f" (filled in {time.perf_counter() - start:.1f} s)"
        batches = iter(datasets.make_loader(data, sampler, workers, pin=False))
        next(batches)
        n, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < LOADER_SECONDS:
            next(batches)
            n += 2
        print(f"| {way}, {workers} workers | {size} | {n / spent:.0f} |")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed and memory on this device.")
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[128, 256], help="(128 256)")
    add("--batches", type=int, nargs="+", help="(1 4 16; on a CPU 1 2)")
    add("--each", action="store_true", help="rows of what each optimization adds alone")
    add("--compile", action="store_true", help="ours is train.py with --compile")
    add("--ngf", type=int, default=64, help="width of all networks (64)")
    add("--rounds", type=int, help="turns of each, of which the median is taken (7; on a CPU 3)")
    add("--steps", type=int, help="steps in a turn (20; on a CPU 1)")
    add("--data", type=Path, metavar="DIR", help="measure the loader alone, on a data set")
    devices.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the table; raises UserError if a number is out of range."""
    device, dtype = devices.setup(args)
    for name, gpu, cpu in (("batches", [1, 4, 16], [1, 2]), ("rounds", 7, 3), ("steps", 20, 1)):
        if vars(args)[name] is None:
            vars(args)[name] = cpu if device.type == "cpu" else gpu
    if min(*args.batches, args.steps, args.rounds, args.ngf) < 1:
        raise UserError("--batches, --steps, --rounds and --ngf must be at least 1")
    if any(size % 4 or size < 32 for size in args.sizes):
        raise UserError(f"--sizes are {args.sizes}, but must be multiples of 4, at least 32")
    print(f"{devices.describe(device)}, {torch.get_num_threads()} threads\n")
    if args.data:
        bench_data(args.data, args.sizes[-1])
    else:
        compare(args, device, dtype)


if __name__ == "__main__":
    utils.run(main, parse_args())
