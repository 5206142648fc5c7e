"""What the documents say is checked: commands are parsed, options, defaults and tests exist."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import test
import train
from lib import options
from tools.demo import draw_demo, draw_scene, pore_slopes

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("test", "train", "tools.app", "tools.bench", "tools.download", "tools.evaluate")
SCRIPTS += ("tools.export", "tools.frames", "tools.gpu_check", "tools.study")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(path: Path) -> list[str]:
    """Indented commands without their comments, `a && b` as two, and those within backticks."""
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^    ((?:pip|python|torchrun|ruff) .*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:pip|python|torchrun) [^`]*)`", text.replace("\n", " "))
    lines = [line for line in lines if "NAME" not in line]
    return [part.strip() for line in lines for part in line.split(" #")[0].split("&&")]


def parse(command: str) -> str | None:
    """Parse a command by the parse_args of its script, whose name is returned."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        while words[0].startswith("--"):
            words.pop(0)
    elif program != "python":
        for name in [word for word in words if word.startswith("requirements")]:
            assert (ROOT / name).exists(), command
        return None
    name = words.pop(0)
    name = words.pop(0) if name == "-m" else name.removesuffix(".py")
    if name == "pytest":
        return None
    assert name in SCRIPTS, command
    script = importlib.import_module(name)
    if "--help" in words:
        return name
    try:
        script.parse_args(words)
    except SystemExit:
        pytest.fail(f"{name} does not understand: {command}")
    return name


def test_every_command_is_understood():
    understood = {parse(command) for path in DOCS for command in commands(path)}
    assert understood - {None} == set(SCRIPTS)


def test_readme_opens_with_the_two_commands():
    first = [line for line in read("README.md").splitlines() if line.startswith("    ")][:2]
    assert first == [
        "    pip install -r requirements.txt && python train.py --demo",
        "    pip install -r requirements-dev.txt && python -m pytest",
    ]
    assert "python -m pytest" in read(".ci/run") and ".ci/run" in read(".github/workflows/ci.yml")


def test_length():
    for name, most in (("README.md", 170), ("CONTRIBUTING.md", 40)):
        assert len(read(name).splitlines()) <= most, name


def test_links_pictures_and_files_exist():
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
            name, _, anchor = name.partition("#")
            target = path.parent / name if name else path
            assert target.stat().st_size < 500_000, f"{path}: {name}"
            if anchor:  # as GitHub names headings
                titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert anchor in anchors, f"{path}: {name}#{anchor}"
        for name in re.findall(r"`([\w./]+\.(?:py|md|html))`", text):
            places = (ROOT, ROOT / "lib", ROOT / "tools")
            found = any((place / name).exists() for place in places)
            assert found or name in OUTSIDE, f"{path}: {name}"
        assert not re.search(r"@[A-Z_]+@", text), path  # a figure that is still to come


OUTSIDE = ("cyclegan.py", "tools/NAME.py", "report.html", "result/report.html")


def options_in_docs() -> dict[str, str]:
    """The defaults of train.py's options by docs/options.md, by the names typed."""
    text = read("docs/options.md").partition("## train.py")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| [^|]+ \|$", text, re.MULTILINE)
    return {name: default for names, default in rows for name in re.findall(r"`(--\w+)`", names)}


def test_every_option_is_documented_with_its_default():
    documented, known = options_in_docs(), {}
    for action in options.make_parser()._actions:
        known |= dict.fromkeys(action.option_strings, action.default)
    del known["-h"], known["--help"]
    assert list(documented) == [name for name in documented if name in known]
    assert not set(known) - set(documented), "add a row to docs/options.md"
    for name, default in known.items():
        said = documented[name]
        if name in ("--workers", "--n_cpu"):
            assert said == "(cores, at most 4)" and default == min(4, os.cpu_count())
        elif default is None:
            assert re.fullmatch(r"\(.+\)", said), name
        elif isinstance(default, bool):
            assert said == "off" and default is False, name
        elif isinstance(default, int | float):
            assert float(said) == default, name
        else:
            assert said == str(default), name


def test_presets_are_documented():
    for name in ("demo", "quick", "classic"):
        preset = vars(options)[name.upper()]
        # a flag that is off cannot be typed, nor can epochs that follow from the data
        preset = {k: v for k, v in preset.items() if v is not False and v is not None}
        row = re.search(rf"^\| `--{name}` .*$", read("docs/options.md"), re.MULTILINE)[0]
        typed = next(words for words in re.findall(r"`(--\w+ [^`]*)`", row) if " --" in words)
        args = vars(train.parse_args(typed.split()))
        assert {key: args[key] for key in preset} == preset, name
        assert typed.count("--") == len(preset), name


def test_ten_options_have_their_real_defaults():
    documented = options_in_docs()
    table = read("README.md").partition("## Ten options")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", table, re.MULTILINE)
    assert len(rows) == 10
    for names, defaults in rows:
        names, defaults = re.findall(r"`(--\w+)", names), defaults.split(", ")
        for name, default in zip(names, defaults * (3 - len(defaults)), strict=False):
            assert documented[name] == default, name


