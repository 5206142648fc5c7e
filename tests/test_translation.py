"""lib/translation.py, lib/validation.py and test.py: which picture becomes which, at which size."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import test as test_script  # or pytest would collect it
from lib import metrics, outputs, translation, validation
from lib.outputs import Translation
from models import Generator, init_weights, translate
from utils import UserError

CPU = torch.device("cpu")


def make_net(seed: int, **options) -> Generator:
    torch.manual_seed(seed)
    return init_weights(Generator(ngf=4, n_residual_blocks=1, **options), init_gain=0.2).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("netG_A2B", "netG_B2A")):
        torch.save(make_net(seed).state_dict(), folder / f"{name}.pth")
    return folder


def run_test(workdir: Path, models: Path, *words) -> int:
    typed = ["--workdir", workdir, "--models", models, "--amp", "off", "--device", "cpu", *words]
    return test_script.main(test_script.parse_args([str(word) for word in typed]))


def plain(net: Generator, picture: np.ndarray) -> np.ndarray:
    return datasets.to_array(translate(net, datasets.to_tensor(picture)[None])[0])


def draw(path: Path, seed: int, height: int, width: int) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


# ------------------------------------------------------------------------------------------------
# test.py


@pytest.mark.parametrize(("height", "width"), [(40, 44), (44, 40)])
def test_size_is_the_shorter_side(height, width, models, tmp_path):
    draw(tmp_path / "in" / "x.png", 0, height, width)
    assert run_test(tmp_path, models, "--input", tmp_path / "in", "--size", 20) == 0
    expected = (20, 22) if height < width else (22, 20)
    with Image.open(tmp_path / "outputs/B/x.png") as made:
        assert made.size[::-1] == expected


@pytest.mark.parametrize("views", [1, 2, 8])
def test_views_are_averaged(views, models, tmp_path):
    """The mean of the translations of flipped and turned pictures, each turned back; tiles too.

    Of eight values that of the middle four.
    """
    picture = draw(tmp_path / "in" / "x.png", 0, 24, 40)
    x, net = datasets.to_tensor(picture)[None], make_net(0)
    turned = {1: [x], 2: [x, x.flip(3)]}.get(views)
    if turned is None:
        turned = [v.rot90(k, (2, 3)) for v in (x, x.flip(3)) for k in range(4)]
    made = [translate(net, v) for v in turned]
    if views == 8:
        made = [y.rot90(-k, (2, 3)) for y, k in zip(made, [0, 1, 2, 3] * 2, strict=True)]
    half = max(1, views // 2)
    made = torch.stack(made[:half] + [y.flip(3) for y in made[half:]])
    mean = made.sort(0).values[2:6].mean(0) if views == 8 else made.mean(0)
    for more in ([], ["--tile", 16]):
        words = ["--input", tmp_path / "in", "--views", views, *more]
        assert run_test(tmp_path, models, *words) == 0
        with Image.open(tmp_path / "outputs/B/x.png") as file:
            difference = abs(np.asarray(file).astype(int) - datasets.to_array(mean[0]))
        assert difference.max() <= 1
    assert views == 1 or abs(datasets.to_array(mean[0]) - plain(net, picture).astype(int)).max() > 9


def test_ground_truth_is_found_measured_and_shown(models, tmp_path, capsys):
    """Names as in maps; the error equals plain arithmetic; the strip's parts are in order."""
    source = draw(tmp_path / "data/testA/1_A.png", 0, 20, 24)
    truth = source.copy()
    truth[:, 12:] = 255 - truth[:, 12:]
    (tmp_path / "data/testB").mkdir()
    Image.fromarray(truth).save(tmp_path / "data/testB/1_B.png")
    draw(tmp_path / "data/testB/other.png", 1, 20, 24)
    assert run_test(tmp_path, models, "--dataroot", tmp_path / "data", "--direction", "AtoB") == 0
    (row,) = outputs.read_index(tmp_path)
    paths = [str(tmp_path / "data" / name) for name in ("testA/1_A.png", "testB/1_B.png")]
    assert row == ("A2B", paths[0], "B/1_A.png", paths[1])
    fake = np.asarray(Image.open(tmp_path / "outputs/B/1_A.png")).astype(float)
    assert (fake == plain(make_net(0), source)).all()
    error, identity = abs(fake - truth).mean(), abs(source - truth.astype(float)).mean()
    changed = (abs(source - truth.astype(float)) > 12).any(axis=2)  # (20, 24)
    line = f"of 255: whole picture {error:.2f} (identity {identity:.2f})"
    for words, mask in (("where they differ", changed), ("elsewhere", ~changed)):
        errors = (abs(picture - truth.astype(float))[mask].mean() for picture in (fake, source))
        line += ", {} {:.2f} (identity {:.2f})".format(words, *errors)
    assert line in capsys.readouterr().out
    strip = np.asarray(Image.open(tmp_path / "outputs/cycle/A2B_1_A.png"))
    rec = plain(make_net(1), fake.astype(np.uint8))
    assert (strip == np.hstack([source, fake, rec, truth])).all()
    assert (np.asarray(Image.open(tmp_path / "result/A2B_1_A.png"))[:, :24] == fake).all()


