"""Download data sets and published weights by name, or draw the demo set.

python -m tools.download                        lists the names
python -m tools.download apple2orange           -> dataset/apple2orange
python -m tools.download --weights horse2zebra  -> models/horse2zebra.pth
"""

import argparse
import difflib
import hashlib
import http.client
import os
import stat
import struct
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

import utils
from tools.demo import draw_demo
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
ROWS = map(str.split, KNOWN_SETS.strip().splitlines())
DATASETS = {name: (int(size), digest) for name, size, digest in ROWS}  # bytes, SHA-256 of NAME.zip
PUBLISHED = """
apple2orange orange2apple summer2winter_yosemite winter2summer_yosemite horse2zebra zebra2horse
monet2photo style_monet style_cezanne style_ukiyoe style_vangogh sat2map map2sat iphone2dslr_flower
cityscapes_photo2label cityscapes_label2photo facades_photo2label facades_label2photo
"""
WEIGHTS = PUBLISHED.split()

TRIES, PAUSE, TIMEOUT = 5, 1.0, 30.0  # connections; seconds before the second, to wait for data
CHUNK = 1 << 16  # bytes read at a time: the most that a broken connection loses
MAX_FILES, MAX_BYTES, MAX_RATIO = 100_000, 20 << 30, 50  # an archive beyond these is a bomb
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError)
FIRST_BYTES = {  # how a file of each kind begins
    "zip archive": (b"PK\x03\x04",),
    "PyTorch checkpoint": (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"),
}

# ------------------------------------------------------------------------------------------------
# Downloading


def fetch(url: str, folder: Path, kind: str) -> Path:
    """Download url to a file NAME.part, resuming what an earlier run or try began; returns it.

    Raises UserError: no answer, an error from the server, not a `kind`, or a full disk.
    """
    part = utils.make_folder(folder) / (url.rpartition("/")[2] + ".part")
    for attempt in range(TRIES):
        time.sleep(PAUSE * (2**attempt - 1))
        try:
            if fetch_rest(url, part, kind):
                return part
            problem = "the connection broke off"
        except urllib.error.HTTPError as error:
            problem = f"the server says {error.code} {error.reason}"
            if error.code == 416:  # the part is longer than the file is now
                discard(part)
            elif error.code < 500:
                raise UserError(f"cannot fetch {url}: {problem}; is the address right?") from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a bad URL
            problem = str(error) or type(error).__name__
    raise UserError(
        f"cannot fetch {url} after {TRIES} tries ({problem}): run it again to resume from what is "
        "there, or choose another server with --mirror"
    )


def fetch_rest(url: str, part: Path, kind: str) -> bool:
    """Append to `part` what one connection sends; returns whether the file is complete."""
    version_file = part.with_name(part.name + ".version")  # length and tag of the whole file
    start = part.stat().st_size if part.exists() and version_file.exists() else 0
    version = version_file.read_text() if start else ""
    if version.startswith(f"{start} "):
        return True
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        place, _, total = (response.headers["Content-Range"] or "").partition("/")
        if response.status != 206:  # the whole file
            start, total = 0, response.headers["Content-Length"]
        current = f"{total} {response.headers['ETag'] or response.headers['Last-Modified']}"
        if response.status == 206 and (current != version or f"bytes {start}-" not in place):
            discard(part)  # another file than before: the next try starts over
            return False
        chunk = response.read(CHUNK)
        if not chunk:
            return False
        if start == 0:
            check_first_bytes(chunk, url, kind)
            discard(part)
        with utils.writing(part):
            version_file.write_text(current)
        size = int(total) if total else None
        with tqdm(total=size, initial=start, desc=part.stem, unit="B", unit_scale=True) as bar:
            while chunk:
                with utils.writing(part), open(part, "ab") as file:  # not the reading
                    file.write(chunk)
                bar.update(len(chunk))
                chunk = response.read(CHUNK)
    return size in (None, part.stat().st_size)


def discard(part: Path) -> None:
    for name in (part.name, part.name + ".version"):
        part.with_name(name).unlink(missing_ok=True)


def check_first_bytes(head: bytes, source: str | Path, kind: str) -> None:
    """Raise UserError if a file that begins with `head` cannot be a `kind`."""
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{source} is a web page, not a {kind}: open it in a browser to read it")
    if not head.startswith(FIRST_BYTES[kind]):
        raise UserError(f"{source} is not a {kind}")


def has_known_sum(archive: Path, name: str, strict: bool) -> bool:
    """Return whether a set's zip has the expected SHA-256; if not, warn, or fail if strict."""
    known, digest = DATASETS[name][1], hashlib.sha256()
    try:
        with open(archive, "rb") as file:
            check_first_bytes(file.peek(512), archive, "zip archive")
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {archive} ({error.strerror})") from error
    if digest.hexdigest() == known:
        return True
    problem = (
        f"{name}.zip has SHA-256 {digest.hexdigest()}, but {known} is expected: the server may "
        "have repacked it, or somebody changed it"
    )
    if strict:
        raise UserError(f"{problem} (refused because of --strict)")
    print(f"warning: {problem}", file=sys.stderr)
    return False


# ------------------------------------------------------------------------------------------------
# Unpacking: the archive is not trusted


def unzip(archive: Path, target: Path) -> None:
    """Unpack a set's zip as the folder `target`, without the leading folder of the same name.

    Sizes are counted while unpacking, because those in the archive may be wrong. Raises UserError:
    damaged, encrypted, a path that leads outside, a link, a zip bomb, or a full disk.
    """
    limit = min(MAX_BYTES, MAX_RATIO * archive.stat().st_size)
    try:
        with zipfile.ZipFile(archive) as source, utils.new_folder(target) as folder:
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
                                f"size or {MAX_BYTES >> 30} GiB"
                            )
                        file.write(chunk)
    except DAMAGED as error:
        raise UserError(f"{archive} is damaged ({error}): fetch it again") from error


