"""The page `result/report.html`: what a run was, how it went and what it makes, in one file."""

import base64
import contextlib
import csv
import html
import io
import json
import time
from pathlib import Path

import datasets
import utils

PER_DIRECTION = 8  # translations shown
WIDEST = 1200  # pixels; wider pictures are shrunk, so that the page stays a few MB

# what evaluate.py measures, in the order shown: key, words, format, which way is better
MEASURES = (
    ("kid", "KID to the target set", ".5f", "lower"),
    ("fid", "FID to the target set", ".2f", "lower"),
    ("source_kid", "KID to the source set", ".5f", ""),
    ("source_fid", "FID to the source set", ".2f", ""),
    ("cycle", "cycle error", ".4f", "lower"),
    ("mae", "mean absolute error", ".4f", "lower"),
    ("error", "the same where source and truth differ", ".4f", "lower"),
    ("psnr", "PSNR in dB", ".2f", "higher"),
    ("ssim", "SSIM", ".4f", "higher"),
    ("rmse", "RMSE over 0-255", ".2f", "lower"),
    ("under_5", "pixels off by less than 5", ".1%", "higher"),
    ("under_10", "pixels off by less than 10", ".1%", "higher"),
)

STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --soft: #667080; --line: #dfe3e8;
  --back: #f5f6f8; --card: #fff; --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --soft: #98a2b3;
  --line: #343a45; --back: #15181d; --card: #1e2229; --accent: #7fb2e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 60px; max-width: 1140px; color: var(--text);
  background: var(--back); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 16px 0 8px; color: var(--accent); }
