"""From an adapter's directory to what a pool keeps of it; the second time only if the files are the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from peftrt import ops
from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.lora_state import LoraState
from peftrt.adapters.method import AdapterTensors
from peftrt.adapters.methods.lora import LoraMethod
from peftrt.adapters.reading import read_adapter, read_files, warn_of_differences
from peftrt.adapters.state import ModelAdapters
from peftrt.formats.errors import UnsupportedError
from peftrt.serving.errors import AdapterChangedError, AdapterTooLargeError
from peftrt.serving.layout import Layout, Part, Shape, Site, write_image
from peftrt.serving.transfer import Transfer


class Origin(NamedTuple):
    """Where an adapter was loaded from.

    Attributes:
        directory: absolute.
        digest: sha256 of its configuration and tensors.
        allow_nonfinite: as given to ``load``.
    """

    directory: str
    digest: bytes
    allow_nonfinite: bool


class Packed(NamedTuple):
    """An adapter as a pool keeps it.

    Attributes:
        layout: which pages it has.
        scaling: fp32 ``[L]``, one a site.
        image: uint8 ``[layout.nbytes]``, the pages.
    """

    layout: Layout
    scaling: Tensor
    image: Tensor


class Reader:
    """Reads adapters for the sites of one model; for any number of threads.

    Args:
        model, state: unwrapped, and its adapters.
        sites: L layers.
        dtype: of A and B on the device.
        max_rank: the largest that the pool's tables hold.
        root: see :class:`AdapterPool`.
        transfer: makes the images' memory.
    """

    def __init__(
        self,
        model: nn.Module,
        state: ModelAdapters,
        sites: Sequence[Site],
        dtype: torch.dtype,
        max_rank: int,
        root: str | os.PathLike[str] | None,
        transfer: Transfer,
    ) -> None:
        self._model, self._state, self._sites = model, state, tuple(sites)
        self._dtype, self._max_rank, self._transfer = dtype, max_rank, transfer
        # the process may change its directory before files are read again
        self._root = None if root is None else os.path.abspath(root)
        self._paths = {site.path for site in sites}
        self._layouts: WeakValueDictionary[Shape, Layout] = WeakValueDictionary()

    def read(
        self, path: str | os.PathLike[str], name: str, subfolder: str | None, allow_nonfinite: bool
    ) -> tuple[LoraConfig, Origin, Packed]:
        """Read an adapter for the first time.

        Raises:
            FormatError: as of :func:`peftrt.load`; UnsupportedError for what a pool cannot serve.
            AdapterTooLargeError: a rank beyond ``max_rank``.

        Warns:
            UserWarning: as of :func:`peftrt.load`.
        """
        options: dict[str, Any] = {"subfolder": subfolder, "root": self._root, "allow_nonfinite": allow_nonfinite}
        found = read_adapter(self._model, self._state, path, name, **options)
        config, parts = _of_lora(found.config, found.parts, found.directory)
        self._expect_sites(config, parts, found.directory)
        warn_of_differences(self._model, found, stacklevel=4)
        packed = self._pack(config, parts, found.directory)
        directory = os.path.abspath(found.directory)
        return config, Origin(directory, digest(found.values, found.tensors), allow_nonfinite), packed

    def read_again(self, name: str, origin: Origin) -> Tensor:
        """The image of an adapter that was read before.

        Raises:
            AdapterChangedError: the files are not those.
            FormatError: they are gone or bad.
        """
        directory, before, allow_nonfinite = origin
        options: dict[str, Any] = {"root": self._root, "allow_nonfinite": allow_nonfinite}
        values, tensors = read_files(self._model, directory, **options)
        if digest(values, tensors) != before:
            raise AdapterChangedError(
                f"adapter {name!a}: the files in {directory} are not those that were loaded; load it again with "
                "replace=True to serve them"
            )
        return self._pack(*LoraMethod().parse(values, tensors, directory), directory).image

    def _expect_sites(self, config: LoraConfig, parts: LoraState, source: str) -> None:
        """Refuse what a pool's tables have no room for."""
        if config.modules_to_save or parts.saved:
            names = ", ".join([*parts.saved] or config.modules_to_save or ())
            raise UnsupportedError(f"{source}: modules_to_save ({names}) are not served by a pool: use peftrt.load")
        for path in parts.pairs:
            if path in parts.embeddings:
                raise UnsupportedError(
                    f"{source}: module {path!a}: adapters of embeddings are not served by a pool: use peftrt.load"
                )
            if path not in self._paths:
                raise UnsupportedError(
                    f"{source}: module {path!a} is not among the pool's target_modules ({len(self._paths)} layers)"
                )
            rank = parts.pairs[path][0].shape[0]
            if rank > self._max_rank:
                raise AdapterTooLargeError(
                    f"{source}: module {path!a} has rank {rank}, the pool's max_rank is {self._max_rank}"
                )

    def _pack(self, config: LoraConfig, parts: LoraState, source: str) -> Packed:
        found = [self._part(site, config, parts) if site.path in parts.pairs else None for site in self._sites]
        shape = tuple((0, False) if p is None else (p.lora_A.shape[0], p.y_scale is not None) for p in found)
        layout = self._layouts.get(shape)
        if layout is None:
            layout = self._layouts.setdefault(shape, Layout(self._sites, shape, self._dtype.itemsize))
        scaling = torch.tensor([0.0 if part is None else part.scaling for part in found], dtype=torch.float32)
        image = self._transfer.host_buffer(layout.nbytes)
        write_image(image, layout, found, self._dtype, source)
        return Packed(layout, scaling, image)

    @torch.no_grad()
    def _part(self, site: Site, config: LoraConfig, parts: LoraState) -> Part:
        (lora_A, lora_B), magnitude = parts.pairs[site.path], parts.magnitudes.get(site.path)
        scaling = config.scaling_for(site.path)
        if magnitude is None:
            return Part(lora_A, lora_B, scaling)
        if site.layer.merged is not None:
            raise ValueError(f"module {site.path!a}: adapters {sorted(site.layer.merged)} are merged; unmerge first")
        device = site.layer.weight.device
        # the norm of the weight as it is served: with A and B as they are rounded for the device
        A, B = (half.to(self._dtype).to(device) for half in (lora_A, lora_B))
        y_scale = ops.dora_scale(site.layer.base_weight(), A, B, scaling, magnitude.float().to(device))
        return Part(lora_A, lora_B, scaling, y_scale.float().cpu())


def _of_lora(config: AdapterConfig, parts: AdapterTensors, source: str) -> tuple[LoraConfig, LoraState]:
    if not isinstance(config, LoraConfig) or not isinstance(parts, LoraState):
        raise UnsupportedError(f"{source}: a pool serves LoRA, got peft_type {config.peft_type!a}: use peftrt.load")
    return config, parts


def digest(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """sha256 of a configuration and tensors; the order of keys does not matter."""
    found = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        found.update(f"\n{key}\0{tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.digest()
