"""The demo set: pairs to test with, other scenes to train with, the same ones each time."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import download
from tools.demo import draw_demo


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "dataset/demo"
    draw_demo(folder, n_train=6, n_test=12)
    return folder


def test_demo_files(demo):
    counts = {split.name: len(list(split.iterdir())) for split in demo.iterdir()}
    assert counts == {"trainA": 6, "trainB": 6, "testA": 12, "testB": 12}
    for path in demo.rglob("*.png"):
        with Image.open(path) as picture:
            assert picture.size == (128, 128) and picture.mode == "RGB"
    assert [p.name for p in demo.parent.iterdir()] == ["demo"]  # nothing half-drawn lies about


def test_demo_is_deterministic(demo, tmp_path):
    draw_demo(tmp_path / "again", n_train=2, n_test=1)
    for path in sorted(p for p in (tmp_path / "again").rglob("*.png")):
        assert path.read_bytes() == (demo / path.relative_to(tmp_path / "again")).read_bytes()
    draw_demo(tmp_path / "other", seed=1, n_train=1, n_test=1)
    for split in ("trainA", "trainB", "testA", "testB"):
        assert (tmp_path / "other" / split / "000.png").read_bytes() != (
            demo / split / "000.png"
        ).read_bytes()


def test_demo_tests_are_pairs_and_training_is_not(demo):
    apples, oranges = pictures(demo / "testA"), pictures(demo / "testB")
    assert list(apples) == list(oranges)
    for name, apple in apples.items():
        differs = (apple != oranges[name]).any(-1)
        assert 0.08 < differs.mean() < 0.6  # the fruit
        frame = np.ones_like(differs)
        frame[2:-2, 2:-2] = False
        assert not differs[frame].any()  # the background, to the last bit
        assert not differs[:, :2].any()
        gap = oranges[name][differs] - apple[differs]  # (n, 3)
        assert gap[:, 1].mean() > 30  # an orange is a yellower red
    for name, first in pictures(demo / "trainA").items():
        corner = np.abs(first - pictures(demo / "trainB")[name])[:4, :4].mean()
        assert corner > 0 and np.abs(first - apples[name])[:4, :4].mean() > 0  # other scenes


def test_demo_is_drawn_once(demo, capsys):
    workdir = demo.parent.parent
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*")}
    download.main(download.parse_args(["demo", "--workdir", str(workdir)]))
    assert "already exists" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*")} == before


def test_demo_broken_off_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.demo.draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_demo(tmp_path / "dataset/demo")
    assert list((tmp_path / "dataset").iterdir()) == []
