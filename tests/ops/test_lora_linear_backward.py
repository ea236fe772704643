"""lora_linear_backward: the gradients of lora_linear as one operation."""

from __future__ import annotations

import itertools

import pytest
import torch

import peftrt
from peftrt.ops._weight import weight_args
from tests.ops.test_lora_linear import SCALING, base, combinations, randn
from tests.tolerances import assert_same_bits


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_opcheck_of_the_backward(kind: str, backend: str, p: float) -> None:
    weight = weight_args("lora_linear", base(kind, 6, 64, torch.float32))
    seed = torch.tensor([3]) if p else None
    for lead in ((0,), (3,), (2, 3)):
        dy, x, xa, A, B = (randn(*s) for s in ((*lead, 6), (*lead, 64), (*lead, 2), (2, 64), (6, 2)))
        for wanted in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            args = (dy, x, xa, *weight, A, B, SCALING, p, seed, None, *wanted, [])
            with peftrt.backend(backend):
                torch.library.opcheck(torch.ops.peftrt.lora_linear_backward.default, args)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_only_the_gradients_that_are_wanted_are_computed(kind: str, backend: str, p: float) -> None:
    weight = weight_args("lora_linear", base(kind, 6, 64, torch.float32))
    tensors = [randn(*s, seed=i) for i, s in enumerate(((3, 6), (3, 64), (3, 2)))]
    rest = (*weight, randn(2, 64), randn(6, 2), SCALING, p, torch.tensor([3]) if p else None, None)
    with peftrt.backend(backend):
        whole = torch.ops.peftrt.lora_linear_backward(*tensors, *rest, True, True, True, [])
        for wanted in itertools.product((True, False), repeat=3):
            part = torch.ops.peftrt.lora_linear_backward(*tensors, *rest, *wanted, [])
            for got, all_of_it, want in zip(part, whole, wanted, strict=True):
                assert got.numel() == (all_of_it.numel() if want else 0)
                if want:
                    assert_same_bits(got, all_of_it)
