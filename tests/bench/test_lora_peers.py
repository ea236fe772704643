"""The kernels of other servers, called as their sources have them: stand-ins here, which check what they are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import batches, bench_multi_lora_linear, peers, truth
from bench.batches import Mix, Stack
from bench.peers import UnavailableError, sglang_lora, vllm_lora
from bench.shapes import Site
from tests.tolerances import assert_close

SITE, M = Site(48, 64), 40
MIXES = ("distinct-r16-e8", "zipf-rmix-e64", "identical-bare-r8-e8")


class Meta:
    """vLLM's metadata of a forward; the stand-ins use the mapping alone."""

    @classmethod
    def make(cls, max_loras: int, max_num_tokens: int, device: torch.device) -> Meta:
        meta = cls()
        meta.mapping = torch.empty(max_num_tokens, dtype=torch.int32, device=device)
        return meta

    def prepare_tensors(self, token_lora_mapping: Tensor) -> None:
        self.mapping[: len(token_lora_mapping)] = token_lora_mapping

    def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[Any, ...]:
        return (self.mapping[:token_nums], *[None] * 6)


def _shrink(x: Tensor, A: list[Tensor], out: Tensor, mapping: Tensor, *rest: Any) -> None:
    *meta, scaling = rest
    assert (len(meta), out.dtype, tuple(out.shape)) == (6, torch.float32, (1, M, A[0].shape[1]))
    out.zero_()
    for i, slot in enumerate(mapping.tolist()):
        if slot >= 0:
            out[0, i] = scaling * (A[0][slot] @ x[i])


def _expand(
    inner: Tensor, B: list[Tensor], out: Tensor, mapping: Tensor, *meta: Any, offset_start: int, add_inputs: bool
) -> None:
    assert len(meta) == 6
    assert offset_start == 0
    for i, slot in enumerate(mapping.tolist()):
        if slot >= 0:
            out[i] = B[0][slot] @ inner[0, i] + (out[i] if add_inputs else 0)


def _chunked_shrink(x: Tensor, weights: Tensor, info: Any, num_slices: int) -> Tensor:
    assert num_slices == 1
    inner = torch.full((x.shape[0], weights.shape[1]), torch.nan)
    for rows, slot, rank in _segments(info):
        inner[rows, :rank] = x[rows] @ weights[slot, :rank].t()
    return inner


def _chunked_expand(
    x: Tensor, weights: Tensor, info: Any, offsets: Tensor, largest: int, base_output: Tensor
) -> Tensor:
    assert offsets.tolist() == [0, largest] == [0, weights.shape[1]]
    for rows, slot, rank in _segments(info):
        base_output[rows] += info.scalings[slot] * (x[rows, :rank] @ weights[slot, :, :rank].t())
    return base_output


def _segments(info: Any) -> Any:
    assert info.num_segments == len(info.weight_indices) == len(info.seg_indptr) - 1
    for i, slot in enumerate(info.weight_indices.tolist()):
        begin, end = info.seg_indptr[i : i + 2].tolist()
        assert 0 < end - begin <= info.max_len
        rank = int(info.lora_ranks[slot])
        if rank:
            yield info.permutation[begin:end].long(), slot, rank


class Runner:
    """SGLang's dense runner."""

    def __init__(self, workspace: Any, *, max_loras: int, device: torch.device) -> None:
        self.slots = max_loras

    def begin_batch(self, **given: Any) -> None:
        assert set(given) == {"token_slots", "lora_ranks", "scalings", "num_tokens", "phase", "graph_mode"}
        self.batch = SimpleNamespace(**given)
        assert given["num_tokens"] == len(given["token_slots"]) == M

    def plan_for(self, kind: str, max_rank: int, in_features: int, out_features: int, *, num_tokens: int) -> Any:
        return kind, max_rank, in_features, out_features

    def run_a(self, x: Tensor, a: Tensor, *, stack: int, plan: Any) -> Tensor:
        assert plan == ("linear", a.shape[1], a.shape[2], SITE.N)
        assert (stack, a.shape[0]) == (1, self.slots)
        return torch.stack([a[slot] @ x[i] for i, slot in enumerate(self.batch.token_slots.tolist())])

    def run_b(self, inner: Tensor, b: Tensor, out: Tensor, *, offsets: Any, plan: Any, add_inplace: bool) -> Tensor:
        assert offsets == (0, b.shape[1])
        for i, slot in enumerate(self.batch.token_slots.tolist()):
            if slot >= 0:
                added = self.batch.scalings[slot] * (b[slot] @ inner[i])
                out[i] = added + (out[i] if add_inplace else 0)
        return out


