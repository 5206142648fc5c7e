"""Recipes x seeds: the table, and that finished runs are kept."""

import functools
import json
import statistics

import pytest
import tiny
import torch

from lib import metrics
from models import Generator
from tools import study
from utils import UserError

TINY = tiny.TINY.replace("--n_epochs 3", "--n_epochs 1")


def figures(recipe: str, errors: list[float], minutes: float = 3.0) -> dict:
    """A run's figures: errors of A2B and B2A of the last weights, half of them for the average."""
    run = {"data": "demo", "recipe": recipe, "command": f"python train.py {recipe}"}
    run["minutes"] = minutes
    for kind, factor in (("last", 1), ("average", 0.5)):
        run[kind] = {}
        for way, error, identity in zip(("A2B", "B2A"), errors, (0.2, 0.4), strict=True):
            made = {"changed": factor * error, "rmse": 20.0, "under_5": 0.25, "under_10": 0.5}
            run[kind][way] = {"translation": made, "identity": {"changed": identity, "rmse": 50.0}}
            run[kind][way]["flat"] = {"changed": 0.3, "rmse": 40.0}
    return run


def test_table():
    done = [figures("plain", [0.1, 0.1], 3), figures("plain", [0.14, 0.1], 4)]
    done.append(figures("other", [0.1, 0.1]))
    del done[2]["average"]  # trained with --ema 0
    lines = study.make_tables(done).splitlines()
    deviation = statistics.stdev([0.5, 0.7])
    both = lines[lines.index("## demo, A2B") :]
    assert both[2] == "| recipe | changed | RMSE | under 5, % | under 10, % | minutes | seeds |"
    rest = "20.0 ± 0.0 | 25.0 ± 0.0 | 50.0 ± 0.0 | 3.5 | 2 |"
    assert both[4] == f"| plain, last weights | 0.600 ± {deviation:.3f} | {rest}"
    assert both[5] == f"| plain, average weights | 0.300 ± {deviation / 2:.3f} | {rest}"
    assert both[6] == "| other, last weights | 0.500 | 20.0 | 25.0 | 50.0 | 3.0 | 1 |"
    assert both[7] == "| identity | 1.000 | 50.0 |  |  |  |  |"
    assert both[8] == "| flat color | 1.500 | 40.0 |  |  |  |  |"
    back = lines[lines.index("## demo, B2A") :]
    assert back[4] == f"| plain, last weights | 0.250 ± 0.000 | {rest}"
    assert "- plain: `python train.py plain`" in lines


def test_table_of_unpaired_pictures():
    """Without a truth there is the cycle error, and no column of empty cells."""
    run = figures("plain", [0.1, 0.1])
    for way in ("A2B", "B2A"):
        for kind in ("last", "average"):
            run[kind][way] = {"translation": {"cycle": 12.5}, "identity": {}}
    table = study.make_tables([run])
    assert "| recipe | cycle | minutes | seeds |" in table
    assert "| plain, last weights | 12.5 | 3.0 | 1 |" in table
    assert "| identity |" not in table


def options_of(dataroot, more: str = "") -> str:
    return f"--dataroot {dataroot} {TINY} {more}"


def test_a_run_is_measured_and_kept(dataroot, tmp_path, monkeypatch):
    """One run in this process, with rows of four kinds; then it is finished for good."""
    few = functools.partial(metrics.sample_patches, n=64)
    monkeypatch.setattr(metrics, "sample_patches", few)
    options = options_of(dataroot, "--lr 0.01 --eval_every 1 --n_epochs 3")
    study.run_once(tmp_path / "runs/one_0", "one", f"python train.py {options}", 0, False)
    figures = json.loads((tmp_path / "runs/one_0/figures.json").read_text())
    errors = {
        kind: sum(figures[kind][way]["translation"]["mae"] for way in ("A2B", "B2A"))
        for kind in ("last", "average", "selected", "oracle")
    }
    assert errors["oracle"] < errors["average"] != errors["last"]  # of noise: it only gets worse
    assert errors["oracle"] <= errors["selected"]
    assert not (tmp_path / "runs/one_0/models/epochs").exists()

    monkeypatch.setattr(study, "ProcessPoolExecutor", None)  # nothing may be started again
    words = ["--recipe", f"one={options}", "--seeds", "1", "--workdir", str(tmp_path)]
    words += ["--folder", str(tmp_path / "runs")]
    study.main(study.parse_args(words))
    table = (tmp_path / "result" / "study.md").read_text()
    for row in ("last weights", "average weights", "selected epoch", "oracle's epoch"):
        assert table.count(f"| one, {row} | ") == 2  # A2B and B2A
    words[1] += " --lr 1e-3"
    with pytest.raises(UserError, match="another name"):
        study.main(study.parse_args(words))


def test_the_oracle_is_the_epoch_of_the_least_error(dataroot, tmp_path, monkeypatch):
    options = {"dataroot": str(dataroot), "device": "cpu", "cuda": False, "amp": "off"}
    seen = []

    def measure(nets, pairs, *more) -> tuple[dict, float]:
        value = float(nets["netG_B2A"].model[1].bias[0].detach())  # of epochs 1, 2, 3: 3, 1, 2
        seen.append((value, {way: [truth.name for _, truth in pairs[way]] for way in pairs}))
        return {}, value

    for epoch, value in enumerate((3.0, 1.0, 2.0), 1):
        for name in ("netG_A2B", "netG_B2A"):
            net = Generator(ngf=2, n_residual_blocks=1)
            torch.nn.init.constant_(net.model[1].bias, value)
            path = tmp_path / "epochs" / f"{epoch:04d}" / f"{name}.pth"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(net.state_dict(), path)
    monkeypatch.setattr(study.validation, "measure", measure)
    study.pick_oracle(tmp_path, options)
    names = {way: ["0.png", "1.png"] for way in ("A2B", "B2A")}
    assert sorted(seen) == [(value, names) for value in (1.0, 2.0, 3.0)]
    bias = torch.load(tmp_path / "oracle" / "netG_A2B.pth", weights_only=True)["model.1.bias"]
    assert bias[0] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"oracle"}


def test_a_failed_run_is_reported(tmp_path):
    """A real process, whose messages are in output.txt: there are no pictures to test with."""
    tiny.draw_set(tmp_path / "data", 1, 1)
    (tmp_path / "data" / "testB").rename(tmp_path / "data" / "elsewhere")
    words = ["--recipe", f"one={options_of(tmp_path / 'data')}", "--seeds", "1"]
    words += ["--folder", str(tmp_path / "runs"), "--workdir", str(tmp_path)]
    with pytest.raises(UserError, match="one_0 failed .*testB.*: see its output.txt"):
        study.main(study.parse_args(words))
    assert "[Epoch 1/1]" in (tmp_path / "runs" / "one_0" / "output.txt").read_text()


def test_bad_recipe(tmp_path):
    with pytest.raises(UserError, match="NAME=OPTIONS"):
        study.main(study.parse_args(["--recipe", "--amp off", "--workdir", str(tmp_path)]))
