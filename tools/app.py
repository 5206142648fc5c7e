"""A page in the browser that translates pictures: `python -m tools.app` prints its address.

Everything stays on this machine: the page is served to 127.0.0.1 alone, nothing is fetched from
elsewhere or reported to anyone, and uploaded pictures are deleted when it stops.
"""

import argparse
import contextlib
import functools
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import datasets
import utils
from models import load_generator
from test import find_jobs, read_options, save_array, translate_group
from utils import UserError

EXAMPLES = 10  # of each domain
HEIGHT = 310  # of a picture on the page
# small pictures are enlarged too, and all begin at the same height
CSS = ".image-frame img { width: 100%; height: 100%; object-fit: contain; object-position: top }"
SHOWN = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # what browsers can draw
# files in models/, * being the direction; any other .pth file there goes one way only
CHECKPOINTS = {"moving average": "netG_*_ema.pth", "last": "netG_*.pth", "best": "best/netG_*.pth"}


def find_checkpoints(models: Path) -> dict[str, str]:
    """What there is to choose from just now: label -> file name in `models`."""
    pairs = {
        label: name
        for label, name in CHECKPOINTS.items()
        if any((models / name.replace("*", way)).exists() for way in ("A2B", "B2A"))
    }
    own = ("netG_A2B", "netG_B2A", "netD_", "train_state")
    others = [path.name for path in models.glob("*.pth") if not path.name.startswith(own)]
    return pairs | {name: name for name in sorted(others)}


def find_ways(options: dict) -> dict[str, str]:
    """The directions, label -> name; a data set called apple2orange tells what A and B are."""
    A, _, B = Path(options.get("dataroot", "")).name.partition("2")
    if not (A.isalpha() and B):
        A, B = "A", "B"
    elif options.get("direction") == "BtoA":
        A, B = B, A
    return {f"{A} → {B}": "A2B", f"{B} → {A}": "B2A"}


def find_examples(options: dict) -> dict[str, list[str]]:
    """A few pictures of the run's test split, direction -> paths; none where it has gone."""
    jobs = []
    with contextlib.suppress(UserError):
        jobs = find_jobs(argparse.Namespace(input=None, dataroot=None, direction=None), options)
    return {
        job["direction"]: [
            str(job["folder"] / name) for name in job["names"] if name.lower().endswith(SHOWN)
        ][:EXAMPLES]
        for job in jobs
    }


@functools.lru_cache(maxsize=8)
def cached_generator(path: Path, changed: int, device: torch.device):
    """`load_generator`, once for each state of the file."""
    return load_generator(path, device)


class Translator:
    """Translates files with whatever weights are in the folder `models` at the moment."""

    def __init__(self, models: Path, longest: int, device: torch.device, dtype):
        self.models, self.longest, self.device, self.dtype = models, longest, device, dtype

    def weights(self, label: str, way: str) -> Path:
        name = find_checkpoints(self.models).get(label)
        if name is None or way not in ("A2B", "B2A"):
            raise UserError(f"there is no checkpoint “{label}” any more: reload the page")
        return self.models / name.replace("*", way)

    def load(self, weights: Path):
        changed = weights.stat().st_mtime_ns if weights.exists() else 0
        return cached_generator(weights, changed, self.device)

    def read(self, path: Path, channels: int) -> tuple[np.ndarray, str]:
        """The picture (H, W, channels), scaled down if it is too large, and a word on its size."""
        picture = datasets.load_image(path, channels)
        height, width = picture.shape[:2]
        scale = self.longest / max(height, width)
        if scale >= 1:
            return picture, f"{width} × {height} pixels"
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        told = f"scaled down from {width} × {height} to {size[0]} × {size[1]} pixels"
        return datasets.resize(picture, size), told

    def translate(self, net, picture: np.ndarray) -> np.ndarray:
        """(H, W, input_nc) -> (H, W, output_nc), to the byte what test.py makes of it."""
        with utils.explain_out_of_memory("choose a smaller picture, or start with --longest 512"):
            ((_, _, fake),) = translate_group(net, [(0, picture)], self.device, self.dtype)
        return fake


