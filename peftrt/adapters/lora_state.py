"""A LoRA adapter's tensors, held against its configuration before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.fitting import expect_complete, expect_float
from peftrt.adapters.match import matches
from peftrt.formats.errors import FormatError, UnsupportedError, named
from peftrt.formats.peft_dir import join_key, split_key
from peftrt.nn.lora_embedding import NO_DORA

_EMBEDDING = "lora_embedding_"


@dataclass(frozen=True, eq=False)
class LoraState:
    """An adapter's tensors by module.

    Attributes:
        pairs: path -> (lora_A [R, K], lora_B [N, R]); of an embedding of V words of D features, K = V and N = D.
        embeddings: paths in ``pairs`` that must be embeddings.
        bases: path in ``pairs`` -> tensors of the module itself by name, which peft writes along for some.
        magnitudes: path -> DoRA's magnitudes [N]; every path of ``pairs``, or none.
        saved: path of a module in ``modules_to_save`` -> its parameters and buffers by name.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    bases: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def of(self, path: str) -> tuple[torch.Tensor, ...]:
        """The module's tensors, in the order of ``Adapter.parameters``."""
        magnitude = self.magnitudes.get(path)
        return self.pairs[path] if magnitude is None else (*self.pairs[path], magnitude)


def validate_lora_tensors(
    config: LoraConfig, tensors: Mapping[str, torch.Tensor], source: str = "adapter_model.safetensors"
) -> LoraState:
    """Sort an adapter's tensors by module, once they are known to fit the configuration and each other.

    Args:
        config: the adapter's configuration.
        tensors: peft's keys -> tensors.
        source: the file, named in errors.

    Raises:
        UnsupportedError: a ``lora_B.bias``.
        FormatError: a key of no known form, A without B, magnitudes without ``use_dora`` or the other way round, a
            shape, rank or dtype that does not fit, a module that ``target_modules`` does not name, or a target that no
            tensor answers to.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    state = LoraState()
    for key, tensor in tensors.items():
        with named(source):
            path, part, leaf = split_key(key, tuple(config.modules_to_save or ()))
        if part == "lora_B.bias":
            raise UnsupportedError(f"{source}: key {key!a}: a bias of lora_B (lora_bias) is not supported")
        if part == "ia3_l":
            raise FormatError(f"{source}: key {key!a}: factors of IA3, but peft_type is 'LORA'")
        if part in ("saved", "base"):
            (state.saved if part == "saved" else state.bases).setdefault(path, {})[leaf] = tensor
            continue
        expect_float(tensor, key, source)
        if part == "lora_magnitude_vector" and not config.use_dora:
            raise FormatError(
                f"{source}: key {key!a}: magnitudes of DoRA, but the configuration's use_dora is not true"
            )
        shape, dimensions = ("vector", 1) if part == "lora_magnitude_vector" else ("matrix", 2)
        if tensor.ndim != dimensions or 0 in tensor.shape:
            raise FormatError(f"{source}: key {key!a}: expected a {shape} that is not empty, got {tuple(tensor.shape)}")
        if part.startswith(_EMBEDDING):
            state.embeddings.add(path)
            if config.use_dora:
                raise UnsupportedError(f"{source}: key {key!a}: {NO_DORA}")
        halves.setdefault(path, {})[part] = tensor
    for path, parts in halves.items():
        state.pairs[path] = _pair(path, parts, config, source)
        if config.use_dora:
            state.magnitudes[path] = _magnitude(path, parts, source)
    expect_complete(config, state.pairs.keys(), state.bases, source)
    return state


def _pair(
    path: str, parts: Mapping[str, torch.Tensor], config: LoraConfig, source: str
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = _EMBEDDING if any(part.startswith(_EMBEDDING) for part in parts) else "lora_"
    names = (f"{kind}A", f"{kind}B")
    for part in names:
        if part not in parts:
            raise FormatError(f"{source}: module {path!a} has {', '.join(sorted(parts))} but no {part}")
    if len(parts.keys() - {"lora_magnitude_vector"}) > 2:
        raise FormatError(f"{source}: module {path!a} has the matrices of a linear layer and of an embedding")
    lora_a, lora_b = (parts[part] for part in names)
    if not matches(path, config):
        raise FormatError(f"{source}: module {path!a} has tensors, but the configuration does not target it")
    if lora_a.shape[0] != lora_b.shape[1]:
        raise FormatError(
            f"{source}: module {path!a}: the ranks of lora_A {tuple(lora_a.shape)} and of lora_B "
            f"{tuple(lora_b.shape)} differ"
        )
    rank = config.rank_for(path)
    if lora_a.shape[0] != rank:
        raise FormatError(
            f"{source}: module {path!a}: lora_A has {lora_a.shape[0]} rows, the configuration says rank {rank} "
            f"(r or rank_pattern)"
        )
    return lora_a, lora_b


def _magnitude(path: str, parts: Mapping[str, torch.Tensor], source: str) -> torch.Tensor:
    key = join_key(path, "lora_magnitude_vector")
    if "lora_magnitude_vector" not in parts:
        raise FormatError(f"{source}: the configuration's use_dora is true, but there is no key {key!a}")
    magnitude, rows = parts["lora_magnitude_vector"], parts["lora_B"].shape[0]
    if magnitude.shape[0] != rows:
        raise FormatError(
            f"{source}: key {key!a}: expected {rows} magnitudes, one a row of lora_B, got {len(magnitude)}"
        )
    return magnitude
