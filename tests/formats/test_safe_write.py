"""Writing safetensors: whole or not at all, whatever fails; reading costs about the file's size."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftrt.formats.errors import FormatError
from peftrt.formats.safe import read_tensors, write_tensors


def test_write_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    for bad in (
        {"a": "text"},
        {3: torch.ones(1)},
        {"a": torch.ones(1, device="meta")},
        {"a": torch.ones(1, dtype=torch.complex128)},
        {"a": torch.eye(2).to_sparse()},
        {"__metadata__": torch.ones(1)},
    ):
        with pytest.raises((TypeError, FormatError), match=r"x\.safetensors"):
            write_tensors(path, bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metadata"):
        write_tensors(path, {"a": torch.ones(1)}, {"k": 3})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_disk_full_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    code = (
        "import resource, sys, torch\n"
        "from peftrt.formats.safe import write_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n    write_tensors(sys.argv[1], {'a': torch.zeros(1 << 20)})\n"
        "except OSError as error:\n    print(error)\n    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "x.safetensors" in done.stdout
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_failed_rename_removes_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))


def test_written_files_have_an_ordinary_mode_and_need_a_directory(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(FormatError, match="a directory"):
        write_tensors(tmp_path / "dir.safetensors", {"a": torch.ones(1)})
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "no" / "x.safetensors", {"a": torch.ones(1)})


def test_reading_needs_about_the_size_of_the_file(tmp_path: Path) -> None:
    size = 64 << 20
    write_tensors(tmp_path / "x.safetensors", {f"t{i}": torch.zeros(size // 32) for i in range(8)})
    code = (
        "import resource, sys, torch\n"
        "from peftrt.formats.safe import read_tensors\n"
        "read = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = read(); kept = read_tensors(sys.argv[1]); print(read() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=True
    )
    # The tensors, and 4 Mi elements' worth of the check for NaN (its mask and |x|).
    assert int(done.stdout) < size + (40 << 20)
