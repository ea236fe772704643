"""What an adapter would change in a model, worked out and checked before anything is changed."""

from __future__ import annotations

import difflib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.configs.targeted import ALL_LINEAR, TargetedConfig
from peftrt.adapters.match import is_excluded, matches, saves_module, unmatched_patterns, unmatched_targets
from peftrt.adapters.saved import SavedModule
from peftrt.adapters.state import ModelAdapters
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError
from peftrt.nn import AdapterHolder, AdapterLinear, HookedAdapters, LoRAEmbedding, NF4Linear
from peftrt.nn.initialisation import parse, refusal
from peftrt.nn.lora_embedding import NO_DORA, refused_start
from peftrt.nn.source import is_conv1d, unsuitable, unsuitable_embedding

# peft's names of the heads that a task trains whole, because they come untrained.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


C = TypeVar("C", bound=AdapterConfig)


@dataclass
class Plan:
    """The modules that an adapter touches, by path.

    Attributes:
        new: dense modules that get a layer with adapters in their place.
        existing: layers with adapters that get one more.
        hosts: path -> what a method that acts from outside needs to know of the module there.
        saved: modules that get a trainable copy.
        left_out: path -> why a linear module is not adapted.
        dense: path in ``new`` -> why its weight is not to be quantised.
    """

    new: list[str] = field(default_factory=list)
    existing: list[str] = field(default_factory=list)
    hosts: dict[str, Any] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """All that hold a pair of matrices, those new to adapters first."""
        return [*self.new, *self.existing]


def with_task_heads(model: nn.Module, config: C) -> C:
    """``config`` with the heads of its ``task_type`` among ``modules_to_save``, as peft's model classes add them."""
    paths = [path for path, _ in model.named_modules() if path and "copy@" not in path]
    heads = [name for name in HEADS.get(config.task_type or "", ()) if any(path.endswith(name) for path in paths)]
    present = tuple(config.modules_to_save or ())
    missing = tuple(name for name in heads if name not in present)
    return replace(config, modules_to_save=present + missing) if missing else config


def make_plan(model: nn.Module, config: TargetedConfig, state: ModelAdapters) -> Plan:
    """Match the configuration with the model.

    Raises:
        ConfigError: a target, pattern or module to save that matches nothing (the message has close names).
        UnsupportedError: a target that is neither linear nor an embedding, or that cannot be replaced; the message says
            why.
    """
    if is_linear(model):
        raise UnsupportedError(
            f"the model itself is a {type(model).__name__}, which cannot be replaced inside itself: use "
            "peftrt.LoRALinear.from_linear or peftrt.QLoRALinear.from_linear"
        )
    plan = Plan(saved=plan_saved(model, config))
    head = output_head(model, config)
    for path, module in own_modules(model):
        if path in plan.saved or is_under(path, plan.saved):
            continue
        if matches(path, config):
            _sort_in(plan, path, module, config, state, head)
        elif is_linear(module):
            excluded = is_excluded(path, config)
            plan.left_out[path] = "excluded" if excluded else "not among target_modules"
    _check_everything_matched(model, config, plan)
    tables = [path for path in plan.new if is_embedding(model.get_submodule(path))]
    looked_up = dict.fromkeys(tables, "the rows of an embedding are looked up, not multiplied")
    plan.dense = _kept_precise(model, plan.new) | shared_weights(model, plan.new) | looked_up
    return plan


