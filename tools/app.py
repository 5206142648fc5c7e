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
from lib import devices, formats, metrics
from lib import translation as tr
from lib.outputs import read_index
from lib.weights import load_generator
from utils import UserError

EXAMPLES = 10  # of each domain
HEIGHT = 260  # of a picture on the page
# enlarge small pictures too, align all at the top
CSS = ".image-frame img { width: 100%; height: 100%; object-fit: contain; object-position: top }"
SHOWN = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # what browsers can draw
# files in models/, * being the direction; any other .pth file there goes one way only
CHECKPOINTS = {"moving average": "netG_*_ema.pth", "last": "netG_*.pth", "best": "best/netG_*.pth"}


def find_checkpoints(models: Path) -> dict[str, str]:
    """Return the checkpoints that are there now, label -> file name in `models`."""
    pairs = {
        label: name
        for label, name in CHECKPOINTS.items()
        if any((models / name.replace("*", way)).exists() for way in ("A2B", "B2A"))
    }
    own = ("netG_A2B", "netG_B2A", "netD_", "train_state", "colors_")  # the last: of older runs
    others = [path.name for path in models.glob("*.pth") if not path.name.startswith(own)]
    return pairs | {name: name for name in sorted(others)}


def find_examples(workdir: Path, options: dict) -> dict[str, list[str]]:
    """Return a few sources for each direction: what test.py translated, else the test split."""
    examples = {"A2B": [], "B2A": []}
    with contextlib.suppress(UserError, KeyError):  # a damaged index; no test split
        for row in read_index(workdir):
            examples[row.direction].append(row.source)
        for direction in [way for way in examples if not examples[way] and "dataroot" in options]:
            folder = tr.find_split(Path(options["dataroot"]), "test", direction[0], options)
            examples[direction] = [str(folder / name) for name in datasets.list_images(folder)]
    return {
        direction: [path for path in paths if path.lower().endswith(SHOWN)][:EXAMPLES]
        for direction, paths in examples.items()
    }


@functools.lru_cache(maxsize=8)
def cached_generator(path: Path, device: torch.device, changed: int):
    """`load_generator`, once for each state of the file."""
    return load_generator(path, device)


def shrink(picture: np.ndarray, longest: int) -> tuple[np.ndarray, str]:
    """Return a picture (H, W, C), scaled down if a side is too long, and a note on its size."""
    height, width = picture.shape[:2]
    if max(height, width) <= longest:
        return picture, f"{width} × {height} pixels"
    w, h = (max(1, round(side * longest / max(height, width))) for side in (width, height))
    note = f"scaled down from {width} × {height} to {w} × {h} pixels"
    return datasets.resize(picture, (w, h)), note


