"""evaluate.py: its figures against plain numpy and against torch-fidelity itself."""

import json
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from models import Generator, translate
from tools import evaluate
from utils import UserError

ROOT = Path(__file__).parent.parent.parent
SIZE = 16  # of the translations; the real pictures are larger and not square


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def load(path: Path, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    return datasets.resize(datasets.load_image(path), size)


def make_run(folder: Path, n: int = 6, **options) -> Path:
    """A run whose outputs are wrong by noise; A and B share their left half, B has one more."""
    rng = np.random.default_rng(0)
    for i in range(n + 1):
        picture = rng.integers(0, 256, (20, 24, 3), np.uint8)
        if i < n:
            save(folder / f"data/testA/{i}.png", picture)
        picture[:, 12:] = rng.integers(0, 256, (20, 12, 3), np.uint8)
        save(folder / f"data/testB/{i}.png", picture)
    for side in "AB":
        for i in range(n):
            noise = rng.integers(-12, 13, (SIZE, SIZE, 3))
            made = np.clip(load(folder / f"data/test{side}/{i}.png") + noise, 0, 255)
            save(folder / f"outputs/{side}/{i}.png", made.astype(np.uint8))
    (folder / "models").mkdir()
    options = {"dataroot": str(folder / "data"), "size": SIZE, **options}
    (folder / "models/options.json").write_text(json.dumps(options))
    return folder


def run(folder: Path, *more: str) -> dict:
    args = evaluate.parse_args(["--workdir", str(folder), "--device", "cpu", *more])
    assert not evaluate.main(args)
    return json.loads((folder / "result/metrics.json").read_text())


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, window by window."""
    window = np.array(
        [[np.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)]
    )
    window /= window.sum()
    values = []
    for c in range(x.shape[2]):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                a = x[i : i + 11, j : j + 11, c].astype(float)
                b = y[i : i + 11, j : j + 11, c].astype(float)
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a = (window * (a - mean_a) ** 2).sum()
                var_b = (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
                values.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def plain_figures(pictures: list[np.ndarray], truths: list[np.ndarray]) -> dict[str, float]:
    rows = []
    for x, y in zip(pictures, truths, strict=True):
        d = x.astype(float) - y.astype(float)
        off = [max(abs(v) for v in pixel) for pixel in d.reshape(-1, 3)]
        rows.append(
            {
                "mae": np.abs(d / 255).mean(),
                "psnr": 20 * np.log10(255 / np.sqrt((d * d).mean())),
                "ssim": plain_ssim(x, y),
                "rmse": np.sqrt((d * d).mean()),
                "under_5": sum(v < 5 for v in off) / len(off),
                "under_10": sum(v < 10 for v in off) / len(off),
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def test_ssim_is_wangs(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (17, 14, 3), np.uint8)
    y = np.clip(x.astype(int) + rng.integers(-40, 41, x.shape), 0, 255).astype(np.uint8)
    assert 0.3 < evaluate.ssim(x, y) < 0.99
    assert evaluate.ssim(x, y) == pytest.approx(plain_ssim(x, y), abs=1e-9)
    assert evaluate.ssim(x, x) == pytest.approx(1)
    assert evaluate.ssim(x[:5], x[:5]) == pytest.approx(1)  # smaller than the window


def test_paired_figures_equal_plain_numpy(tmp_path):
    folder = make_run(tmp_path)
    metrics = run(folder, "--no_fid")
    for direction, source, target in (("A2B", "A", "B"), ("B2A", "B", "A")):
        names = [f"{i}.png" for i in range(6)]
        sources = [load(folder / f"data/test{source}" / name) for name in names]
        truths = [load(folder / f"data/test{target}" / name) for name in names]
        made = [load(folder / "outputs" / target / name) for name in names]
        one = metrics[direction]
        assert (one["n"], one["n_pairs"]) == (6, 6)
        figures = {k: v for k, v in one["translation"].items() if k != "error"}
        assert figures == pytest.approx(plain_figures(made, truths), abs=1e-9)
        figures = {k: v for k, v in one["nothing"].items() if k != "error"}
        assert figures == pytest.approx(plain_figures(sources, truths), abs=1e-9)
        made_figures = one["translation"]
        assert 0 < made_figures["under_5"] < made_figures["under_10"] < 1
        assert one["nothing"]["error"] > one["nothing"]["mae"] > made_figures["error"]
        differ = [(s != t).any(axis=2) for s, t in zip(sources, truths, strict=True)]
        off = [abs(m / 255 - t / 255)[d] for m, t, d in zip(made, truths, differ, strict=True)]
        assert one["translation"]["error"] == pytest.approx(np.concatenate(off).mean())


def test_direction_b_to_a_swaps_the_folders(tmp_path):
    folder = make_run(tmp_path, direction="BtoA")  # so B's pictures, its truths, are in testA
    for i in range(6):
        save(folder / f"outputs/B/{i}.png", load(folder / f"data/testA/{i}.png"))
    best = {"mae": 0, "psnr": 100, "ssim": 1, "rmse": 0, "under_5": 1, "under_10": 1, "error": 0}
    metrics = run(folder, "--no_fid")
    assert metrics["A2B"]["translation"] == pytest.approx(best)
    assert metrics["A2B"]["nothing"]["mae"] > 0.1
    assert metrics["B2A"]["translation"]["mae"] > 0.1  # outputs/A are like testA, not like testB


def test_cycle_error_translates_back_with_the_other_generator(tmp_path):
    folder = make_run(tmp_path, n=3)
    torch.manual_seed(0)
    back = Generator(ngf=4, n_residual_blocks=1).eval()
    torch.save(back.state_dict(), folder / "models/netG_B2A.pth")
    metrics = run(folder, "--no_fid", "--amp", "off")
    wanted = []
    for i in range(3):
        fake = datasets.to_tensor(load(folder / f"outputs/B/{i}.png"))
        rec = datasets.to_array(translate(back, fake[None])[0]).astype(float)
        wanted.append(abs(rec - load(folder / f"data/testA/{i}.png")).mean() / 255)
    assert metrics["A2B"]["translation"]["cycle"] == pytest.approx(np.mean(wanted), abs=1e-4)
    assert "cycle" not in metrics["B2A"]["translation"]  # netG_A2B is not there


def test_unpaired_and_incomplete_outputs(tmp_path, capsys):
    folder = make_run(tmp_path)
    for i in range(7):
        (folder / f"data/testB/{i}.png").rename(folder / f"data/testB/other_{i}.jpg")
        (folder / f"outputs/A/{i}.png").unlink(missing_ok=True)
    (folder / "outputs/B/0.png").unlink()
    (folder / "outputs/B/1.png").write_bytes(b"no picture")
    metrics = run(folder, "--no_fid")
    assert metrics == {"A2B": {"n": 5, "translation": {}, "nothing": {}}}
    assert "A2B: 5 of 6 pictures are translated" in capsys.readouterr().out


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity with a small extractor in place of Inception, whose weights are 90 MB."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity import registry

    class Tiny(torch_fidelity.FeatureExtractorBase):
        seen = 0

        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "pooled"

        def forward(self, x):
            Tiny.seen += len(x)
            pooled = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2)
            return (pooled.flatten(1),)  # (N, 12)

    monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "inception-v3-compat", Tiny)
    return torch_fidelity, Tiny


def test_kid_and_fid_are_torch_fidelitys(tmp_path, fidelity, capsys):
    torch_fidelity, tiny = fidelity
    folder = make_run(tmp_path, n=9)
    (folder / "data/testB/broken.png").write_bytes(b"no picture")
    metrics = run(folder)
    assert tiny.seen == 9 + 10 + 9 + 9  # every picture once
    for side, n in (("A", 9), ("B", 10)):
        for i in range(n):
            save(tmp_path / f"small/{side}/{i}.png", load(folder / f"data/test{side}/{i}.png"))

    def plain(one: Path, other: Path) -> list[float]:
        result = torch_fidelity.calculate_metrics(
            input1=str(one),
            input2=str(other),
            kid=True,
            fid=True,
            kid_subset_size=4,
            cuda=False,
            save_cpu_ram=True,
            verbose=False,
        )
        keys = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
        return [result[key] for key in (*keys, "frechet_inception_distance")]

    names = ("kid", "kid_std", "fid")
    for direction, source, target in (("A2B", "A", "B"), ("B2A", "B", "A")):
        one = metrics[direction]
        assert one["n_real"] == {"A": 9, "B": 10}[target]
        figures = [one["translation"][name] for name in names]
        wanted = plain(folder / "outputs" / target, tmp_path / "small" / target)
        assert figures == pytest.approx(wanted, rel=1e-5)
        assert figures[1] > 0  # subsets differ, though there are so few pictures
        figures = [one["translation"][f"source_{name}"] for name in names]
        wanted = plain(folder / "outputs" / target, tmp_path / "small" / source)
        assert figures == pytest.approx(wanted, rel=1e-5)
        figures = [one["nothing"][name] for name in names]
        assert figures == pytest.approx(plain(tmp_path / "small/A", tmp_path / "small/B"), rel=1e-5)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "B2A: 9 of 11 pictures are translated"
    assert lines[0].split() == ["A2B", "nothing", "B2A", "nothing", "better"]
    assert lines[1].split() == ["translations", "9", "9"]
    assert [line.split()[0] for line in lines[4:6]] == ["KID", "FID"]
    assert "compare KID" in lines[-2]


def test_two_pictures_are_enough_and_one_is_not(tmp_path, fidelity, capsys):
    folder = make_run(tmp_path, n=3)
    (folder / "outputs/B/0.png").write_bytes(b"no picture")
    assert np.isfinite(run(folder)["A2B"]["translation"]["kid"])
    (folder / "outputs/B/1.png").unlink()
    metrics = run(folder)
    assert "kid" not in metrics["A2B"]["translation"]
    assert "they need at least two pictures" in capsys.readouterr().out


def test_without_inceptions_weights_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    metrics = run(make_run(tmp_path))
    assert metrics["A2B"]["translation"].keys() >= {"mae", "ssim"}
    assert "kid" not in metrics["A2B"]["translation"]
    notice = capsys.readouterr().out.splitlines()[1]
    assert notice.startswith("KID and FID are left out") and "--inception FILE" in notice
    assert "no route to host" in notice


def test_without_torch_fidelity_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert run(make_run(tmp_path))["B2A"]["n_pairs"] == 6
    assert "left out: pip install torch-fidelity" in capsys.readouterr().out.splitlines()[1]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_bad_inception_files_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path)
    torch.save({"fc.weight": torch.zeros(2, 2)}, "other.pth")
    torch.save({"fc.weight": Harmful()}, "harmful.pth")
    for name, words in (
        ("missing.pth", "there is no --inception missing.pth"),
        ("harmful.pth", "is refused"),
        ("other.pth", "holds other weights"),
    ):
        with pytest.raises(UserError, match=words):
            run(folder, "--inception", name)
    assert not Path("harmed").exists()


def test_no_translations_yet(tmp_path):
    command = [sys.executable, "-m", "tools.evaluate", "--workdir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "run `python test.py` first" in done.stderr
    assert done.stderr.count("\n") == 1
    folder = make_run(tmp_path / "run")
    for path in (folder / "outputs").glob("*/*.png"):
        path.rename(path.with_name(f"photo_{path.name}"))  # of test.py --input
    with pytest.raises(UserError, match=r"are not of .*testA"):
        run(folder)
