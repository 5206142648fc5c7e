"""tools/gpu_check.py on a CPU: what it checks there holds, and what is wrong it finds."""

import json

import pytest
import torch

from lib import checkpoint
from tools import gpu_check

CPU = torch.device("cpu")
TINY = "--device cpu --size 32 --ngf 4 --batches 1 --rounds 1"


@pytest.fixture
def report(tmp_path):
    return gpu_check.Report(tmp_path / "result")


def test_steps_and_speed(report):
    """Every case of the step agrees with float32; profile and speed have their rows."""
    args = gpu_check.parse_args(TINY.split())
    args.networks = "--size 32 --load_size 32 --ngf 4 --ndf 4 --n_residual_blocks 1"
    gpu_check.check_steps(report, CPU)
    gpu_check.check_profile(report, args, CPU, None)
    gpu_check.check_speed(report, args, CPU, None)
    report.close("this machine")
    lines = (report.folder / "gpu_check.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == report.rows
    assert [row["ok"] for row in rows if row["check"] == "step"] == [True] * 7, rows
    names = [row["case"] for row in rows if row["check"] == "speed"]
    assert names == ["batch 1 plain", "batch 1 float32 NCHW", "batch 1 float32 NHWC"]
    assert "| step | bf16 | ok | loss" in (report.folder / "gpu_check.md").read_text()


def test_resume(report, monkeypatch):
    """Moments follow their weights into another memory format; a plain load is found out."""
    gpu_check.check_resume(report, CPU)
    assert [row["ok"] for row in report.rows] == [True] * 3, report.rows
    monkeypatch.setattr(
        checkpoint, "load_optimizer", lambda optimizer, state: optimizer.load_state_dict(state)
    )
    gpu_check.check_resume(report, CPU)
    assert [row["ok"] for row in report.rows[4:]] == [False, False], report.rows


def test_layout_round_trip():
    """From a CPU to a GPU's memory format and back: the same losses over five steps."""
    model = gpu_check.make_model(gpu_check.SMALL, CPU)
    gpu_check.take_steps(model, 2, 1)
    moved = gpu_check.move(gpu_check.move(model, CPU, torch.channels_last), CPU, None)
    losses, wanted = (gpu_check.take_steps(net, 5, 1, first=2) for net in (moved, model))
    assert torch.allclose(losses, wanted, rtol=0, atol=1e-6)


def test_everything(long, tmp_path):
    """Also the run that is killed and started again by torchrun."""
    assert gpu_check.main(gpu_check.parse_args([*TINY.split(), "--workdir", str(tmp_path)])) == 0
