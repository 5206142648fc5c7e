"""Tiles give the whole picture's result, in the space that was worked out, and leave nothing."""

import contextlib
import copy
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT
from torch import nn

import datasets
import test as test_script  # or pytest would collect it
from lib import devices, tiling
from lib.translation import translate_batch
from models import Generator, UNet, init_weights, translate
from utils import UserError

KINDS = [
    {"upsample": "deconv", "norm": "instance", "dropout": True},
    {"upsample": "nearest", "norm": "mixed", "keep_source": True},
    {"upsample": "deconv", "norm": "batch", "input_nc": 1, "output_nc": 4},
    {"upsample": "nearest", "norm": "none", "input_nc": 5, "output_nc": 1},
    {"upsample": "nearest", "norm": "channel", "keep_source": True},
]
SIZES = [(301, 517), (900, 40), (5, 7)]


@pytest.fixture(autouse=True)
def one_thread():
    """The tiles here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(seed: int = 0, **kind) -> Generator:
    """A small generator whose layers all matter: no bias, mean or variance as they begin."""
    torch.manual_seed(seed)
    net = init_weights(Generator(**{"ngf": 4, "n_residual_blocks": 2} | kind), "kaiming")
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if getattr(layer, "bias", None) is not None:
            nn.init.normal_(layer.bias, std=0.1)
    net.model[-2].weight.data /= net.model[-2].weight.std() * 20  # so that tanh is not saturated
    return net.eval()


def draw(height: int, width: int, channels: int = 3, dtype=np.uint8) -> np.ndarray:
    """Noise over a slope, so that no two tiles have the same statistics."""
    noise = np.random.default_rng(0).random((height, width, channels))
    slope = np.linspace(0, 1, width)[:, None] * np.linspace(0, 1, height)[:, None, None]
    return ((noise + 3 * slope) / 4 * np.iinfo(dtype).max).astype(dtype)


def whole(net, picture: np.ndarray, dtype=None) -> np.ndarray:
    return translate(net, datasets.to_tensor(picture)[None], dtype)[0].permute(1, 2, 0).numpy()


def tiled(net, picture: np.ndarray, tile: int, dtype=None, folder=None) -> np.ndarray:
    result = np.full((*picture.shape[:2], net.output_nc), np.nan, np.float32)
    tiling.translate_tiles(net, [picture], [result], tile, dtype, folder)
    return result


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['upsample']}-{kind['norm']}")
def test_same_result(kind, tmp_path):
    net = make(**kind)
    for size in SIZES:
        picture = draw(*size, net.input_nc)
        expected = whole(net, picture)
        assert expected.std() > 0.1 and (np.abs(expected) > 0.99).mean() < 0.2
        for tile in (64, 100, 256):
            result = tiled(net, picture, tile, folder=tmp_path if tile == 100 else None)
            assert np.abs(result - expected).max() <= 1e-4, (size, tile)


def test_norms_per_tile_would_not_pass():
    net, picture = make(), draw(300, 500)
    expected, result = whole(net, picture), np.zeros((300, 500, 3), np.float32)
    for y, x in itertools.product(range(0, 300, 100), range(0, 500, 100)):
        part = picture[y : y + 100, x : x + 100]
        result[y : y + 100, x : x + 100] = whole(net, part)
    assert np.abs(result - expected).max() > 0.1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_equal_to_one_step(dtype):
    net = make(input_nc=1, output_nc=1) if dtype == np.uint16 else make()
    picture = draw(132, 200, net.input_nc, dtype)
    (result,) = tiling.translate_pictures(net, [picture], dtype, 64, None)
    expected = datasets.to_array(torch.from_numpy(whole(net, picture)).permute(2, 0, 1), dtype)
    most = 1 if dtype == np.uint8 else 4  # 1e-4 is 3.3 of 65535 / 2
    assert result.dtype == dtype
    assert np.abs(result.astype(int) - expected.astype(int)).max() <= most


def test_bf16_is_as_exact_as_the_whole_pass():
    net, picture = make(ngf=8), draw(132, 200)
    exact = whole(net, picture)
    result, expected = (
        f(net, picture)
        for f in (lambda *a: tiled(*a, 64, torch.bfloat16), lambda *a: whole(*a, torch.bfloat16))
    )
    assert 0 < np.abs(result - exact).mean() <= 1.1 * np.abs(expected - exact).mean() < 0.05


@pytest.mark.parametrize("kind", [*KINDS[:2], None], ids=["deconv", "nearest", "unet"])
def test_slices_share_statistics(kind, tmp_path):
    """As if every instance norm saw all slices as one; then brightness does not flicker."""
    net = make(**kind) if kind else init_weights(UNet(ngf=4, num_downs=5), init_gain=0.3).eval()
    slices = [draw(160, 192) for _ in range(3)]
    for i, picture in enumerate(slices):
        picture[: 8 * i, :40] = 255  # grows, far from the lower right corner
    plain = copy.deepcopy(net)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm2d):  # by itself over (N, H, W)
                setattr(module, name, nn.BatchNorm2d(child.num_features, 1e-5, None, False, False))
    x = torch.stack([datasets.to_tensor(picture) for picture in slices])
    expected = translate(plain, x).permute(0, 2, 3, 1).numpy()
    flicker = lambda fakes: np.abs(np.diff(np.stack(fakes)[:, -8:, -8:], axis=0)).max()
    run = lambda **how: translate_batch(net, slices, torch.device("cpu"), None, np.float32, **how)
    for tile, scratch in ((0, None), (64, None), (100, tmp_path)) if kind else ((0, None),):
        fakes = run(joint=True, tile=tile, scratch=scratch)
        assert np.abs(np.stack(fakes) - expected).max() <= 1e-4
        assert not kind or flicker(fakes) <= 1e-4  # a U-Net sees the whole picture
    assert flicker(run(tile=0)) > 0.01 and expected.std() > 0.05


def test_space_is_as_worked_out(monkeypatch, tmp_path):
    alive, peaks, made = weakref.WeakSet(), [], tiling.FeatureMap.__init__

    def count(self, *args):
        made(self, *args)
        alive.add(self)
        peaks.append(sum(math.prod(m.shape) * m.dtype.itemsize for m in alive))
        assert list(tmp_path.iterdir()) == []  # the files have no name, so a kill leaves nothing

    monkeypatch.setattr(tiling.FeatureMap, "__init__", count)
    net, picture = make(ngf=8, n_residual_blocks=4), draw(61, 90)
    tiled(net, picture, 32, folder=tmp_path)
    assert max(peaks) == tiling.scratch_bytes(net, (1, 61, 90), None) == 64 * 92 * 8 * 4 * 3 // 2
    assert len(alive) == 0


def test_no_room(monkeypatch, tmp_path):
    net, picture = make(), draw(64, 96)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(UserError, match=r"\(0\.0 GB are needed, .*--scratch"):
        tiling.translate_pictures(net, [picture], np.uint8, 32, None, tmp_path)
    tiling.translate_pictures(
        net, [picture], np.uint8, 32, None, None, tmp_path
    )  # fits into memory
    monkeypatch.setattr(devices, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match="scratch space"):
        tiling.translate_pictures(net, [picture], np.uint8, 32, None, None, tmp_path)
    monkeypatch.undo()
    full = open("/dev/full", "w+b", 0)  # noqa: SIM115
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: full)
    with pytest.raises(UserError, match="No space left on device.*--scratch"):
        tiling.translate_pictures(net, [picture], np.uint8, 32, None, tmp_path)


def test_pick_tile(monkeypatch):
    net = make()
    monkeypatch.setattr(devices, "free_memory", lambda: 10**9)
    most = int(0.8e9 / (940 * 4 / 64))  # pixels that fit
    large = [np.broadcast_to(np.uint8(0), (1000, most // 1000 + extra, 3)) for extra in (0, 1)]
    pick = lambda picture, *args: tiling.pick_tile(net, [picture], *args)
    assert pick(large[0], None) == 0 and pick(large[1], None) == 512
    assert tiling.pick_tile(net, [large[0]] * 2, None) == 512
    assert pick(large[1], torch.bfloat16) == pick(large[1], None, 0) == 0
    assert pick(large[0], None, 100) == 100
    unet = UNet(ngf=4, num_downs=5)
    assert tiling.pick_tile(unet, [large[0]], None) == 0
    with pytest.raises(UserError, match="only ResNet generators"):
        tiling.pick_tile(unet, [large[0]], None, 100)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(make().state_dict(), path)
    return path


def run(weights, workdir, words: str) -> int:
    words = f"--weights {weights} --workdir {workdir} --device cpu --amp off {words}"
    return test_script.main(test_script.parse_args(words.split()))


def test_command(weights, tmp_path):
    """`test.py --tile 64` writes what `test.py --tile 0` writes, and leaves nothing else."""
    sources, scratch = tmp_path / "sources", tmp_path / "scratch"
    sources.mkdir()
    for name, size in (("a.png", (133, 200)), ("b.tif", (40, 300))):
        Image.fromarray(draw(*size)).save(sources / name)
    for tile in ("0", "64"):
        options = f"--input {sources} --tile {tile} --scratch {scratch}"
        assert run(weights, tmp_path / tile, options) == 0
    for name in ("a.png", "b.png"):
        pictures = [np.asarray(Image.open(tmp_path / t / "outputs/B" / name)) for t in ("0", "64")]
        assert np.abs(np.subtract(*pictures, dtype=int)).max() <= 1
    assert list(scratch.iterdir()) == []
    found = [{p.relative_to(tmp_path / t) for p in (tmp_path / t).rglob("*")} for t in ("0", "64")]
    assert found[0] == found[1]


def test_max_pixels(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    sources = tmp_path / "sources"
    sources.mkdir()
    Image.fromarray(draw(40, 40)).save(sources / "large.png")
    Image.fromarray(draw(60, 60)).save(sources / "larger.png")  # over twice the limit
    assert run(weights, tmp_path, f"--input {sources}") == 1
    assert capsys.readouterr().out.count("--max_pixels N") == 2
    assert run(weights, tmp_path, f"--input {sources} --max_pixels 3600") == 0


def test_short_memory(monkeypatch):
    """What the page, evaluate and training call goes by tiles where memory is short."""
    net, picture = make(dropout=True, norm="batch"), draw(64, 96)
    run = lambda: translate_batch(net, [picture, picture], torch.device("cpu"), None)
    expected, used = run(), []
    monkeypatch.setattr(devices, "free_memory", lambda: 10**5)
    monkeypatch.setattr(tiling, "translate_tiles", lambda *args: used.append(args[3:]))
    run()
    assert used == [(512, None, Path(tempfile.gettempdir()))] * 2
    monkeypatch.undo()
    monkeypatch.setattr(devices, "free_memory", lambda: 10**6)
    net.train()  # as validation finds it
    for a, b in zip(run(), expected, strict=True):
        assert np.abs(np.subtract(a, b, dtype=int)).max() <= 1
    assert net.training


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
def test_killed(weights, tmp_path):
    """A kill leaves no output, and no scratch files even before the next run."""
    Image.fromarray(draw(1024, 1024)).save(tmp_path / "large.png")
    command = [sys.executable, "test.py", "--weights", weights, "--input", tmp_path / "large.png"]
    command += ["--workdir", tmp_path, "--tile", "64", "--scratch", tmp_path / "scratch"]
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stderr=subprocess.DEVNULL)
    files = Path(f"/proc/{process.pid}/fd")
    names = ""
    while process.poll() is None and "scratch" not in names:
        time.sleep(0.05)
        with contextlib.suppress(FileNotFoundError):  # closed while we looked
            names = "".join(map(os.readlink, files.iterdir()))
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert list((tmp_path / "scratch").iterdir()) == list((tmp_path / "outputs/B").iterdir()) == []
    left = tmp_path / "outputs/B/.0.tmp"  # as if it had been killed while it wrote the output
    left.write_bytes(b"")
    os.utime(left, (0, 0))
    (tmp_path / "outputs/.1.tmp").write_bytes(b"")  # another process is writing it
    assert run(weights, tmp_path, f"--input {ROOT / 'docs/images/demo.png'} --size 16") == 0
    assert list((tmp_path / "outputs").rglob(".*.tmp")) == [tmp_path / "outputs/.1.tmp"]


@pytest.mark.parametrize("text", ["-1", "5", "much"])
def test_tile_of_no_use(text, capsys):
    with pytest.raises(SystemExit):
        test_script.parse_args(["--tile", text])
    assert "is not auto, 0, or at least 16" in capsys.readouterr().err
