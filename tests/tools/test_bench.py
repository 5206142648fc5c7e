"""Plain and ours compute the same, FLOPs are right, each case sets what it says, a table comes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from tools import bench


def options(ngf: int):
    return train.parse_args(["--ngf", str(ngf), "--ndf", str(ngf), "--ema", "0"])


def networks(plain: bench.Plain) -> dict[str, torch.nn.Module]:
    names = ("netG_A2B", "netG_B2A", "netD_A", "netD_B")
    return {name: vars(plain)[name] for name in names}


def test_plain_and_ours_give_the_same_weights():
    """In float64: in float32 Adam turns rounding, where a gradient is near 0, into whole steps."""
    cpu = torch.device("cpu")
    plain, ours = bench.Plain(options(8), cpu), train.CycleGAN(options(8), cpu)
    before = {}
    for name, net in ours.networks().items():
        networks(plain)[name].double().load_state_dict(net.double().state_dict())
        before[name] = [p.detach().clone() for p in net.parameters()]
    torch.manual_seed(1)
    for _ in range(3):
        x, y = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64) * 2 - 1
        losses, expected = ours.step([(x, y)]), plain.step(x, y)
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, abs=1e-6), name
    for name, net in ours.networks().items():
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


def test_each_optimization_stands_alone():
    model = train.CycleGAN(options(8), torch.device("cpu"))
    model.map = threads = lambda *args: map(*args)
    bench.keep_one(model, "threads")
    assert model.map is threads and not model.batched
    bench.keep_one(model, "fused")
    assert model.optimizer_G.param_groups[0]["fused"] and not model.batched and model.map is map
    bench.keep_one(model, "batched")
    assert model.batched and not model.optimizer_D.param_groups[0]["fused"]
    bench.keep_one(model, "channels_last")
    weight = model.netD_A.model[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not model.batched
    names = {id(p) for group in model.optimizer_G.param_groups for p in group["params"]}
    assert names == {id(p) for net in (model.netG_A2B, model.netG_B2A) for p in net.parameters()}


@pytest.fixture
def backends():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield cudnn
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_plain_is_pytorch_as_it_comes(backends):
    """TF32 convolutions are PyTorch's default; only strict turns them off, only on a GPU a row."""
    default, plain = torch.backends.cudnn.allow_tf32, None
    for name, tf32, benchmark in (
        ("plain", default, False),
        ("strict", False, False),
        ("amp", default, False),
        ("benchmark", default, True),
    ):
        case = bench.Case("translate", name, torch.device("cpu"), 32, ngf=2, dtype=torch.bfloat16)
        backends.allow_tf32, backends.benchmark = not tf32, not benchmark
        picture = bench.make_step(case)()
        assert (backends.allow_tf32, backends.benchmark) == (tf32, benchmark), name
        assert picture.shape == (1, 3, 32, 32) and not picture.requires_grad
        plain = picture if name == "plain" else plain
        assert torch.equal(picture, plain) == (name != "amp")
        torch.testing.assert_close(picture.float(), plain, rtol=0, atol=0.02)
    gpu = bench.Case("train", "plain", torch.device("cuda"), 32)
    assert default and bench.precision_of(gpu) == "tf32"
    assert bench.precision_of(replace(gpu, name="strict")) == "float32"
    assert bench.precision_of(replace(gpu, name="ours", dtype=torch.bfloat16)) == "bf16"
    assert "benchmark" in bench.optimizations(gpu) and "amp" not in bench.optimizations(gpu)


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_command_prints_the_table(capsys, monkeypatch):
    """All of the command, but in threads of this process; see the next test."""
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    words = "--device cpu --amp off --sizes 32 --batches 1 --rounds 1 --ngf 2"
    bench.main(bench.parse_args(words.split()))
    first, *lines = capsys.readouterr().out.splitlines()
    assert torch.__version__ in first
    rows = [row for row in table("\n".join(lines)) if row]
    assert [row[:2] for row in rows[2:]] == [
        ["train", "plain"],
        ["train", "ours"],
        ["translate", "plain"],
        ["translate", "ours"],
    ]
    assert len({len(row) for row in rows}) == 1  # or no viewer takes it for a table
    for row in rows[2:]:
        cells = dict(zip(rows[0], row, strict=True))
        assert float(cells["s/step"]) > 0
        assert float(cells["peak GB"]) > 0.05 and float(cells["speed"]) > 0
        assert "GFLOP/s" in cells["of matmul rate"]


def test_cases_are_measured_in_processes_of_their_own():
    bench.make_step.cache_clear()
    case = bench.Case("translate", "plain", torch.device("cpu"), 32, ngf=2)
    ((seconds, first, memory),) = bench.measure([case], rounds=5, steps=1)
    assert first > 0 and seconds > 0 and memory > 5e7
    assert bench.make_step.cache_info().currsize == 0


def test_the_first_step_is_apart(monkeypatch):
    """Then the median of the rounds over their steps, and the memory of the last."""
    answers = iter([(9.0, 1), (2.0, 2), (8.0, 3), (4.0, 4)])
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    monkeypatch.setattr(bench, "run_steps", lambda case, n: next(answers))
    assert bench.measure([None], rounds=3, steps=2) == [(2.0, 9.0, 4)]


def test_loader_is_measured(dataroot, capsys, monkeypatch):
    monkeypatch.setattr(bench, "LOADER_SECONDS", 0.1)
    bench.main(bench.parse_args(["--data", str(dataroot), "--sizes", "32", "--device", "cpu"]))
    rows = table(capsys.readouterr().out)[-3:]
    assert rows[0][0] == "not cached, 0 workers" and rows[2][0].startswith("cached (filled in")
    assert all(int(row[2]) > 0 for row in rows)


def test_a_case_out_of_memory_is_a_row(capsys, monkeypatch):
    def fail(*args):
        raise bench.UserError("the GPU is out of memory: a smaller batch needs less")

    monkeypatch.setattr(bench, "measure", fail)
    bench.main(bench.parse_args(["--sizes", "32", "--batches", "1", "2", "--device", "cpu"]))
    assert capsys.readouterr().out.count("out of memory") == 4  # two tasks, two batches


def test_impossible_numbers_are_refused():
    with pytest.raises(bench.UserError, match="multiples of 4"):
        bench.main(bench.parse_args(["--sizes", "30", "--device", "cpu"]))
    with pytest.raises(bench.UserError, match="at least 1"):
        bench.main(bench.parse_args(["--steps", "0", "--device", "cpu"]))
