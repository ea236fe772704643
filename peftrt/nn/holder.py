"""AdapterHolder: what every module has that holds a share of a model's adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftrt.nn.routing import AdapterSet


class AdapterHolder(nn.Module):
    """A module with shares of named adapters: a layer's low-rank pairs, a copy of a head, a bottleneck behind it.

    Attributes:
        owner: the adapters of the model that the module belongs to; their names are unique in it.
    """

    owner: AdapterSet

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that have a share here, in the order in which they came."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """What is trained of an adapter's share."""
        raise NotImplementedError

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter's share."""
        raise NotImplementedError

    def set_active(self, names: str | Mapping[str, float] | None) -> None:
        """Choose what forward computes with, among the adapters held; ``requires_grad`` stays."""
        raise NotImplementedError

    def why_inactive(self, weights: Mapping[str, float]) -> str | None:
        """Why adapters that are held cannot act with these weights together; None where they can."""
        raise NotImplementedError
