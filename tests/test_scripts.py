"""The scripts, typed as a user would type them."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test
import train
from lib import outputs, translation, validation
from lib.options import make_parser
from lib.weights import load_generator
from tools.demo import draw_demo
from utils import UserError

ROOT = Path(__file__).parent.parent
SMALL = ("--size", "32", "--load_size", "36", "--ngf", "4", "--ndf", "4")
SMALL += ("--n_residual_blocks", "1")


def type_command(*words, code: int = 0) -> str:
    """Run a script in a process of its own and give all that it printed."""
    command = (
        [sys.executable, *words]
        if words[0] == "-m"
        else [sys.executable, ROOT / words[0], *words[1:]]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, cwd=words[-1]
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said, said
    return said


@pytest.fixture(scope="module")
def fruit(tmp_path_factory) -> Path:
    """Eight tiny pictures to train on, four to test."""
    folder = tmp_path_factory.mktemp("fruit")
    rng = np.random.default_rng(0)
    for split, n in (("trainA", 4), ("trainB", 4), ("testA", 2), ("testB", 2)):
        (folder / split).mkdir()
        for i in range(n):
            pixels = rng.integers(0, 255, (40, 44, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{split[-1]}{i}.jpg")
    return folder


def test_train_then_test(fruit, tmp_path):
    """The two commands, and every file that they promise."""
    said = type_command(
        "train.py", "--dataroot", fruit, *SMALL, "--n_epochs", "2", "--log_every", "3",
        "--sample_every", "3", "--workdir", tmp_path,
    )  # fmt: skip
    line = (
        r"\[Epoch 2/2\] \[Batch 4/4\] \[D loss: \d\.\d{6}\] \[G loss: \d+\.\d{6}, adv: \d\.\d{6}, "
        r"cycle: \d\.\d{6}, identity: \d\.\d{6}\] \[lr: 0\.000050\] ETA: 0:00:00"
    )
    assert re.search(line, said), said
    assert re.search(r"\d\.\d% of the time waiting for data", said)
    for name in ("latest", "epoch_001", "epoch_002"):
        with Image.open(tmp_path / "images" / f"{name}.png") as grid:
            assert grid.width == 6 * (128 + 4) + 4  # six columns, shown at four times their size
    with open(tmp_path / "logs" / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["3", "4", "6", "8"]
    for row in rows:
        G = float(row["adv"]) + 10 * float(row["cycle"]) + 5 * float(row["identity"])
        assert float(row["G"]) == pytest.approx(G, abs=1e-4)
    assert Image.open(tmp_path / "logs" / "losses.png").size == (900, 560)
    for name in ("netG_A2B", "netG_B2A", "netD_A", "netD_B", "netG_A2B_ema", "netG_B2A_ema"):
        state = torch.load(tmp_path / "models" / f"{name}.pth", weights_only=True)
        assert all(key.startswith("model.") for key in state)

    said = type_command("test.py", "--compare", "1", "--workdir", tmp_path)
    assert "A2B: 2 of 2 pictures" in said and "error vs. ground truth" not in said
    rows = [tuple(row) for row in outputs.read_index(tmp_path)]
    for direction, side, other in (("A2B", "A", "B"), ("B2A", "B", "A")):
        for i in range(2):
            source = str(fruit / f"test{side}" / f"{side}{i}.jpg")
            assert (direction, source, f"{other}/{side}{i}.png", "") in rows
    assert len(rows) == 4
    for folder, names in (("A", ["B0.png", "B1.png"]), ("B", ["A0.png", "A1.png"])):
        files = sorted((tmp_path / "outputs" / folder).iterdir())
        assert [file.name for file in files] == names
        assert Image.open(files[0]).size == (32, 32)  # at the size trained at
    pair = Image.open(tmp_path / "result" / "A2B_A0.png")
    assert pair.size == (64, 32)
    left = np.asarray(pair)[:, :32]
    assert (left == np.asarray(Image.open(tmp_path / "outputs" / "B" / "A0.png"))).all()
    source = translation.prepare(fruit / "testA" / "A0.jpg", 3, {})
    shrunk = np.asarray(Image.fromarray(source).resize((32, 32), Image.Resampling.BICUBIC))
    assert abs(np.asarray(pair)[:, 32:].astype(int) - shrunk).max() <= 1

    before = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.png")}
    for path in before:
        path.unlink()
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "test.py"]
    said = type_command(*launch, "--compare", "1", "--workdir", tmp_path)  # two share the files
    assert said.count("A2B: 2 of 2 pictures") == 1
    assert {path: path.read_bytes() for path in before} == before
    assert [tuple(row) for row in outputs.read_index(tmp_path)] == rows

    words = ["--input", str(fruit / "testA" / "A0.jpg"), "--workdir", str(tmp_path)]
    assert test.main(test.parse_args(words)) == 0
    assert Image.open(tmp_path / "outputs" / "B" / "A0.png").size == (44, 40)  # its own size
    assert [tuple(row) for row in outputs.read_index(tmp_path)] == [*rows[2:], rows[0]]


def test_a_short_demo_run_gets_nearer_to_the_truth(tmp_path):
    draw_demo(tmp_path / "data", n_train=60, n_test=8)
    words = "--size 32 --load_size 36 --ngf 8 --ndf 8 --n_residual_blocks 1 --amp off --lr 2e-3"
    words += " --n_epochs 3 --ema 0.98 --no_tensorboard --sample_every 10000 --keep_source"
    words += " --lambda_cyc 30 --detach_cycle --lambda_id 1 --netD n_layers --n_layers_D 2"
    args = train.parse_args(
        [*words.split(), "--dataroot", str(tmp_path / "data"), "--workdir", str(tmp_path)]
    )
    assert train.main(args) == 0
    models = tmp_path / "models"
    options = translation.read_options(models)
    nets = {
        name: load_generator(translation.find_weights(models, name, last=False))
        for name in ("netG_A2B", "netG_B2A")
    }
    for letter in "AB":  # whose pictures have the same names, so the ground truth is known
        (tmp_path / "data" / f"test{letter}").rename(tmp_path / "data" / f"val{letter}")
    pairs = validation.find_pictures(tmp_path / "data", options)
    measures, score = validation.measure(nets, pairs, options, torch.device("cpu"), None)
    for way in ("A2B", "B2A"):
        changed, identity = measures[f"changed_{way}"], measures[f"identity_changed_{way}"]
        assert changed < 0.6 * identity, measures  # 0.38 to 0.42 with seeds 0 to 2
    assert score == (measures["mae_A2B"] + measures["mae_B2A"]) / 2


def train_args(*words):
    return train.parse_args([*SMALL, "--no_tensorboard", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dataroot", "nowhere/apple2orange"), "python -m tools.download apple2orange"),
        (("--size", "48", "--load_size", "40"), "at most --load_size, which is 40"),
        (("--n_epochs", "4", "--decay_epoch", "9"), "--decay_epoch 9 must be below --n_epochs 4"),
        (("--size", "30", "--load_size", "40"), "multiple of 4"),
        (("--batch_size", "0"), "--batch_size is 0"),
        (("--preprocess", "none", "--batch_size", "2"), "--batch_size 1"),
        (("--input_nc", "1"), "--lambda_id 0"),
        (("--ema", "1"), "--ema is 1"),
        (("--device", "toaster"), "cannot use the device toaster"),
        (("--resume",), "cannot resume: there is no checkpoint"),
        (("--init_from", "nowhere"), "--init_from nowhere has neither"),
        pytest.param(
            ("--cuda",),
            "compute on the CPU with --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_train_refuses(words, message, fruit, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train.main(train_args("--dataroot", fruit, "--workdir", tmp_path, *words))
    assert "\n" not in str(caught.value)


def test_empty_folder(tmp_path):
    (tmp_path / "trainA").mkdir()
    with pytest.raises(UserError, match="trainA holds no picture"):
        train.main(train_args("--dataroot", tmp_path, "--workdir", tmp_path))


def test_unwritable_workdir(fruit, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose another --workdir"):
        train.main(train_args("--dataroot", fruit, "--workdir", tmp_path / "file"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "train first"),
        (("--weights", "nowhere.pth", "--input", "."), "holds no picture"),
        (("--input", "nowhere", "--models", "."), "there is no --input nowhere"),
        (("--dataroot", "nowhere", "--models", "."), "there is no folder nowhere/testA"),
        (("--size", "-1"), "--size is -1, but must not be negative"),
        (("--smooth", "1"), "--smooth is 1.0, but must be at least 0 and below 1"),
        (("--range_A", "5", "1"), "--range_A 5 1: LO must be below HI"),
    ],
)
def test_test_refuses(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        test.main(test.parse_args(["--workdir", str(tmp_path / "work"), *words]))


def test_mistakes_are_one_line_and_code_2(tmp_path, capsys):
    said = type_command("train.py", "--dataroot", "nowhere", "--workdir", tmp_path, code=2)
    assert said.startswith("error: there is no folder nowhere/trainA") and said.count("\n") == 1
    for words, message in (
        (["--n_epochs", "many"], "invalid int value: 'many'"),
        (["--resume", "--restart"], "--restart: not allowed with argument --resume"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.parse_args(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_fits_two_screens():
    """Grouped, and two screens of 48 lines."""
    text = make_parser().format_help()
    assert len(text.splitlines()) <= 96
    for group in ("run", "schedule", "objective", "pictures", "networks", "device"):
        assert f"\n{group}:\n" in text


def test_float32_is_reproducible_whatever_workers_and_cache(fruit, tmp_path):
    """Two runs of one seed: the same bytes in every weight."""
    weights = []
    for i, words in enumerate(("--cache on", "--cache off --workers 0", "--cache off --workers 2")):
        workdir = tmp_path / str(i)
        words = f"--amp off --n_epochs 2 --workdir {workdir} --dataroot {fruit} {words}".split()
        assert train.main(train_args(*words)) == 0
        names = ("netG_A2B", "netG_B2A", "netD_A", "netD_B", "netG_A2B_ema")
        states = [torch.load(workdir / "models" / f"{name}.pth") for name in names]
        weights.append(torch.cat([value.flatten() for state in states for value in state.values()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
