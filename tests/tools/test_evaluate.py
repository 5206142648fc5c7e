"""evaluate.py: its figures against plain numpy and against torch-fidelity itself."""

import functools
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
from test_metrics import plain_ssim

import datasets
from lib import metrics, outputs
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
    rows = []
    for direction, source, target in (("A2B", "A", "B"), ("B2A", "B", "A")):
        for i in range(n):
            noise = rng.integers(-12, 13, (SIZE, SIZE, 3))
            made = np.clip(load(folder / f"data/test{target}/{i}.png") + noise, 0, 255)
            save(folder / f"outputs/{target}/{i}.png", made.astype(np.uint8))
            real, truth = (str(folder / f"data/test{side}/{i}.png") for side in (source, target))
            rows.append(outputs.Translation(direction, real, f"{target}/{i}.png", truth))
    outputs.write_index(folder, rows, ["A2B", "B2A"])
    (folder / "models").mkdir()
    options = {"dataroot": str(folder / "data"), "size": SIZE, **options}
    (folder / "models/options.json").write_text(json.dumps(options))
    return folder


def add_train_split(folder: Path) -> np.ndarray:
    """Training pictures of B, each of one color; returns these colors, (5, 3)."""
    colors = np.random.default_rng(1).integers(0, 256, (5, 3), np.uint8)
    for i, color in enumerate(colors):
        save(folder / f"data/trainB/{i}.png", np.broadcast_to(color, (20, 24, 3)).copy())
    return colors


def run(folder: Path, *more: str) -> dict:
    args = evaluate.parse_args(["--workdir", str(folder), "--device", "cpu", *more])
    assert not evaluate.main(args)
    return json.loads((folder / "result/metrics.json").read_text())


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


def masked(pictures, sources, truths) -> dict[str, float]:
    """Mean absolute errors by plain loops, over all pixels, the changed and the kept."""
    errors = {"mae": [], "changed": [], "kept": []}
    for x, s, t in zip(pictures, sources, truths, strict=True):
        for p, q, r in zip(
            *(a.astype(int).reshape(-1, 3).tolist() for a in (x, s, t)), strict=True
        ):
            error = sum(abs(u - v) for u, v in zip(p, r, strict=True)) / 3
            apart = max(abs(u - v) for u, v in zip(q, r, strict=True))
            errors["mae"].append(error)
            errors["changed" if apart > 12 else "kept"].append(error)
    return {name: float(np.mean(values)) for name, values in errors.items()}


def test_paired_figures_equal_plain_numpy(tmp_path, monkeypatch):
    few = functools.partial(metrics.sample_patches, n=256)
    monkeypatch.setattr(metrics, "sample_patches", few)
    folder = make_run(tmp_path)
    colors = add_train_split(folder)
    measures = run(folder, "--no_fid")
    names = [f"{i}.png" for i in range(6)]
    for direction, source, target in (("A2B", "A", "B"), ("B2A", "B", "A")):
        sources = [load(folder / f"data/test{source}" / name) for name in names]
        truths = [load(folder / f"data/test{target}" / name) for name in names]
        kinds = {"translation": [load(folder / "outputs" / target / name) for name in names]}
        kinds["identity"] = sources
        if target == "B":  # only its training pictures are known
            median = np.median(colors, axis=0).astype(np.uint8)
            kinds["flat"] = [np.broadcast_to(median, (SIZE, SIZE, 3))] * 6
        one = measures[direction]
        counts = {name: one["translation"].pop(name) for name in ("n", "n_pairs", "n_real")}
        assert counts == {"n": 6, "n_pairs": 6, "n_real": 6 + (target == "B")}
        mae = masked(sources, sources, truths)["mae"]
        for kind, pictures in kinds.items():
            wanted = plain_figures(pictures, truths) | masked(pictures, sources, truths)
            wanted["whole"] = wanted["mae"] / mae
            splits = {s: sorted((folder / f"data/test{s}").iterdir()) for s in "AB"}
            of_kind = {"identity": [load(p) for p in splits[source]], "flat": pictures[:1]}
            found, real = (
                metrics.sample_patches([torch.from_numpy(p.copy()).permute(2, 0, 1) for p in set_])
                for set_ in (of_kind.get(kind, pictures), [load(p) for p in splits[target]])
            )
            wanted["swd"] = metrics.sliced_wasserstein(found, real)
            assert one[kind] == pytest.approx(wanted, abs=1e-4), kind
        assert ("flat" in one) == (target == "B")
        assert 0 < one["translation"]["under_5"] < one["translation"]["under_10"] < 1
        assert 1 < one["translation"]["kept"] < 12 < one["identity"]["changed"]


