"""NF4 weights: the codebooks, and the one stored form, which is bitsandbytes' bytes.

NF4 is the information-theoretically motivated 4-bit data type of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section
3): sixteen levels, one fp32 scale ("absmax") a block of consecutive weights. Nested ("double") quantisation stores the
scales themselves in 8 bits, with one fp32 scale for every 256 of them and their mean as an offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The one place for the levels in Python; csrc/nf4.h has them for native code, and a test holds the two equal.
NF4_CODEBOOK = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)


def dynamic_decade(decade: int, count: int) -> Tensor:
    """One decade's magnitudes of a dynamic map: the midpoints of ``count`` equal steps over 10^(decade - 6) x [0.1, 1].

    Rounded to fp32 in the order of bitsandbytes, whose bytes they must match. The edges are those of ``torch.linspace``
    where it rounds a product and a sum together; on a CPU without FMA it rounds them apart, and levels would differ.
    """
    start, end = torch.tensor([0.1, 1.0], dtype=torch.float32)
    step, i = ((end - start) / count).double(), torch.arange(count + 1, dtype=torch.float64)
    edges = torch.where(i < (count + 1) // 2, start + step * i, end - step * (count - i)).float()
    return (10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2.0)


def _dynamic_codebook() -> Tensor:
    """The signed dynamic 8-bit map (Dettmers 2015, arXiv:1511.04561): 7 decades, split finer the larger.

    Decade i in 0..6 has 2^i magnitudes, with either sign; 0 and 1 complete the 256 values.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        magnitudes = dynamic_decade(decade, 2**decade)
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_CODEBOOK = _dynamic_codebook()


def midpoints(codebook: Tensor) -> Tensor:
    """Decision thresholds of a sorted codebook [C]: fp32 [C - 1], the midpoints of neighbouring levels."""
    return (codebook[1:] + codebook[:-1]) / 2


def float_bytes(values: Tensor) -> Tensor:
    """fp32 [..., n] as its bytes, uint8 [..., 4 n], which no cast of a model's dtype touches."""
    return values.to(torch.float32).contiguous().view(torch.uint8)


