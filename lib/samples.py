"""Grids of sample pictures: source, translation and reconstruction of the first test pictures."""

import contextlib

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

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
    rows = zip(*columns.values(), strict=False)
    cells = [datasets.to_rgb(datasets.to_array(picture)) for row in rows for picture in row]
    side = cells[0].width * -(-128 // cells[0].width)  # small pictures are shown larger
    cells = [np.array(cell.resize((side, side), Image.Resampling.NEAREST)) for cell in cells]
    grid = torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2)  # (cells, 3, side, side)
    grid = make_grid(grid, nrow=len(columns), padding=4, pad_value=255)
    image = Image.new("RGB", (grid.shape[2], grid.shape[1] + 16), "white")
    image.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, 16))
    for i, title in enumerate(columns):
        x = 4 + i * (side + 4) + side / 2
        ImageDraw.Draw(image).text((x, 10), title, "#333333", anchor="mm", font_size=12)
    return image
