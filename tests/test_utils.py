"""What the scripts share."""

import os

import utils


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Write, flush, fsync, rename, fsync of the folder: else a power cut may leave it empty."""
    path, calls = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        opened = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(("fsync", opened if opened == str(tmp_path) else os.path.getsize(opened)))
        fsync(handle)

    def note_replace(source, target):
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with utils.atomic_write(path) as file:
        file.write(bytes(100))
    assert calls == [("fsync", 100), ("replace", str(path)), ("fsync", str(tmp_path))]
