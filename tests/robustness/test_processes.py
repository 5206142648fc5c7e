"""Runs of several processes, killed, stopped, restarted and moved, end as if undisturbed."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import (
    ROOT,
    TINY,
    differences,
    draw_set,
    outcome,
    plain,
    read_state,
    resume,
    run,
    words,
)

from lib import checkpoint, logger, processes, validation
from lib.weights import load_generator
from utils import UserError

LAUNCHER = "-m torch.distributed.run --standalone --nproc_per_node=2"
FORKED_TORCHRUN = Path(__file__).with_name("forked_torchrun.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")


def start(*command, env=None, cwd=None, program=(sys.executable,)) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.Popen(
        [*program, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=cwd,
    )


def torchrun(workdir: Path, options: str, launcher="", env=None, fork=False) -> subprocess.Popen:
    """torchrun as it is typed, or with ranks that are forks of it, which start in no time."""
    program = FORKED_TORCHRUN if fork else "-m torch.distributed.run"
    launcher = launcher or "--standalone --nproc_per_node=2"
    command = f"{program} {launcher} {ROOT}/train.py {TINY} --workdir {workdir}"
    return start(*command.split(), *options.split(), env=env)


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 300) -> str:
    """Wait for the end of a process and return what it printed."""
    try:
        text, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()  # no launcher survives its test; its ranks end with it
    assert process.returncode == code, text
    return text


def ranks_of(launcher: int) -> list[int]:
    """The process ids that a torchrun started, in their order."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{launcher}\n" in (folder / "status").read_text():
                found.append(int(folder.name))
    return sorted(found)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def wait_for_row(workdir: Path, process: subprocess.Popen, more: int = 1) -> None:
    """Wait until the log has so many more rows."""
    path = workdir / "logs" / "losses.csv"
    count = lambda: len(path.read_text().splitlines()) if path.exists() else 0
    wanted = max(1, count()) + more
    wait_for(lambda: count() >= wanted or process.poll() is not None, f"{wanted} lines")
    assert process.poll() is None, process.communicate()[0]


def wait_for_others(launcher: subprocess.Popen, old: set[int]) -> None:
    """Wait until torchrun has started both ranks again."""
    wait_for(lambda: len(set(ranks_of(launcher.pid)) - old) == 2, "new ranks")


# every rank has a buffer, dropout, and losses that are summed between two rows
OPTIONS = "--dropout --pool_size 3 --log_every 2 --save_minutes 0.001 --n_epochs 5 "
OPTIONS += "--refine_epochs 1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two ranks that nothing disturbed: its data and what it ended with.

    Its ranks leave no interpreter to shut down: threads of gloo that are left then can abort them.
    """
    folder = tmp_path_factory.mktemp("ranks")
    data = draw_set(folder / "data", 12, 10)
    code = """import os, sys
class Abort:
    def __del__(self, abort=os.abort):
        abort()
if "RANK" in os.environ:
    sys.aborts_when_python_shuts_down = Abort()
