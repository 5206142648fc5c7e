"""Recipes x seeds: the table, and that finished runs are kept."""

import json
import statistics

import pytest

from tools import study
from tools.demo import draw_demo
from utils import UserError


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
    assert both[8] == "| flat colour | 1.500 | 40.0 |  |  |  |  |"
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


def test_runs_and_goes_on(tmp_path, monkeypatch):
    draw_demo(tmp_path / "data", n_train=2, n_test=2)
    tiny = "--size 32 --load_size 36 --ngf 4 --ndf 4 --n_residual_blocks 1 --n_epochs 1"
    recipe = f"one=--dataroot {tmp_path / 'data'} {tiny}"
    words = ["--recipe", recipe, "--seeds", "1", "--workdir", str(tmp_path)]
    words += ["--folder", str(tmp_path / "runs")]
    study.main(study.parse_args(words))
    table = (tmp_path / "result" / "study.md").read_text()
    assert "| one, last weights | " in table and "| one, average weights | " in table

    figures = json.loads((tmp_path / "runs" / "one_0" / "figures.json").read_text())
    last, average = (figures[kind]["A2B"]["translation"]["changed"] for kind in ("last", "average"))
    assert last != average

    def refuse(*args, **settings):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(study.subprocess, "run", refuse)
    study.main(study.parse_args(words))
    assert (tmp_path / "result" / "study.md").read_text() == table

    words[1] += " --lr 1e-3"
    with pytest.raises(UserError, match="another name"):
        study.main(study.parse_args(words))


def test_a_failed_run_is_reported(tmp_path):
    words = ["--recipe", f"one=--dataroot {tmp_path / 'nothing'}", "--seeds", "1"]
    words += ["--folder", str(tmp_path / "runs"), "--workdir", str(tmp_path)]
    with pytest.raises(UserError, match="output.txt"):
        study.main(study.parse_args(words))
    assert "nothing" in (tmp_path / "runs" / "one_0" / "output.txt").read_text()


def test_bad_recipe(tmp_path):
    with pytest.raises(UserError, match="NAME=OPTIONS"):
        study.main(study.parse_args(["--recipe", "--amp off", "--workdir", str(tmp_path)]))