def test_direction_names_folders_also_where_training_swapped_them(models, tmp_path):
    """After `train.py --direction BtoA` netG_A2B translates folder B, so it is what B2A means."""
    for side, seed in (("A", 0), ("B", 1)):
        draw(tmp_path / f"data/test{side}/{side.lower()}.png", seed, 16, 16)
    own = tmp_path / "models"
    own.mkdir()
    for path in models.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    (own / "options.json").write_text(
        f'{{"direction": "BtoA", "dataroot": "{tmp_path / "data"}", "preprocess": "none"}}'
    )
    assert run_test(tmp_path, own, "--direction", "B2A") == 0
    (row,) = outputs.read_index(tmp_path)
    assert (row.direction, Path(row.source).name, row.output) == ("A2B", "b.png", "B/b.png")
    picture = datasets.load_image(tmp_path / "data/testB/b.png")
    assert (datasets.load_image(tmp_path / "outputs/B/b.png") == plain(make_net(0), picture)).all()
    assert run_test(tmp_path, own) == 0  # both; the other's row comes to it
    names = {row.direction: Path(row.source).name for row in outputs.read_index(tmp_path)}
    assert names == {"A2B": "b.png", "B2A": "a.png"}


# ------------------------------------------------------------------------------------------------
# Files


def test_batches_of_many_sizes_come_out_in_order(tmp_path):
    """Each translation belongs to its source, whatever is beside it in a batch or unreadable."""
    sizes = [16, 16, 24, 16, 0, 16, 16, 24, 24, 24]
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    pictures = [
        draw(p, i, n, n) if n else None for i, (p, n) in enumerate(zip(paths, sizes, strict=True))
    ]
    paths[4].write_bytes(b"no picture")
    net, seen = make_net(0), []
    for batch_size in (1, 3, 99):
        found = translation.translate_files(net, paths, datasets.load_image, batch_size, CPU, None)
        for i, source, fake in found:
            seen.append(i)
            if pictures[i] is None:
                assert fake is None and "cannot identify" in source
            else:
                assert (source == pictures[i]).all()
                difference = abs(fake.astype(int) - plain(net, pictures[i]))
                assert difference.max() <= 1 and fake.std() > 10
    assert seen == 3 * list(range(len(sizes)))


