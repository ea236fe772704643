"""state_dict and load_state_dict: the layer's own keys, bitsandbytes', a dense weight; strict, and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import LoRALinear, NF4Linear, QLoRALinear
from tests.cases import randn
from tests.nn.layers import LAYERS, K, N, adapted, dense, input_of
from tests.tolerances import assert_same_bits

layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
quantised = pytest.mark.parametrize("cls", [NF4Linear, QLoRALinear])
Make = Callable[[], Any]


def fresh(layer: Any) -> Any:
    """A layer of the same sizes with other values."""
    options: dict[str, Any] = {}
    if hasattr(layer, "block_size"):
        options |= {"block_size": layer.block_size, "double_quant": layer.double_quant}
    if hasattr(layer, "adapter_names"):
        options |= {"r": 4, "lora_alpha": 6, "use_dora": layer.adapter("default").magnitude is not None}
    other = type(layer).from_linear(
        nn.Linear(layer.in_features, layer.out_features) if not layer._transposed else _conv(layer), **options
    )
    x = input_of(layer)
    assert not torch.equal(other(x), layer(x))
    return other


def _conv(layer: Any) -> nn.Module:
    module = layer._origin(layer.out_features, layer.in_features)
    nn.init.normal_(module.weight)
    return module


@layers
def test_round_trip(make: Make) -> None:
    layer = make()
    other = fresh(layer)
    x = input_of(layer)
    other.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    assert_same_bits(other(x), layer(x))
    for name, tensor in layer.state_dict().items():
        assert_same_bits(other.state_dict()[name], tensor)


@layers
def test_keys(make: Make) -> None:
    layer = make()
    keys = {"weight", "bias"}
    if isinstance(layer, NF4Linear):
        keys |= {"weight.absmax"}
        keys |= {"weight.nested_absmax", "weight.nested_offset"} if layer.double_quant else set()
        assert all(layer.state_dict()[key].dtype == torch.uint8 for key in keys - {"bias"})
    if hasattr(layer, "adapter_names"):
        keys |= {"lora_A", "lora_B"} | ({"lora_magnitude"} if layer.lora_magnitude is not None else set())
    assert set(layer.state_dict()) == keys


@layers
def test_inside_a_model(make: Make) -> None:
    """Under prefixes, two layers side by side, strictly."""
    model = nn.ModuleDict({"a": make(), "ab": make()})
    with torch.no_grad():
        model["ab"].bias.add_(1)
    other = nn.ModuleDict({"a": fresh(make()), "ab": fresh(make())})
    result = other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name in ("a", "ab"):
        assert_same_bits(other[name](input_of(model[name])), model[name](input_of(model[name])))


@quantised
@pytest.mark.parametrize(("block", "nested"), [(64, True), (64, False), (128, True), (32, False)])
def test_bitsandbytes_keys(cls: Any, block: int, nested: bool) -> None:
    """Whatever the block and nesting that the layer was made with; what was read then is what is written."""
    weight = NF4Weight.quantize(randn(N, K, seed=4, dtype=torch.bfloat16), block, nested)
    layer = nn.Sequential(cls(K, N, bias=False))
    missing, unexpected = layer.load_state_dict(weight.to_bnb("0.weight"), strict=cls is NF4Linear)
    assert set(missing) == ({"0.lora_A", "0.lora_B"} if cls is QLoRALinear else set())
    assert unexpected == []
    assert_same_bits(layer[0].nf4_weight().dequantize(), weight.dequantize())
    assert (layer[0].block_size, layer[0].double_quant, layer[0].weight_dtype) == (block, nested, torch.bfloat16)
    again = cls(K, N, bias=False, block_size=block, double_quant=nested)
    again.load_state_dict(layer[0].state_dict())
    assert_same_bits(again.nf4_weight().dequantize(torch.float32), weight.dequantize(torch.float32))


@quantised
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_weight_is_quantised_on_load(cls: Any, dtype: torch.dtype) -> None:
    values = randn(N, K, seed=4, dtype=dtype)
    layer = cls(K, N, bias=False, block_size=32)
    layer.load_state_dict({"weight": values}, strict=cls is NF4Linear)
    assert_same_bits(layer.nf4_weight().dequantize(), NF4Weight.quantize(values, 32).dequantize())
    assert layer.weight.dtype == torch.uint8
    assert layer.weight_dtype == dtype


@layers
def test_assign_into_a_layer_without_storage(make: Make) -> None:
    """A model made on the meta device and filled by ``load_state_dict(assign=True)`` never holds random weights."""
    layer = make()
    other = fresh(layer).to("meta")
    other.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    assert_same_bits(other(input_of(layer)), layer(input_of(layer)))
    flags = {name: p.requires_grad for name, p in layer.named_parameters()}
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags


@pytest.mark.parametrize("cls", [NF4Linear, LoRALinear, QLoRALinear])
def test_made_on_the_meta_device(cls: Any) -> None:
    with torch.device("meta"):
        layer = cls(K, N)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    source = cls(K, N)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(layer(input_of(source)), source(input_of(source)))


def without(*keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: [state.pop(key) for key in keys]


def changed(**values: Any) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({key.replace("__", "."): value for key, value in values.items()})


BYTES = torch.zeros(7, dtype=torch.uint8)
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no codes": (without("0.weight"), r'Missing key\(s\).*"0\.weight"'),
    "no weight at all": (
        without("0.weight", "0.weight.absmax", "0.weight.nested_absmax", "0.weight.nested_offset"),
        r'Missing key\(s\).*"0\.weight".*"0\.weight\.absmax"',
    ),
    "no scales": (without("0.weight.absmax"), r'"0\.weight": missing key .0\.weight\.absmax'),
    "no offset": (without("0.weight.nested_offset"), r'"0\.weight": missing key .0\.weight\.nested_offset'),
    "no bias": (without("0.bias"), r'Missing key\(s\).*"0\.bias"'),
    "an unknown key": (changed(**{"0.extra": BYTES}), r'Unexpected key\(s\).*"0\.extra"'),
    "codes too few": (changed(**{"0.weight": BYTES}), r'"0\.weight": expected weight of 1536 bytes.*got uint8 \[7\]'),
    "scales too few": (
        changed(**{"0.weight.absmax": BYTES}),
        r'"0\.weight": expected weight\.absmax of 48 bytes for blocks of 64, got uint8 \[7\]',
    ),
    "scales of floats": (
        changed(**{"0.weight.absmax": torch.zeros(48)}),
        r'"0\.weight": expected weight\.absmax of 48 bytes.*got float32 \[48\]',
    ),
    "codes of int32": (
        changed(**{"0.weight": torch.zeros(1536, dtype=torch.int32)}),
        r'"0\.weight": expected weight of 1536 bytes.*got int32 \[1536\]',
    ),
    "dense of another shape": (
        changed(**{"0.weight": torch.zeros(K, N)}),
        r'"0\.weight": expected a dense weight of shape \[48, 64\], got \[64, 48\]',
    ),
    "dense of fp64": (changed(**{"0.weight": torch.zeros(N, K, dtype=torch.float64)}), r'"0\.weight":.*float64'),
    "bias of another size": (changed(**{"0.bias": torch.zeros(7)}), r"size mismatch for 0\.bias"),
    "bitsandbytes' of another shape": (
        lambda state: state.update(NF4Weight.quantize(randn(K, N)).to_bnb("0.weight")),
        r'"0\.weight": expected a weight of shape \[48, 64\], got \[64, 48\]',
    ),
}


@quantised
@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_by_key(cls: Any, case: str) -> None:
    change, message = BROKEN[case]
    model = nn.Sequential(cls.from_linear(dense()))
    state = {name: tensor.clone() for name, tensor in nn.Sequential(cls(K, N)).state_dict().items()}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


@pytest.mark.parametrize("case", [case for case in BROKEN if "weight" in BROKEN[case][1]])
def test_a_refused_weight_changes_no_byte_of_it(case: str) -> None:
    change, _ = BROKEN[case]
    model = nn.Sequential(NF4Linear.from_linear(dense()))
    before = {name: p.detach().clone() for name, p in model[0].named_parameters() if name != "bias"}
    state = {name: tensor.clone() for name, tensor in nn.Sequential(NF4Linear(K, N)).state_dict().items()}
    change(state)
    with pytest.raises(RuntimeError):
        model.load_state_dict(state)
    for name, tensor in before.items():
        assert_same_bits(dict(model[0].named_parameters())[name], tensor)


def test_loading_does_not_change_the_dictionary_that_was_given() -> None:
    for source in (NF4Linear(K, N).state_dict(), {**NF4Weight.quantize(randn(N, K)).to_bnb(), "bias": torch.zeros(N)}):
        given = dict(source)
        NF4Linear(K, N).load_state_dict(given)
        assert given.keys() == source.keys()
        assert all(given[key] is source[key] for key in source)


def test_adapters_names_are_in_the_keys() -> None:
    layer = adapted(QLoRALinear)
    layer.add_adapter("fr", r=2, init=False)
    keys = {key for key in layer.state_dict() if key.startswith("lora")}
    assert keys == {"lora_A", "lora_B", "lora_A@fr", "lora_B@fr"}
    other = adapted(QLoRALinear)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"lora_A@fr"'):
        other.load_state_dict(layer.state_dict())
    other.add_adapter("fr", r=3)
    with pytest.raises(RuntimeError, match=r"size mismatch for lora_A@fr"):
        other.load_state_dict(layer.state_dict())
