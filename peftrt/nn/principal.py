"""Adapters that begin with the base weight: what they take out of it stays known, and comes back without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt.nn import initialisation


class Term(NamedTuple):
    """One low-rank term of a layer's map, ``scaling (drop(x) A^T) B^T``: A [R, K], B [N, R]."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0

    @torch.no_grad()
    def delta(self) -> Tensor:
        """scaling B A, fp32 [N, K]."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())


def in_one(terms: Sequence[Term]) -> tuple[Tensor, Tensor, float]:
    """Terms in sum are one of the summed rank: its A, B and scaling."""
    if len(terms) == 1:
        return terms[0].lora_A, terms[0].lora_B, terms[0].scaling
    return torch.cat([term.lora_A for term in terms]), torch.cat([t.lora_B * t.scaling for t in terms], dim=1), 1.0


class PrincipalParts(nn.Module):
    """A base weight of which parts were taken out: ``W = base + sum_p s_p B0_p A0_p``.

    PiSSA begins an adapter with the principal part s B0 A0 of W and leaves the rest in the base. The first values of A
    and B stay here, as the buffers ``lora_A0@fr`` and ``lora_B0@fr`` for the adapter "fr". An adapter that acts with
    weight w stands for ``w s (B A - B0 A0)``, a change of W as any other's; so the part's share is 1 - w, which is
    nothing where the adapter acts alone with weight 1.
    """

    def _init_principal(self) -> None:
        # adapter, or "adapter@number" for one that was removed -> s
        self._principal: dict[str, float] = {}

    def principal_pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A0 [R, K] and B0 [N, R] of an adapter that began with a part of the weight; None for others."""
        if name not in self._principal:
            return None
        lora_A, lora_B = (self._buffers[f"{field}@{name}"] for field in _FIELDS)
        assert lora_A is not None
        assert lora_B is not None
        return lora_A, lora_B

    def principal_terms(self, weights: Mapping[str, float]) -> list[Term]:
        """What the base lacks of W where adapters act with these weights."""
        terms = []
        for name, scaling in self._principal.items():
            share = 1.0 - weights.get(name, 0.0)
            pair = self.principal_pair(name)
            if share and pair is not None:
                terms.append(Term(*pair, share * scaling))
        return terms

    def adapted_weight(self, names: Mapping[str, float]) -> Tensor:
        """W with adapters of these weights in it, fp32 [N, K]."""
        raise NotImplementedError

    def _store_base(self, weight: Tensor) -> None:
        """Make fp32 [N, K] the base, in the form that the base has."""
        raise NotImplementedError

    def _expect_unmerged(self, what: str) -> None:
        raise NotImplementedError

    def _begin_with_loftq(self, weight: Tensor, r: int, scaling: float, iterations: int) -> initialisation.Pair:
        raise ValueError("init 'loftq' makes up for what quantisation loses, and this base is dense: use True")

    @torch.no_grad()
    def _begin_with_weight(
        self,
        name: str,
        init: bool | str,
        r: int,
        scaling: float,
        original: Tensor | None,
        loftq_config: Mapping[str, Any] | None,
        dtype: torch.dtype,
    ) -> initialisation.Pair:
        """A and B that begin with W; the base becomes what goes with them."""
        self._expect_unmerged(f"init {init!r} changes the base")
        kind, niter = initialisation.parse(init)
        if kind == "loftq":
            iterations = initialisation.loftq_iterations(loftq_config)
            weight = torch.empty(0) if original is None else original.float()
            lora_A, lora_B = self._begin_with_loftq(weight, r, scaling, iterations)
            return lora_A.to(dtype), lora_B.to(dtype)
        weight = self.adapted_weight({}) if original is None else original.float()
        lora_A, lora_B = (half.to(dtype) for half in initialisation.principal(weight, r, scaling, niter))
        # what is left is worked out with the values as they were rounded, so that nothing is lost between the two
        rest = weight - Term(lora_A, lora_B, scaling).delta()
        for term in self.principal_terms({}):
            rest -= term.delta()
        self._store_base(rest)
        self._keep_principal(name, lora_A, lora_B, scaling)
        return lora_A, lora_B

    def _keep_principal(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        for field, tensor in zip(_FIELDS, (lora_A, lora_B), strict=True):
            self.register_buffer(f"{field}@{name}", tensor.detach().clone())
        self._principal[name] = scaling

    def _drop_principal(self, name: str) -> None:
        for field in _FIELDS:
            del self._buffers[f"{field}@{name}"]
        del self._principal[name]

    def _settle_principal(self, name: str) -> None:
        """An adapter goes, and what it took out of the base stays: under a name that no adapter can have."""
        pair = self.principal_pair(name)
        if pair is None:
            return
        number = next(i for i in range(1, len(self._principal) + 1) if f"{name}@{i}" not in self._principal)
        self._keep_principal(f"{name}@{number}", *pair, self._principal[name])
        self._drop_principal(name)


_FIELDS = ("lora_A0", "lora_B0")
