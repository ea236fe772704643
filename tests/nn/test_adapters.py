"""Several adapters in one layer: which are active, merged into the base, taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import LoRALinear, QLoRALinear, routed
from tests.cases import FLOATS, randn
from tests.nn.layers import ADAPTED, K, M, N, adapted, conv1d, dense, input_of
from tests.nn.test_modules import truth, weight_of
from tests.tolerances import assert_close, assert_same_bits

with_adapters = pytest.mark.parametrize("make", ADAPTED.values(), ids=ADAPTED.keys())
both = pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
Make = Callable[[], Any]


def several(make: Make) -> Any:
    """A layer with "default" (r 4), "fr" (r 2) and "de" (r 3, rsLoRA)."""
    layer = make()
    layer.add_adapter("fr", r=2, lora_alpha=3, init=False)
    layer.add_adapter("de", r=3, lora_alpha=2, use_rslora=True, init=False)
    return layer


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(layer: nn.Module, before: dict[str, Tensor]) -> None:
    now = layer.state_dict()
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert_same_bits(now[name], tensor)


@with_adapters
@pytest.mark.parametrize(
    "active", [None, "default", "fr", {"fr": 0.7, "de": 0.3}, {"fr": -1.0}, {}, {"de": 0.0}], ids=str
)
def test_what_is_active_is_added(make: Make, active: Any) -> None:
    layer = several(make)
    flags = {name: p.requires_grad for name, p in layer.named_parameters()}
    layer.set_active(active)
    x = input_of(layer)
    assert layer.active == ({} if active is None else {active: 1.0} if isinstance(active, str) else active)
    assert_close(layer(x), truth(layer, x))
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == flags


@with_adapters
def test_a_weighted_sum_is_differentiable_in_each(make: Make) -> None:
    layer = several(make)
    layer.set_active({"fr": 0.7, "de": 0.3})
    x = input_of(layer)
    layer(x).square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert grads.keys() == {"lora_A@fr", "lora_B@fr", "lora_A@de", "lora_B@de"}
    wide = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters() if name in grads}
    y = x.double() @ weight_of(layer).t() + layer.bias.double()
    for name, share in (("fr", 0.7), ("de", 0.3)):
        y = y + share * layer.adapter(name).scaling * (
            x.double() @ wide[f"lora_A@{name}"].t() @ wide[f"lora_B@{name}"].t()
        )
    y.square().sum().backward()
    for name, grad in grads.items():
        assert_close(grad, wide[name].grad, intermediate=wide[name].grad.abs().max().item())


def test_names_order_and_views() -> None:
    layer = several(ADAPTED["QLoRALinear"])
    assert layer.adapter_names == ("default", "fr", "de")
    assert layer.lora_A is layer.adapter("default").lora_A
    layer.set_active("fr")
    assert layer.lora_A is layer.adapter("fr").lora_A
    assert layer.lora_B is layer.adapter("fr").lora_B
    assert layer.scaling == layer.adapter("fr").scaling == 1.5
    assert layer.adapter("de").scaling == pytest.approx(2 / 3**0.5)
    assert dict(layer.named_parameters())["lora_A@fr"] is layer.lora_A
    for active in (None, {"fr": 1.0, "de": 1.0}):
        layer.set_active(active)
        with pytest.raises(LookupError, match="one active adapter is needed"):
            layer.lora_A  # noqa: B018


def test_an_adapter_is_added_and_removed_whole() -> None:
    layer = several(ADAPTED["QLoRALinear"])
    before = state(layer)
    with pytest.raises(ValueError, match="adapter 'fr' exists already"):
        layer.add_adapter("fr", r=2)
    with pytest.raises(ValueError, match="r must be"):
        layer.add_adapter("new", r=0)
    assert_same_state(layer, before)
    assert layer.adapter_names == ("default", "fr", "de")
    layer.set_active({"fr": 1.0, "de": 1.0})
    layer.remove_adapter("fr")
    assert layer.adapter_names == ("default", "de")
    assert layer.active == {"de": 1.0}
    assert not any("fr" in name for name in layer.state_dict())
    layer.add_adapter("fr", r=5)
    assert layer.adapter("fr").lora_A.shape == (5, K)


@pytest.mark.parametrize("call", ["adapter", "remove_adapter", "set_active", "merge", "delta_weight"])
def test_an_unknown_name_changes_nothing(call: str) -> None:
    layer = several(ADAPTED["LoRALinear"])
    before = state(layer)
    with pytest.raises(KeyError, match="no adapter 'nl'; there are"):
        getattr(layer, call)("nl")
    assert_same_state(layer, before)
    assert layer.active == {"default": 1.0}
    assert layer.merged is None


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(weight: float) -> None:
    layer = several(ADAPTED["LoRALinear"])
    with pytest.raises(ValueError, match="adapter 'fr': weight must be finite"):
        layer.set_active({"fr": weight})
    assert layer.active == {"default": 1.0}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("make", [dense, conv1d])
def test_merge_gives_the_sum_and_unmerge_the_same_bits(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    layer = several(lambda: adapted(LoRALinear, make().to(dtype)))
    layer.set_active({"fr": 0.5, "de": 2.0})
    before, x = state(layer), input_of(layer, dtype=dtype)
    expected = truth(layer, x)
    merged_weight = weight_of(layer) + layer.delta_weight().double()
    y = layer(x)
    layer.merge()
    assert layer.merged == {"fr": 0.5, "de": 2.0}
    assert_close(layer.base_weight(), merged_weight, dtype)
    assert_close(layer(x), expected, roundings=16)  # the sum is rounded into the weight's dtype: K roundings on the way
    layer.unmerge()
    assert layer.merged is None
    assert_same_state(layer, before)
    assert_same_bits(layer(x), y)
    layer.unmerge()  # nothing is merged: nothing happens
    assert_same_state(layer, before)


@both
def test_unmerge_survives_copies_and_moves(cls: Any) -> None:
    layer = adapted(cls)
    before = state(layer)
    layer.merge(force=True)
    assert any(not torch.equal(now, before[name]) for name, now in layer.state_dict().items())
    twin = copy.deepcopy(layer).to("cpu").to(torch.float32)
    twin.unmerge()
    assert_same_state(twin, before)
    layer.unmerge()
    assert_same_state(layer, before)


def test_a_module_that_shares_the_weight_keeps_its_own() -> None:
    linear = dense()
    other = nn.Linear(K, N)
    other.weight = linear.weight
    layer = adapted(LoRALinear, linear)
    before = other.weight.detach().clone()
    layer.merge()
    assert_same_bits(other.weight, before)
    layer.unmerge()
    assert layer.weight is other.weight


@both
def test_while_merged(cls: Any) -> None:
    layer = several(lambda: adapted(cls))
    layer.merge("fr", force=True)
    with pytest.raises(ValueError, match="already merged"):
        layer.merge("de", force=True)
    with pytest.raises(ValueError, match="adapter 'fr' is merged; unmerge before removing it"):
        layer.remove_adapter("fr")
    with pytest.raises(ValueError, match="are merged; unmerge before activating others"):
        layer.set_active("de")
    with pytest.raises(ValueError, match=r"rows: adapters \['fr'\] are merged"), routed(layer.owner, ["fr"] * M):
        layer(input_of(layer))
    assert layer.merged == {"fr": 1.0}


def test_merging_into_nf4_is_refused_with_the_loss() -> None:
    layer = adapted(QLoRALinear)
    before = state(layer)
    with torch.no_grad():
        layer.lora_B.mul_(1e-3)
    before = state(layer)
    with pytest.raises(
        ValueError, match=r"merging \['default'\] into NF4 would lose \d+\.\d% of their change.*force=True"
    ):
        layer.merge()
    assert_same_state(layer, before)
    assert layer.merged is None
    assert layer.merge_loss() > 0.5


def test_merge_loss_is_what_requantising_throws_away() -> None:
    layer = adapted(QLoRALinear)
    loss = layer.merge_loss()
    delta, before = layer.delta_weight().double(), weight_of(layer)
    layer.merge(force=True)
    change = weight_of(layer) - before
    assert loss == pytest.approx(1 - ((change * delta).sum() / (delta * delta).sum()).item(), abs=1e-6)
    assert loss < 0.5  # a delta as large as the weight survives
    quantised = NF4Weight.quantize((before + delta).float()).dequantize()
    assert_same_bits(layer.nf4_weight().dequantize(), quantised)


@with_adapters
@pytest.mark.parametrize("dtype", [None, *FLOATS], ids=str)
def test_to_linear_is_the_merged_layer(make: Make, dtype: torch.dtype | None) -> None:
    layer = several(make)
    layer.set_active({"fr": 0.5, "default": 1.0})
    before = state(layer)
    linear = layer.to_linear(dtype)
    wanted = dtype or torch.float32
    assert linear.weight.dtype == linear.bias.dtype == wanted
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()
    assert_close(weight, weight_of(layer) + layer.delta_weight().double(), wanted)
    assert_same_state(layer, before)
    with torch.no_grad():
        linear.weight.zero_(), linear.bias.zero_()
    assert_same_state(layer, before)
    layer.set_active(None)
    bare = layer.to_linear(dtype)
    weight = bare.weight if isinstance(bare, nn.Linear) else bare.weight.t()
    assert_close(weight, weight_of(layer), wanted)


@with_adapters
def test_delta_weight_is_the_weighted_sum(make: Make) -> None:
    layer = several(make)
    expected = sum(
        share
        * layer.adapter(name).scaling
        * (layer.adapter(name).lora_B.double() @ layer.adapter(name).lora_A.double())
        for name, share in (("fr", 0.5), ("de", -2.0))
    )
    delta = layer.delta_weight({"fr": 0.5, "de": -2.0})
    assert delta.dtype == torch.float32
    assert_close(delta, expected.detach())


@with_adapters
@pytest.mark.parametrize("lead", [(3,), (3, 2), (3, 2, 2)], ids=str)
def test_rows_get_their_own_adapter(make: Make, lead: tuple[int, ...]) -> None:
    layer = several(make)
    x = randn(*lead, layer.in_features, seed=9)
    with routed(layer.owner, ["de", None, "fr"]):
        y = layer(x)
    for entry, name in enumerate(["de", None, "fr"]):
        layer.set_active(name)
        assert_close(y[entry], truth(layer, x[entry]))
    layer.set_active("default")
    assert_close(layer(x), truth(layer, x))  # after the block, what is active counts again


@with_adapters
def test_rows_train_each_adapter_on_its_own_entries(make: Make) -> None:
    layer = several(make)
    x = input_of(layer, 4, 3)
    with routed(layer.owner, ["de", "fr", "de", None]):
        layer(x).square().sum().backward()
    mixed = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert mixed.keys() == {"lora_A@fr", "lora_B@fr", "lora_A@de", "lora_B@de"}
    layer.zero_grad()
    for name, entries in (("de", [0, 2]), ("fr", [1])):
        layer.set_active(name)
        layer(x[entries]).square().sum().backward()
    for name, grad in mixed.items():
        want = dict(layer.named_parameters())[name].grad
        assert_close(grad, want)


@both
def test_rows_drop_in_training_and_only_where_there_is_an_adapter(cls: Any) -> None:
    layer = adapted(cls, lora_dropout=0.5)
    layer.add_adapter("plain", r=2, init=False)
    x = input_of(layer, 3, 50)
    with routed(layer.owner, ["default", None, "plain"]):
        first, second = layer(x), layer(x)
        layer.eval()
        calm = layer(x)
    assert not torch.equal(first[0], second[0])
    assert_close(first[1:], calm[1:].double(), torch.float32)
    layer.set_active("default")
    assert_close(calm[0], truth(layer, x[0]))


def test_rows_want_one_name_an_entry() -> None:
    layer = several(ADAPTED["QLoRALinear"])
    with routed(layer.owner, ["fr", None]):
        with pytest.raises(ValueError, match="rows: 2 names for a batch whose leading dimension is 3"):
            layer(input_of(layer, 3))
        with pytest.raises(ValueError, match="rows: 2 names"):
            layer(input_of(layer)[0])
    with routed(layer.owner, ["fr", None], expand=2):
        assert layer(input_of(layer, 4)).shape == (4, N)
    other = several(ADAPTED["QLoRALinear"])
    with routed(other.owner, ["fr"]):
        assert layer(input_of(layer, 3)).shape == (3, N)  # another model's routing


def test_a_layer_without_the_adapter_serves_the_base() -> None:
    layer = several(ADAPTED["QLoRALinear"])
    x = input_of(layer, 2)
    with routed(layer.owner, ["nl", "fr"]):
        y = layer(x)
    layer.set_active(None)
    assert_close(y[0], truth(layer, x[0]))
    layer.set_active("fr")
    assert_close(y[1], truth(layer, x[1]))
