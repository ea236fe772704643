"""SGLang: its two kinds of LoRA kernels, the dense ``triton_v2`` runner and chunked segments (csgmv).

What a server makes once for all layers of a forward, the routes of rows and the segments, is made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from bench.batches import Stack
from bench.peers import UnavailableError, need, need_gpu

NAME_V2 = "sglang triton_v2"
NAME_CHUNKED = "sglang csgmv"

CHUNK = 16  # rows a segment: the server's default
PREFILL_ROWS = 512  # from here on a batch is taken for one of prompts

Adding = Callable[[Tensor, Tensor], Tensor]


def v2(stack: Stack, slot_ids: Sequence[int], keep: bool) -> Adding:
    """A call that adds what the adapters give for ``x`` to ``y``; without ``keep``, over what rows with one held."""
    dense = "sglang.srt.lora.dense"
    plans, runners = need(f"{dense}.plan"), need(f"{dense}.runner")
    workspace, utils = need("sglang.srt.lora.workspace"), need("sglang.srt.lora.utils")
    A, B = stack.A[: stack.slots], stack.B[: stack.slots]
    need_gpu(A.device)
    M, (N, R), K = len(slot_ids), B.shape[1:], A.shape[2]
    runner = runners.DenseLoraRunner(workspace.LoraWorkspace(), max_loras=stack.slots, device=A.device)
    runner.begin_batch(
        token_slots=torch.tensor(slot_ids, dtype=torch.int32, device=A.device),
        lora_ranks=torch.tensor(stack.ranks[: stack.slots], dtype=torch.int32, device=A.device),
        scalings=torch.tensor(stack.scaling[: stack.slots], dtype=torch.float32, device=A.device),
        num_tokens=M,
        phase=utils.Phase.PREFILL if M >= PREFILL_ROWS else utils.Phase.DECODE,
        graph_mode=False,
    )
    plan = runner.plan_for(plans.DenseLoraKind.LINEAR, R, K, N, num_tokens=M)

    def call(x: Tensor, y: Tensor) -> Tensor:
        inner = runner.run_a(x, A, stack=1, plan=plan)
        return runner.run_b(inner, B, y, offsets=(0, N), plan=plan, add_inplace=keep)

    return call


def chunked(stack: Stack, slot_ids: Sequence[int]) -> Adding:
    """A call that adds what the adapters give for ``x`` to ``y``: this kernel always adds."""
    shrink, expand = _chunked("shrink"), _chunked("expand")
    device = stack.A.device
    need_gpu(device)
    info = _segments(stack, slot_ids, need("sglang.srt.lora.utils").LoRABatchInfo)
    N = stack.B.shape[1]
    offsets = torch.tensor([0, N], dtype=torch.int32, device=device)

    def call(x: Tensor, y: Tensor) -> Tensor:
        inner = shrink(x, stack.A, info, 1)
        return expand(inner, stack.B, info, offsets, N, y)

    return call


def _chunked(which: str) -> Callable[..., Tensor]:
    """A kernel's function; releases have it in one of two places."""
    name = f"chunked_sgmv_lora_{which}_forward"
    try:
        module = need(f"sglang.kernels.ops.gemm.chunked_sgmv_{which}")
    except UnavailableError:
        module = need("sglang.srt.lora.triton_ops")
    return getattr(module, name)


def _segments(stack: Stack, slot_ids: Sequence[int], info: Callable[..., Any]) -> Any:
    """Rows by slot, in chunks; rows without an adapter are those of the slot behind the last, of rank 0."""
    slots = [slot if slot >= 0 else stack.slots for slot in slot_ids]
    order = sorted(range(len(slots)), key=slots.__getitem__)
    sizes = [(slot, len(list(rows))) for slot, rows in groupby(order, key=slots.__getitem__)]
    chunks = [(slot, min(CHUNK, size - begin)) for slot, size in sizes for begin in range(0, size, CHUNK)]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=stack.A.device)

    return info(
        use_cuda_graph=False,
        bs=len(slots),
        num_segments=len(chunks),
        max_len=CHUNK,
        seg_lens=None,
        seg_indptr=ints([0, *accumulate(size for _, size in chunks)]),
        weight_indices=ints([slot for slot, _ in chunks]),
        lora_ranks=ints(stack.ranks),
        scalings=torch.tensor(stack.scaling, dtype=torch.float32, device=stack.A.device),
        permutation=ints(order),
    )
