"""The page `result/report.html`: what a run was, how it went and what it makes, in one file."""

import base64
import contextlib
import csv
import io
import json
import time
from pathlib import Path

import jinja2

import datasets
import utils
from lib import translation as tr

PER_DIRECTION = 8  # translations shown
WIDEST = 1200  # pixels; wider pictures are shrunk, so that the page stays a few MB

KINDS = {"translation": "ours", "identity": "identity", "flat": "flat colour", "real": "real"}
# what evaluate.py measures, in the order shown: key, name, format, which way is better
MEASURES = (
    ("whole", "error over identity's, whole picture", ".3f", "lower"),
    ("mae", "mean absolute error, of 255", ".2f", "lower"),
    ("changed", "where source and truth differ", ".2f", "lower"),
    ("kept", "where they do not", ".2f", "lower"),
    ("rmse", "RMSE, of 255", ".2f", "lower"),
    ("under_5", "pixels off by less than 5", ".1%", "higher"),
    ("under_10", "pixels off by less than 10", ".1%", "higher"),
    ("psnr", "PSNR in dB", ".2f", "higher"),
    ("ssim", "SSIM", ".4f", "higher"),
    ("swd", "SWD to the target set", ".1f", "lower"),
    ("kid", "KID to the target set", ".5f", "lower"),
    ("fid", "FID to the target set", ".2f", "lower"),
    ("source_kid", "KID to the source set", ".5f", ""),
    ("source_fid", "FID to the source set", ".2f", ""),
    ("cycle", "cycle error, of 255", ".2f", "lower"),
)


class Cell(str):
    """A cell of a table, and whether it is better than both baselines: good, bad or ""."""

    verdict = ""


