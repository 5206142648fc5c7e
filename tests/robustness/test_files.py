"""Files are written whole or not at all, and no file that is read can do harm."""

import contextlib
import errno
import os
import pickle
import re
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

import datasets
import test as test_script  # or pytest would collect it
import train
import utils
from lib.outputs import output_names
from models import Discriminator, make_generator
from utils import UserError

# ------------------------------------------------------------------------------------------------
# Whole or not at all


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"new and longer"):
        with utils.atomic_write(path) as file:
            file.write(content)
            assert path.read_bytes() == b"old" if content != b"old" else not path.exists()
        assert path.read_bytes() == content
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_writer_fails_midway(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error, match="midway"), utils.atomic_write(path) as file:
        file.write(bytes(100_000))
        raise error("midway")
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room(code, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    told = f"cannot write {path} .{os.strerror(code)}.: free some space.*before is untouched"
    with pytest.raises(UserError, match=told), utils.atomic_write(path) as file:
        file.write(b"half")
        raise OSError(code, os.strerror(code))
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["file"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    for name in (".0a.tmp", "A/.0b.tmp", "keep.png", "A/keep.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    utils.remove_temporary_files(tmp_path)
    assert names_in(tmp_path) == ["A", "keep.png"] and names_in(tmp_path / "A") == ["keep.png"]


# ------------------------------------------------------------------------------------------------
# Disk full, read-only


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system; the tests with a quota remain")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def largest_file(size: int):
    """A quota that anyone may set: no file of this process gets larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(disk: Path) -> Path:
    """Leave no room but for a few kilobytes, such as a log wants."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 16384))
    return disk / "filler"


def models_of(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workdir / "models").glob("*.pth")}


def exit_of(main, args, capsys) -> tuple[int, str]:
    """The exit code and the last line of what a script tells."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        utils.run(main, args)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return stopped.value.code, told.strip().splitlines()[-1]


def resume_args(workdir: Path, more: str = ""):
    return train.parse_args(["--workdir", str(workdir), "--resume", *more.split()])


def test_disk_full(small_disk, dataroot, tmp_path, capsys):
    tiny.run(dataroot, tmp_path / "whole", "--n_epochs 2 --lr_policy constant")
    run = small_disk / "run"
    tiny.run(dataroot, run, "--n_epochs 1 --lr_policy constant")
    before = models_of(run)
    filler = fill(small_disk)
    code, told = exit_of(train.main, resume_args(run, "--n_epochs 2"), capsys)
    assert code == 2 and "No space left on device" in told and "before is untouched" in told
    assert models_of(run) == before
    code, told = exit_of(test_script.main, test_args(run), capsys)
    assert code == 2 and "No space left on device" in told
    filler.unlink()
    assert tiny.resume(run, "--n_epochs 2") == 0
    assert tiny.differences(tiny.outcome(tmp_path / "whole"), tiny.outcome(run)) == []
    assert test_script.main(test_args(run)) == 0


def test_quota(dataroot, tmp_path, capsys):
    """The state is the largest file; the rest still fits."""
    tiny.run(dataroot, tmp_path, "--n_epochs 1")
    before = models_of(tmp_path)
    sizes = sorted(len(content) for content in before.values())
    with largest_file(sizes[-1] // 2):
        code, told = exit_of(train.main, resume_args(tmp_path, "--n_epochs 2"), capsys)
    assert code == 2 and "File too large" in told, told
    after = models_of(tmp_path)
    assert after["train_state.pth"] == before["train_state.pth"]
    assert after.keys() == before.keys()
    with largest_file(100):
        code, told = exit_of(test_script.main, test_args(tmp_path), capsys)
    assert code == 2 and "File too large" in told
    assert tiny.resume(tmp_path, "--n_epochs 2") == 0


def test_read_only(small_disk, dataroot, capsys):
    run = small_disk / "run"
    tiny.run(dataroot, run, "--n_epochs 1")
    before = models_of(run)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for main, args in (
        (train.main, resume_args(run, "--n_epochs 2")),
        (train.main, train.parse_args(tiny.words(dataroot, small_disk / "new"))),
        (test_script.main, test_args(run)),
    ):
        code, told = exit_of(main, args, capsys)
        assert code == 2 and "Read-only file system" in told and str(small_disk) in told
    assert models_of(run) == before


@pytest.mark.parametrize("blocked", ["", "models", "logs", "outputs", "outputs/A", "result"])
def test_file_in_place_of_a_folder(blocked, dataroot, tmp_path, capsys):
    """A folder that cannot be written, in a way that stops root too."""
    workdir = tmp_path / "run"
    if not blocked:
        workdir.write_text("a file")
        code, told = exit_of(train.main, train.parse_args(tiny.words(dataroot, workdir)), capsys)
    else:
        save_generators(workdir)
        shutil.rmtree(workdir / blocked, ignore_errors=True)
        (workdir / blocked).parent.mkdir(exist_ok=True)
        (workdir / blocked).write_text("a file")
        main, args = train.main, train.parse_args(tiny.words(dataroot, workdir))
        if "out" in blocked or blocked == "result":
            main, args = test_script.main, test_args(workdir, f"--dataroot {dataroot}")
        code, told = exit_of(main, args, capsys)
    assert code == 2 and told.startswith("error: cannot create the folder")
    assert str(workdir / blocked) in told


# ------------------------------------------------------------------------------------------------
# Checkpoints that are none


class Attack:
    """Unpickled by an unwary program, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def save_generators(workdir: Path) -> Path:
    models = workdir / "models"
    models.mkdir(parents=True)
    for name in ("netG_A2B", "netG_B2A"):
        net = make_generator("resnet_9blocks", 3, 3, 1, ngf=2)
        utils.save_tensors(models / f"{name}.pth", net.state_dict())
    return workdir


def test_args(workdir: Path, more: str = ""):
    return test_script.parse_args(["--workdir", str(workdir), "--device", "cpu", *more.split()])


test_args.__test__ = False  # pytest takes it for a test by its name


def bad_checkpoints(folder: Path) -> dict[str, str]:
    """Write one of each kind; what must be told of each."""
    folder.mkdir()
    net = make_generator("resnet_9blocks", 3, 3, 1, ngf=2)
    good = net.state_dict()
    utils.save_tensors(folder / "good.pth", good)
    content = (folder / "good.pth").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    torch.save(good, folder / "old format", _use_new_zipfile_serialization=False)
    old = (folder / "old format").read_bytes()
    plain = {
        "truncated": content[:middle],
        "end missing": content[:-9],
        "only a start": content[:70],
        "one bit changed": flipped,
        "empty": b"",
        "html": b"\n <!DOCTYPE html><html><body>404 Not Found</body></html>",
        "text": b"hello world\n",
        "large file pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "json": b'{"weights": 1}',
        "zeros": bytes(5000),
        "noise": bytes(range(255, 0, -1)) * 9,
        "old, truncated": old[: len(old) // 2],
        "old, a start": old[:60],
        "pickle": pickle.dumps({"weights": [1.0]}),
        "attack, pickle": pickle.dumps(Attack(folder / "owned")),
        "attack, protocol 0": pickle.dumps(Attack(folder / "owned"), 0),
    }
    for name, data in plain.items():
        (folder / f"{name}.pth").write_bytes(data)
    Image.new("RGB", (9, 9)).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.pth")
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    torch.save({"a": Attack(folder / "owned")}, folder / "attack.pth")
    torch.save(
        {"a": Attack(folder / "owned")},
        folder / "attack, old.pth",
        _use_new_zipfile_serialization=False,
    )
    torch.save(net, folder / "whole module.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save([good], folder / "list.pth")
    (folder / "folder.pth").mkdir()
    damaged, foreign = "is truncated or damaged: copy or download it again", "is not a PyTorch"
    refused = "is refused: it holds more than tensors .a pickle that could run code when loaded"
    told = dict.fromkeys(["truncated", "end missing", "only a start", "one bit changed"], damaged)
    told |= {"empty": "is empty", "html": "is a web page, not a checkpoint", "zip": foreign}
    told |= dict.fromkeys(["text", "large file pointer", "json", "zeros", "noise"], foreign)
    told |= dict.fromkeys(["old, truncated", "old, a start", "picture"], foreign)
    told |= dict.fromkeys(["attack", "attack, old", "attack, pickle"], refused)
    told |= dict.fromkeys(["attack, protocol 0", "pickle", "whole module"], refused)
    told |= {"tensor": "holds a Tensor, not a state_dict", "list": "holds a list, not a state_dict"}
    return told | {"folder": "cannot read .*Is a directory", "missing": "there is no checkpoint"}


def put(path: Path | None, target: Path) -> None:
    """Copy a file or folder into the place of another; None leaves nothing there."""
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    if path is not None:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target)


@pytest.mark.filterwarnings("ignore")  # PyTorch's, about old formats
def test_bad_checkpoints(dataroot, tmp_path, capsys):
    """Each kind by each way in: its own sentence, exit code 2, and no code in it is run."""
    folder, run, models = tmp_path / "bad", tmp_path / "run", tmp_path / "models"
    told = bad_checkpoints(folder)
    assert len(told) == 25 and len(set(told.values())) == 9
    tiny.run(dataroot, run, "--n_epochs 1")
    good = shutil.copy(run / "models" / "train_state.pth", tmp_path / "good.pth")
    models.mkdir()
    for name, sentence in told.items():
        path = None if name == "missing" else folder / f"{name}.pth"
        for target in ("netG_A2B.pth", "netG_B2A.pth"):
            put(path, models / target)
        put(None, run / "models" / "train_state.prev.pth")
        put(path, run / "models" / "train_state.pth")
        init = tiny.words(dataroot, tmp_path / "new", f"--restart --init_from {models}")
        one = test_args(run, f"--input {dataroot}/testA")
        one.weights = folder / f"{name}.pth"
        ways = {
            "--weights": (test_script.main, one),
            "--models": (
                test_script.main,
                test_args(run, f"--models {models} --dataroot {dataroot}"),
            ),
            "--init_from": (train.main, train.parse_args(init)),
            "--resume": (train.main, resume_args(run)),
        }
        for way, (main, args) in ways.items():
            code, line = exit_of(main, args, capsys)
            neither = (name, way) == ("missing", "--init_from")
            wanted = "has neither netG_A2B.pth nor latest_net_G_A.pth" if neither else sentence
            assert code == 2, (name, way, line)
            assert re.match(f"error: .*{wanted}", line), (name, way, line)
            assert not (folder / "owned").exists(), (name, way)
    put(Path(good), run / "models" / "train_state.pth")
    assert tiny.resume(run) == 0


def test_the_attack_works(tmp_path):
    """Where code is allowed to run, it does: the test above could fail."""
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(Attack(tmp_path / "no" / "such" / "folder")))
    pickle.loads(pickle.dumps(Attack(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


def test_wrong_weights(dataroot, tmp_path, capsys):
    """Checkpoints that are sound, but of something else."""
    net = make_generator("resnet_9blocks", 3, 3, 1, ngf=2).state_dict()
    wider = make_generator("resnet_9blocks", 3, 3, 1, ngf=4).state_dict()
    wrong = {
        "one weight of another shape": {**net, "model.4.weight": torch.zeros(4, 2, 5, 5)},
        "one weight is missing": {k: v for k, v in net.items() if k != "model.7.bias"},
        "one weight too many": {**net, "extra.weight": torch.zeros(3)},
        "a vector for a kernel": {**net, "model.26.weight": torch.zeros(3)},
        "a discriminator": Discriminator(ndf=2).state_dict(),
        "a stranger": {"layer.weight": torch.zeros(3, 3)},
        "no weights": {"epoch": 3},
        "nothing": {},
    }
    run, models = tmp_path / "run", save_generators(tmp_path) / "models"
    tiny.run(dataroot, run, "--n_epochs 1")
    for name, state in wrong.items():
        utils.save_tensors(models / "netG_A2B.pth", state)
        args = test_args(tmp_path, f"--dataroot {dataroot}")
        code, line = exit_of(test_script.main, args, capsys)
        assert code == 2 and "netG_A2B.pth holds no generator that is known here: " in line, name
        args = tiny.words(dataroot, tmp_path / "new", f"--restart --init_from {models}")
        code, line = exit_of(train.main, train.parse_args(args), capsys)
        assert code == 2 and "netG_A2B.pth do not fit the networks asked for" in line, (name, line)
    utils.save_tensors(models / "netG_A2B.pth", wider)
    code, line = exit_of(train.main, train.parse_args(args), capsys)
    assert code == 2 and "do not fit the networks asked for (--netG, --ngf" in line
    state = tiny.read_state(run)
    broken = {
        "is a checkpoint, but not the state of a run": net,
        "does not fit its own options": {**state, "netG_A2B": wider},
        "does not fit its own options, .*netG_B2A": {
            k: v for k, v in state.items() if k != "netG_B2A"
        },
        "does not fit": {**state, "optimizer_G": {"state": {}, "param_groups": []}},
        "cannot resume: the saved state": {**state, "rank": {}},
    }
    for sentence, content in broken.items():
        (run / "models" / "train_state.prev.pth").unlink(missing_ok=True)
        utils.save_tensors(run / "models" / "train_state.pth", content)
        code, line = exit_of(train.main, resume_args(run), capsys)
        assert code == 2 and re.search(sentence, line), (sentence, line)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff", '"text"'])
def test_damaged_options(content, dataroot, tmp_path, capsys):
    save_generators(tmp_path)
    (tmp_path / "models" / "options.json").write_text(content)
    code, line = exit_of(test_script.main, test_args(tmp_path), capsys)
    assert code == 2 and "options.json is damaged" in line and "--dataroot" in line


# ------------------------------------------------------------------------------------------------
# Names


def test_odd_names(tmp_path, capsys):
    """Every source has its output, whatever its name, and none overwrites another."""
    names = ["a.jpg", "a.png", "A.PNG", "a_png.bmp", "with space.png", "äöü 猫 🍎.png", "ünï.JPG"]
    names += ["sub/a.jpg", "sub/deep/a.jpg", "Sub/a.jpg", "-dash.png", "two.dots.png", "%s {}.png"]
    names += ["line\nbreak.png", "quote'\".png", "x" * 251 + ".png", "x" * 251 + ".bmp"]
    names += ["猫" * 83 + "ab.png", "y" * 250 + ".jpeg", os.fsdecode(b"not utf-8 \xff.png")]
    sources = tmp_path / "testA"
    for i, name in enumerate(names):
        tiny.draw(sources / "plain.png", i)
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / "plain.png").rename(sources / name)
    save_generators(tmp_path)
    assert datasets.list_images(sources) == sorted(names)
    args = test_args(tmp_path, f"--input {sources} --compare 99")
    assert test_script.main(args) == 0
    outputs = datasets.list_images(tmp_path / "outputs" / "B")
    assert len(outputs) == len({name.lower() for name in outputs}) == len(names)
    for folder in (tmp_path / "result", tmp_path / "outputs" / "cycle"):
        assert len(datasets.list_images(folder)) == len(names)
    for name, output in zip(sorted(names), output_names(sorted(names)), strict=True):
        path = tmp_path / "outputs" / "B" / output
        assert datasets.load_image(path).shape == (28, 28, 3)
        assert len(os.fsencode(path.name)) <= 255
        alone = tmp_path / "alone"
        shutil.rmtree(alone, ignore_errors=True)
        save = test_args(tmp_path, "")
        save.input, save.workdir, save.models = sources / name, alone, tmp_path / "models"
        if name in ("a.png", "A.PNG", "a.jpg"):
            test_script.main(save)
            (mine,) = datasets.list_images(alone / "outputs" / "B")
            assert (alone / "outputs" / "B" / mine).read_bytes() == path.read_bytes()


def test_output_names():
    names = ["a.jpg", "a.png", "A.jpg", "a_png.jpg", "b.png", "a.tif", "s/a.png", "S/A.png"]
    outputs = output_names(names)
    assert outputs[0] == "a.png" and outputs[4] == "b.png" and outputs[6] == "s/a.png"
    assert len({output.lower() for output in outputs}) == len(names)
    assert output_names(names) == outputs
    long = [letter * 255 for letter in "ab"] + ["c" * 251 + ".jpg", "c" * 251 + ".png"]
    outputs = output_names(long)
    assert len(set(outputs)) == 4 and all(len(os.fsencode(name)) <= 255 for name in outputs)
