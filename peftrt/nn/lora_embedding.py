"""LoRAEmbedding: LoRA adapters over an embedding table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftrt.nn import initialisation
from peftrt.nn.adapter import DEFAULT, Adapter
from peftrt.nn.adapter_linear import AdapterLinear
from peftrt.nn.initialisation import Pair
from peftrt.nn.lora_linear import begin
from peftrt.nn.routing import Routing, current
from peftrt.nn.source import carry_over, unsuitable_embedding

NO_DORA = "DoRA (use_dora) of an embedding is not supported"
NO_IA3 = "IA3 of an embedding is not supported"
# Rows of the table that merging works on at a time.
_CHUNK = 4096


class LoRAEmbedding(AdapterLinear):
    """A frozen embedding with LoRA adapters: ``y = E[ids] + s A^T[ids] B^T``.

    An embedding is the linear map of one-hot rows, so this is LoRA over ``W = E^T`` with K = V words and N = D
    features: E is ``[V, D]``, A ``[R, V]``, B ``[D, R]``. Rows of E and of A^T are gathered; nothing of the size of the
    table is made. The arithmetic is torch's own. As in HF peft, the Parameters are called ``lora_embedding_A`` and
    ``lora_embedding_B``, an adapter begins with A zero and B normal, and its dropout does not act here: ids have
    nothing to drop.

    Made by :meth:`from_embedding`. A table that another module shares (a tied head) stays as it is there, also when an
    adapter is merged into this one.

    Source: LoRA, Hu et al. 2021 (arXiv:2106.09685).
    """

    fields: ClassVar[tuple[str, str, str]] = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude")

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool
    sparse: bool

    @classmethod
    def from_embedding(
        cls, embedding: nn.Module, *, r: int | None = 8, adapter_name: str = DEFAULT, **adapter: Any
    ) -> Self:
        """Wrap an ``nn.Embedding``, whose table (now frozen), options, hooks and training flag are taken over.

        Args:
            embedding: the module; ``padding_idx`` and ``scale_grad_by_freq`` hold for A^T's rows as well. A's gradient
                is dense, also where ``sparse`` is set.
            r: R of the adapter that the layer begins with, active; None for a layer without adapters.
            adapter_name: its name.
            adapter: see :meth:`AdapterLinear.add_adapter`.

        Raises:
            TypeError: another kind of module, or one with ``max_norm``.
        """
        reason = unsuitable_embedding(embedding)
        if reason is not None:
            raise TypeError(reason)
        assert isinstance(embedding, nn.Embedding)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_embeddings, layer.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        layer.padding_idx, layer.scale_grad_by_freq = embedding.padding_idx, embedding.scale_grad_by_freq
        layer.sparse = embedding.sparse
        layer.in_features, layer.out_features = layer.num_embeddings, layer.embedding_dim
        layer.register_parameter("weight", embedding.weight.requires_grad_(False))  # type: ignore[arg-type]
        layer.register_parameter("bias", None)
        layer._init_adapters()
        carry_over(embedding, layer)
        begin(layer, r, adapter_name, adapter)
        return layer

    _transposed = True  # the table is stored [K, N]

    def base_weight(self) -> Tensor:
        """W = E^T, [D, V], a view."""
        return self.weight.t()

    def _expect_dora_fits(self) -> None:
        raise ValueError(NO_DORA)

    def add_ia3(self, name: str = DEFAULT, **_: Any) -> NoReturn:
        """Refused: rows of the table are gathered, there is no product to scale."""
        raise ValueError(NO_IA3)

    def _draw(self, init: bool | str, r: int, dtype: torch.dtype) -> Pair:
        if (reason := refused_start(init)) is not None:
            raise ValueError(reason)
        lora_A = torch.zeros(r, self.in_features, dtype=dtype, device=self.weight.device)
        if init is False:
            nn.init.normal_(lora_A)
        return lora_A, nn.init.normal_(torch.empty(self.out_features, r, dtype=dtype, device=self.weight.device))

    def _begin_with_weight(self, name: str, init: bool | str, *rest: Any) -> Pair:
        raise ValueError(refused_start(init))

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` integers in 0 ... V - 1 to ``[..., D]`` in the table's dtype."""
        routing = current(self.owner)
        y = self._gather(ids, self.weight)
        if routing is not None:
            return self._routed_rows(ids, y, routing.of(ids))
        if self._merged is not None:
            return y
        for name, weight in self._active.items():
            y = y + self._change(ids, self.adapter(name), weight)
        return y.to(self.weight.dtype)

    def _gather(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def _change(self, ids: Tensor, adapter: Adapter, weight: float = 1.0) -> Tensor:
        """``w s A^T[ids] B^T``."""
        return F.linear(self._gather(ids, adapter.lora_A.t()), adapter.lora_B) * (adapter.scaling * weight)

    def _routed_rows(self, ids: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """Every entry of the batch with its own adapter's change."""
        self._expect_unmerged("rows: the base")
        slots = routing.held(self.adapter_names)
        # raises where the batch has another length
        slot_ids = routing.slot_ids(slots, ids.unsqueeze(-1)).view(ids.shape)
        for slot, name in enumerate(slots):
            mine = slot_ids == slot
            change = self._change(ids[mine], self.adapter(name))
            y = y.index_put((mine,), (y[mine] + change).to(y.dtype))
        return y

    @torch.no_grad()
    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The plain embedding with the active adapters in its table, and the options it had."""
        bare = self._merged is not None or self.is_bare(self._active)
        table = self.weight if bare else self._merged_table(self._active)
        table = table.to(dtype or table.dtype, copy=True)
        options = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
        return nn.Embedding.from_pretrained(table, padding_idx=self.padding_idx, **options)

    def _merge_into_base(self, weights: Mapping[str, float], force: bool) -> dict[str, Tensor]:
        before = self.weight
        # a new Parameter: the old one is the backup, and a module that shares it keeps its own bits
        self.weight = nn.Parameter(self._merged_table(weights), requires_grad=False)
        return {"weight": before}

    def _merged_table(self, weights: Mapping[str, float]) -> Tensor:
        """``E + sum_a w_a s_a (B_a A_a)^T``, summed in fp32 some rows at a time."""
        table = torch.empty_like(self.weight)
        for rows in range(0, self.num_embeddings, _CHUNK):
            part = slice(rows, rows + _CHUNK)
            merged = self.weight[part].float()
            for term in self.terms(weights):
                merged = merged + term.scaling * (term.lora_A[:, part].float().t() @ term.lora_B.float().t())
            table[part] = merged
        return table

    def extra_repr(self) -> str:
        """Sizes and adapters, as shown by ``print(model)``."""
        sizes = f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
        return sizes + super().extra_repr()


def refused_start(init: bool | str) -> str | None:
    """Why an embedding's adapter cannot begin so; None where it can."""
    if initialisation.parse(init).kind in ("kaiming", "gaussian", "random"):
        return None
    return f"an embedding's adapter begins with init True, False or 'gaussian', not with {init!r}"