def build_page(models: Path, longest: int, device, dtype, options: dict, examples: dict):
    """Return the Gradio page: its parts from top to bottom, then the events.

    It translates with the weights that are in the folder `models` at the moment.
    """
    import gradio as gr

    names, progress = tr.domain_names(options), gr.Progress()
    labels = lambda: list(find_checkpoints(models))

    def find_weights(label: str, way: str) -> Path:
        name = find_checkpoints(models).get(label)
        if name is None or way not in ("A2B", "B2A"):
            raise UserError(f"there is no checkpoint “{label}” any more: reload the page")
        return models / name.replace("*", way)

    load = lambda path: cached_generator(path, device, path.exists() and path.stat().st_mtime_ns)

    def translate(net, picture: np.ndarray) -> np.ndarray:
        """(H, W, input_nc) -> (H, W, output_nc), the same bytes as from test.py."""
        with utils.explain_out_of_memory("choose a smaller picture, or start with --longest 512"):
            return tr.translate_batch(net, [picture], device, dtype)[0]

    def show(upload: dict | None, way: str, label: str, bar=progress):
        """Yield the translation as soon as it is there, then the way back too."""
        if upload is None:
            yield None, None, None, gr.DownloadButton(interactive=False), ""
            return
        path, start = Path(upload["path"]), time.perf_counter()
        try:
            bar(0.1, "loading the weights")
            weights, back = find_weights(label, way), find_weights(label, way[::-1])
            net = load(weights)
            source, note = shrink(datasets.load_image(path, net.input_nc), longest)
            bar(0.5, "translating")
            fake = translate(net, source)
            same = fake.shape == source.shape  # numbers of channels may differ
            note += f", {time.perf_counter() - start:.1f} s on {device}"
            change = datasets.to_rgb(metrics.draw_change(fake, source)) if same else None
            cycle = back.exists() and back != weights
            with tempfile.TemporaryDirectory() as folder:  # Gradio keeps its own copy
                result = Path(folder) / f"{path.stem}_{way}{formats.file_suffix(fake.shape[2])}"
                formats.save_array(result, fake)
                button = gr.DownloadButton(value=result, interactive=True)
                status = note + ", translating back ..." * cycle
                yield datasets.to_rgb(fake), None, change, button, status
            if cycle:
                rec = translate(load(back), fake)
                yield gr.skip(), datasets.to_rgb(rec), gr.skip(), gr.skip(), note
        except datasets.UnreadableImage as error:
            message = f"{path.name} is not a picture that can be read ({error}). Try another file."
            raise gr.Error(message, print_exception=False) from error
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="CycleGAN", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# CycleGAN\nDrop or paste a picture, take one, or click on an example.")
        with gr.Row():
            choices = [(f"{names[d[0]]} → {names[d[-1]]}", d) for d in examples]
            way = gr.Radio(choices, value="A2B", label="direction", scale=2)
            checkpoint = gr.Dropdown(labels(), label="checkpoint")
        kind = {"height": HEIGHT, "interactive": False, "buttons": ["fullscreen"]}
        with gr.Row():
            with gr.Column(min_width=200):
                below = 56  # as high as what is below the others
                sources = ["upload", "webcam", "clipboard"]
                source = gr.Image(label="source", sources=sources, height=HEIGHT + below)
            with gr.Column(min_width=200):
                fake = gr.Image(label="translation", format="png", **kind)
                download = gr.DownloadButton("Download PNG", interactive=False)
            with gr.Column(min_width=200):
                rec = gr.Image(label="back again", format="png", **kind)
                note = gr.Markdown()
            with gr.Column(min_width=200, visible=bool(options.get("keep_source"))):
                change = gr.Image(label="change", format="png", **kind)
                gr.Markdown("Black: as the source.")
        # raw uploads: Gradio would decode and turn them in its own way
        work = {
            "fn": show,
            "inputs": [source, way, checkpoint],
            "outputs": [fake, rec, change, download, note],
            "show_progress_on": fake,
            "preprocess": False,
        }
        gr.on(
            [source.input, way.input, checkpoint.input],
            **work,
            trigger_mode="always_last",
        )
        for direction, paths in examples.items():
            shown = {"components": [source], "samples": [[path] for path in paths], "type": "index"}
            samples = gr.Dataset(label=f"examples of {names[direction[0]]}", **shown)
            pick = lambda i, direction=direction, paths=paths: (paths[i], direction)
            samples.click(pick, samples, [source, way]).then(**work)
        page.load(lambda: gr.Dropdown(labels()), None, checkpoint)  # weights may have come or gone
    return page.queue(max_size=50, default_concurrency_limit=2)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Translate pictures on a page in the browser.")
    group = parser.add_argument_group("model")
    utils.add_workdir(group)
    group.add_argument("--models", type=Path, metavar="DIR", help="folder of weights (models/)")
    group = parser.add_argument_group("page")
    group.add_argument("--port", type=int, help="of the address (the first free one from 7860)")
    longest = "larger pictures are scaled down to this length of the longer side (1024)"
    group.add_argument("--longest", type=int, default=1024, metavar="PIXELS", help=longest)
    devices.add_device_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which looks at it
    try:
        import gradio
    except ImportError:
        raise UserError("app.py needs gradio: pip install gradio") from None
    if args.longest < 8:
        raise UserError(f"--longest is {args.longest}, but no picture is that small: try 1024")
    device, dtype = devices.setup(args)
    models = args.models or args.workdir / "models"
    if not find_checkpoints(models):
        raise UserError(f"{models} holds no generator: train first, or name --models")
    options = tr.read_options(models)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the uploads are deleted
    with tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        examples = find_examples(args.workdir, options)
        page = build_page(models, args.longest, device, dtype, options, examples)
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
