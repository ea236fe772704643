"""adapt: put a new adapter on a model, whose base may be quantised on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from peftrt.adapters.activation import activate
from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.fusing import fuse as lay_siblings_together
from peftrt.adapters.fusing import quantized_together, siblings
from peftrt.adapters.method import AdapterTensors
from peftrt.adapters.methods import expect_room, method_of
from peftrt.adapters.plan import Plan, quantizable, with_task_heads
from peftrt.adapters.report import AdaptReport, make_report, model_bytes
from peftrt.adapters.saved import SavedModule
from peftrt.adapters.source import MetaSource
from peftrt.adapters.state import (
    ModelAdapters,
    adapter_layers,
    all_or_nothing,
    attach_state,
    base_model_name,
    check_new_name,
    expect_data,
    find_state,
    holders,
    holding,
    replace_module,
    unwrap,
)
from peftrt.formats.nf4 import BLOCK_SIZES, FLOAT_DTYPES
from peftrt.nn import AdapterLinear, LoRAEmbedding, LoRALinear, NF4Linear, QLoRALinear


def adapt(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str = "default",
    quantize: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    adapter_dtype: torch.dtype = torch.float32,
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fuse: bool = False,
) -> AdaptReport:
    """Put a new adapter on a model, in place, and make it the one that is trained.

    The configuration says of which method: see :class:`peftrt.LoraConfig` and its siblings. The base is frozen, its
    linear layers in NF4 where asked. The new adapter is active and the only thing that requires gradients: its own
    Parameters, and a copy of each module of ``modules_to_save``. With a ``task_type`` of classification or question
    answering the model's head is among those, as in HF peft. Everything is checked before anything is changed; after an
    error the model is as it was.

    Args:
        model: any module; a Hugging Face one too. ``nn.Linear``, GPT-2's ``Conv1D`` and ``nn.Embedding`` can be
            adapted; embeddings stay dense.
        config: what to adapt, and how. LoRA adapters that begin with the base weight (``init_lora_weights`` "pissa",
            "loftq") see it before it is quantised; over layers that are NF4 already, PiSSA begins with the dequantised
            weight and quantises its rest anew, which a warning says, and LoftQ is refused.
        name: of the new adapter. A second one is added to the layers that are there.
        quantize: ``"nf4"`` or None: the layers that are adapted, or, where the method acts on none itself, all linear
            ones but the output head. Weights are quantised one by one, on the device they are on, and released:
            there is never a second copy of the model. A weight stays dense that something else uses as well (a head
            tied to the embedding), or that a Hugging Face model wants in full precision. For a further adapter: as for
            the first.
        block_size, double_quant: of NF4; see :func:`peftrt.ops.nf4_quantize`.
        adapter_dtype: of the adapter's Parameters: fp32, bf16 or fp16.
        checkpoint: for a model without data (built on the meta device, or under :func:`peftrt.empty_weights`): a
            safetensors file, its index or a directory, which is read tensor by tensor while the model is quantised.
        device: where a model without data is built.
        dtype: of its dense weights; by default as in the checkpoint.
        fuse: multiply layers of one input in one call, see :func:`peftrt.fuse`; with ``quantize`` their weights are
            quantised as one, which changes their nested scales a little.

    Returns:
        A report: what matched and what did not, trainable share, bytes, the kernel of each site.

    Raises:
        TypeError, ValueError: an argument that does not fit; ConfigError for a target that matches nothing, with close
            names, UnsupportedError for one that cannot be adapted, AdapterNameError for a name that is taken. Should
            memory run out in the middle of quantising, the weights that were quantised by then stay so, and the error
            says how many.

    Warns:
        UserWarning: PiSSA over layers that are NF4 already.

    Source: of each method, see its configuration; QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
    """
    model = _check_arguments(model, quantize, block_size, adapter_dtype)
    method = method_of(config)
    state = find_state(model) or ModelAdapters()
    check_new_name(name, state.configs)
    state.expect_unmerged("adapt")
    expect_room(state.configs, method, "adapt")
    options = {"block_size": block_size, "double_quant": double_quant} if quantize else {}
    storage = {"quantize": quantize, **options}
    if method.wraps_layers or quantize is not None:
        _expect_same_storage(state, storage)
    config = method.complete(model, with_task_heads(model, config))
    if config.base_model_name_or_path is None:
        config = replace(config, base_model_name_or_path=base_model_name(model))
    plan = method.plan(model, config, state)
    method.check(model, config, plan, quantize=quantize, fuse=fuse)
    # the layers that change their form
    layers = plan if method.wraps_layers or quantize is None else quantizable(model, config, state)
    begin = method.before_quantising(name, config, adapter_dtype)
    bytes_before = model_bytes(model)
    groups = siblings([path for path in layers.new if path not in layers.dense]) if fuse and quantize else []
    wrap = partial(_wrap, model, layers, state, storage, groups, begin)
    attach = partial(_attach_and_train, model, state, name, config, plan, adapter_dtype)
    if checkpoint is not None:
        with MetaSource(model, checkpoint, device, dtype, storage) as source, all_or_nothing(model):
            wrap(source)
            source.fill_rest()
            attach()
    else:
        expect_data(model, "adapt", "; pass checkpoint=PATH to read it from there")
        if quantize is None:
            with all_or_nothing(model):
                wrap(None)
                attach()
        else:
            _expect_finite(model, layers)
            _quantise_and_attach(model, state, name, wrap, attach)
    if fuse:
        lay_siblings_together(model)
    return make_report(model, state, name, plan, method.sites(model, state, name, plan), bytes_before)


def attach_adapter(
    model: nn.Module,
    state: ModelAdapters,
    name: str,
    config: AdapterConfig,
    plan: Plan,
    *,
    adapter_dtype: torch.dtype,
    tensors: AdapterTensors | None = None,
) -> None:
    """Give every module of the plan its share of a new adapter; layers that hold adapters are in their form by now.

    ``tensors`` has the values of all of it, or is None for initial values.
    """
    method_of(config).attach(model, state, name, config, plan, adapter_dtype, tensors)
    for path in plan.saved:
        module = model.get_submodule(path)
        if not isinstance(module, SavedModule):
            wrapper = SavedModule(module, state)
            replace_module(model, module, wrapper)
            module = wrapper
        module.add_copy(name, None if tensors is None else tensors.saved[path])
    state.configs[name] = config
    attach_state(model, state)


def adapter_parameters(model: nn.Module, state: ModelAdapters, name: str) -> list[nn.Parameter]:
    """What is trained of an adapter."""
    held = holding(holders(model, state), name).values()
    return [parameter for holder in held for parameter in holder.adapter_parameters(name)]


def wrap_dense(model: nn.Module, plan: Plan, state: ModelAdapters) -> None:
    """Put layers without adapters in the place of the plan's dense modules; nothing is quantised or copied."""
    for path in plan.paths:
        _swap(model, path, state, _dense_layer)


