"""Check this device in under ten minutes: exactness, resume, waits, launches, speed, restarts.

    python -m tools.gpu_check
    python -m tools.gpu_check --device cpu --size 32 --ngf 4 --batches 1 --rounds 1

On a CPU, whatever needs a GPU is skipped, and memory formats are compared instead of devices. Each
row is a line of result/gpu_check.jsonl as soon as it is known; result/gpu_check.md is their table.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import train
import utils
from lib import checkpoint
from tools import bench

NHWC, NCHW = torch.channels_last, torch.contiguous_format
CPU = torch.device("cpu")
SMALL = "--size 32 --load_size 36 --ngf 4 --ndf 4 --n_residual_blocks 1 --pool_size 4"


class Report:
    """Rows of the report: written as lines of JSON at once, as a Markdown table by `close`."""

    def __init__(self, folder: Path):
        self.folder, self.rows = utils.make_folder(folder), []
        (folder / "gpu_check.jsonl").unlink(missing_ok=True)

    def add(self, check: str, case: str, ok: bool | None, **figures) -> None:
        """Add a row; `ok` is None where there is nothing to pass or fail."""
        row = {"check": check, "case": case, "ok": ok, **figures}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        with open(self.folder / "gpu_check.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self, head: str) -> None:
        lines = [head, "", "| check | case | result | figures |", "|---|---|---|---|"]
        for row in self.rows:
            figures = ", ".join(f"{name} {value}" for name, value in list(row.items())[3:])
            result = {True: "ok", False: "**FAILED**", None: ""}[row["ok"]]
            lines.append(f"| {row['check']} | {row['case']} | {result} | {figures} |")
        (self.folder / "gpu_check.md").write_text("\n".join(lines) + "\n")


def make_model(options: str, device: torch.device, dtype=None, layout=None) -> train.CycleGAN:
    """train.py's model; its weights in another memory format than the device's, if one is given."""
    utils.set_backends(device, dtype)
    model = train.CycleGAN(train.parse_args(options.split()), device, dtype)
    model.layout = layout or model.layout
    for net in (*model.networks().values(), *model.averages.values()):
        net.to(memory_format=model.layout)
    return model


def make_batch(model: train.CycleGAN, n: int, height: int, width: int, seed: int) -> tuple:
    """The same random pictures (n, 3, height, width) in [-1, 1] on every device: real_A, real_B."""
    x = torch.rand(2, n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return tuple(t.to(model.device).contiguous(memory_format=model.layout) for t in x)


def take_steps(model: train.CycleGAN, steps: int, n: int, first: int = 0) -> torch.Tensor:
    """Losses (steps, losses) of iterations on n pictures, the same in each call."""
    rows = []
    for i in range(first, first + steps):
        width = 32 + 4 * (i % 3) * (model.args.preprocess == "none")
        seeds = [100 * i + j for j in range(model.args.accumulate)]
        losses = model.step([make_batch(model, n, 32, width, seed) for seed in seeds])
        rows.append(torch.stack([losses[name].detach().float().cpu() for name in train.LOSSES]))
    return torch.stack(rows)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of a - b over the norm of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def moments(model: train.CycleGAN, name: str) -> list[torch.Tensor]:
    """Adam's moments of each weight, on the host."""
    optimizers = (model.optimizer_G, model.optimizer_D)
    return [m[name].cpu() for optimizer in optimizers for m in optimizer.state.values()]


# ------------------------------------------------------------------------------------------------
# Exactness and resume


def check_steps(report: Report, device: torch.device) -> None:
    """Five steps on the device, weights laid out as on a GPU, against float32 on the CPU."""
    cases = {  # options, dtype, largest relative error of losses and of the gradient
        "float32": ("", None, 1e-3, 1e-3),
        "bf16": ("", torch.bfloat16, 0.01, 0.5),
        "fp16": ("", torch.float16, 0.01, 0.5),
        "batch norm": ("--norm batch", None, 1e-3, 1e-2),
        "accumulate 2": ("--accumulate 2", None, 1e-3, 1e-3),
        "own sizes": ("--preprocess none", None, 1e-3, 1e-3),
    }
    # PyTorch's CPU gradient of instance norm is wrong for one picture in channels_last (2.15)
    n = 2 if device.type == "cpu" else 1
    for case, (options, dtype, *most) in cases.items():
        reference = make_model(f"{SMALL} {options}", CPU, layout=NCHW)
        model = make_model(f"{SMALL} {options}", device, dtype, NHWC)
        if dtype == torch.float16:  # a scale at which no step is skipped
            model.scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        losses, wanted = take_steps(model, 1, n), take_steps(reference, 1, n)
        ours, theirs = (
            torch.cat([m.flatten() for m in moments(net, "exp_avg")]) for net in (model, reference)
        )
        losses = torch.cat([losses, take_steps(model, 4, n, first=1)])
        wanted = torch.cat([wanted, take_steps(reference, 4, n, first=1)])
        gradient, loss = difference(ours, theirs), difference(losses, wanted)
        ok = loss <= most[0] and gradient <= most[1]
        report.add("step", case, ok, loss=f"{loss:.1e}", gradient=f"{gradient:.1e}")


