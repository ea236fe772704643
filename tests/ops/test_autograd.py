"""What every differentiable operation promises of its gradient: repeated, recomputed, offloaded, compiled, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftrt import ops
from peftrt.ops import AdapterTable
from tests.cases import nf4, randn
from tests.tolerances import assert_close, assert_same_bits

N, K, M, R = 24, 64, 10, 4


class Site(NamedTuple):
    """An operation as a function of x and of its trainable tensors."""

    run: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def _multi(x: Tensor, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor, b: Tensor | None, weight: object) -> Tensor:
    ids = torch.tensor([0, 1, -1, 1, 0, 0, -1, 1, 1, 0], dtype=torch.int32)
    return ops.multi_lora_linear(x, weight, AdapterTable.stack([(A, B, 0.5), (A2, B2, 2.0)]), ids, b)


LORA, BIAS = ((R, K), (N, R)), ((N,),)
WEIGHT = nf4(N, K)
SITES = {
    "nf4_linear": Site(lambda x, b: ops.nf4_linear(x, WEIGHT, b), BIAS),
    "lora_linear, nf4": Site(lambda x, A, B, b: ops.lora_linear(x, WEIGHT, A, B, 0.5, b), LORA + BIAS),
    "lora_linear, dense": Site(lambda x, A, B, b, w: ops.lora_linear(x, w, A, B, 0.5, b), (*LORA, *BIAS, (N, K))),
    "lora_linear, dropout": Site(
        lambda x, A, B, b: ops.lora_linear(x, WEIGHT, A, B, 0.5, b, dropout_p=0.3), LORA + BIAS
    ),
    "lora_linear, magnitude": Site(
        lambda x, A, B, b, m: ops.lora_linear(x, WEIGHT, A, B, 0.5, b, dropout_p=0.3, seed=5, magnitude=m),
        (*LORA, *BIAS, (N,)),
    ),
    "lora_linear, dense, magnitude": Site(
        lambda x, A, B, b, m, w: ops.lora_linear(x, w, A, B, 0.5, b, magnitude=m), (*LORA, *BIAS, (N,), (N, K))
    ),
    "multi_lora_linear, nf4": Site(
        lambda x, A, B, A2, B2, b: _multi(x, A, B, A2, B2, b, WEIGHT), (*LORA, (2, K), (N, 2), *BIAS)
    ),
    "multi_lora_linear, dense": Site(
        lambda x, A, B, A2, B2, b, w: _multi(x, A, B, A2, B2, b, w), (*LORA, (2, K), (N, 2), *BIAS, (N, K))
    ),
    "multi_lora_linear, no base": Site(
        lambda x, A, B, A2, B2: _multi(x, A, B, A2, B2, None, None), (*LORA, (2, K), (N, 2))
    ),
}
BOTTLENECK = ((R, K), (R,), (K, R), (K,))
SITES |= {
    "bottleneck": Site(lambda x, *adapter: ops.bottleneck(x, x, *adapter, 0.5, "gelu"), BOTTLENECK),
    "bottleneck, another residual": Site(
        lambda x, *adapter: ops.bottleneck(x, x.flip(0), *adapter, 0.5, "silu"), BOTTLENECK
    ),
}
sites = pytest.mark.parametrize("site", SITES.values(), ids=SITES.keys())


def tensors(site: Site, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((M, K), *site.shapes)
    return [randn(*shape, seed=seed + i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def gradients(site: Site, inputs: list[Tensor], run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    torch.manual_seed(7)  # of the dropout
    y = (run or site.run)(*inputs)
    for t in inputs:
        t.grad = None
    (y * y).sum().backward()
    grads = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    return grads


def equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(got, want)


@sites
def test_gradients_are_not_zero(site: Site) -> None:
    """Without this, the equalities below would say nothing."""
    assert all(grad.abs().sum() > 0 for grad in gradients(site, tensors(site)))


@sites
def test_backward_twice_through_one_graph(site: Site) -> None:
    inputs = tensors(site)
    loss = site.run(*inputs).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    equal(list(torch.autograd.grad(loss, inputs)), list(first))


@sites
def test_two_forwards_before_two_backwards(site: Site) -> None:
    one, two = tensors(site), tensors(site, seed=50)
    alone = gradients(site, one), gradients(site, two)
    torch.manual_seed(7)
    first = site.run(*one).square().sum()
    torch.manual_seed(7)
    second = site.run(*two).square().sum()
    equal(list(torch.autograd.grad(first, one)), alone[0])
    equal(list(torch.autograd.grad(second, two)), alone[1])


@sites
def test_gradients_accumulate(site: Site) -> None:
    inputs = tensors(site)
    once = gradients(site, inputs)
    for _ in range(2):
        torch.manual_seed(7)
        site.run(*inputs).square().sum().backward()
    equal([t.grad for t in inputs], [grad + grad for grad in once])


@sites
def test_only_what_is_asked_for_gets_a_gradient(site: Site) -> None:
    """Each input alone: the others' flags change neither its gradient nor what the backward returns."""
    inputs = tensors(site)
    everything = gradients(site, inputs)
    for i, want in enumerate(everything):
        alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        torch.manual_seed(7)
        site.run(*alone).square().sum().backward()
        assert_same_bits(alone[i].grad, want)
        assert all(t.grad is None for j, t in enumerate(alone) if j != i)


@sites
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_gives_the_same_gradients(site: Site, use_reentrant: bool) -> None:
    inputs = tensors(site)
    again = gradients(site, inputs, lambda *args: checkpoint(site.run, *args, use_reentrant=use_reentrant))
    equal(again, gradients(site, inputs))


