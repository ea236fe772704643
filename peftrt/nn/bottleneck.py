"""Bottleneck: a small network beside or behind a sub-layer, and where it sits in a model."""

from __future__ import annotations

import math
import threading
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrt import ops
from peftrt.nn.hooked import HookedAdapters, entries_of, first_tensor, replaced
from peftrt.nn.routing import AdapterSet

# What goes through the bottleneck: the sub-layer's output h, LN(h + x) or h + x, or x itself.
FROM_OUTPUT, FROM_SUM, FROM_RESIDUAL = "output", "sum", "residual"
INITS = ("bert", "houlsby", "mam_adapter")


class Bottleneck(nn.Module):
    """A bottleneck adapter: ``y = residual + s (act(x D^T + b_d) U^T + b_u)``.

    Args:
        in_features: K.
        bottleneck_features: R; by default ``in_features // reduction_factor``, at least 1.
        reduction_factor: K over R.
        activation: see :func:`peftrt.ops.bottleneck`.
        scaling: s.
        init: "bert": D and U normal with deviation 0.02; "houlsby": normal with deviation 0.01, cut at two of them;
            "mam_adapter": D Kaiming-uniform, U zero, so that nothing changes at first. Biases are zero.
        device, dtype: of the Parameters.

    Source: Houlsby et al. 2019 (arXiv:1902.00751), figure 2; scaling and "mam_adapter": He et al. 2021
    (arXiv:2110.04366).
    """

    down_weight: nn.Parameter
    down_bias: nn.Parameter
    up_weight: nn.Parameter
    up_bias: nn.Parameter

    def __init__(
        self,
        in_features: int,
        bottleneck_features: int | None = None,
        *,
        reduction_factor: float = 16,
        activation: str = "relu",
        scaling: float = 1.0,
        init: str = "bert",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"Bottleneck: init must be one of {', '.join(INITS)}, got {init!r}")
        if not reduction_factor > 0:
            raise ValueError(f"Bottleneck: reduction_factor must be above 0, got {reduction_factor!r}")
        if not math.isfinite(scaling):
            raise ValueError(f"Bottleneck: scaling must be finite, got {scaling!r}")
        self.in_features = in_features
        self.bottleneck_features = bottleneck_features or bottleneck_size(in_features, reduction_factor)
        self.activation, self.scaling, self.init = activation, float(scaling), init
        shapes = {
            "down_weight": (self.bottleneck_features, in_features),
            "down_bias": (self.bottleneck_features,),
            "up_weight": (in_features, self.bottleneck_features),
            "up_bias": (in_features,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the Parameters as ``init`` says."""
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)
        if self.init == "mam_adapter":
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
            nn.init.zeros_(self.up_weight)
            return
        for weight in (self.down_weight, self.up_weight):
            if self.init == "bert":
                nn.init.normal_(weight, std=0.02)
            else:
                nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., K]`` to ``[..., K]``; the residual is x itself by default."""
        rest = x if residual is None else residual
        weights = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return ops.bottleneck(x, rest, *weights, self.scaling, self.activation)

    def extra_repr(self) -> str:
        """As shown by ``print(model)``."""
        sizes = f"{self.in_features} -> {self.bottleneck_features} -> {self.in_features}"
        return f"{sizes}, activation={self.activation}, scaling={self.scaling:g}"


def bottleneck_size(in_features: int, reduction_factor: float) -> int:
    """R of a reduction factor, as AdapterHub rounds it."""
    return max(1, int(in_features // reduction_factor))


class BottleneckSite(HookedAdapters):
    """The bottlenecks at one sub-layer, whose output h they change before the model adds the residual x to it.

    ``h' = h + s f(u)``: u is h itself (Houlsby), LN(h + x) with the model's own norm where that follows the addition or
    h + x where it does not (Pfeiffer), or x (parallel).

    Args:
        owner: the model's adapters.
        residual: path of the module whose input is x; None where no adapter here can need it.
        norm: path of the norm that the model applies to h + x; None where it applies none.
    """

    kind: ClassVar[str] = "bottleneck"

    def __init__(self, owner: AdapterSet, residual: str | None, norm: str | None) -> None:
        super().__init__(owner)
        self.residual, self.norm = residual, norm
        self._inputs: dict[str, str] = {}
        # x by thread, from the call of the module that has it as input until the host's: of one forward, in one thread
        self._seen: dict[int, Tensor] = {}
        self._norm_of: tuple[nn.Module, str] | None = None

    def add_bottleneck(self, name: str, adapter: Bottleneck, source: str) -> None:
        """Hold an adapter, not yet active; ``source``: what goes through it, "output", "sum" or "residual"."""
        self._inputs[name] = source
        self.add_adapter(name, adapter)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter's share."""
        super().remove_adapter(name)
        del self._inputs[name]

    def hook(self, model: nn.Module, host: nn.Module) -> None:
        """Register hooks on the host and on the module that x goes into."""
        host.register_forward_hook(self._after)
        if self.residual is not None:
            model.get_submodule(self.residual).register_forward_pre_hook(self._remember, with_kwargs=True)
        if self.norm is not None:
            # by its place, because the module there may be replaced; in a tuple, because it is not a child of this one
            parent, _, name = self.norm.rpartition(".")
            self._norm_of = (model.get_submodule(parent), name)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active is not None or self.routing() is not None:
            self._seen[_thread()] = first_tensor(args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        routing = self.routing()
        x = self._seen.pop(_thread(), None)
        if routing is None:
            name = self._active
            return output if name is None else replaced(output, lambda h: self._adapted(name, h, x))
        names = self.serving(routing.of(output if isinstance(output, Tensor) else output[0]))
        if not any(names):
            return output
        return replaced(output, lambda h: self._by_entry(names, h, x))

    def _adapted(self, name: str, h: Tensor, x: Tensor | None) -> Tensor:
        source = self._inputs[name]
        if source == FROM_OUTPUT:
            return self.adapter(name)(h)
        assert x is not None, f"{self.residual} was not called before"
        if source == FROM_RESIDUAL:
            return self.adapter(name)(x, h)
        together = h + x
        if self._norm_of is not None:
            parent, attribute = self._norm_of
            norm: nn.Module = getattr(parent, attribute)
            together = norm(together)
        return self.adapter(name)(together, h)

    def _by_entry(self, names: list[str | None], h: Tensor, x: Tensor | None) -> Tensor:
        if h.shape[0] != len(names):
            raise ValueError(f"rows: {len(names)} names for a sub-layer whose output has shape {list(h.shape)}")
        if len(set(names)) == 1 and names[0] is not None:
            return self._adapted(names[0], h, x)
        changed = h.clone()
        for name, index in entries_of(names, h.device):
            if name is not None:
                part = self._adapted(name, h[index], None if x is None else x[index])
                changed = changed.index_copy(0, index, part)
        return changed

    def example(self) -> tuple[Any, ...] | None:
        """One row through the active adapter, or the first."""
        names = self.adapter_names
        if not names:
            return None
        adapter: Bottleneck = self.adapter(self._active or names[0])
        x = adapter.down_weight.new_empty(1, adapter.in_features)
        weights = (adapter.down_weight, adapter.down_bias, adapter.up_weight, adapter.up_bias)
        return ("bottleneck", x, x, *weights, adapter.scaling, adapter.activation)

    def extra_repr(self) -> str:
        """As shown by ``print(model)``."""
        return f"active={self._active}"


def _thread() -> int:
    # a compiled graph holds both calls: there is nothing to tell apart, and nothing that could
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
