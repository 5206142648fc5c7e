"""The README's commands are run as they stand there, so that it cannot go stale."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tools.demo import draw_demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The indented commands, comments cut off; `a && b` are two."""
    lines = re.findall(r"^    ((?:pip|python|torchrun) .*)$", README, re.MULTILINE)
    return [part.strip() for line in lines for part in line.split("#")[0].split("&&")]


def test_it_opens_with_the_two_commands():
    first = [line for line in README.splitlines() if line.startswith("    ")][:2]
    assert first == [
        "    pip install -r requirements.txt && python train.py --demo",
        "    pip install -r requirements-dev.txt && python -m pytest",
    ]
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()


def test_every_command_is_understood():
    """Scripts and requirement files exist, and every option is one that the script knows."""
    seen = set()
    for command in commands():
        words = shlex.split(command)
        for name in [word for word in words if word.startswith("requirements")]:
            assert (ROOT / name).exists(), command
        scripts = [word for word in words if word.endswith(".py")]
        for script in scripts:
            known = (ROOT / script).read_text() + (ROOT / "utils.py").read_text()
            typed = words[words.index(script) :]
            for option in [word for word in typed if word.startswith("--")]:
                assert f"{option}" in known, f"{script} does not know {option}"
            seen.add(script)
    assert {"train.py", "test.py", "download.py", "evaluate.py", "export.py", "app.py"} <= seen


def test_files_and_pictures_exist():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / name).stat().st_size < 500_000, name
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / name).exists() or name == "cyclegan.py", name  # the last is PyTorch-GAN's
    for name in ("README.md", "README.zh-CN.md"):
        assert not re.search(r"@[A-Z_]+@", (ROOT / name).read_text(encoding="utf-8")), name


def test_documented_defaults_are_the_real_ones():
    args = vars(train.parse_args([]))
    told = re.findall(r"`--(\w+)` \(([\w.]+)\)", README)
    told = {name: value for name, value in told if name in args}
    assert len(told) > 20
    for name, value in told.items():
        real = args[name]
        if isinstance(real, int | float):
            assert float(value) == real, name
        elif real is not None:
            assert str(real) == value, name


def test_demo_and_test_commands_run(tmp_path):
    """The demo's command, shortened by options typed beside it, then test.py's."""
    demo = next(command for command in commands() if "--demo" in command)
    assert "python test.py" in commands()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    draw_demo(tmp_path / "dataset" / "demo", n_train=4, n_test=2)
    tiny = " --n_epochs 1 --size 32 --load_size 36 --ngf 4 --ndf 4 --n_residual_blocks 1"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (demo + tiny, "python test.py"):
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert re.search(r"A2B: error against the truth \d\.\d{3}", done.stdout), done.stdout
    assert (tmp_path / "result" / "report.html").exists()
    assert len(list((tmp_path / "outputs" / "B").iterdir())) == 2


def test_refused_without_data(tmp_path):
    """The README's data set, before it is downloaded: told what to type."""
    command = next(c for c in commands() if "train.py --dataroot dataset/apple2orange" in c)
    words = [word for word in shlex.split(command)[2:] if word != "--cuda"]
    args = train.parse_args([*words, "--workdir", str(tmp_path)])
    args.dataroot = tmp_path / args.dataroot
    with pytest.raises(train.UserError, match="python -m tools.download apple2orange"):
        train.main(args)
