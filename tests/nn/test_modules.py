"""NF4Linear, LoRALinear and QLoRALinear as modules: values, gradients, copies, dtypes, compilation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftrt
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import LoRALinear, NF4Linear, QLoRALinear
from tests.cases import FLOATS, randn
from tests.nn.layers import ADAPTED, LAYERS, K, M, N, adapted, conv1d, dense, input_of
from tests.tolerances import assert_close, assert_same_bits

layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
with_adapters = pytest.mark.parametrize("make", ADAPTED.values(), ids=ADAPTED.keys())
both = pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
Make = Callable[[], Any]


def weight_of(layer: Any) -> Tensor:
    """The base W [N, K] in fp64."""
    weight = layer.base_weight()
    return (weight.dequantize() if isinstance(weight, NF4Weight) else weight).detach().double()


def truth(layer: Any, x: Tensor) -> Tensor:
    W = weight_of(layer)
    for name, share in getattr(layer, "active", {}).items():
        a = layer.adapter(name)
        W = W + share * a.scaling * (a.lora_B.double() @ a.lora_A.double())
        if a.magnitude is not None:
            W = W * (a.magnitude.double() / W.norm(dim=1)).unsqueeze(1)
    y = x.double() @ W.t()
    return y if layer.bias is None else y + layer.bias.double()


@layers
@pytest.mark.parametrize("lead", [(), (M,), (2, 3), (0,)], ids=str)
def test_forward_is_the_equation(make: Make, lead: tuple[int, ...]) -> None:
    layer = make()
    x = randn(*lead, layer.in_features, seed=9)
    assert_close(layer(x), truth(layer, x))


@with_adapters
def test_only_the_adapter_is_trained_and_its_gradients_are_right(make: Make) -> None:
    layer, twin = make(), make()
    x = input_of(layer).requires_grad_()
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    A, B, wide = (t.detach().double().requires_grad_() for t in (twin.lora_A, twin.lora_B, x))
    with torch.no_grad():
        A.copy_(layer.lora_A), B.copy_(layer.lora_B)
    y = wide @ weight_of(layer).t() + layer.bias.double() + layer.scaling * (wide @ A.t() @ B.t())
    y.square().sum().backward()
    for got, want in ((layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad), (x.grad, wide.grad)):
        assert_close(got, want)


@layers
def test_new_layers_have_linears_signature_and_statistics(make: Make) -> None:
    cls = type(make())
    for bias in (True, False):
        layer = cls(256, 64, bias)
        assert (layer.in_features, layer.out_features) == (256, 64)
        assert (layer.bias is not None) == bias
        weight = weight_of(layer)
        assert weight.shape == (64, 256)
        assert weight.abs().max() <= 1 / 16 * 1.01
        assert 0.9 < weight.std() * 16 * 3**0.5 < 1.1


def test_initialisation_is_the_papers() -> None:
    layer = LoRALinear(256, 64, r=8, lora_alpha=16)
    assert (layer.lora_B == 0).all()
    assert layer.lora_A.abs().max() <= 1 / 16
    assert 0.9 < layer.lora_A.std().item() * 16 * 3**0.5 < 1.1
    assert layer.scaling == 2.0
    assert LoRALinear(256, 64, r=16, lora_alpha=16, use_rslora=True).scaling == 4.0
    gaussian = LoRALinear(256, 64, r=8, init="gaussian")
    assert (gaussian.lora_B == 0).all()
    assert 0.9 < gaussian.lora_A.std().item() * 8 < 1.1
    assert (LoRALinear(256, 64, r=8, init=False).lora_B != 0).any()


@both
def test_adapters_are_fp32_whatever_the_base(cls: Any) -> None:
    layer = cls(K, N, r=2, dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(randn(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert cls(K, N, r=2, adapter_dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16


def test_from_linear_takes_over_the_parameter_itself() -> None:
    linear = dense()
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight is weight
    assert layer.bias is bias
    assert not weight.requires_grad
    x = input_of(layer)
    assert_close(layer(x), nn.functional.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("cls", [NF4Linear, LoRALinear, QLoRALinear])
def test_hooks_and_training_flag_are_carried_over(cls: Any) -> None:
    linear, seen = dense(), []
    linear.eval()
    linear.register_forward_hook(lambda module, args, output: seen.append("forward"))
    linear.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer = cls.from_linear(linear)
    assert not layer.training
    layer(input_of(layer))
    assert seen == ["before", "forward"]


@pytest.mark.parametrize("cls", [NF4Linear, LoRALinear, QLoRALinear])
def test_conv1d_gives_what_it_gave(cls: Any) -> None:
    module = conv1d()
    x = randn(2, 3, K)
    layer = cls.from_linear(module)
    expected = x.double() @ weight_of(layer).t() + module.bias.double()
    assert_close(layer(x), expected)
    if cls is LoRALinear:
        assert_close(layer(x), module(x).detach())
    back = layer.to_linear()
    assert type(back) is type(module)
    assert back.weight.shape == (K, N)
    assert_close(back(x), expected)


@pytest.mark.parametrize("cls", [NF4Linear, LoRALinear, QLoRALinear])
@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.Conv1d(4, 4, 1),
        nn.Embedding(4, 4),
        nn.Bilinear(4, 4, 4),
        nn.MultiheadAttention(4, 1).out_proj,
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_refused_untouched(cls: Any, module: nn.Module) -> None:
    with pytest.raises(TypeError, match=type(module).__name__):
        cls.from_linear(module)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("cls", [NF4Linear, LoRALinear, QLoRALinear])
def test_integers_are_refused(cls: Any) -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch\.int8"):
        cls.from_linear(linear)


@both
def test_dropout_is_of_training_alone(cls: Any) -> None:
    layer = adapted(cls, lora_dropout=0.5)
    x = input_of(layer)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    once = layer(x)
    torch.manual_seed(1)
    assert_same_bits(layer(x), once)
    layer.eval()
    assert_same_bits(layer(x), layer(x))
    assert_close(layer(x), truth(layer, x))
    mean = torch.stack([layer.train()(x) for _ in range(600)]).double().mean(0)
    spread = (truth(layer, x) - x.double() @ weight_of(layer).t() - layer.bias.double()).abs().max()
    assert (mean - truth(layer, x)).abs().max() < 0.5 * spread


@layers
def test_deepcopy_is_equal_and_independent(make: Make) -> None:
    layer = make()
    x = input_of(layer)
    twin = copy.deepcopy(layer)
    expected = layer(x)
    assert_same_bits(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same_bits(layer(x), expected)
    assert all(a is not b for a, b in zip(layer.parameters(), twin.parameters(), strict=True))


@layers
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickle_and_torch_save_round_trip(make: Make, protocol: int) -> None:
    layer = make().eval()
    x = input_of(layer)
    assert_same_bits(pickle.loads(pickle.dumps(layer, protocol))(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert_same_bits(again(x), layer(x))
    assert again.training == layer.training


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casting_leaves_codes_and_scales_alone(make: Make, dtype: torch.dtype) -> None:
    layer = make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters() if p.dtype == torch.uint8}
    wide = weight_of(layer)
    for cast in (
        lambda m: m.to(dtype),
        lambda m: m.half() if dtype == torch.float16 else m.bfloat16(),
        lambda m: m.to("cpu", dtype),
        lambda m: m.float().to(dtype),
    ):
        low = cast(copy.deepcopy(layer))
        for name, tensor in before.items():
            assert_same_bits(dict(low.named_parameters())[name], tensor)
        assert low.bias.dtype == dtype
        x = input_of(low, dtype=dtype)
        y = low(x)
        assert y.dtype == dtype
        if before:
            assert_close(weight_of(low), wide, torch.float64)
        expected = truth(low, x) if not before else None
        if expected is not None:
            assert_close(y, expected, roundings=2)


@pytest.mark.parametrize("make", [LAYERS["NF4Linear"], LAYERS["QLoRALinear"]])
def test_casting_of_floating_tensors_by_others_leaves_the_weight_alone(make: Make) -> None:
    """What FSDP2's mixed precision and autocast do: every floating Parameter is cast, whatever its name."""
    layer = make()
    weight = weight_of(layer)
    for name, parameter in list(layer.named_parameters()):
        if parameter.is_floating_point():
            layer._parameters[name] = nn.Parameter(
                parameter.detach().to(torch.float16).float(), parameter.requires_grad
            )
    assert_close(weight_of(layer), weight, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(input_of(layer)).dtype == torch.bfloat16


@layers
def test_moving_to_another_device_moves_everything(make: Make, device: torch.device) -> None:
    layer = make()
    x = input_of(layer)
    expected = truth(layer, x)
    layer = layer.to(device)
    assert {p.device.type for p in layer.parameters()} == {device.type}
    assert_close(layer(x.to(device)), expected)
    assert {p.device.type for p in layer.to("meta").parameters()} == {"meta"}


@layers
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_gives_the_same_gradients(make: Make, use_reentrant: bool) -> None:
    layer = make()
    if hasattr(layer, "add_adapter"):
        dora = layer.adapter("default").magnitude is not None
        layer.add_adapter("dropped", r=3, lora_dropout=0.4, init=False, use_dora=dora)
        layer.set_active("dropped")
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        x = input_of(layer).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad and p.grad is not None)])
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)


