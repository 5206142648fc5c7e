"""Processes started by torchrun or srun, a thread that writes, and signals that end a run."""

import contextlib
import ctypes
import datetime
import multiprocessing.forkserver
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from utils import UserError


def join_processes() -> tuple[int, int]:
    """Join the other processes of torchrun or srun, if any; returns rank and world size."""
    if not dist.is_initialized():
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            os.environ.update(slurm_ranks(os.environ))
        if "RANK" not in os.environ:
            return 0, 1
        if sys.platform == "linux":  # when the launcher is killed, get SIGTERM
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        # torchrun keeps its store when it starts ranks again: they must not read old addresses
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if alone else ""
        timeout = datetime.timedelta(hours=1)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"attempt {attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    return dist.get_rank(), dist.get_world_size()


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set, from those of srun; UserError if some are missing."""
    try:
        hosts = environment["SLURM_STEP_NODELIST"]  # gpu[01-04,07],login3: rank 0 is on the first
        host = re.fullmatch(r"([\w.-]+?)(?:\[(\d+)[\d,-]*\])?(?:,.*)?", hosts)
        port = str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": environment["SLURM_STEP_TASKS_PER_NODE"].split("(")[0],
            "MASTER_ADDR": environment.get("MASTER_ADDR", host[1] + (host[2] or "")),
            "MASTER_PORT": environment.get("MASTER_PORT", port),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "srun started several processes but not all of its variables are set "
            f"({error}): start one torchrun on each node instead, see docs/distributed.md"
        ) from error


def on_main(function: Callable):
    """Call `function` on the first rank while the others wait; returns its result on all ranks.

    Its UserError ends all ranks; only the first prints it.
    """
    if not dist.is_initialized():
        return function()
    box = [None]
    if dist.get_rank() == 0:
        try:
            box = [function()]
        except UserError as error:
            box = [error]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if isinstance(box[0], UserError):
        if dist.get_rank() == 0:
            raise box[0]
        sys.exit(2)
    return box[0]


def all_ranks(yes: bool) -> bool:
    """Whether it is so on all ranks; also waits for all of them."""
    return not sum_over_ranks(np.array([not yes], np.int64)).any()


def share(files: list) -> list:
    """This rank's part of a list."""
    return files[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else files


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    if dist.is_initialized():
        dist.all_reduce(torch.from_numpy(values))  # in place
    return values


def worker_context() -> str | None:
    """How data workers are started: a fork is not safe once there is a process group."""
    if not dist.is_initialized():
        return None
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as its workers do, see ignore_signals
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGTERM, before)
    return "forkserver"


class WriterThread(contextlib.AbstractContextManager):
    """A thread that writes files while the device trains, one job at a time."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.job = self.pool.submit(int)  # nothing yet

    def submit(self, function: Callable, *arguments) -> None:
        """Wait for the last job, raise what it raised, and start another."""
        self.wait()
        self.job = self.pool.submit(function, *arguments)

    def wait(self) -> None:
        self.job.result()

    def __exit__(self, kind, error, traceback) -> None:
        """Wait for the last job and raise what it raised; print it if `error` ended the run."""
        self.pool.shutdown()
        if error is None:
            self.wait()
        elif self.job.exception() not in (None, error):
            print(f"error: {self.job.exception()}", file=sys.stderr)


def ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: the main process may need data until it has saved.

    30 seconds after SIGTERM the worker exits, in case the main process did not end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave = threading.Timer(30, os._exit, (0,))
    leave.daemon = True
    signal.signal(signal.SIGTERM, lambda *_: leave.is_alive() or leave.start())


class StopRequest(contextlib.AbstractContextManager):
    """Remembers Ctrl-C or SIGTERM until the iteration is done; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal, self.sent = 0, None
        self.torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # which repeats the signal
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT and not self.torchrun:
            raise KeyboardInterrupt
        self.signal = number
        if int(os.environ.get("RANK", 0)) == 0:
            print("\nfinishing this iteration, then saving (Ctrl-C again: stop now)", flush=True)

    def agree(self, due: bool) -> tuple[int, bool]:
        """The signal that any rank got (0: none), and whether a save is due on any.

        Among several ranks the answer is that of the call before this one: it travels during an
        iteration, so that nobody waits for it.
        """
        if not dist.is_initialized():
            return self.signal, due
        number, was_due = 0, 0
        if self.sent:
            numbers, work = self.sent
            work.wait()
            number, was_due = numbers.tolist()
        numbers = torch.tensor([self.signal, int(due and not was_due)])  # on the host, by gloo
        self.sent = numbers, dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True)
        return number, bool(was_due)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
