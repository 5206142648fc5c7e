"""A run that is stopped, anyhow and anywhere, loses nothing."""

import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import (
    ROOT,
    copy_run,
    differences,
    draw_set,
    outcome,
    read_state,
    resume,
    run,
    words,
)

import train
import utils
from lib import checkpoint, logger
from lib.logger import read_csv
from utils import UserError

# ------------------------------------------------------------------------------------------------
# Exactness


@pytest.fixture
def stop_at(monkeypatch):
    """Lets the run get a signal in the middle of iterations of one's choice."""
    moments = {}
    step = train.CycleGAN.step

    def step_and_stop(self, batches):
        result = step(self, batches)
        if self.iteration in moments:
            signal.raise_signal(moments.pop(self.iteration))
        return result

    monkeypatch.setattr(train.CycleGAN, "step", step_and_stop)
    return lambda iteration, number=signal.SIGTERM: moments.update({iteration: number})


# every part of the state matters in one of these: the random numbers (dropout), full and unfilled
# buffers, averages, the identity loss of the last step, accumulated and filled-up batches
RUNS = {
    "from disk": "--dropout --cache off --id_every 2",
    "two workers": "--dropout --cache off --id_every 2 --workers 2",
    "small buffers": "--dropout --cache on --pool_size 2 --ema 0 --lr_policy cosine --size 48 "
    "--load_size 50 --half_size 0.5 --augment_D 0.5 --augment_cycle 0.5",
    "accumulated": "--dropout --batch_size 2 --accumulate 2 --n_epochs 4 --pool_size 3 "
    "--lambda_views_A2B 5 --lambda_views_B2A 5",
    "batch norm": "--norm batch --batch_size 2 --upsample nearest --gan_mode hinge",
}


def undisturbed(dataroot: Path, options: str, folder: Path) -> dict:
    assert run(dataroot, folder, options) == 0
    return outcome(folder)


@pytest.mark.parametrize("name", RUNS)
def test_stopped_again_and_again(name, dataroot, tmp_path, stop_at):
    """Stopped after each second iteration or so, at the ends of epochs too: the same bytes."""
    wanted = undisturbed(dataroot, RUNS[name], tmp_path / "whole")
    last = read_state(tmp_path / "whole")["iteration"]
    stops = [1, 2, 5, 7, 10, 14] if last == 15 else list(range(1, last))
    stops = stops[1::2] if name == "two workers" else stops  # starting workers takes time
    workdir = tmp_path / "stopped"
    stop_at(stops[0])
    assert run(dataroot, workdir, RUNS[name]) == 143
    for stop in stops[1:]:
        assert read_state(workdir)["iteration"] < stop
        stop_at(stop)
        assert resume(workdir) == 143
    assert resume(workdir) == 0
    assert differences(wanted, outcome(workdir)) == []
    log, whole = (read_csv(tmp_path / name / "logs/losses.csv") for name in ("stopped", "whole"))
    lr = log["lr"]
    assert lr == whole["lr"] and len(lr) == last and lr[-1] < 0.5 * lr[0]
    assert log["seconds"] == sorted(log["seconds"])  # those of the parts add up
    if "--half_size 0.5" in RUNS[name]:  # 1/30 of the run after the change: half of the warm-up
        cosine = [1e-4 * (1 + math.cos(math.pi * i / 15)) for i in (7, 8, 9)]
        assert lr[7:10] == pytest.approx([cosine[0], cosine[1] / 2, cosine[2]], rel=1e-5)


def test_stopped_at_each_iteration(tmp_path, stop_at):
    """One run for each iteration that it can be stopped at."""
    dataroot = draw_set(tmp_path / "data", 3, 2)
    before = signal.getsignal(signal.SIGINT)
    wanted = undisturbed(dataroot, "--dropout --n_epochs 2", tmp_path / "whole")
    for stop in range(1, 7):
        workdir = tmp_path / str(stop)
        stop_at(stop, signal.SIGINT)
        assert run(dataroot, workdir, "--dropout --n_epochs 2") == 130
        assert signal.getsignal(signal.SIGINT) is before
        assert read_state(workdir)["iteration"] == stop
        assert resume(workdir) == 0
        assert differences(wanted, outcome(workdir)) == [], f"stopped at {stop}"
        lr = [
            2e-4 * factor for factor in (1, 1, 1, 1, 2 / 3, 1 / 3)
        ]  # linear from the second epoch
        assert read_csv(workdir / "logs" / "losses.csv")["lr"] == pytest.approx(lr, rel=1e-5)