def build_page(translator: Translator, options: dict, examples: dict[str, list[str]]):
    """The Gradio page; its parts from top to bottom, then what happens on which event."""
    import gradio as gr

    labels = lambda: list(find_checkpoints(translator.models))
    progress = gr.Progress()

    def show(upload: dict | None, way: str, label: str, bar=progress):
        """Yield the translation as soon as it is there, then the way back too."""
        if upload is None:
            yield None, None, gr.DownloadButton(interactive=False), ""
            return
        path, start = Path(upload["path"]), time.perf_counter()
        try:
            bar(0.1, "loading the weights")
            weights = translator.weights(label, way)
            net = translator.load(weights)
            source, told = translator.read(path, net.input_nc)
            bar(0.5, "translating")
            fake = translator.translate(net, source)
            told += f", {time.perf_counter() - start:.1f} s on {translator.device}"
            back = translator.weights(label, way[::-1])
            there_is_more = back.exists() and back != weights
            with tempfile.TemporaryDirectory() as folder:  # Gradio keeps its own copy
                ending = ".png" if fake.shape[2] in (1, 3, 4) else ".npy"
                result = Path(folder) / f"{path.stem}_{way}{ending}"
                save_array(result, fake)
                button = gr.DownloadButton(value=result, interactive=True)
                so_far = told + (", translating back ..." if there_is_more else "")
                yield datasets.to_rgb(fake), None, button, so_far
            if there_is_more:
                rec = translator.translate(translator.load(back), fake)
                yield gr.skip(), datasets.to_rgb(rec), gr.skip(), told
        except datasets.UnreadableImage as error:
            message = f"{path.name} is not a picture that can be read ({error}). Try another file."
            raise gr.Error(message, print_exception=False) from error
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="CycleGAN", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# CycleGAN\nDrop or paste a picture, take one, or click on an example.")
        with gr.Row():
            way = gr.Radio(list(find_ways(options).items()), value="A2B", label="direction")
            checkpoint = gr.Dropdown(labels(), label="checkpoint")
        with gr.Row():
            kind = {"height": HEIGHT, "interactive": False, "buttons": ["fullscreen"]}
            with gr.Column(min_width=240):
                below = 56  # as high as what is below the two others
                sources = ["upload", "webcam", "clipboard"]
                source = gr.Image(label="source", sources=sources, height=HEIGHT + below)
            with gr.Column(min_width=240):
                fake = gr.Image(label="translation", format="png", **kind)
                download = gr.DownloadButton("Download PNG", interactive=False)
            with gr.Column(min_width=240):
                rec = gr.Image(label="back again", format="png", **kind)
                told = gr.Markdown()
        # raw uploads: Gradio would decode and turn them in its own way
        work = {
            "fn": show,
            "inputs": [source, way, checkpoint],
            "outputs": [fake, rec, download, told],
            "show_progress_on": fake,
            "preprocess": False,
        }
        gr.on([source.input, way.input, checkpoint.input], **work, trigger_mode="always_last")
        for label, direction in find_ways(options).items():
            paths = examples.get(direction, [])
            shown = {"components": [source], "samples": [[path] for path in paths], "type": "index"}
            samples = gr.Dataset(label=f"examples of {label.split()[0]}", **shown)
            pick = lambda i, direction=direction, paths=paths: (paths[i], direction)
            samples.click(pick, samples, [source, way]).then(**work)
        page.load(lambda: gr.Dropdown(labels()), None, checkpoint)  # weights may have come or gone
    return page.queue(max_size=50, default_concurrency_limit=2)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Translate pictures on a page in the browser.")
    group = parser.add_argument_group("page")
    utils.add_workdir(group)
    group.add_argument("--models", type=Path, metavar="DIR", help="folder of weights (models/)")
    group.add_argument("--port", type=int, help="of the address (the first free one from 7860)")
    longest = "larger pictures are scaled down to this length of the longer side (1024)"
    group.add_argument("--longest", type=int, default=1024, metavar="PIXELS", help=longest)
    utils.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which looks at it
    try:
        import gradio
    except ImportError:
        raise UserError("app.py needs gradio: pip install gradio") from None
    if args.longest < 8:
        raise UserError(f"--longest is {args.longest}, but no picture is that small: try 1024")
    device, dtype, _, _ = utils.setup(args)
    models = args.models or args.workdir / "models"
    if not find_checkpoints(models):
        raise UserError(f"{models} holds no generator: train first, or name --models")
    options = read_options(models)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the uploads are deleted
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        examples = find_examples(options)
        page = build_page(Translator(models, args.longest, device, dtype), options, examples)
        try:
            _, address, _ = page.launch(
                server_name="127.0.0.1",
                server_port=args.port,
                max_file_size="50mb",
                allowed_paths=sum(examples.values(), []),
                theme=gradio.themes.Default(font="system-ui", font_mono="monospace"),
                css=CSS,
                footer_links=[],
                ssr_mode=False,
                prevent_thread_lock=True,
                quiet=True,
            )
        except OSError as error:
            where = args.port or "7860 to 7959"
            raise UserError(f"port {where} is in use: name another --port") from error
        print(f"open {address} (Ctrl-C stops)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    utils.run(main, parse_args())
