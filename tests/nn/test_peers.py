"""The modules against the libraries that users come from: HF peft's LoRA layer, bitsandbytes' Linear4bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peftrt.nn import LoRALinear, NF4Linear, QLoRALinear
from tests.cases import FLOATS, bitsandbytes_eager, randn
from tests.nn.layers import K, M, N, adapted, dense
from tests.tolerances import assert_close, assert_same_bits

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")


def peft_layer(linear: nn.Module, layer: Any, **config: Any) -> Any:
    """peft's layer over ``linear`` with the matrices of ours."""
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, **config}
    holder = nn.Sequential(linear)
    holder.is_loaded_in_4bit = isinstance(linear, bnb.nn.Linear4bit)  # what peft asks transformers' models
    model = peft.get_peft_model(holder, peft.LoraConfig(target_modules=["0"], **settings))
    theirs = model.base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return theirs


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_lora_linear_equals_peft(bias: bool, rslora: bool) -> None:
    ours = adapted(LoRALinear, dense(bias=bias), use_rslora=rslora)
    theirs = peft_layer(dense(bias=bias), ours, use_rslora=rslora)
    results = []
    for layer, A, B in (
        (ours, ours.lora_A, ours.lora_B),
        (theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
    ):
        x = randn(2, M, K, seed=9).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, A.grad, B.grad))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_merged_weight_equals_peft() -> None:
    ours = adapted(LoRALinear)
    theirs = peft_layer(dense(), ours)
    ours.merge()
    theirs.merge()
    assert_close(ours.weight, theirs.base_layer.weight)


def test_initialisation_draws_what_peft_draws() -> None:
    torch.manual_seed(5)
    ours = LoRALinear.from_linear(dense(), r=4, lora_alpha=6)
    torch.manual_seed(5)
    model = peft.get_peft_model(nn.Sequential(dense()), peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6))
    theirs = model.base_model.model[0]
    assert ours.lora_A.std().item() == pytest.approx(theirs.lora_A["default"].weight.std().item(), rel=0.1)
    assert (theirs.lora_B["default"].weight == 0).all()
    assert (ours.lora_B == 0).all()
    assert ours.scaling == theirs.scaling["default"]


def linear4bit(dtype: torch.dtype, nested: bool) -> Any:
    layer = bnb.nn.Linear4bit(K, N, quant_type="nf4", compress_statistics=nested, compute_dtype=dtype)
    layer.load_state_dict(dense().state_dict())
    return layer.to("cpu").to(dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lead", [(1,), (M,), (2, 3)], ids=str)
def test_nf4_linear_equals_linear4bit(lead: tuple[int, ...], dtype: torch.dtype, nested: bool) -> None:
    with bitsandbytes_eager():
        theirs = linear4bit(dtype, nested)
        ours = NF4Linear(K, N, double_quant=nested, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        x = randn(*lead, K, dtype=dtype)
        values = bnb.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state).to(dtype)
        assert_same_bits(ours.nf4_weight().dequantize(dtype), values)
        y = theirs(x)
    exact = x.double() @ values.double().t() + ours.bias.double()
    assert_close(ours(x), exact)
    assert_close(y, exact, roundings=3)  # theirs rounds the product before it adds the bias
    assert_close(ours(x), y, roundings=3)


def test_qlora_equals_peft_over_linear4bit() -> None:
    with bitsandbytes_eager():
        base = linear4bit(torch.float32, True)
        ours = QLoRALinear(K, N, r=4, lora_alpha=6, init=False)
        ours.load_state_dict(base.state_dict(), strict=False)
        theirs = peft_layer(base, ours)
        assert "4bit" in type(theirs).__name__
        results = []
        for layer, A, B in (
            (ours, ours.lora_A, ours.lora_B),
            (theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight),
        ):
            x = randn(M, K, seed=9).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, A.grad, B.grad))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("make", [lambda: NF4Linear.from_linear(dense()), lambda: adapted(QLoRALinear)])
def test_linear4bit_reads_what_the_layer_holds(make: Callable[[], Any]) -> None:
    ours = make()
    keys = ours.nf4_weight().to_bnb()
    with bitsandbytes_eager():
        theirs = bnb.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        theirs.weight = bnb.nn.Params4bit.from_prequantized(keys.pop("weight"), keys, device="cpu")
        x = randn(M, K)
        y = theirs(x)
    assert_close(y, x.double() @ ours.nf4_weight().dequantize().double().t())
