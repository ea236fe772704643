"""Random lives of a layer: made, given adapters, merged, copied, cast, saved; its output is known in fp64 all along.

A failure names its seed; ``pytest tests/test_fuzz.py --fuzz-seed=SEED`` repeats it.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt.formats.nf4 import BLOCK_SIZES, NF4Weight
from peftrt.nn import LoRALinear, QLoRALinear, routed
from peftrt.ops import _native
from tests.cases import LAYOUTS, laid_out, randn
from tests.nn.layers import conv1d, dense
from tests.tolerances import assert_close, assert_same_bits

STEPS = 12


class Walk:
    """A layer, and what it must compute, kept apart from it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.log: list[str] = []
        n, k = (self.draw.choice((1, 2, 7, 31, 48, 64, 65, 128)) for _ in range(2))
        self.block, self.nested = self.draw.choice(BLOCK_SIZES[:4]), self.draw.random() < 0.5
        linear = self.draw.choice((dense, conv1d))(k, n)
        weight = (
            linear.weight.detach()
            if linear.weight.shape == (n, k) and not hasattr(linear, "nf")
            else linear.weight.detach().t()
        )
        self.bias = linear.bias.detach().double().clone()
        self.layer: Any
        if self.draw.random() < 0.5:
            self.base = weight.double().clone()
            self.layer = LoRALinear.from_linear(linear, r=None)
        else:
            self.base = self.quantised(weight)
            self.layer = QLoRALinear.from_linear(linear, r=None, block_size=self.block, double_quant=self.nested)
        self.merged: Tensor | None = None
        self.adapters: dict[str, tuple[Tensor, Tensor, float, Tensor | None]] = {}
        self.active: dict[str, float] = {}
        self.say(
            f"{type(self.layer).__name__} {n}x{k}, block {self.block}, nested {self.nested}, {type(linear).__name__}"
        )

    def say(self, step: str) -> None:
        self.log.append(step)

    def quantised(self, weight: Tensor) -> Tensor:
        return NF4Weight.quantize(weight.float(), self.block, self.nested).dequantize().double()

    def delta(self, weights: dict[str, float]) -> Tensor:
        total = torch.zeros_like(self.base)
        for name, share in weights.items():
            lora_A, lora_B, scaling, magnitude = self.adapters[name]
            total = total + share * scaling * (lora_B @ lora_A)
            if magnitude is not None:  # and so alone
                rows = self.base + total
                total = rows * (magnitude / rows.norm(dim=1)).unsqueeze(1) - self.base
        return total

    def add(self) -> None:
        name = self.draw.choice(("default", "fr", "de", "x"))
        if name in self.adapters:
            return self.remove(name)
        r, alpha, rs = self.draw.randint(1, 9), self.draw.choice((1, 8, 0.5)), self.draw.random() < 0.3
        dora = self.merged is None and self.draw.random() < 0.3
        a = self.layer.add_adapter(name, r=r, lora_alpha=alpha, use_rslora=rs, use_dora=dora, init=False)
        if dora:
            with torch.no_grad():
                a.magnitude.mul_(0.5 + randn(len(a.magnitude), seed=r).abs())
        self.adapters[name] = self.values(name, alpha / (r**0.5 if rs else r))
        self.say(f"add {name}, r {r}, alpha {alpha}, rslora {rs}, dora {dora}")

    def values(self, name: str, scaling: float) -> tuple[Tensor, Tensor, float, Tensor | None]:
        """The adapter's tensors as they are now, in fp64."""
        a = self.layer.adapter(name)
        A, B, *magnitude = (parameter.detach().double().clone() for parameter in a.parameters)
        return A, B, scaling, magnitude[0] if magnitude else None

    def remove(self, name: str) -> None:
        if self.merged is None:
            self.layer.remove_adapter(name)
            del self.adapters[name]
            self.active.pop(name, None)
            self.say(f"remove {name}")

    def activate(self) -> None:
        if self.merged is None:
            names = self.draw.sample(sorted(self.adapters), self.draw.randint(0, len(self.adapters)))
            self.active = {name: self.draw.choice((1.0, 0.5, -2.0)) for name in names}
            alone = [name for name in names if self.adapters[name][3] is not None]
            if alone:
                self.active = {alone[0]: 1.0}
            self.layer.set_active(self.active)
            self.say(f"set_active {self.active}")

    def merge(self) -> None:
        if self.merged is not None:
            self.layer.unmerge()
            self.merged = None
            self.say("unmerge")
        elif self.active:
            total = (self.base + self.delta(self.active)).float()
            self.layer.merge(force=True)
            # a sum at a threshold may be quantised to its other side: the layer's own is taken once it is close enough
            self.merged = total.double()
            if isinstance(self.layer, QLoRALinear):
                found = self.layer.nf4_weight().dequantize().double()
                assert (found - self.quantised(total)).abs().mean() <= 0.01 * total.abs().mean() + 1e-6
                self.merged = found
            self.say(f"merge {self.active}")

    def train(self) -> None:
        """One step of gradient descent on the active adapters, here and there."""
        if self.merged is not None or not self.active:
            return
        self.layer.zero_grad()
        x = randn(3, self.base.shape[1], seed=self.draw.randrange(1000))
        self.layer(x).sum().backward()
        grads, squares = self.gradients(x, 1), self.gradients(x, 2)
        with torch.no_grad():
            for name in self.active:
                own = self.layer.adapter(name)
                for parameter, want, square in zip(own.parameters, grads[name], squares[name], strict=True):
                    assert_close(parameter.grad, want, intermediate=_size(square.sqrt()))
                    parameter -= 0.01 * parameter.grad
                self.adapters[name] = self.values(name, self.adapters[name][2])
        self.say("train")

    def gradients(self, x: Tensor, power: int) -> dict[str, list[Tensor]]:
        """Of the sum of the output, by adapter; with ``power`` 2 the squares of the terms that they are sums of."""
        found = {}
        for name, share in self.active.items():
            lora_A, lora_B, scaling, magnitude = self.adapters[name]
            A, B = (t.pow(power).requires_grad_() for t in (lora_A, lora_B))
            y = (share * scaling) ** power * (x.double().pow(power) @ A.t() @ B.t())
            leaves = [A, B]
            if magnitude is not None:
                m = magnitude.pow(power).requires_grad_()
                norm = (self.base + scaling * (lora_B @ lora_A)).norm(dim=1).pow(power)
                y = (y + x.double().pow(power) @ self.base.pow(power).t()) * (m / norm)
                leaves.append(m)
            found[name] = list(torch.autograd.grad(y.sum(), leaves))
        return found

    def copy(self) -> None:
        how = self.draw.choice(("deepcopy", "pickle", "torch.save", "state_dict", "to"))
        if how == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        elif how == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        elif how == "torch.save":
            buffer = io.BytesIO()
            torch.save(self.layer, buffer)
            self.layer = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        elif how == "state_dict":
            self.layer.load_state_dict({key: value.clone() for key, value in self.layer.state_dict().items()})
        else:
            self.layer = self.layer.to("cpu").to(torch.float32).train(self.draw.random() < 0.5)
        self.say(how)

    def step(self) -> None:
        self.draw.choice((self.add, self.add, self.activate, self.activate, self.merge, self.train, self.copy))()
        self.check()

    def check(self) -> None:
        n, k = self.base.shape
        lead = self.draw.choice(((), (1,), (4,), (2, 3), (0,), (33,)))
        layout = self.draw.choice(LAYOUTS)
        x = laid_out(randn(*lead, k, seed=self.draw.randrange(1000)), layout)
        self.say(f"  x {list(lead)} {layout}")
        weight = self.base + self.delta(self.active) if self.merged is None else self.merged
        expected = x.double() @ weight.t() + self.bias
        y = self.layer(x)
        assert y.shape == (*lead, n)
        assert_close(y, expected, roundings=4, intermediate=self.size(x, weight))
        with torch.set_grad_enabled(self.draw.random() < 0.5):
            assert_same_bits(self.layer(x), y)
        if _native.load() is None:
            with peftrt.backend("reference"):
                assert_close(self.layer(x), expected, roundings=4, intermediate=self.size(x, weight))
        assert_close(self.layer.to_linear()(x), expected, roundings=16, intermediate=self.size(x, weight))
        if self.merged is None and len(lead) > 1:
            self.check_rows(x)

    def check_rows(self, x: Tensor) -> None:
        lora = [name for name, values in self.adapters.items() if values[3] is None]
        names = [self.draw.choice((*lora, None, "unknown")) for _ in range(x.shape[0])]
        with routed(self.layer.owner, names):
            y = self.layer(x)
        for entry, name in enumerate(names):
            weight = self.base + (self.delta({name: 1.0}) if name in self.adapters else 0)
            want = x[entry].double() @ weight.t() + self.bias
            assert_close(y[entry], want, roundings=4, intermediate=self.size(x, weight))

    def size(self, x: Tensor, weight: Tensor) -> float:
        """Magnitude of the sums when nothing cancels."""
        parts = self.base.pow(2) + self.delta(self.active).pow(2) + weight.pow(2)
        return _size((x.double().pow(2) @ parts.t()).sqrt())


def _size(t: Tensor) -> float:
    return t.detach().abs().max().item() if t.numel() else 0.0


def test_a_layer_computes_what_its_history_says(walk_seed: int) -> None:
    walk = Walk(walk_seed)
    try:
        walk.check()
        for _ in range(STEPS):
            walk.step()
    except Exception as error:
        history = "\n  ".join(walk.log)
        pytest.fail(f"pytest tests/test_fuzz.py --fuzz-seed={walk_seed}\n  {history}\n{type(error).__name__}: {error}")
