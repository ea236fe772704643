"""DoRA adapters in layers: values, gradients, what is remembered, merging, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from peftrt import ops
from peftrt.nn import LoRALinear, QLoRALinear, routed
from tests.cases import FLOATS, randn
from tests.nn.layers import DORA, K, M, N, adapted, dense, dora, input_of
from tests.nn.test_modules import truth, weight_of
from tests.tolerances import assert_close, assert_same_bits

every = pytest.mark.parametrize("make", DORA.values(), ids=DORA.keys())
both = pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
Make = Callable[[], Any]


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every pass over a weight for its norms."""
    seen: list[int] = []
    real = ops.dora_scale

    def counted(*args: Any) -> Tensor:
        seen.append(1)
        return real(*args)

    monkeypatch.setattr(ops, "dora_scale", counted)
    return seen


@both
@pytest.mark.parametrize("init", [True, False])
def test_a_new_adapter_s_magnitudes_are_the_norms(cls: Any, init: bool) -> None:
    plain, layer = (adapted(cls, init=init, **o) for o in ({}, {"use_dora": True}))
    with torch.no_grad():
        layer.lora_A.copy_(plain.lora_A), layer.lora_B.copy_(plain.lora_B)
    if not init:
        layer.remove_adapter("default")
        torch.manual_seed(3)
        layer.add_adapter("default", r=4, lora_alpha=6, use_dora=True, init=False)
        layer.set_active("default")
    adapted_rows = weight_of(layer) + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    assert_close(layer.lora_magnitude, adapted_rows.norm(dim=1))
    assert layer.lora_magnitude.dtype == torch.float32
    x = input_of(layer)
    assert_close(layer(x), x.double() @ adapted_rows.t() + layer.bias.double(), roundings=2)


@every
def test_gradients_equal_fp64(make: Make) -> None:
    layer = make()
    x = input_of(layer).requires_grad_()
    layer(x).square().sum().backward()
    names = {"lora_A", "lora_B", "lora_magnitude"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == names
    wide, A, B, m = (
        t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B, layer.lora_magnitude)
    )
    rows = weight_of(layer) + layer.scaling * (B @ A)
    y = (wide @ rows.t()) * (m / rows.detach().norm(dim=1)) + layer.bias.double()
    y.square().sum().backward()
    for got, want in ((x, wide), (layer.lora_A, A), (layer.lora_B, B), (layer.lora_magnitude, m)):
        assert_close(got.grad, want.grad, roundings=4, intermediate=want.grad.abs().max().item())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_magnitudes_have_the_adapters_dtype(dtype: torch.dtype) -> None:
    layer = adapted(LoRALinear, dense(dtype=torch.bfloat16), use_dora=True, adapter_dtype=dtype)
    assert layer.adapter("default").magnitude.dtype == dtype
    assert len(layer.adapter("default").parameters) == 3
    assert adapted(LoRALinear).lora_magnitude is None


def test_dropout_is_of_the_adapters_input_alone() -> None:
    """With B = 0 there is nothing to drop, whatever the magnitudes: HF peft's base would see the dropped input."""
    layer = dora(LoRALinear, init=True, lora_dropout=0.5)
    x = input_of(layer)
    assert_same_bits(layer.train()(x).detach(), layer.eval()(x).detach())


@every
def test_in_eval_without_gradients_the_norms_are_computed_once(make: Make, norms: list[int]) -> None:
    layer = make().eval()
    x = input_of(layer, 1)
    with torch.no_grad():
        first = layer(x)
        for _ in range(3):
            assert_same_bits(layer(x), first)
    assert len(norms) == 1
    assert_close(first, truth(layer, x))
    with torch.inference_mode():
        assert_same_bits(layer(x), first)
    assert len(norms) == 1
    layer(x)  # its gradients are wanted
    layer.train()
    with torch.no_grad():
        layer(x)
    assert len(norms) == 3


def _step(layer: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(input_of(layer)).square().sum().backward()
    optimizer.step()


def _load(layer: Any) -> None:
    layer.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in layer.state_dict().items()})


def _edit(name: str) -> Callable[[Any], None]:
    def edit(layer: Any) -> None:
        with torch.no_grad():
            getattr(layer, name).mul_(3)

    return edit


def _replace(layer: Any) -> None:
    layer._parameters["lora_B"] = nn.Parameter(layer.lora_B.detach() * 3)


def _data(layer: Any) -> None:
    layer.lora_B.data = layer.lora_B.data * 3


def _untracked(layer: Any) -> None:
    layer.lora_B.data.mul_(3)
    layer.eval()


