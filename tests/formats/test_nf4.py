"""NF4 against bitsandbytes: the same bytes, the same values, checkpoints both ways."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import peftrt
from peftrt.formats.nf4 import BLOCK_SIZES, DYNAMIC_CODEBOOK, NF4_CODEBOOK, NF4Weight, bytes_float
from peftrt.reference import nf4 as reference
from tests.cases import BACKENDS, FLOATS, bitsandbytes_eager, randn
from tests.tolerances import assert_close, assert_same_bits

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with bitsandbytes_eager():
        yield


def random_shapes(count: int) -> list[tuple[int, ...]]:
    """1-D to 3-D, a third of them with an odd number of elements, most with a partial last block."""
    draw = random.Random(50)
    shapes: list[tuple[int, ...]] = [(1,), (1, 1), (3, 5), (1, 64), (7, 1), (2, 3, 5), (4096,), (63, 65)]
    while len(shapes) < count:
        dims = draw.choice((1, 2, 2, 2, 3))
        shapes.append(tuple(draw.randint(1, {1: 9000, 2: 120, 3: 20}[dims]) for _ in range(dims)))
    return shapes


def theirs(weight: Tensor, block_size: int, nested: bool, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The state dict that bitsandbytes writes for a weight."""
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    return {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def their_values(state_dict: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """What bitsandbytes decodes from such a state dict."""
    stats = {key: value for key, value in state_dict.items() if key != "weight"}
    state = bnb.functional.QuantState.from_dict(stats, device=torch.device("cpu"))
    if dtype is not None:
        state.dtype = dtype
    return bnb.functional.dequantize_4bit(state_dict["weight"], state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_values_equal_bitsandbytes_bit_for_bit(block_size: int, nested: bool, dtype: torch.dtype, backend: str) -> None:
    # whole blocks, a partial last block, an odd count, more than 256 blocks
    for shape in ((48, 128), (33, 129), (1, block_size + 1), (block_size, 257)):
        state_dict = theirs(randn(*shape, seed=block_size, dtype=dtype), block_size, nested)
        with peftrt.backend(backend):
            values = NF4Weight.from_bnb(state_dict).dequantize()
        assert_same_bits(values, their_values(state_dict))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", random_shapes(50), ids=str)
def test_values_of_any_shape_equal_bitsandbytes(shape: tuple[int, ...], backend: str) -> None:
    draw = random.Random(str(shape))
    dtype, nested, block_size = draw.choice(FLOATS), draw.random() < 0.5, draw.choice(BLOCK_SIZES)
    state_dict = theirs(randn(*shape, dtype=dtype), block_size, nested)
    weight = NF4Weight.from_bnb(state_dict)
    assert weight.shape == shape
    with peftrt.backend(backend):
        for out in FLOATS:  # also dtypes other than the one that was quantised
            assert_same_bits(weight.dequantize(out), their_values(state_dict, out).view(shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_equal_bitsandbytes(block_size: int, dtype: torch.dtype) -> None:
    """At least 99.99 % of the nibbles, and the plain scales to the last bit."""
    weight = randn(1000, 257, seed=block_size, dtype=dtype)
    state_dict = theirs(weight, block_size, False)
    ours = NF4Weight.quantize(weight, block_size, double_quant=False)
    assert_same_bits(bytes_float(ours.absmax), state_dict["weight.absmax"])
    a, b = ours.codes.reshape(-1), state_dict["weight"].reshape(-1)
    assert a.shape == b.shape
    different = ((a >> 4) != (b >> 4)).sum() + ((a & 15) != (b & 15)).sum()
    assert different <= 1e-4 * weight.numel(), f"{different} of {weight.numel()} nibbles differ"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_nested_scales_equal_bitsandbytes(block_size: int, dtype: torch.dtype) -> None:
    """Its 8-bit search now and then takes a neighbour of the nearest level (2 of 1,000); ours is never farther."""
    weight = randn(2**17 + 7, seed=block_size, dtype=dtype) * 0.02
    state_dict = theirs(weight, block_size, True)
    ours = NF4Weight.from_bnb(NF4Weight.quantize(weight, block_size).to_bnb())
    mine, other = ours.absmax.reshape(-1).int(), state_dict["weight.absmax"].reshape(-1).int()
    assert (mine - other).abs().max() <= 2
    assert (mine != other).sum() <= max(5, 0.01 * mine.numel())
    assert_close(bytes_float(ours.nested_absmax), state_dict["weight.nested_absmax"])
    plain = bytes_float(NF4Weight.quantize(weight, block_size, double_quant=False).absmax)
    error = (reference.block_scales(ours.absmax, ours.nested_absmax, ours.nested_offset) - plain).abs()
    their_weight = NF4Weight.from_bnb(state_dict)
    scales = reference.block_scales(their_weight.absmax, their_weight.nested_absmax, their_weight.nested_offset)
    assert (error <= (scales - plain).abs() + 1e-6 * plain.max()).all()


def test_codebooks_equal_bitsandbytes() -> None:
    assert_same_bits(NF4_CODEBOOK, bnb.functional.get_4bit_type("nf4", device="cpu").float())
    assert_same_bits(DYNAMIC_CODEBOOK, bnb.functional.create_dynamic_map().float())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(128, 256), (33, 65), (7,), (2, 3, 5)], ids=str)
def test_state_dict_round_trip_keeps_every_byte(shape: tuple[int, ...], nested: bool) -> None:
    state_dict = theirs(randn(*shape, dtype=torch.bfloat16), 64, nested)
    ours = NF4Weight.from_bnb(state_dict).to_bnb()
    assert ours.keys() == state_dict.keys()
    json_key = "weight.quant_state.bitsandbytes__nf4"
    for key in ours.keys() - {json_key}:
        assert_same_bits(ours[key], state_dict[key])
    assert ours[json_key].dtype == torch.uint8
    assert json.loads(bytes(ours[json_key].tolist())) == json.loads(bytes(state_dict[json_key].tolist()))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitsandbytes_decodes_what_peftrt_writes(dtype: torch.dtype, nested: bool) -> None:
    weight = NF4Weight.quantize(randn(33, 100, dtype=dtype), 32, nested)
    assert_same_bits(their_values(weight.to_bnb()), weight.dequantize())
    prefixed = weight.to_bnb("model.layers.0.q.weight")
    assert all(key.startswith("model.layers.0.q.weight") for key in prefixed)
    again = NF4Weight.from_bnb({**prefixed, "model.layers.0.q.bias": torch.zeros(33)}, "model.layers.0.q.weight")
    assert_same_bits(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_quant_storage_is_a_view_of_the_same_bytes(storage: torch.dtype) -> None:
    values = randn(32, 64)
    state_dict = theirs(values, 64, True, storage)
    assert state_dict["weight"].dtype == storage
    plain = NF4Weight.from_bnb(theirs(values, 64, True))
    assert_same_bits(NF4Weight.from_bnb(state_dict).codes, plain.codes)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_state_dict_of_linear4bit_goes_both_ways(nested: bool) -> None:
    dense = torch.nn.Linear(128, 48)
    layer = bnb.nn.Linear4bit(128, 48, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu")
    saved = layer.state_dict()
    assert "weight.quant_state.bitsandbytes__nf4" in saved
    ours = NF4Weight.from_bnb(saved)
    assert_same_bits(
        ours.dequantize(torch.float32), bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    )

    fresh = bnb.nn.Linear4bit(128, 48, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32)
    keys = ours.to_bnb()
    fresh.weight = bnb.nn.Params4bit.from_prequantized(keys.pop("weight"), keys, device="cpu")
    fresh.bias = layer.bias
    x = randn(3, 128)
    assert_same_bits(fresh(x), layer(x))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_chunks_give_the_same_bytes(dtype: torch.dtype, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(57, 301, dtype=dtype)
    whole = NF4Weight.quantize(weight, 64, nested).tensors()
    monkeypatch.setattr(reference, "CHUNK", 4096)
    for name, tensor in NF4Weight.quantize(weight, 64, nested).tensors().items():
        assert_same_bits(tensor, whole[name])


def test_chunk_is_whole_blocks_of_every_size() -> None:
    assert all(reference.CHUNK % size == 0 for size in BLOCK_SIZES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_decode_to_exact_zeros(dtype: torch.dtype, nested: bool, backend: str) -> None:
    weight = randn(8, 128, dtype=dtype)
    weight[2] = 0
    with peftrt.backend(nf4_dequantize=backend):
        values = NF4Weight.quantize(weight, 64, nested).dequantize()
        nothing = NF4Weight.quantize(torch.zeros(5, 13, dtype=dtype), 64, nested).dequantize()
    assert (values[2] == 0).all()
    assert (values[1] != 0).any()
    assert (nothing == 0).all()


@pytest.mark.parametrize("byte", [0x00, 0x77, 0xF8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_scale_zero_decodes_to_zero_whatever_its_codes(backend: str, byte: int) -> None:
    """bitsandbytes packs zeros as 0x77 on a CPU and as 0x00 on some CUDA builds."""
    weight = NF4Weight.quantize(torch.zeros(4, 64), 64, double_quant=False)
    weight.codes.fill_(byte)
    with peftrt.backend(backend):
        assert (weight.dequantize() == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_stays_in_its_block(bad: float) -> None:
    weight = randn(4, 128)
    clean = NF4Weight.quantize(weight, 64, double_quant=False).dequantize().view(8, 64)
    weight[1, 3] = bad
    values = NF4Weight.quantize(weight, 64, double_quant=False).dequantize().view(8, 64)
    assert not values[2].isfinite().any()
    others = [block for block in range(8) if block != 2]
    assert_same_bits(values[others], clean[others])


def test_nan_is_never_hidden_by_nested_scales() -> None:
    """The mean of the scales is not finite then, and nothing that is decoded looks like a weight."""
    weight = randn(4, 128)
    weight[1, 3] = math.nan
    assert NF4Weight.quantize(weight, 64).dequantize().isnan().all()


def test_sizes_and_layout() -> None:
    weight = NF4Weight.quantize(randn(128, 256, dtype=torch.bfloat16))
    assert (weight.codes.shape, weight.absmax.shape) == ((128, 128), (128, 4))
    assert (weight.numel, weight.is_nested, weight.dtype) == (128 * 256, True, torch.bfloat16)
    assert weight.nbytes == 128 * 128 + 512 + 4 * 2 + 4
    assert all(tensor.dtype == torch.uint8 for tensor in weight.tensors().values())
    flat = NF4Weight.quantize(randn(5, 13), double_quant=False)
    assert (flat.codes.shape, flat.absmax.shape, flat.nested_absmax) == ((33,), (8,), None)
    big = NF4Weight.quantize(torch.zeros(1024, 1024))
    assert 8 * big.nbytes / big.numel == pytest.approx(4.127, abs=1e-3)


def test_rows_of_a_matrix_can_be_sliced_apart() -> None:
    """Sharding by rows: codes and scales of rows 3 ... 5 alone decode to those rows."""
    weight = NF4Weight.quantize(randn(8, 128), double_quant=False)
    part = NF4Weight(weight.codes[3:6], weight.absmax[3:6], None, None, (3, 128), weight.dtype)
    assert_same_bits(part.dequantize(), weight.dequantize()[3:6])


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_more_than_2_31_elements_are_counted_right(nested: bool) -> None:
    n, k = 2**16, 2**15 + 64
    with FakeTensorMode():
        weight = NF4Weight.quantize(torch.empty(n, k, dtype=torch.bfloat16), 64, nested)
        assert weight.numel == n * k > 2**31
        assert weight.codes.shape == (n, k // 2)
        assert weight.absmax.numel() == n * k // 64 * (1 if nested else 4)
        assert weight.dequantize(torch.float16).shape == (n, k)
        x = torch.empty(3, k, dtype=torch.bfloat16)
        assert peftrt.ops.nf4_linear(x, weight).shape == (3, n)


def corrupt(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> dict[str, Tensor]:
    """A good nested state dict after ``change(keys, the JSON object)``."""
    keys: dict[str, Any] = NF4Weight.quantize(randn(8, 64)).to_bnb()
    name = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(keys[name].tolist()))
    change(keys, state)
    if name in keys and keys[name] is not None and keys[name].numel() > 40:
        keys[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return keys


def _raw(text: bytes) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda keys, _: keys.update(
        {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}
    )


def _set(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda keys, state: (keys if key.startswith("weight") else state).update({key: value})


BROKEN = {
    "no state": (lambda keys, _: keys.pop("weight.quant_state.bitsandbytes__nf4"), KeyError, "quant_state"),
    "no codes": (lambda keys, _: keys.pop("weight"), KeyError, "weight"),
    "no scales": (lambda keys, _: keys.pop("weight.absmax"), KeyError, "weight.absmax"),
    "no codebook": (lambda keys, _: keys.pop("weight.quant_map"), KeyError, "weight.quant_map"),
    "no nested scales": (lambda keys, _: keys.pop("weight.nested_absmax"), KeyError, "weight.nested_absmax"),
    "no nested codebook": (lambda keys, _: keys.pop("weight.nested_quant_map"), KeyError, "weight.nested_quant_map"),
    "not JSON": (_raw(b"{quant"), ValueError, "quant_state.*JSON"),
    "not UTF-8": (_raw(b"\xff\xfe"), ValueError, "quant_state.*JSON"),
    "empty": (_raw(b""), ValueError, "quant_state.*JSON"),
    "a list": (_raw(b"[1, 2]"), ValueError, "quant_state.*object"),
    "nested too deep": (_raw(b"[" * 39), ValueError, "quant_state.*JSON"),
    "other type": (_set("quant_type", "fp4"), ValueError, "quant_type.*fp4"),
    "no type": (lambda _, state: state.pop("quant_type"), ValueError, "quant_type"),
    "block of 48": (_set("blocksize", 48), ValueError, "blocksize.*48"),
    "block as text": (_set("blocksize", "64"), ValueError, "blocksize.*'64'"),
    "block as list": (_set("blocksize", [64]), ValueError, r"blocksize.*\[64\]"),
    "block as float": (_set("blocksize", 64.0), ValueError, "blocksize.*64.0"),
    "dtype of code": (_set("dtype", "load"), ValueError, "dtype.*load"),
    "dtype int8": (_set("dtype", "int8"), ValueError, "dtype.*int8"),
    "dtype a list": (_set("dtype", ["float32"]), ValueError, "dtype"),
    "no shape": (_set("shape", None), ValueError, "shape.*None"),
    "empty shape": (_set("shape", []), ValueError, "shape"),
    "negative shape": (_set("shape", [-8, -64]), ValueError, "shape.*-8"),
    "zero in shape": (_set("shape", [0, 64]), ValueError, "shape"),
    "float in shape": (_set("shape", [8.0, 64]), ValueError, "shape"),
    "bool in shape": (_set("shape", [True, 512]), ValueError, "shape"),
    "huge shape": (_set("shape", [2**60, 2**60]), ValueError, "shape"),
    "larger shape": (_set("shape", [80, 64]), ValueError, "weight"),
    "smaller shape": (_set("shape", [4, 64]), ValueError, "weight"),
    "nan offset": (_set("nested_offset", math.nan), ValueError, "nested_offset.*nan"),
    "offset as text": (_set("nested_offset", "0.1"), ValueError, "nested_offset"),
    "other nested block": (_set("nested_blocksize", 128), ValueError, "nested_blocksize.*128"),
    "nested without offset": (lambda _, state: state.pop("nested_offset"), ValueError, "absmax|nested"),
    "other codebook": (_set("weight.quant_map", NF4_CODEBOOK.flip(0)), ValueError, "weight.quant_map"),
    "codebook of 15": (_set("weight.quant_map", NF4_CODEBOOK[:15]), ValueError, "weight.quant_map"),
    "other nested codebook": (_set("weight.nested_quant_map", DYNAMIC_CODEBOOK * 2), ValueError, "nested_quant_map"),
    "scales too few": (_set("weight.absmax", torch.zeros(7, dtype=torch.uint8)), ValueError, "weight.absmax"),
    "scales of another dtype": (_set("weight.absmax", torch.zeros(8)), ValueError, "weight.absmax.*uint8"),
    "nested scales too many": (_set("weight.nested_absmax", torch.zeros(2)), ValueError, "weight.nested_absmax"),
    "nested scales of bytes": (
        _set("weight.nested_absmax", torch.zeros(1, dtype=torch.uint8)),
        ValueError,
        "weight.nested_absmax",
    ),
    "codes too few": (_set("weight", torch.zeros(255, 1, dtype=torch.uint8)), ValueError, "weight"),
    "codes too many": (_set("weight", torch.zeros(2560, 1, dtype=torch.uint8)), ValueError, "weight"),
    "codes on no dtype": (_set("weight", torch.zeros(256, 1, dtype=torch.complex64)), ValueError, "weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_corrupted_state_is_refused_by_name(case: str) -> None:
    change, error, message = BROKEN[case]
    with pytest.raises(error, match=message):
        NF4Weight.from_bnb(corrupt(change))


def test_the_uncorrupted_state_is_read() -> None:
    weight = NF4Weight.from_bnb(corrupt(lambda keys, state: None))
    assert_same_bits(weight.dequantize(), NF4Weight.quantize(randn(8, 64)).dequantize())


def test_fp4_is_told_from_nf4() -> None:
    codes, state = bnb.functional.quantize_4bit(randn(8, 64), quant_type="fp4")
    keys = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    with pytest.raises(ValueError, match="weight is FP4"):
        NF4Weight.from_bnb(keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_quantize_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(
        TypeError, match=r"nf4_quantize: weight must be one of float32, bfloat16, float16, got \w+ \[4\]"
    ):
        NF4Weight.quantize(torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("block_size", [0, -64, 16, 48, 8192])
def test_quantize_refuses_other_blocks(block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"nf4_quantize: block_size must be one of .*, got {block_size}"):
        NF4Weight.quantize(torch.zeros(64), block_size)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0)], ids=str)
def test_quantize_refuses_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="nf4_quantize: weight must be non-empty"):
        NF4Weight.quantize(torch.zeros(shape))


def test_scalars_and_views_are_quantised_by_value() -> None:
    assert NF4Weight.quantize(torch.tensor(3.0)).dequantize().item() == pytest.approx(3.0)
    weight = randn(64, 96)
    assert_same_bits(NF4Weight.quantize(weight.t()).codes, NF4Weight.quantize(weight.t().contiguous()).codes)
