"""Grids of sample pictures: source, translation and reconstruction of the first test pictures."""

import contextlib

import torch
from PIL import Image, ImageDraw

import datasets
from lib import metrics
from models import translate
from utils import UserError


def load(args, letter: str, channels: int, limits=None, n: int = 4) -> torch.Tensor:
    """The first test pictures (training pictures where there are none), (n, C, size, size)."""
    try:
        folder = datasets.find_split(args.dataroot, f"test{letter}")
    except UserError:
        folder = datasets.find_split(args.dataroot, f"train{letter}")
    pictures = []
    for name in datasets.list_images(folder):
        with contextlib.suppress(datasets.UnreadableImage):  # Domain and test.py report it
            picture = datasets.load_image(folder / name, channels, limits, axis=args.axis)
            pictures.append(datasets.to_tensor(datasets.resize(picture, (args.size, args.size))))
        if len(pictures) == n:
            break
    if not pictures:
        raise UserError(f"not one picture in {folder} can be read")
    return torch.stack(pictures)


def generate(model, real_A: torch.Tensor, real_B: torch.Tensor) -> dict:
    """The columns of a grid by their titles, each (n, C, H, W), on the host.

    With `--keep_source` also where and how much the picture was changed: black is not at all.
    """
    A2B, B2A = model.best_generators().values()
    columns = {}
    for A, B, real, net, back in (("A", "B", real_A, A2B, B2A), ("B", "A", real_B, B2A, A2B)):
        fake = translate(net, real.to(model.device), model.dtype)
        columns |= {f"real {A}": real, f"fake {B}": fake.cpu()}
        if model.args.keep_source:
            columns[f"change of {A}"] = metrics.change(fake.cpu(), real)
        columns[f"recovered {A}"] = translate(back, fake, model.dtype).cpu()
    return columns


def draw(columns: dict) -> Image.Image:
    """The columns of `generate` side by side, under their titles."""
    width, rows = next(iter(columns.values())).shape[-1], min(map(len, columns.values()))
    side = width * -(-128 // width)  # small pictures are shown larger
    image = Image.new("RGB", (4 + len(columns) * (side + 4), 20 + rows * (side + 4)), "white")
    for i, (title, pictures) in enumerate(columns.items()):
        x = 4 + i * (side + 4)
        middle = (x + side / 2, 10)
        ImageDraw.Draw(image).text(middle, title, "#333333", anchor="mm", font_size=12)
        for y, picture in zip(range(20, image.height, side + 4), pictures, strict=False):
            cell = datasets.to_rgb(datasets.to_array(picture))
            image.paste(cell.resize((side, side), Image.Resampling.NEAREST), (x, y))
    return image
