"""An IA3 adapter's tensors, held against its configuration before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peftrt.adapters.configs.ia3 import IA3Config
from peftrt.adapters.fitting import expect_complete, expect_float
from peftrt.adapters.match import matches
from peftrt.formats.errors import FormatError, named
from peftrt.formats.peft_dir import split_key


@dataclass(frozen=True, eq=False)
class IA3State:
    """An adapter's tensors by module.

    Attributes:
        factors: path -> ``[1, K]`` of a feed-forward module, ``[N, 1]`` of others.
        bases: path in ``factors`` -> tensors of the module itself by name, which peft writes along for some.
        saved: path of a module in ``modules_to_save`` -> its parameters and buffers by name.
    """

    factors: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def validate_ia3_tensors(
    config: IA3Config, tensors: Mapping[str, Tensor], source: str = "adapter_model.safetensors"
) -> IA3State:
    """Sort an adapter's tensors by module, once they are known to fit the configuration.

    Args:
        config: the adapter's configuration.
        tensors: peft's keys -> tensors.
        source: the file, named in errors.

    Raises:
        FormatError: a key of no known form, a shape or dtype that does not fit, factors of the other side than the
            configuration has the module for, a module that ``target_modules`` does not name, or a target that no tensor
            answers to.
    """
    state = IA3State()
    for key, tensor in tensors.items():
        with named(source):
            path, part, leaf = split_key(key, tuple(config.modules_to_save or ()))
        if part in ("saved", "base"):
            (state.saved if part == "saved" else state.bases).setdefault(path, {})[leaf] = tensor
            continue
        if part != "ia3_l":
            raise FormatError(f"{source}: key {key!a}: peft_type is 'IA3', whose modules have ia3_l")
        expect_float(tensor, key, source)
        if not matches(path, config):
            raise FormatError(f"{source}: module {path!a} has tensors, but the configuration does not target it")
        _expect_side(config, path, tensor, f"{source}: key {key!a}")
        state.factors[path] = tensor
    expect_complete(config, state.factors.keys(), state.bases, source)
    return state


def _expect_side(config: IA3Config, path: str, tensor: Tensor, where: str) -> None:
    inputs = config.is_feedforward(path)
    if tensor.ndim == 2 and tensor.shape[0 if inputs else 1] == 1 and tensor.numel() > 0:
        return
    expected = (
        "[1, in_features]: feedforward_modules names the module, so its inputs are scaled"
        if inputs
        else "[out_features, 1]: feedforward_modules does not name the module, so its outputs are scaled"
    )
    raise FormatError(f"{where}: expected {expected}; got {list(tensor.shape)}")
