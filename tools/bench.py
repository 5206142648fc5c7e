"""How fast this repository trains and translates on the device at hand, beside the plain way.

    python -m tools.bench               a table: the plain step beside the tuned one, then inference
    python -m tools.bench --lever       what each lever adds alone
    python -m tools.bench --data        the loader alone

"Plain" is the iteration of the classic scripts: float32, one network call at a time, the losses
read at every step. "Tuned" is what train.py and test.py do. The two run in turn (plain, tuned,
plain, ...), each in a process of its own, so that neither sees the other's memory or settings.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import datasets
import train
import utils
from models import Discriminator, init_weights, make_generator, translate
from utils import ReplayBuffer, UserError

# ------------------------------------------------------------------------------------------------
# The plain step


class Plain:
    """Four networks, three optimizers, and the iteration written out call by call in float32."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        """`args`: the options of train.py."""
        torch.manual_seed(args.seed)
        self.args = args
        self.netG_A2B, self.netG_B2A = (
            init_weights(make_generator(args.netG, 3, 3, ngf=args.ngf)).to(device) for _ in range(2)
        )
        self.netD_A, self.netD_B = (
            init_weights(Discriminator(3, args.ndf)).to(device) for _ in range(2)
        )
        adam = lambda *nets: torch.optim.Adam(
            chain(*(net.parameters() for net in nets)), args.lr, (args.beta1, 0.999)
        )
        self.optimizer_G = adam(self.netG_A2B, self.netG_B2A)
        self.optimizer_D_A, self.optimizer_D_B = adam(self.netD_A), adam(self.netD_B)
        self.buffer_A, self.buffer_B = ReplayBuffer(args.pool_size), ReplayBuffer(args.pool_size)

    def step(self, real_A: torch.Tensor, real_B: torch.Tensor) -> dict[str, float]:
        """One iteration on real pictures (N, 3, H, W) in [-1, 1]; gives the losses."""
        args = self.args
        self.optimizer_G.zero_grad()
        idt_A, idt_B = self.netG_B2A(real_A), self.netG_A2B(real_B)
        identity = (F.l1_loss(idt_A, real_A) + F.l1_loss(idt_B, real_B)) / 2
        fake_B, fake_A = self.netG_A2B(real_A), self.netG_B2A(real_B)
        score_A, score_B = self.netD_A(fake_A), self.netD_B(fake_B)
        adv_A = F.mse_loss(score_A, torch.ones_like(score_A))
        adv_B = F.mse_loss(score_B, torch.ones_like(score_B))
        adv = (adv_A + adv_B) / 2
        rec_A, rec_B = self.netG_B2A(fake_B), self.netG_A2B(fake_A)
        cycle = (F.l1_loss(rec_A, real_A) + F.l1_loss(rec_B, real_B)) / 2
        loss_G = adv + args.lambda_cyc * cycle + args.lambda_id * identity
        loss_G.backward()
        self.optimizer_G.step()
        loss_D_A = self.judge(self.netD_A, self.optimizer_D_A, real_A, self.buffer_A.query(fake_A))
        loss_D_B = self.judge(self.netD_B, self.optimizer_D_B, real_B, self.buffer_B.query(fake_B))
        losses = {"G": loss_G, "adv": adv, "cycle": cycle, "identity": identity}
        losses |= {"D_A": loss_D_A, "D_B": loss_D_B}
        return {name: value.item() for name, value in losses.items()}

    @staticmethod
    def judge(netD, optimizer, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        on_real, on_fake = netD(real), netD(fake)
        loss_real = F.mse_loss(on_real, torch.ones_like(on_real))
        loss = (loss_real + F.mse_loss(on_fake, torch.zeros_like(on_fake))) / 2
        loss.backward()
        optimizer.step()
        return loss


# ------------------------------------------------------------------------------------------------
# What is measured: plain, tuned, or the step of train.py with one lever alone


def levers(task: str, device: torch.device, dtype: torch.dtype | None) -> list[str]:
    """The levers that make sense on a device, in the order of their rows."""
    names = ["batched", "fused"] if task == "train" else []
    names += ["amp"] if dtype else []
    names += ["cudnn_benchmark", "tf32"] if device.type == "cuda" else []
    return [*names, "channels_last", "compile"]


def is_compiled(case: argparse.Namespace) -> bool:
    if case.name == "tuned":
        return case.task == "train" and case.compile  # test.py compiles nothing
    return case.name == "compile"


def set_backends(case: argparse.Namespace) -> None:
    """What utils.set_backends does for the tuned step; plain is float32 to the last bit."""
    if case.name == "tuned":
        utils.set_backends(case.device, case.dtype)
        return
    torch.backends.cudnn.benchmark = case.name == "cudnn_benchmark"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case.name == "tf32"


def make_step(case: argparse.Namespace) -> Callable[[], object]:
    """What a case is, as a function to be timed: a step, a translation, or a matrix product."""
    set_backends(case)
    torch.manual_seed(0)
    if case.task == "matmul":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.name, torch.float32)
        a, b = torch.randn(2, case.size, case.size, device=case.device).to(dtype)
        return lambda: a @ b
    x, y = torch.rand(2, case.batch, 3, case.size, case.size, device=case.device) * 2 - 1
    return make_training(case, x, y) if case.task == "train" else make_translation(case, x)


def make_training(case: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> Callable:
    words = ["--ngf", str(case.ngf), "--ndf", str(case.ngf)]
    words += [] if case.name == "tuned" else ["--ema", "0"]
    options = train.parse_args(words + (["--compile"] if is_compiled(case) else []))
    train.fill_in(options)
    if case.name == "plain":
        plain = Plain(options, case.device)
        return lambda: plain.step(x, y)
    dtype = case.dtype if case.name in ("tuned", "amp") else None
    model = train.CycleGAN(options, case.device, dtype)
    if case.name != "tuned":
        use_one_lever(model, case.name)
    x, y = (t.contiguous(memory_format=model.layout) for t in (x, y))
    return lambda: model.step([(x, y)])


def use_one_lever(model: train.CycleGAN, name: str) -> None:
    """Undo what train.CycleGAN chose for the device, but for the lever `name`."""
    model.layout = torch.channels_last if name == "channels_last" else torch.contiguous_format
    for net in model.networks().values():
        net.to(memory_format=model.layout)
    model.generators.batched = model.discriminators.batched = name == "batched"
    adam = {"lr": model.args.lr, "betas": (model.args.beta1, 0.999), "fused": name == "fused"}
    model.optimizer_G = torch.optim.Adam(model.generators.parameters(), **adam)
    model.optimizer_D = torch.optim.Adam(model.discriminators.parameters(), **adam)


def make_translation(case: argparse.Namespace, x: torch.Tensor) -> Callable:
    layout = torch.channels_last if case.name == "channels_last" else torch.contiguous_format
    layout = utils.memory_layout(case.device) if case.name == "tuned" else layout
    net = init_weights(make_generator("resnet_9blocks", 3, 3, ngf=case.ngf)).eval()
    net.to(case.device, memory_format=layout)
    if is_compiled(case):
        net.compile()
    x = x.contiguous(memory_format=layout)
    if case.name == "plain":
        return torch.no_grad()(lambda: net(x))
    dtype = case.dtype if case.name in ("tuned", "amp") else None
    return lambda: translate(net, x, dtype)


def count_flops(task: str, size: int, ngf: int) -> int:
    """Floating point operations that one picture (of each domain) needs; a MAC is two.

    An iteration is six passes of a generator forwards, and backwards for two passes' worth each;
    two passes of a discriminator for the generators, which need its input's gradient alone, and
    four for itself. What plain spends on gradients that nobody uses does not count as useful.
    """
    flops = []
    with torch.device("meta"):
        x = torch.empty(1, 3, size, size)
        for net in (make_generator("resnet_9blocks", 3, 3, ngf=ngf), Discriminator(3, ngf)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                net(x)
            flops.append(counter.get_total_flops())
    netG, netD = flops
    return 6 * 3 * netG + (2 * 2 + 4 * 3) * netD if task == "train" else netG


# ------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(step: Callable[[], object], n: int, device: torch.device) -> float:
    """Seconds for `n` calls, until the device has done them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n):
        step()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes: tensors on a GPU since the last reset, elsewhere the whole of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(pipe, case: argparse.Namespace) -> None:
    """The process of one case: for each n received, take n steps; send (seconds, peak bytes)."""
    step = None
    with contextlib.suppress(EOFError):  # the other end was closed: done
        while n := pipe.recv():
            try:
                with utils.explain_out_of_memory("a smaller batch needs less"):
                    step = step or make_step(case)
                    if case.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(case.device)
                    seconds = timed(step, n, case.device)
            except UserError as error:
                pipe.send(str(error))
                return
            pipe.send((seconds, peak_memory(case.device)))


