"""The page `result/report.html`: what a run was, how it went and what it makes, in one file."""

import base64
import contextlib
import csv
import io
import json
import time
from pathlib import Path

import jinja2
import numpy as np

import datasets
import utils
from lib import metrics
from lib import translation as tr
from lib.outputs import comparison_name, read_index

PER_DIRECTION = 8  # translations shown
WIDEST = 1200  # pixels; wider pictures are shrunk, so that the page stays a few MB

KINDS = {"translation": "ours", "identity": "identity", "flat": "flat color", "real": "real"}
# what evaluate.py measures, in the order shown: key, name, format, which way is better
MEASURES = (
    ("n", "translations", "d", ""),
    ("n_real", "real targets", "d", ""),
    ("n_pairs", "pairs", "d", ""),
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


def write_report(workdir: Path) -> Path:
    """Write `<workdir>/result/report.html` from the files of a run; returns its path.

    The page holds its pictures and needs nothing else. What has no files yet is left out, and what
    is damaged too: a report must not fail the command that it ends.

    Raises:
        UserError: the page cannot be written.
    """
    options = read_json(workdir / "models" / "options.json")
    losses, noted = (read_rows(workdir / "logs" / f"{log}.csv") for log in ("losses", "metrics"))
    measures = format_measures(read_json(workdir / "result" / "metrics.json"))
    name, names = Path(str(options.get("dataroot", ""))).name, tr.domain_names(options)
    headings = {way: f"{names[way[0]]} → {names[way[-1]]}" for way in ("A2B", "B2A")}
    parts = {
        "title": f"CycleGAN: {name}" if name else "CycleGAN",
        "options": dict(sorted(options.items())),
        "last": dict(zip(losses[0], losses[-1], strict=True)) if len(losses) > 1 else {},
        "translations": {headings[way]: find_strips(workdir, way, options) for way in headings},
        "measures": {headings[way]: table for way, table in measures.items()},
        "noted": [noted[0], *noted[1:][-10:]] if len(noted) > 1 else [],
        "progress": find_progress(workdir / "images"),
        "curves": embed(workdir / "logs" / "losses.png", ""),
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    path = utils.make_folder(workdir / "result") / "report.html"
    with utils.atomic_write(path) as file:
        # file names need not be valid Unicode
        file.write(template.render(parts).encode(errors="replace"))
    return path


def find_strips(workdir: Path, direction: str, options: dict) -> list[dict]:
    """Return the comparison pictures of the first translations that the index names.

    Those of a network with `keep_source` get a part that shows what it changed.
    """
    strips, rows = [], []
    with contextlib.suppress(utils.UserError):
        rows = [row for row in read_index(workdir) if row.direction == direction]
    for row in rows[:PER_DIRECTION]:
        name, truth = comparison_name(row), ["ground truth"] if row.truth else []
        heads = {
            workdir / "outputs" / "cycle" / name: ["source", "translation", "back again", *truth],
            workdir / "result" / name: ["translation", "source"],
        }
        if found := [path for path in heads if path.exists()]:
            newest = max(found, key=lambda path: path.stat().st_mtime)  # the first if equal
            changed = bool(options.get("keep_source"))
            strips += embed(newest, row.source.rpartition("/")[2], heads[newest], changed)
    return strips


def find_progress(folder: Path) -> list[dict]:
    """Return the sample grids of the first, a middle and the last epoch."""
    paths = sorted(folder.glob("epoch_*.png"), key=lambda path: (len(path.name), path.name))
    paths = paths or list(folder.glob("latest.png"))
    chosen = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []
    return sum((embed(paths[i], paths[i].stem.replace("_", " ")) for i in chosen), [])


def embed(path: Path, name: str, heads: list[str] | None = None, changed=False) -> list[dict]:
    """Return a picture file as a data URL, with names for its equal parts; [] if unreadable.

    With `changed` the difference of its parts "source" and "translation" is put beside them.
    """
    try:
        pixels = datasets.load_image(path)
    except datasets.UnreadableImage:
        return []
    if changed and pixels.shape[1] % len(heads) == 0:
        parts = dict(zip(heads, np.hsplit(pixels, len(heads)), strict=True))
        change = metrics.draw_change(parts["translation"], parts["source"])
        pixels, heads = np.hstack([pixels, datasets.to_rgb(change)]), [*heads, "change"]
    height, width = pixels.shape[:2]
    if width > WIDEST:
        pixels = datasets.resize(pixels, (WIDEST, max(1, round(height * WIDEST / width))))
    for kind in ("png", "jpeg"):  # the second for large ones
        file = io.BytesIO()
        datasets.to_rgb(pixels).save(file, kind, quality=85)
        if file.tell() < 50_000:
            break
    data = base64.b64encode(file.getvalue()).decode()
    return [{"src": f"data:image/{kind};base64,{data}", "name": name, "heads": heads}]


def format_measures(measures: dict) -> dict[str, list[list[str]]]:
    """Return for each direction of `result/metrics.json` a table, the first row its head.

    `measures` has for A2B and B2A, and for each of KINDS, those of MEASURES that were measured. The
    last column says whether the translation is better than the baselines, identity and flat color.
    """
    tables = {}
    for way in [way for way in ("A2B", "B2A") if isinstance(measures.get(way), dict)]:
        found = {kind: measures[way][kind] for kind in KINDS if measures[way].get(kind)}
        rows = [[way, *(KINDS[kind] for kind in found), "better", "beats baselines"]]
        for key, name, form, better in MEASURES:
            values = {kind: found[kind][key] for kind in found if key in found[kind]}
            if not values:
                continue
            cells = {kind: format(value, form) for kind, value in values.items()}
            for kind in [kind for kind in values if f"{key}_std" in found[kind]]:
                cells[kind] += f" ± {format(found[kind][f'{key}_std'], form)}"
            baselines, verdict = [values[k] for k in ("identity", "flat") if k in values], ""
            # on pixels that should stay, identity is hard to beat: no verdict
            if better and baselines and "translation" in values and key != "kept":
                sign = 1 if better == "lower" else -1
                beats = all(sign * values["translation"] < sign * value for value in baselines)
                verdict = "yes" if beats else "no"
            rows.append([name, *(cells.get(kind, "") for kind in found), better, verdict])
        tables[way] = rows
    return tables


def read_json(path: Path) -> dict:
    """Return what a file holds, {} where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows of a CSV log, the first its head, without those that are torn."""
    with contextlib.suppress(OSError, ValueError, csv.Error), open(path, newline="") as file:
        rows = list(csv.reader(file))
        return [row for row in rows if len(row) == len(rows[0])]
    return []
