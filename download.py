"""Get the data: sets and weights fetched by name, or the demo set drawn on the spot."""

import argparse
import contextlib
import difflib
import hashlib
import http.client
import math
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image
from tqdm import tqdm

import utils
from utils import UserError

SERVER = "http://efrosgans.eecs.berkeley.edu/cyclegan"
KNOWN_SETS = """
ae_photos 0 unknown
apple2orange 78456409 845a191e9af8926408ea597001cd03a452e3300a1f44a79fe329b3d59f6e3eb8
cezanne2photo 279885071 3a6c10ca21f9485862f1cbd707744b9dc258954a04631271d23a3605eeb63cff
facades 35135868 9a31ebf3a31b9b5cd195dd5bf62e9308e00cb94604d1019e3889ac84248695c0
horse2zebra 116867962 a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1
iphone2dslr_flower 339964458 8fcb5e374d631b107e1d961b8c4cd0a186aa2a4ff3e279923f4c426128de7113
maps 1476754427 639534f69dbf9f36bef8d6292a7698006361221f83f0285d7c9ca78afe6e8a9e
monet2photo 305231073 88f91b00fc228f97c9411fbf1880ec1d119c98f1722e4cfcfaa2fb35fac05b04
summer2winter_yosemite 132640856 167fe1726807a9d22bd106b4a6c0bd7953b688af924ac1bf967439c4961e49f9
ukiyoe2photo 292946532 02a2a2fb5ecf425ca1bf86aca7304377da64a2a1d3b86df54eb65e4068bf3b08
vangogh2photo 306590349 362c3473e70be0944bda08d49d660eafdc2854df55d697835b8186d1d79caaff
"""
DATASETS = {
    name: (int(size), digest)  # bytes and SHA-256 of NAME.zip
    for name, size, digest in (row.split() for row in KNOWN_SETS.split("\n") if row)
}
WEIGHTS = [
    "apple2orange", "orange2apple", "summer2winter_yosemite", "winter2summer_yosemite",
    "horse2zebra", "zebra2horse", "monet2photo", "style_monet", "style_cezanne", "style_ukiyoe",
    "style_vangogh", "sat2map", "map2sat", "cityscapes_photo2label", "cityscapes_label2photo",
    "facades_photo2label", "facades_label2photo", "iphone2dslr_flower",
]  # fmt: skip