@contextlib.contextmanager
def started(case: argparse.Namespace) -> Iterator[Callable[[int], tuple[float, int]]]:
    """Yield a function that has `n` steps taken in the case's own process.

    It gives (seconds, peak bytes) and raises UserError if the process is out of memory or dead.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share our memory and GPU
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, case))
    process.start()
    theirs.close()

    def ask(n: int) -> tuple[float, int]:
        try:
            ours.send(n)
            answer = ours.recv()
        except (EOFError, OSError) as error:
            raise UserError(f"{case.name} died (out of memory, or see above)") from error
        if isinstance(answer, str):
            raise UserError(f"{case.name}: {answer}")
        return answer

    try:
        yield ask
    finally:
        ours.close()
        process.join()


def measure(cases: list[argparse.Namespace], rounds: int, steps: int) -> list[dict]:
    """Run the cases in turn; gives for each the median seconds per step, start-up seconds, bytes.

    Start-up is what the first calls took longer than later ones: compiling, mostly.
    """
    with contextlib.ExitStack() as stack:
        asks = [stack.enter_context(started(case)) for case in cases]
        quick = cases[0].device.type == "cpu" and not any(is_compiled(case) for case in cases)
        warm_up = 1 if quick else 3  # shapes seen for a second time may be compiled again
        first = [ask(warm_up)[0] for ask in asks]
        turns = [[ask(steps) for ask in asks] for _ in range(rounds)]
    results = []
    for i, warm in enumerate(first):
        seconds = statistics.median(turn[i][0] for turn in turns) / steps
        start_up = max(0.0, warm - warm_up * seconds)
        results.append({"s": seconds, "start_up": start_up, "bytes": turns[-1][i][1]})
    return results


def matmul_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product: what the device can do at best."""
    n, repeat = (8192, 10) if device.type == "cuda" else (2048, 1)
    case = argparse.Namespace(task="matmul", name=precision, device=device, dtype=None, size=n)
    with started(case) as ask:
        seconds = min([ask(repeat)[0] / repeat for _ in range(10)][2:])
    return 2 * n**3 / seconds


