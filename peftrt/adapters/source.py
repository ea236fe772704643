"""Models built without data, and the checkpoint that fills them one tensor at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftrt.adapters.state import replace_module
from peftrt.formats.checkpoint import Checkpoint, open_checkpoint
from peftrt.formats.errors import FormatError
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import AdapterLinear, NF4Linear

_BNB_STATE = ".quant_state.bitsandbytes__nf4"


@contextmanager
def empty_weights() -> Iterator[None]:
    """Build a model without data for its Parameters: ``with peftrt.empty_weights(): model = Model(config)``.

    Unlike ``with torch.device("meta")``, buffers that a model computes for itself (rotary frequencies, position ids),
    which no checkpoint holds, are real. Only in one thread at a time: modules built in others meanwhile are without
    data, too.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class MetaSource:
    """A safetensors checkpoint, and the tensors of a model on the meta device that it has to fill.

    Args:
        model: a module; only what is on the meta device is filled.
        checkpoint: a file, index or directory.
        device: where the tensors go.
        dtype: of floating tensors; None: as in the checkpoint.
        storage: how adapted weights are stored; weights that bitsandbytes quantised must agree.

    Raises:
        FormatError: a tensor is missing or has another shape, or a weight is quantised in another way.
        ValueError: a buffer is without data that no checkpoint holds.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: str | os.PathLike[str],
        device: torch.device | str,
        dtype: torch.dtype | None,
        storage: dict[str, Any],
    ) -> None:
        self.model, self.device, self.dtype, self.storage = model, torch.device(device), dtype, storage
        self.path = os.fspath(checkpoint)
        self.checkpoint: Checkpoint = open_checkpoint(checkpoint)
        # A tied tensor has several names, any of which the file may hold.
        self._places: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        self._keys: dict[int, str] = {}
        self._find_all()

    def in_file_order(self, paths: list[str]) -> list[str]:
        """``paths`` in the order of their weights in the files, so that these are read once through."""
        order = {key: position for position, key in enumerate(self.checkpoint.entries)}

        def position(path: str) -> int:
            key = self._keys.get(id(self.model.get_submodule(path).weight))
            return -1 if key is None else order[key]

        return sorted(paths, key=position)

    def fill(self, path: str) -> None:
        """Give the Parameters and buffers of one module, without its children, their data."""
        module = self.model.get_submodule(path)
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            key = self._keys.get(id(tensor))
            if tensor is None or not tensor.is_meta or key is None:
                continue
            if key + _BNB_STATE in self.checkpoint:
                self._fill_quantized(module, key)
                return self.fill(path)
            value = self._read(key)
            filled = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            for place, attribute in self._places[id(tensor)]:
                into = place._parameters if attribute in place._parameters else place._buffers
                into[attribute] = filled  # type: ignore[assignment]
        return None

    def fill_rest(self) -> None:
        """Fill every module that is left."""
        for path, module in list(self.model.named_modules()):
            if not isinstance(module, AdapterLinear):
                self.fill(path)

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, key: str) -> Tensor:
        tensor = self.checkpoint.read(key)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def _fill_quantized(self, module: nn.Module, key: str) -> None:
        """Put an NF4Linear, with the bytes that are in the file, in the place of a linear module."""
        keys = [name for name in self.checkpoint.entries if name == key or name.startswith(key + ".")]
        weight = NF4Weight.from_bnb({name: self.checkpoint.read(name) for name in keys}, key).to(self.device)
        layer = NF4Linear.from_quantized(module, weight)
        wanted = (self.storage["block_size"], self.storage["double_quant"])
        if (weight.block_size, weight.is_nested) != wanted:
            raise FormatError(
                f"{self.path}: {key!a} is quantised with block_size={weight.block_size}, "
                f"double_quant={weight.is_nested}, adapt was called with block_size={wanted[0]}, "
                f"double_quant={wanted[1]}"
            )
        if layer.bias is not None:
            self._places[id(layer.bias)].append((layer, "bias"))
        replace_module(self.model, module, layer)

    def _find_all(self) -> None:
        for path, module in self.model.named_modules(remove_duplicate=False):
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or not tensor.is_meta:
                    continue
                full = f"{path}.{name}" if path else name
                if name in module._non_persistent_buffers_set:
                    raise ValueError(
                        f"adapt: buffer {full} is on the meta device, and no checkpoint holds it; build the model "
                        "under peftrt.empty_weights(), which leaves buffers real"
                    )
                self._places[id(tensor)].append((module, name))
                found = next((key for key in self._names(full) if key in self.checkpoint), None)
                if found is not None and id(tensor) not in self._keys:
                    self._check(found, full, module, tensor)
                    self._keys[id(tensor)] = found
        for places in self._places.values():
            module, name = places[0]
            tensor = getattr(module, name)
            if id(tensor) not in self._keys:
                path = next(path for path, other in self.model.named_modules() if other is module)
                raise FormatError(
                    f"{self.path}: no tensor {f'{path}.{name}' if path else name!a}, which the model needs"
                )

    def _names(self, full: str) -> list[str]:
        """A checkpoint of the inner model lacks the prefix that a model with a head has, and the other way round."""
        prefix = getattr(self.model, "base_model_prefix", None)
        if not isinstance(prefix, str) or not prefix:
            return [full]
        return [full, f"{prefix}.{full}", full.removeprefix(f"{prefix}.")]

    def _check(self, key: str, full: str, module: nn.Module, tensor: Tensor) -> None:
        entry = self.checkpoint.entries[key]
        if key + _BNB_STATE in self.checkpoint:
            if self.storage["quantize"] is None:
                raise FormatError(f"{self.path}: {key!a} is quantised by bitsandbytes; pass quantize='nf4'")
            if type(module) is not nn.Linear:
                raise FormatError(
                    f"{self.path}: {key!a} is quantised by bitsandbytes, but {full} is no nn.Linear's weight"
                )
            return
        if f"{key}.quant_map" in self.checkpoint:
            raise FormatError(f"{self.path}: {key!a} is quantised by bitsandbytes, and not as NF4")
        if entry.shape != tuple(tensor.shape):
            raise FormatError(
                f"{self.path}: {key!a} has shape {list(entry.shape)}, the model's {full} {list(tensor.shape)}"
            )
        if entry.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise FormatError(f"{self.path}: {key!a} is {entry.dtype}, the model's {full} {tensor.dtype}")