def plan_saved(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The modules that ``modules_to_save`` names.

    Raises:
        ConfigError: a name that matches nothing.
        UnsupportedError: a module that holds quantised or adapted layers.
    """
    found: list[str] = []
    for path, module in own_modules(model):
        if saves_module(path, config) and not is_under(path, found):
            _check_saved(path, module)
            found.append(path)
    for name in config.modules_to_save or ():
        if not any(path.endswith(name) for path in found):
            raise ConfigError(f"modules_to_save: {name!r} matches no module of the model{close_names(name, model)}")
    return found


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below the model itself, without what adapters have put inside of them."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, HookedAdapters | SavedModule):
            inside = (*inside, path + ".")
        if not isinstance(module, HookedAdapters):
            yield path, module


def expect_module(modules: Mapping[str, nn.Module], path: str, source: str) -> nn.Module:
    """The module that a file names; FormatError where there is none."""
    if path not in modules:
        raise FormatError(f"{source}: the model has no module {path!a}: made for another base?")
    return modules[path]


def quantizable(model: nn.Module, config: AdapterConfig, state: ModelAdapters) -> Plan:
    """The linear layers that ``quantize`` means where a method acts on none itself: all but the output head, and what
    is trained whole.
    """
    whole, task = config.modules_to_save, config.task_type
    return make_plan(model, LoraConfig(target_modules=ALL_LINEAR, modules_to_save=whole, task_type=task), state)


def check_initialisation(model: nn.Module, config: LoraConfig, plan: Plan, quantize: str | None) -> None:
    """Whether every module of the plan can begin as ``init_lora_weights`` says.

    Raises:
        ConfigError: a rank or scaling that the initialisation cannot have.
        UnsupportedError: a base that it cannot change: one that is shared, or, for LoftQ, one that is not being
            quantised.

    Warns:
        UserWarning: PiSSA over layers that are NF4 already.
    """
    init = config.init_lora_weights
    for path in plan.paths:
        if is_embedding(model.get_submodule(path)):
            if config.use_dora:
                raise UnsupportedError(f"use_dora: {path}: {NO_DORA}")
            if init != "loftq" and (reason := refused_start(init)) is not None:
                raise UnsupportedError(f"init_lora_weights: {path}: {reason}")
            continue
        n, k = sizes(model.get_submodule(path))
        reason = refusal(init, config.rank_for(path), config.scaling_for(path), n, k)
        if reason is not None:
            raise ConfigError(f"init_lora_weights: {path}: {reason}")
    if not parse(init).takes_weight:
        return
    quantized = [path for path in plan.paths if isinstance(model.get_submodule(path), NF4Linear)]
    if init == "loftq":
        if quantize is None:
            raise UnsupportedError(
                "init_lora_weights: 'loftq' begins with what quantisation loses: pass quantize='nf4'"
            )
        if quantized:
            raise UnsupportedError(
                f"init_lora_weights: 'loftq' needs the weight as it was before it was quantised; {quantized[0]} is NF4 "
                "already"
            )
        return
    for path, reason in shared_weights(model, plan.paths).items():
        raise UnsupportedError(f"init_lora_weights: {init!r} would change {path}, but {reason}")
    if quantized:
        warnings.warn(
            f"adapt: {init!r} begins with the dequantised weight of {len(quantized)} layers that are NF4 already, and "
            "quantises what is left of it anew: without the adapter they compute the same up to the error of that",
            UserWarning,
            stacklevel=3,
        )


def sizes(module: Any) -> tuple[int, int]:
    """N and K of a module that can be adapted."""
    if isinstance(module, nn.Linear) or hasattr(module, "out_features"):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]


def _sort_in(
    plan: Plan, path: str, module: nn.Module, config: TargetedConfig, state: ModelAdapters, head: nn.Module | None
) -> None:
    """Put a module that the configuration names where it belongs, or say why it belongs nowhere."""
    reason = cannot_adapt(module, state)
    if config.targets_all_linear:
        if not is_linear(module):
            return
        if module is head:
            plan.left_out[path] = "the output head"
            return
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            plan.left_out[path] = str(reason)
            return
    if reason is not None:
        raise UnsupportedError(f"target_modules: {path} cannot be adapted: {reason}")
    (plan.existing if isinstance(module, AdapterLinear) else plan.new).append(path)


def is_linear(module: nn.Module) -> bool:
    """What "all-linear" means."""
    linear = isinstance(module, nn.Linear | AdapterLinear | NF4Linear) and not isinstance(module, LoRAEmbedding)
    return linear or is_conv1d(module)


def is_embedding(module: nn.Module) -> bool:
    """Whether an adapter over the module is an embedding's."""
    return isinstance(module, nn.Embedding | LoRAEmbedding)


def cannot_adapt(module: nn.Module, state: ModelAdapters) -> str | None:
    """Why the module cannot hold an adapter; None where it can."""
    if isinstance(module, AdapterLinear):
        if module.owner is not state and module.adapter_names:
            return f"it is a {type(module).__name__} with adapters of its own ({', '.join(module.adapter_names)})"
        return None
    if isinstance(module, NF4Linear):
        return None
    if isinstance(module, SavedModule):
        return f"it is among modules_to_save of {', '.join(map(repr, module.adapter_names))}"
    if hasattr(getattr(module, "weight", None), "quant_state") or type(module).__module__.startswith("bitsandbytes"):
        return (
            f"{type(module).__name__} is quantised by bitsandbytes already; load the model without a "
            "quantization_config and pass quantize='nf4', or adapt a model built without data with checkpoint=PATH, "
            "which takes bitsandbytes' weights as they are"
        )
    if "forward" in module.__dict__:
        return f"the forward of this {type(module).__name__} was replaced (by accelerate's hooks?), and would be lost"
    return unsuitable_embedding(module) if isinstance(module, nn.Embedding) else unsuitable(module)


def output_head(model: nn.Module, config: AdapterConfig) -> nn.Module | None:
    """The head that "all-linear" leaves out, found as peft finds it."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None and config.task_type == "SEQ_CLS":
        named = (getattr(model, name, None) for name in ("score", "classifier"))
        head = next((module for module in named if module is not None), None)
    return head if isinstance(head, nn.Module) else None


def is_under(path: str, parents: Iterable[str]) -> bool:
    """Whether the module lies in one of ``parents``."""
    return any(path.startswith(parent + ".") for parent in parents)


def close_names(wanted: str, model: nn.Module) -> str:
    """`` (close: q_proj, k_proj)``: names in the model like the one that was not found."""
    paths = [path for path, _ in model.named_modules() if path]
    names = dict.fromkeys([path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()])
    close = difflib.get_close_matches(wanted.rpartition(".")[2], names, n=4, cutoff=0.5)
    close += [path for path in difflib.get_close_matches(wanted, paths, n=2, cutoff=0.8) if path not in close]
    if not close:
        linear = dict.fromkeys(path.rpartition(".")[2] for path, module in model.named_modules() if is_linear(module))
        return f"; its linear modules are called {', '.join(linear)}" if linear else "; it has no linear modules"
    return f"; close names: {', '.join(close)}"


def shared_weights(model: nn.Module, paths: list[str]) -> dict[str, str]:
    """Path -> reason of the modules whose weight is that of another one, too, as a tied head's: quantising or moving it
    would cut the tie.
    """
    users: defaultdict[Any, list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[_identity(parameter)].append((path, module))
    shared = {}
    for path in paths:
        others = [user for user in users[_identity(model.get_submodule(path).weight)] if user[0] != path]
        if others:
            shared[path] = f"its weight is also that of {others[0][0]}"
    return shared


def _check_saved(path: str, module: nn.Module) -> None:
    if isinstance(module, SavedModule):
        return
    for inner, child in module.named_modules():
        if isinstance(child, AdapterHolder | NF4Linear):
            where = f"{path}.{inner}" if inner else path
            kind = type(child).__name__
            raise UnsupportedError(f"modules_to_save: {path} cannot be trained whole: {where} is already a {kind}")


def _check_everything_matched(model: nn.Module, config: TargetedConfig, plan: Plan) -> None:
    missing = unmatched_targets(config, plan.paths)
    if missing:
        details = [f"{name!r} matches no module of the model{close_names(name, model)}" for name in missing[:8]]
        if config.targets_all_linear:
            details = ["'all-linear' finds no linear module that can be adapted"]
        raise ConfigError(f"target_modules: {'. '.join(details)}")
    if not plan.paths:
        raise ConfigError(f"target_modules: {config.target_modules!r} matches only modules that are excluded")
    unused = unmatched_patterns(config, plan.paths) if isinstance(config, LoraConfig) else []
    if unused:
        raise ConfigError(f"{unused[0]} matches no module that is adapted; those are {_some(plan.paths)}")


def _kept_precise(model: nn.Module, paths: list[str]) -> dict[str, str]:
    """Modules that a Hugging Face model names as needing full precision: T5 casts to the dtype of ``wo.weight``."""
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names.update(getattr(model, attribute, None) or ())
    kept = [path for path in paths if names & set(path.split("."))]
    return dict.fromkeys(kept, "the model asks for full precision (_keep_in_fp32_modules)")


def _identity(tensor: Tensor | nn.Module) -> Any:
    assert isinstance(tensor, Tensor)
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset()


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
