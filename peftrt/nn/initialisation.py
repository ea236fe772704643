"""How an adapter's matrices begin: peft's ``init_lora_weights``, in one place.

What begins with the base weight (PiSSA, LoftQ) is computed in fp32 from its singular vectors. Those are known up to a
sign, which is fixed here, and the randomised decomposition draws from a generator of its own: the same weight gives the
same bits, whatever was drawn before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftrt.formats.nf4 import NF4Weight

EXPECTED = "True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_<n>' or 'loftq'"
# peft's further ones: they need data, gradients, or freeze a half of the adapter.
UNSUPPORTED = ("corda", "eva", "lora_ga", "mica", "olora")
LOFTQ_DEFAULTS = {"loftq_bits": 4, "loftq_iter": 1}

_NITER = re.compile(r"pissa_niter_([0-9]{1,4})")
_MAX_ITERATIONS = 1000
# Columns drawn beyond the rank, as Halko et al. advise (section 4.2), and the seed they are drawn from.
_OVERSAMPLING = 8
_SEED = 0

Pair = tuple[Tensor, Tensor]


class Initialisation(NamedTuple):
    """``init_lora_weights`` taken apart.

    ``kind`` is "kaiming" (True), "random" (False), "gaussian", "orthogonal", "pissa" or "loftq"; ``niter`` the power
    iterations of PiSSA's randomised decomposition, None for the exact one.
    """

    kind: str
    niter: int | None = None

    @property
    def takes_weight(self) -> bool:
        """Whether it begins with the base weight, and changes it."""
        return self.kind in ("pissa", "loftq")


def parse(init: bool | str) -> Initialisation:
    """Take ``init_lora_weights`` apart; ValueError for what is none, with what there is."""
    if init is True or init is False:
        return Initialisation("kaiming" if init else "random")
    if init in ("gaussian", "orthogonal", "pissa", "loftq"):
        return Initialisation(str(init))
    found = _NITER.fullmatch(init) if isinstance(init, str) else None
    if found is not None:
        return Initialisation("pissa", int(found[1]))
    known = f" ({init!r} of peft is not supported)" if init in UNSUPPORTED else ""
    raise ValueError(f"init must be {EXPECTED}, got {init!r}{known}")


def loftq_iterations(config: Mapping[str, Any] | None) -> int:
    """``loftq_iter`` of peft's ``loftq_config``, checked; ValueError for what cannot be done."""
    values = {**LOFTQ_DEFAULTS, **(config or {})}
    if unknown := sorted(values.keys() - LOFTQ_DEFAULTS.keys()):
        raise ValueError(f"loftq_config has the fields loftq_bits and loftq_iter, got {unknown[0]!r}")
    if values["loftq_bits"] != 4 or isinstance(values["loftq_bits"], bool):
        raise ValueError(f"loftq_config: loftq_bits must be 4 (NF4), got {values['loftq_bits']!r}")
    count = values["loftq_iter"]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MAX_ITERATIONS:
        raise ValueError(f"loftq_config: loftq_iter must be an integer from 1 to {_MAX_ITERATIONS}, got {count!r}")
    return count


def refusal(init: bool | str, r: int, scaling: float, n: int, k: int) -> str | None:
    """Why an adapter of rank R and this scaling over a weight [N, K] cannot begin so; None where it can."""
    kind = parse(init).kind
    if kind == "orthogonal" and r % 2:
        return f"init {init!r} needs an even rank, got r = {r}"
    if kind in ("pissa", "loftq") and r > min(n, k):
        return f"init {init!r} needs a rank of at most {min(n, k)} over a weight of [{n}, {k}], got r = {r}"
    if kind in ("pissa", "loftq") and not scaling > 0:
        return f"init {init!r} needs a scaling above 0, got {scaling}"
    return None


