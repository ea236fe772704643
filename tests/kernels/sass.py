"""What machine code of a kernel shows without a device: spills, tensor-core instructions, races of wgmma."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_BRANCH = re.compile(r"^BRA\b.*?\(?(\.L\w+)")
# of the instructions with a register in the first place, those that do not write it
_NO_RESULT = ("ST", "LDGSTS", "BAR", "WARP", "UT", "SYNCS", "RED", "BRA", "CCTL", "MEMBAR", "DEPBAR")
Line = tuple[str, str]  # ("label", name) or ("instruction", text)


def disassemble(cubin: bytes) -> list[Line]:
    """The program's labels and instructions, without predicates."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Line]:
    lines: list[Line] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            lines.append(("label", label[1]))
        elif instruction := _INSTRUCTION.match(line):
            lines.append(("instruction", instruction[1]))
    return lines


def count(lines: list[Line], *names: str) -> int:
    """How many instructions have one of these names, whatever their modifiers."""
    return sum(kind == "instruction" and re.split(r"[.\s]", text)[0] in names for kind, text in lines)


def races(lines: list[Line]) -> list[str]:
    """Instructions that write what a wgmma in flight still reads: registers of its A operand, or shared memory by STS.

    (The decoded weight has one buffer in shared memory, which the next step overwrites.) Each loop is walked twice, so
    that the writes of the next step are seen; waits are counted as the hardware does, by committed groups.
    """
    found = _races_along(lines)
    position = {text: i for i, (kind, text) in enumerate(lines) if kind == "label"}
    for i, (kind, text) in enumerate(lines):
        target = _BRANCH.match(text) if kind == "instruction" else None
        if target and position.get(target[1], i) < i:
            body = lines[position[target[1]] : i + 1]
            found += _races_along(body + body)
    return found


def _races_along(lines: list[Line]) -> list[str]:
    groups: list[set[int]] = []  # committed and not waited for: the registers that each reads
    pending: set[int] | None = None  # of the group not yet committed
    found = []
    for kind, text in lines:
        if kind == "label":
            continue
        name = text.split()[0]
        if name.startswith("HGMMA"):
            operand = re.match(r"HGMMA\S*\s+R\d+,\s*R(\d+)", text)
            pending = (pending or set()) | (set(range(int(operand[1]), int(operand[1]) + 4)) if operand else set())
            if "gsb0" in text:
                groups.append(pending)
                pending = None
            continue
        if "DEPBAR" in name and "gsb0" in text:
            left = int(text.rsplit(",", 1)[1].strip(), 16)
            groups = groups[len(groups) - left :] if left else []
            continue
        flying = [*groups, *([pending] if pending is not None else [])]
        if name.startswith("STS") and flying:
            found.append(f"{text} writes shared memory under a wgmma in flight")
        if written(text) & set().union(*flying):
            found.append(f"{text} writes a register that a wgmma in flight reads")
    return found


def written(text: str) -> set[int]:
    """The registers that an instruction writes."""
    name = text.split()[0]
    result = re.match(r"\S+\s+R(\d+)\b", text)
    if result is None or name.startswith(_NO_RESULT):
        return set()
    width = 4 if re.search(r"\.128|\.M88\.4", name) else 2 if re.search(r"\.64|WIDE", name) else 1
    return set(range(int(result[1]), int(result[1]) + width))


def serialised(ptx: str) -> list[str]:
    """ptxas' own warnings that it had to wait after every wgmma (C75xx)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            TOOLS / "ptxas",
            "-v",
            "--gpu-name=sm_90a",
            "--fmad=false",
            source,
            "-o",
            Path(folder) / "kernel.cubin",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if "C75" in line]
