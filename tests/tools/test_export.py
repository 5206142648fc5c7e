"""Exported generators must do what PyTorch does, for any program that reads ONNX."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import test
from lib.weights import load_generator
from models import Generator, UNet, init_weights
from tools import export
from utils import UserError

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ROOT = Path(__file__).parent.parent.parent


def save(net: torch.nn.Module, path: Path) -> Path:
    """Weights large enough that the output is no uniform gray."""
    torch.manual_seed(len(path.name))
    torch.save(init_weights(net, init_gain=0.1).state_dict(), path)
    return path


def open_session(path: Path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The folder models/ of a run, exported by the command that a user types."""
    folder = tmp_path_factory.mktemp("run") / "models"
    folder.mkdir()
    for name in ("netG_A2B", "netG_B2A", "netG_B2A_ema"):
        save(Generator(ngf=8, n_residual_blocks=1), folder / f"{name}.pth")
    command = [sys.executable, "-m", "tools.export", "--workdir", folder.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and not done.stderr, "more than a line per file"
    assert sorted(path.name for path in folder.glob("*.onnx*")) == [
        "netG_A2B.onnx",
        "netG_B2A.onnx",
    ]
    return folder


def test_numpy_alone_can_use_the_file(models):
    session = open_session(models / "netG_A2B.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    channels = facts["input_channels"], facts["output_channels"]
    assert (*channels, facts["multiple"], facts["value_range"]) == ("3", "3", "4", "-1..1")
    x = np.random.default_rng(0).uniform(-1, 1, (3, 3, 20, 132)).astype(np.float32)
    (y,) = session.run([facts["output"]], {facts["input"]: x})
    with torch.no_grad():
        expected = load_generator(models / "netG_A2B.pth")(torch.from_numpy(x)).numpy()
    assert expected.std() > 0.05
    assert abs(y - expected).max() < 1e-4


def test_the_moving_average_is_what_is_exported(models):
    x = torch.rand(1, 3, 32, 32)
    exported = load_generator(models / "netG_B2A.onnx")(x)
    with torch.no_grad():
        average, last = (load_generator(models / f"netG_B2A{e}.pth")(x) for e in ("_ema", ""))
    assert abs(exported - average).max() < 1e-4 < abs(exported - last).max()


def test_no_path_of_this_machine_is_in_the_file(models):
    content = (models / "netG_A2B.onnx").read_bytes()
    assert b"models.py" not in content and str(ROOT).encode() not in content


def test_translates_like_the_weights_it_came_from(models, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)  # not multiples of 4
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    made = []
    for weights in (models / "netG_A2B.pth", models / "netG_A2B.onnx"):
        words = ["--workdir", tmp_path, "--input", tmp_path / "picture.png", "--amp", "off"]
        words += ["--device", "cpu", "--weights", weights]
        assert test.main(test.parse_args([str(word) for word in words])) == 0
        made.append(np.asarray(Image.open(tmp_path / "outputs" / "B" / "picture.png")).astype(int))
    assert made[0].shape == (37, 50, 3)
    assert abs(made[0] - made[1]).max() <= 1 and (made[0] != made[1]).mean() < 0.01


@pytest.mark.parametrize(
    ("net", "multiple"),
    [
        (lambda: UNet(3, 1, ngf=4, num_downs=5, dropout=True), 32),
        (lambda: Generator(1, 4, 8, 1, upsample="nearest", norm="batch", dropout=True), 4),
        (lambda: Generator(3, 3, 8, 1, upsample="nearest", norm="mixed", keep_source=True), 4),
    ],
)
def test_every_kind_of_generator(net, multiple, tmp_path):
    weights, output = save(net(), tmp_path / "net.pth"), tmp_path / "net.onnx"
    ranges = ((-1000, 3000.5), None)
    assert export.export(weights, output, False, ranges) < 1e-4
    onnx, torch_net = load_generator(output), load_generator(weights)
    assert onnx.ranges == ranges
    assert onnx.multiple == torch_net.multiple == multiple
    assert (onnx.input_nc, onnx.output_nc) == (torch_net.input_nc, torch_net.output_nc)
    x = torch.rand(1, onnx.input_nc, 3 * multiple, max(8, multiple)) * 2 - 1  # the smallest width
    with torch.no_grad():
        assert abs(onnx(x) - torch_net(x)).max() < 1e-4


def test_half_precision_is_half_as_large(models):
    export.main(export.parse_args(["--fp16", "--weights", str(models / "netG_A2B.pth")]))
    full, half = models / "netG_A2B.onnx", models / "netG_A2B_fp16.onnx"
    assert half.stat().st_size < 0.6 * full.stat().st_size
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    difference = abs(load_generator(half)(x) - load_generator(full)(x)).max()
    assert 0 < difference < 2e-2


def test_a_wrong_file_is_never_written(models, monkeypatch, tmp_path):
    output = tmp_path / "net.onnx"
    output.write_text("the one before")
    other = (models / "netG_B2A.onnx").read_bytes()  # an exporter that gets the weights wrong
    monkeypatch.setattr(export, "to_onnx", lambda *arguments: other)
    with pytest.raises(UserError, match=r"not written: it differs from PyTorch by \d\.\de[+-]0\d"):
        export.export(models / "netG_A2B.pth", output, fp16=False)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert output.read_text() == "the one before"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_names_the_package_that_is_missing(models, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"needs {package}: pip install .*{package}"):
        export.export(models / "netG_A2B.pth", models / "never.onnx", fp16=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models {empty}", "holds no generator"),
        ("--output x.onnx", "give --weights"),
        ("--weights {models}/netG_A2B.pth --output x.pth", "get .onnx"),
        ("--weights {models}/netG_A2B.onnx", "give a .pth"),
        ("--weights {models}/none.pth", "there is no checkpoint"),
    ],
)
def test_mistakes_are_explained(models, tmp_path, words, message):
    argv = words.format(models=models, empty=tmp_path).split()
    with pytest.raises(UserError, match=message):
        export.main(export.parse_args(argv))


def test_a_file_that_is_no_generator(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a network")
    with pytest.raises(UserError, match="not an ONNX file"):
        load_generator(tmp_path / "x.onnx")
    with pytest.raises(UserError, match="there is no file"):
        load_generator(tmp_path / "y.onnx")
