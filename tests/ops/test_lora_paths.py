"""Which calls with one adapter, or many, the CUDA library takes: on tensors that need no device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from peftrt.ops import _device_flag, _ia3_linear, _lora_cuda, _multi_lora_cuda, batch_invariant
from tests.ops.test_paths import FAKE, SOURCES, WEIGHT, arguments, as_on_a_hopper, chosen, on_cuda


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return as_on_a_hopper(monkeypatch)


def lora_arguments(m: int, dropout_p: float = 0.0, rank: int = 4, splits: tuple[int, ...] = ()) -> tuple[Any, ...]:
    x, *weight, _ = arguments(m)
    A = on_cuda(rank * max(len(splits), 1), WEIGHT.k, torch.float32)
    B = on_cuda(WEIGHT.n, rank, torch.float32)
    return (x, *weight, A, B, 2.0, None, dropout_p, None, None, list(splits))


def test_lora_linear_of_few_rows_is_the_librarys(hopper: pytest.MonkeyPatch) -> None:
    assert [chosen("lora_linear", lora_arguments(m)) for m in (1, 64, 65)] == ["native", "native", "triton"]
    assert chosen("lora_linear", lora_arguments(8, splits=(256, 256))) == "native"
    for args, reason in (
        (lora_arguments(8, dropout_p=0.5), "drops nothing"),
        (lora_arguments(8, rank=257), "at most 256 ranks"),
        (lora_arguments(8, splits=(512, 0)), "8 maps"),
        (lora_arguments(65), "takes 64 rows"),
    ):
        assert reason in str(_lora_cuda.unsupported(*args))
        assert not _lora_cuda.chosen(*args)


def test_ia3_linear_goes_as_a_batch_of_one_slot(hopper: pytest.MonkeyPatch) -> None:
    """And the question leaves nothing behind: what a call keeps is of its device, not of a tracer's."""
    _ia3_linear._no_pairs.cache_clear()
    with FAKE:
        scale = torch.empty(WEIGHT.n, device="cuda")
    calls = {m: (*arguments(m)[:-1], None, scale, None) for m in (1, 64, 65)}
    assert [chosen("ia3_linear", calls[m]) for m in (1, 64, 65)] == ["native", "native", "triton"]
    dense = (*calls[1][:1], on_cuda(WEIGHT.n, WEIGHT.k), None, None, None, *WEIGHT[4:])
    assert chosen("ia3_linear", (*dense, None, scale, None)) == "triton"
    with batch_invariant():
        assert chosen("ia3_linear", calls[1]) == "triton"
    assert _ia3_linear._no_pairs.cache_info().currsize == 0


def table_arguments(m: int, pages: int = 2, parts: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    x, *weight, _ = arguments(m)
    with FAKE:
        values, ranks = torch.empty(1, dtype=dtype, device="cuda"), torch.empty(3, parts, device="cuda").int()
        table = torch.empty(3, parts, pages, device="cuda").long()
        ids = torch.empty(m, device="cuda").int()
        return (x, *weight, values, ranks, table, table, ranks.float(), None, None, [512 // parts] * parts, ids, None)


def test_many_adapters_of_few_rows_are_the_librarys(hopper: pytest.MonkeyPatch) -> None:
    assert chosen("multi_lora_linear", table_arguments(64)) == "native"
    for args, reason in (
        (table_arguments(65), "takes 64 rows"),
        (table_arguments(8, pages=33), "256 ranks"),
        (table_arguments(8, parts=16), "8 maps"),
        (table_arguments(8, dtype=torch.float64), "adapters of fp32"),
        ((on_cuda(8, 256), None, None, None, None, 512, 256, 0, *table_arguments(8)[8:]), "NF4 base"),
    ):
        assert reason in str(_multi_lora_cuda.unsupported(*args))


def test_a_wrong_slot_id_is_told_by_the_next_call(hopper: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any) -> None:
            calls.append(args)

    flag, args = torch.zeros(1, dtype=torch.int32), table_arguments(4)
    hopper.setattr(_device_flag, "_flags", {args[0].device: flag})
    hopper.setattr(torch.ops, "peftrt_cuda", Recorder())
    _multi_lora_cuda.run(*args)
    assert len(calls[-1]) == len(args) + 1
    assert calls[-1][-1] is flag
    _multi_lora_cuda.run_out(600, *args, torch.empty(2, 2, 600)[..., :512])
    *_, passed, rows = calls[-1]
    assert passed is flag
    assert (tuple(rows.shape), rows.stride()) == ((4, 512), (600, 1))
    flag.fill_(1)
    with pytest.raises(ValueError, match=r"multi_lora_linear: slot_ids .* an earlier call"):
        _multi_lora_cuda.run(*args)
    assert len(calls) == 2


def test_the_table_and_its_kernels_agree_on_sizes() -> None:
    if not SOURCES.is_dir():
        pytest.skip("this checkout has no CUDA kernels")
    parts = re.findall(r"kMaxParts\s*=\s*(\d+)", (SOURCES / "kernels.h").read_text())
    pages = re.findall(r"kMaxPages\s*=\s*(\d+)", (SOURCES / "multi_lora_shrink.cu").read_text())
    assert (parts, pages) == ([str(_multi_lora_cuda.PARTS)], [str(_multi_lora_cuda.PAGES)])
