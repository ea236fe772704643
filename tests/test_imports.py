"""What importing peftrt does, and does not do, seen from a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

STRANGERS = ("transformers", "peft", "bitsandbytes", "adapters", "triton", "matplotlib", "rich")

BLOCK = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {STRANGERS!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Block())
"""


def python(code: str, **environment: str) -> str:
    """The output of a fresh interpreter, away from the checkout's own folder."""

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | environment,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_leaves_cuda_and_other_packages_alone() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import peftrt
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert not new & set({STRANGERS!r}), sorted(new & set({STRANGERS!r}))
assert not torch.cuda.is_initialized()
assert "kernels" not in sys.modules
print(len(peftrt.__all__))
"""
    assert int(python(code)) > 0


def test_public_names_exist_and_are_documented() -> None:
    import peftrt

    for name in peftrt.__all__:
        assert getattr(peftrt, name).__doc__, f"peftrt.{name} has no docstring"
    for name in peftrt.ops.__all__:
        assert getattr(peftrt.ops, name).__doc__, f"peftrt.ops.{name} has no docstring"


def test_import_reads_no_setting_but_when_it_is_used() -> None:
    """A bad PEFTRT_BACKEND is told by the first operation, by name, not by an import that fails."""
    code = """
import peftrt, torch
try:
    peftrt.NF4Weight.quantize(torch.zeros(64))
except ValueError as error:
    print(error)
"""
    message = python(code, PEFTRT_BACKEND="fastest")
    assert "PEFTRT_BACKEND" in message
    assert "fastest" in message


def test_core_runs_without_its_peers() -> None:
    """The import of peft, bitsandbytes, adapters, transformers and triton is blocked, and training and serving work."""
    code = (
        BLOCK
        + """
import torch, peftrt
from peftrt import ops
w = torch.randn(96, 128)
nf4 = peftrt.NF4Weight.quantize(w)
assert (nf4.dequantize() - w).abs().mean() < 0.15
again = peftrt.NF4Weight.from_bnb(nf4.to_bnb())
assert torch.equal(again.dequantize(), nf4.dequantize())
x = torch.randn(4, 128, requires_grad=True)
A, B = torch.randn(8, 128, requires_grad=True), torch.randn(96, 8, requires_grad=True)
ops.lora_linear(x, nf4, A, B, 0.5, dropout_p=0.1).sum().backward()
assert all(t.grad.abs().sum() > 0 for t in (x, A, B))
table = ops.AdapterTable.stack([(A, B, 0.5), (A * 2, B, 1.0)])
ids = torch.tensor([0, 1, -1, 0], dtype=torch.int32)
y = ops.multi_lora_linear(x, nf4, table, ids)
assert torch.allclose(y[2], ops.nf4_linear(x, nf4)[2], atol=1e-5)
layer = peftrt.QLoRALinear.from_linear(torch.nn.Linear(128, 96), r=4, lora_alpha=8)
layer(x).sum().backward()
assert layer.lora_B.grad.abs().sum() > 0
state = layer.state_dict()
layer.load_state_dict(state)
print("ok")
"""
    )
    assert python(code) == "ok"


@pytest.mark.parametrize("name", ["peft", "bitsandbytes"])
def test_the_block_blocks(name: str) -> None:
    code = (
        BLOCK
        + f"""
try:
    import {name}.anything
except ModuleNotFoundError as error:
    print(error)
"""
    )
    assert python(code).startswith("blocked: ")
