"""download.py against a hostile local server and hostile archives; the demo set's promises."""

import hashlib
import http.server
import io
import stat
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tools import download
from utils import UserError

ROOT = Path(__file__).parent.parent.parent


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `body`, with the server's vices."""

    def do_GET(self):
        server, body = self.server, self.server.body
        start = 0
        wanted = self.headers["Range"]
        server.requests.append((self.path, wanted))
        if server.status != 200:
            return self.send_error(server.status)
        if wanted and server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body) - start + server.lie))
        self.end_headers()
        stop = server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; body, etag, cuts, lie, ranges and status set how it behaves."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "CHUNK", 1000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/sets"
    server.body, server.etag, server.cuts, server.lie = b"", '"1"', [], 0
    server.ranges, server.status, server.requests = True, 200, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def zip_of(files: dict, seed: int = 0, noise: int = 20_000) -> bytes:
    """A zip; names are str or ZipInfo; a file of random bytes gives it some size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("maps/testA/noise.jpg", np.random.default_rng(seed).bytes(noise))
    return buffer.getvalue()


GOOD = {"maps/trainA/1.jpg": b"one", "maps/trainB/a b/2011-05-08 19:10:54.jpg": b"two"}


def run(tmp_path: Path, *options: str) -> None:
    download.main(download.parse_args([*map(str, options), "--workdir", str(tmp_path)]))


def know(monkeypatch, body: bytes, name: str = "maps") -> None:
    digest = hashlib.sha256(body).hexdigest()
    monkeypatch.setitem(download.DATASETS, name, (len(body), digest))


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def assert_good_set(tmp_path: Path) -> None:
    names = ["testA/noise.jpg", "trainA/1.jpg", "trainB/a b/2011-05-08 19:10:54.jpg"]
    assert files_in(tmp_path / "dataset") == [f"maps/{name}" for name in names]  # and nothing else
    assert (tmp_path / "dataset/maps/trainA/1.jpg").read_bytes() == b"one"


# ------------------------------------------------------------------------------------------------
# Fetching


def test_fetches_unpacks_and_never_overwrites(server, tmp_path, monkeypatch, capsys):
    server.body = zip_of(GOOD)
    know(monkeypatch, server.body)
    run(tmp_path, "maps", "--mirror", server.url + "/", "--strict")
    assert_good_set(tmp_path)
    assert server.requests == [("/sets/maps.zip", None)]
    assert "warning" not in capsys.readouterr().err
    mark = tmp_path / "dataset/maps/trainA/1.jpg"
    mark.write_bytes(b"mine")
    run(tmp_path, "maps", "--mirror", server.url)
    assert "already exists" in capsys.readouterr().out
    assert mark.read_bytes() == b"mine" and len(server.requests) == 1


def test_resumes_within_a_run(server, tmp_path, monkeypatch):
    server.body, server.cuts = zip_of(GOOD), [5000, 12_345]
    know(monkeypatch, server.body)
    run(tmp_path, "maps", "--mirror", server.url, "--strict")
    assert [wanted for _, wanted in server.requests] == [None, "bytes=5000-", "bytes=12345-"]
    assert_good_set(tmp_path)


def test_resumes_in_a_later_run(server, tmp_path, monkeypatch):
    server.body, server.cuts = zip_of(GOOD), [5000] * download.TRIES
    know(monkeypatch, server.body)
    with pytest.raises(UserError, match="run it again to resume"):
        run(tmp_path, "maps", "--mirror", server.url)
    assert (tmp_path / "dataset/maps.zip.part").read_bytes() == server.body[:5000]
    server.cuts, server.requests = [], []
    run(tmp_path, "maps", "--mirror", server.url, "--strict")
    assert [wanted for _, wanted in server.requests] == ["bytes=5000-"]
    assert_good_set(tmp_path)


@pytest.mark.parametrize("change", ["etag", "length", "shorter", "no ranges"])
def test_starts_over_when_it_cannot_go_on(server, tmp_path, monkeypatch, change):
    server.body, server.cuts = zip_of(GOOD, seed=1), [5000] * download.TRIES
    with pytest.raises(UserError):
        run(tmp_path, "maps", "--mirror", server.url)
    server.cuts = []
    if change == "etag":
        server.body, server.etag = zip_of(GOOD, seed=2), '"2"'
    elif change == "length":
        server.body = zip_of(GOOD, seed=2, noise=30_000)
    elif change == "shorter":  # than what is there already
        server.body = zip_of(GOOD, seed=2, noise=3000)
    else:
        server.ranges = False
    know(monkeypatch, server.body)
    run(tmp_path, "maps", "--mirror", server.url, "--strict")  # strict: no byte of the old file
    assert_good_set(tmp_path)


def test_a_length_that_lies(server, tmp_path):
    server.body, server.lie = zip_of(GOOD), 500
    with pytest.raises(UserError, match="after 5 tries"):
        run(tmp_path, "maps", "--mirror", server.url)
    server.lie = -500  # a file cut short that looks complete
    with pytest.raises(UserError, match="damaged"):
        run(tmp_path, "maps", "--mirror", server.url)
    assert files_in(tmp_path) == []  # a bad file is not kept to be "resumed" forever


def test_html_instead_of_a_zip_keeps_what_was_fetched(server, tmp_path, monkeypatch):
    good = zip_of(GOOD)
    know(monkeypatch, good)
    server.body, server.cuts = good, [5000] * download.TRIES
    with pytest.raises(UserError):
        run(tmp_path, "maps", "--mirror", server.url)
    server.body, server.cuts, server.ranges = b"\n<!DOCTYPE html><p>log in", [], False
    with pytest.raises(UserError, match="is a web page, not a zip archive"):
        run(tmp_path, "maps", "--mirror", server.url)
    server.body, server.ranges = good, True
    run(tmp_path, "maps", "--mirror", server.url, "--strict")
    assert server.requests[-1][1] == "bytes=5000-"


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, download.TRIES)])
def test_errors_of_the_server(server, tmp_path, status, requests):
    server.status = status
    with pytest.raises(UserError, match=f"maps.zip.* {status} "):
        run(tmp_path, "maps", "--mirror", server.url)
    assert len(server.requests) == requests  # a 404 is not tried again
    assert files_in(tmp_path) == []


def test_nobody_answers(server, tmp_path):
    with pytest.raises(UserError, match="cannot fetch .* refused"):
        run(tmp_path, "maps", "--mirror", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="must start with http"):
        run(tmp_path, "maps", "--mirror", "file:///etc")


def test_a_wrong_sum_is_a_warning_or_an_error(server, tmp_path, monkeypatch, capsys):
    server.body = zip_of(GOOD)
    expected, found = "0" * 64, hashlib.sha256(server.body).hexdigest()
    monkeypatch.setitem(download.DATASETS, "maps", (1, expected))
    with pytest.raises(UserError, match=f"{found}.*{expected}.*--strict"):
        run(tmp_path, "maps", "--mirror", server.url, "--strict")
    assert files_in(tmp_path) == []
    run(tmp_path, "maps", "--mirror", server.url)
    warning = capsys.readouterr().err
    assert "warning" in warning and expected in warning and found in warning
    assert_good_set(tmp_path)


def test_a_full_disk_keeps_a_good_download(server, tmp_path, monkeypatch):
    server.body = zip_of(GOOD)
    know(monkeypatch, server.body)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", full)
        with pytest.raises(UserError, match="cannot write .*No space left"):
            run(tmp_path, "maps", "--mirror", server.url)
    assert files_in(tmp_path) == ["dataset/maps.zip.part", "dataset/maps.zip.part.version"]
    run(tmp_path, "maps", "--mirror", server.url)
    assert len(server.requests) == 1  # not fetched a second time
    assert_good_set(tmp_path)


def test_an_unwritable_place(tmp_path):
    (tmp_path / "dataset").write_text("a file in the way")
    with pytest.raises(UserError, match="dataset"):
        run(tmp_path, "demo")


# ------------------------------------------------------------------------------------------------
# Unpacking


def unzip(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "in").mkdir(parents=True)
    (tmp_path / "in/a.zip").write_bytes(body)
    try:
        run(tmp_path / "out", "maps", "--zip", tmp_path / "in/a.zip")
    finally:
        assert sorted(p.name for p in tmp_path.iterdir()) in (["in"], ["in", "out"])
        assert (tmp_path / "in/a.zip").read_bytes() == body  # the user's own file stays


def assert_refused(tmp_path: Path, body: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        unzip(tmp_path, body)
    assert not (tmp_path / "out/dataset").exists() or not list((tmp_path / "out/dataset").iterdir())


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def test_zip_fetched_by_hand(tmp_path):
    unzip(tmp_path, zip_of(GOOD))
    assert_good_set(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "maps/../../evil",
        "/evil",
        "..\\evil",
        "C:\\evil",
        "\\\\host\\evil",
        "maps/..",
    ],
)
def test_zip_slip(tmp_path, name):
    assert_refused(tmp_path, zip_of(GOOD | {name: b"x"}), "refused: its entry .* outside")


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644, stat.S_IFCHR | 0o644])
def test_links_and_devices(tmp_path, mode):
    assert_refused(tmp_path, zip_of(GOOD | {entry("maps/x", mode): b"/etc"}), "link or a device")


def test_bombs(tmp_path, monkeypatch):
    bomb = zip_of({"maps/trainA/1.png": bytes(50_000_000)})
    assert len(bomb) < 100_000
    assert_refused(tmp_path / "ratio", bomb, "refused: it unpacks to")
    monkeypatch.setattr(download, "MAX_FILES", 2)
    assert_refused(tmp_path / "count", zip_of(GOOD), "refused: it holds 3 files")


def test_a_bomb_whose_headers_say_it_is_small(tmp_path):
    body = bytearray(zip_of({"maps/trainA/1.png": bytes(50_000_000)}))
    central = body.index(b"PK\x01\x02")
    struct.pack_into("<I", body, central + 24, 10)  # the file's size in the directory ...
    struct.pack_into("<I", body, 22, 10)  # ... and in front of the file
    assert_refused(tmp_path, bytes(body), "damaged|refused")


def test_damaged_and_foreign_files(tmp_path):
    body = zip_of(GOOD)
    place = body.index(b"maps/testA/noise.jpg") + 5000
    flipped = body[:place] + bytes([body[place] ^ 255]) + body[place + 1 :]
    cases = {
        "flipped": (flipped, "damaged"),
        "cut": (body[:-3000], "damaged"),
        "html": (b"<html>", "web page"),
        "text": (b"hello", "not a zip"),
        "empty": (b"", "not a zip"),
    }
    for name, (content, reason) in cases.items():
        assert_refused(tmp_path / name, content, reason)
    with pytest.raises(UserError, match="cannot read .*none.zip"):
        run(tmp_path, "maps", "--zip", tmp_path / "none.zip")
    with pytest.raises(UserError, match="--zip needs the name"):
        run(tmp_path, "--zip", tmp_path / "none.zip")


# ------------------------------------------------------------------------------------------------
# Weights and names


@pytest.mark.parametrize("legacy", [False, True])
def test_weights(server, tmp_path, legacy, capsys):
    buffer = io.BytesIO()
    weights = {"model.1.weight": torch.arange(3000.0)}
    torch.save(weights, buffer, _use_new_zipfile_serialization=not legacy)
    server.body, server.cuts = buffer.getvalue(), [4000]
    run(tmp_path, "--weights", "horse2zebra", "--mirror", server.url)
    assert server.requests == [
        ("/sets/horse2zebra.pth", None),
        ("/sets/horse2zebra.pth", "bytes=4000-"),
    ]
    assert files_in(tmp_path) == ["models/horse2zebra.pth"]
    loaded = torch.load(tmp_path / "models/horse2zebra.pth", weights_only=True)
    assert torch.equal(loaded["model.1.weight"], weights["model.1.weight"])
    run(tmp_path, "--weights", "horse2zebra", "--mirror", server.url)
    assert "already exists" in capsys.readouterr().out and len(server.requests) == 2


@pytest.mark.parametrize("body", [b"<html>no</html>", b"\x80\x04\x95 a pickle", b"garbage" * 100])
def test_what_cannot_be_weights(server, tmp_path, body):
    server.body = body
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        run(tmp_path, "--weights", "map2sat", "--mirror", server.url)
    assert files_in(tmp_path) == []


def test_names(tmp_path, capsys):
    run(tmp_path)
    listed = capsys.readouterr().out
    assert all(name in listed for name in ["demo", *download.DATASETS, *download.WEIGHTS])
    assert "78 MB" in listed
    assert len(download.DATASETS) == 11 and len(download.WEIGHTS) == 18
    with pytest.raises(UserError, match="did you mean apple2orange"):
        run(tmp_path, "aple2orange")
    with pytest.raises(UserError, match="did you mean style_monet"):
        run(tmp_path, "--weights", "style_mone")
    assert files_in(tmp_path) == []


def test_as_typed(tmp_path):
    command = [sys.executable, "-m", "tools.download", "nosuch", "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nosuch is not a known name")
    assert done.stderr.count("\n") == 1
