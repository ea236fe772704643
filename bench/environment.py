"""What a figure depends on beside the code: device, threads, versions, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from peftrt.ops import _native

ROOT = Path(__file__).resolve().parent.parent
SOURCES, SUFFIXES = ("csrc", "kernels", "peftrt", "bench"), {".py", ".cu", ".cuh", ".cpp", ".h"}
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "numpy", "vllm", "sglang", "torchao")


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
    """Folder name of a device's results; a CPU's carries the number of threads, a GPU's no vendor."""
    name = device_name(device)
    if device == "cpu":
        name = f"{name} {torch.get_num_threads()} threads"
    name = re.sub(r"^nvidia\s+", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: str) -> dict[str, Any]:
    """Everything that a result file says about where and with what its figures were measured."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "os": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        **_commit(),
        "source": source_digest(),
        "threads": torch.get_num_threads(),
    }
    if device == "cpu":
        facts["isa"] = _native.isa() or f"none: {_native.load()}"
        facts["load_at_start"] = round(os.getloadavg()[0], 2)
        facts["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "not set")
    else:
        properties = torch.cuda.get_device_properties()
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"], facts["l2_bytes"] = properties.total_memory, properties.L2_cache_size
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["native"] = _native.load_cuda() or f"built for {torch.ops.peftrt_cuda.sm()}"
    return facts


def _commit() -> dict[str, Any]:
    """Where there is no repository, as in an exported tree, PEFTRT_COMMIT says which commit it was taken from."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("PEFTRT_COMMIT") or None, "dirty": None}
    # results are written while a run goes on: they do not make the code another one
    return {
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")),
    }


def source_digest() -> str:
    """A hash of the code that is measured, so that a tree without a repository can be told from another."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def main(device: str) -> None:
    """``python -m bench.environment cuda``: the device and its results' folder as JSON, in the last line of output."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA device here")
    print(json.dumps({"slug": slug(device), **describe(device)}))


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


if __name__ == "__main__":
    main(sys.argv[1])