def move(model: train.CycleGAN, device: torch.device, layout) -> train.CycleGAN:
    """Save the model to a file, and load the file into another one."""
    file = io.BytesIO()
    torch.save(checkpoint.copy_to_host(checkpoint.gather_state(model)), file)
    file.seek(0)
    moved = make_model(SMALL, device, layout=layout)
    checkpoint.restore(moved, torch.load(file, weights_only=True))
    return moved


def check_resume(report: Report, device: torch.device) -> None:
    """Save on one device and resume on another: the same moments, weight by weight, and losses."""
    here, there = ("CPU", "GPU") if device.type == "cuda" else ("NCHW", "NHWC")
    places = {here: (CPU, NCHW), there: (device, NHWC)}
    for source, target in ((there, there), (there, here), (here, there)):
        model = make_model(SMALL, places[source][0], layout=places[source][1])
        take_steps(model, 3, 2)
        moved = move(model, *places[target])
        same = all(
            torch.equal(a, b)
            for name in ("exp_avg", "exp_avg_sq")
            for a, b in zip(moments(model, name), moments(moved, name), strict=True)
        )
        states = (*moved.optimizer_G.state.items(), *moved.optimizer_D.state.items())
        strides = all(m["exp_avg"].stride() == weight.stride() for weight, m in states)
        loss = difference(take_steps(moved, 5, 2, first=3), take_steps(model, 5, 2, first=3))
        figures = {"moments_equal": same, "strides_equal": strides, "loss": f"{loss:.1e}"}
        ok = same and strides and loss <= 1e-3
        report.add("resume", f"{source} to {target}", ok, **figures)


# ------------------------------------------------------------------------------------------------
# Waits, launches, speed


