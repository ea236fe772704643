"""How A and B begin: against the definitions, and against HF peft's."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import LoRALinear, QLoRALinear, initialisation
from peftrt.nn.initialisation import loftq, parse, principal
from tests.cases import randn
from tests.nn.layers import K, N, conv1d, dense, input_of
from tests.tolerances import assert_close, assert_same_bits


def heavy_tailed(directions: int = 4, n: int = 96, k: int = 128) -> Tensor:
    """Student's t with 3 degrees of freedom, as weights with outliers have; some directions stand out."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(5, n, k, generator=generator)
    low_rank = torch.randn(n, directions, generator=generator) @ torch.randn(directions, k, generator=generator)
    return normal[0] / (normal[1:4].square().mean(0)).sqrt() + low_rank


def test_names_are_taken_apart() -> None:
    assert [parse(init).kind for init in (True, False, "gaussian", "loftq")] == [
        "kaiming",
        "random",
        "gaussian",
        "loftq",
    ]
    assert parse("pissa") == ("pissa", None)
    assert parse("pissa_niter_16") == ("pissa", 16)
    assert [parse(init).takes_weight for init in (True, "orthogonal", "pissa_niter_0", "loftq")] == [0, 0, 1, 1]
    for wrong in ("pissa_niter_", "pissa_niter_-1", "pissa_niter_٣", "Gaussian", "eva", 1, None):
        with pytest.raises(ValueError, match="init must be True, False"):
            parse(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", [1.0, 0.25, 3.0])
def test_principal_part_is_the_best_of_its_rank(scaling: float) -> None:
    weight = heavy_tailed()
    lora_A, lora_B = principal(weight, 6, scaling)
    assert (lora_A.shape, lora_B.shape) == ((6, 128), (96, 6))
    left = torch.linalg.svdvals(weight.double() - scaling * lora_B.double() @ lora_A.double())
    every = torch.linalg.svdvals(weight.double())
    assert_close(left[:-6], every[6:], torch.float32)
    assert left[-6:].max() < 1e-4  # the six directions are gone
    # both halves have the same share of each direction
    assert_close(lora_A.norm(dim=1), lora_B.norm(dim=0), roundings=2)


def test_randomised_part_is_close_to_the_exact_one_and_always_the_same() -> None:
    weight = heavy_tailed()
    exact = [half.double() for half in principal(weight, 4, 1.0)]
    torch.manual_seed(1)
    first = principal(weight, 4, 1.0, niter=0)
    torch.manual_seed(2)
    errors = []
    for niter in (0, 2, 8):
        lora_A, lora_B = principal(weight, 4, 1.0, niter)
        errors.append(((lora_B @ lora_A).double() - exact[1] @ exact[0]).norm().item())
    assert errors[0] > 10 * errors[1]
    assert errors[2] < 1e-3
    for half, again in zip(first, principal(weight, 4, 1.0, niter=0), strict=True):
        assert_same_bits(half, again)


def test_signs_are_fixed() -> None:
    weight = heavy_tailed()
    for niter in (None, 4):
        lora_A, lora_B = principal(weight, 4, 1.0, niter)
        largest = lora_B.abs().argmax(0, keepdim=True)
        assert (lora_B.gather(0, largest) > 0).all()
        # of the negative weight, the same B, and A's signs turned
        negative_A, negative_B = principal(-weight, 4, 1.0, niter)
        assert_close(negative_B, lora_B, roundings=4)
        assert_close(negative_A, -lora_A, roundings=4)


def test_loftq_loses_less_with_every_iteration() -> None:
    weight = heavy_tailed()
    quantize = partial(NF4Weight.quantize, block_size=64, double_quant=True)
    plain = (weight - quantize(weight).dequantize(torch.float32)).norm().item()
    errors = [plain]
    for iterations in range(1, 6):
        lora_A, lora_B, base = loftq(weight, 8, 0.5, iterations, quantize)
        errors.append((weight - base.dequantize(torch.float32) - 0.5 * lora_B @ lora_A).norm().item())
    assert all(after < before for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.85 * plain


def test_loftq_layer_is_closer_to_the_weight() -> None:
    options = {"r": 8, "lora_alpha": 4, "init": "loftq", "loftq_config": {"loftq_iter": 3}}
    for make, original in ((dense, randn(N, K, seed=1)), (conv1d, randn(K, N, seed=1).t())):
        plain = QLoRALinear.from_linear(make(), r=None).adapted_weight({})
        layer = QLoRALinear.from_linear(make(), **options)
        error = (layer.adapted_weight({"default": 1.0}) - original).norm()
        assert error < 0.9 * (plain - original).norm()
        assert layer.principal_pair("default") is None
        x = input_of(layer)
        assert_close(layer(x), x @ layer.adapted_weight({"default": 1.0}).t() + layer.bias, roundings=2)
        assert layer.nf4_weight().dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRALinear.from_linear(dense(), init="loftq"), "this base is dense"),
        (lambda: QLoRALinear.from_linear(dense(), r=None).add_adapter("fr", init="loftq"), "before it was quantised"),
        (lambda: QLoRALinear.from_linear(dense(), init="loftq", loftq_config={"loftq_bits": 8}), "must be 4"),
        (lambda: QLoRALinear.from_linear(dense(), init="loftq", r=49), "a rank of at most 48"),
    ],
)
def test_loftq_is_refused_with_the_reason(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_orthogonal_halves() -> None:
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(dense(), r=16, init="orthogonal")
    A, B = layer.lora_A.double(), layer.lora_B.double()
    assert (B @ A).abs().max() < 1e-7
    assert min(A.norm(), B.norm()) > 1
    assert torch.linalg.matrix_rank(A, tol=1e-4) == torch.linalg.matrix_rank(B, tol=1e-4) == 8
    x = input_of(layer)
    assert_close(layer(x), dense()(x), roundings=2)


def test_draws_do_not_depend_on_the_weight_and_follow_the_seed() -> None:
    for init in (True, False, "gaussian", "orthogonal"):
        pairs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            pairs.append(initialisation.draw(init, 4, N, K, torch.bfloat16, torch.device("cpu")))
        assert all(half.dtype == torch.bfloat16 and half.is_contiguous() for half in pairs[0])
        assert_same_bits(pairs[0][0], pairs[1][0])
        assert not torch.equal(pairs[0][0], pairs[2][0])


class TestAgainstPeft:
    """HF peft's layers begin as ours do, up to signs and rounding: compared are products and what is left."""

    @staticmethod
    def layer(linear: nn.Module, **fields: Any) -> Any:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["0"], r=6, lora_alpha=9, **fields)
        return peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]

    @pytest.mark.parametrize("use_rslora", [False, True])
    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
    def test_pissa(self, init: str, use_rslora: bool) -> None:
        linear = nn.Linear(128, 96)
        linear.weight.data = heavy_tailed(6)
        torch.manual_seed(0)
        ours = LoRALinear.from_linear(linear, r=6, lora_alpha=9, init=init, use_rslora=use_rslora)
        linear = nn.Linear(128, 96)
        linear.weight.data = heavy_tailed(6)
        theirs = self.layer(linear, init_lora_weights=init, use_rslora=use_rslora)
        # the randomised ones draw different numbers
        limit = 1e-6 if init == "pissa" else 1e-4
        scale = heavy_tailed().abs().max().item()
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        assert (ours.lora_B @ ours.lora_A - product).abs().max() <= limit * scale
        assert (ours.weight - theirs.base_layer.weight).abs().max() <= limit * scale
        for half in (ours.lora_A, theirs.lora_A["default"].weight):
            assert half.norm() > 1

    def test_orthogonal(self) -> None:
        torch.manual_seed(0)
        theirs = self.layer(nn.Linear(400, 300), init_lora_weights="orthogonal")
        ours = LoRALinear.from_linear(nn.Linear(400, 300), r=6, init="orthogonal")
        for half, other in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
            weight = other["default"].weight
            assert half.shape == weight.shape
            assert half.std().item() == pytest.approx(weight.std().item(), rel=0.1)
            assert torch.linalg.matrix_rank(half, tol=1e-3) == torch.linalg.matrix_rank(weight, tol=1e-3) == 3
        assert (theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight).abs().max() < 1e-5
