"""merge and unmerge: adapters inside the base weights, where they cost nothing, and out again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from peftrt.adapters.activation import activate, set_active
from peftrt.adapters.methods import method_of
from peftrt.adapters.state import ModelAdapters, adapter_layers, all_or_nothing, expect_state, unwrap
from peftrt.nn import AdapterLinear, QLoRALinear
from peftrt.nn.adapter import as_weights

# Sites that are requantised on trial to tell how much would be lost.
_SAMPLE = 8


def merge(model: nn.Module, names: str | Mapping[str, float] | None = None, *, force: bool = False) -> None:
    """Add adapters to the base weights: ``W + sum_a w_a s_a B_a A_a``, rounded to the weights' dtype.

    A DoRA adapter's sum is multiplied by its factors: ``c * (W + s B A)``. The adapters are the active ones afterwards.
    What is overwritten is kept, so that :func:`unmerge` gives the same bits; :func:`export` writes a merged model
    without changing this one.

    Args:
        model: a model with adapters.
        names: a name, or name -> weight; by default the active ones.
        force: merge into an NF4 base, too.

    Raises:
        ValueError: an unknown name, none is active, something is merged already; or the base is NF4 and ``force`` is
            not set: rounding to sixteen levels would throw away most of the fine-tuning, and the message has the share,
                as measured.
    """
    state = expect_state(model, "merge")
    if state.merged is not None:
        raise ValueError(f"merge: adapters {sorted(state.merged)} are merged already; call peftrt.unmerge first")
    weights = as_weights(names) if names is not None else dict(state.active)
    state.expect_known(weights, "merge")
    if not weights:
        raise ValueError("merge: no adapter is active; say which one to merge")
    expect_changes_of_weights(state, weights, "merge")
    layers = {
        path: layer for path, layer in adapter_layers(model, state).items() if set(layer.adapter_names) & set(weights)
    }
    if not force:
        _refuse_nf4(layers, weights)
    with all_or_nothing(unwrap(model)):
        set_active(model, weights)
        for layer in layers.values():
            layer.merge(force=force)
        state.merged = weights


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base weights, which have the bits they had before; the adapters stay active.

    Nothing where nothing is merged.
    """
    state = expect_state(model, "unmerge")
    with all_or_nothing(unwrap(model)):
        for layer in adapter_layers(model, state).values():
            layer.unmerge()
        state.merged = None
        activate(model, state, state.active)


def expect_changes_of_weights(state: ModelAdapters, names: Iterable[str], where: str) -> None:
    """Raise ValueError unless all adapters are changes of weights, which can be put into them."""
    for name in names:
        config = state.configs[name]
        if not method_of(config).changes_weights:
            raise ValueError(
                f"{where}: adapter {name!r} ({type(config).__name__}) is no change of weights and cannot be put into "
                "them: serve it as it is"
            )


def _refuse_nf4(layers: Mapping[str, AdapterLinear], weights: Mapping[str, float]) -> None:
    quantized = [layer for layer in layers.values() if isinstance(layer, QLoRALinear)]
    if not quantized:
        return
    sample = quantized[:: max(1, len(quantized) // _SAMPLE)][:_SAMPLE]
    losses = []
    for layer in sample:
        held = {name: weight for name, weight in weights.items() if name in layer.adapter_names}
        losses.append(layer.merge_loss(held))
    share = sum(losses) / len(losses)
    raise ValueError(
        f"merge: the base is NF4: rounding to its sixteen levels would lose {share:.1%} of the change that "
        f"{', '.join(map(repr, weights))} makes (measured on {len(sample)} of {len(quantized)} layers). Serve "
        "the adapter as it is, write the merged model with peftrt.export(model, path, dtype=torch.bfloat16), or pass "
        "force=True"
    )