@layers
def test_compile_fullgraph(make: Make) -> None:
    layer = make()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, layer):
        x = input_of(layer).requires_grad_()
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


def test_compile_with_dropout_fullgraph() -> None:
    layer = adapted(QLoRALinear, lora_dropout=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = input_of(layer)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert layer.lora_B.grad is not None
    layer.eval()
    assert_close(compiled(x), truth(layer, x))


def test_compiled_layer_sees_a_change_of_adapters() -> None:
    layer = adapted(QLoRALinear)
    layer.add_adapter("fr", r=2, init=False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = input_of(layer)
    for active in ("default", "fr", None, {"default": 0.5, "fr": 2.0}):
        layer.set_active(active)
        assert_close(compiled(x), truth(layer, x))


@both
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_training_lowers_the_loss(cls: Any, dtype: torch.dtype) -> None:
    """A target that the base plus a matrix of rank 2 reaches."""
    layer = cls.from_linear(dense(dtype=dtype), r=2, lora_alpha=2)
    frozen = {name: p.detach().clone() for name, p in layer.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    x = randn(256, K, seed=20, dtype=dtype)
    target = layer(x).detach() + (x.float() @ randn(K, 2, seed=21) @ randn(2, N, seed=22)).to(dtype) / 8
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x).float() - target.float()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    for name, before in frozen.items():
        assert_same_bits(dict(layer.named_parameters())[name], before)


@both
def test_functional_call_swaps_the_adapter(cls: Any) -> None:
    """torch.func reaches adapters by their Parameters' names."""
    layer = adapted(cls)
    x = input_of(layer)
    zeros = {"lora_B": torch.zeros_like(layer.lora_B)}
    bare = x.double() @ weight_of(layer).t() + layer.bias.double()
    assert_close(torch.func.functional_call(layer, zeros, (x,)), bare)


@both
def test_repr_says_what_the_layer_is(cls: Any) -> None:
    text = repr(adapted(cls))
    for part in (f"in_features={K}", f"out_features={N}", "bias=True", "default: r=4"):
        assert part in text
    assert "block_size=64" in repr(NF4Linear(K, N))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be an integer of at least 1, got 0"),
        ({"r": -1}, ValueError, "r must be .* got -1"),
        ({"r": True}, ValueError, "r must be .* got True"),
        ({"r": 8.5}, ValueError, "r must be .* got 8.5"),
        ({"r": "8"}, ValueError, "r must be .* got '8'"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite, got nan"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite, got inf"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"init": "kaiming"}, ValueError, "init must be .*'pissa_niter_<n>'.* got 'kaiming'"),
        ({"init": "olora"}, ValueError, "got 'olora' .*of peft is not supported"),
        ({"init": "orthogonal", "r": 3}, ValueError, "'orthogonal' needs an even rank, got r = 3"),
        ({"init": "pissa", "r": 49}, ValueError, r"a rank of at most 48 over a weight of \[48, 64\], got r = 49"),
        ({"init": "pissa", "lora_alpha": 0}, ValueError, "'pissa' needs a scaling above 0, got 0"),
        ({"adapter_name": ""}, ValueError, "adapter name must be non-empty"),
        ({"adapter_name": "a.b"}, ValueError, "adapter name must be .* got 'a.b'"),
        ({"adapter_name": "a@b"}, ValueError, "adapter name must be .* got 'a@b'"),
        ({"r": None, "lora_alpha": 4}, ValueError, "r is None, but lora_alpha"),
    ],
    ids=str,
)
@both
def test_a_bad_option_is_named(cls: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cls(K, N, **arguments)


@pytest.mark.parametrize("cls", [NF4Linear, QLoRALinear])
def test_a_bad_size_or_block_is_named(cls: Any) -> None:
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        cls(0, N)
    with pytest.raises(ValueError, match="out_features must be at least 1, got 0"):
        cls(K, 0)
    with pytest.raises(ValueError, match=r"block_size must be one of .* got 48"):
        cls(K, N, block_size=48)
    with pytest.raises(TypeError, match="float64"):
        cls(K, N, dtype=torch.float64)


def test_backend_is_forced_around_a_module() -> None:
    layer = adapted(QLoRALinear)
    x = input_of(layer)
    with peftrt.backend("reference"):
        reference = layer(x)
    assert_close(layer(x), reference)
