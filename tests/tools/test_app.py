"""The page, used in a real Chromium as a visitor would."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import test
import utils
from lib import outputs, translation
from models import Generator, init_weights
from tools import app

pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SECONDS = 1000  # Playwright counts in milliseconds
CPU = ["--amp", "off", "--device", "cpu"]  # the same arithmetic in the page and in test.py


def draw(path: Path, width: int, height: int, seed: int = 0, **options) -> Path:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize((width, height)).save(path, **options)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with random weights, its test split, and other weights dropped in."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("models", "temporary", "set/testA", "set/testB"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(("netG_A2B", "netG_B2A", "horse2zebra", "netD_A", "colors_A")):
        torch.manual_seed(i)
        keep_source = name.startswith("netG")
        net = Generator(ngf=8, n_residual_blocks=1, keep_source=keep_source)
        init_weights(net, init_gain=0.1)
        torch.save(net.state_dict(), folder / "models" / f"{name}.pth")
    options = {"dataroot": str(folder / "set"), "preprocess": "resize_and_crop", "size": 32}
    options["keep_source"] = True
    (folder / "models" / "options.json").write_text(json.dumps(options))
    for i in range(2):
        draw(folder / "set" / "testA" / f"{i}.png", 32, 32, seed=i)
        draw(folder / "set" / "testB" / f"{i}.png", 32, 32, seed=2 + i)
    return folder


@pytest.fixture(scope="module")
def address(run):
    """The address of a running app.py; afterwards it must have tidied up."""
    command = [sys.executable, "-m", "tools.app", "--workdir", run, "--longest", "200", *CPU]
    environment = {**os.environ, "TMPDIR": str(run / "temporary"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    assert line.startswith("open http://127.0.0.1:"), line
    yield line.split()[1]
    assert any(path.is_file() for path in (run / "temporary").rglob("*"))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert not any(path.is_file() for path in (run / "temporary").rglob("*"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as p:
        profile = tmp_path_factory.mktemp("profile")  # a new one, nobody's
        window = {"viewport": {"width": 1200, "height": 900}}
        context = p.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=FLAGS, **window
        )
        context.set_default_timeout(60 * SECONDS)
        yield context
        context.close()


@pytest.fixture
def page(browser, address):
    """The page just opened; whatever it asks of another machine fails the test."""
    elsewhere = []
    page = browser.new_page()
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(address)
    page.get_by_text("translation", exact=True).wait_for()
    yield page
    page.close()
    assert not [url for url in elsewhere if not url.startswith((address, "blob:", "data:"))]


def upload(page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def shown(page, which: int) -> np.ndarray:
    """The pixels of source (0), translation (1), way back (2) or change (3), once it is there."""
    image = page.locator(".image-frame").nth(which).locator("img")
    image.wait_for()
    return pixels(page.request.get(image.get_attribute("src")).body())


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def translated(run: Path, tmp_path: Path, picture: Path, way: str = "A2B", *more) -> np.ndarray:
    """What test.py makes of a picture."""
    words = ["--workdir", tmp_path, "--models", run / "models", "--input", picture, *CPU, *more]
    words += ["--direction", way]
    assert test.main(test.parse_args([str(word) for word in words])) == 0
    return pixels((tmp_path / "outputs" / way[-1] / f"{picture.stem}.png").read_bytes())


@needs_browser
def test_an_uploaded_picture_becomes_what_test_py_makes_of_it(page, run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    photo = draw(tmp_path / "photo.jpg", 60, 45, exif=exif)
    upload(page, photo)
    page.get_by_text("45 × 60 pixels").wait_for()
    expected = translated(run, tmp_path, photo)
    assert expected.shape == (60, 45, 3) and expected.std() > 2
    assert (shown(page, 1) == expected).all()
    source = datasets.load_image(photo).astype(int)
    change = (2 * abs(expected - source).mean(2, keepdims=True)).round().clip(0, 255)
    assert (shown(page, 3) == change).all() and change.max() > 2
    with page.expect_download() as download:
        page.get_by_text("Download PNG").click()
    assert download.value.suggested_filename == "photo_A2B.png"
    assert (pixels(Path(download.value.path()).read_bytes()) == expected).all()
    Image.fromarray(expected).save(tmp_path / "there.png")
    assert (shown(page, 2) == translated(run, tmp_path, tmp_path / "there.png", "B2A")).all()


@needs_browser
def test_a_broken_file_is_explained_and_the_next_one_works(page, run, tmp_path):
    whole = draw(tmp_path / "whole.png", 64, 64)
    broken = tmp_path / "broken.png"
    broken.write_bytes(whole.read_bytes()[:300])
    upload(page, broken)
    page.get_by_text("broken.png is not a picture that can be read").first.wait_for()
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    upload(page, whole)
    page.get_by_text("64 × 64 pixels").wait_for()
    assert (shown(page, 1) == translated(run, tmp_path, whole)).all()


@needs_browser
def test_a_large_picture_is_scaled_down_and_says_so(page, tmp_path):
    upload(page, draw(tmp_path / "large.png", 800, 400))
    page.get_by_text("scaled down from 800 × 400 to 200 × 100 pixels").wait_for()
    assert shown(page, 1).shape == (100, 200, 3)


@needs_browser
def test_examples_direction_and_dropped_weights(page, run, tmp_path):
    page.get_by_text("examples of B").wait_for()
    page.locator("button.gallery-item").nth(2).click()  # the first of testB
    page.get_by_text("32 × 32 pixels").wait_for()
    assert page.get_by_label("B → A").is_checked()
    example = run / "set" / "testB" / "0.png"
    assert (shown(page, 1) == translated(run, tmp_path, example, "B2A")).all()
    shown(page, 2)
    page.get_by_label("checkpoint").click()
    page.get_by_role("option", name="horse2zebra.pth").click()
    page.locator(".image-frame").nth(3).wait_for(state="detached")  # these weights go one way only
    weights = ["--weights", run / "models" / "horse2zebra.pth"]
    assert (shown(page, 1) == translated(run, tmp_path, example, "A2B", *weights)).all()


@needs_browser
def test_several_visitors_at_once(browser, address, run, tmp_path):
    pages = [browser.new_page() for _ in range(3)]
    pictures = [draw(tmp_path / f"{i}.png", 48, 40 + 4 * i, seed=i) for i in range(3)]
    for page in pages:
        page.goto(address)
        page.get_by_text("translation", exact=True).wait_for()
    for page, picture in zip(pages, pictures, strict=True):
        upload(page, picture)
    for page, picture in zip(pages, pictures, strict=True):
        assert (shown(page, 1) == translated(run, tmp_path, picture)).all()
        page.close()


def test_checkpoints_directions_and_examples(run, tmp_path):
    assert list(app.find_checkpoints(run / "models")) == ["last", "horse2zebra.pth"]
    fruit = {"dataroot": "dataset/apple2orange"}
    assert translation.domain_names(fruit) == {"A": "apple", "B": "orange"}
    assert translation.domain_names({**fruit, "direction": "BtoA"})["A"] == "orange"
    assert translation.domain_names({"dataroot": "dataset/demo"}) == {"A": "A", "B": "B"}
    options = {"dataroot": str(run / "set"), "direction": "BtoA"}
    examples = app.find_examples(tmp_path, options)
    assert examples["A2B"] == [str(run / "set" / "testB" / f"{i}.png") for i in range(2)]
    (tmp_path / "outputs").mkdir()
    rows = [outputs.Translation("A2B", f"/{name}", "B/x.png", "") for name in ("x.JPG", "y.npy")]
    outputs.write_index(tmp_path, rows, ["A2B"])
    of_split = examples["B2A"]
    assert app.find_examples(tmp_path, options) == {"A2B": ["/x.JPG"], "B2A": of_split}
    assert app.find_examples(tmp_path / "nowhere", {}) == {"A2B": [], "B2A": []}


def test_mistakes_are_explained(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # main puts two settings of Gradio there
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(utils.UserError, match="holds no generator"):
        app.main(app.parse_args(["--models", str(tmp_path)]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--workdir", str(run), "--port", str(taken.getsockname()[1])]
        with pytest.raises(utils.UserError, match="in use: name another --port"):
            app.main(app.parse_args(words))
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    with pytest.raises(utils.UserError, match="pip install gradio"):
        app.main(app.parse_args(["--workdir", str(run)]))


def test_eight_clients_at_once(address, run, tmp_path):
    """The five lines of docs/formats.md, from eight threads; each gets the picture of its own."""
    from gradio_client import Client, handle_file

    def request(i: int) -> np.ndarray:
        client = Client(address, verbose=False, download_files=tmp_path / f"{i}")
        job = client.submit(handle_file(pictures[i]), "A2B", "last", api_name="/show")
        job.result()
        return pixels(Path(job.outputs()[0][0]).read_bytes())

    pictures = [draw(tmp_path / f"{i}.png", 40 + 4 * i, 48, seed=i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(request, range(8)))
    for i in (0, 3, 7):
        assert (got[i] == translated(run, tmp_path, pictures[i])).all()
    assert [picture.shape[1] for picture in got] == [40 + 4 * i for i in range(8)]