TRIES, PAUSE, TIMEOUT = 5, 1.0, 30.0  # connections per run; seconds before the second; of silence
CHUNK = 1 << 16  # bytes read at a time: what a broken connection can cost
MAX_FILES, MAX_BYTES, MAX_RATIO = 100_000, 20 << 30, 50  # an archive beyond these is a bomb
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError)
FIRST_BYTES = {  # how a file of each kind begins
    "zip archive": (b"PK\x03\x04",),
    "PyTorch checkpoint": (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"),
}

# ------------------------------------------------------------------------------------------------
# Writing: whole or not at all


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a disk into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free some space, make the folder "
            "writable or choose another --workdir"
        ) from error


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` only when all is in it; UserError if it can't."""
    utils.make_folder(target.parent)
    with writing(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp makes it private
            yield temporary
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# Fetching


def fetch(url: str, part: Path, kind: str) -> None:
    """Download url to the file `part`, going on from where an earlier run or try broke off.

    Raises:
        UserError: no answer, an error from the server, something else than a `kind`, disk trouble.
    """
    utils.make_folder(part.parent)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            if fetch_rest(url, part, kind):
                return
            problem = "the connection broke off"
        except urllib.error.HTTPError as error:
            problem = f"the server says {error.code} {error.reason}"
            if error.code == 416:  # our part is longer than the file is now
                discard(part)
            elif error.code < 500:
                raise UserError(f"cannot fetch {url}: {problem}; is the address right?") from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a bad URL
            problem = str(error) or type(error).__name__
    raise UserError(
        f"cannot fetch {url} after {TRIES} tries ({problem}): what came so far is kept, so run it "
        "again to go on, or choose another server with --mirror"
    )


def fetch_rest(url: str, part: Path, kind: str) -> bool:
    """Append to `part` what one connection gives; whether the file is complete then."""
    version_file = part.with_name(part.name + ".version")  # which file the part is a part of
    start = part.stat().st_size if part.exists() and version_file.exists() else 0
    version = version_file.read_text() if start else ""
    if version.startswith(f"{start} "):
        return True
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        total = response.length
        if response.status == 206:
            place = re.match(r"bytes (\d+)-\d+/(\d+)$", response.headers["Content-Range"] or "")
            begin, total = map(int, place.groups()) if place else (None, None)
        current = f"{total} {response.headers['ETag'] or response.headers['Last-Modified']}"
        if response.status != 206:
            start = 0  # the server knows no ranges
        elif (begin, current) != (start, version):
            discard(part)  # not the file that was begun: the next try starts over
            return False
        chunk = response.read(CHUNK)
        if not chunk:
            return False
        if start == 0:
            check_first_bytes(chunk, url, kind)
            discard(part)
        with writing(part):
            version_file.write_text(current)
        with tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True) as bar:
            while chunk:
                with writing(part), open(part, "ab") as file:
                    file.write(chunk)
                bar.update(len(chunk))
                chunk = response.read(CHUNK)
    return total is None or part.stat().st_size == total


def discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".version").unlink(missing_ok=True)


def check_first_bytes(head: bytes, source: str | Path, kind: str) -> None:
    """Refuse by its beginning what cannot be a `kind`."""
    if head.lstrip()[:1] == b"<":
        raise UserError(
            f"{source} is a web page, not a {kind}: the server or a login page on the way answered "
            "with HTML; open it in a browser to see what it says"
        )
    if not head.startswith(FIRST_BYTES[kind]):
        raise UserError(f"{source} is not a {kind}")


def has_known_sum(archive: Path, name: str, strict: bool) -> bool:
    """Compare the archive's SHA-256 with the one we know: a warning, or with strict a UserError."""
    known = DATASETS[name][1]
    digest = hashlib.sha256()
    with open(archive, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() == known:
        return True
    if known == "unknown":
        problem = f"no SHA-256 of {name}.zip is known to compare with; it has {digest.hexdigest()}"
    else:
        problem = (
            f"{name}.zip has SHA-256 {digest.hexdigest()} where {known} was expected: the server "
            "may have repacked it, or somebody changed it"
        )
    if strict:
        raise UserError(f"{problem} (refused because of --strict)")
    print(f"warning: {problem}", file=sys.stderr)
    return False


# ------------------------------------------------------------------------------------------------
# Unpacking: the archive is not trusted


def unzip(archive: Path, target: Path) -> None:
    """Unpack a set's zip as the folder `target`, without the leading folder of the same name.

    Sizes are counted as bytes come out, since an archive's own figures may lie.

    Raises:
        UserError: damaged, encrypted, a path that leads outside, a link, a bomb, disk trouble.
    """
    limit = min(MAX_BYTES, MAX_RATIO * archive.stat().st_size)
    try:
        with zipfile.ZipFile(archive) as source, new_folder(target) as folder:
            members = [member for member in source.infolist() if not member.is_dir()]
            if not members or len(members) > MAX_FILES:
                raise UserError(f"{archive} is refused: it holds {len(members)} files")
            for member in tqdm(members, desc="unpacking", unit="file"):
                path = folder / safe_path(member, archive, target.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with source.open(member) as packed, open(path, "xb") as file:
                    while chunk := packed.read(CHUNK):
                        limit -= len(chunk)
                        if limit < 0:
                            raise UserError(
                                f"{archive} is refused: it unpacks to over {MAX_RATIO} times its "
                                f"size or {MAX_BYTES >> 30} GiB, which no set of pictures does"
                            )
                        file.write(chunk)
    except DAMAGED as error:
        raise UserError(f"{archive} is damaged ({error}): fetch it again") from error


def safe_path(member: zipfile.ZipInfo, archive: Path, name: str) -> PurePosixPath:
    """Where a member goes within the set's folder; UserError if it is not a plain file inside."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    windows = PureWindowsPath(str(path))  # what a drive letter is; a colon elsewhere is fine
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the packer did not say
    problem = None
    if path.is_absolute() or windows.drive or ".." in path.parts:
        problem = "leads outside the folder"
    elif not 1 <= len(path.parts) <= 8:
        problem = "is nested too deep, or has no name"
    elif kind not in (0, stat.S_IFREG):
        problem = "is a link or a device"
    elif member.flag_bits & 1 or member.compress_type not in (0, zipfile.ZIP_DEFLATED):
        problem = "is encrypted or packed in an unknown way"
    if problem:
        raise UserError(f"{archive} is refused: its entry {member.filename!r} {problem}")
    return path.relative_to(name) if path.parts[0] == name != path.name else path


# ------------------------------------------------------------------------------------------------
# The demo set: the same scenes as apples (A) and as oranges (B), drawn with numpy

SUPERSAMPLE = 2  # samples per pixel and side, inside the fruits' boxes
LEAF_REACH = 0.85  # how far from the pole stem and leaf can get; lengths are in radii of the fruit


def draw_demo(folder: Path, seed: int = 0, n_train: int = 300, n_test: int = 50) -> None:
    """Draw trainA, trainB (different scenes), testA and testB (the same scenes, the same names).

    Deterministic in `seed`. The set is drawn beside `folder` and renamed, so it is there whole or
    not at all. Raises UserError where it cannot be written.
    """
    pores = pore_slopes()
    splits = [("trainA", "apple", 0, n_train), ("trainB", "orange", 1, n_train)]
    splits += [("testA", "apple", 2, n_test), ("testB", "orange", 2, n_test)]
    with new_folder(folder) as temporary, tqdm(total=2 * (n_train + n_test), desc="demo") as bar:
        for split, fruit, scenes, count in splits:
            (temporary / split).mkdir()
            for i in range(count):
                picture = Image.fromarray(draw_scene([seed, scenes, i], fruit, pores))
                path = temporary / split / f"{i:03d}.png"
                picture.save(path, compress_level=1)  # a third of the time of the default 6
                bar.update()


def draw_scene(seed: list[int], fruit: str, pores: np.ndarray, size: int = 128) -> np.ndarray:
    """Draw scene `seed` with every fruit an "apple" or an "orange"; (size, size, 3) uint8.

    Nothing random depends on the kind of fruit: the two drawings of a scene share background,
    light, shadows, places, leaves and ripeness, and differ in the fruits' skin and stem only.
    """
    rng = np.random.default_rng(seed)
    hue, tone = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.75)
    ground = tone * (1 + 0.2 * np.cos(hue - vector(0, 2.1, 4.2)))
    side = 1 if rng.random() < 0.5 else -1
    light = unit(side * rng.uniform(0.25, 0.8), -rng.uniform(0.6, 1), 0.85)  # x right, y down
    y, x = np.mgrid[:size, :size].astype(np.float32) / size + 0.5 / size
    glow = np.exp(-((x - 0.5 - 0.35 * light[0]) ** 2 + (y - 0.25) ** 2) / 0.35)
    floor = 1 / (1 + np.exp(-(y - rng.uniform(0.4, 0.5)) / 0.05))  # a soft horizon
    picture = (0.62 + 0.38 * glow + 0.16 * floor)[..., None] * ground  # (S, S, 3), linear light

    fruits: list[tuple[float, float, float]] = []  # where each stands, and its radius
    wanted = int(rng.integers(1, 4))
    smallest, largest = [(0.3, 0.38), (0.22, 0.26), (0.18, 0.21)][wanted - 1]
    for _ in range(400):
        r = rng.uniform(smallest, largest)
        foot, cx = rng.uniform(max(0.62, 2.35 * r), 0.95), rng.uniform(r + 0.04, 0.96 - r)
        if all(math.hypot(cx - x2, foot - r - y2 + r2) > 0.93 * (r + r2) for y2, x2, r2 in fruits):
            fruits.append((foot, cx, r))
        if len(fruits) == wanted:
            break
    for foot, cx, r in fruits:
        for shift, width, depth in ((0.65, 1.25, 0.5), (0.1, 0.7, 0.75)):  # cast, contact shadow
            dx = (x - cx + shift * r * light[0]) / (width * r)
            dy = (y - foot + 0.07 * r) / (0.3 * width * r)
            picture *= 1 - depth * np.exp(-((dx**2 + dy**2) ** 2))[..., None]
    for foot, cx, r in sorted(fruits):  # the nearest stands lowest and comes last
        chance = rng.random(10).tolist()
        disc = (cx * size, (foot - r) * size, r * size)
        paint_fruit(picture, fruit, disc, light, ground, pores, chance)
    return (255 * np.sqrt(np.clip(picture, 0, 1)) + 0.5).astype(np.uint8)  # sqrt: nearly sRGB


def paint_fruit(picture, fruit, disc, light, ground, pores, chance) -> None:
    """Paint one fruit onto picture (S, S, 3).

    disc is (x, y, radius) in pixels; light a direction; ground the colour below, (3,); chance ten
    numbers in [0, 1) that are all that is particular about this fruit.
    """
    size, (cx, cy, r) = len(picture), disc
    left, right = max(0, int(cx - 1.35 * r)), min(size, int(cx + 1.35 * r) + 1)
    top, bottom = max(0, int(cy - 1.65 * r)), min(size, int(cy + 1.05 * r) + 2)
    xs = (np.arange(left * SUPERSAMPLE, right * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
    ys = (np.arange(top * SUPERSAMPLE, bottom * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
    x, y = np.meshgrid((xs - cx) / r, (ys - cy) / r)  # (H, W); the fruit is the unit disc
    sharp = SUPERSAMPLE * r  # every outline is one sample soft

    lean, ripe = 0.9 * (chance[0] - 0.5), chance[2]  # one ripeness sets both fruits' colours
    pole = unit(lean, -0.8, 0.35 + 0.5 * chance[1])  # where the stem is
    near = (x**2 + y**2 < 1.1) | ((x - pole[0]) ** 2 + (y - pole[1]) ** 2 < LEAF_REACH**2)
    x, y = x[near], y[near]  # (N,): only what can be covered is worked out
    radius = np.sqrt(x**2 + y**2)
    z = np.sqrt(np.maximum(1 - radius**2, 0))
    normal = np.stack((x, y, z))  # (3, N)
    east = unit(*np.cross(pole, (0, 0, 1)))
    angle = np.arccos(np.clip(pole @ normal, -1, 1))  # 0 at the pole
    turn = np.arctan2(np.cross(pole, east) @ normal, east @ normal)  # around it

    if fruit == "apple":
        dimple = 0.9 * np.exp(-((angle / 0.42) ** 2)) * np.minimum(angle / 0.2, 1)
        normal += dimple * (pole[:, None] - normal * np.cos(angle))
        waves = [np.cos(k * turn + 6.3 * chance[3]) for k in (11, 17, 29)]
        streak = np.clip(0.5 + 0.13 * sum(waves), 0, 1)
        yellow = np.exp(-((angle / (0.7 - 0.25 * ripe)) ** 2)) * (0.3 + 0.6 * streak)
        yellow += (0.18 - 0.13 * ripe) * streak * (0.3 + 0.7 * np.sin(angle))
        red = colour_of(0.52 - 0.2 * ripe, 0.016 - 0.008 * ripe, 0.016)
        skin = mix(red, colour_of(0.8, 0.5 - 0.12 * ripe, 0.07), np.clip(0.9 * yellow, 0, 1))
        skin *= 1 - 0.75 * np.exp(-((angle / 0.17) ** 2))  # dark at the dimple's bottom
        gloss, shine, sheen = 0.9, 90, 0.12
    else:
        bend = np.arcsin(np.minimum(radius, 1)) / np.maximum(radius, 1e-6)  # flat skin to ball
        side = pores.shape[-1]
        u = (side / 4 * (bend * x + 9 + 9 * chance[3])).astype(int) % side
        v = (side / 4 * (bend * y + 9 + 9 * chance[4])).astype(int) % side
        normal[:2] -= 0.1 * pores[:, v, u]
        rays = np.cos(5 * turn + 6.3 * chance[3])
        star = np.exp(-((angle / 0.3) ** 2)) * (0.5 + 0.5 * rays)
        skin = colour_of(0.95, 0.4 - 0.17 * ripe, 0.012) * (1 - 0.4 * star)
        skin = mix(skin, colour_of(0.75, 0.5, 0.06), 0.35 * np.exp(-((angle / 0.35) ** 2)))
        navel = (0.13 + 0.03 * rays - angle) * sharp + 0.5
        skin = mix(skin, colour_of(0.16, 0.2, 0.05), np.clip(navel, 0, 1))
        gloss, shine, sheen = 0.22, 22, 0.05
    normal /= np.sqrt((normal**2).sum(0))

    # A wide lamp, the sky, what the ground throws back; then highlight and rim on top of it.
    lamp = np.clip(0.88 * (light @ normal) + 0.12, 0, None)
    up = 0.5 - 0.5 * normal[1]
    open_sky = 1 - 0.6 * np.clip((y - 0.45) / 0.55, 0, 1) ** 2  # less near the ground
    glare = unit(light[0], light[1], light[2] + 1) @ normal - 1  # 0 where the lamp is mirrored
    colour = skin * (1.05 * lamp + 0.3 * up * open_sky)
    colour += skin * (0.3 * ground[:, None]) * ((1 - up) * open_sky)
    rim = sheen * (1 - z) ** 2 * (1 - z) * open_sky
    colour += gloss * np.exp(shine * glare) + 0.5 * sheen * np.exp(9 * glare) + rim
    alpha = np.clip((1 - radius) * sharp + 0.5, 0, 1)

    def strip(direction: float, length: float, bend: float) -> tuple[np.ndarray, np.ndarray]:
        """How far along (0 to 1) and beside a bent strip from the pole each sample lies."""
        dx, dy = x - 0.97 * pole[0], y - 0.97 * pole[1]
        along = (dx * np.sin(direction) - dy * np.cos(direction)) / length
        return along, dx * np.cos(direction) + dy * np.sin(direction) - bend * along**2

    parts = []
    if chance[5] < 0.5:  # a leaf, the same on both fruits
        side = 1 if chance[6] < 0.5 else -1
        along, beside = strip(side * (0.9 + 0.5 * chance[7]), 0.75, 0.12)
        half = 0.19 * np.sqrt(np.clip(4 * along * (1 - along), 0, 1)) * (1 - 0.4 * along)
        lit = 0.55 + 0.5 * np.clip(0.5 + 2.2 * beside * np.sign(light[0]), 0, 1)
        ribs = 0.4 * np.exp(2 * np.cos(68 * (along - 1.2 * np.abs(beside))) - 2)
        lit *= 1.1 + 0.45 * (np.exp(-((beside / 0.018) ** 2)) + ribs)
        parts.append((colour_of(0.07, 0.22 + 0.08 * chance[8], 0.03), along, beside, half, lit))
    if fruit == "apple":
        along, beside = strip(0.8 * lean, 0.5, 0.2 * (chance[9] - 0.5))
        half = 0.045 + 0.03 * np.clip(along, 0, 1) ** 2
        lit = 0.9 + 0.45 * np.clip(beside / half * np.sign(light[0]), -1, 1)
        parts.append((colour_of(0.2, 0.11, 0.045), along, beside, half, lit))
    for tone, along, beside, half, lit in parts:
        cover = np.clip((half - np.abs(beside)) * sharp + 0.5, 0, 1)
        cover *= np.clip(along * sharp, 0, 1) * np.clip((1 - along) * sharp * 0.5, 0, 1)
        colour, alpha = mix(colour, tone * lit, cover), np.maximum(alpha, cover)

    layer = np.zeros((4, *near.shape), np.float32)
    layer[:, near] = np.concatenate((colour * alpha, alpha[None]))
    height, width = bottom - top, right - left
    layer = layer.reshape(4, height, SUPERSAMPLE, width, SUPERSAMPLE).mean((2, 4))
    layer = layer.transpose(1, 2, 0)  # (h, w, 4): colour times cover, cover
    under = picture[top:bottom, left:right]
    under *= 1 - layer[..., 3:]
    under += layer[..., :3]


def pore_slopes(side: int = 256) -> np.ndarray:
    """The slopes of a tileable skin of small bumps in no order: (2, side, side), x and y."""
    frequency = side * np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    noise = np.fft.fft2(np.random.default_rng(7).standard_normal((side, side)))
    height = np.fft.ifft2(noise * np.exp(-(((frequency - 40) / 12) ** 2))).real  # one size of bump
    slopes = [np.roll(height, -1, axis) - np.roll(height, 1, axis) for axis in (1, 0)]
    return (np.stack(slopes) / height.std()).astype(np.float32)


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def unit(*values: float) -> np.ndarray:
    return vector(*values) / np.linalg.norm(values)


def colour_of(red: float, green: float, blue: float) -> np.ndarray:
    """A colour in linear light that broadcasts over samples, (3, 1)."""
    return vector(red, green, blue)[:, None]


def mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`a` (3, N) where weight (N,) is 0, `b` where it is 1."""
    return a + (b - a) * weight


# ------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="the set to get; none: list them")
    parser.add_argument("--weights", metavar="NAME", help="get a published generator into models/")
    parser.add_argument(
        "--mirror", metavar="URL", help="other folder on the web to get the file from"
    )
    parser.add_argument("--zip", type=Path, metavar="FILE", help="unpack a zip fetched by hand")
    parser.add_argument("--strict", action="store_true", help="refuse a zip of another SHA-256")
    utils.add_workdir(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.zip and args.name in (None, "demo"):
        raise UserError("--zip needs the name of the set: python download.py NAME --zip FILE")
    if args.mirror and not re.match("https?://", args.mirror):
        raise UserError(f"--mirror {args.mirror} must start with http:// or https://")
    if args.weights:
        get_weights(args.weights, args)
    if args.name:
        get_dataset(args.name, args)
    if not args.name and not args.weights:
        list_names()


def list_names() -> None:
    print("sets (python download.py NAME):")
    print(f"  {'demo':24}drawn here, 700 pictures")
    for name, (size, _) in DATASETS.items():
        print(f"  {name:24}{f'{size / 1e6:.0f} MB' if size else 'size not known'}")
    print("weights (python download.py --weights NAME), about 46 MB each:")
    for name in WEIGHTS:
        print(f"  {name}")


def check_name(name: str, names: list[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{name} is not a known name: {hint}python download.py lists them")


def get_dataset(name: str, args: argparse.Namespace) -> None:
    """Draw, fetch or unpack a set into <workdir>/dataset/<name>, unless it is there."""
    check_name(name, ["demo", *DATASETS])
    target = args.workdir / "dataset" / name
    part = target.with_name(f"{name}.zip.part")
    if target.is_dir() and any(target.iterdir()):
        print(f"{target} is already there; delete it to get it anew")
        return
    if name == "demo":
        draw_demo(target)
    elif args.zip:
        try:
            with open(args.zip, "rb") as file:
                check_first_bytes(file.read(512), args.zip, "zip archive")
            has_known_sum(args.zip, name, args.strict)
        except OSError as error:
            raise UserError(f"cannot read {args.zip} ({error.strerror})") from error
        unzip(args.zip, target)
    else:
        server = (args.mirror or f"{SERVER}/datasets").rstrip("/")
        fetch(f"{server}/{name}.zip", part, "zip archive")
        known = False
        try:
            known = has_known_sum(part, name, args.strict)
            unzip(part, target)
        except UserError:
            if not known:  # a bad file is not worth keeping; a good one is, when the disk is full
                discard(part)
            raise
        discard(part)
    print(f"{target} is ready: python train.py --dataroot {target}")


def get_weights(name: str, args: argparse.Namespace) -> None:
    """Fetch a published generator into <workdir>/models/<name>.pth, unless it is there."""
    check_name(name, WEIGHTS)
    target = args.workdir / "models" / f"{name}.pth"
    if target.exists():
        print(f"{target} is already there; delete it to get it anew")
        return
    part = target.with_name(f"{name}.pth.part")
    server = (args.mirror or f"{SERVER}/pretrained_models").rstrip("/")
    fetch(f"{server}/{name}.pth", part, "PyTorch checkpoint")
    with writing(target):
        os.replace(part, target)
    discard(part)
    print(f"{target} is ready: python test.py --weights {target} --input FOLDER")


if __name__ == "__main__":
    utils.run(main, parse_args())
