"""A run's state in `models/`: gather it, write it in a thread, read it back, start from weights.

`model` is train.py's CycleGAN. `train_state.pth` is all that a resume reads; the networks are
exported one by one beside it, as plain state_dicts.
"""

import copy
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

import utils
from models import LayoutError, generator_from_state, keep_source_state
from utils import UserError

NETWORKS = ("netG_A2B", "netG_B2A", "netD_A", "netD_B", "netG_A2B_ema", "netG_B2A_ema")


class WriterThread:
    """A thread that writes files while the device trains, one job at a time."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.job = self.pool.submit(int)  # nothing yet

    def submit(self, function: Callable, *arguments) -> None:
        """Wait for the last job, raise what it raised, and begin another."""
        self.job.result()
        self.job = self.pool.submit(function, *arguments)

    def close(self) -> None:
        """Wait for the last job and raise what it raised."""
        self.pool.shutdown()
        self.job.result()


# ------------------------------------------------------------------------------------------------
# Saving: gather the state, copy it to the host, write it in the thread


def gather_state(model, rank: int, world_size: int) -> dict:
    """The state of the model and, on the first rank, of all ranks. Every rank must call it.

    Raises:
        UserError: a weight is not finite.
    """
    for name, net in model.networks().items():
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise UserError(
                f"a weight of {name} is not finite at iteration {model.iteration}: the last good "
                "state is untouched; --resume from it with a lower --lr or --amp off"
            )
    mine = {
        "buffer_A": model.buffer_A.state_dict(),
        "buffer_B": model.buffer_B.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state() if model.device.type == "cuda" else None,
    }
    ranks = [mine]
    if world_size > 1:
        ranks = [None] * world_size if rank == 0 else None
        dist.gather_object(copy_to_host(mine), ranks)
    state = {name: part.state_dict() for name, part in model.parts().items()}
    log = {"identity": model.identity, "loss_sums": model.loss_sums, "n_summed": model.n_summed}
    return {**state, **log, "iteration": model.iteration, "ranks": ranks}


def copy_to_host(x):
    """Nested dicts and lists with every tensor in them copied, so that training may go on."""
    if isinstance(x, torch.Tensor):
        return x.to("cpu", copy=True)
    if isinstance(x, dict):
        copied = copy.copy(x)  # of the same kind: a state_dict has versions attached
        copied.update({key: copy_to_host(value) for key, value in x.items()})
        return copied
    return [copy_to_host(value) for value in x] if isinstance(x, list) else x


def write_state(workdir: Path, state: dict) -> None:
    """Write `models/train_state.pth`, keeping the one before, and export the networks.

    Raises:
        UserError: the disk is full, or the folder not writable.
    """
    folder = workdir / "models"
    newest, fresh = folder / "train_state.pth", folder / "train_state.new.pth"
    utils.save_tensors(fresh, state)
    for name in NETWORKS:
        if name in state:
            utils.save_tensors(folder / f"{name}.pth", state[name])
        else:  # an average that was here would be older than the weights, yet preferred
            (folder / f"{name}.pth").unlink(missing_ok=True)
    utils.save_json(folder / "options.json", state["args"])
    if newest.exists():
        os.replace(newest, folder / "train_state.prev.pth")
    os.replace(fresh, newest)  # last: a state that has this name is exported
    utils.sync_folder(folder)


class Saver:
    """Saves a run's state; only the first rank writes."""

    def __init__(self, args, rank: int, world_size: int):
        self.args, self.rank, self.world_size = args, rank, world_size
        self.thread, self.time = WriterThread(), time.time()

    def save(self, model, progress: dict) -> None:
        """Copy the state and write the copy in the thread. Every rank must call it.

        `progress` is how far the run is: epoch (from 0), sample (within it), seconds, best.

        Raises:
            UserError: a weight is not finite, or the save before this one failed.
        """
        state = gather_state(model, self.rank, self.world_size)
        if self.rank == 0:
            state = copy_to_host({**state, **progress, "args": self.args.options})
            self.thread.submit(write_state, self.args.workdir, state)
        self.time = time.time()

    def minutes(self) -> float:
        """Minutes since the last save."""
        return (time.time() - self.time) / 60

    def close(self) -> None:
        """Wait until what was saved is on disk."""
        self.thread.close()


