"""A run's state in `models/`: gather it, write it in a thread, read it back.

`model` is train.py's CycleGAN. `train_state.pth` is all that a resume reads, but for what each
further rank has of its own: `rank<r>_<iteration>.pth`. The networks are exported one by one, as
plain state_dicts.
"""

import contextlib
import copy
import itertools
import os
from pathlib import Path

import torch

import utils
from lib import processes
from utils import UserError

NETWORKS = ("netG_A2B", "netG_B2A", "netD_A", "netD_B", "netG_A2B_ema", "netG_B2A_ema")

# ------------------------------------------------------------------------------------------------
# Saving: gather the state, copy it to the host, write it in the thread


def gather_state(model) -> dict:
    """The state of the model, what this rank has of its own under "rank".

    Raises UserError if a weight is not finite.
    """
    for name, net in model.networks().items():
        if not all(torch.isfinite(p).all() for p in net.parameters()):
            raise UserError(
                f"a weight of {name} is not finite at iteration {model.iteration}: the last good "
                "state is untouched; --resume from it with a lower --lr or --amp off"
            )
    state = {name: part.state_dict() for name, part in model.parts().items()}
    rank = {name: vars(model)[name] for name in ("identity", "loss_sums", "n_summed", "iteration")}
    rank |= {"buffer_A": model.buffer_A.state_dict(), "buffer_B": model.buffer_B.state_dict()}
    rank["random"] = torch.get_rng_state()
    rank["cuda_random"] = torch.cuda.get_rng_state() if model.device.type == "cuda" else None
    return {**state, "iteration": model.iteration, "rank": rank}


def copy_to_host(x):
    """Nested dicts and lists with every tensor in them copied, so that training may go on."""
    if isinstance(x, torch.Tensor):
        return x.to("cpu", copy=True)
    if isinstance(x, dict):
        copied = copy.copy(x)  # of the same kind: a state_dict has versions attached
        copied.update({key: copy_to_host(value) for key, value in x.items()})
        return copied
    return [copy_to_host(value) for value in x] if isinstance(x, list) else x


def export(folder: Path, weights: dict[str, dict], options: dict) -> None:
    """Write state_dicts to `<name>.pth` each, and the run's options to options.json."""
    for name, state in weights.items():
        utils.save_tensors(folder / f"{name}.pth", state)
    utils.save_json(folder / "options.json", options)


def write_state(workdir: Path, state: dict) -> None:
    """Write `models/train_state.pth`, keeping the one before, and export the networks."""
    folder = workdir / "models"
    newest, fresh = folder / "train_state.pth", folder / "train_state.new.pth"
    utils.save_tensors(fresh, state)
    for name in set(NETWORKS) - state.keys():  # old averages would be preferred to the weights
        (folder / f"{name}.pth").unlink(missing_ok=True)
    export(folder, {name: state[name] for name in NETWORKS if name in state}, state["args"])
    if newest.exists():
        os.replace(newest, folder / "train_state.prev.pth")
    os.replace(fresh, newest)  # last: a state that has this name is exported
    utils.sync_folder(folder)


def write_rank(workdir: Path, rank: int, state: dict) -> None:
    """Write what a further rank has of its own, keeping the file before, as `write_state` does."""
    folder = workdir / "models"
    utils.save_tensors(folder / f"rank{rank}_{state['iteration']}.pth", state)
    files = sorted(folder.glob(f"rank{rank}_*.pth"), key=lambda path: path.stat().st_mtime_ns)
    for path in files[: -2 if state["iteration"] else -1]:
        path.unlink()


def save(model, progress: dict, writer: processes.WriterThread) -> None:
    """Copy the state and let `writer` write it: the first rank what all share, others their own.

    `progress` is how far the run is: epoch (from 0), sample (within it), seconds, best. Every rank
    must call it. Raises UserError if a weight is not finite, or if the save before this one failed.
    """
    writer.wait()
    processes.all_ranks(True)  # so that the files of all ranks are at most one save apart
    state, workdir = gather_state(model), model.args.workdir
    if model.rank == 0:
        state |= {**progress, "args": model.args.options, "world_size": model.world_size}
        writer.submit(write_state, workdir, copy_to_host(state))
    else:
        writer.submit(write_rank, workdir, model.rank, copy_to_host(state["rank"]))


# ------------------------------------------------------------------------------------------------
# Loading


def read_state(path: Path) -> dict | str:
    """A run's state, or the reason why it cannot be read."""
    try:
        state = utils.load_tensors(path)
    except UserError as error:
        return str(error)
    if not {"netG_A2B", "optimizer_G", "rank", "args", "epoch", "sample"} <= state.keys():
        return f"{path} is a checkpoint, but not the state of a run of train.py"
    return state