def draw(init: bool | str, r: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Pair:
    """A [R, K] and B [N, R] of an initialisation that does not look at the weight, from torch's generator.

    True: A Kaiming-uniform, B zero (Hu et al. 2021, arXiv:2106.09685). "gaussian": A normal with deviation 1 / R, B
    zero. False: both Kaiming-uniform. "orthogonal": A = (X Q_1)^T / 10 and B = Y Q_2 / 10 with X, Y standard normal and
    Q_1, Q_2 the even and the odd rows of a random orthogonal [R, R]: neither is zero and B A is (as HF peft's of that
    name; https://datta0.github.io/posts/rethink-lora-init).
    """
    kind = parse(init).kind
    if kind == "orthogonal":
        rows = torch.linalg.qr(torch.randn(r, r, device=device))[0]
        lora_A = (torch.randn(k, r // 2, device=device) @ rows[0::2]).t() / 10
        lora_B = torch.randn(n, r // 2, device=device) @ rows[1::2] / 10
        return lora_A.to(dtype).contiguous(), lora_B.to(dtype)
    lora_A = torch.empty(r, k, dtype=dtype, device=device)
    lora_B = torch.zeros(n, r, dtype=dtype, device=device)
    if kind == "gaussian":
        nn.init.normal_(lora_A, std=1 / r)
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if kind == "random":
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    return lora_A, lora_B


def principal(weight: Tensor, r: int, scaling: float, niter: int | None = None) -> Pair:
    """PiSSA's A [R, K] and B [N, R], fp32: s B A is the best approximation of W of rank R.

    ``W = U S V^T``: ``A = sqrt(S_R / s) V_R^T``, ``B = U_R sqrt(S_R / s)``.

    Args:
        weight: W, fp32 [N, K].
        r: R, at most min(N, K).
        scaling: s, above 0.
        niter: power iterations of a randomised decomposition, which is quicker by far where R is small; None for the
            exact one.

    Source: PiSSA, Meng et al. 2024 (arXiv:2404.02948), equations 2 and 3; randomised: Halko et al. 2011
    (arXiv:0909.4061), algorithms 4.4 and 5.1.
    """
    u, s, vh = _leading(weight, r) if niter is None else _leading_randomised(weight, r, niter)
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def loftq(
    weight: Tensor, r: int, scaling: float, iterations: int, quantize: Callable[[Tensor], NF4Weight]
) -> tuple[Tensor, Tensor, NF4Weight]:
    """LoftQ's A [R, K], B [N, R] (fp32) and the NF4 base Q [N, K]: Q + s B A is closer to W than nf4(W).

    By turns, from B A = 0: ``Q = nf4(W - s B A)``, then ``s B A`` = the best approximation of W - Q of rank R.

    Args:
        weight: W, fp32 [N, K].
        r: R, at most min(N, K).
        scaling: s, above 0; B A is divided by it, so that the layer computes with Q + s B A whatever s is.
        iterations: how often.
        quantize: fp32 [N, K] -> NF4.

    Source: LoftQ, Li et al. 2023 (arXiv:2310.08659), algorithm 1.
    """
    rest = weight
    for _ in range(iterations):
        base = quantize(rest)
        lora_A, lora_B = principal(weight - base.dequantize(torch.float32), r, scaling)
        rest = weight - scaling * (lora_B @ lora_A)
    return lora_A, lora_B, base


def _leading(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The R greatest singular values and their vectors: U [N, R], S [R], V^T [R, K]."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return _fix_signs(u[:, :r], s[:r], vh[:r])


def _leading_randomised(weight: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    width = min(r + _OVERSAMPLING, *weight.shape)
    probe = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(_SEED))
    basis = torch.linalg.qr(weight @ probe.to(weight.device))[0]
    for _ in range(niter):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    return _fix_signs(basis @ u[:, :r], s[:r], vh[:r])


def _fix_signs(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of two vectors that are as good, the one whose largest element in U is positive."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return u * sign, s, vh * sign.t()
