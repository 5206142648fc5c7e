"""Listing, decoding, corrupt files, and what a training sample is."""

import argparse
import gc
import io
import os
import random
import re
import shutil
import struct
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import test_files
import tiny
import torch
from PIL import Image

import datasets
import test as test_script  # or pytest would collect it
import train
import utils
from datasets import UnreadableImage, load_image
from utils import UserError

# ------------------------------------------------------------------------------------------------
# Listing


def test_list_images(tmp_path):
    pictures = ["b.jpg", "a.JPEG", "C.PnG", "d.bmp", "e.webp", "f.tif", "g.TIFF", "h.ppm"]
    pictures += ["sub/a.png", "sub/deeper/z.png", "Zebra/1.jpg", "10.jpg", "9.jpg", "ä ö.png"]
    pictures += ["folder.jpg/1.jpg"]
    others = ["notes.txt", "jpg", "a.jpg.part", "sub/b.gif.bak", ".hidden/x.png", "Thumbs.db"]
    for name in pictures + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert datasets.list_images(tmp_path) == sorted(pictures)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_once(tmp_path):
    """Also links in circles, and many ways to one folder; the first by name is the one listed."""
    for name in ("set/one/x.png", "set/two/y.png", "other/z.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    root = tmp_path / "set"
    (root / "one" / "up").symlink_to(root)
    (root / "one" / "two").symlink_to(root / "two")
    (root / "two" / "one").symlink_to(root / "one")
    (root / "elsewhere").symlink_to(tmp_path / "other")
    (root / "file.png").symlink_to(tmp_path / "other" / "z.png")
    (root / "nowhere").symlink_to(tmp_path / "nothing")
    names = ["elsewhere/z.png", "file.png", "one/two/y.png", "one/x.png"]
    assert datasets.list_images(root) == names
    with pytest.raises(UserError, match="cannot read the folder .*nothing: No such file"):
        datasets.list_images(tmp_path / "nothing")


def test_both_layouts(tmp_path):
    for name in ("one/trainA/x.png", "two/train/A/x.png"):
        tiny.draw(tmp_path / name, 0)
    assert datasets.find_split(tmp_path / "one", "trainA") == tmp_path / "one" / "trainA"
    assert datasets.find_split(tmp_path / "two", "trainA") == tmp_path / "two" / "train" / "A"
    with pytest.raises(UserError, match="no folder .*testB .*python -m tools.download one"):
        datasets.find_split(tmp_path / "one", "testB")
    (tmp_path / "one" / "testB").mkdir()
    with pytest.raises(UserError, match="testB holds no picture .*--dataroot"):
        datasets.find_split(tmp_path / "one", "testB")


def test_train_slash_A_layout(dataroot, tmp_path):
    for split in ("train", "test"):
        for side in "AB":
            shutil.copytree(dataroot / f"{split}{side}", tmp_path / "data" / split / side)
    tiny.run(dataroot, tmp_path / "one", "--n_epochs 1")
    tiny.run(tmp_path / "data", tmp_path / "two", "--n_epochs 1")
    assert not tiny.differences(tiny.outcome(tmp_path / "one"), tiny.outcome(tmp_path / "two"))


def test_a_large_folder(tmp_path):
    """Listing 20,000 files takes a moment and little memory: a million would too."""
    n, folder = 20_000, tmp_path / "trainA"
    folder.mkdir()
    for i in range(n):
        (folder / f"picture_{i:07d}.jpg").touch()
    tiny.draw(folder / "picture_0000000.png", 0)
    options = train.parse_args(["--size", "24", "--load_size", "26"])
    domain = datasets.Domain(tmp_path, "trainA", 3, options, tmp_path / "skipped.txt")
    gc.collect()  # what is imported once, or was left by other tests, does not count
    began = time.process_time()
    tracemalloc.start()
    domain = datasets.Domain(tmp_path, "trainA", 3, options, tmp_path / "skipped.txt")
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    seconds = time.process_time() - began
    print(f"{size / n:.0f} bytes and {1e6 * seconds / n:.1f} microseconds a file")
    assert len(domain) == n + 1 and size / n < 300 and seconds < 5


# ------------------------------------------------------------------------------------------------
# Every kind of picture, against what plain arithmetic expects

COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [90, 120, 30]]], np.uint8
)  # (2, 3, 3)


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "tiff", "ppm"])
def test_lossless(extension, tmp_path):
    path = saved(Image.fromarray(COLOURS), tmp_path / f"x.{extension}")
    assert np.array_equal(load_image(path), COLOURS)