MODULES = {
    "vllm.lora.ops.triton_ops": SimpleNamespace(LoRAKernelMeta=Meta, lora_shrink=_shrink, lora_expand=_expand),
    "vllm.lora.ops.triton_ops.utils": SimpleNamespace(_LORA_A_PTR_DICT={1: 2}),
    "sglang.srt.lora.dense.plan": SimpleNamespace(DenseLoraKind=SimpleNamespace(LINEAR="linear")),
    "sglang.srt.lora.dense.runner": SimpleNamespace(DenseLoraRunner=Runner),
    "sglang.srt.lora.workspace": SimpleNamespace(LoraWorkspace=lambda: None),
    "sglang.srt.lora.utils": SimpleNamespace(
        Phase=SimpleNamespace(PREFILL="prefill", DECODE="decode"), LoRABatchInfo=SimpleNamespace
    ),
    "sglang.kernels.ops.gemm.chunked_sgmv_shrink": SimpleNamespace(chunked_sgmv_lora_shrink_forward=_chunked_shrink),
    "sglang.srt.lora.triton_ops": SimpleNamespace(chunked_sgmv_lora_expand_forward=_chunked_expand),
}


def _need(module: str) -> Any:
    if module not in MODULES:
        raise UnavailableError(module)
    return MODULES[module]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (vllm_lora, sglang_lora):
        monkeypatch.setattr(library, "need", _need)
        monkeypatch.setattr(library, "need_gpu", lambda device: None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("base", ["none", "dense"])
@pytest.mark.parametrize("name", MIXES)
def test_they_are_given_what_their_sources_ask_for(name: str, base: str) -> None:
    cell = bench_multi_lora_linear._cell("cpu", SITE, base, name, M)
    batch = bench_multi_lora_linear.Batch(cell, "cpu", rotation_bytes=20_000_000)
    for build in (batch.vllm, batch.sglang_v2, batch.sglang_chunked):
        contender = build()
        assert len(contender.calls) == 64
        for call in (0, 1, 63):
            ids = batch.rotation.ids(batch.ids, call)
            expected = truth.multi_lora(batch.x, batch.dense, batch.adapters, ids).float()
            # twice: nothing may be left behind that is added to the next time
            for _ in range(2):
                assert_close(contender.calls[call](), expected, roundings=4)
    assert not MODULES["vllm.lora.ops.triton_ops.utils"]._LORA_A_PTR_DICT


def test_without_the_libraries_or_a_gpu_there_is_a_reason() -> None:
    adapters = batches.adapters(SITE, tuple(Mix.of("distinct-r8-e8").ranks), torch.float32, "cpu")
    stack = Stack.of(adapters)
    why = "cannot be imported: |need a GPU"
    with pytest.raises(UnavailableError, match=why):
        vllm_lora.adding(stack, torch.zeros(1, dtype=torch.int32), True)
    with pytest.raises(UnavailableError, match=why):
        sglang_lora.v2(stack, [0], True)
    with pytest.raises(UnavailableError, match=why):
        sglang_lora.chunked(stack, [0])
    with pytest.raises(UnavailableError, match="need a GPU, and these operands are on a cpu"):
        peers.need_gpu(torch.device("cpu"))
