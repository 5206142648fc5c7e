"""Check this device in under ten minutes: exactness, resume, waits, launches, speed, restarts.

    python -m tools.gpu_check
    python -m tools.gpu_check --device cpu --size 32 --ngf 4 --batches 1 --rounds 1

On a CPU, whatever needs a GPU is skipped, and memory formats are compared instead of devices. Each
row is a line of result/gpu_check.jsonl as soon as it is known; result/gpu_check.md is their table.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import train
import utils
from lib import checkpoint, devices
from tools import bench
from tools.demo import draw_demo

NHWC, NCHW = torch.channels_last, torch.contiguous_format
CPU = torch.device("cpu")
SMALL = "--size 32 --load_size 36 --ngf 4 --ndf 4 --n_residual_blocks 1 --pool_size 4"


class Report:
    """Rows of figures: lines of JSON, written at once, and a Markdown table by `close`."""

    def __init__(self, folder: Path):
        self.folder, self.rows = utils.make_folder(folder), []
        (folder / "gpu_check.jsonl").unlink(missing_ok=True)

    def add(self, check: str, case: str, ok: bool | None, **figures) -> None:
        """Add a row; `ok` is None where there is nothing to pass or fail."""
        self.rows.append({"check": check, "case": case, "ok": ok, **figures})
        print(json.dumps(self.rows[-1]), flush=True)
        with open(self.folder / "gpu_check.jsonl", "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def close(self, head: str) -> None:
        lines = [head, "", "| check | case | result | figures |", "|---|---|---|---|"]
        for row in self.rows:
            figures = ", ".join(f"{name} {value}" for name, value in list(row.items())[3:])
            result = {True: "ok", False: "**FAILED**", None: ""}[row["ok"]]
            lines.append(f"| {row['check']} | {row['case']} | {result} | {figures} |")
        (self.folder / "gpu_check.md").write_text("\n".join(lines) + "\n")


def make_model(options: str, device: torch.device, dtype=None, layout=None) -> train.CycleGAN:
    """Return train.py's model, in another memory format than the device's if one is given."""
    devices.set_backends(device, dtype)
    model = train.CycleGAN(train.parse_args(options.split()), device, dtype)
    model.layout = layout or model.layout
    for net in (*model.networks().values(), *model.averages.values()):
        net.to(memory_format=model.layout)
    return model


def make_batch(model: train.CycleGAN, n: int, height: int, width: int, seed: int) -> tuple:
    """Return random pictures (n, 3, height, width) in [-1, 1], the same on every device."""
    x = torch.rand(2, n, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return tuple(t.to(model.device).contiguous(memory_format=model.layout) for t in x)


def take_steps(model: train.CycleGAN, steps: int, n: int, first: int = 0) -> torch.Tensor:
    """Return losses (steps, losses) of iterations on n pictures, the same in each call."""
    rows = []
    for i in range(first, first + steps):
        width = 32 + 4 * (i % 3) * (model.args.preprocess == "none")
        seeds = [100 * i + j for j in range(model.args.accumulate)]
        losses = model.step([make_batch(model, n, 32, width, seed) for seed in seeds])
        rows.append(torch.stack([losses[name].detach().float().cpu() for name in train.LOSSES]))
    return torch.stack(rows)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the norm of a - b over the norm of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def moments(model: train.CycleGAN, name: str) -> torch.Tensor:
    """Return Adam's moments of all weights in their logical order, on the host, (weights,)."""
    states = (*model.optimizer_G.state.values(), *model.optimizer_D.state.values())
    return torch.cat([state[name].cpu().flatten() for state in states])


# ------------------------------------------------------------------------------------------------
# Exactness and resume