def write_report(workdir: Path) -> Path:
    """Write `<workdir>/result/report.html` from the files of a run; returns its path.

    The page holds its pictures and needs nothing else. What has no files yet is left out, and what
    is damaged too: a report must not fail the command that it ends.

    Raises:
        UserError: the page cannot be written.
    """
    workdir = Path(workdir)
    options = read_json(workdir / "models" / "options.json")
    losses = read_rows(workdir / "logs" / "losses.csv")
    noted = read_rows(workdir / "logs" / "metrics.csv")
    measures = format_measures(read_json(workdir / "result" / "metrics.json"))
    name = Path(str(options.get("dataroot", ""))).name
    names = tr.domain_names(options)
    headings = {way: f"{names[way[0]]} → {names[way[-1]]}" for way in ("A2B", "B2A")}
    shown = {headings[way]: find_strips(workdir, way) for way in headings}
    parts = {
        "title": f"CycleGAN: {name}" if name else "CycleGAN",
        "facts": find_facts(options, losses),
        "translations": {heading: strips for heading, strips in shown.items() if strips},
        "measures": {headings[way]: table for way, table in measures.items()},
        "noted": [noted[0], *noted[1:][-10:]] if len(noted) > 1 else [],
        "progress": find_progress(workdir / "images"),
        "curves": embed(workdir / "logs" / "losses.png", ""),
        "losses": [losses[0], losses[-1]] if len(losses) > 1 else [],
        "settings": {name: show(value) for name, value in sorted(options.items())},
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    path = utils.make_folder(workdir / "result") / "report.html"
    with utils.atomic_write(path) as file:
        # file names need not be valid Unicode
        file.write(template.render(parts).encode(errors="replace"))
    return path


# ------------------------------------------------------------------------------------------------
# The parts of the page


def find_facts(options: dict, losses: list[list[str]]) -> dict[str, str]:
    """Return what one wants to know first: how long was trained on what."""
    facts = {}
    if options:
        size = options.get("size")
        facts = {"size": f"{size} x {size}", "generator": show(options.get("netG"))}
    if len(losses) > 1:
        last = dict(zip(losses[0], losses[-1], strict=True))
        of = f" of {options['n_epochs']}" if "n_epochs" in options else ""
        facts["epochs"] = last.get("epoch", "?") + of
        facts["iterations"] = last.get("iteration", "?")
        with contextlib.suppress(ValueError):  # not a number
            minutes = round(float(last.get("seconds", "")) / 60)
            hours = f"{minutes // 60} h " if minutes >= 60 else ""
            facts["time trained"] = f"{hours}{minutes % 60} min"
    return facts


def find_strips(workdir: Path, direction: str) -> list[dict]:
    """Return the comparison pictures of the first translations that the index names."""
    try:
        rows = [row for row in tr.read_index(workdir) if row.direction == direction]
    except utils.UserError:
        return []
    strips = []
    for row in rows[:PER_DIRECTION]:
        name = tr.comparison_name(row)
        heads = {workdir / "outputs" / "cycle" / name: ["source", "translation", "back again"]}
        heads |= {workdir / "result" / name: ["translation", "source"]}
        found = [path for path in heads if path.exists()]
        if found:
            newest = max(
                found, key=lambda path: path.stat().st_mtime
            )  # the first if they are equal
            truth = ["ground truth"] if row.truth and newest == next(iter(heads)) else []
            strips += embed(newest, row.source.rpartition("/")[2], heads[newest] + truth)
    return strips


def find_progress(folder: Path) -> list[dict]:
    """Return the sample grids of the first, a middle and the last epoch."""
    paths = sorted(folder.glob("epoch_*.png"), key=lambda path: (len(path.name), path.name))
    paths = paths or list(folder.glob("latest.png"))
    chosen = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []
    return sum((embed(paths[i], paths[i].stem.replace("_", " ")) for i in chosen), [])


def embed(path: Path, name: str, heads: list[str] | None = None) -> list[dict]:
    """Return a picture file as a data URL, with names for its equal parts; [] if unreadable."""
    try:
        pixels = datasets.load_image(path)
    except datasets.UnreadableImage:
        return []
    height, width = pixels.shape[:2]
    if width > WIDEST:
        pixels = datasets.resize(pixels, (WIDEST, max(1, round(height * WIDEST / width))))
    small = path.stat().st_size < 50_000  # larger ones become JPEG
    file = io.BytesIO()
    datasets.to_rgb(pixels).save(file, "PNG" if small else "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "png" if small else "jpeg"
    return [{"src": f"data:image/{kind};base64,{data}", "name": name, "heads": heads}]


def format_measures(measures: dict) -> dict[str, list[list[str]]]:
    """Return for each direction of `result/metrics.json` a table, the first row its head.

    `measures` has, for A2B and B2A, the numbers of pictures (n, n_real, n_pairs), and for each of
    KINDS a number for each of MEASURES that could be measured.
    """
    tables = {}
    for way in ("A2B", "B2A"):
        found = measures.get(way)
        if not isinstance(found, dict):
            continue
        kinds = [kind for kind in KINDS if found.get(kind)] or ["translation"]
        rows = [[way, *(KINDS[kind] for kind in kinds), "better"]]
        for key, name in (("n", "translations"), ("n_real", "real targets"), ("n_pairs", "pairs")):
            if key in found:
                rows.append([name, show(found[key]), *[""] * len(kinds)])
        for key, name, form, better in MEASURES:
            values = [found.get(kind, {}).get(key) for kind in kinds]
            if values == [None] * len(kinds):
                continue
            cells = [Cell("" if value is None else format(value, form)) for value in values]
            spreads = [found.get(kind, {}).get(f"{key}_std") for kind in kinds]
            for i, spread in enumerate(spreads):
                if spread is not None:
                    cells[i] = Cell(f"{cells[i]} ± {format(spread, form)}")
            baselines = [
                value
                for kind, value in zip(kinds, values, strict=True)
                if kind in ("identity", "flat") and value is not None
            ]
            # on pixels that should stay, identity is hard to beat: no verdict
            if better and baselines and values[0] is not None and key != "kept":
                sign = 1 if better == "lower" else -1
                beats = all(sign * values[0] < sign * value for value in baselines)
                cells[0].verdict = "good" if beats else "bad"
            rows.append([name, *cells, better])
        tables[way] = rows
    return tables


# ------------------------------------------------------------------------------------------------
# Reading the run


def show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return str(value)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows of a CSV log, the first its head, without those that are torn."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, ValueError):
        return []
    return [row for row in rows if len(row) == len(rows[0])]