@sites
def test_every_saved_tensor_passes_the_hooks(site: Site) -> None:
    """A hook that hands back other values changes the gradients: nothing is kept where hooks do not see it."""
    inputs = tensors(site)
    expected = gradients(site, inputs)
    with torch.autograd.graph.save_on_cpu():
        equal(gradients(site, inputs), expected)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        torch.manual_seed(7)
        y = site.run(*inputs)
    kept = [t.detach().clone() for t in inputs]
    with torch.no_grad():
        for t in inputs:
            t.fill_(float("nan"))  # what was not packed is spoilt now
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    fresh = [t.requires_grad_() for t in kept]
    torch.manual_seed(7)
    z = site.run(*fresh)
    equal(list(grads), list(torch.autograd.grad(z, fresh, torch.ones_like(z))))


@sites
def test_no_tensor_hangs_on_the_graph_past_the_hooks(site: Site) -> None:
    """A tensor that is an attribute of the node is neither offloaded, nor freed, nor checked for changes."""
    node = site.run(*tensors(site)).grad_fn
    assert node is not None
    held = {name: value for name, value in vars(node).items() if _holds_tensor(value)}
    assert not held, f"saved past save_for_backward: {sorted(held)}"
    assert "peftrt_wishes" in vars(node)  # the attributes of the right node were looked at


def _holds_tensor(value: object) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(_holds_tensor(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


@sites
def test_changing_a_saved_tensor_in_place_is_told(site: Site) -> None:
    inputs = tensors(site)
    if site is SITES["nf4_linear"]:
        pytest.skip("only codes and scales are saved")
    y = site.run(*inputs)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@sites
def test_inference_mode_and_no_grad_give_the_same_values(site: Site) -> None:
    inputs = tensors(site)
    torch.manual_seed(7)
    expected = site.run(*inputs)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            torch.manual_seed(7)
            y = site.run(*inputs)
        assert not y.requires_grad
        assert_same_bits(y, expected)


@sites
def test_autocast_computes_in_its_dtype(site: Site) -> None:
    if site is SITES["lora_linear, dense, magnitude"]:
        pytest.skip("the norm is of the weight before it is cast: see tests/ops/test_row_scale.py")
    if site in (SITES["bottleneck"], SITES["bottleneck, another residual"]):
        pytest.skip("a residual in fp32 is not rounded: see tests/ops/test_bottleneck.py")
    inputs = tensors(site)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(7)
        y = site.run(*inputs)
        grads = torch.autograd.grad(y.square().sum(), inputs)
    assert y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    # the adapters stay fp32, and so does a magnitude, which comes last; x, a dense weight and a bias are cast
    magnitude = inputs[-1] if site is SITES["lora_linear, magnitude"] else None
    shapes = [(M, K), (N,), (N, K)]
    cast = [t.detach().bfloat16() if t.shape in shapes and t is not magnitude else t.detach() for t in inputs]
    torch.manual_seed(7)
    assert_same_bits(y, site.run(*cast))


@sites
def test_compile_without_graph_breaks(site: Site) -> None:
    if site is SITES["lora_linear, dropout"]:
        pytest.skip("the seed is drawn inside: see test_compile_with_dropout")
    inputs = tensors(site)
    torch._dynamo.reset()
    compiled = torch.compile(site.run, fullgraph=True, backend="aot_eager")
    expected = gradients(site, inputs)
    for got, want in zip(gradients(site, inputs, compiled), expected, strict=True):
        assert_close(got, want)


def test_compile_with_dropout() -> None:
    """A given seed makes the same mask in a compiled graph; one that is drawn inside differs from call to call."""
    x, A, B = randn(M, K).requires_grad_(), randn(R, K).requires_grad_(), randn(N, R).requires_grad_()

    def run(x: Tensor, A: Tensor, B: Tensor, seed: Tensor | None) -> Tensor:
        return ops.lora_linear(x, WEIGHT, A, B, 0.5, dropout_p=0.5, seed=seed)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    seed = torch.tensor([3])
    got, want = compiled(x, A, B, seed), run(x, A, B, seed)
    assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, A, B)) for y in (got, want)), strict=True):
        assert_close(a, b)
    first, second = compiled(x, A, B, None), compiled(x, A, B, None)
    assert not torch.equal(first, second)
    first.sum().backward()


def test_inductor_compiles_an_operation_among_others() -> None:
    """The default backend of torch.compile, forward and backward, with a dynamic number of rows."""
    A, B = randn(R, K).requires_grad_(), randn(N, R).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(ops.lora_linear(x * 2, WEIGHT, A, B, 0.5)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for m in (3, 8):
        x = randn(m, K).requires_grad_()
        got, want = (torch.autograd.grad(function(x), (x, A, B)) for function in (compiled, run))
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, roundings=2)


@pytest.mark.parametrize("op", ["nf4_linear", "lora_linear", "multi_lora_linear"])
def test_errors_are_the_same_when_compiled(op: str) -> None:
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "nf4_linear": lambda x: ops.nf4_linear(x, WEIGHT),
        "lora_linear": lambda x: ops.lora_linear(x, WEIGHT, torch.zeros(R, K), torch.zeros(N, R), 1.0),
        "multi_lora_linear": lambda x: _multi(x, *(torch.zeros(s) for s in (*LORA, *LORA)), None, WEIGHT),
    }
    torch._dynamo.reset()
    compiled = torch.compile(calls[op], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=rf"{op}: x must be \[\.\.\., K = 64\]"):
        compiled(torch.zeros(M, 63))
