"""The forms in which the state of AdamW comes: torch's, peftrt's with 8 bits, bitsandbytes'; each checked, then read.

=============  ==============================================================================  =====================
form           keys beside ``step``                                                            dtypes
=============  ==============================================================================  =====================
torch          exp_avg, exp_avg_sq                                                             fp32, or bf16 and fp16
8 bits         exp_avg_q, exp_avg_sq_q; exp_avg_absmax, exp_avg_sq_absmax [ceil(n / BLOCK)]    uint8; fp32
bitsandbytes   state1, state2; with 8 bits absmax1, absmax2 and the maps qmap1, qmap2 [256]    fp32, or uint8; fp32
=============  ==============================================================================  =====================
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from peftrt.formats.adamw_state import BLOCK, EXP_AVG_MAP, EXP_AVG_SQ_MAP, Moments, dequantize, quantize
from peftrt.optim.parameters import check_groups

# bits -> the keys of Moments, in its order.
KEYS = {
    32: ("exp_avg", "exp_avg_sq"),
    8: ("exp_avg_q", "exp_avg_sq_q", "exp_avg_absmax", "exp_avg_sq_absmax"),
}
_FORMS = (*KEYS.values(), ("state1", "state2"), ("state1", "state2", "absmax1", "absmax2"))
_MAPS = {"qmap1": EXP_AVG_MAP, "qmap2": EXP_AVG_SQ_MAP}
_NESTED = "__bnb_optimizer_quant_state__"
# They are widened to fp32 without a rounding.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What changes the step or what its state means.
_OFF = ("amsgrad", "maximize")
_LARGEST_STEP = 1 << 53


class Described(Protocol):
    """A tensor, or a file's entry for one."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Kept(NamedTuple):
    """A parameter's steps, at least 1, its moments, flat, and its shape."""

    step: int
    moments: Moments
    shape: tuple[int, ...]

    def entry(self) -> dict[str, Tensor]:
        """As it stands in a state dict."""
        names = KEYS[bits_of(self.moments)]
        values = (tensor.view(self.shape) if i < 2 else tensor for i, tensor in enumerate(parts(self.moments)))
        return {
            "step": torch.tensor(self.step, dtype=torch.float32, device="cpu"),
            **dict(zip(names, values, strict=True)),
        }


def bits_of(moments: Moments) -> int:
    """32 or 8."""
    return 32 if moments.exp_avg_scale is None else 8


def parts(moments: Moments) -> list[Tensor]:
    """The two or four tensors."""
    return [tensor for tensor in moments if tensor is not None]


def with_bits(moments: Moments, bits: int) -> Moments:
    """Flat moments in fp32 or as codes; the same bits where they are so already."""
    if bits_of(moments) == bits:
        return moments if bits == 8 else Moments(*(part.float() for part in parts(moments)))
    if moments.exp_avg_scale is None or moments.exp_avg_sq_scale is None:
        exp_avg, exp_avg_scale = quantize(moments.exp_avg.float(), EXP_AVG_MAP)
        exp_avg_sq, exp_avg_sq_scale = quantize(moments.exp_avg_sq.float(), EXP_AVG_SQ_MAP)
        return Moments(exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale)
    return Moments(
        dequantize(moments.exp_avg, moments.exp_avg_scale, EXP_AVG_MAP),
        dequantize(moments.exp_avg_sq, moments.exp_avg_sq_scale, EXP_AVG_SQ_MAP),
    )


