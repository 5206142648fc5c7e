"""How the learning rate, and the size of the pictures, change during a run."""

import math

WARM_UP = 15  # after --half_size the learning rate rises from 0 in 1/15 of the run


def at(args, done: float) -> tuple[float, int]:
    """The learning rate, and what the size of the pictures is divided by, after `done` epochs."""
    if done >= args.n_epochs:  # of --refine_epochs
        done = (done - args.n_epochs) / args.refine_epochs
        return args.lr * lr_factor("linear", done, 1, 0.5), 1
    lr = args.lr * lr_factor(args.lr_policy, done, args.n_epochs, args.decay_epoch)
    full = done / args.n_epochs - args.half_size  # share of the run so far at full size
    if full < 0:
        return lr, 2
    if args.half_size:  # a change of size is a shock: D learns it slowly
        lr *= min(1, WARM_UP * full)
    return lr, 1


def lr_factor(policy: str, epoch: float, n_epochs: float, decay_epoch: float) -> float:
    """What the learning rate is multiplied with after `epoch` epochs, a fraction within one.

    linear is the paper's (section 4): constant until `decay_epoch`, then straight towards 0.
    step divides by ten every `decay_epoch` epochs, cosine is half a wave, constant is 1.
    """
    if policy == "linear":
        return 1 - max(0, epoch - decay_epoch) / (n_epochs - decay_epoch)
    if policy == "step":
        return 0.1 ** (epoch // max(1, decay_epoch))
    if policy == "cosine":
        return (1 + math.cos(math.pi * epoch / n_epochs)) / 2
    return 1.0
