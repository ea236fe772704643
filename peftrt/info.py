"""``peftrt info``: what is built, for which devices, and which backend serves which operation."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import peftrt
from peftrt import _build
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import AdapterTable, Gradients, _native
from peftrt.ops._adamw_step import STEP
from peftrt.ops._define import OPS
from peftrt.ops._gradient_norm import NORM
from peftrt.ops._weight import weight_args

_SIZE = 128  # rows and columns of the sample calls
_RANK = 8
_BY_ADDRESS = {op.name: op for op in (STEP, NORM)}  # an optimizer's, which no schema describes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def show(as_json: bool = False) -> None:
    """Print :func:`collect`."""
    found = collect()
    print(json.dumps(found, indent=2) if as_json else text(found))


def collect() -> dict[str, Any]:
    """Versions, native libraries, devices; for every operation, device and dtype the backend and the reasons."""
    return {
        "peftrt": peftrt.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "triton", "transformers")},
        "native": _native_library(),
        "cuda": _cuda_library(),
        "devices": _devices(),
        "forced": os.environ.get("PEFTRT_BACKEND"),
        "ops": {op: {device: _choices(op, device) for device in _kinds()} for op in sorted(OPS | _BY_ADDRESS)},
    }


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    packages = ", ".join(f"{name} {number or 'not installed'}" for name, number in found["packages"].items())
    native = found["native"]
    lines = [f"peftrt {found['peftrt']} (Python {found['python']}; {packages})", "", "native code"]
    if native["error"]:
        lines.append(f"  {native['error']}")
    else:
        lines += [
            f"  {native['library']}",
            f"  instruction sets: {', '.join(native['built_for'])}; in use: {native['isa']}",
        ]
        lines.append(f"  compiled against torch {native['torch']} with {native['compiler']}")
    cuda = found["cuda"]
    if cuda["error"]:
        lines.append(f"  {cuda['error']}")
    if cuda["built_for"]:
        lines.append(f"  {cuda['library']}: for compute capability {', '.join(cuda['built_for'])}")
        lines.append(f"  compiled against torch {cuda['torch']} with {cuda['compiler']}")
    lines += ["", "devices", *(f"  {name}: {what}" for name, what in found["devices"].items()), ""]
    if found["forced"]:
        lines += [f"PEFTRT_BACKEND={found['forced']} forces a backend", ""]
    width = max(len(op) for op in found["ops"])
    for device in _kinds():
        lines.append(f"{f'operation on {device}':{width + 2}}  " + "".join(f"{dtype:12}" for dtype in DTYPES))
        reasons: dict[str, None] = {}
        for op, devices in found["ops"].items():
            cells = devices[device]
            lines.append(f"  {op:{width}}  " + "".join(f"{cell['backend']:12}" for cell in cells.values()).rstrip())
            for cell in cells.values():
                reasons |= {f"  {op}: not {name}: {why}": None for name, why in cell["not"].items()}
        lines += [*reasons, ""]
    return "\n".join(lines).rstrip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _native_library() -> dict[str, Any]:
    stamp = _build.read_stamp() or {}
    error = _native.load()
    return {
        "library": str(_native.library_path()),
        "error": error,
        "isa": _native.isa(),
        "built_for": sorted(stamp.get("isa", {})),  # type: ignore[call-overload]
        "torch": stamp.get("torch"),
        "compiler": stamp.get("compiler"),
    }


def _cuda_library() -> dict[str, Any]:
    stamp = _build.read_stamp(target="cuda") or {}
    return {
        "library": str(_native.library_path("cuda")),
        "error": _native.load_cuda(),
        "built_for": stamp.get("archs", []),
        "torch": stamp.get("torch"),
        "compiler": stamp.get("compiler"),
    }


def _devices() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = {"cpu": f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads in torch"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        devices[f"cuda:{index}"] = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    if len(devices) == 1:
        devices["cuda"] = "none found" if torch.version.cuda or torch.version.hip else "this torch is for CPUs only"
    return devices


def _kinds() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _choices(op: str, device: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, dtype in DTYPES.items():
        if op in _BY_ADDRESS:
            choice = _BY_ADDRESS[op].choice(*_sample_by_address(op, device, dtype))
        else:
            choice = OPS[op].choice(*sample(op, device, dtype))
        found[name] = {"backend": choice.backend.name if choice.backend else "none", "not": dict(choice.reasons)}
    return found


def _sample_by_address(op: str, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """As ``sample``: the call of a table without rows."""
    tensor = torch.zeros(_SIZE, dtype=dtype, device=device)
    gradients = Gradients([tensor], [tensor], torch.zeros(1, 3, dtype=torch.int64, device=device))
    chunks = torch.zeros(0, 3 if op == NORM.name else 5, dtype=torch.int64, device=device)
    if op == NORM.name:
        return (
            gradients,
            chunks,
            tensor.new_zeros(0, dtype=torch.float64),
            1.0,
            tensor.new_zeros(2, dtype=torch.float32),
        )
    state, hyper = tensor.new_zeros(_SIZE, dtype=torch.uint8), tensor.new_zeros(1, 6, dtype=torch.float32)
    return state, chunks, gradients, hyper, None, 32, _SIZE, dtype, 0


def sample(op: str, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of a small call: which backend would serve it is asked, the call is not made.

    They go by the names in the operation's schema, which mean the same in all of them.
    """
    name, _, overload = op.partition(".")
    arguments = getattr(getattr(torch.ops.peftrt, name), overload or "default")._schema.arguments
    dense = torch.zeros(_SIZE, _SIZE)
    x = dense.to(device, dtype)
    nf4 = weight_args(op, NF4Weight.quantize(dense).to(device))
    one = torch.ones(1, dtype=torch.int32, device=device)
    lora_A, lora_B = x[:_RANK], x[:, :_RANK].contiguous()
    table = AdapterTable.stack([(lora_A, lora_B, 1.0)])
    names = {argument.name for argument in arguments}
    values: dict[str, Any] = {
        **nf4._asdict(),
        **vars(table),
        **dict.fromkeys(("x", "y", "dy", "dz", "out"), x),
        **dict.fromkeys(("row_scale", "x_scale", "y_scale"), torch.ones(_SIZE, device=device)),
        **dict.fromkeys(("lora_A", "down_weight"), lora_A),
        **dict.fromkeys(("lora_B", "up_weight"), lora_B),
        "down_bias": x[0, :_RANK],
        "up_bias": x[0],
        "residual": x,
        "activation": "relu",
        **dict.fromkeys(("xa", "inner"), torch.zeros(_SIZE, _RANK, device=device)),
        "slot_ids": torch.zeros(_SIZE, dtype=torch.int32, device=device),
        "shape": [_SIZE, _SIZE],
        "dtype": dtype,
        "double_quant": True,
        "bias": None,
        "splits": list(table.splits) if "values" in names else [],
        **dict.fromkeys(("needs_dx", "needs_dA", "needs_dB", "needs_dvalues", "needs_down", "needs_up"), True),
        "seed": one.long(),
        **dict.fromkeys(("dropout_p", "p"), 0.5),
    }
    if "absmax" not in names:
        values["weight"] = x
    scalings = {"float": 1.0, "Tensor": table.scaling}
    return tuple(scalings[str(a.type)] if a.name == "scaling" else values[a.name] for a in arguments)