def check_waits(report: Report, device: torch.device) -> None:
    """20 steps with full buffers must not wait for the GPU once."""
    model = make_model(SMALL, device, utils.pick_precision("auto", device))
    batch = make_batch(model, 1, 32, 32, 0)
    for _ in range(12):
        model.step([batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            model.step([batch])
        report.add("waits", "20 steps", True)
    except RuntimeError as error:
        report.add("waits", "20 steps", False, error=str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


KINDS = {  # words in the names of kernels (GPU) or operations (CPU), the first that fits counts
    "layout": ("nchwtonhwc", "nhwctonchw", "clone", "contiguous", "reorder"),
    "copies": ("memcpy", "copy", "cat", "_to"),
    "norms": ("norm", "var_mean"),
    "paddings": ("pad",),
    "convolutions": ("conv", "gemm", "xmma", "cutlass", "implicit", "wgrad", "dgrad", "mm"),
}


def check_profile(report: Report, args, device: torch.device, dtype) -> None:
    """Launches and milliseconds of a step, and the share of each kind of kernel."""
    model = make_model(args.networks, device, dtype)
    batch = make_batch(model, 1, args.size, args.size, 0)
    for _ in range(3):
        model.step([batch])
    cuda, steps = device.type == "cuda", 10 if device.type == "cuda" else 2
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            model.step([batch])
        if cuda:
            torch.cuda.synchronize()
    shares, launches = dict.fromkeys([*KINDS, "others"], 0.0), 0
    for event in profiler.key_averages():
        name = event.key.lower()
        on_device = event.self_device_time_total if cuda else event.self_cpu_time_total
        launches += event.count if not cuda or "launchkernel" in name else 0
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "others")
        shares[kind] += on_device / 1000
    total = sum(shares.values())
    figures = {kind: f"{100 * ms / total:.0f}%" for kind, ms in shares.items()}
    count = "launches" if cuda else "operations"
    busy = {count: round(launches / steps), "busy_ms": round(total / steps, 2)}
    report.add("profile", f"size {args.size}", None, **busy, **figures)


def check_speed(report: Report, args, device: torch.device, dtype) -> None:
    """Seconds of the classic iteration and of ours, in turn, against a matrix product."""
    cuda = device.type == "cuda"
    side, steps = (8192, 20) if cuda else (1024, 1)
    a = torch.randn(side, side, device=device, dtype=dtype or torch.float32)
    rate = 2 * side**3 / min(time_steps(lambda: a @ a, 10, cuda) for _ in range(5))
    report.add("matrix product", f"{side}", None, teraflops=f"{rate / 1e12:.2f}")
    name = utils.precision_name(dtype)
    cases = {"plain": (NCHW, ""), f"{name} NCHW": (NCHW, ""), f"{name} NHWC": (NHWC, "")}
    cases |= {f"{name} compiled": (None, "--compile")} if cuda else {}
    for batch in args.batches:
        times = {case: [] for case in cases}
        try:
            with utils.explain_out_of_memory("a smaller batch needs less"):
                functions = {
                    case: make_step(args, case, batch, layout, options, device, dtype)
                    for case, (layout, options) in cases.items()
                }
                for turn in range(args.rounds + 1):  # the first compiles and searches algorithms
                    for case, step in functions.items():
                        utils.set_backends(device, dtype, fixed_sizes=case != "plain")
                        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
                        seconds = time_steps(step, steps, cuda)
                        times[case] += [seconds] if turn else []
        except utils.UserError as error:
            report.add("speed", f"batch {batch}", None, error=str(error))
            continue
        flops = bench.count_flops("train", args.size, args.ngf) * batch
        for case, seconds in times.items():
            s, plain = statistics.median(seconds), statistics.median(times["plain"])
            figures = {"ms": f"{1000 * s:.1f}", "steps_per_s": f"{1 / s:.2f}"}
            figures |= {"of_matmul": f"{100 * flops / s / rate:.0f}%", "speed": f"{plain / s:.2f}x"}
            report.add("speed", f"batch {batch} {case}", None, **figures)


def make_step(args, case: str, n: int, layout, options: str, device: torch.device, dtype):
    """One step of a row of `check_speed`, as a function."""
    size = args.size
    if case == "plain":
        plain = bench.Plain(train.parse_args(args.networks.split()), device)
        x, y = torch.rand(2, n, 3, size, size, device=device) * 2 - 1
        return lambda: plain.step(x, y)
    model = make_model(f"{args.networks} {options}", device, dtype, layout)
    batch = make_batch(model, n, size, size, 0)
    return lambda: model.step([batch])


def time_steps(step, n: int, cuda: bool) -> float:
    """Seconds of a step, the mean of n."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(n):
        step()
    wait()
    return (time.perf_counter() - start) / n


# ------------------------------------------------------------------------------------------------
# Whole runs, in processes of their own

FULL = """
import torch, train, utils, sys
torch.cuda.set_per_process_memory_fraction(0.001)
utils.run(train.main, train.parse_args(sys.argv[1:]))
"""

KILLED = """
import os, signal, sys, train, utils
step = train.CycleGAN.step

def step_and_die(self, batches):
    step(self, batches)
    if self.iteration == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

train.CycleGAN.step = step_and_die
utils.run(train.main, train.parse_args(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def check_runs(report: Report, device: torch.device, folder: Path) -> None:
    """A GPU that is full is one sentence; a run of one rank, killed, goes on after its restart."""
    rng = np.random.default_rng(0)
    for name in ("trainA", "trainB", "testA", "testB"):
        for i in range(4):
            utils.make_folder(folder / "data" / name)
            pixels = rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{i}.png")
    words = f"--dataroot {folder / 'data'} --n_epochs 3 --no_tensorboard --device {device.type}"
    if device.type == "cuda":
        done = run("-c", FULL, *f"{words} --workdir {folder / 'step'}".split())
        ok = done.returncode == 2 and "out of memory" in done.stderr.splitlines()[-1]
        report.add("out of memory", "in a step", ok, last_line=done.stderr.splitlines()[-1])
        blocks = []
        for size in (2**30, 2**24, 2**20):
            try:
                while True:
                    blocks.append(torch.empty(size, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                pass
        done = run("train.py", *f"{words} --workdir {folder / 'start'}".split())
        ok = done.returncode == 2 and "out of memory" in done.stderr.splitlines()[-1]
        report.add("out of memory", "at the start", ok, last_line=done.stderr.splitlines()[-1])
        del blocks
        torch.cuda.empty_cache()
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=1 --max-restarts=1"
    command = [*launcher.split(), "--no-python", sys.executable, "-c", KILLED]
    done = run(*command, *f"{SMALL} {words} --workdir {folder / 'killed'}".split())
    last = (done.stderr.splitlines() or [""])[-1]
    ok = done.returncode == 0
    if ok:
        state = checkpoint.load_run(folder / "killed")
        ok, last = state["iteration"] == 12, f"iteration {state['iteration']}"
    backend = "NCCL" if device.type == "cuda" else "gloo"
    report.add("restart", f"one rank, {backend}", ok, end=last)


# ------------------------------------------------------------------------------------------------
# The script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check correctness and speed of this device.")
    utils.add_workdir(parser)
    parser.add_argument("--size", type=int, default=256, help="of profile and speed (256)")
    parser.add_argument("--ngf", type=int, default=64, help="width of their networks (64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="(1 4 16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, median taken (5)")
    utils.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Write the report; returns 1 if a check failed."""
    start = time.time()
    device, dtype, _, _ = utils.setup(args)
    args.networks = f"--size {args.size} --load_size {args.size} --ngf {args.ngf} --ndf {args.ngf}"
    report = Report(args.workdir / "result")
    figures = {}
    if device.type == "cuda":
        capability = "sm_" + "".join(map(str, torch.cuda.get_device_capability(device)))
        figures = {"capability": capability, "compiled_for": " ".join(torch.cuda.get_arch_list())}
    report.add("device", utils.describe(device), None, **figures)
    check_steps(report, device)
    check_resume(report, device)
    if device.type == "cuda":
        check_waits(report, device)
    check_profile(report, args, device, dtype)
    check_speed(report, args, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        check_runs(report, device, Path(folder))
    failed = sum(row["ok"] is False for row in report.rows)
    report.close(f"{utils.describe(device)}: {failed} failed, {time.time() - start:.0f} s")
    print(f"{failed} failed; the table is {report.folder / 'gpu_check.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    utils.run(main, parse_args())