def test_stopped_and_typed_again(dataroot, tmp_path, stop_at):
    """A requeued job types the same line again: it starts, goes on, and ends like one run."""
    wanted = undisturbed(dataroot, "--dropout", tmp_path / "whole")
    for code, stop in ((143, 3), (143, 6), (0, 99)):
        stop_at(stop)
        assert run(dataroot, tmp_path / "job", "--dropout --resume auto") == code
    assert differences(wanted, outcome(tmp_path / "job")) == []


def test_where_the_pictures_come_from_changes_nothing(dataroot, tmp_path):
    options = "--dropout --n_epochs 1"
    wanted = undisturbed(dataroot, options + " --cache on", tmp_path / "cached")
    for number, more in enumerate(("--cache off", "--cache off --workers 2")):
        workdir = tmp_path / str(number)
        assert run(dataroot, workdir, f"{options} {more}") == 0
        assert differences(wanted, outcome(workdir)) == [], more


def test_the_comparison_sees_a_difference(dataroot, tmp_path):
    wanted = undisturbed(dataroot, "--n_epochs 1", tmp_path / "whole")
    run(dataroot, tmp_path / "other", "--n_epochs 1 --seed 1")
    found = differences(wanted, outcome(tmp_path / "other"))
    assert {".netG_A2B.model.1.weight", ".rank.random"} <= set(found)


# ------------------------------------------------------------------------------------------------
# Options


def test_options_come_from_the_run(dataroot, tmp_path, capsys, stop_at):
    stop_at(3)
    run(dataroot, tmp_path, "--lr 0.001 --lambda_cyc 7")
    capsys.readouterr()
    assert resume(tmp_path, "--lr 0.002 --beta1 0.4 --n_epochs 2") == 0
    told = capsys.readouterr().out
    assert "--lr is now 0.002 (the run had 0.001)" in told
    assert "--beta1 is now 0.4 (the run had 0.5)" in told
    assert "--n_epochs is now 2 (the run had 3)" in told
    assert "lambda_cyc" not in told and "--size" not in told
    state = read_state(tmp_path)
    assert state["epoch"] == 2 and state["args"]["lambda_cyc"] == 7 and state["args"]["ngf"] == 2
    group = state["optimizer_G"]["param_groups"][0]
    assert tuple(group["betas"]) == (0.4, 0.999)
    lr = read_csv(tmp_path / "logs" / "losses.csv")["lr"]
    assert lr[-1] == pytest.approx(0.002 * 0.2), "four fifths of the falling epoch"


def test_architecture_cannot_change(dataroot, tmp_path):
    undisturbed(dataroot, "--n_epochs 1", tmp_path)
    before = (tmp_path / "models" / "train_state.pth").read_bytes()
    changes = ["ngf 4", "n_residual_blocks 2", "norm batch", "upsample nearest", "ndf 4"]
    changes += ["direction BtoA", "range_B 0 9", "axis 0", "keep_source", "dropout", "netD pixel"]
    for change in changes:
        name = change.split()[0]
        with pytest.raises(UserError, match=f"--{name} is .* cannot become .*another --workdir"):
            resume(tmp_path, f"--{change}")
    assert (tmp_path / "models" / "train_state.pth").read_bytes() == before
    assert resume(tmp_path, "--ngf 2 --ndf 2") == 0  # what it is already may be said again


def test_files_of_a_rank_are_kept_for_two_saves(tmp_path):
    """Those of the newest state, and of the one before, which a resume falls back to."""
    models = tmp_path / "models"
    models.mkdir()
    for iteration in (0, 5, 10, 15):
        checkpoint.write_rank(tmp_path, 1, {"iteration": iteration})
        os.utime(models / f"rank1_{iteration}.pth", (iteration, iteration))
    assert {path.name for path in models.iterdir()} == {"rank1_10.pth", "rank1_15.pth"}


def test_longer_run(dataroot, tmp_path, capsys):
    """A finished run goes on with more epochs, and is then the run it would have been."""
    wanted = undisturbed(dataroot, "--dropout --lr_policy constant --n_epochs 4", tmp_path / "four")
    run(dataroot, tmp_path / "two", "--dropout --lr_policy constant --n_epochs 2")
    assert resume(tmp_path / "two") == 0  # nothing to do
    assert "all 2 epochs are done: a larger --n_epochs extends this run" in capsys.readouterr().out
    assert resume(tmp_path / "two", "--n_epochs 4") == 0
    assert differences(wanted, outcome(tmp_path / "two")) == []