def read_entry(entry: Mapping[str, Any], where: str, shape: Sequence[int] | None = None) -> Kept | None:
    """Read one parameter's state, in any of the forms.

    Args:
        entry: key -> tensor, or number for ``step``.
        where: what errors begin with.
        shape: the parameter's; None takes that of the moments.

    Returns:
        None where there is none yet: no keys, or no step and moments of zeros.

    Raises:
        ValueError: anything else, or of another shape or dtype.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected a dictionary of tensors, got {type(entry).__name__}")
    nested = entry.get(_NESTED, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{where}: {_NESTED} must be a dictionary of tensors, got {type(nested).__name__}")
    flat = {**{key: value for key, value in entry.items() if key != _NESTED}, **nested}
    if not flat:
        return None
    names = _form(flat, where)
    tensors = [_tensor(flat[name], f"{where}: {name}") for name in names]
    expect_layout(dict(zip(names, tensors, strict=True)), where, tensors[0].shape if shape is None else shape)
    for name, levels in _MAPS.items():
        if name in flat and not torch.equal(_tensor(flat[name], f"{where}: {name}").cpu(), levels):
            raise ValueError(
                f"{where}: {name} is not the dynamic map that peftrt quantises with, its codes mean others"
            )
    if len(names) == 4 and not all(tensor.is_contiguous() for tensor in tensors):
        # bitsandbytes counts a block's elements as they lie in memory, which the strides of such codes do not tell.
        raise ValueError(f"{where}: {names[0]} must be contiguous, got strides {tensors[0].stride()}")
    moments = Moments(*(tensor.detach().reshape(-1) for tensor in tensors))
    step = _step(flat["step"], where)
    if step:
        return Kept(step, moments, tuple(tensors[0].shape))
    if any(bool(tensor.any()) for tensor in parts(with_bits(moments, 32))):
        raise ValueError(f"{where}: step is 0, but moments are not")
    return None


def expect_layout(entries: Mapping[str, Described], where: str, shape: Sequence[int]) -> None:
    """Check the dtypes and shapes of one parameter's moments.

    Args:
        entries: key -> tensor, in the order of ``Moments``.
        where: what errors begin with.
        shape: the parameter's.

    Raises:
        ValueError: one is of another dtype or shape.
    """
    blocks = (-(-torch.Size(shape).numel() // BLOCK),)
    for number, (name, tensor) in enumerate(entries.items()):
        dtypes = _FLOATS if len(entries) == 2 else (torch.uint8,) if number < 2 else (torch.float32,)
        expected = tuple(shape) if number < 2 else blocks
        if tensor.dtype not in dtypes or tuple(tensor.shape) != expected:
            raise ValueError(
                f"{where}: {name} must be {dtypes[0]} of shape {list(expected)}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}"
            )


def _form(flat: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "max_exp_avg_sq" in flat:
        raise ValueError(f"{where}: holds max_exp_avg_sq: state of amsgrad cannot be used")
    for names in _FORMS:
        maps = _MAPS if names[-1] == "absmax2" else {}
        if flat.keys() == {"step", *names, *maps}:
            return names
    known = " or ".join(", ".join(names) for names in _FORMS)
    raise ValueError(f"{where}: expected step with {known}, got {', '.join(map(str, flat)) or 'nothing'}")


def _tensor(value: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        got = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where} must be a dense tensor with data, got {got}")
    return value


def _step(value: Any, where: str) -> int:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not 0 <= number <= _LARGEST_STEP
        or number != int(number)
    ):
        raise ValueError(f"{where}: step must be a whole number from 0 on, got {value!r}")
    return int(number)


def pack_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's groups with their parameters' numbers in the place of the parameters, as torch has it."""
    packed, count = [], 0
    for group in groups:
        members = list(range(count, count + len(group["params"])))
        packed.append({**group, "params": members})
        count += len(members)
    return packed


def read_groups(groups: Sequence[Mapping[str, Any]], saved: Any) -> tuple[list[dict[str, Any]], dict[int | str, int]]:
    """Check saved groups against an optimizer's.

    Args:
        groups: the optimizer's.
        saved: those of a state dict.

    Returns:
        What the optimizer's groups are to be, without ``params``, and saved id -> number of the parameter. What a saved
        group does not name stays as it is.

    Raises:
        ValueError: another number of groups or parameters, or a hyper-parameter that cannot be used.
    """
    if not isinstance(saved, list | tuple) or len(saved) != len(groups):
        got = len(saved) if isinstance(saved, list | tuple) else type(saved).__name__
        raise ValueError(f"param_groups: expected {len(groups)} groups, got {got}")
    fresh: list[dict[str, Any]] = []
    numbers: dict[int | str, int] = {}
    for index, (group, new) in enumerate(zip(groups, saved, strict=True)):
        where = f"param_groups[{index}]"
        ids = new.get("params") if isinstance(new, Mapping) else None
        if not isinstance(ids, list | tuple) or len(ids) != len(group["params"]):
            got = len(ids) if isinstance(ids, list | tuple) else "none"
            raise ValueError(f"{where}: expected {len(group['params'])} parameters, got {got}")
        for one in ids:
            if not isinstance(one, int | str) or one in numbers:
                raise ValueError(f"{where}: expected a number or name for each parameter, once, got {one!r}")
            numbers[one] = len(numbers)
        if new.get("decoupled_weight_decay") is False and new.get("weight_decay"):
            raise ValueError(f"{where}: expected AdamW's weight decay, got torch.optim.Adam's, which is in the moments")
        _expect_names(group.get("param_names"), new.get("param_names"), where)
        taken = {key: _plain(key, value, where) for key, value in new.items() if key != "params"}
        fresh.append({key: value for key, value in group.items() if key != "params"} | taken)
    check_groups(fresh)
    return fresh, numbers


def _expect_names(own: list[str] | None, saved: list[str] | None, where: str) -> None:
    # Other names are taken over, as torch does; the same ones in another order would change whose state it is.
    if own and saved and own != saved and sorted(own) == sorted(saved):
        first = next(number for number, (a, b) in enumerate(zip(own, saved, strict=True)) if a != b)
        raise ValueError(f"{where}: the names are in another order: expected {own[first]!r}, got {saved[first]!r}")


def _plain(key: str, value: Any, where: str) -> Any:
    if key in _OFF and value:
        raise ValueError(f"{where}: {key}={value!r} is not supported, and its state means something else")
    if key in ("lr", "eps", "weight_decay"):
        return _number(key, value, where)
    if key == "betas" and isinstance(value, list | tuple):
        return tuple(_number(key, beta, where) for beta in value)
    return copy.deepcopy(value)


def _number(key: str, value: Any, where: str) -> int | float:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{where}: {key} must be a number, got {value!r}")
    return number