# ------------------------------------------------------------------------------------------------
# The table


def precision_of(case: argparse.Namespace) -> str:
    if case.name in ("tuned", "amp"):
        return utils.precision_name(case.dtype)
    return "tf32" if case.name == "tf32" else "float32"


def print_row(*cells) -> None:
    widths = (9, 15, 9, 4, 5, 8, 8, 8, 8, 8, 7)
    print("| " + " | ".join(f"{c!s:<{w}}" for c, w in zip(cells, widths, strict=True)) + " |")
    sys.stdout.flush()


def compare(args, device: torch.device, dtype: torch.dtype | None, rates: dict) -> None:
    """Print rows for each size and batch, training first: plain, tuned, then single levers."""
    print_row(
        *("task", "step", "precision", "size", "batch", "s/step", "images/s"),
        *("peak GB", "of rate", "start-up", "speed"),
    )
    print_row(*["---"] * 11)
    for task in ("train", "translate"):
        names = ["tuned"] + (levers(task, device, dtype) if args.lever else [])
        for size in args.sizes:
            for batch in args.batches:
                flops = count_flops(task, size, args.ngf) * batch
                shared = {"device": device, "dtype": dtype, "ngf": args.ngf, "size": size}
                shared |= {"batch": batch, "task": task, "compile": args.compile}
                for name in names:
                    cases = [argparse.Namespace(name=n, **shared) for n in ("plain", name)]
                    compare_pair(args, cases, flops, rates)


def compare_pair(args, cases: list[argparse.Namespace], flops: int, rates: dict) -> None:
    """Measure plain and another way in turn; plain has a row beside tuned only."""
    try:
        results = measure(cases, args.rounds, args.steps)
    except UserError as error:
        other = cases[1]
        print_row(other.task, other.name, "", other.size, other.batch, error, *[""] * 5)
        return
    for case, result in zip(cases, results, strict=True):
        if case.name == "plain" and cases[1].name != "tuned":
            continue
        precision, seconds = precision_of(case), result["s"]
        if precision not in rates:
            rates[precision] = matmul_rate(case.device, precision)
        print_row(
            *(case.task, case.name, precision, case.size, case.batch),
            *(f"{seconds:.4f}", f"{case.batch / seconds:.2f}", f"{result['bytes'] / 1e9:.2f}"),
            f"{100 * flops / seconds / rates[precision]:.0f}%",
            *(f"{result['start_up']:.1f} s", f"{results[0]['s'] / seconds:.2f}x"),
        )


# ------------------------------------------------------------------------------------------------
# The loader alone


def draw_pictures(dataroot: Path, n: int, listed: int) -> None:
    """Make `n` smooth pictures of 256x256 in trainA and in trainB, and `listed` names in manyA."""
    rng = np.random.default_rng(0)
    for split in ("trainA", "trainB", "manyA"):
        (dataroot / split).mkdir()
    for split in ("trainA", "trainB"):
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(
                dataroot / split / f"{i:06}.jpg", quality=90
            )
    for i in range(listed):  # listing opens no file but the first, so all can be the same one
        os.link(dataroot / "trainA" / "000000.jpg", dataroot / "manyA" / f"{i:07}.jpg")