def check_steps(report: Report, device: torch.device) -> None:
    """Five steps on the device, weights laid out as on a GPU, against float32 on the CPU."""
    cases = {  # options, dtype, largest relative error of losses and of the gradient
        "float32": ("", None, 1e-3, 1e-3),
        "bf16": ("", torch.bfloat16, 0.01, 0.5),
        "fp16": ("", torch.float16, 0.01, 0.5),
        "batch norm": ("--norm batch", None, 1e-3, 1e-2),
        "channel norm": ("--norm channel --keep_source", None, 1e-3, 1e-3),
        "accumulate 2": ("--accumulate 2", None, 1e-3, 1e-3),
        "own sizes": ("--preprocess none", None, 1e-3, 1e-3),
    }
    # PyTorch's CPU gradient of instance norm is wrong for one picture in channels_last (2.15)
    n = 2 if device.type == "cpu" else 1
    for case, (options, dtype, *most) in cases.items():
        model = make_model(f"{SMALL} {options}", device, dtype, NHWC)
        if dtype == torch.float16:  # a scale at which no step is skipped
            model.scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        losses, gradients = [], []
        for one in (model, make_model(f"{SMALL} {options}", CPU, layout=NCHW)):
            losses.append(take_steps(one, 1, n))
            gradients.append(moments(one, "exp_avg"))
            losses[-1] = torch.cat([losses[-1], take_steps(one, 4, n, first=1)])
        loss, gradient = difference(*losses), difference(*gradients)
        ok = loss <= most[0] and gradient <= most[1]
        report.add("step", case, ok, loss=f"{loss:.1e}", gradient=f"{gradient:.1e}")


def move(model: train.CycleGAN, device: torch.device, layout) -> train.CycleGAN:
    """Save the model to a file, and load the file into another one, which is returned."""
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
        names = ("exp_avg", "exp_avg_sq")
        same = all(torch.equal(moments(model, name), moments(moved, name)) for name in names)
        states = (*moved.optimizer_G.state.items(), *moved.optimizer_D.state.items())
        strides = all(m["exp_avg"].stride() == weight.stride() for weight, m in states)
        loss = difference(take_steps(moved, 5, 2, first=3), take_steps(model, 5, 2, first=3))
        figures = {"moments_equal": same, "strides_equal": strides, "loss": f"{loss:.1e}"}
        report.add("resume", f"{source} to {target}", same and strides and loss <= 1e-3, **figures)


# ------------------------------------------------------------------------------------------------
# Waits, launches, speed


