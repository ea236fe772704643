"""Which adapters of a model are used: for all calls, or for each entry of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from peftrt.adapters.saved import SavedModule
from peftrt.adapters.state import (
    ModelAdapters,
    all_or_nothing,
    expect_state,
    find_state,
    holders,
    replace_module,
    unwrap,
)
from peftrt.nn import AdapterHolder, HookedAdapters
from peftrt.nn.adapter import as_weights
from peftrt.nn.routing import routed


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's adapters, in the order in which they came; empty where it has none."""
    state = find_state(model)
    return () if state is None else tuple(state.configs)


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The active adapters and their weights."""
    state = find_state(model)
    return {} if state is None else dict(state.active)


def set_active(model: nn.Module, names: str | Mapping[str, float] | None) -> None:
    """Choose what the model computes with: the base alone, one adapter, or a weighted sum of several.

    ``y = x W^T + b + sum_a w_a s_a (x A_a^T) B_a^T``. What requires gradients stays as it is.

    Args:
        model: a model with adapters.
        names: None, a name, or name -> weight.

    Raises:
        ValueError: an unknown name, a weight that is not finite, adapters are merged, or several adapters have a copy
            of one module of ``modules_to_save`` (or one of them another weight than 1): whole modules cannot be summed,
            and neither can DoRA's adapters, bottlenecks or prefixes with others of their place.
    """
    state = expect_state(model, "set_active")
    weights = as_weights(names)
    state.expect_known(weights, "set_active")
    if weights != state.active:
        state.expect_unmerged("set_active")
    for path, holder in holders(model, state).items():
        reason = holder.why_inactive(_held(holder, weights))
        if reason is not None:
            raise ValueError(f"set_active: {path}: {reason}")
    with all_or_nothing(unwrap(model)):
        activate(model, state, weights)


def activate(model: nn.Module, state: ModelAdapters, weights: Mapping[str, float]) -> None:
    """Make checked ``weights`` the active ones on every module that holds some of them."""
    for holder in holders(model, state).values():
        holder.set_active(_held(holder, weights))
    state.active = dict(weights)


def _held(holder: AdapterHolder, weights: Mapping[str, float]) -> dict[str, float]:
    names = holder.adapter_names
    return {name: weight for name, weight in weights.items() if name in names}


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None], expand: int = 1) -> Iterator[None]:
    """Run the model with one adapter, or none, for each entry of the batch: ``with peftrt.rows(model, ["fr", None]):``.

    Holds for calls in this thread until the block ends, and for the layers that gradient checkpointing runs again in
    the backward of those calls. Active adapters do not matter inside.

    Args:
        model: a model with adapters.
        names: one name or None for each entry of the leading dimension of what the model is called with.
        expand: how often each name counts, where the model repeats its batch (beams); an encoder, which is given it
            before it is repeated, has each name once.

    Raises:
        ValueError: an unknown name, no names, ``expand`` below 1, or adapters are merged; and when
            the model is called, another number of entries.
        TypeError: ``names`` is a string.
    """
    state = expect_state(model, "rows")
    check_rows("rows", names, expand)
    state.expect_known(names, "rows")
    state.expect_unmerged("rows")
    with routed(state, names, expand):
        yield


def check_rows(where: str, names: Sequence[str | None], expand: int) -> None:
    """Raise TypeError or ValueError unless these can be the names of a batch's entries; they need not be known."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{where}: names must be a list with one adapter's name or None an entry, got {names!r}")
    if not names:
        raise ValueError(f"{where}: names must hold one adapter's name or None for each entry of the batch, got none")
    if isinstance(expand, bool) or not isinstance(expand, int) or expand < 1:
        raise ValueError(f"{where}: expand must be an integer of at least 1, got {expand!r}")


def remove(model: nn.Module, name: str) -> None:
    """Forget an adapter; if it is active, it is so no more. The layers stay, and so does a quantised base.

    Raises:
        ValueError: an unknown name, or it is merged.
    """
    state = expect_state(model, "remove")
    state.expect_known([name], "remove")
    if state.merged is not None and name in state.merged:
        raise ValueError(f"remove: adapter {name!r} is merged into the base; call peftrt.unmerge first")
    with all_or_nothing(unwrap(model)):
        detach(model, state, name)


def detach(model: nn.Module, state: ModelAdapters, name: str) -> None:
    """Take a known adapter off every module; those that are there for adapters alone leave with their last one."""
    model = unwrap(model)
    for path, holder in holders(model, state).items():
        if name in holder.adapter_names:
            holder.remove_adapter(name)
        if isinstance(holder, SavedModule) and not holder.adapter_names:
            replace_module(model, holder, holder.base)
        if isinstance(holder, HookedAdapters) and not holder.adapter_names:
            holder.uninstall(model, model.get_submodule(path.rpartition(".")[0]))
    state.active.pop(name, None)
    del state.configs[name]