def load_run(workdir: Path, rank: int = 0) -> dict:
    """The newest state that can be read; one with the files of all ranks is preferred.

    The first rank reads, the others receive it: they may have another disk, or an older view of
    the same. A state that is not the newest becomes `train_state.pth`, so that the next save keeps
    it. Raises UserError if there is none.
    """
    folder, problems = workdir / "models", []
    names = ("train_state.pth", "train_state.new.pth", "train_state.prev.pth")
    for incomplete, name in itertools.product((False, True), names):
        path = folder / name
        state = processes.on_main(lambda path=path: read_state(path))
        if isinstance(state, str):
            problems.append(state)
            continue
        source = rank % state["world_size"]  # there may be more or fewer ranks than there were
        if source:
            state["rank"] = None
            with contextlib.suppress(UserError):
                own = folder / f"rank{source}_{state['iteration']}.pth"
                state["rank"] = utils.load_tensors(own)
        if not processes.all_ranks(state["rank"] is not None) and not incomplete:
            problems.append(f"{path} is without the files of some of its ranks")
            continue
        if problems and rank == 0:
            print(f"{problems[0]}; going on from {path}")
            os.replace(path, folder / "train_state.pth")
        return state
    raise UserError(f"cannot resume: {problems[0]}")


def exists(workdir: Path) -> bool:
    return any((workdir / "models").glob("train_state*.pth"))


def restore(model, state: dict) -> None:
    """Put a saved state into the model; UserError if it does not fit.

    Adam keeps the lr, betas, ... of this run's options, its moments get the weights' memory layout.
    A rank whose own part is lost keeps its new, empty image buffers.
    """
    try:
        if "model.1.bias" in model.netG_A2B.state_dict().keys() - state["netG_A2B"].keys():
            state = add_first_bias(state)
        for name, part in model.parts().items():
            net = name.removesuffix("_ema").removesuffix("_initial")
            others = () if name == net else (f"{net}_ema", net)  # --ema, --lambda_keep may be new
            saved = state[next((key for key in (name, *others) if key in state), name)]
            if isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, saved)
            elif saved:  # that of the scaler is empty if the run was not in fp16 until now
                part.load_state_dict(saved)
        model.iteration, own = state["iteration"], state["rank"]
        if own is None:
            print(f"rank {model.rank} starts with empty image buffers: its file is missing")
            return
        model.identity, model.n_summed = own["identity"].to(model.device), own["n_summed"]
        model.loss_sums = own["loss_sums"].to(model.device)
        model.buffer_A.load_state_dict(own["buffer_A"], model.device)
        model.buffer_B.load_state_dict(own["buffer_B"], model.device)
        torch.set_rng_state(own["random"])
        if model.device.type == "cuda" and own["cuda_random"] is not None:
            torch.cuda.set_rng_state(own["cuda_random"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            "cannot resume: the saved state does not fit its own options, so it is damaged or "
            f"from another version ({str(error).splitlines()[-1].strip()}); --init_from starts a "
            "new run from its networks"
        ) from error


def add_first_bias(state: dict) -> dict:
    """The state of a run with a bias in the generators' first convolution, of zeros.

    With `--norm channel` runs had none until 2026-12-02.
    """
    nets = {name: part for name, part in state.items() if name.startswith("netG")}
    zeros = torch.zeros(len(state["netG_A2B"]["model.1.weight"]))
    optimizer = state["optimizer_G"]
    moments = [optimizer["state"][i] for i in sorted(optimizer["state"])]
    for i in (len(moments) // 2, 0) if moments else ():  # after the first weight of each
        moments.insert(i + 1, {"step": moments[i]["step"], "exp_avg": zeros, "exp_avg_sq": zeros})
    (group,) = optimizer["param_groups"]
    group = group | {"params": list(range(len(group["params"]) + 2))}
    optimizer = {"state": dict(enumerate(moments)), "param_groups": [group]}
    nets = {name: {**net, "model.1.bias": zeros} for name, net in nets.items()}
    return {**state, **nets, "optimizer_G": optimizer}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    own = optimizer.state_dict()["param_groups"]
    groups = [b | {"params": a["params"]} for a, b in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for weight, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(weight).copy_(moments[name])


def clear_run(workdir: Path) -> None:
    """Delete the run that `workdir` holds (`--restart`)."""
    old = ["models/train_state*.pth", "models/net*.pth", "models/rank*.pth", "models/best/*"]
    old += ["images/*.png", "logs/losses.*", "logs/metrics.csv", "logs/skipped.txt"]
    old += ["logs/events.*", "outputs/cycle/*.png", "result/[AB]2[AB]_*.png", "result/metrics.json"]
    for path in (path for pattern in old for path in workdir.glob(pattern)):
        path.unlink()