"""
    (folder / "sitecustomize.py").write_text(code)
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    finish(torchrun(folder / "whole", f"--dataroot {data} {OPTIONS}", env=paths))
    return data, folder / "whole"


def everything(workdir: Path) -> dict:
    """All that a run of two ranks ended with, what the second has of its own included."""
    path = workdir / "models" / f"rank1_{read_state(workdir)['iteration']}.pth"
    return outcome(workdir) | plain(torch.load(path, weights_only=True), "rank 1")


def kill_ranks(whole: tuple, workdir: Path, kills: int, seed: int) -> None:
    """kill -9 of random ranks at random moments; torchrun starts all of them again."""
    data, wanted = whole
    launcher = f"--standalone --nproc_per_node=2 --max-restarts={kills}"
    process = torchrun(workdir, f"--dataroot {data} {OPTIONS}", launcher, fork=True)
    chosen = random.Random(seed)
    for _ in range(kills):
        wait_for_row(workdir, process, chosen.randrange(1, 3))
        time.sleep(chosen.uniform(0, 0.05))
        before = ranks_of(process.pid)
        os.kill(before[chosen.randrange(2)], signal.SIGKILL)
        wait_for_others(process, set(before))
    finish(process)
    assert differences(everything(wanted), everything(workdir)) == []


def test_killed_ranks(whole, tmp_path):
    kill_ranks(whole, tmp_path, kills=3, seed=0)


def test_killed_agent(whole, tmp_path):
    """The documented line for two machines, typed twice here; one is killed, and types it again."""
    data, wanted = whole
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    text = (ROOT / "docs" / "distributed.md").read_text()
    variable, line = re.search(r"^    (\w+=1) torchrun (--nnodes.*) train.py", text, re.M).groups()
    line = line.replace("gpu01:29500", f"127.0.0.1:{port}").replace("node=4", "node=1")
    line += " --rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
    options = f"--dataroot {data} {OPTIONS} --resume auto"
    env = dict([variable.split("=")])
    first = torchrun(tmp_path, options, line + "1", env, fork=True)
    second = torchrun(tmp_path, options, line + "0", env, fork=True)
    wait_for_row(tmp_path, first, 2)
    ranks = ranks_of(second.pid)
    second.kill()
    for pid in ranks:  # it must not go on alone, beside the one that takes its place
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "the end of its rank")
    second.communicate()
    second = torchrun(tmp_path, options, line + "0", env, fork=True)
    finish(first)
    finish(second)
    assert differences(everything(wanted), everything(tmp_path)) == []


@pytest.mark.parametrize("target", ["launcher", "rank 1"])
def test_ranks_stop_together(target, dataroot, tmp_path):
    """SIGTERM stops both ranks after the same iteration; one process goes on with the run."""
    options = f"--dataroot {dataroot} --n_epochs 9000"
    process = torchrun(tmp_path, options, fork=target != "launcher")
    wait_for_row(tmp_path, process, 3)
    pid = process.pid if target == "launcher" else ranks_of(process.pid)[1]
    os.kill(pid, signal.SIGTERM)
    text = finish(process, 1)
    assert f"go on with --workdir {tmp_path} --resume" in text, text
    assert 'train.py", line' not in text, text  # torchrun's own traceback is not ours
    state = read_state(tmp_path)
    assert (
        state["world_size"] == 2 and (tmp_path / f"models/rank1_{state['iteration']}.pth").exists()
    )
    rows = logger.read_csv(tmp_path / "logs" / "losses.csv")["iteration"]
    assert state["iteration"] == rows[-1]
    own = [plain(checkpoint.load_run(tmp_path, rank)["rank"]) for rank in range(4)]
    assert own[0] == own[2] != own[1] == own[3]  # more ranks share what there is
    assert resume(tmp_path, f"--n_epochs {state['epoch'] + 1}") == 0
    rows = logger.read_csv(tmp_path / "logs" / "losses.csv")["iteration"]
    assert rows == list(range(1, int(rows[-1]) + 1)) and rows[-1] > state["iteration"]


def gradients(workdir: Path, optimizer: str) -> torch.Tensor:
    """Of a run's first step, all in one vector: Adam's first moment is (1 - beta1) times it."""
    moments = read_state(workdir)[optimizer]["state"].values()
    return torch.cat([moment["exp_avg"].flatten() for moment in moments]) / (1 - 0.5)


def test_two_ranks_are_one_large_batch(tmp_path):
    data = draw_set(tmp_path / "data", 2, 2)
    for letter in "AB":
        shutil.copytree(data / f"test{letter}", data / f"val{letter}")
    options = "--pool_size 0 --n_epochs 1 --decay_epoch 0 --eval_every 1"
    finish(torchrun(tmp_path / "two", f"--dataroot {data} {options}", fork=True))
    run(data, tmp_path / "one", options + " --batch_size 2")
    one, two = read_state(tmp_path / "one"), read_state(tmp_path / "two")
    assert one["iteration"] == two["iteration"] == 1
    for optimizer in ("optimizer_G", "optimizer_D"):
        a, b = gradients(tmp_path / "one", optimizer), gradients(tmp_path / "two", optimizer)
        assert (a - b).norm() < 2e-6 * a.norm()
    biases = 0
    for name, weight in one["netG_A2B"].items():  # biases before a norm move by rounding alone
        if name.endswith(".weight") or name == "model.15.bias":
            assert torch.allclose(weight, two["netG_A2B"][name], atol=1e-6), name
        biases += name.endswith(".bias")
    assert biases
    apart, together = (logger.read_csv(tmp_path / n / "logs/losses.csv") for n in ("two", "one"))
    for name in ("D", "G", "adv", "cycle", "identity"):
        assert apart[name] == pytest.approx(together[name], rel=5e-6)  # of six digits
    shared = logger.read_csv(tmp_path / "two" / "logs" / "metrics.csv")
    nets = {
        path.stem: load_generator(path) for path in (tmp_path / "two/models/best").glob("net*.pth")
    }
    options = read_state(tmp_path / "two")["args"]
    pairs = validation.find_pictures(data, options)
    alone, _ = validation.measure(nets, pairs, options, torch.device("cpu"), None)
    for name in ("mae_A2B", "identity_mae_A2B", "cycle_A2B", "mae_B2A", "cycle_B2A"):
        assert shared[name] == [pytest.approx(alone[name], rel=5e-6)], name


STAND_INS = {  # for commands that only Slurm has
    "srun": 'echo $$ > srun.pid; exec "$@"',
    "scancel": "kill -TERM $(cat srun.pid)",
    "scontrol": '[ "$1" = requeue ] && echo "$2" >> requeued || echo localhost',
}


def test_slurm_script(dataroot, tmp_path):
    """docs/slurm.sh as Slurm runs it: SIGTERM before the limit, queued again, and to the end."""
    for name, line in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "torchrun").write_text(
        f'#!/bin/bash\nexec {sys.executable} {FORKED_TORCHRUN} "${{@//29500/0}}"\n'
    )
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
    }
    command = ["bash", ROOT / "docs" / "slurm.sh", *words(dataroot, tmp_path, "--n_epochs 4")]
    job = start(*command, env=variables, cwd=tmp_path, program=[])
    wait_for_row(tmp_path, job, 3)
    job.terminate()
    assert "go on with --workdir" in finish(job)
    assert (tmp_path / "requeued").read_text() == "7\n"
    finish(start(*command, env=variables, cwd=tmp_path, program=[]))
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert read_state(tmp_path)["iteration"] == 4 * 5


SMALL_DEMO = (
    "--size 24 --load_size 26 --ngf 2 --ndf 2 --n_residual_blocks 1 --batch_size 16 --half_size 0"
)


@pytest.mark.parametrize("options", [SMALL_DEMO, ""])
def test_demo_of_two_ranks(options, tmp_path, request):
    """One rank draws the set while the other waits; data workers are started by a forkserver."""
    if not options:
        request.getfixturevalue("long")
    command = f"{LAUNCHER} {ROOT}/train.py --demo --n_epochs 1 --no_tensorboard --device cpu"
    command += f" --cache off --workers 1 {options}"
    text = finish(start(*command.split(), cwd=tmp_path), seconds=600)
    assert "Traceback" not in text
    assert (tmp_path / "models" / "netG_A2B.pth").exists()
    assert list((tmp_path / "outputs").rglob("*.png"))


def test_errors_of_several_ranks_are_said_once(dataroot, tmp_path):
    """By the first rank, without a traceback of ours; the others end with it."""
    process = torchrun(tmp_path, f"--dataroot {dataroot} --size 25")
    text = finish(process, 1)
    assert text.count("error: --size is 25") == 1, text
    assert 'train.py", line' not in text


SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_STEP_TASKS_PER_NODE": "2"}


def test_srun_without_torchrun(tmp_path):
    """srun's variables are enough to find each other; without the list of nodes it is an error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = "from lib import processes; print('rank %d of %d' % processes.join_processes())"
    more = {**SLURM, "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    ranks = [{**more, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    started = [start("-c", code, env=variables) for variables in ranks]
    for i, process in enumerate(started):
        assert f"rank {i} of 2" in finish(process)
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST.*torchrun on each node"):
        processes.slurm_ranks({**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"})
    found = processes.slurm_ranks({**ranks[1], "SLURM_STEP_NODELIST": "gpu-[03-05,09],login1"})
    assert found["MASTER_ADDR"] == "gpu-03" and found["RANK"] == found["LOCAL_RANK"] == "1"


OLD_DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 11040; return 0; }
"""


@pytest.mark.skipif(not shutil.which("gcc") or torch.version.cuda is None, reason="gcc, CUDA")
def test_driver_too_old(tmp_path):
    """A driver older than this PyTorch needs is an error, not a run on the CPU that takes weeks."""
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"]
    subprocess.run(command, check=True)
    code = "import utils; from lib.devices import pick_device as pick; "
    code += "utils.run(lambda args: pick(None), None)"
    text = finish(start("-c", code, env={"LD_LIBRARY_PATH": str(tmp_path)}), 2)
    assert "error: cannot use the device cuda (" in text and "too old" in text