def bytes_float(raw: Tensor) -> Tensor:
    """The inverse of :func:`float_bytes`, flat: uint8 of 4 n bytes to fp32 [n]."""
    raw = raw.reshape(-1)
    if raw.storage_offset() % 4 or not raw.is_contiguous():  # a view into a file's buffer need not be aligned for fp32
        raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(torch.float32)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight in NF4, as tensors of bytes.

    Attributes:
        codes: uint8, two codes a byte, the first in the high nibble. ``[N, K/2]`` for a matrix with K a multiple of
            ``block_size``, so that it can be sharded by rows; otherwise flat, ``[ceil(numel/2)]``.
        absmax: uint8 scales of the blocks. Nested: one 8-bit code a block, ``[N, K/block_size]`` or ``[blocks]``. Not
            nested: fp32 bytes, four a block.
        nested_absmax: uint8 ``[4 ceil(blocks/256)]``, fp32 bytes of the scales of ``absmax``; None where not nested.
        nested_offset: uint8 ``[4]``, the fp32 bytes of the mean of the scales; None where not nested.
        shape: shape of the weight.
        dtype: dtype of the weight that was quantised: fp32, bf16 or fp16; what :meth:`dequantize` gives by default.
        block_size: consecutive weights that share a scale: a power of two in 32 ... 4096.

    Decoding, with two fp32 roundings for the scale and one for the value:
    ``scale = dynamic[absmax] * nested_absmax + nested_offset``, ``value = round(nf4[code] * scale)``.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64

    @classmethod
    def quantize(cls, weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
        """Quantise ``weight`` (fp32, bf16 or fp16, any shape) on its own device.

        Raises:
            ValueError: ``block_size`` is not a power of two in 32 ... 4096, or ``weight`` is empty.
            TypeError: another dtype.
        """
        codes, absmax, nested_absmax, nested_offset = torch.ops.peftrt.nf4_quantize(weight, block_size, double_quant)
        return cls.assemble(
            codes,
            absmax,
            nested_absmax if double_quant else None,
            nested_offset if double_quant else None,
            tuple(weight.shape),
            weight.dtype,
            block_size,
        )

    @classmethod
    def assemble(
        cls,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        block_size: int,
    ) -> NF4Weight:
        """Give flat ``codes`` and ``absmax`` the row structure that the class promises."""
        codes, absmax = codes.reshape(-1), absmax.reshape(-1)
        if splits_by_rows(shape, block_size):
            codes, absmax = codes.view(shape[0], -1), absmax.view(shape[0], -1)
        return cls(codes, absmax, nested_absmax, nested_offset, shape, dtype, block_size)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def is_nested(self) -> bool:
        """Whether the scales are themselves quantised."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name, without those that are None."""
        named = {name: getattr(self, name) for name in ("codes", "absmax", "nested_absmax", "nested_offset")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in ``dtype`` (default: the dtype it was quantised from), equal to bitsandbytes' bit for bit."""
        return torch.ops.peftrt.nf4_dequantize(
            self.codes,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            list(self.shape),
            self.block_size,
            dtype or self.dtype,
        )

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device; the dtype never changes."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def to_bnb(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The state dict that bitsandbytes 0.50 writes for this weight, with keys under ``prefix``."""
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": self.block_size, "dtype": _dtype_name(self.dtype)}
        state["shape"] = list(self.shape)
        keys = {
            prefix: self.codes.reshape(-1, 1),
            f"{prefix}.absmax": self.absmax.reshape(-1) if self.is_nested else bytes_float(self.absmax),
            f"{prefix}.quant_map": NF4_CODEBOOK.to(self.device, copy=True),
        }
        if self.nested_absmax is not None and self.nested_offset is not None:
            state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
            state["nested_offset"] = bytes_float(self.nested_offset).item()
            keys[f"{prefix}.nested_absmax"] = bytes_float(self.nested_absmax)
            keys[f"{prefix}.nested_quant_map"] = DYNAMIC_CODEBOOK.to(self.device, copy=True)
        keys[f"{prefix}.quant_state.bitsandbytes__nf4"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8, device=self.device
        )
        return keys

    @classmethod
    def from_bnb(cls, state_dict: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
        """Read a weight from the keys that bitsandbytes writes under ``prefix``; other keys are left alone.

        Raises:
            KeyError: a key is missing.
            ValueError: the weight is not NF4, a codebook is another one, or a size does not fit the recorded shape.
        """
        state = _bnb_state(state_dict, prefix)
        shape, block_size = tuple(state["shape"]), state["blocksize"]
        _expect_codebook(state_dict, f"{prefix}.quant_map", NF4_CODEBOOK)
        stored = state_dict[prefix]
        _expect(
            stored.dtype in (torch.uint8, *FLOAT_DTYPES),
            prefix,
            f"uint8, or bytes as {FLOAT_DTYPES}, got {stored.dtype}",
        )
        # quant_storage of bf16, fp16 or fp32 is a view of the same bytes
        codes = stored.contiguous().view(torch.uint8).reshape(-1)
        absmax = state_dict[f"{prefix}.absmax"].reshape(-1)
        nested_absmax = nested_offset = None
        blocks = -(-math.prod(shape) // block_size)
        if "nested_offset" in state:
            _expect_codebook(state_dict, f"{prefix}.nested_quant_map", DYNAMIC_CODEBOOK)
            _expect(
                state_dict[f"{prefix}.absmax"].dtype == torch.uint8, f"{prefix}.absmax", "uint8 where scales are nested"
            )
            nested = state_dict[f"{prefix}.nested_absmax"].reshape(-1)
            _expect(
                nested.numel() == -(-blocks // NESTED_BLOCK_SIZE), f"{prefix}.nested_absmax", "one scale for 256 blocks"
            )
            _expect(nested.dtype == torch.float32, f"{prefix}.nested_absmax", f"float32, got {nested.dtype}")
            nested_absmax = float_bytes(nested)
            nested_offset = float_bytes(torch.tensor([state["nested_offset"]], device=codes.device))
        else:
            _expect(absmax.dtype == torch.float32, f"{prefix}.absmax", "float32 where scales are not nested")
        size = (math.prod(shape) + 1) // 2
        # a wider quant_storage may have padded the end
        _expect(
            0 <= codes.numel() - size < stored.element_size(), prefix, f"{size} bytes for {shape}, got {codes.numel()}"
        )
        _expect(absmax.numel() == blocks, f"{prefix}.absmax", f"{blocks} scales for shape {shape}, block {block_size}")
        absmax = absmax if nested_absmax is not None else float_bytes(absmax)
        return cls.assemble(
            codes[:size], absmax, nested_absmax, nested_offset, shape, getattr(torch, state["dtype"]), block_size
        )


def stored_sizes(numel: int, block_size: int, nested: bool) -> dict[str, int]:
    """Bytes of each stored tensor of a weight of ``numel`` elements, by field name."""
    blocks = -(-numel // block_size)
    sizes = {"codes": (numel + 1) // 2, "absmax": blocks if nested else 4 * blocks}
    if nested:
        sizes |= {"nested_absmax": 4 * -(-blocks // NESTED_BLOCK_SIZE), "nested_offset": 4}
    return sizes


def splits_by_rows(shape: tuple[int, ...], block_size: int) -> bool:
    """Whether every row of a matrix of ``shape`` holds whole blocks, so that rows can be sliced apart."""
    return len(shape) == 2 and shape[0] > 0 and shape[1] > 0 and shape[1] % block_size == 0


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expect(condition: bool, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"bitsandbytes state: {key}: expected {expected}")


def _expect_codebook(state_dict: Mapping[str, Tensor], key: str, codebook: Tensor) -> None:
    found = state_dict[key]
    same = found.shape == codebook.shape and torch.equal(found.cpu().float(), codebook)
    _expect(same, key, "the standard codebook: weights over another one would decode to other values")


def _bnb_state(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The JSON object among the keys, with every field checked."""
    key = f"{prefix}.quant_state.bitsandbytes__nf4"
    if key not in state_dict:
        if f"{prefix}.quant_state.bitsandbytes__fp4" in state_dict:
            raise ValueError(f"bitsandbytes state: {prefix} is FP4; only NF4 weights can be read")
        raise KeyError(key)
    try:
        state = json.loads(bytes(state_dict[key].cpu().tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"bitsandbytes state: {key}: not the bytes of a JSON object: {error}") from None
    _expect(isinstance(state, dict), key, "a JSON object")
    _expect(state.get("quant_type") == "nf4", key, f"quant_type 'nf4', got {state.get('quant_type')!r}")
    _expect(
        type(state.get("blocksize")) is int and state["blocksize"] in BLOCK_SIZES,
        key,
        f"a blocksize of {BLOCK_SIZES}, got {state.get('blocksize')!r}",
    )
    names = tuple(_dtype_name(dtype) for dtype in FLOAT_DTYPES)
    _expect(state.get("dtype") in names, key, f"a dtype of {names}, got {state.get('dtype')!r}")
    shape = state.get("shape")
    _expect(
        isinstance(shape, list) and len(shape) > 0 and all(type(size) is int and 0 < size < 2**48 for size in shape),
        key,
        f"a shape of positive integers, got {shape!r}",
    )
    if "nested_offset" in state:
        offset, block = state["nested_offset"], state.get("nested_blocksize")
        _expect(isinstance(offset, float) and math.isfinite(offset), key, f"a finite nested_offset, got {offset!r}")
        _expect(block == NESTED_BLOCK_SIZE, key, f"nested_blocksize {NESTED_BLOCK_SIZE}, got {block!r}")
    return state
