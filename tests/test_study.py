"""Recipes x seeds: the table, and that finished runs are kept."""

import statistics

import pytest

import download
import study
from utils import UserError


def figures(*errors: float) -> dict:
    """A run's figures: errors of A2B and B2A of the last weights, half of them for the average."""
    kinds = {}
    for kind, factor in (("last", 1), ("average", 0.5)):
        A2B, B2A = (factor * error for error in errors)
        kinds[kind] = {"error_A2B": A2B, "nothing_A2B": 0.2, "error_B2A": B2A, "nothing_B2A": 0.4}
    return {"minutes": 3.0, **kinds}


def test_table():
    runs = [figures(0.1, 0.1), figures(0.14, 0.1)]
    table = study.make_table({"plain": runs}, {"plain": "--demo --amp off"})
    deviation = statistics.stdev([0.5, 0.7])
    assert f"| plain | last | 0.600 ± {deviation:.3f} | 0.250 ± 0.000 | 2 | 3.0 |" in table
    assert "| plain | average | 0.300" in table
    assert "- plain: `python train.py --demo --amp off`" in table


def test_runs_and_goes_on(tmp_path, monkeypatch):
    download.draw_demo(tmp_path / "data", n_train=2, n_test=2)
    tiny = "--size 32 --load_size 36 --ngf 4 --ndf 4 --n_residual_blocks 1 --n_epochs 1"
    words = ["--base", f"--dataroot {tmp_path / 'data'} {tiny}", "--recipe", "one=--amp off"]
    words += ["--seeds", "1", "--folder", str(tmp_path / "runs"), "--workdir", str(tmp_path)]
    study.main(study.parse_args(words))
    table = (tmp_path / "result" / "study.md").read_text()
    assert "| one | last | " in table and "| one | average | " in table

    def refuse(*args, **settings):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(study.subprocess, "run", refuse)
    study.main(study.parse_args(words))
    assert (tmp_path / "result" / "study.md").read_text() == table


def test_bad_recipe(tmp_path):
    with pytest.raises(UserError, match="NAME=OPTIONS"):
        study.main(study.parse_args(["--recipe", "--amp off", "--workdir", str(tmp_path)]))