def safe_path(member: zipfile.ZipInfo, archive: Path, name: str) -> PurePosixPath:
    """A member's path within the set's folder; UserError if it is not a plain file inside."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    windows = PureWindowsPath(str(path))  # recognizes drive letters; other colons are allowed
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if not recorded
    plain = not member.flag_bits & 1 and member.compress_type in (0, zipfile.ZIP_DEFLATED)
    for problem, found in (
        ("leads outside the folder", path.is_absolute() or windows.drive or ".." in path.parts),
        ("is nested too deep, or has no name", not 1 <= len(path.parts) <= 8),
        ("is a link or a device", kind not in (0, stat.S_IFREG)),
        ("is encrypted or packed in an unknown way", not plain),
    ):
        if found:
            raise UserError(f"{archive} is refused: its entry {member.filename!r} {problem}")
    return path.relative_to(name) if path.parts[0] == name != path.name else path


# ------------------------------------------------------------------------------------------------
# The command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Download data sets and weights by name.")
    add = parser.add_argument
    add("name", nargs="?", help="the data set; none: list the names")
    add("--weights", metavar="NAME", help="download a published generator into models/")
    add("--mirror", metavar="URL", help="web folder to download from instead")
    add("--zip", type=Path, metavar="FILE", help="unpack a zip that you downloaded yourself")
    add("--strict", action="store_true", help="refuse a zip of another SHA-256")
    utils.add_workdir(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.zip and args.name in (None, "demo"):
        raise UserError("--zip needs the name of the set: python -m tools.download NAME --zip FILE")
    if args.mirror and not args.mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {args.mirror} must start with http:// or https://")
    if args.weights:
        target = args.workdir / "models" / f"{args.weights}.pth"
        if is_wanted(args.weights, WEIGHTS, target):
            server = (args.mirror or f"{SERVER}/pretrained_models").rstrip("/")
            part = fetch(f"{server}/{target.name}", target.parent, "PyTorch checkpoint")
            with utils.writing(target):
                os.replace(part, target)
            discard(part)
            print(f"{target} is ready: python test.py --weights {target} --input FOLDER")
    if args.name:
        target = args.workdir / "dataset" / args.name
        if is_wanted(args.name, ["demo", *DATASETS], target):
            get_dataset(args.name, target, args)
            print(f"{target} is ready: python train.py --dataroot {target}")
    if not args.name and not args.weights:
        print("sets (python -m tools.download NAME):")
        print(f"  {'demo':24}drawn here, 700 pictures")
        for name, (size, _) in DATASETS.items():
            print(f"  {name:24}{f'{size / 1e6:.0f} MB' if size else 'size not known'}")
        print("weights (python -m tools.download --weights NAME), about 46 MB each:")
        print(*(f"  {name}" for name in WEIGHTS), sep="\n")


def is_wanted(name: str, names: list[str], target: Path) -> bool:
    """Return whether a name is known, else raise UserError, and `target` is not there yet."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{name} is not a known name: {hint}python -m tools.download lists them")
    if there := target.is_file() or (target.is_dir() and any(target.iterdir())):
        print(f"{target} already exists; delete it to download it again")
    return not there


def get_dataset(name: str, target: Path, args: argparse.Namespace) -> None:
    """Draw, or download and unpack, a data set as the folder `target`."""
    if name == "demo":
        return draw_demo(target)
    server, known = (args.mirror or f"{SERVER}/datasets").rstrip("/"), False
    archive = args.zip or fetch(f"{server}/{name}.zip", target.parent, "zip archive")
    try:
        known = has_known_sum(archive, name, args.strict)
        unzip(archive, target)
    except UserError:
        if not args.zip and not known:  # a good file is kept for when the disk has space again
            discard(archive)
        raise
    if not args.zip:
        discard(archive)


if __name__ == "__main__":
    utils.run(main, parse_args())
