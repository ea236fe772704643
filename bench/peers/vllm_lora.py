"""vLLM: its Triton operations ``lora_shrink`` and ``lora_expand``, with the metadata that a forward shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.batches import Stack
from bench.peers import need, need_gpu

NAME = "vllm"
NAME_NF4 = "bitsandbytes+vllm"
OPS = "vllm.lora.ops.triton_ops"


def adding(stack: Stack, slot_ids: Tensor, keep: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A call that adds what the adapters give for ``x`` to ``y``; without ``keep``, over what rows with one held.

    The metadata are made here: a server makes them once for all layers of a forward. ``stack`` is folded, as there.
    """
    ops = need(OPS)
    need_gpu(slot_ids.device)
    _forget()
    M, R = slot_ids.shape[0], stack.A.shape[1]
    A, B = stack.A[: stack.slots], stack.B[: stack.slots]
    meta = ops.LoRAKernelMeta.make(stack.slots, M, device=slot_ids.device)
    meta.prepare_tensors(slot_ids)
    # the grid by the adapters in use, which is the faster of its two ways
    arguments = meta.meta_args(M, True)
    inner = torch.empty(1, M, R, dtype=torch.float32, device=slot_ids.device)

    def call(x: Tensor, y: Tensor) -> Tensor:
        ops.lora_shrink(x, [A], inner, *arguments, 1.0)
        ops.lora_expand(inner, [B], y, *arguments, offset_start=0, add_inputs=keep)
        return y

    return call


def _forget() -> None:
    """vLLM keeps every weight that its operations have seen; those of former cells would fill the memory."""
    utils = need(f"{OPS}.utils")
    for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(utils, name, {}).clear()