def test_longer_run_stays_at_full_size(dataroot, tmp_path, monkeypatch, stop_at):
    """Half of the size is for the share of the run as it was, a stop on the way included."""
    sides, step = [], train.CycleGAN.step
    note = lambda model, batches: sides.append(batches[0][0].shape[3]) or step(model, batches)
    monkeypatch.setattr(train.CycleGAN, "step", note)
    options = "--size 48 --load_size 50 --half_size 0.5 --n_epochs 2"
    assert run(dataroot, tmp_path, options) == 0
    stop_at(12)
    assert resume(tmp_path, "--n_epochs 8") == 143
    assert resume(tmp_path) == 0
    assert sides == 5 * [24] + 35 * [48]
    assert read_state(tmp_path)["args"]["half_size"] == 0.125


@pytest.mark.parametrize("way", ["--init_from", "--resume"])
def test_what_the_first_generators_keep(way, dataroot, tmp_path, stop_at):
    """`--lambda_keep` knows them after any number of stops; the averages, if the run goes on."""
    old = tmp_path / "old"
    assert run(dataroot, old, "--n_epochs 1") == 0
    outcomes = []
    for name, stops in (("whole", []), ("stopped", [(143, 6), (143, 9)])):
        workdir = tmp_path / name
        more = "--lambda_keep 5 --n_epochs 3"
        if way == "--resume":
            copy_run(old, workdir)
            start = lambda workdir=workdir, more=more: resume(workdir, more)
        else:
            more += f" --init_from {old / 'models'}"
            start = lambda workdir=workdir, more=more: run(dataroot, workdir, more)
        for code, stop in stops:
            stop_at(stop)
            assert start() == code
            start = lambda workdir=workdir: resume(workdir)
        assert start() == 0
        outcomes.append(outcome(workdir))
        for name in ("netG_A2B", "netG_B2A"):
            first = read_state(workdir)[f"{name}_initial"]
            kept = f"{name}_ema" if way == "--resume" else name
            for key, value in utils.load_tensors(old / "models" / f"{kept}.pth").items():
                assert torch.equal(first[key], value), key
    assert differences(*outcomes) == []


