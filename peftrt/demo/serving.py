"""One batch for everybody: each row with its own tenant's adapter, or with none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

import peftrt
from peftrt.demo.encoder import embed
from peftrt.demo.results import ServedRow
from peftrt.demo.tenants import Tenant
from peftrt.finetune.examples import Examples
from peftrt.finetune.tasks import evaluating


def serve_mixed(
    encoder: nn.Module, tenants: dict[str, Tenant], examples: Examples, rows: NDArray[np.int64], texts: Sequence[str]
) -> list[ServedRow]:
    """Serve ``rows`` in one batch, in turn with each tenant and with the base alone; then every row by itself.

    Args:
        encoder: holds all the tenants' adapters.
        tenants: by the names of their adapters.
        examples: the tokens, by row.
        rows: which of them.
        texts: their texts, by row.
    """
    turns = [*tenants, None]
    names = [turns[i % len(turns)] for i in range(len(rows))]
    with evaluating(encoder), peftrt.rows(encoder, names):
        together = embed(encoder, examples.batch(rows))
    served = []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        peftrt.set_active(encoder, name)
        with evaluating(encoder):
            alone = embed(encoder, examples.batch(rows[i : i + 1]))[0]
        answer, expected = (_answer(tenants.get(name or ""), vector) for vector in (together[i], alone))
        difference = float((answer - expected).abs().max())
        label = tenants[name].classes[int(answer.argmax())] if name else "its embedding"
        served.append(ServedRow(texts[row], name, label, difference))
    return served


def _answer(tenant: Tenant | None, embedding: Tensor) -> Tensor:
    """The tenant's logits, or the embedding itself where there is none."""
    return embedding if tenant is None else tenant.head(embedding).detach()