def _other_base(layer: Any) -> None:
    layer.load_state_dict({"weight": 2 * randn(layer.out_features, layer.in_features, seed=3)}, strict=False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer": _step,
    "load_state_dict": _load,
    "another base": _other_base,
    "A in place": _edit("lora_A"),
    "B in place": _edit("lora_B"),
    "m in place": _edit("lora_magnitude"),
    "another Parameter": _replace,
    "other data": _data,
    "data in place, then eval()": _untracked,
    "rounded and back": lambda layer: layer.half().float(),
    "another dtype": lambda layer: layer.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "make", [DORA["LoRALinear, DoRA"], lambda: dora(QLoRALinear, dense(K, K))], ids=["dense", "nf4"]
)
def test_what_is_remembered_follows_every_change(make: Make, change: str, norms: list[int]) -> None:
    layer = make().eval()
    with torch.no_grad():
        before = layer(input_of(layer))
        layer(input_of(layer))
    assert len(norms) == 1
    with torch.enable_grad():
        CHANGES[change](layer)
    with torch.no_grad():
        x = input_of(layer, dtype=layer.bias.dtype)
        y = layer(x)
        assert change == "rounded and back" or not torch.equal(y, before.to(y.dtype))
        twin = pickle.loads(pickle.dumps(layer))  # remembers nothing
        assert_same_bits(y, twin(x))
        assert_close(y, truth(layer, x), roundings=3)


def test_another_scaling_is_another_factor(norms: list[int]) -> None:
    layer = dora(QLoRALinear).eval()
    layer.add_adapter("fr", r=2, lora_alpha=3, use_dora=True, init=False)
    x = input_of(layer)
    with torch.no_grad():
        for name in ("default", "fr", "default", "fr"):
            layer.set_active(name)
            assert_close(layer(x), truth(layer, x))
        assert len(norms) == 2
        layer.remove_adapter("fr")
        layer.add_adapter("fr", r=2, lora_alpha=30, use_dora=True, init=False)
        layer.set_active("fr")
        assert_close(layer(x), truth(layer, x))


def test_copies_remember_for_themselves() -> None:
    layer = dora(LoRALinear).eval()
    x = input_of(layer)
    with torch.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        twin.lora_A.zero_()
        assert_close(twin(x), truth(twin, x))
        assert_same_bits(layer(x), expected)


def test_nothing_is_kept_alive_by_what_is_remembered() -> None:
    layer = dora(LoRALinear).eval()
    with torch.no_grad():
        layer(input_of(layer))
    import weakref

    old = weakref.ref(layer.lora_A)
    layer._parameters["lora_A"] = nn.Parameter(torch.zeros(4, K))
    gc.collect()
    assert old() is None