LOADER_SECONDS = 4.0


def loader_rate(dataset: datasets.UnpairedImages, workers: int) -> float:
    """Pairs a second at batch 1, after the first."""
    sampler = datasets.RunSampler(len(dataset), 1, 1, range(10**9))
    batches = iter(datasets.make_loader(dataset, sampler, workers, pin=False))
    next(batches)
    n, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < LOADER_SECONDS:
        next(batches)
        n += 1
    return n / spent


def bench_data(args, dataroot: Path, scratch: Path) -> None:
    """Print start-up time and memory of a domain, and pictures a second with and without cache."""
    options = train.parse_args(["--size", str(args.sizes[-1])])
    options.load_size = round(options.size * 286 / 256)
    load = lambda split: datasets.Domain(dataroot, split, 3, options, scratch / "skipped.txt")
    many = "manyA" if (dataroot / "manyA").exists() else "trainA"
    start = time.perf_counter()
    load(many)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    domain = load(many)
    size = tracemalloc.get_traced_memory()[0] - domain.first.nbytes
    tracemalloc.stop()
    print(f"listing {len(domain)} files: {seconds:.2f} s, {size / len(domain):.0f} bytes a file")
    A, B = load("trainA"), load("trainB")
    data = datasets.UnpairedImages(A, B, options.size)
    print("\n| loader | size | pictures/s |\n|---|---|---|")
    for workers in sorted({0, args.workers}):
        rate = 2 * loader_rate(data, workers)
        print(f"| not cached, {workers} workers | {options.size} | {rate:.0f} |", flush=True)
    if A.cache_bytes() + B.cache_bytes() > datasets.free_memory() / 4:
        return  # as --cache auto decides
    start = time.perf_counter()
    A.cache()
    B.cache()
    filling = time.perf_counter() - start
    rate = 2 * loader_rate(data, 0)
    print(f"| cached (filled in {filling:.1f} s) | {options.size} | {rate:.0f} |")


# ------------------------------------------------------------------------------------------------
# The script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed and memory on this device.")
    group = parser.add_argument_group("what")
    group.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="(128 256)")
    group.add_argument("--batches", type=int, nargs="+", help="(1 4 16; on a CPU 1 2)")
    group.add_argument("--lever", action="store_true", help="rows of what each lever adds alone")
    group.add_argument("--compile", action="store_true", help="tuned is train.py with --compile")
    group.add_argument("--ngf", type=int, default=64, help="width of all networks (64)")
    group = parser.add_argument_group("how long")
    group.add_argument("--rounds", type=int, help="turns of each, median taken (7; on a CPU 3)")
    group.add_argument("--steps", type=int, help="steps in a turn (20; on a CPU 1)")
    group = parser.add_argument_group("data")
    group.add_argument("--data", action="store_true", help="measure the loader, nothing else")
    group.add_argument("--dataroot", type=Path, help="folder of trainA and trainB (drawn here)")
    workers = min(4, os.cpu_count() or 1)
    group.add_argument("--workers", type=int, default=workers, help=f"loading ones ({workers})")
    utils.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        UserError: a number that cannot be.
    """
    device, dtype, _, _ = utils.setup(args)
    on_cpu = device.type == "cpu"
    args.batches = args.batches or ([1, 2] if on_cpu else [1, 4, 16])
    args.steps = args.steps if args.steps is not None else 1 if on_cpu else 20
    args.rounds = args.rounds if args.rounds is not None else 3 if on_cpu else 7
    if min(*args.batches, args.steps, args.rounds, args.ngf) < 1:
        raise UserError("--batches, --steps, --rounds and --ngf must be at least 1")
    if any(size % 4 or size < 32 for size in args.sizes):
        raise UserError(f"--sizes are {args.sizes}, but must be multiples of 4, at least 32")
    print(f"{utils.describe(device)}, {torch.get_num_threads()} threads\n")
    if args.data:
        with tempfile.TemporaryDirectory() as folder:
            if not args.dataroot:
                draw_pictures(Path(folder), n=200, listed=20_000)
            bench_data(args, args.dataroot or Path(folder), Path(folder))
        return
    rates = {}
    compare(args, device, dtype, rates)
    told = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
    print(f"\nMeasured rate of a matrix product, GFLOP/s: {told}.")
    memory = "tensors" if device.type == "cuda" else "the whole process"
    print(f"Peak memory is of {memory}; speed is plain's seconds over the row's, in turn.")


if __name__ == "__main__":
    utils.run(main, parse_args())