def check_waits(report: Report, device: torch.device) -> None:
    """20 steps with full buffers must not wait for the GPU once."""
    model = make_model(SMALL, device, devices.pick_precision("auto", device))
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
    cuda, steps = device.type == "cuda", 10 if device.type == "cuda" else 2
    model = make_model(args.networks, device, dtype)
    step = functools.partial(model.step, [make_batch(model, 1, args.size, args.size, 0)])
    bench.time_steps(step, 3, device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        bench.time_steps(step, steps, device)
    shares, launches = dict.fromkeys([*KINDS, "others"], 0.0), 0
    for event in profiler.key_averages():
        name = event.key.lower()
        launches += event.count if not cuda or "launchkernel" in name else 0
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA:
            on_device = event.self_device_time_total if cuda else event.self_cpu_time_total
            fits = (kind for kind, words in KINDS.items() if any(word in name for word in words))
            shares[next(fits, "others")] += on_device / 1000
    total = sum(shares.values())
    count = "launches" if cuda else "operations"
    figures = {count: round(launches / steps), "busy_ms": round(total / steps, 2)}
    figures |= {kind: f"{100 * ms / total:.0f}%" for kind, ms in shares.items()}
    report.add("profile", f"size {args.size}", None, **figures)


def check_speed(report: Report, args, device: torch.device, dtype) -> None:
    """Seconds of the classic iteration and of ours, in turn, against a matrix product."""
    n_steps, name = 20 if device.type == "cuda" else 1, devices.precision_name(dtype)
    rate = bench.matmul_rate(device, name)
    report.add("matrix product", name, None, teraflops=f"{rate / 1e12:.2f}")
    cases = {f"{name} NCHW": (NCHW, ""), f"{name} NHWC": (NHWC, "")}
    cases |= {f"{name} compiled": (None, " --compile")} if device.type == "cuda" else {}
    for n in args.batches:
        try:
            with utils.explain_out_of_memory("a smaller batch needs less"):
                plain = bench.Plain(train.parse_args(args.networks.split()), device)
                x, y = torch.rand(2, n, 3, args.size, args.size, device=device) * 2 - 1
                steps = {"plain": functools.partial(plain.step, x, y)}
                for case, (layout, options) in cases.items():
                    model = make_model(args.networks + options, device, dtype, layout)
                    batch = make_batch(model, n, args.size, args.size, 0)
                    steps[case] = functools.partial(model.step, [batch])
                times = {case: [] for case in steps}
                for _ in range(args.rounds + 1):  # the first compiles and searches algorithms
                    for case, step in steps.items():
                        devices.set_backends(device, dtype, fixed_sizes=case != "plain")
                        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
                        times[case].append(bench.time_steps(step, n_steps, device) / n_steps)
        except utils.UserError as error:
            report.add("speed", f"batch {n}", None, error=str(error))
            continue
        flops = bench.count_flops("train", args.size, args.ngf) * n
        medians = {case: statistics.median(seconds[1:]) for case, seconds in times.items()}
        for case, s in medians.items():
            figures = {"ms": f"{1000 * s:.1f}", "steps_per_s": f"{1 / s:.2f}"}
            figures |= {"of_matmul": f"{100 * flops / s / rate:.0f}%"}
            figures |= {"speed": f"{medians['plain'] / s:.2f}x"}
            report.add("speed", f"batch {n} {case}", None, **figures)


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


def check_runs(report: Report, device: torch.device, folder: Path) -> None:
    """A GPU that is full is one sentence; a run of one rank, killed, goes on after its restart."""
    draw_demo(folder / "data", n_train=4, n_test=4)
    options = f"--dataroot {folder / 'data'} --n_epochs 3 --no_tensorboard --device {device.type}"

    def run(name: str, *command: str) -> tuple[int, str]:
        """Train by a command in a folder `name`; returns the exit code and the last message."""
        environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)}
        words = [sys.executable, *command, *options.split(), "--workdir", str(folder / name)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, (done.stderr.splitlines() or [""])[-1]

    if device.type == "cuda":
        code, last = run("step", "-c", FULL)
        ok = code == 2 and "out of memory" in last
        report.add("out of memory", "in a step", ok, last_line=last)
        blocks = []
        for size in (2**30, 2**24, 2**20):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    blocks.append(torch.empty(size, dtype=torch.uint8, device=device))
        code, last = run("start", "-m", "train")
        ok = code == 2 and "out of memory" in last
        report.add("out of memory", "at the start", ok, last_line=last)
        del blocks
        torch.cuda.empty_cache()
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=1 --max-restarts=1"
    command = [*launcher.split(), "--no-python", sys.executable, "-c", KILLED, *SMALL.split()]
    code, last = run("killed", *command)
    iteration = checkpoint.load_run(folder / "killed")["iteration"] if code == 0 else 0
    end = last if code else f"iteration {iteration}"
    backend = "NCCL" if device.type == "cuda" else "gloo"
    report.add("restart", f"one rank, {backend}", iteration == 12, end=end)


# ------------------------------------------------------------------------------------------------
# The script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check correctness and speed of this device.")
    utils.add_workdir(parser)
    parser.add_argument("--size", type=int, default=256, help="of profile and speed (256)")
    parser.add_argument("--ngf", type=int, default=64, help="width of their networks (64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="(1 4 16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, median taken (5)")
    devices.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Write the report; returns 1 if a check failed."""
    start, figures = time.time(), {}
    device, dtype = devices.setup(args)
    args.networks = f"--size {args.size} --load_size {args.size} --ngf {args.ngf} --ndf {args.ngf}"
    report = Report(args.workdir / "result")
    if device.type == "cuda":
        capability = "sm_" + "".join(map(str, torch.cuda.get_device_capability(device)))
        figures = {"capability": capability, "compiled_for": " ".join(torch.cuda.get_arch_list())}
    report.add("device", devices.describe(device), None, **figures)
    check_steps(report, device)
    check_resume(report, device)
    if device.type == "cuda":
        check_waits(report, device)
    check_profile(report, args, device, dtype)
    check_speed(report, args, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        check_runs(report, device, Path(folder))
    failed = sum(row["ok"] is False for row in report.rows)
    report.close(f"{devices.describe(device)}: {failed} failed, {time.time() - start:.0f} s")
    print(f"{failed} failed; the table is {report.folder / 'gpu_check.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    utils.run(main, parse_args())
