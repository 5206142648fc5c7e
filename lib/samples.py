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
    n, size = min(map(len, columns.values())), columns["real A"].shape[-1]
    side = size * -(-128 // size)  # small pictures are shown larger
    step = side + 4
    image = Image.new("RGB", (len(columns) * step + 4, n * step + 20), "white")
    for i, (title, pictures) in enumerate(columns.items()):
        x = 4 + i * step
        ImageDraw.Draw(image).text((x + side / 2, 10), title, "#333333", anchor="mm", font_size=12)
        for j in range(n):
            cell = datasets.to_rgb(datasets.to_array(pictures[j]))
            image.paste(cell.resize((side, side), Image.Resampling.NEAREST), (x, 20 + j * step))
    return image
