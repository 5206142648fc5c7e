"""Save frames of a film as training pictures.

python -m tools.frames film.mp4 dataset/mine/trainA --every 1.0
"""

import argparse
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import utils
from lib import formats
from utils import UserError


def save_frames(film: Path, folder: Path, every: float) -> int:
    """Save a frame every so many seconds, as NAME_00012.50.png (its time); returns how many.

    Raises:
        UserError: the film cannot be read.
    """
    utils.make_folder(folder)
    n, due = 0, 0.0
    try:
        frames = formats.read(film, 3)
        for frame in tqdm(frames, film.name, len(frames) or None):
            seconds = float((frames.times[-1] - frames.times[0]) * frames.time_base)
            if seconds >= due - 1e-6:
                name = f"{film.stem}_{seconds:08.2f}.png"
                utils.save_picture(folder / name, Image.fromarray(frame))
                n, due = n + 1, due + every
    except formats.UnreadableImage as error:
        raise UserError(f"{film} cannot be read after {n} pictures: {error}") from error
    return n


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Save frames of a film as training pictures.")
    parser.add_argument("film", type=Path, help=f"a film ({', '.join(formats.FILMS)})")
    parser.add_argument("folder", type=Path, help="where the pictures go (dataset/mine/trainA)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two (1.0)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if not args.every > 0:
        raise UserError(f"--every is {args.every}, but must be positive")
    if args.film.suffix.lower() not in formats.FILMS or not args.film.is_file():
        raise UserError(f"{args.film} is not a film: name a file ({', '.join(formats.FILMS)})")
    n = save_frames(args.film, args.folder, args.every)
    print(f"{n} pictures saved to {args.folder}")


if __name__ == "__main__":
    utils.run(main, parse_args())
