"""What the scripts share."""

import os

import pytest
import torch

import utils
from utils import UserError


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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with ..."),
        torch.distributed.DistBackendError("NCCL error\nCuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ],
)
def test_a_full_gpu_is_one_sentence(error):
    """Its own error, and those of its context, NCCL and cuBLAS."""
    full = pytest.raises(UserError, match="the GPU is out of memory: smaller")
    with full, utils.explain_out_of_memory("smaller"):
        raise error


def test_errors_of_the_gpu_and_of_other_ranks():
    old = utils.explain(torch.AcceleratorError("CUDA error: no kernel image is available\nmore"))
    assert "no kernel image is available)" in old and "this PyTorch is compiled for" in old
    lost = utils.explain(torch.distributed.DistBackendError("NCCL error in: x\nmore"))
    assert "lost another process" in lost and "--resume auto" in lost
    assert utils.explain(RuntimeError("shapes do not match")) is None