def _dense_layer(module: nn.Module) -> AdapterLinear:
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding.from_embedding(module, r=None)
    return LoRALinear.from_linear(module, r=None)


def _quantise_and_attach(
    model: nn.Module,
    state: ModelAdapters,
    name: str,
    wrap: Callable[[MetaSource | None], None],
    attach: Callable[[], None],
) -> None:
    """All that can be taken back: quantised weights are released one by one, and stay so."""
    try:
        wrap(None)
        with all_or_nothing(model):
            attach()
    except BaseException:
        for layer in holding(adapter_layers(model, state), name).values():
            layer.remove_adapter(name)
        raise


def _attach_and_train(
    model: nn.Module, state: ModelAdapters, name: str, config: AdapterConfig, plan: Plan, adapter_dtype: torch.dtype
) -> None:
    attach_adapter(model, state, name, config, plan, adapter_dtype=adapter_dtype)
    trained = set(map(id, adapter_parameters(model, state, name)))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    activate(model, state, {name: 1.0})


def _wrap(
    model: nn.Module,
    plan: Plan,
    state: ModelAdapters,
    storage: dict[str, Any],
    groups: list[list[str]],
    begin: Callable[[str], dict[str, Any]],
    source: MetaSource | None,
) -> None:
    """Bring every target into the form that holds adapters, quantised where asked, and release what it was made of.

    ``groups``: paths whose weights are quantised together.
    """
    group_of = {path: tuple(group) for group in groups for path in group}
    options = {key: value for key, value in storage.items() if key != "quantize"}
    paths = plan.paths if source is None else source.in_file_order(plan.paths)
    done = 0
    try:
        for unit in dict.fromkeys(group_of.get(path, (path,)) for path in paths):
            if source is not None:
                for path in unit:
                    source.fill(path)
            makers = quantized_together(model, unit, options) if len(unit) > 1 else None
            for path, make in zip(unit, makers or [None] * len(unit), strict=True):
                if storage["quantize"] is None or path in plan.dense:
                    _swap(model, path, state, _dense_layer)
                else:
                    _swap(model, path, state, make or partial(QLoRALinear.from_linear, **begin(path), **options))
                    done += path in plan.new
                state.storage = storage
                attach_state(model, state)
    except BaseException as error:
        if done and source is None:
            error.add_note(f"peftrt.adapt: {done} of {len(plan.new)} weights were quantised before this and stay so")
        raise


def _swap(model: nn.Module, path: str, state: ModelAdapters, make: Any) -> None:
    # The old module must be gone when this returns: its weight may be the only thing that keeps memory from being
    # freed.
    old = model.get_submodule(path)
    if isinstance(old, AdapterLinear):
        old.owner = state
        return
    new = take_over_nf4(old) if isinstance(old, NF4Linear) else make(old)
    new.owner = state
    replace_module(model, old, new)


def take_over_nf4(layer: NF4Linear) -> QLoRALinear:
    """A layer that can hold adapters, with the NF4 layer's own Parameters."""
    new = QLoRALinear.__new__(QLoRALinear)
    attributes = layer.__dict__
    new.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in attributes.items()})
    new._init_adapters()
    return new


def _check_arguments(model: nn.Module, quantize: str | None, block_size: int, adapter_dtype: torch.dtype) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model must be an nn.Module, got {type(model).__name__}")
    if quantize not in (None, "nf4"):
        raise ValueError(f"adapt: quantize must be 'nf4' or None, got {quantize!r}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"adapt: block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
    if adapter_dtype not in FLOAT_DTYPES:
        raise TypeError(f"adapt: adapter_dtype must be fp32, bf16 or fp16, got {adapter_dtype!r}")
    return unwrap(model)


def _expect_finite(model: nn.Module, plan: Plan) -> None:
    """NaN cannot be quantised: it would become a number."""
    for path in [path for path in plan.new if path not in plan.dense]:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        # A sum is one pass without a temporary of the weight's size; only where it is not finite, look closer.
        suspicious = weight.is_floating_point() and not bool(weight.detach().sum(dtype=torch.float32).isfinite())
        if suspicious and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"adapt: {path}.weight holds NaN or infinity, which NF4 cannot represent")


def _expect_same_storage(state: ModelAdapters, storage: dict[str, Any]) -> None:
    if state.storage is not None and state.storage != storage:
        raise ValueError(f"adapt: the model's layers were adapted with {_shown(state.storage)}, got {_shown(storage)}")


def _shown(storage: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in storage.items())