def test_a_run_without_a_bias_in_the_first_convolution(dataroot, tmp_path):
    """Of a version before 2026-12-02, with channel norm: it goes on, with a bias of zeros."""
    run(dataroot, tmp_path, "--norm channel --n_epochs 1")
    state = read_state(tmp_path)
    args = train.parse_args(["--workdir", str(tmp_path), "--resume"], state["args"])
    names = [
        name for name, _ in train.CycleGAN(args, torch.device("cpu")).netG_A2B.named_parameters()
    ]
    names = [*names, *names]
    for name in ("netG_A2B", "netG_B2A", "netG_A2B_ema", "netG_B2A_ema"):
        del state[name]["model.1.bias"]
    old = state["optimizer_G"]
    moments = [old["state"][i] for i, name in enumerate(names) if name != "model.1.bias"]
    old["state"] = dict(enumerate(moments))
    old["param_groups"][0]["params"] = list(range(len(moments)))
    utils.save_tensors(tmp_path / "models" / "train_state.pth", state)
    model = train.CycleGAN(args, torch.device("cpu"))
    checkpoint.restore(model, read_state(tmp_path))
    for net in (*model.generators().values(), *model.averages.values()):
        assert not net.model[1].bias.any()
    own = [model.optimizer_G.state[p] for p in model.params_G]
    assert len(own) == len(names) == len(moments) + 2
    kept = [one for one, name in zip(own, names, strict=True) if name != "model.1.bias"]
    for one, other in zip(kept, moments, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert resume(tmp_path, "--n_epochs 2") == 0
    assert read_state(tmp_path)["netG_B2A"]["model.1.bias"].any()


@pytest.mark.parametrize("more", ["", "--ema 0"])
def test_refinement(more, dataroot, tmp_path, stop_at):
    """Stopped before and within `--refine_epochs`, or added to a run that is over: the same bytes.

    Discriminators stay as they are; what the generators learn from is what training ended with.
    """
    options, outcomes = f"--n_epochs 2 --save_minutes 0 {more}", []
    assert run(dataroot, tmp_path / "before", options) == 0
    before = read_state(tmp_path / "before")
    for name, stops in (("whole", []), ("stopped", [8, 10, 13])):
        workdir = tmp_path / name
        start = lambda workdir=workdir: run(dataroot, workdir, options + " --refine_epochs 2")
        for stop in stops:
            stop_at(stop)
            assert start() == 143
            start = lambda workdir=workdir: resume(workdir)
        assert start() == 0
        outcomes.append(outcome(workdir))
    copy_run(tmp_path / "before", tmp_path / "longer")
    assert resume(tmp_path / "longer", "--refine_epochs 2") == 0
    assert differences(*outcomes) == []
    after = read_state(tmp_path / "whole")
    longer = read_state(tmp_path / "longer")
    assert after["iteration"] == longer["iteration"] == 20
    last = "netG_A2B" if more else "netG_A2B_ema"
    for key, value in before[last].items():
        assert torch.equal(after["netG_A2B_initial"][key], value), key
        assert torch.equal(after["netG_A2B"][key], longer["netG_A2B"][key]), key
        if value.dim() > 1:
            assert not torch.equal(after["netG_A2B"][key], value), key
    for key, value in before["netD_A"].items():
        assert torch.equal(after["netD_A"][key], value), key
    log = read_csv(tmp_path / "whole" / "logs" / "losses.csv")
    assert [D > 0 for D in log["D"]] == 10 * [True] + 10 * [False]
    assert log["lr"][10] == log["lr"][15] == 2e-4 > log["lr"][-1] > 0


def test_other_batch_size(dataroot, tmp_path, stop_at):
    """Three of an epoch's five samples were seen, one at a time; two are left for one batch."""
    stop_at(3)
    run(dataroot, tmp_path)
    assert resume(tmp_path, "--batch_size 2") == 0
    assert read_state(tmp_path)["iteration"] == 3 + 1 + 3 + 3


def test_other_pictures(dataroot, tmp_path, stop_at):
    """The run stood at sample 4 of 5; with three pictures the epoch is over."""
    stop_at(4)
    run(dataroot, tmp_path / "run")
    fewer = draw_set(tmp_path / "data", 3, 3)
    more = f"--dataroot {fewer} --ema 0 --pool_size 2 --amp bf16"
    assert resume(tmp_path / "run", more) == 0
    assert read_state(tmp_path / "run")["iteration"] == 4 + 3 + 3
    models = tmp_path / "run" / "models"
    assert not list(models.glob("*_ema.pth"))  # test.py would prefer them
    assert resume(tmp_path / "run", "--n_epochs 4 --ema 0.9 --lr 0") == 0  # averages begin there
    for name, weight in utils.load_tensors(models / "netG_A2B.pth").items():
        average = utils.load_tensors(models / "netG_A2B_ema.pth")[name]
        assert torch.allclose(average, weight, atol=1e-6), name


def test_used_workdir(dataroot, tmp_path):
    undisturbed(dataroot, "--n_epochs 1", tmp_path)
    before = outcome(tmp_path)
    with pytest.raises(UserError, match="already holds a run.*--resume.*--restart"):
        run(dataroot, tmp_path)
    with pytest.raises(SystemExit) as exit:  # argparse says that one excludes the other
        run(dataroot, tmp_path, "--resume --restart")
    assert exit.value.code == 2
    assert differences(before, outcome(tmp_path)) == []
    stale = "models/best/netG_A2B.pth images/epoch_009.png logs/metrics.csv logs/skipped.txt "
    stale += "outputs/cycle/A2B_x.png result/A2B_x.png result/metrics.json models/rank1_5.pth"
    for name in (*stale.split(), "result/mine.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert run(dataroot, tmp_path, "--restart --n_epochs 1 --seed 5 --ema 0") == 0
    assert [name for name in stale.split() if (tmp_path / name).exists()] == []
    assert (tmp_path / "result" / "mine.png").exists()
    assert read_state(tmp_path)["args"]["seed"] == 5 and read_state(tmp_path)["iteration"] == 5
    assert len((tmp_path / "logs" / "losses.csv").read_text().splitlines()) == 6
    assert not (tmp_path / "models" / "netG_A2B_ema.pth").exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="cannot resume: there is no checkpoint .*train first"):
        resume(tmp_path)


# ------------------------------------------------------------------------------------------------
# Signals, to real processes


def start(command: list, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        **more,
    )


def wait_for(path: Path, lines: int, process: subprocess.Popen) -> None:
    """Wait until a log has so many lines."""
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {lines} lines")


def rows(workdir: Path) -> list[int]:
    """The iterations that the log has rows of."""
    return [int(value) for value in logger.read_csv(workdir / "logs" / "losses.csv")["iteration"]]


@pytest.mark.parametrize(
    ("number", "code", "options"),
    [
        (signal.SIGINT, 130, "--cache on"),
        (signal.SIGTERM, 143, "--cache off --workers 2"),
    ],
)
def test_signal(number, code, options, dataroot, tmp_path):
    """To the whole process group, as a terminal or a batch system sends it: workers get it too."""
    command = [ROOT / "train.py", *words(dataroot, tmp_path, f"--n_epochs 9000 {options}")]
    process = start(command, start_new_session=True)
    wait_for(tmp_path / "logs" / "losses.csv", 4, process)
    os.killpg(process.pid, number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert f"go on with --workdir {tmp_path} --resume" in told and "Traceback" not in told
    state = read_state(tmp_path)
    assert state["iteration"] == rows(tmp_path)[-1]  # the iteration was finished and saved
    assert resume(tmp_path, f"--n_epochs {state['epoch'] + 1}") == 0
    assert rows(tmp_path) == list(range(1, 5 * (state["epoch"] + 1) + 1))


SLOW = """
import sys, time
import train, utils

def slow(self, batches):
    print("in an iteration", flush=True)
    time.sleep(100)

train.CycleGAN.step = slow
utils.run(train.main, train.parse_args(sys.argv[1:]))
"""


def test_second_interrupt_stops_at_once(dataroot, tmp_path):
    process = start(["-c", SLOW, *words(dataroot, tmp_path)])
    for line in process.stdout:
        if "in an iteration" in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the iteration
    began = time.time()
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and time.time() - began < 10
    assert "Traceback" not in told
    assert read_state(tmp_path)["iteration"] == 0  # as saved before


# ------------------------------------------------------------------------------------------------
# kill -9


def run_as_a_process(argv: list[str]) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    utils.run(train.main, train.parse_args(argv))


def start_run(context, argv: list[str]) -> multiprocessing.Process:
    process = context.Process(target=run_as_a_process, args=(argv,))
    process.start()
    return process


def kill_loop(folder: Path, kills: int, n_epochs: int) -> dict:
    """Kill one run so often, at random moments, each time going on with it; then let it end.

    It saves after each iteration, so that many kills come while files are being written. The
    processes are forked from one that has PyTorch loaded already, which saves seconds for each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.figure"])
    dataroot = draw_set(folder / "data", 50, 10)
    options = f"--dropout --pool_size 4 --n_epochs {n_epochs}"
    whole, workdir = folder / "whole", folder / "killed"
    process = start_run(context, words(dataroot, whole, options))  # also starts the server
    process.join()
    assert process.exitcode == 0
    options += " --save_minutes 0 --sample_every 7"
    began = time.time()
    process = start_run(
        context, words(draw_set(folder / "few", 1, 1), folder / "short", "--n_epochs 1")
    )
    process.join()
    start_up = time.time() - began

    rng = random.Random(0)
    counts = {"kills": 0, "before the first state": 0, "while writing": 0, "within the run": 0}
    models, began = workdir / "models", time.time()
    while counts["kills"] < kills or not counts["within the run"]:
        begun = any(models.glob("train_state*.pth"))
        argv = ["--workdir", str(workdir), "--resume"] if begun else []
        process = start_run(context, argv or words(dataroot, workdir, options))
        process.join(rng.uniform(0, 1.5 * start_up) if counts["kills"] else 0.05)
        assert process.exitcode is None, f"the run ended after {counts['kills']} kills"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        counts["kills"] += 1
        counts["while writing"] += bool(list(workdir.glob("*/.*.tmp")))
        if any(models.glob("train_state*.pth")):
            counts["within the run"] += 1
            checkpoint.load_run(workdir)  # can be gone on with
        else:
            counts["before the first state"] += 1
            if counts["kills"] >= kills:  # the machine is slower than when it was measured
                start_up *= 1.5
        for path in models.glob("net*.pth"):
            utils.load_tensors(path)  # an exported file is there as a whole or not at all
    counts["seconds"] = round(time.time() - began)
    process = start_run(context, ["--workdir", str(workdir), "--resume", "--save_minutes", "10"])
    process.join()
    assert process.exitcode == 0
    assert differences(outcome(whole), outcome(workdir)) == []
    assert not list(workdir.glob("**/.*.tmp"))
    assert rows(workdir) == list(range(1, 50 * n_epochs + 1))
    print(counts)
    return counts


def test_kill_short(tmp_path):
    counts = kill_loop(tmp_path, kills=5, n_epochs=2)
    assert counts["within the run"] >= 1


def test_kill_long(long, tmp_path):
    counts = kill_loop(tmp_path, kills=60, n_epochs=20)
    assert counts["within the run"] >= 30 and counts["while writing"] >= 1


# ------------------------------------------------------------------------------------------------
# What the state is lost to, and bad numbers


def test_newest_state_damaged(dataroot, tmp_path, capsys, stop_at):
    """Truncated, or one bit of it changed: the state before is taken, and the end is the same."""
    wanted = undisturbed(dataroot, "--dropout", tmp_path / "whole")
    stop_at(8)
    run(dataroot, tmp_path / "run", "--dropout")
    before = (tmp_path / "run" / "models" / "train_state.pth").read_bytes()
    middle = len(before) // 2
    damages = {
        "cut": before[:middle],
        "flipped": before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :],
        "empty": b"",
        "missing": None,
    }
    for name, damaged in damages.items():
        workdir = copy_run(tmp_path / "run", tmp_path / name)
        path = workdir / "models" / "train_state.pth"
        path.unlink() if damaged is None else path.write_bytes(damaged)
        capsys.readouterr()
        assert resume(workdir) == 0
        assert re.search(
            r"train_state\.pth.*; going on from .*train_state\.prev\.pth", capsys.readouterr().out
        )
        assert differences(wanted, outcome(workdir)) == [], name


def test_killed_between_two_renames(dataroot, tmp_path, capsys, stop_at):
    """The previous state is moved away, the new one has not got its name yet: it is found."""
    wanted = undisturbed(dataroot, "--n_epochs 2", tmp_path / "whole")
    stop_at(8)
    run(dataroot, tmp_path / "run", "--n_epochs 2")
    models = tmp_path / "run" / "models"
    (models / "train_state.pth").rename(models / "train_state.new.pth")
    assert resume(tmp_path / "run") == 0
    assert "train_state.new.pth" in capsys.readouterr().out
    assert differences(wanted, outcome(tmp_path / "run")) == []


def test_killed_while_the_networks_are_exported(dataroot, tmp_path, monkeypatch):
    """The state gets its name last: beside a state of that name are its networks."""
    workdir, save_json = tmp_path / "run", utils.save_json

    def die(path, content):  # the last file before the state gets its name
        if read_state(workdir)["iteration"] == 5:
            raise KeyboardInterrupt
        save_json(path, content)

    options = "--n_epochs 2 --lr_policy constant"
    wanted = undisturbed(dataroot, options, tmp_path / "whole")
    assert run(dataroot, workdir, options + " --n_epochs 1") == 0
    monkeypatch.setattr(utils, "save_json", die)
    with pytest.raises(KeyboardInterrupt):
        resume(workdir, "--n_epochs 2")
    assert (workdir / "models" / "train_state.new.pth").exists()
    assert read_state(workdir)["iteration"] == 5
    monkeypatch.setattr(utils, "save_json", save_json)
    assert resume(workdir, "--n_epochs 2") == 0
    assert differences(wanted, outcome(workdir)) == []


def test_torn_logs(dataroot, tmp_path, stop_at):
    """Lines past the state or without an end are written again; a file without a header too."""
    wanted = undisturbed(dataroot, "--n_epochs 2 --eval_every 1", tmp_path / "whole")
    measures = (tmp_path / "whole" / "logs" / "metrics.csv").read_text()
    stop_at(6)  # of eight: one of five pictures is set aside to be measured on
    run(dataroot, tmp_path / "run", "--n_epochs 2 --eval_every 1")
    for name, more in {"rows": "2,7,1,1,1,1,1,1,9\n2,8,1,1,", "header": None}.items():
        workdir = copy_run(tmp_path / "run", tmp_path / name)
        log = workdir / "logs" / "losses.csv"
        log.write_text(log.read_text() + more) if more else log.write_text("")
        with open(workdir / "logs" / "metrics.csv", "a") as file:
            file.write("2,8,0.5,0.5,0.5\n2,8,0.")
        assert resume(workdir) == 0
        assert (workdir / "logs" / "metrics.csv").read_text() == measures
        if more:
            assert differences(wanted, outcome(workdir)) == []
        else:
            assert rows(workdir) == [7, 8]


@pytest.mark.parametrize("log_every", [1, 3])
def test_diverged(log_every, dataroot, tmp_path, capsys):
    run(dataroot, tmp_path, "--n_epochs 1")
    models = tmp_path / "models"
    before = {path.name: path.read_bytes() for path in models.glob("*.pth")}
    with pytest.raises(SystemExit) as stopped:
        argv = f"--workdir {tmp_path} --resume --n_epochs 9 --lr 1e18 --log_every {log_every}"
        utils.run(train.main, train.parse_args(argv.split()))
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    found = re.search(r"error: the loss (\w+) is (nan|inf|-inf) at iteration (\d+)", told)
    assert found and found[1] in ("D", "D_A", "D_B", "G", "adv", "cycle", "identity"), told
    assert int(found[3]) <= 5 + 2 + log_every and "--lr" in told
    assert {path.name: path.read_bytes() for path in models.glob("*.pth")} == before
    assert resume(tmp_path, "--n_epochs 2 --lr 0.0001") == 0


def test_state_that_is_not_finite_is_not_saved(dataroot, tmp_path, monkeypatch):
    """The log is read too rarely to notice, but a save looks at the weights."""
    step = train.CycleGAN.step

    def poison(self, batches):
        losses = step(self, batches)
        if self.iteration == 3:
            with torch.no_grad():
                self.netD_B.model[0].weight[0, 0, 0, 0] = float("nan")
        return losses

    monkeypatch.setattr(train.CycleGAN, "step", poison)
    with pytest.raises(UserError, match="a weight of netD_B is not finite at iteration 3"):
        run(dataroot, tmp_path, "--log_every 1000 --save_minutes 0")
    assert read_state(tmp_path)["iteration"] == 2


def test_a_slow_disk_gets_the_state_as_it_was(dataroot, tmp_path, monkeypatch):
    """Training goes on while the state is written, and must not change what is written."""
    save, written = checkpoint.write_state, {"fast": [], "slow": []}

    def keep(name: str, seconds: float):
        def save_state(workdir, state):
            time.sleep(seconds)
            save(workdir, state)
            written[name].append(outcome(workdir))

        return save_state

    for name, seconds in (("fast", 0), ("slow", 0.2)):
        monkeypatch.setattr(checkpoint, "write_state", keep(name, seconds))
        run(dataroot, tmp_path / name, "--n_epochs 3 --log_every 1000")
    assert len(written["slow"]) == 4  # at the start and after each epoch
    for fast, slow in zip(*written.values(), strict=True):
        rows = [name for name in {**fast, **slow} if name.startswith("row")]
        assert set(differences(fast, slow)) <= set(rows)  # the log is not part of the state
    weights = [first[".netG_A2B.model.1.weight"] for first in written["slow"]]
    assert len(set(weights)) == 4


def test_a_save_that_fails_ends_the_run(dataroot, tmp_path, monkeypatch):
    """It fails in a thread, yet the run does not go on for hours in vain."""
    save, iterations = checkpoint.write_state, []

    def save_state(workdir, state):
        iterations.append(state["iteration"])
        if len(iterations) == 2:
            raise UserError("the disk is full")
        save(workdir, state)

    monkeypatch.setattr(checkpoint, "write_state", save_state)
    with pytest.raises(UserError, match="the disk is full"):
        run(dataroot, tmp_path, "--n_epochs 9")
    assert iterations == [0, 5] and read_state(tmp_path)["iteration"] == 0


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_out_of_memory(kind, dataroot, tmp_path, monkeypatch, capsys):
    def fail(self, batches):
        if kind == "cuda":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        torch.empty(1 << 60)

    monkeypatch.setattr(train.CycleGAN, "step", fail)
    with pytest.raises(SystemExit) as stopped:
        utils.run(train.main, train.parse_args(words(dataroot, tmp_path)))
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "out of memory" in told and "Traceback" not in told
    for remedy in ("--size", "--batch_size", "--amp", "--accumulate"):
        assert remedy in told
