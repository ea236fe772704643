"""What a figure depends on beside the code: device, threads, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from peftrt.ops import _native

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "numpy")


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return model.group(1).strip() if model else platform.processor() or platform.machine()


def slug(device: str) -> str:
    """Folder name of a device's results; a CPU's carries the number of threads."""
    name = device_name(device)
    if device == "cpu":
        name = f"{name} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: str) -> dict[str, Any]:
    """Everything that a result file says about where and with what its figures were measured."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "os": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        # results are written while a run goes on: they do not make the code another one
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")),
        "threads": torch.get_num_threads(),
    }
    if device == "cpu":
        facts["isa"] = _native.isa() or f"none: {_native.load()}"
        facts["load_at_start"] = round(os.getloadavg()[0], 2)
    else:
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    return _run("git", "-C", str(ROOT), *args)


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
