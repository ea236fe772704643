"""What the configurations share that adapt a model's own layers: which of them."""

from __future__ import annotations

from collections.abc import Sequence

from peftrt.adapters.configs.base import AdapterConfig, check_names
from peftrt.adapters.configs.pattern import compile_bounded
from peftrt.formats.errors import ConfigError

ALL_LINEAR = "all-linear"


class TargetedConfig(AdapterConfig):
    """Fields by which modules are chosen; each configuration declares those that it has, in its own order.

    Attributes:
        target_modules, exclude_modules, layers_to_transform, layers_pattern: as of :class:`peftrt.LoraConfig`.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    @property
    def targets_all_linear(self) -> bool:
        """Whether every linear layer is meant, but for the output head."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _check_targets(self) -> None:
        if self.target_modules is None:
            raise ConfigError(f"target_modules: name the modules to adapt, or {ALL_LINEAR!r}; got None")
        self._check_modules("target_modules", also_all_linear=True)
        self._check_modules("exclude_modules")
        if not self.target_modules:
            raise ConfigError("target_modules: must not be empty")

    def _check_modules(self, name: str, also_all_linear: bool = False) -> None:
        """A list of names, kept as a tuple, or one regular expression."""
        value = getattr(self, name)
        if isinstance(value, str):
            if not value:
                raise ConfigError(f"{name}: must not be empty")
            if not (also_all_linear and self.targets_all_linear):
                compile_bounded(value, name)
        elif value is not None:
            self._keep(name, check_names(name, value))