def test_direction_b_to_a_swaps_the_folders(tmp_path):
    folder = make_run(tmp_path, direction="BtoA")  # so the real pictures of B are in testA
    for i in range(6):
        save(folder / f"outputs/B/{i}.png", load(folder / f"data/testA/{i}.png"))
    measures = run(folder, "--no_fid")
    assert measures["A2B"]["translation"]["swd"] == 0
    assert [measures[way]["translation"]["n_real"] for way in ("A2B", "B2A")] == [6, 7]


def test_cycle_error_translates_back_with_the_other_generator(tmp_path):
    folder = make_run(tmp_path, n=3)
    torch.manual_seed(0)
    back = Generator(ngf=4, n_residual_blocks=1).eval()
    torch.save(back.state_dict(), folder / "models/netG_B2A.pth")
    measures = run(folder, "--no_fid", "--amp", "off")
    wanted = []
    for i in range(3):
        fake = datasets.to_tensor(load(folder / f"outputs/B/{i}.png"))
        rec = datasets.to_array(translate(back, fake[None])[0]).astype(float)
        wanted.append(abs(rec - load(folder / f"data/testA/{i}.png")).mean())
    assert measures["A2B"]["translation"]["cycle"] == pytest.approx(np.mean(wanted), abs=0.02)
    assert "cycle" not in measures["B2A"]["translation"]  # netG_A2B is not there


def test_unpaired_and_incomplete_outputs(tmp_path):
    """Sources without a truth, outputs that are gone or damaged, data that are gone too."""
    folder = make_run(tmp_path)
    rows = [row._replace(truth="") for row in outputs.read_index(folder)]
    outputs.write_index(folder, rows, ["A2B", "B2A"])
    for i in range(6):
        (folder / f"outputs/A/{i}.png").unlink()
    (folder / "outputs/B/1.png").unlink()
    (folder / "outputs/B/0.png").write_bytes(b"no picture")
    measures = run(folder, "--no_fid")
    assert list(measures) == ["A2B"]
    found = measures["A2B"]["translation"]
    assert (found.pop("n"), found.pop("n_real")) == (5, 7)
    assert set(found) == set(measures["A2B"]["identity"]) == {"swd"}
    (folder / "models/options.json").unlink()  # one's own pictures, published weights
    assert run(folder) == {"A2B": {"translation": {"n": 5}, "identity": {}}}


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
    measures = run(folder)
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
        one = measures[direction]
        assert one["translation"]["n_real"] == {"A": 9, "B": 10}[target]
        figures = [one["translation"][name] for name in names]
        wanted = plain(folder / "outputs" / target, tmp_path / "small" / target)
        assert figures == pytest.approx(wanted, rel=1e-5)
        assert figures[1] > 0  # subsets differ, though there are so few pictures
        figures = [one["translation"][f"source_{name}"] for name in names]
        wanted = plain(folder / "outputs" / target, tmp_path / "small" / source)
        assert figures == pytest.approx(wanted, rel=1e-5)
        figures = [one["identity"][name] for name in names]
        wanted = plain(tmp_path / "small" / source, tmp_path / "small" / target)
        assert figures == pytest.approx(wanted, rel=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert "compare KID" in lines[0]
    assert lines[1].split() == ["A2B", "ours", "identity", "better", "beats", "baselines"]
    assert lines[2].split() == ["translations", "9"]
    starts = [line.split()[0] for line in lines[1:] if line]
    assert starts.count("KID") == starts.count("FID") == 4  # to targets and to sources, both ways


def test_two_pictures_are_enough_and_one_is_not(tmp_path, fidelity, capsys):
    folder = make_run(tmp_path, n=3)
    (folder / "outputs/B/0.png").write_bytes(b"no picture")
    assert np.isfinite(run(folder)["A2B"]["translation"]["kid"])
    (folder / "outputs/B/1.png").unlink()
    measures = run(folder)
    assert "kid" not in measures["A2B"]["translation"]
    assert "they need at least two pictures" in capsys.readouterr().out


def test_without_inceptions_weights_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    measures = run(make_run(tmp_path))
    assert measures["A2B"]["translation"].keys() >= {"mae", "ssim"}
    assert "kid" not in measures["A2B"]["translation"]
    notice = capsys.readouterr().out.splitlines()[0]
    assert notice.startswith("KID and FID are left out") and "--inception FILE" in notice
    assert "no route to host" in notice


def test_without_torch_fidelity_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert run(make_run(tmp_path))["B2A"]["translation"]["n_pairs"] == 6
    assert "left out: pip install torch-fidelity" in capsys.readouterr().out.splitlines()[0]


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
        ("other.pth", "is not torch-fidelity's"),
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
    (folder / "outputs/index.csv").write_text("direction,source\nA2B,x\n")
    with pytest.raises(UserError, match="index.csv is damaged .*run `python test.py` again"):
        run(folder)
