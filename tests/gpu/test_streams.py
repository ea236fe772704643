"""Graphs, streams and the host: captured calls replay with the same bits, streams do not meet, nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import NF4Weight, QLoRALinear, ops
from tests.cases import randn
from tests.gpu.places import NATIVE_ROWS, Place, backends, dx, on_gpu, random_weight
from tests.tolerances import assert_same_bits

N, K = 4096, 2048
ROWS = (1, 16, 64, 130, 600, 2048)  # one at least on each path
BACKENDS = pytest.mark.parametrize("backend", backends(None, "native", "triton"))

Call = Callable[[Tensor], Tensor]


def _calls(backend: str | None, weight: NF4Weight) -> Iterator[tuple[str, Call, tuple[int, ...]]]:
    """(name, call, shape of its argument) of everything that a backend has to take."""
    place = Place("cuda", backend)

    def by(call: Call) -> Call:
        def run(x: Tensor) -> Tensor:
            with peftrt.backend(backend):
                return call(x)

        return run

    forward, gradients = _lora(weight)
    for m in ROWS:
        if place.must("nf4_linear", torch.bfloat16, m):
            yield f"nf4_linear, M = {m}", by(lambda x: ops.nf4_linear(x, weight)), (m, K)
        if place.must("nf4_linear_dx", torch.bfloat16, m):
            yield f"nf4_linear_dx, M = {m}", by(lambda x: dx(x, weight)), (m, N)
        if backend != "native":  # there is no native dropout on CUDA
            yield f"lora_linear, M = {m}", by(forward), (m, K)
            yield f"gradients of lora_linear, M = {m}", by(gradients), (m, K)
    yield "nf4_dequantize", by(lambda x: ops.nf4_dequantize(weight, x.dtype) + x[0, 0]), (1, 1)
    if backend != "triton":
        yield "nf4_quantize", by(lambda x: ops.nf4_quantize(x).codes), (64, K)


def _lora(weight: NF4Weight) -> tuple[Call, Call]:
    """lora_linear with dropout, and all of its gradients; what they need is on the device before they are called."""
    A, B = (randn(*shape, seed=2, device="cuda").requires_grad_() for shape in ((16, K), (N, 16)))
    seed, dy = torch.full((1,), 7, device="cuda"), _values((max(ROWS), N), 3)

    def forward(x: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, A, B, 2.0, dropout_p=0.1, seed=seed)

    def gradients(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        grads = torch.autograd.grad(forward(leaf), (leaf, A, B), dy[: x.shape[0]])
        return torch.cat([grad.float().view(-1) for grad in grads])

    return torch.no_grad()(forward), gradients


def _values(shape: tuple[int, ...], seed: int) -> Tensor:
    return randn(*shape, seed=seed, dtype=torch.bfloat16, device="cuda")


@contextmanager
def _side_stream() -> Iterator[torch.cuda.Stream]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def _captured(call: Call, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    with _side_stream():
        call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    return graph, y


@on_gpu
@BACKENDS
def test_a_captured_call_replays_with_the_same_bits(backend: str | None) -> None:
    weight = random_weight(N, K, "cuda")
    for name, call, shape in _calls(backend, weight):
        x = _values(shape, 0)
        graph, y = _captured(call, x)
        for seed in (1, 2):
            x.copy_(_values(shape, seed))
            expected = call(x)
            y.zero_()
            graph.replay()
            try:
                assert_same_bits(y, expected)
            except AssertionError as wrong:
                raise AssertionError(f"{name}: {wrong}") from None


@on_gpu
def test_a_graph_outlives_the_scratch_that_calls_leave_behind() -> None:
    """What is given up between capture and replay is not the graph's."""
    weight = random_weight(N, K, "cuda")
    x = _values((2048, K), 0)
    expected = ops.nf4_linear(x, weight)
    graph, y = _captured(lambda x: ops.nf4_linear(x, weight), x)
    peftrt.release_scratch()
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(16)]
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(y, expected)
    assert all(bool(block.isnan().all()) for block in junk), "the replay wrote where it should not"


@on_gpu
@BACKENDS
def test_two_streams_at_once_do_not_meet(backend: str | None) -> None:
    weight = random_weight(N, K, "cuda")
    for name, call, shape in _calls(backend, weight):
        inputs = [_values(shape, seed) for seed in range(8)]
        expected = [call(x) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        results: list[Tensor] = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                results.append(call(x))
        torch.cuda.synchronize()
        for y, wanted in zip(results, expected, strict=True):
            assert torch.equal(y, wanted), name


@on_gpu
@BACKENDS
def test_a_call_waits_for_what_its_stream_does_before(backend: str | None) -> None:
    """Launched on another stream than the current one, it would read x before it is written."""
    weight = random_weight(N, K, "cuda")
    for name, call, shape in _calls(backend, weight):
        source, x = _values(shape, 1), torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        expected = call(source)
        busy = torch.randn(4096, 4096, device="cuda")
        torch.cuda.synchronize()
        with _side_stream():
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
            x.copy_(source)
            y = call(x)
        torch.cuda.synchronize()
        assert torch.equal(y, expected), name


@on_gpu
@BACKENDS
def test_no_call_waits_for_the_device(backend: str | None) -> None:
    weight = random_weight(N, K, "cuda")
    prepared = [(name, call, _values(shape, 0)) for name, call, shape in _calls(backend, weight)]
    for _, call, x in prepared:
        call(x)  # compiles and loads, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, call, x in prepared:
            try:
                call(x)
            except RuntimeError as waited:
                raise AssertionError(f"{name} waits for the device: {waited}") from waited
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_training_step_of_a_layer_does_not_wait_and_can_be_captured() -> None:
    layer = QLoRALinear(K, N, r=16, lora_alpha=32, bias=False, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_B.copy_(randn(N, 16, seed=2, device="cuda"))
    dy = _values((512, N), 3)
    with _side_stream() as stream:
        x = _values((512, K), 0).requires_grad_()
        wanted = (x, layer.lora_A, layer.lora_B)
        for _ in range(2):
            torch.autograd.grad(layer(x), wanted, dy)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = torch.autograd.grad(layer(x), wanted, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            grads = torch.autograd.grad(layer(x), wanted, dy)
        graph.replay()
    torch.cuda.synchronize()
    for grad, value in zip(grads, expected, strict=True):
        assert torch.equal(grad, value)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@BACKENDS
def test_a_call_runs_on_its_tensors_device(backend: str | None) -> None:
    here, there = random_weight(N, K, "cuda:0"), random_weight(N, K, "cuda:1")
    for (name, call, shape), (_, other, _) in zip(_calls(backend, here), _calls(backend, there), strict=True):
        x = _values(shape, 0)
        y = other(x.to("cuda:1"))
        assert y.device == torch.device("cuda:1")
        assert torch.equal(y.to("cuda:0"), call(x)), name


def test_the_rows_reach_every_path() -> None:
    assert min(ROWS) == 1
    assert NATIVE_ROWS in ROWS
    assert max(ROWS) >= 2048