def test_threads_share_what_is_remembered() -> None:
    layer = dora(QLoRALinear).eval()
    x = input_of(layer)
    with torch.no_grad():
        expected = layer(x)
    found: list[Tensor] = []

    def serve() -> None:
        with torch.no_grad():
            found.extend(layer(x) for _ in range(20))

    workers = [threading.Thread(target=serve) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 60
    for y in found:
        assert_same_bits(y, expected)


def test_tensors_of_inference_mode_are_not_remembered(norms: list[int]) -> None:
    with torch.inference_mode():
        layer = dora(LoRALinear).eval()
        x = input_of(layer)
        assert_close(layer(x), truth(layer, x))
        layer.lora_B.mul_(2)
        assert_close(layer(x), truth(layer, x))
    assert len(norms) == 2


def test_a_compiled_layer_computes_the_norms_itself() -> None:
    layer = dora(QLoRALinear).eval()
    x = input_of(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        layer(x)  # remembered, and not to be put into the graph
        assert_close(compiled(x), truth(layer, x))
        layer.lora_B.mul_(2)
        assert_close(compiled(x), truth(layer, x))


@every
def test_merged_weight_is_the_sum_by_its_factors(make: Make) -> None:
    layer = make().eval()
    x = input_of(layer)
    expected, before = truth(layer, x), layer.weight.detach().clone()
    rows = truth(layer, torch.eye(layer.in_features)).t() - layer.bias.double().unsqueeze(1)
    assert_close(layer.adapted_weight(), rows, roundings=2)
    assert_close(layer.delta_weight(), rows - weight_of(layer), roundings=2, intermediate=rows.abs().max().item())
    assert_close(layer.to_linear(torch.float32)(x), expected, roundings=4)
    if isinstance(layer, QLoRALinear):
        with pytest.raises(ValueError, match=r"would lose \d+\.\d%"):
            layer.merge()
        delta = layer.delta_weight()
        kept = peftrt.NF4Weight.quantize(layer.adapted_weight()).dequantize() - layer.nf4_weight().dequantize()
        share = (kept * delta).sum() / delta.square().sum()
        assert layer.merge_loss() == pytest.approx(max(0.0, 1 - share.item()), abs=1e-5)
    layer.merge(force=True)
    if isinstance(layer, LoRALinear):
        assert_close(layer(x), expected, roundings=4)
    with pytest.raises(ValueError, match="are merged; unmerge to see what"):
        layer.delta_weight("default")
    with pytest.raises(ValueError, match="unmerge before adding one with use_dora"):
        layer.add_adapter("fr", use_dora=True)
    layer.unmerge()
    assert_same_bits(layer.weight.detach(), before)
    assert_close(layer(x), expected)


@both
@pytest.mark.parametrize("active", [{"default": 0.5}, {"default": 1.0, "fr": 1.0}, {"fr": 1.0, "dora": 1.0}], ids=str)
def test_a_sum_with_a_dora_adapter_is_refused_by_name(cls: Any, active: dict[str, float]) -> None:
    layer = dora(cls)
    layer.add_adapter("fr", r=2, init=False)
    layer.add_adapter("dora", r=2, use_dora=True)
    x = input_of(layer)
    expected = layer(x)
    named = "'dora'" if "dora" in active else "'default'"
    for call in (
        layer.set_active,
        layer.delta_weight,
        layer.adapted_weight,
        lambda names: layer.merge(names, force=True),
    ):
        with pytest.raises(ValueError, match=f"{named} of DoRA .use_dora. cannot be summed"):
            call(active)
    assert layer.active == {"default": 1.0}
    assert_same_bits(layer(x), expected)
    layer.set_active({"fr": 0.5})
    assert_close(layer(x), truth(layer, x))


@both
@pytest.mark.parametrize("training", [False, True])
def test_a_row_of_a_batch_equals_the_adapter_alone(cls: Any, training: bool) -> None:
    """With LoRA and the bare base beside it; gradients of A, B, m and x too."""
    layer = dora(cls).train(training)
    layer.add_adapter("fr", r=2, init=False)
    layer.add_adapter("de", r=9, use_dora=True, init=False)
    names = ["de", "fr", None, "default", "de"]
    x, dy = randn(5, 3, K).requires_grad_(), randn(5, 3, N, seed=3)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with routed(layer.owner, names):
        y = layer(x)
    rows = []
    for i, name in enumerate(names):
        layer.set_active(name)
        rows.append(layer(x[i]))
    expected = torch.stack(rows)
    assert_close(y, expected)
    grads, wanted = (torch.autograd.grad(t, leaves, dy) for t in (y, expected))
    for leaf, grad, want in zip(leaves, grads, wanted, strict=True):
        assert_close(grad, want, roundings=4, intermediate=leaf.detach().abs().max().item() + want.abs().max().item())


def test_rows_remember_their_stack_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = dora(QLoRALinear).eval()
    layer.add_adapter("fr", r=2, init=False)
    x, stacked = randn(3, K), []
    real = ops.AdapterTable.stack
    monkeypatch.setattr(ops.AdapterTable, "stack", lambda *a, **o: stacked.append(1) or real(*a, **o))

    def call(names: list[str | None]) -> Any:
        with torch.no_grad(), routed(layer.owner, names):
            return layer(x)

    first = call(["fr", None, "default"])
    assert_same_bits(call(["default", "fr", "fr"])[[0]], call(["default", None, "fr"])[[0]])
    assert len(stacked) == 1
    with torch.no_grad():
        layer.adapter("fr").lora_B.mul_(2)
    assert not torch.equal(call(["fr", None, "default"])[0], first[0])
    assert len(stacked) == 2
    call(["fr", None, None])
    assert len(stacked) == 3
    layer.train()
    call(["fr", None, None])
    call(["fr", None, None])
    assert len(stacked) == 5


def test_names_and_keys() -> None:
    layer = dora(QLoRALinear)
    layer.add_adapter("fr", r=2, use_dora=True)
    assert {"lora_magnitude", "lora_magnitude@fr"} <= layer.state_dict().keys()
    assert (
        layer.lora_magnitude is layer.adapter("default").magnitude is dict(layer.named_parameters())["lora_magnitude"]
    )
    assert "default: r=4, DoRA" in repr(layer)
    layer.remove_adapter("fr")
    assert "lora_magnitude@fr" not in layer.state_dict()
    assert QLoRALinear(K, N, r=2, use_dora=True, device="meta").lora_magnitude.is_meta


@both
def test_training_equals_peft_step_by_step(cls: Any) -> None:
    """Outputs and all gradients without dropout, from the same start."""
    peft = pytest.importorskip("peft")
    ours = dora(cls)
    linear = dense()
    if cls is QLoRALinear:
        linear.weight.data = ours.nf4_weight().dequantize()
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    pairs = [
        (ours.lora_A, theirs.lora_A["default"].weight),
        (ours.lora_B, theirs.lora_B["default"].weight),
        (ours.lora_magnitude, theirs.lora_magnitude_vector["default"].weight),
    ]
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own)
    x, other_x = (randn(2, M, K, seed=9).requires_grad_() for _ in range(2))
    y, other_y = ours(x), theirs(other_x)
    assert_close(y, other_y, roundings=2)
    y.square().sum().backward()
    other_y.square().sum().backward()
    for own, other in (*pairs, (x, other_x)):
        assert_close(own.grad, other.grad, roundings=4, intermediate=other.grad.abs().max().item())