@pytest.mark.parametrize(("extension", "most"), [("jpg", 3), ("webp", 3)])
def test_lossy(extension, most, tmp_path):
    smooth = np.full((16, 16, 3), (200, 90, 30), np.uint8)
    path = saved(Image.fromarray(smooth), tmp_path / f"x.{extension}", quality=95)
    assert abs(load_image(path).astype(int) - smooth).max() <= most


def test_the_name_does_not_matter(tmp_path):
    path = saved(Image.fromarray(COLOURS), tmp_path / "x.png")
    assert np.array_equal(load_image(path.rename(tmp_path / "x.jpg")), COLOURS)


def test_modes(tmp_path):
    grey = np.array([[0, 128, 255]], np.uint8)  # (1, 3)
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    path = saved(Image.fromarray(grey), tmp_path / "grey.png")
    assert np.array_equal(load_image(path), as_rgb)
    assert np.array_equal(load_image(path, 1), grey[..., None])

    path = saved(Image.fromarray(grey > 100), tmp_path / "bits.png")
    assert load_image(path)[0, :, 0].tolist() == [0, 255, 255]

    palette = Image.fromarray(COLOURS).quantize(8)
    path = saved(palette, tmp_path / "palette.png")
    assert np.array_equal(load_image(path), np.array(palette.convert("RGB")))

    # alpha over white: a * colour + (1 - a) * 255
    alpha = np.array([[0, 51, 255], [255, 102, 204]], np.uint8)
    rgba = np.dstack([COLOURS, alpha])
    a = alpha[..., None] / 255
    path = saved(Image.fromarray(rgba), tmp_path / "alpha.png")
    assert abs(load_image(path) - (a * COLOURS + (1 - a) * 255)).max() <= 1
    assert np.array_equal(load_image(path, 4), rgba)
    path = saved(
        Image.fromarray(np.dstack([grey, [[0, 51, 255]]]).astype(np.uint8)), tmp_path / "la.png"
    )
    assert load_image(path)[0, :, 0].tolist() == [255, 230, 255]
    hole = palette.getpixel((0, 1))
    path = saved(palette, tmp_path / "hole.png", transparency=hole)
    assert load_image(path)[1, 0].tolist() == [255, 255, 255]

    cmyk = Image.fromarray(np.full((8, 8, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    for name in ("cmyk.tif", "cmyk.jpg"):
        red = load_image(saved(cmyk, tmp_path / name)).astype(int)
        assert abs(red - (255, 0, 0)).max() <= 4, name
    assert load_image(path, 3).dtype == np.uint8


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bits(extension, tmp_path):
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    path = saved(Image.fromarray(deep), tmp_path / f"x.{extension}")
    one = load_image(path, 1)
    assert one.dtype == np.uint16 and np.array_equal(one[..., 0], deep)
    three = load_image(path, 3)
    assert three.dtype == np.uint8 and three.shape == (1, 5, 3)
    assert three[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert load_image(path, 4)[0, :, 3].tolist() == [255] * 5  # opaque


def test_16_bits_of_colour(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 0, 32768, 256, 255, 0) for _ in range(2))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert load_image(tmp_path / "x.png")[0].tolist() == [[255, 0, 128], [1, 0, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """The eight ways to hold a camera, by what the standard says of row 0 and column 0."""
    x = COLOURS
    turned = [x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.transpose(1, 0, 2)]
    turned += [np.rot90(x, -1), x[::-1, ::-1].transpose(1, 0, 2), np.rot90(x)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(x), tmp_path / "x.png", exif=exif)
    assert np.array_equal(load_image(path), turned[orientation - 1])


def test_arrays(tmp_path):
    five = np.random.default_rng(0).integers(0, 65536, (4, 6, 5), dtype=np.uint16)
    np.save(tmp_path / "five.npy", five)
    assert np.array_equal(load_image(tmp_path / "five.npy", 5), five)
    bad = {"shape": five, "type": five.astype(np.int64)[..., :3], "empty": five[:0, :, :3]}
    bad |= {"objects": np.array([[[{}] * 3]], object)}
    for name, array in bad.items():
        np.save(tmp_path / "bad.npy", array, allow_pickle=True)
        with pytest.raises(UnreadableImage):
            print(name, load_image(tmp_path / "bad.npy"))


def test_values_of_unknown_range_are_refused(tmp_path):
    """Floating-point values have no range to scale by, and 32 bits do not fit into 16."""
    dark = np.full((4, 4), 0.2, np.float32)
    path = saved(Image.fromarray(dark), tmp_path / "float.tif")
    for channels in (1, 3, 4):
        reason = "it holds floats" if channels == 1 else "it has 1 channels"
        with pytest.raises(UnreadableImage, match=reason):
            load_image(path, channels)
    assert load_image(path, 1, (0, 0.4)).tolist() == np.zeros((4, 4, 1)).tolist()
    path = saved(Image.fromarray(np.array([[0, 65535]], np.int32)), tmp_path / "fits.tif")
    assert load_image(path, 1).dtype == np.uint16 and load_image(path, 1).max() == 65535
    for value in (-1, 65536):
        path = saved(Image.fromarray(np.array([[0, value]], np.int32)), tmp_path / "int.tif")
        with pytest.raises(UnreadableImage, match="do not fit 16 bits"):
            load_image(path, 1)


def test_resize(tmp_path):
    """Pillow's bicubic filter, to one level of 8 bits and in proportion for 16 bits."""
    noise = np.random.default_rng(0).integers(60, 200, (9, 9, 3), dtype=np.uint8)
    colour = np.asarray(Image.fromarray(noise).resize((50, 40))).copy()  # (40, 50, 3)
    for width, height in ((20, 30), (71, 64), (50, 41)):
        wanted = Image.fromarray(colour).resize((width, height), Image.Resampling.BICUBIC)
        resized = datasets.resize(colour, (width, height))
        assert resized.dtype == np.uint8 and resized.shape == (height, width, 3)
        assert abs(resized.astype(int) - np.asarray(wanted)).max() <= 1
        deep = colour[..., :1].astype(np.uint16) * 257
        wanted = Image.fromarray(deep[..., 0].astype(np.float32)).resize((width, height), 3)
        resized = datasets.resize(deep, (width, height))
        assert resized.dtype == np.uint16 and resized.shape == (height, width, 1)
        assert abs(resized[..., 0] - np.asarray(wanted).clip(0, 65535)).max() <= 257 / 4
    edge = np.repeat(np.array([[0, 65535]], np.uint16), 9, axis=1)[..., None]  # (1, 18, 1)
    row = datasets.resize(edge, (36, 1)).ravel()  # the filter overshoots, which must not wrap round
    assert row[:17].max() < 20_000 and row[19:].min() > 45_000


def test_tensors():
    """Both ends of a type are -1 and 1, and the way back is exact for every value."""
    for dtype, most in ((np.uint8, 255), (np.uint16, 65535)):
        picture = np.arange(most + 1, dtype=dtype).reshape(-1, 2, 1)
        tensor = datasets.to_tensor(picture)
        assert tensor.dtype == torch.float32 and tensor.shape == (1, (most + 1) // 2, 2)
        assert tensor.min() == -1 and tensor.max() == 1
        assert np.array_equal(datasets.to_array(tensor, dtype), picture)
    outside = torch.tensor([-1.5, 1.5]).reshape(1, 1, 2)
    assert datasets.to_array(outside).ravel().tolist() == [0, 255]
    assert datasets.to_tensor(COLOURS[:, ::-1])[:, 0, 0].tolist() == [-1, -1, 1]  # any strides


# ------------------------------------------------------------------------------------------------
# Corrupt files

CORRUPT = ("cut.jpg", "empty.png", "huge.png", "huger.png", "page.webp", "pipe.jpg", "tail.png")


def png_header(width: int, height: int) -> bytes:
    data = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))


def add_corrupt(folder: Path) -> None:
    """One file of each kind that cannot be read, beside what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, "jpeg")
    (folder / "cut.jpg").write_bytes(file.getvalue()[:900])
    noise.save(file := io.BytesIO(), "png")
    (folder / "tail.png").write_bytes(file.getvalue()[:-2000])
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "page.webp").write_text("<html>404</html>")
    idat = struct.pack(">I", 2) + b"IDAT" + b"\0\0" + bytes(4)
    (folder / "huge.png").write_bytes(png_header(10_000, 10_000) + idat)  # over the limit
    (folder / "huger.png").write_bytes(png_header(60_000, 60_000) + idat)  # over twice the limit


@pytest.fixture
def corrupt(tmp_path):
    root = tiny.draw_set(tmp_path / "data", 3, 2)
    for split in ("trainA", "trainB", "testA"):
        add_corrupt(root / split)
    return root


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt(name, tmp_path):
    add_corrupt(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnreadableImage) as raised:
            load_image(tmp_path / name)
    assert str(raised.value) and "\n" not in str(raised.value)
    if name.startswith("huge"):
        assert "limit" in str(raised.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("options", ["--cache on", "--cache off", "--cache off --workers 2"])
def test_training_skips_corrupt_files(options, corrupt, tmp_path, capfd):
    run, options = tmp_path / "run", f"{options} --lr_policy constant"
    assert tiny.run(corrupt, run, f"--n_epochs 2 {options}") == 0
    listed = (run / "logs" / "skipped.txt").read_text().splitlines()
    printed = re.findall(r"^skipped (.*)$", capfd.readouterr().err, re.M)
    wanted = [str(corrupt / s / n) for s in ("trainA", "trainB") for n in CORRUPT]
    for lines in (listed, printed):
        assert sorted(line.split(": ")[0] for line in lines) == wanted, lines
    assert tiny.resume(run, "--n_epochs 3") == 0
    assert "skipped " not in capfd.readouterr().err  # once is enough
    assert (run / "logs" / "skipped.txt").read_text().splitlines() == listed
    wanted = tiny.outcome(run)
    tiny.run(corrupt, tmp_path / "other", f"--n_epochs 3 {options} --workers 0 --cache on")
    assert not tiny.differences(wanted, tiny.outcome(tmp_path / "other"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", "AB")
def test_a_domain_of_corrupt_files(side, corrupt, tmp_path, capsys):
    for path in (corrupt / f"train{side}").glob("?.png"):
        path.unlink()
    args = train.parse_args(tiny.words(corrupt, tmp_path / "run"))
    code, line = test_files.exit_of(train.main, args, capsys)
    assert code == 2 and "not one picture in" in line
    assert f"train{side}" in line and "skipped.txt" in line
    assert not (tmp_path / "run" / "models" / "train_state.pth").exists()


@pytest.mark.parametrize("options", ["--cache off", "--cache off --workers 1"])
def test_pictures_that_vanish(options, dataroot, tmp_path, monkeypatch, capsys):
    """They were there at the start; the message is one line even if a worker sends it."""
    data = Path(shutil.copytree(dataroot, tmp_path / "data"))
    step = train.CycleGAN.step

    def vanish(self, batches):
        shutil.rmtree(data / "trainA", ignore_errors=True)
        return step(self, batches)

    monkeypatch.setattr(train.CycleGAN, "step", vanish)
    args = train.parse_args(tiny.words(data, tmp_path / "run", f"--n_epochs 99 {options}"))
    code, line = test_files.exit_of(train.main, args, capsys)
    assert code == 2 and line.startswith("error: not one picture in"), line
    assert tiny.read_state(tmp_path / "run")["epoch"] < 99


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_translation_skips_corrupt_files(corrupt, tmp_path, capsys):
    test_files.save_generators(tmp_path)
    assert test_script.main(test_files.test_args(tmp_path, f"--dataroot {corrupt}")) == 1
    printed = capsys.readouterr().out
    assert "A2B: 2 of 9 pictures translated" in printed and "B2A: 2 of 2" in printed
    listed = re.findall(r"^could not be read: (.*?): ", printed, re.M)
    assert listed == [str(corrupt / "testA" / name) for name in CORRUPT]
    assert datasets.list_images(tmp_path / "outputs" / "B") == ["0.png", "1.png"]
    args = test_files.test_args(tmp_path, f"--input {corrupt}/testA/cut.jpg")
    assert test_script.main(args) == 1
    args = test_files.test_args(tmp_path, f"--input {corrupt}/testA/0.png")
    assert test_script.main(args) == 0


def test_one_line_for_each_corrupt_file(corrupt, tmp_path, capfd):
    """As a user runs it, Pillow's own warnings are not added to ours."""
    args = train.parse_args(tiny.words(corrupt, tmp_path / "run", "--n_epochs 1"))
    with pytest.raises(SystemExit), warnings.catch_warnings():
        utils.run(train.main, args)
    printed = capfd.readouterr().err
    assert "Warning" not in printed and printed.count("skipped ") == 2 * len(CORRUPT)


# ------------------------------------------------------------------------------------------------
# What a sample is

HEIGHT, WIDTH, SIZE = 12, 18, 8  # of the pictures below, and of the crops


@pytest.fixture
def numbered(tmp_path):
    """UnpairedImages of 7 and 5 pictures: red is the picture's number, green the row, blue the
    column, so that a sample tells where it comes from."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for split, n in (("trainA", 7), ("trainB", 5)):
        (tmp_path / split).mkdir()
        for i in range(n):
            pixels = np.dstack([np.full_like(x, i), y, x]).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{i}.png")
    options = argparse.Namespace(preprocess="crop", size=SIZE, load_size=SIZE, axis=-1)

    def make(A: str = "trainA", B: str = "trainB", **more) -> datasets.UnpairedImages:
        load = lambda split: datasets.Domain(tmp_path, split, 3, options, tmp_path / "skipped.txt")
        return datasets.UnpairedImages(load(A), load(B), SIZE, **more)

    return make


def trace(sample: torch.Tensor) -> tuple[int, int, int, bool]:
    """The picture's number, top, left, and whether it is flipped, after a look at every pixel."""
    assert sample.shape == (3, SIZE, SIZE) and sample.dtype == torch.uint8
    number, rows, columns = sample.int()
    top, left = int(rows[0, 0]), int(columns.min())
    flipped = bool(columns[0, 0] > left)
    across = torch.arange(left, left + SIZE)
    assert (number == number[0, 0]).all()
    assert (rows == torch.arange(top, top + SIZE)[:, None]).all()
    assert (columns == (across.flip(0) if flipped else across)).all()
    return int(number[0, 0]), top, left, flipped


def test_a_sample_is_a_window_of_a_picture_or_of_its_mirror_image(numbered):
    data = numbered(seed=1)
    pairs = [data[epoch, index] for epoch in range(60) for index in range(7)]
    for side in (0, 1):
        numbers, tops, lefts, flips = zip(*(trace(pair[side]) for pair in pairs), strict=True)
        assert set(numbers) == set(range((7, 5)[side]))
        assert set(tops) == set(range(HEIGHT - SIZE + 1))  # both edges are reached
        assert set(lefts) == set(range(WIDTH - SIZE + 1))
        assert 0.4 < sum(flips) / len(flips) < 0.6
        assert len({*zip(tops, lefts, flips, strict=True)}) > 100  # of 5 * 11 * 2: independent
    assert len({(trace(A)[0], trace(B)[0]) for A, B in pairs}) == 7 * 5  # unpaired
    assert sum(trace(A)[1:] == trace(B)[1:] for A, B in pairs) < 30  # each has its own crop


def test_an_epoch_is_a_permutation(numbered):
    data = numbered(seed=1)
    epochs = [[trace(data[epoch, index][0])[0] for index in range(7)] for epoch in range(6)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len({*map(tuple, epochs), tuple(range(7))}) == 7  # all different, none in file order
    assert [trace(data[2, 7 + i][0])[0] for i in range(3)] == epochs[2][:3]  # starts over
    other = [trace(numbered(seed=2)[0, index][0])[0] for index in range(7)]
    assert other != epochs[0]
    fewer = numbered("trainB", "trainA")  # 5 of A, 7 of B: every picture of A once or twice
    order = [trace(fewer[0, index][0])[0] for index in range(len(fewer))]
    assert len(order) == 7 and {order.count(i) for i in range(5)} == {1, 2}


def test_no_flip(numbered):
    data = numbered(flip=False)
    assert not any(trace(x)[3] for i in range(40) for x in data[0, i])


def samples(dataroot: Path, tmp_path: Path, cache: bool, workers: int, first: int = 0) -> list:
    options = train.parse_args(["--size", "24", "--load_size", "26"])
    domains = [
        datasets.Domain(dataroot, split, 3, options, tmp_path / "skipped.txt")
        for split in ("trainA", "trainB")
    ]
    if cache:
        for domain in domains:
            domain.cache()
    data = datasets.UnpairedImages(*domains, 24, seed=3)
    sampler = datasets.RunSampler(len(data), 2, 2, range(2), first)
    return [torch.cat(batch) for batch in datasets.make_loader(data, sampler, workers, False)]


def test_samples(dataroot, tmp_path):
    torch.manual_seed(1)
    wanted = samples(dataroot, tmp_path, cache=True, workers=0)
    assert len(wanted) == 6 and wanted[0].shape == (4, 3, 24, 24)
    assert len({batch.numpy().tobytes() for batch in wanted}) == 6
    before = torch.get_rng_state()
    for cache, workers in ((False, 0), (False, 2), (True, 2)):
        torch.rand(7)  # and whatever else was drawn before
        drawn = samples(dataroot, tmp_path, cache, workers)
        assert all(torch.equal(a, b) for a, b in zip(drawn, wanted, strict=True))
    late = samples(dataroot, tmp_path, cache=False, workers=0, first=4)
    assert all(torch.equal(a, b) for a, b in zip(late, wanted[2:], strict=True))
    torch.set_rng_state(before)
    samples(dataroot, tmp_path, cache=False, workers=2)
    assert torch.equal(before, torch.get_rng_state())  # a resumed run has the same dropout


def test_ranks_share_each_step():
    """Of accumulated batches too: those of two ranks in turn are those of one process."""
    keys = lambda *rank: list(datasets.RunSampler(5, 2, 8, range(2), 0, *rank))
    first, second = keys(0, 2), keys(1, 2)
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == keys()
    assert len(first) == 4 and first[1] == [(0, 4), (0, 5)]


def test_time_waiting_is_printed(dataroot, tmp_path, capsys):
    tiny.run(dataroot, tmp_path, "--n_epochs 1")
    assert re.search(r"\d+\.\d% of the time waiting for data", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------
# Hostile files


def originals() -> dict[str, bytes]:
    """Real files of all formats, modes and ways to store them."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8))
    smooth = Image.linear_gradient("L").resize((32, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "a.jpg": (colour, {"exif": exif}),
        "progressive.jpg": (colour, {"progressive": True}),
        "grey.jpg": (smooth, {}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "a.png": (colour, {"exif": exif}),
        "palette.png": (colour.quantize(16), {"transparency": 3}),
        "alpha.png": (colour.convert("RGBA"), {}),
        "bits.png": (smooth.convert("1"), {}),
        "deep.png": (Image.fromarray(np.asarray(smooth).astype(np.uint16) * 257), {}),
        "a.bmp": (colour, {}),
        "palette.bmp": (smooth.quantize(200), {}),
        "a.webp": (colour, {"exif": exif.tobytes()}),
        "lossless.webp": (colour.convert("RGBA"), {"lossless": True}),
        "a.tif": (colour, {}),
        "lzw.tif": (colour, {"compression": "tiff_lzw"}),
        "deflate.tif": (smooth, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (colour, {"compression": "jpeg"}),
        "fax.tif": (smooth.convert("1"), {"compression": "group4"}),
        "a.ppm": (colour, {}),
        "grey.ppm": (smooth, {}),
        "a.gif": (colour.quantize(64), {}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        kind = {"jpg": "jpeg", "tif": "tiff"}.get(name[-3:], name.rpartition(".")[2])
        image.save(file := io.BytesIO(), kind, **options)
        files[{"a.gif": "gif.png"}.get(name, name)] = file.getvalue()  # called so, it is a film
    np.save(file := io.BytesIO(), np.asarray(colour))
    return {**files, "a.npy": file.getvalue()}


def flip(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return data


def cut(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    return data[: rng.randrange(len(data))]


def cut_out(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 200) :]


def splice(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def blow_up(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """A number of the header becomes large, wherever it is and whatever its byte order."""
    place = rng.randrange(min(len(data) - 8, 200))
    number = rng.choice((0, 1, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**32 - 1, 20_000))
    form = rng.choice(("<I", ">I", "<H", ">H"))
    data[place : place + struct.calcsize(form)] = struct.pack(
        form, number % 256 ** struct.calcsize(form)
    )
    return data


def large_png(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """A sound header, checksum and all, with a size that the data does not fill."""
    return bytearray(png_header(rng.choice((9000, 30_000)), rng.choice((1, 9000)))) + data[33:]


def peak_memory(forget: bool = False) -> int:
    """The most bytes that this process has held; `forget` starts over."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc")
def test_hostile_files(tmp_path):
    """1500 mutated files: each gives a picture or UnreadableImage, and memory stays bounded."""
    files = originals()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert load_image(tmp_path / name).shape[2] == 3, name  # sound as they are
    rng, names = random.Random(0), sorted(files)
    read = refused = 0
    ways = (flip, flip, cut, cut_out, splice, blow_up, blow_up, large_png)
    before = peak_memory(forget=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(1500):
            name, way = rng.choice(names), ways[i % len(ways)]
            mutated = way(bytearray(files[name]), rng, files[rng.choice(names)])
            path = tmp_path / f"mutated{Path(name).suffix}"
            path.write_bytes(mutated)
            channels = rng.choice((1, 3, 3, 4))
            try:
                picture = load_image(path, channels)
            except UnreadableImage as error:
                assert str(error)
                refused += 1
                continue
            assert picture.ndim == 3 and picture.shape[2] == channels and picture.size
            assert picture.dtype == np.uint8 or (picture.dtype == np.uint16 and channels == 1)
            read += 1
    grown = (peak_memory() - before) / 2**20
    print(f"{read} read, {refused} refused, {grown:.0f} MiB more at most")
    assert read > 100 and refused > 500
    assert grown < 1500  # a picture just within Pillow's limit of 89 million pixels takes this much


def test_no_other_format_is_tried(tmp_path):
    """PostScript, for one, would have Ghostscript run it."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.jpg").write_bytes(script)
    with pytest.raises(UnreadableImage, match="cannot identify"):
        load_image(tmp_path / "x.jpg")
