"""PiSSA: an adapter that begins with a part of the weight, and a layer that is whole without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftrt.nn import LoRALinear, QLoRALinear, routed
from tests.cases import randn
from tests.nn.layers import K, M, N, conv1d, dense, input_of
from tests.nn.test_modules import weight_of
from tests.tolerances import assert_close, assert_same_bits

LAYERS = {
    "dense": lambda **options: LoRALinear.from_linear(dense(), **options),
    "Conv1D": lambda **options: LoRALinear.from_linear(conv1d(), **options),
    "NF4": lambda **options: QLoRALinear.from_linear(dense(), **options),
    "NF4, Conv1D": lambda **options: QLoRALinear.from_linear(conv1d(), **options),
}
every = pytest.mark.parametrize("kind", LAYERS)


class Case:
    """A layer with the trained PiSSA adapter "fr" and the plain "de", and the weight that it stands for."""

    def __init__(self, kind: str, **options: Any) -> None:
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init": "pissa", "adapter_name": "fr", **options}
        self.layer = LAYERS[kind](**settings)
        self.original = (randn(K, N, seed=1).t() if "Conv1D" in kind else randn(N, K, seed=1)).double()
        pair = self.layer.principal_pair("fr")
        self.part = self.layer.adapter("fr").scaling * (pair[1].double() @ pair[0].double())
        # over NF4 what is left of the weight is rounded
        self.whole = weight_of(self.layer) + self.part
        with torch.no_grad():
            for half, seed in ((self.layer.lora_A, 3), (self.layer.lora_B, 4)):
                half.add_(0.3 * randn(*half.shape, seed=seed))
        self.layer.add_adapter("de", r=3, lora_alpha=2, lora_dropout=options.get("lora_dropout", 0.0), init=False)

    def change(self, name: str) -> Tensor:
        """What the adapter makes of the original weight, fp64 [N, K]."""
        adapter = self.layer.adapter(name)
        delta = adapter.scaling * (adapter.lora_B.detach().double() @ adapter.lora_A.detach().double())
        return delta - self.part if name == "fr" else delta

    def truth(self, x: Tensor, weights: dict[str, float]) -> Tensor:
        weight = self.whole + sum(share * self.change(name) for name, share in weights.items())
        return x.double() @ weight.t() + self.layer.bias.double()


@every
def test_the_parts_sum_to_the_weight(kind: str) -> None:
    case = Case(kind)
    largest = torch.linalg.svdvals(case.original)
    assert_close(torch.linalg.svdvals(case.part)[:4], largest[:4], torch.float32)
    if "NF4" not in kind:
        assert_close(case.whole, case.original, torch.float32)
        return
    plain = QLoRALinear.from_linear(conv1d() if "Conv1D" in kind else dense(), r=None).adapted_weight({}).double()
    error, before = ((weight - case.original).norm() for weight in (case.whole, plain))
    assert error < 0.95 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_sixteen_bits(dtype: torch.dtype) -> None:
    linear = dense(dtype=dtype)
    original = linear.weight.detach().double()
    layer = LoRALinear.from_linear(linear, r=8, init="pissa", adapter_dtype=torch.bfloat16)
    assert layer.weight.dtype == dtype
    whole = layer.adapted_weight({"default": 1.0}).double()
    # what is left is smaller than the weight, and so is its rounding
    assert (whole - original).abs().max() <= torch.finfo(dtype).eps / 2 * layer.weight.abs().max()
    assert_same_bits(layer.adapted_weight({}), layer.adapted_weight({"default": 1.0}))


@every
@pytest.mark.parametrize(
    "active", [None, "fr", "de", {"fr": 0.5}, {"fr": -1.0, "de": 0.7}, {"fr": 1.0, "de": 1.0}], ids=str
)
def test_what_is_active_is_added_to_the_original(kind: str, active: Any) -> None:
    case = Case(kind)
    case.layer.set_active(active)
    x = input_of(case.layer)
    assert_close(case.layer(x), case.truth(x, case.layer.active), roundings=2)
    assert_close(case.layer.to_linear()(x), case.truth(x, case.layer.active), roundings=2)
    case.layer(x.clone().requires_grad_()).sum().backward()
    grads = {name for name, parameter in case.layer.named_parameters() if parameter.grad is not None}
    assert grads == {f"lora_{half}@{name}" for name in case.layer.active for half in "AB"}


@every
@pytest.mark.parametrize("names", [["fr", None, "de", "fr"], [None] * 4, ["fr"] * 4, ["de", None, None, "de"]], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_rows(kind: str, names: list[str | None], training: bool) -> None:
    """With dropout at 0.4 too: what remains of x is scaled up, so means over many draws are the truth."""
    case = Case(kind, lora_dropout=0.4)
    case.layer.train(training)
    x = input_of(case.layer, 4, 3)
    expected = torch.stack([case.truth(x[i], {name: 1.0} if name else {}) for i, name in enumerate(names)])
    torch.manual_seed(0)
    with routed(case.layer.owner, names), torch.no_grad():
        draws = [case.layer(x) for _ in range(400 if training else 1)]
    if not training:
        assert_close(draws[0], expected, roundings=2)
        return
    stacked = torch.stack(draws).double()
    spread = stacked.std(0) / len(draws) ** 0.5
    assert ((stacked.mean(0) - expected).abs() <= 5 * spread + 1e-4).all()
    for row, name in enumerate(names):
        assert (stacked[:, row].std(0).max() == 0) == (name is None)


def test_dropout_leaves_the_base_alone() -> None:
    """Another adapter trains: its input is dropped, the part that belongs to the base sees all of x."""
    case = Case("dense", lora_dropout=0.4)
    case.layer.train().set_active("de")
    with torch.no_grad():
        case.layer.adapter("de").lora_B.zero_()
    x = input_of(case.layer)
    assert_close(case.layer(x), case.truth(x, {}), roundings=2)
    with torch.no_grad():
        case.layer.adapter("de").lora_B.fill_(0.5)
        draws = torch.stack([case.layer(x) for _ in range(400)]).double()
    spread = draws.std(0) / 20
    assert spread.min() > 0
    assert ((draws.mean(0) - case.truth(x, {"de": 1.0})).abs() <= 5 * spread).all()


@every
@pytest.mark.parametrize("name", ["fr", "it"])
def test_dora_over_a_base_of_which_a_part_is_out(kind: str, name: str) -> None:
    """DoRA's norms are those of the whole weight, whether the part is its own first values or another adapter's."""
    case = Case(kind, use_dora=True)
    layer, x = case.layer, input_of(case.layer)
    layer.add_adapter("it", r=2, use_dora=True, init=False)
    adapter = layer.adapter(name)
    begun = (case.whole + (case.change(name) if name == "it" else 0)).norm(dim=1)
    assert_close(adapter.magnitude, begun)
    with torch.no_grad():
        adapter.magnitude.mul_(1.5)
    layer.set_active(name)
    adapted = case.whole + case.change(name)
    expected = adapted * (adapter.magnitude.detach().double() / adapted.norm(dim=1)).unsqueeze(1)
    truth = x.double() @ expected.t() + layer.bias.double()
    for mode in (True, False):
        layer.train(mode)
        assert_close(layer(x), truth, roundings=3)
    with torch.no_grad():
        assert_close(layer(x), truth, roundings=3)
        assert_close(layer(x), truth, roundings=3)  # with what is remembered
    assert_close(layer.adapted_weight(), expected, torch.float32, roundings=3)
    if name == "it":
        # remembered scales know of the part, too
        layer.remove_adapter("fr")
        with torch.no_grad():
            assert_close(layer(x), truth, roundings=4)


def test_dora_with_dropout_leaves_the_base_alone() -> None:
    case = Case("dense")
    layer, x = case.layer, input_of(case.layer)
    layer.add_adapter("it", r=2, use_dora=True, lora_dropout=0.4, init=False)
    layer.set_active("it")
    with torch.no_grad():
        layer.adapter("it").magnitude.mul_(1.5)
        expected = layer.eval()(x).double()
        layer.train()
        draws = torch.stack([layer(x) for _ in range(400)]).double()
    spread = draws.std(0) / 20
    assert spread.min() > 0
    assert ((draws.mean(0) - expected).abs() <= 5 * spread).all()
    with torch.no_grad():
        layer.adapter("it").lora_B.zero_()
        assert_close(layer(x), layer.eval()(x), roundings=3)


@every
def test_merge_and_unmerge(kind: str) -> None:
    case = Case(kind)
    before = {name: tensor.clone() for name, tensor in case.layer.state_dict().items()}
    x = input_of(case.layer)
    for active in ("fr", {"de": 1.0, "fr": 0.5}):
        case.layer.set_active(active)
        case.layer.merge(force=True)
        if "NF4" not in kind:
            assert_close(case.layer(x), case.truth(x, case.layer.active), roundings=2)
        for call in (lambda: case.layer.add_adapter("it", r=2, init="pissa"), lambda: case.layer.remove_adapter("fr")):
            with pytest.raises(ValueError, match="unmerge"):
                call()
        case.layer.unmerge()
        for name, tensor in case.layer.state_dict().items():
            assert_same_bits(tensor, before[name])


@every
def test_remove_leaves_the_original(kind: str) -> None:
    case = Case(kind)
    x = input_of(case.layer)
    case.layer.remove_adapter("fr")
    assert_close(case.layer(x), case.truth(x, {}), roundings=3)
    assert not any("fr" in name for name, _ in case.layer.named_parameters())
    assert ("lora_A0@fr@1" in case.layer.state_dict()) == ("NF4" in kind)  # a dense base takes it back
    case.layer.set_active("de")
    assert_close(case.layer(x), case.truth(x, {"de": 1.0}), roundings=3)
    # the name is free again, for one that begins with zero too
    case.layer.add_adapter("fr", r=2)
    case.layer.set_active("fr")
    assert_close(case.layer(x), case.truth(x, {}), roundings=3)


def test_two_that_begin_with_the_weight() -> None:
    case = Case("dense")
    layer, x = case.layer, input_of(case.layer)
    layer.add_adapter("it", r=2, init="pissa", lora_alpha=5)
    layer.set_active(None)
    assert_close(layer(x), case.truth(x, {}), roundings=3)
    layer.set_active("it")
    assert_close(layer(x), case.truth(x, {}), roundings=3)
    layer.set_active("fr")
    assert_close(layer(x), case.truth(x, {"fr": 1.0}), roundings=3)
    layer.remove_adapter("fr")
    layer.set_active("it")
    assert_close(layer(x), x.double() @ case.whole.t() + layer.bias.double(), roundings=3)


def test_over_a_base_that_is_nf4_already() -> None:
    layer = QLoRALinear.from_linear(dense(), r=None)
    before = layer.nf4_weight().dequantize().double()
    layer.add_adapter("fr", r=16, init="pissa")
    x = input_of(layer)
    after = layer.adapted_weight({}).double()
    assert 0 < (after - before).norm() < 0.1 * before.norm()  # what is left was rounded again
    assert_close(layer(x), x.double() @ after.t() + layer.bias.double(), roundings=2)


@every
def test_state_goes_to_another_layer(kind: str) -> None:
    case, other = Case(kind), LAYERS[kind](r=4, lora_alpha=6, init="pissa", adapter_name="fr")
    other.add_adapter("de", r=3, lora_alpha=2)
    other.load_state_dict(case.layer.state_dict())
    x = input_of(other)
    for active in (None, "fr", "de"):
        other.set_active(active)
        case.layer.set_active(active)
        assert_same_bits(other(x), case.layer(x))
    plain = LAYERS[kind](r=4, adapter_name="fr")
    plain.add_adapter("de", r=3)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_A0@fr"):
        plain.load_state_dict(case.layer.state_dict())


def test_compiled_layer_sees_a_change_of_adapters() -> None:
    case = Case("dense")
    torch._dynamo.reset()
    compiled = torch.compile(case.layer, fullgraph=True, backend="aot_eager")
    x = input_of(case.layer)
    for active in (None, "fr", "de", {"fr": 0.5}, None):
        case.layer.set_active(active)
        assert_close(compiled(x), case.truth(x, case.layer.active), roundings=2)


def test_training_step_is_that_of_the_equation() -> None:
    """The gradients are those of A and B over the base that is left."""
    layer = LoRALinear.from_linear(dense(), r=4, init="pissa")
    x = randn(M, K, seed=9)
    layer(x).square().sum().backward()
    A, B = (half.detach().double().requires_grad_() for half in (layer.lora_A, layer.lora_B))
    y = x.double() @ (layer.weight.double() + layer.scaling * B @ A).t() + layer.bias.double()
    y.square().sum().backward()
    for half, wide in ((layer.lora_A, A), (layer.lora_B, B)):
        assert_close(half.grad, wide.grad, intermediate=wide.grad.abs().max().item())


def test_nothing_shared_is_written_into() -> None:
    linear = dense()
    weight, before = linear.weight, linear.weight.detach().clone()
    layer = LoRALinear.from_linear(linear, r=4, init="pissa")
    assert_same_bits(weight.detach(), before)
    assert layer.weight is not weight
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