p { margin: 2px 0 10px; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 18px; overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 14px 0 0; }
.facts dt { color: var(--soft); font-size: 13px; }
.facts dd { margin: 0; font-size: 17px; font-weight: 600; }
.grid { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0 0 14px; }
figure img { display: block; max-width: 100%; border-radius: 4px; }
.grid figure { margin: 0; }
.grid img { width: 100%; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 3px; overflow-wrap: anywhere; }
.heads { display: flex; color: var(--soft); font-size: 13px; text-align: center; }
.heads span { flex: 1; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; white-space: nowrap; padding: 4px 14px 4px 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
.settings { columns: 3 260px; column-gap: 32px; margin: 0; }
.settings div { display: flex; justify-content: space-between; gap: 12px; padding: 2px 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; font-size: 14px; }
.settings dt { color: var(--soft); }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
"""


def write_report(workdir: Path) -> Path:
    """Write `<workdir>/result/report.html` from the files of a run, and give its path.

    The page holds its pictures and needs nothing else. What has no files yet is left out, and what
    is damaged too: a report must not fail the command that it ends.

    Raises:
        UserError: the page cannot be written.
    """
    workdir = Path(workdir)
    options = read_json(workdir / "models" / "options.json")
    losses = read_rows(workdir / "logs" / "losses.csv")
    name = Path(str(options.get("dataroot", ""))).name
    title = f"CycleGAN: {name}" if name else "CycleGAN"
    parts = [
        f"<h1>{escape(title)}</h1>",
        facts(options, losses),
        translations(workdir),
        measurements(workdir),
        progress(workdir / "images"),
        curves(workdir / "logs", losses),
        settings(options),
        f"<p>Written {time.strftime('%Y-%m-%d %H:%M')}.</p>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    path = utils.make_folder(workdir / "result") / "report.html"
    with utils.atomic_write(path) as file:
        file.write(page.encode(errors="replace"))  # file names need not be valid Unicode
    return path


# ------------------------------------------------------------------------------------------------
# The parts of the page


def facts(options: dict, losses: list[list[str]]) -> str:
    """What one wants to know first: how long was trained on what."""
    found = {}
    if options:
        size = options.get("size")
        found = {"size": f"{size} x {size}", "generator": words(options.get("netG"))}
    if len(losses) > 1:
        last = dict(zip(losses[0], losses[-1], strict=True))
        of = f" of {options['n_epochs']}" if "n_epochs" in options else ""
        found["epochs"] = last.get("epoch", "?") + of
        found["iterations"] = last.get("iteration", "?")
        with contextlib.suppress(ValueError):  # not a number
            found["time trained"] = duration(float(last.get("seconds", "")))
    items = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in found.items())
    return f'<dl class="facts">{"".join(items)}</dl>' if found else ""


def translations(workdir: Path) -> str:
    """Strips of the newest run of test.py; without the way back, its comparison pictures."""
    content = ""
    for direction in ("A2B", "B2A"):
        cycle, plain = (
            newest(folder.glob(f"{direction}_*.png"))
            for folder in (workdir / "outputs" / "cycle", workdir / "result")
        )
        heads = ("source", "translation", "back again") if cycle else ("translation", "source")
        figures = "".join(
            figure(path, path.stem.removeprefix(f"{direction}_"), heads) for path in cycle or plain
        )
        if figures:
            content += f'<h3>{escape(arrow(direction))}</h3><div class="grid">{figures}</div>'
    return section("Translations of test pictures", "", content)


def measurements(workdir: Path) -> str:
    """The table of evaluate.py, and the last of what `train.py --eval_every` noted."""
    path = workdir / "result" / "metrics.json"
    rows = metrics_rows(read_json(path))
    content = table(rows) if len(rows) > 1 else ""
    note = (
        'By evaluate.py. "Nothing" is the source itself, left as it is: what any translation has '
        "to beat. FID is biased upwards for small n; compare KID."
    )
    noted = read_rows(workdir / "logs" / "metrics.csv")
    if len(noted) > 1:
        content += "<h3>during training</h3>" + table([noted[0], *noted[1:][-10:]])
    return section("Measures", note if len(rows) > 1 else "", content)


def progress(folder: Path) -> str:
    """The sample grids of the first, a middle and the last epoch."""
    paths = sorted(folder.glob("epoch_*.png"), key=lambda path: (len(path.name), path.name))
    paths = paths or list(folder.glob("latest.png"))
    chosen = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []
    content = "".join(figure(paths[i], paths[i].stem.replace("_", " ")) for i in chosen)
    note = "The same test pictures after the first, a middle and the last epoch."
    return section("Progress", note if len(chosen) > 1 else "", content)


def curves(folder: Path, losses: list[list[str]]) -> str:
    content = figure(folder / "losses.png", "")
    content += table([losses[0], losses[-1]]) if len(losses) > 1 else ""
    note = "Adversarial losses hover rather than fall; the cycle loss should go down."
    return section("Losses", note, content)


def settings(options: dict) -> str:
    rows = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(words(value))}</dd></div>"
        for name, value in sorted(options.items())
    )
    return section("Settings", "", f'<dl class="settings">{"".join(rows)}</dl>' if options else "")


def metrics_rows(metrics: dict) -> list[list[str]]:
    """The content of `result/metrics.json` as a table of words, the first row its head.

    `metrics` has, for "A2B" and "B2A", the numbers of pictures (n, n_real, n_pairs), and under
    "translation" and "nothing" a number for each of MEASURES that could be measured.
    """
    done = {name: metrics[name] for name in ("A2B", "B2A") if isinstance(metrics.get(name), dict)}
    if not done:
        return []
    rows = [["", *(title for name in done for title in (name, "nothing")), "better"]]
    for key, title in (("n", "translations"), ("n_real", "real pictures"), ("n_pairs", "pairs")):
        counts = [words(one.get(key)) for one in done.values()]
        if set(counts) != {"-"}:
            rows.append([title, *(cell for count in counts for cell in (count, "")), ""])
    for key, title, form, better in MEASURES:
        cells = []
        for one in done.values():
            for figures in (one.get("translation", {}), one.get("nothing", {})):
                cell = format(figures[key], form) if key in figures else ""
                spread = figures.get(f"{key}_std")
                cells.append(cell + (f" ± {format(spread, form)}" if spread is not None else ""))
        if any(cells):
            rows.append([title, *cells, better])
    return rows


# ------------------------------------------------------------------------------------------------
# Pieces of HTML, and words


def section(title: str, note: str, content: str) -> str:
    if not content:
        return ""
    note = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>"


def figure(path: Path, caption: str, heads: tuple[str, ...] = ()) -> str:
    """A picture file inside the page, with words above its equal parts; "" if it is unreadable."""
    try:
        pixels = datasets.load_image(path)
    except datasets.UnreadableImage:
        return ""
    height, width = pixels.shape[:2]
    if width > WIDEST:
        pixels = datasets.resize(pixels, (WIDEST, max(1, round(height * WIDEST / width))))
    small = path.stat().st_size < 50_000  # larger ones become JPEG
    file = io.BytesIO()
    datasets.to_rgb(pixels).save(file, "PNG" if small else "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "png" if small else "jpeg"
    head = "".join(f"<span>{escape(word)}</span>" for word in heads)
    head = f'<div class="heads">{head}</div>' if heads else ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{data}"
    return f'<figure>{head}<img src="{source}" alt="{escape(caption or path.stem)}">{text}</figure>'


def table(rows: list[list[str]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        lines.append("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row))
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def escape(text: str) -> str:
    return html.escape(str(text))


def arrow(direction: str) -> str:
    return direction.replace("2", " → ")


def words(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return str(value)


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else "under 1 min"


# ------------------------------------------------------------------------------------------------
# Reading the run


def newest(paths) -> list[Path]:
    """Those of the newest run: written within ten minutes of the last one, sorted by name."""
    written = {path: path.stat().st_mtime for path in paths}
    recent = [path for path in written if written[path] > max(written.values()) - 600]
    return sorted(recent)[:PER_DIRECTION]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV log, the first its head, without those that are torn."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, ValueError):
        return []
    return [row for row in rows if len(row) == len(rows[0])]