# ------------------------------------------------------------------------------------------------
# Loading


def load_run(workdir: Path) -> dict:
    """The newest state of a run that can be read; UserError if there is none."""
    problems = []
    for name in ("train_state.pth", "train_state.new.pth", "train_state.prev.pth"):
        path = workdir / "models" / name
        try:
            state = utils.load_tensors(path)
            if not {"netG_A2B", "optimizer_G", "ranks", "args", "epoch", "sample"} <= state.keys():
                raise UserError(f"{path} is a checkpoint, but not the state of a run of train.py")
            if problems:
                print(f"{problems[0]}; going on from the other state, {path}")
            return state
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"cannot resume: {problems[0]}")


def exists(workdir: Path) -> bool:
    return any((workdir / "models").glob("train_state*.pth"))


def restore(model, state: dict, rank: int) -> None:
    """Put a saved state into the model; UserError if it does not fit.

    Adam keeps the lr, betas, ... of this run's options, its moments get the weights' memory layout.
    """
    try:
        for name, part in model.parts().items():
            saved = name if name in state else name.removesuffix("_ema")  # --ema may be new
            part_state = state[saved]
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, part_state)
            elif part_state != {}:  # that of the scaler is, if the run was not in fp16 until now
                part.load_state_dict(part_state)
        model.iteration, model.n_summed = state["iteration"], state["n_summed"]
        model.identity = state["identity"].to(model.device)
        model.loss_sums = state["loss_sums"].to(model.device)
        mine = state["ranks"][rank % len(state["ranks"])]
        model.buffer_A.load_state_dict(mine["buffer_A"], model.device)
        model.buffer_B.load_state_dict(mine["buffer_B"], model.device)
        torch.set_rng_state(mine["random"])
        if model.device.type == "cuda" and mine["cuda_random"] is not None:
            torch.cuda.set_rng_state(mine["cuda_random"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            "cannot resume: the saved state does not fit its own options, so it is damaged or "
            f"from another version ({str(error).splitlines()[-1].strip()})"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    for weight, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(weight).copy_(moments[name])


def load_initial(folder: Path, model) -> None:
    """Start from the weights in `folder` (`--init_from`): ours, or the reference repository's.

    Raises:
        UserError: no generators there, or of another architecture than the options ask for.
    """
    known = {"netG_A2B": "latest_net_G_A.pth", "netG_B2A": "latest_net_G_B.pth"}
    known |= {"netD_A": "latest_net_D_B.pth", "netD_B": "latest_net_D_A.pth"}  # theirs is swapped
    for name, net in model.networks().items():
        path = folder / f"{name}.pth"
        path = path if path.exists() else folder / known[name]
        if not path.exists() and name.startswith("netD"):
            continue  # published models rarely come with their discriminators
        if not path.exists():
            raise UserError(f"--init_from {folder} has neither {name}.pth nor {known[name]}")
        try:
            state = utils.load_tensors(path)
            if name.startswith("netG"):
                state = generator_from_state(state).state_dict()
                if model.args.keep_source and "keep_source" not in state:
                    state = keep_source_state(state)
            net.load_state_dict(state)
        except (LayoutError, RuntimeError) as error:
            raise UserError(
                f"the weights in {path} do not fit the networks asked for "
                f"(--netG, --ngf, --norm, ...): {str(error).splitlines()[-1].strip()}"
            ) from error
        if name in model.averages:
            model.averages[name].load_state_dict(net.state_dict())
        print(f"{name} starts from {path}")


def clear_run(workdir: Path) -> None:
    """Delete the run that `workdir` holds (`--restart`)."""
    old = ["models/train_state*.pth", "models/net*.pth", "models/best/*", "images/*.png"]
    old += ["logs/losses.*", "logs/metrics.csv", "logs/skipped.txt", "logs/events.*"]
    old += ["outputs/cycle/*.png", "result/[AB]2[AB]_*.png", "result/metrics.json"]
    for path in (path for pattern in old for path in workdir.glob(pattern)):
        path.unlink()
