"""A run's state in `models/`: gather it, write it in a thread, read it back, start from weights.

`model` is train.py's CycleGAN. `train_state.pth` is what a resume reads; the networks are also
exported one by one, as plain state_dicts.
"""

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist

import utils
from models import LayoutError, generator_from_state
from utils import UserError

NETWORKS = ("netG_A2B", "netG_B2A", "netD_A", "netD_B", "netG_A2B_ema", "netG_B2A_ema")


def gather_state(model, rank: int, world_size: int) -> dict | None:
    """The state of the model and of every rank; None on all ranks but the first. All must call it.

    Raises:
        UserError: a weight is not finite.
    """
    for name, net in model.networks().items():
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise UserError(
                f"a weight of {name} is not finite at iteration {model.iteration}: the last good "
                "state is untouched; --resume from it with a lower --lr or --amp off"
            )
    ranks = [model.rank_state()]
    if world_size > 1:
        ranks = [None] * world_size if rank == 0 else None
        dist.gather_object(model.rank_state(), ranks)
    return {**model.state_dict(), "ranks": ranks} if rank == 0 else None


def copy_to_host(x):
    """Nested dicts and lists with every tensor in them copied."""
    if isinstance(x, torch.Tensor):
        return x.to("cpu", copy=True)
    if isinstance(x, dict):
        copied = copy.copy(x)  # of the same kind: a state_dict has versions attached
        copied.update({key: copy_to_host(value) for key, value in x.items()})
        return copied
    return [copy_to_host(value) for value in x] if isinstance(x, list) else x


def write_state(workdir: Path, state: dict) -> None:
    """Write `models/train_state.pth`, keeping the one before, then export the networks.

    Raises:
        UserError: the disk is full, or the folder not writable.
    """
    folder = workdir / "models"
    newest, fresh = folder / "train_state.pth", folder / "train_state.new.pth"
    utils.save_tensors(fresh, state)
    if newest.exists():
        os.replace(newest, folder / "train_state.prev.pth")
    os.replace(fresh, newest)
    utils.sync_folder(folder)
    export(workdir, state)


def export(workdir: Path, state: dict) -> None:
    """Write each network as a plain state_dict (`netG_A2B.pth`, ...) and the run's options."""
    folder = workdir / "models"
    for name in NETWORKS:
        if name in state:
            utils.save_tensors(folder / f"{name}.pth", state[name])
        else:  # an average that was here would be older than the weights, yet preferred
            (folder / f"{name}.pth").unlink(missing_ok=True)
    utils.save_json(folder / "options.json", state["args"])


class Saver:
    """Saves a run's state while it trains; only the first rank writes."""

    def __init__(self, args, rank: int, world_size: int):
        self.args, self.rank, self.world_size = args, rank, world_size
        self.thread = utils.WriterThread()

    def save(self, model, progress: dict) -> None:
        """Copy the state, and write it in a thread. All ranks must call it.

        `progress` says how far the run is: epoch (from 0), sample (within it), seconds, best.

        Raises:
            UserError: a weight is not finite, or the last save failed.
        """
        state = gather_state(model, self.rank, self.world_size)
        if self.rank == 0:
            state = copy_to_host({**state, **progress, "args": self.args.options})
            self.thread.submit(write_state, self.args.workdir, state)

    def check(self) -> None:
        """Raise what the last save raised, if it is done."""
        self.thread.check()

    def close(self) -> None:
        """Wait until what was saved is on disk."""
        self.thread.close()


def load_run(workdir: Path) -> dict:
    """The newest state of a run that can be read.

    Raises:
        UserError: there is none.
    """
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


def load_initial(folder: Path, model) -> None:
    """Start from the weights in `folder` (`--init_from`): ours, or the reference repository's.

    Raises:
        UserError: no generators there, or of another architecture than the options ask for.
    """
    known = {"netG_A2B": "latest_net_G_A.pth", "netG_B2A": "latest_net_G_B.pth"}
    known |= {"netD_A": "latest_net_D_B.pth", "netD_B": "latest_net_D_A.pth"}  # theirs is swapped
    for name, net in model.networks().items():
        paths = [folder / f"{name}.pth", folder / known[name]]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            if name.startswith("netD"):
                continue  # published models rarely come with their discriminators
            raise UserError(f"--init_from {folder} has neither {paths[0].name} nor {paths[1].name}")
        try:
            state = utils.load_tensors(path)
            if name.startswith("netG"):
                state = generator_from_state(state).state_dict()
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
    for pattern in old:
        for path in workdir.glob(pattern):
            path.unlink()
