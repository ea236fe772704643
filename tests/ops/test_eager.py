"""Which calls pass the dispatcher by, and which must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from peftrt import ops
from peftrt.ops import _define, _eager
from peftrt.ops._weight import weight_args
from tests.cases import NATIVE, nf4

W = nf4(6, 64)
OP = _define.OPS["nf4_linear"]
ARGS = (*weight_args("nf4_linear", W), None)


class Seen(TorchDispatchMode):
    """Notes the operations that come through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def linear(x: Tensor) -> Tensor:
    return ops.nf4_linear(x, W)


def test_a_plain_call_is_not_observed() -> None:
    assert _eager.unobserved((torch.ones(2, 64), *ARGS))
    assert _eager.unobserved((torch.nn.Parameter(torch.ones(2, 64), requires_grad=False), *ARGS))


def test_gradients_are_recorded_where_autograd_asks_for_them() -> None:
    x = torch.ones(2, 64, requires_grad=True)
    assert not _eager.recorded((torch.ones(2, 64), *ARGS))
    assert _eager.recorded((x, *ARGS))
    assert linear(x).requires_grad
    with torch.no_grad():
        assert not _eager.recorded((x, *ARGS))
        assert not linear(x).requires_grad


@pytest.mark.parametrize("op", ["nf4_linear", "lora_linear", "dropout"])
def test_a_recorded_call_passes_the_dispatcher_by_and_has_the_same_gradients(op: str) -> None:
    inputs = [torch.randn(2, 64, requires_grad=True), torch.randn(3, 64), torch.randn(6, 3)]
    calls = {
        "nf4_linear": (inputs[0], *ARGS),
        "lora_linear": (inputs[0], *ARGS[:-1], *inputs[1:], 0.5, None, 0.25, torch.tensor([3]), None, []),
        "dropout": (inputs[0], torch.tensor([3]), 0.25),
    }
    results = []
    for call in (_define.OPS[op], _define.OPS[op].registered):
        y = call(*calls[op])
        y = y if isinstance(y, Tensor) else y[0]
        results.append((type(y.grad_fn).__name__, y, torch.autograd.grad(y.sum(), inputs[0])[0]))
    (own, *first), (generated, *second) = results
    assert own == f"{op}Backward"
    assert own != generated
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_subclass_is_not() -> None:
    class Own(Tensor):
        pass

    assert not _eager.unobserved((torch.ones(2, 64).as_subclass(Own), *ARGS))


def test_a_dispatch_mode_sees_the_operation() -> None:
    with Seen() as seen:
        linear(torch.ones(2, 64))
    assert "peftrt.nf4_linear.default" in seen.names


def test_a_fake_call_gives_a_fake_result() -> None:
    with FakeTensorMode() as mode:
        x = torch.empty(2, 64)
        fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in ARGS]
        assert OP(x, *fakes).shape == (2, 6)


def test_a_trace_has_the_operation() -> None:
    graph = make_fx(linear)(torch.ones(2, 64))
    assert any("peftrt.nf4_linear" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_a_transform_is_not_passed_by(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    asked: list[bool] = []

    def probe(x: Tensor) -> Tensor:
        asked.append(_eager.unobserved((x, *ARGS)))
        return x * 2

    transform(probe)(torch.ones(2, 64))
    assert asked == [False]


def test_forward_mode_is_not_passed_by() -> None:
    with forward_ad.dual_level():
        assert not _eager.unobserved((torch.ones(2, 64), *ARGS))


def test_it_compiles_whole() -> None:
    x = torch.randn(2, 64)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize("name", [NATIVE])
def test_both_ways_give_the_same_bits_and_the_same_words(name: str) -> None:
    for m in (1, 5, 20):
        x = torch.randn(m, 64)
        assert torch.equal(OP(x, *ARGS), OP.registered(x, *ARGS)), name
    for bad in (torch.ones(2, 63), torch.ones(64, dtype=torch.int64), torch.tensor(1.0)):
        words = []
        for call in (OP, OP.registered):
            with pytest.raises((TypeError, ValueError)) as error:
                call(bad, *ARGS)
            words.append(str(error.value))
        assert words[0] == words[1]
