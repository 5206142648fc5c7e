"""bench.py: the two steps it compares compute the same, its FLOPs are right, it prints a table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from tools import bench

ROOT = Path(__file__).parent.parent.parent


def options(ngf: int):
    args = train.parse_args(["--ngf", str(ngf), "--ndf", str(ngf), "--ema", "0"])
    train.fill_in(args)
    return args


def networks(plain: bench.Plain) -> dict[str, torch.nn.Module]:
    names = ("netG_A2B", "netG_B2A", "netD_A", "netD_B")
    return {name: vars(plain)[name] for name in names}


def test_plain_and_tuned_give_the_same_weights():
    """In float64: in float32 Adam turns rounding, where a gradient is near 0, into whole steps."""
    cpu = torch.device("cpu")
    plain, tuned = bench.Plain(options(8), cpu), train.CycleGAN(options(8), cpu)
    before = {}
    for name, net in tuned.networks().items():
        networks(plain)[name].double().load_state_dict(net.double().state_dict())
        before[name] = [p.detach().clone() for p in net.parameters()]
    torch.manual_seed(1)
    for _ in range(3):
        x, y = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64) * 2 - 1
        losses, expected = tuned.step([(x, y)]), plain.step(x, y)
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, abs=1e-6), name
    for name, net in tuned.networks().items():
        both = zip(net.named_parameters(), networks(plain)[name].parameters(), strict=True)
        for (key, p), q in both:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=f"{name} {key}")
        moved = [(p - q).abs().max() for p, q in zip(net.parameters(), before[name], strict=True)]
        assert max(moved) > 3e-4  # so that "the same" does not mean "not trained"


def test_flops_are_what_the_arithmetic_gives():
    assert bench.count_flops("translate", 256, 64) == pytest.approx(2 * 49.55e9, rel=1e-3)
    assert bench.count_flops("train", 256, 64) == pytest.approx(2 * 0.94e12, rel=1e-2)

    plain = bench.Plain(options(32), torch.device("cpu"))
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    with FlopCounterMode(display=False) as counter:
        plain.step(x, y)
    spent = counter.get_total_flops()  # with gradients of discriminators that are thrown away
    assert bench.count_flops("train", 32, 32) == pytest.approx(spent, rel=0.05)


def test_lever_alone_is_what_differs():
    model = train.CycleGAN(options(8), torch.device("cpu"))
    bench.use_one_lever(model, "fused")
    assert model.optimizer_G.param_groups[0]["fused"]
    assert not model.generators.batched
    bench.use_one_lever(model, "channels_last")
    assert not model.optimizer_D.param_groups[0]["fused"]
    weight = model.netD_A.model[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench", "--device", "cpu", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_prints_the_table():
    result = run("--sizes", "32", "--batches", "1", "--rounds", "1", "--steps", "1", "--ngf", "8")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()]
    rows = [row for row in rows if row]
    assert [row[:2] for row in rows[2:]] == [
        ["train", "plain"],
        ["train", "tuned"],
        ["translate", "plain"],
        ["translate", "tuned"],
    ]
    assert len({len(row) for row in rows}) == 1  # or no viewer takes it for a table
    for row in rows[2:]:
        cells = dict(zip(rows[0], row, strict=True))
        assert float(cells["s/step"]) > 0
        assert float(cells["peak GB"]) > 0.05
    assert torch.__version__ in result.stdout.splitlines()[0]


def test_loader_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "LOADER_SECONDS", 0.2)
    bench.draw_pictures(tmp_path, n=3, listed=500)
    args = bench.parse_args(["--data", "--sizes", "64", "--workers", "0", "--device", "cpu"])
    bench.bench_data(args, tmp_path, tmp_path)
    printed = capsys.readouterr().out
    assert "listing 500 files" in printed
    rates = [line.split("|")[-2] for line in printed.splitlines()[-2:]]
    assert all(int(rate) > 0 for rate in rates)
    assert "cached (filled" in printed


def test_impossible_numbers_are_refused():
    with pytest.raises(bench.UserError, match="multiples of 4"):
        bench.main(bench.parse_args(["--sizes", "30", "--device", "cpu"]))
    with pytest.raises(bench.UserError, match="at least 1"):
        bench.main(bench.parse_args(["--steps", "0", "--device", "cpu"]))
