"""torchrun whose ranks are forks of it, with PyTorch loaded already: each saves seconds."""

import sys

import matplotlib.figure  # noqa: F401
import torch._dynamo  # noqa: F401
from torch.distributed import run

import train


def run_rank(script: str, *words: str) -> None:
    code = train.main(train.parse_args(list(words)))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run.run_script_path = run_rank  # what --run-path calls
    run.main(["--run-path", "--start-method=fork", *sys.argv[1:]])
