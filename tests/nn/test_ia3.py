"""IA3 adapters in layers: values, gradients, rows of a batch, merging, state dicts, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from peftrt import ops
from peftrt.nn import AdapterLinear, IA3Linear, LoRAEmbedding, LoRALinear, QLoRALinear, routed
from tests.cases import FLOATS, randn
from tests.nn.layers import K, M, N, adapted, conv1d, dense, input_of
from tests.nn.test_modules import weight_of
from tests.tolerances import assert_close, assert_same_bits

both = pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
sides = pytest.mark.parametrize("feedforward", [False, True], ids=["outputs", "inputs"])
Make = Callable[..., Any]


def fill(layer: AdapterLinear, name: str = "default", seed: int = 6) -> None:
    """Factors that change the output, some of them negative."""
    adapter = layer.ia3(name)
    assert adapter is not None
    with torch.no_grad():
        adapter.ia3_l.copy_(1 + randn(*adapter.ia3_l.shape, seed=seed))


def ia3(cls: Any, feedforward: bool = False, linear: nn.Module | None = None, **options: Any) -> Any:
    layer = cls.from_linear(linear or dense(), r=None)
    layer.add_ia3("default", feedforward=feedforward, **options)
    layer.set_active("default")
    fill(layer)
    return layer


LAYERS: dict[str, Make] = {
    "LoRALinear": lambda **o: ia3(LoRALinear, **o),
    "LoRALinear, Conv1D": lambda **o: ia3(LoRALinear, linear=conv1d(), **o),
    "LoRALinear, no bias": lambda **o: ia3(LoRALinear, linear=dense(bias=False), **o),
    "QLoRALinear": lambda **o: ia3(QLoRALinear, **o),
    "QLoRALinear, odd sizes": lambda **o: ia3(QLoRALinear, linear=dense(33, 7), **o),
    "QLoRALinear, Conv1D": lambda **o: ia3(QLoRALinear, linear=conv1d(), **o),
}
every = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def truth(layer: Any, x: Tensor, factors: Tensor | None = None) -> Tensor:
    """y in fp64, as peft has it: the output is scaled with its bias."""
    factors = layer.ia3_l.detach().double() if factors is None else factors
    bias = torch.zeros(()) if layer.bias is None else layer.bias.double()
    if factors.shape[0] == 1:
        return (x.double() * factors.view(-1)) @ weight_of(layer).t() + bias
    return (x.double() @ weight_of(layer).t() + bias) * factors.view(-1)


@every
@sides
def test_output_and_gradients_equal_fp64(make: Make, feedforward: bool) -> None:
    layer = make(feedforward=feedforward)
    x = input_of(layer).requires_grad_()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["ia3_l"]
    layer(x).square().sum().backward()
    wide, factors = (t.detach().double().requires_grad_() for t in (x, layer.ia3_l))
    bias = torch.zeros(()) if layer.bias is None else layer.bias.double()
    y = wide * (factors.view(-1) if feedforward else 1.0) @ weight_of(layer).t() + bias
    y = y if feedforward else y * factors.view(-1)
    y.square().sum().backward()
    assert_close(layer(x), y, roundings=2)
    for got, want in ((x, wide), (layer.ia3_l, factors)):
        assert_close(got.grad, want.grad, roundings=4)


@both
@sides
def test_a_new_adapter_changes_nothing(cls: Any, feedforward: bool) -> None:
    layer = cls.from_linear(dense(), r=None)
    adapter = layer.add_ia3("fr", feedforward=feedforward)
    assert tuple(adapter.ia3_l.shape) == ((1, K) if feedforward else (N, 1))
    assert adapter.ia3_l.dtype == torch.float32
    for x in (input_of(layer), input_of(layer, 2, 20)):
        layer.set_active(None)
        expected = layer(x)
        layer.set_active("fr")
        # the base of a dense layer is multiplied by torch, with ones by the kernel
        assert_close(layer(x), expected)


@sides
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_factors_have_the_adapters_dtype(dtype: torch.dtype, feedforward: bool) -> None:
    layer = ia3(LoRALinear, feedforward, dense(dtype=torch.bfloat16), adapter_dtype=dtype)
    assert layer.ia3_l.dtype == dtype
    assert layer.adapter_parameters("default") == (layer.ia3_l,)
    x = input_of(layer, dtype=torch.bfloat16)
    y = layer(x)
    y.float().square().sum().backward()
    assert layer.ia3_l.grad.dtype == dtype
    assert_close(y, truth(layer, x), roundings=3)


def test_random_factors_are_drawn_where_asked() -> None:
    layer = LoRALinear.from_linear(dense(), r=None)
    adapter = layer.add_ia3(init=False)
    assert adapter.ia3_l.unique().numel() == N


@every
@sides
def test_merging_is_exact_both_ways(make: Make, feedforward: bool) -> None:
    layer = make(feedforward=feedforward).eval()
    x = input_of(layer)
    expected, before = truth(layer, x), {name: p.detach().clone() for name, p in layer.named_parameters()}
    bias, largest = layer.bias, weight_of(layer).abs().max().item()
    adapted_rows = weight_of(layer) * layer.ia3_l.double()
    assert_close(layer.adapted_weight(), adapted_rows, roundings=2)
    assert_close(layer.delta_weight(), adapted_rows - weight_of(layer), roundings=2, intermediate=largest)
    plain = layer.to_linear(torch.float32)
    assert_close(plain(x), expected, roundings=4)
    if isinstance(layer, QLoRALinear):
        with pytest.raises(ValueError, match=r"would lose \d+\.\d%"):
            layer.merge()
    layer.merge(force=True)
    if isinstance(layer, LoRALinear):
        assert_close(layer(x), expected, roundings=4)
    assert_close(layer.to_linear(torch.float32)(x), layer(x), roundings=4)
    if bias is not None:
        factor = 1.0 if feedforward else layer.ia3_l.detach().view(-1)
        assert_same_bits(layer.bias.detach(), (bias * factor).detach())
    with pytest.raises(ValueError, match="are merged; unmerge to see what"):
        layer.delta_weight("default")
    layer.unmerge()
    for name, tensor in before.items():
        assert_same_bits(dict(layer.named_parameters())[name].detach(), tensor)
    assert layer.bias is bias
    assert_close(layer(x), expected, roundings=2)


@both
@pytest.mark.parametrize(
    "active",
    [{"default": 0.5}, {"default": 1.0, "fr": 1.0}, {"fr": 1.0, "de": 1.0}, {"default": 1.0, "de": 1.0}],
    ids=str,
)
def test_a_sum_with_an_ia3_adapter_is_refused_by_name(cls: Any, active: dict[str, float]) -> None:
    layer = ia3(cls)
    layer.add_adapter("fr", r=2, init=False)
    layer.add_ia3("de", feedforward=True)
    x = input_of(layer)
    expected = layer(x)
    named = "'default'" if "default" in active else "'de'"
    calls: list[Callable[..., Any]] = [layer.set_active, layer.delta_weight, layer.adapted_weight, layer.adapted_bias]
    for call in (*calls, lambda names: layer.merge(names, force=True)):
        with pytest.raises(ValueError, match=f"{named}.* of IA3 cannot be summed"):
            call(active)
    assert layer.active == {"default": 1.0}
    assert_same_bits(layer(x), expected)


@both
@pytest.mark.parametrize("training", [False, True])
def test_a_row_of_a_batch_equals_the_adapter_alone(cls: Any, training: bool) -> None:
    """LoRA, DoRA, both kinds of IA3 and the bare base in one batch; gradients of all of them, and of x."""
    layer = ia3(cls).train(training)
    layer.add_ia3("inputs", feedforward=True)
    fill(layer, "inputs")
    layer.add_adapter("lora", r=2, init=False)
    layer.add_adapter("dora", r=9, use_dora=True, init=False)
    names = ["default", "lora", None, "inputs", "dora", "default"]
    x, dy = randn(6, 3, K).requires_grad_(), randn(6, 3, N, seed=3)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(leaves) == 1 + 2 + 2 + 3
    with routed(layer.owner, names):
        y = layer(x)
    rows = []
    for i, name in enumerate(names):
        layer.set_active(name)
        rows.append(layer(x[i]))
    expected = torch.stack(rows)
    assert_close(y, expected, roundings=2)
    grads, wanted = (torch.autograd.grad(t, leaves, dy) for t in (y, expected))
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, roundings=4, intermediate=1 + want.abs().max().item())


def test_dropout_of_a_neighbour_leaves_ia3_rows_alone() -> None:
    layer = ia3(LoRALinear).train()
    layer.add_ia3("inputs", feedforward=True)
    fill(layer, "inputs")
    layer.add_adapter("lora", r=2, lora_dropout=0.5, init=False)
    x = randn(3, 2, K)
    with routed(layer.owner, ["default", "lora", "inputs"]):
        y = layer(x)
    for row, name in ((0, "default"), (2, "inputs")):
        factors = layer.ia3(name).ia3_l.detach().double()
        assert_close(y[row], truth(layer, x[row], factors), roundings=2)


@both
@sides
def test_beside_a_principal_part_the_whole_weight_is_scaled(cls: Any, feedforward: bool) -> None:
    """PiSSA took a part out of the base, and another adapter is active."""
    layer = ia3(cls, feedforward).eval()
    x = input_of(layer, 2, 1)
    wide = layer.adapted_weight({}).double()
    layer.add_adapter("fr", r=4, lora_alpha=6, init="pissa")
    whole = wide if cls is LoRALinear else layer.adapted_weight({}).double()
    factors = layer.ia3_l.detach().double()
    seen = x.double() * (factors.view(-1) if feedforward else 1.0)
    expected = seen @ whole.t() + layer.bias.double()
    expected = expected if feedforward else expected * factors.view(-1)
    assert_close(layer(x), expected, roundings=4)
    with routed(layer.owner, ["default", None]):
        y = layer(x)
    assert_close(y[0], expected[0], roundings=4)
    assert_close(y[1], x[1].double() @ whole.t() + layer.bias.double(), roundings=4)


@both
def test_rows_and_the_scaled_bias_are_remembered_until_something_changes(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = ia3(cls).eval()
    layer.add_adapter("fr", r=2, init=False)
    x, stacked, scaled = randn(3, K), [], []
    real, bias = ops.AdapterTable.stack, peftrt.nn.IA3Adapter.of_bias
    monkeypatch.setattr(ops.AdapterTable, "stack", lambda *a, **o: stacked.append(1) or real(*a, **o))
    monkeypatch.setattr(peftrt.nn.IA3Adapter, "of_bias", lambda *a: scaled.append(1) or bias(*a))

    def call(names: list[str | None] | None) -> Any:
        with torch.no_grad():
            if names is None:
                return layer(x)
            with routed(layer.owner, names):
                return layer(x)

    for names in (["fr", None, "default"], None):
        first = call(names)
        assert_same_bits(call(names), first)
        assert (len(stacked), len(scaled)) == (1, 0 if names else 1)
    with torch.no_grad():
        layer.ia3_l.mul_(2)
    assert_close(call(None), truth(layer, x))
    assert_close(call(["fr", None, "default"])[2], truth(layer, x[2]))
    with torch.no_grad():
        layer.bias.mul_(2)
    assert_close(call(None), truth(layer, x))
    assert_close(call(["fr", None, "default"])[2], truth(layer, x[2]))
    assert (len(stacked), len(scaled)) == (3, 3)


@every
@sides
def test_state_dict_copies_and_pickles(make: Make, feedforward: bool) -> None:
    layer = make(feedforward=feedforward)
    layer.add_ia3("fr", feedforward=not feedforward)
    fill(layer, "fr", seed=8)
    assert {"ia3_l", "ia3_l@fr"} <= layer.state_dict().keys()
    x, wanted = input_of(layer), {}
    for name in ("default", "fr"):
        layer.set_active(name)
        wanted[name] = layer(x)
    other = make(feedforward=feedforward)
    other.add_ia3("fr", feedforward=not feedforward)
    fill(other, seed=10)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for name, expected in wanted.items():
            twin.set_active(name)
            assert_same_bits(twin(x), expected)
    with torch.no_grad():
        twin.ia3_l.zero_()
    assert_same_bits(layer(x), wanted["fr"])
    swapped = {"ia3_l": layer.state_dict()["ia3_l@fr"]}
    with pytest.raises(RuntimeError, match="size mismatch for ia3_l"):
        layer.load_state_dict(swapped, strict=False)


def test_names_are_kept_in_order_and_removed() -> None:
    layer = adapted(LoRALinear)
    layer.add_ia3("b", feedforward=True)
    layer.add_adapter("a", r=2)
    layer.add_ia3("c")
    assert layer.adapter_names == ("default", "b", "a", "c")
    assert "default: r=4, b: IA3 of inputs, a: r=2, c: IA3 of outputs" in repr(layer)
    layer.set_active("b")
    layer.remove_adapter("b")
    assert layer.adapter_names == ("default", "a", "c")
    assert layer.active == {}
    assert "ia3_l@b" not in layer.state_dict()
    layer.set_active("a")
    with pytest.raises(LookupError, match=r"an active adapter of IA3 is needed, there are \['a'\]"):
        _ = layer.ia3_l
    layer.set_active("c")
    with pytest.raises(KeyError, match="adapter 'c' is one of IA3"):
        _ = layer.lora_A
    assert layer.ia3("a") is None
    assert layer.ia3("nobody") is None
    for name, message in (("c", "exists already"), ("a", "exists already"), ("x.y", "without '.'"), ("", "non-empty")):
        with pytest.raises(ValueError, match=message):
            layer.add_ia3(name)
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("c", r=2)


def test_an_embedding_refuses() -> None:
    layer = LoRAEmbedding.from_embedding(nn.Embedding(5, 4))
    with pytest.raises(ValueError, match="IA3 of an embedding is not supported"):
        layer.add_ia3("fr")
    assert layer.adapter_names == ("default",)


@pytest.mark.parametrize("init", [True, "pissa"])
@sides
def test_fused_layers_each_scale_their_own(feedforward: bool, init: bool | str) -> None:
    """Also where PiSSA left terms in sum that could be multiplied in one call."""
    layers = [adapted(LoRALinear, dense(), init=init) for _ in range(2)]
    x, expected = randn(3, K), []
    for number, layer in enumerate(layers):
        layer.add_ia3("b", feedforward=feedforward)
        fill(layer, "b", seed=number)
        layer.set_active("b")
        factors = layer.ia3_l.detach().double()
        whole = layer.adapted_weight({}).double()
        seen, scale = (factors.view(-1), 1.0) if feedforward else (1.0, factors.view(-1))
        bias = layer.bias.double()
        expected.append((x.double() * seen) @ whole.t() * scale + bias * scale)
    assert peftrt.nn.fused.lay_together(layers) is None
    for layer, y in zip(layers, expected, strict=True):
        assert_close(layer(x), y, roundings=2)


@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_drop_in_layer(feedforward: bool, dtype: torch.dtype) -> None:
    layer = IA3Linear(K, N, feedforward=feedforward, dtype=dtype)
    assert layer.active == {"default": 1.0}
    assert tuple(layer.ia3_l.shape) == ((1, K) if feedforward else (N, 1))
    assert layer.weight.dtype == dtype
    assert not layer.weight.requires_grad
    linear = dense(dtype=dtype)
    wrapped = IA3Linear.from_linear(linear, feedforward=feedforward, adapter_name="fr")
    assert wrapped.weight is linear.weight
    assert wrapped.active == {"fr": 1.0}
    x = randn(M, K, dtype=dtype)
    assert_close(wrapped(x), linear(x), roundings=2)
    assert not IA3Linear(K, N, bias=False, feedforward=feedforward, device="meta").ia3_l.is_cuda
    with pytest.raises(TypeError, match="convolution"):
        IA3Linear.from_linear(nn.Conv2d(2, 2, 1))


@sides
def test_a_compiled_layer_is_the_same(feedforward: bool) -> None:
    layer = ia3(QLoRALinear, feedforward).eval()
    x = input_of(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), truth(layer, x))
    with torch.no_grad():
        layer(x)
        layer.ia3_l.mul_(2)
        assert_close(compiled(x), truth(layer, x))


@sides
def test_training_equals_peft_step_by_step(feedforward: bool) -> None:
    """Outputs and all gradients from the same start, with a bias that is not 0."""
    peft = pytest.importorskip("peft")
    ours = ia3(LoRALinear, feedforward)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    theirs = peft.get_peft_model(nn.Sequential(dense()), config).base_model.model[0]
    with torch.no_grad():
        theirs.ia3_l["default"].copy_(ours.ia3_l)
    x, other_x = (randn(2, M, K, seed=9).requires_grad_() for _ in range(2))
    for _ in range(3):
        y, other_y = ours(x), theirs(other_x)
        assert_close(y, other_y, roundings=2)
        pairs = [(x, other_x), (ours.ia3_l, theirs.ia3_l["default"])]
        for own, other in pairs:
            own.grad = other.grad = None
        y.square().mean().backward()
        other_y.square().mean().backward()
        for own, other in pairs:
            assert_close(own.grad, other.grad, roundings=4)
        with torch.no_grad():
            for own, other in pairs[1:]:
                own -= 0.1 * own.grad
                other -= 0.1 * other.grad
