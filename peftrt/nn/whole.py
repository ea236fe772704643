"""WholeModel: full fine-tuning as an adapter of its model, so that it is begun, told and ended as the others are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peftrt.nn.hooked import HookedAdapters

_HOST = "_host"


class WholeModel(HookedAdapters):
    """Stands at the root of a model all of whose Parameters are trained: there is no base left to go back to."""

    kind = "full_fine_tuning"

    def hook(self, model: nn.Module, host: nn.Module) -> None:
        """Refuse routings, which could name the base."""
        # past nn.Module's own attribute, which would make the host a child of its child
        self.__dict__[_HOST] = host
        host.register_forward_pre_hook(self._expect_no_other)

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """All of the model's that are floating point."""
        host = self.__dict__[_HOST]
        return tuple(parameter for parameter in host.parameters() if parameter.is_floating_point())

    def remove_adapter(self, name: str) -> None:
        """Freeze the model; its weights stay as they were trained."""
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad_(False)
        super().remove_adapter(name)

    def why_inactive(self, weights: Mapping[str, float]) -> str | None:
        """It is always active: what it changed are the weights of the base."""
        names = self.adapter_names
        if not names or weights == dict.fromkeys(names, 1.0):
            return None
        return (
            f"adapter {names[0]!r} is full fine-tuning, which changes the base itself: nothing is left that could be "
            f"computed without it; peftrt.remove(model, {names[0]!r}) keeps its weights and freezes them"
        )

    def _expect_no_other(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        routing = self.routing()
        if routing is not None and any(name not in self.adapter_names for name in routing.names):
            raise ValueError(f"rows: {self.why_inactive({})}")