@pytest.mark.parametrize("name", ["docs/reliability.md", "CONTRIBUTING.md"])
def test_named_tests_exist(name):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", read(name))
    assert len(named) == len(re.findall(r"\btest_\w+`", read(name))) > 5  # each with its file
    for path, function in named:
        assert f"\ndef {function}(" in read(path), f"{path}::{function}"


def test_every_promise_has_a_test():
    rows = [line for line in read("docs/reliability.md").splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20 and all("::test_" in row.split("|")[2] for row in rows)


def test_demo_and_test_commands_run(tmp_path):
    """The demo's command, shortened by explicit options, then test.py's."""
    demo = next(c for c in commands(ROOT / "README.md") if "--demo" in c)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("lib", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    draw_demo(tmp_path / "dataset" / "demo", n_train=4, n_test=2)
    tiny = " --n_epochs 1 --size 32 --load_size 36 --ngf 4 --ndf 4 --n_residual_blocks 1"
    tiny += " --half_size 0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (demo + tiny, "python test.py"):
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert re.search(r"A2B: error .*\d\.\d", done.stdout), done.stdout
    assert (tmp_path / "result" / "report.html").exists()
    assert len(list((tmp_path / "outputs" / "B").iterdir())) == 2


def test_committed_generators(tmp_path, monkeypatch):
    """The README's command, on a drawn apple: it takes an orange's color, and the rest stays."""
    apple, orange = (
        draw_scene([0, 9, 1], fruit, pore_slopes(), size=256) for fruit in ("apple", "orange")
    )
    Image.fromarray(apple).save(tmp_path / "photo.png")
    (command,) = (c for c in commands(ROOT / "README.md") if "photo.jpg" in c and "docs/" in c)
    words = shlex.split(command.replace("photo.jpg", str(tmp_path / "photo.png")))
    monkeypatch.chdir(ROOT)
    assert test.main(test.parse_args([*words[2:], "--workdir", str(tmp_path)])) == 0
    fake, apple, orange = (
        np.array(x, float) for x in (Image.open(tmp_path / "outputs/B/photo.png"), apple, orange)
    )
    differ = np.abs(apple - orange).max(2) > 12
    errors, identity = np.abs(fake - orange), np.abs(apple - orange)
    assert errors[differ].mean() < 0.75 * identity[differ].mean() and errors[~differ].mean() < 4


@pytest.mark.parametrize("size", [128, 256])
def test_committed_maps(size, tmp_path, monkeypatch):
    """The README's command, there and back: a drawn map becomes a dark photograph, and a map.

    So it does with those of 256x256, but for the water, which becomes ground (docs/results.md).
    """
    drawn = Image.new("RGB", (size, size), (232, 228, 225))
    draw, k = ImageDraw.Draw(drawn), size // 128
    for at in range(10 * k, size, 22 * k):
        draw.line((at, 0, at + 12 * k, size - 1), fill="white", width=3 * k)
        draw.line((0, at, size - 1, at - 8 * k), fill="white", width=3 * k)
    draw.rectangle((0, 84 * k, 56 * k, size - 1), fill=(163, 204, 255))  # water
    drawn.save(tmp_path / "aerial.png")
    (command,) = (c for c in commands(ROOT / "README.md") if "aerial.png" in c)
    if size == 256:
        command = command.replace("docs/maps", "docs/maps256").replace("--size 128", "--size 256")
    words = [*shlex.split(command)[2:], "--workdir", str(tmp_path)]
    monkeypatch.chdir(ROOT)
    for source, direction in (("aerial.png", "B2A"), ("outputs/A/aerial.png", "A2B")):
        replaced = [word.replace("aerial.png", str(tmp_path / source)) for word in words]
        assert test.main(test.parse_args([*replaced, "--direction", direction])) == 0
    photo, back = (np.array(Image.open(tmp_path / f"outputs/{x}/aerial.png")) for x in "AB")
    drawn = np.array(drawn, float)
    streets, blocks = ((drawn == color).all(2) for color in (255, (232, 228, 225)))
    assert photo.mean() < 90 and photo[streets].mean() > photo[blocks].mean() + 20
    assert back[streets].mean() > back[blocks].mean() + 6
    assert (np.abs(np.median(back[blocks], axis=0) - (232, 228, 225)) < 6).all()
    if size == 128:
        flat = np.median(drawn, axis=(0, 1))
        assert np.abs(back - drawn).mean() < 0.75 * np.abs(flat - drawn).mean()
        assert np.abs(back[90:, :50] - drawn[90:, :50]).mean() < 30  # water is water again


def test_committed_sizes():
    """Both generators of each data set are small enough to be committed."""
    sizes = [path.stat().st_size for path in (ROOT / "docs").glob("*/netG_*.pth")]
    assert len(sizes) == 6 and max(sizes) < 3e6


def test_refused_without_data(tmp_path):
    """The README's data set, before it is downloaded: the message says what to type."""
    known = commands(ROOT / "README.md")
    command = next(c for c in known if "train.py --dataroot dataset/apple2orange" in c)
    words = [word for word in shlex.split(command)[2:] if word != "--cuda"]
    args = train.parse_args([*words, "--workdir", str(tmp_path)])
    args.dataroot = tmp_path / args.dataroot
    with pytest.raises(train.UserError, match="python -m tools.download apple2orange"):
        train.main(args)
