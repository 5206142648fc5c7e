"""report.py: the page is whole, needs nothing else, and trusts nothing that it shows."""

import base64
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.outputs import Translation, write_index
from tools import report

FACTS = "epoch 3 of 9, iteration 150, trained for\n125 minutes"
SECTIONS = ["Translations of test pictures", "Measures", "Progress", "Losses", "Settings"]
METRICS = {
    "A2B": {
        "translation": {
            "n": 9,
            "n_real": 10,
            "kid": 0.01234,
            "kid_std": 0.002,
            "fid": 298.5,
            "under_5": 0.5,
        },
        "identity": {"kid": 0.1, "kid_std": 0.003, "fid": 200, "under_5": 0.25},
        "flat": {"under_5": 0.625},
    },
    "B2A": {"translation": {"n": 10, "cycle": 25}, "identity": {}},
}


class Page(HTMLParser):
    """What a browser would find: tags, their attributes, the text, the pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.pictures = [
            Image.open(io.BytesIO(base64.b64decode(value.partition("base64,")[2])))
            for name, value in self.attributes
            if name == "src"
        ]
        self.sections = [t for t in self.texts if t in SECTIONS]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data.strip())


def save(path: Path, width: int, height: int, color="red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_run(folder: Path) -> Path:
    options = {"dataroot": "/pictures/fruit", "size": 64, "netG": "resnet_9blocks", "n_epochs": 7}
    options["refine_epochs"] = 2
    options |= {"n_residual_blocks": 4}
    write(folder / "models/options.json", json.dumps({**options, "workers": 0, "no_flip": False}))
    log = "epoch,iteration,D,G,seconds\n1,50,0.5,4,10\n3,150,0.25,3,7500.5\n4,2"
    write(folder / "logs/losses.csv", log)
    write(folder / "result/metrics.json", json.dumps(METRICS))
    save(folder / "logs/losses.png", 90, 42)
    for epoch in range(1, 12):
        save(folder / f"images/epoch_{epoch:03d}.png", 60 + epoch, 40)
    for direction in ("A2B", "B2A"):
        for i in range(2):
            save(folder / f"result/{direction}_{i}.png", 20, 10)
            save(folder / f"outputs/cycle/{direction}_{i}.png", 30, 10)
    index(folder, [f"{i}.png" for i in range(3)])  # two of three were compared
    return folder


def index(folder: Path, names: list[str], directions=("A2B", "B2A"), truth="") -> None:
    (folder / "outputs").mkdir(exist_ok=True)
    rows = [
        Translation(d, f"/x/{name}", f"{d[-1]}/{name}", truth) for d in directions for name in names
    ]
    write_index(folder, rows, list(directions))


def test_a_whole_page_that_needs_nothing_else(tmp_path):
    path = report.write_report(make_run(tmp_path))
    assert path == tmp_path / "result/report.html"
    page = Page(path)
    assert page.sections == SECTIONS
    sizes = [picture.size for picture in page.pictures]
    assert sizes == [(30, 10)] * 4 + [(61, 40), (66, 40), (71, 40), (90, 42)]
    links = [v for name, v in page.attributes if name in ("src", "href", "srcset", "data")]
    assert len(links) == 8 and all(link.startswith("data:image/") for link in links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "://" not in path.read_text() and "url(" not in path.read_text()
    for text in ("CycleGAN: fruit", "resnet_9blocks, n_residual_blocks 4, 64 x 64", FACTS, "0.25"):
        assert text in page.texts
    for name, value in (("workers", "0"), ("no_flip", "False")):
        assert page.texts[page.texts.index(name) + 1] == value
    cells = ["50.0%", "25.0%", "62.5%", "0.01234 ± 0.00200", "0.10000 ± 0.00300", "298.50", "25.00"]
    assert [text for text in page.texts if text in cells] == cells
    assert page.texts.count("back again") == 4 and "ground truth" not in page.texts
    # better than both baselines or not: KID is, FID and pixels are not; B2A has no baselines
    verdicts = [
        value for name, value in page.attributes if name == "class" and value in ("yes", "no")
    ]
    assert verdicts == ["no", "yes", "no"]


@pytest.mark.parametrize(
    ("path", "section"),
    [
        ("outputs/cycle/A2B_x.png", SECTIONS[0]),
        ("result/B2A_x.png", SECTIONS[0]),
        ("result/metrics.json", SECTIONS[1]),
        ("logs/metrics.csv", SECTIONS[1]),
        ("images/epoch_001.png", SECTIONS[2]),
        ("images/latest.png", SECTIONS[2]),
        ("logs/losses.png", SECTIONS[3]),
        ("logs/losses.csv", SECTIONS[3]),
        ("models/options.json", SECTIONS[4]),
    ],
)
def test_each_part_has_its_files_or_is_left_out(tmp_path, path, section):
    assert Page(report.write_report(tmp_path)).sections == []
    path = tmp_path / path
    contents = {"metrics.json": METRICS, "options.json": {"size": 8}}
    if path.suffix == ".png":
        save(path, 12, 4)
        index(tmp_path, ["x.png"])
    elif path.suffix == ".json":
        write(path, json.dumps(contents[path.name]))
    else:
        write(path, "epoch,iteration,G\n1,2,3\n")
    assert Page(report.write_report(tmp_path)).sections == [section]
    for damage in (b"", b"\xff\xfe{[,", b"[1, 2]"):  # a report must not fail what it ends
        path.write_bytes(damage)
        assert Page(report.write_report(tmp_path)).sections == []


def test_everything_shown_is_escaped(tmp_path):
    evil = "<script>alert('1')</script><b>&amp;\"x"
    name = "<b onload='x'>&quot;\"" + os.fsdecode(b"\xff")
    write(tmp_path / "models/options.json", json.dumps({evil: evil, "dataroot": f"a/{evil}"}))
    write(tmp_path / "logs/losses.csv", f"epoch,iteration,{evil}\n1,2,{evil}\n")
    save(tmp_path / f"outputs/cycle/A2B_{name}.png", 30, 10)
    index(tmp_path, [f"{name}.png"])
    page = Page(report.write_report(tmp_path))
    assert not {"script", "b"} & set(page.tags)
    assert "onload" not in dict(page.attributes)
    assert page.texts.count(evil) == 4  # option and its value, head and cell of the log
    assert name[:-1] + "?.png" in page.texts
    assert ("alt", name[:-1] + "?.png") in page.attributes
    assert len(page.pictures) == 1


def test_the_page_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (512, 1536, 3), np.uint8)  # nothing compresses worse
    large, strip = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(large, "PNG")
    Image.fromarray(noise[:256, :768]).save(strip, "PNG")
    for name in ("outputs/cycle", "images"):
        (tmp_path / name).mkdir(parents=True)
    for epoch in (1, 2, 3):
        (tmp_path / f"images/epoch_{epoch:03d}.png").write_bytes(large.getvalue())
    for direction in ("A2B", "B2A"):
        for i in range(12):
            path = tmp_path / f"outputs/cycle/{direction}_{i:02d}.png"
            path.write_bytes(strip.getvalue())
    index(tmp_path, [f"{i:02d}.png" for i in range(12)], truth="/x/y.png")
    path = report.write_report(tmp_path)
    assert path.stat().st_size < 5e6
    page = Page(path)
    assert len(page.pictures) == 8 + 8 + 3
    assert max(picture.width for picture in page.pictures) == report.WIDEST
    names = [text for text in page.texts if text.endswith(".png")]
    assert names == 2 * [f"{i:02d}.png" for i in range(8)]  # the first by name, not the best
    assert page.texts.count("ground truth") == 16


def test_it_shows_the_newest_comparison(tmp_path):
    """One generator alone, after a run with both, leaves older strips in outputs/cycle/."""
    make_run(tmp_path)
    for path in (tmp_path / "outputs/cycle").iterdir():
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    page = Page(report.write_report(tmp_path))
    assert [picture.size for picture in page.pictures[:4]] == [(20, 10)] * 4
    assert "back again" not in page.texts


def test_the_change_is_shown_where_the_source_is_kept(tmp_path):
    """Beside the other parts, twice the mean difference: 2 * (10 + 20 + 60) / 3."""
    for name, parts in (("outputs/cycle", "source fake rec truth"), ("result", "fake source")):
        colors = {"source": (50, 60, 70), "fake": (60, 80, 130), "rec": "red", "truth": "blue"}
        strip = [Image.new("RGB", (9, 8), colors[part]) for part in parts.split()]
        path = tmp_path / name / "A2B_x.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.hstack(strip)).save(path)
        index(tmp_path, ["x.png"], truth="/x/y.png")
        for keep_source in (False, True):
            write(tmp_path / "models/options.json", json.dumps({"keep_source": keep_source}))
            page = Page(report.write_report(tmp_path))
            (shown,) = (np.asarray(picture) for picture in page.pictures)
            n = len(strip)
            assert (shown[:, : 9 * n] == np.hstack(strip)).all()
            assert shown.shape == (8, 9 * (n + keep_source), 3)
            assert (shown[:, 9 * n :] == 60).all() and page.texts.count("change") == keep_source
        path.unlink()


def test_metrics_as_tables():
    assert report.format_measures({}) == report.format_measures({"A2B": 3}) == {}
    tables = report.format_measures(METRICS)
    assert tables["A2B"] == [
        ["A2B", "ours", "identity", "flat color", "better", "beats baselines"],
        ["translations", "9", "", "", "", ""],
        ["real targets", "10", "", "", "", ""],
        ["pixels off by less than 5", "50.0%", "25.0%", "62.5%", "higher", "no"],
        ["KID to the target set", "0.01234 ± 0.00200", "0.10000 ± 0.00300", "", "lower", "yes"],
        ["FID to the target set", "298.50", "200.00", "", "lower", "no"],
    ]
    assert tables["B2A"][-1] == ["cycle error, of 255", "25.00", "lower", ""]