def test_index_keeps_odd_names_and_the_other_direction(tmp_path):
    odd = [
        "a,b.png",
        'q"uote.png',
        "line\nbreak.png",
        "r\rn.png",
        "äöü 猫.png",
        "bad \udcff.png",
        " x",
    ]
    rows = [Translation("A2B", f"/s/{name}", f"B/{name}", f"/t/{name}") for name in odd]
    (tmp_path / "outputs").mkdir()
    assert outputs.read_index(tmp_path) == []
    outputs.write_index(tmp_path, rows, ["A2B"])
    assert outputs.read_index(tmp_path) == rows
    other = Translation("B2A", "/s", "A/x.png", "")
    outputs.write_index(tmp_path, [other], ["B2A"])
    assert outputs.read_index(tmp_path) == [*rows, other]
    outputs.write_index(tmp_path, rows[:1], ["A2B"])  # the newest run of a direction replaces it
    assert outputs.read_index(tmp_path) == [other, rows[0]]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["index.csv"]
    for damage in (b"direction,source\nA2B,x\n", b"\x00", b"a,b,c,d,e\n"):
        (tmp_path / "outputs/index.csv").write_bytes(damage)
        with pytest.raises(UserError, match="run `python test.py` again"):
            outputs.read_index(tmp_path)
        outputs.write_index(tmp_path, rows, ["A2B"])
        assert outputs.read_index(tmp_path) == rows


# ------------------------------------------------------------------------------------------------
# Validation


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    """A test split whose names match in part."""
    root = tmp_path_factory.mktemp("split")
    for side, seed, names in (("A", 0, ("1_A", "2_A", "x")), ("B", 10, ("1_B", "2_B", "y"))):
        for i, name in enumerate(names):
            draw(root / f"test{side}" / f"{name}.png", seed + i, 20, 20)
    return root


def test_measures_equal_plain_arithmetic_and_leave_the_networks_as_they_were(split, monkeypatch):
    few = functools.partial(metrics.sample_patches, n=256)
    monkeypatch.setattr(metrics, "sample_patches", few)
    options = {"preprocess": "resize_and_crop", "size": 16}
    nets = {"netG_A2B": make_net(0, dropout=True), "netG_B2A": make_net(1, norm="batch")}
    nets["netG_A2B"].train()
    pairs = {}
    for direction in ("A2B", "B2A"):
        source, target = (split / f"test{side}" for side in (direction[0], direction[-1]))
        found = translation.find_pairs(source, target)
        assert [bool(truth) for _, truth in found] == [True, True, False]
        pairs[direction] = [
            (source / name, Path(truth) if truth else None) for name, truth in found
        ]
    measures, score = validation.measure(nets, pairs, options, CPU, None)
    assert nets["netG_A2B"].training and not nets["netG_B2A"].training
    nets["netG_A2B"].eval()
    load = functools.cache(
        lambda p: datasets.resize(datasets.load_image(p), (16, 16)).astype(float)
    )
    for way in ("A2B", "B2A"):
        net, back = nets[f"netG_{way}"], nets[f"netG_{way[::-1]}"]
        mae, identity, cycle, fakes = [], [], [], []
        for source, truth in pairs[way]:
            fake = plain(net, load(source).astype(np.uint8))
            fakes.append(fake)
            cycle.append(abs(plain(back, fake) - load(source)).mean())
            if truth:
                mae.append(abs(fake - load(truth)).mean())
                identity.append(abs(load(source) - load(truth)).mean())
        assert measures[f"cycle_{way}"] == pytest.approx(np.mean(cycle), abs=0.01)
        assert measures[f"mae_{way}"] == pytest.approx(np.mean(mae), abs=0.01)
        assert measures[f"identity_mae_{way}"] == pytest.approx(np.mean(identity), abs=0.01)
        reals = [load(target) for target, _ in pairs[way[::-1]]]
        found, real = (
            metrics.sample_patches([torch.from_numpy(x).permute(2, 0, 1) for x in pictures])
            for pictures in (fakes, reals)
        )
        assert measures[f"swd_{way}"] == pytest.approx(metrics.sliced_wasserstein(found, real))
    assert score == pytest.approx((measures["mae_A2B"] + measures["mae_B2A"]) / 2)
    unpaired = {way: [(source, None) for source, _ in found] for way, found in pairs.items()}
    measures, score = validation.measure(nets, unpaired, options, CPU, None)
    assert "mae_A2B" not in measures
    assert score == pytest.approx((measures["swd_A2B"] + measures["swd_B2A"]) / 2)
