"""The configuration of bottleneck adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftrt.adapters.configs.base import check_choice, check_layers, check_number
from peftrt.adapters.configs.targeted import TargetedConfig
from peftrt.formats.errors import ConfigError
from peftrt.nn.bottleneck import FROM_OUTPUT, FROM_RESIDUAL, FROM_SUM, INITS
from peftrt.ops import BOTTLENECK_ACTIVATIONS


@dataclass(frozen=True)
class Placement:
    """Where bottlenecks are, what goes through them, and what the paper has for the rest.

    Attributes:
        roles: of the sub-layers that have one.
        source: see :class:`peftrt.nn.bottleneck.BottleneckSite`.
        reduction_factor, activation, scaling, init: defaults.
    """

    roles: tuple[str, ...]
    source: str
    reduction_factor: float
    activation: str
    scaling: float
    init: str


PLACEMENTS: Mapping[str, Placement] = {
    "houlsby": Placement(("attention", "feed_forward"), FROM_OUTPUT, 16, "silu", 1.0, "bert"),
    "pfeiffer": Placement(("feed_forward",), FROM_SUM, 16, "relu", 1.0, "bert"),
    "parallel": Placement(("feed_forward",), FROM_RESIDUAL, 2, "relu", 4.0, "mam_adapter"),
}


@dataclass(frozen=True)
class BottleneckConfig(TargetedConfig):
    """Small networks beside or behind sub-layers: ``h' = h + s (act(u D^T + b_d) U^T + b_u)``.

    h is a sub-layer's output before the model adds the residual x to it. "houlsby" (AdapterHub's double_seq_bn): after
    attention and after the feed-forward, u = h. "pfeiffer" (seq_bn): after the feed-forward, u = h + x, and the model's
    norm of that where norms follow the addition. "parallel" (par_bn): beside the feed-forward, u = x.

    Args:
        placement: "houlsby", "pfeiffer" or "parallel". What is None below is as of AdapterHub's class of that name.
        reduction_factor: width over bottleneck, above 0; 16, 16 and 2.
        activation: see :func:`peftrt.ops.bottleneck`; "silu", "relu" and "relu".
        scaling: s; 1, 1 and 4.
        init: "bert", "houlsby" or "mam_adapter", see :class:`peftrt.Bottleneck`; "bert", "bert" and "mam_adapter".
        leave_out: indices of blocks without.
        target_modules: modules whose outputs are h, by name or a regular expression, for models in which no blocks are
            found: u = h, or for "parallel" the module's input. "pfeiffer" needs blocks.
        exclude_modules: names or a regular expression of modules to leave out.

    Raises:
        ConfigError: a field of a wrong type or out of its range, named in the message.

    Source: Houlsby et al. 2019 (arXiv:1902.00751); Pfeiffer et al. 2020 (arXiv:2005.00247); He et al. 2021
    (arXiv:2110.04366), table 1.
    """

    placement: str = "pfeiffer"
    reduction_factor: float | None = None
    activation: str | None = None
    scaling: float | None = None
    init: str | None = None
    leave_out: Sequence[int] = ()
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None

    peft_type: ClassVar[str] = "BOTTLENECK"
    required: ClassVar[tuple[str, ...]] = ("placement",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("placement", self.placement, tuple(PLACEMENTS))
        defaults = PLACEMENTS[self.placement]
        for name in ("reduction_factor", "activation", "scaling", "init"):
            if getattr(self, name) is None:
                self._keep(name, getattr(defaults, name))
        check_number("reduction_factor", self.reduction_factor)
        if not self.width_over_bottleneck > 0:
            raise ConfigError(f"reduction_factor: expected a number above 0, got {self.reduction_factor!a}")
        check_number("scaling", self.scaling)
        if self.activation == "swish":
            self._keep("activation", "silu")
        check_choice("activation", self.activation, BOTTLENECK_ACTIVATIONS)
        check_choice("init", self.init, INITS)
        self._check_places()

    @property
    def width_over_bottleneck(self) -> float:
        """The reduction factor, with the placement's default in it."""
        assert self.reduction_factor is not None
        return self.reduction_factor

    @property
    def roles(self) -> tuple[str, ...]:
        """Of the sub-layers that have a bottleneck."""
        return PLACEMENTS[self.placement].roles

    @property
    def source(self) -> str:
        """What goes through the bottlenecks: "output", "sum" or "residual"."""
        return PLACEMENTS[self.placement].source

    def _check_places(self) -> None:
        self._keep("leave_out", check_layers("leave_out", self.leave_out))
        for name in ("target_modules", "exclude_modules"):
            self._check_modules(name)
            if getattr(self, name) == ():
                raise ConfigError(f"{name}: must not be empty")
        if self.target_modules is not None and self.source == FROM_SUM:
            raise ConfigError(
                "target_modules: a 'pfeiffer' adapter needs the block's residual, which a module's name does not "
                "tell; use placement 'houlsby' or 'parallel'"
            )
        if self.target_modules is not None and self.leave_out:
            raise ConfigError("leave_out: blocks cannot be left out where target_modules names the places")
