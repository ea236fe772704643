"""``python -m bench.every_kernel [cuda|cpu]``: each kernel of each backend on tiny operands; for compute-sanitizer.

Results are held against float64. Sizes are such that every kernel and every configuration is reached: whole blocks and
rows that blocks straddle, nested scales and plain ones, each range of M.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import truth
from bench.shapes import RANK
from peftrt import BackendError, NF4Weight, backend, ops
from peftrt.formats.adamw_state import BITS
from peftrt.ops._weight import weight_args
from peftrt.optim.page_table import Kind, PageTable
from peftrt.reference.dropout import keep_mask

FEW = 64  # rows that adapters of many slots, and one without dropout, have kernels for
DEFAULT = "default"  # whatever the package chooses by itself
BACKENDS = {"cuda": ("native", "triton", DEFAULT), "cpu": ("native", DEFAULT)}


class Weight(NamedTuple):
    """A weight's size, block and kind of scales."""

    N: int
    K: int
    block: int
    nested: bool


ALIGNED = Weight(192, 512, 64, True)
PLAIN = Weight(96, 256, 64, False)
STRADDLING = Weight(67, 97, 64, True)
SMALL_BLOCKS = Weight(200, 160, 32, True)
# of an AdapterTable, beside what it computes with
TABLE = ("ranks", "A_pages", "B_pages", "scaling", "vector_starts")
# bf16 in every range of M, the other dtypes in those that have code of their own
CASES = (
    *((ALIGNED, M, torch.bfloat16) for M in (1, 8, 40, 130, 300, 2100)),
    *((PLAIN, M, torch.bfloat16) for M in (1, 130)),
    *((STRADDLING, M, torch.bfloat16) for M in (3, 130)),
    *((SMALL_BLOCKS, M, torch.bfloat16) for M in (8, 40, 130)),
    *((ALIGNED, M, torch.float16) for M in (8, 40, 130)),
    *((STRADDLING, M, torch.float32) for M in (3,)),
    *((ALIGNED, M, torch.float32) for M in (8, 130)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.every_kernel", description=__doc__)
    parser.add_argument("device", choices=BACKENDS, nargs="?", default="cuda", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="share the cases among so many processes, for the compiler")
    parser.add_argument("--job", type=int, metavar="I", help="run the share of process I alone")
    options = parser.parse_args(arguments)
    if options.job is not None or options.jobs == 1:
        return run(options.device, options.job or 0, options.jobs)
    command = [sys.executable, "-m", "bench.every_kernel", options.device, "--jobs", str(options.jobs), "--job"]
    processes = [subprocess.Popen([*command, str(job)]) for job in range(options.jobs)]
    failed = sum(process.wait() != 0 for process in processes)
    print(f"{options.jobs} processes, {failed} failed", flush=True)
    return 1 if failed else 0


def run(device: str, job: int = 0, jobs: int = 1) -> int:
    """Run every ``jobs``-th case on a device; returns 1 where a result is wrong or no kernel took a call."""
    runs = dict.fromkeys(BACKENDS[device], 0)
    wrong = 0
    for name, words, call in _calls(device, job, jobs):
        print(f"{name} {words}", flush=True)
        try:
            with backend(None if name == DEFAULT else name):
                error = call()
        except BackendError as refused:
            print("  refused: " + " / ".join(str(refused).splitlines()[1:]), flush=True)
            continue
        runs[name] += 1
        if error:
            wrong += 1
            print(f"  wrong: {error}", flush=True)
    print(", ".join(f"{name}: {count} calls" for name, count in runs.items()) + f"; {wrong} wrong", flush=True)
    return 1 if wrong or not any(runs.values()) else 0


def _calls(device: str, job: int, jobs: int) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """(backend, what, call); a call returns what is wrong with its result. All backends of a case are in one share."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for size, dtype in [*itertools.product((ALIGNED, PLAIN, STRADDLING), floats)][job::jobs]:
        for name in BACKENDS[device]:
            yield name, f"nf4_quantize {_name(size, dtype)}", lambda s=size, d=dtype: _quantize(s, d, device)
            yield name, f"nf4_dequantize {_name(size, dtype)}", lambda s=size, d=dtype: _dequantize(s, d, device)
    for bits, dtype in [*itertools.product(BITS, floats)][job::jobs]:
        for name in BACKENDS[device]:
            what = f"adamw_step and gradient_norm {bits} bits {dtype}".replace("torch.", "")
            yield name, what, lambda b=bits, d=dtype: _adamw(b, d, device)
    for size, M, dtype in CASES[job::jobs]:
        for name in BACKENDS[device]:
            case = size, M, dtype, device
            yield name, f"nf4_linear M={M} {_name(size, dtype)}", lambda c=case: _linear(*c)
            yield name, f"nf4_linear_dx M={M} {_name(size, dtype)}", lambda c=case: _linear_dx(*c)
            for base in ("nf4", "dense"):
                what = f"lora_linear M={M} {base} {_name(size, dtype)}"
                yield name, what, lambda c=case, base=base: _lora(base, *c)
            yield name, f"bottleneck M={M} {_name(size, dtype)}", lambda c=case: _bottleneck(*c)
            if M <= FEW:
                yield name, f"lora_linear alone M={M} {_name(size, dtype)}", lambda c=case: _lora_alone(*c)
                yield name, f"multi_lora_linear out M={M} {_name(size, dtype)}", lambda c=case: _multi_lora_out(*c)
            for base in ("none", "nf4", "dense"):
                what = f"multi_lora_linear M={M} {base} {_name(size, dtype)}"
                yield name, what, lambda c=case, base=base: _multi_lora(base, *c)


def _name(size: Weight, dtype: torch.dtype) -> str:
    return f"{size.N}x{size.K} {'nested' if size.nested else 'plain'} {dtype}".replace("torch.", "")


def _normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _weight(size: Weight) -> NF4Weight:
    """On the CPU, by the reference: what the other backends are held against."""
    with backend("reference"):
        return NF4Weight.quantize(_normal(size.N, size.K, dtype=torch.float32, seed=1), size.block, size.nested)


def _decoded(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    with backend("reference"):
        return weight.dequantize(dtype)


def _quantize(size: Weight, dtype: torch.dtype, device: str) -> str:
    dense = _normal(size.N, size.K, dtype=dtype, seed=1)
    got = NF4Weight.quantize(dense.to(device), size.block, size.nested)
    with backend("reference"):
        expected = NF4Weight.quantize(dense, size.block, size.nested)
    unequal = [name for name, tensor in expected.tensors().items() if not tensor.equal(getattr(got, name).cpu())]
    return f"other bytes: {', '.join(unequal)}" if unequal else ""


def _dequantize(size: Weight, dtype: torch.dtype, device: str) -> str:
    weight = _weight(size)
    moved, expected = weight.to(device), _decoded(weight, dtype)
    out = torch.full_like(expected, torch.nan, device=device)
    ops.nf4_dequantize(moved, out=out)
    return "" if expected.equal(out.cpu()) and expected.equal(moved.dequantize(dtype).cpu()) else "other bits"


def _linear(size: Weight, M: int, dtype: torch.dtype, device: str) -> str:
    weight = _weight(size)
    x, bias = _normal(M, size.K, dtype=dtype, seed=2), _normal(size.N, dtype=dtype, seed=3)
    expected = truth.linear(x, _decoded(weight, dtype)) + bias.double()
    return _far(ops.nf4_linear(x.to(device), weight.to(device), bias.to(device)), expected)


def _linear_dx(size: Weight, M: int, dtype: torch.dtype, device: str) -> str:
    weight = _weight(size)
    dy = _normal(M, size.N, dtype=dtype, seed=4)
    args: Any = weight_args("nf4_linear_dx", weight.to(device))
    got = torch.ops.peftrt.nf4_linear_dx(dy.to(device), *args)
    return _far(got, truth.linear_dx(dy, _decoded(weight, dtype)))


def _lora(base: str, size: Weight, M: int, dtype: torch.dtype, device: str) -> str:
    """y and the gradients of x, A and B, with dropout and bias; and the norms of the rows."""
    weight = _weight(size)
    wide = _decoded(weight, dtype)
    x, dy = _normal(M, size.K, dtype=dtype, seed=2), _normal(M, size.N, dtype=dtype, seed=4)
    A, B = _normal(RANK, size.K, dtype=torch.float32, seed=5), _normal(size.N, RANK, dtype=torch.float32, seed=6)
    bias, p = _normal(size.N, dtype=dtype, seed=3), 0.25
    seed = torch.tensor([7])
    leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (x, A, B)]
    operand = weight.to(device) if base == "nf4" else wide.to(device)
    y = ops.lora_linear(leaves[0], operand, *leaves[1:], 2.0, bias.to(device), dropout_p=p, seed=seed.to(device))
    grads = torch.autograd.grad(y, leaves, dy.to(device))
    keep = keep_mask(seed, M, size.K, p).double() / (1 - p)
    xa, g = (x.double() * keep) @ A.double().t(), 2.0 * dy.double() @ B.double()
    expected = (
        truth.linear(x, wide) + 2.0 * xa @ B.double().t() + bias.double(),
        truth.linear_dx(dy, wide) + g @ A.double() * keep,
        g.t() @ (x.double() * keep),
        2.0 * dy.double().t() @ xa,
        (_decoded(weight, torch.float32 if base == "nf4" else dtype).double() + 2.0 * B.double() @ A.double()).norm(
            dim=1
        ),
    )
    norm = ops.lora_weight_norm(operand, *leaves[1:], 2.0)
    words = [_far(actual.detach(), true) for actual, true in zip((y, *grads, norm), expected, strict=True)]
    names = ("y", "dx", "dA", "dB", "norm")
    return "; ".join(f"{name}: {word}" for name, word in zip(names, words, strict=True) if word)


def _bottleneck(size: Weight, M: int, dtype: torch.dtype, device: str) -> str:
    """y and the gradients of all, of an adapter in fp32 whose rank is the weight's N."""
    (R, K), wide = (size.N, size.K), torch.float32
    x, residual, dy = (_normal(M, K, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    D, U = K**-0.5 * _normal(R, K, dtype=wide, seed=5), R**-0.5 * _normal(K, R, dtype=wide, seed=6)
    tensors = (x, residual, D, _normal(R, dtype=wide, seed=7), U, _normal(K, dtype=wide, seed=8))
    leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in tensors]
    y = ops.bottleneck(*leaves, 2.0, "gelu")
    grads = torch.autograd.grad(y, leaves, dy.to(device))
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    inner = torch.nn.functional.gelu(exact[0] @ exact[2].t() + exact[3])
    true = exact[1] + 2.0 * (inner @ exact[4].t() + exact[5])
    expected = (true.detach(), *torch.autograd.grad(true, exact, dy.double()))
    words = [_far(actual.detach(), want) for actual, want in zip((y, *grads), expected, strict=True)]
    names = ("y", "dx", "dresidual", "dD", "db_d", "dU", "db_u")
    return "; ".join(f"{name}: {word}" for name, word in zip(names, words, strict=True) if word)


def _lora_alone(size: Weight, M: int, dtype: torch.dtype, device: str) -> str:
    """y of a call without dropout, by factors of its rows and in two maps."""
    weight = _weight(size)
    x, bias = _normal(M, size.K, dtype=dtype, seed=2), _normal(size.N, dtype=dtype, seed=3)
    scale = _normal(size.N, dtype=torch.float32, seed=8)
    splits = (size.N // 3, size.N - size.N // 3)
    A, B = _normal(2 * RANK, size.K, dtype=dtype, seed=5), _normal(size.N, RANK, dtype=dtype, seed=6)
    on_device = [tensor.to(device) for tensor in (A, B)]
    y = ops.lora_linear(
        x.to(device),
        weight.to(device),
        *on_device,
        2.0,
        bias.to(device),
        row_scale=scale.to(device),
        splits=splits,
    )
    xa = x.double() @ A.double().t()
    parts = [xa[:, i * RANK : (i + 1) * RANK] @ b.double().t() for i, b in enumerate(B.split(splits))]
    z = truth.linear(x, _decoded(weight, dtype)) + 2.0 * torch.cat(parts, 1)
    return _far(y, z * scale.double() + bias.double())


def _multi_lora_out(size: Weight, M: int, dtype: torch.dtype, device: str) -> str:
    """Ranks mixed, one slot of two maps with all factors, rows without an adapter; into rows that lie apart, too."""
    weight, K, N = _weight(size), size.K, size.N
    splits = (N // 3, N - N // 3)
    x, bias = _normal(M, K, dtype=dtype, seed=2), _normal(N, dtype=dtype, seed=3)

    def pair(rank: int, n: int, seed: int) -> tuple[Tensor, Tensor, float]:
        return _normal(rank, K, dtype=dtype, seed=seed), _normal(n, rank, dtype=dtype, seed=seed + 1), 0.5

    vectors = [_normal(length, dtype=torch.float32, seed=20 + i) for i, length in enumerate((K, N, N))]
    slots = [
        ops.SlotAdapter((pair(RANK, splits[0], 10), None)),
        ops.SlotAdapter((pair(3, splits[0], 12), pair(40, splits[1], 14)), *vectors),
    ]
    ids = torch.arange(M, dtype=torch.int32) % 3 - 1
    with backend("reference"):
        expected = ops.multi_lora_linear(
            x.double(),
            _decoded(weight, dtype).double(),
            _table(slots, splits, torch.float64, "cpu"),
            ids,
            bias.double(),
        )
    args = (x.to(device), weight.to(device), _table(slots, splits, dtype, device), ids.to(device), bias.to(device))
    apart = torch.empty(M, N + 8, dtype=dtype, device=device)[:, :N]
    y = ops.multi_lora_linear(*args)
    if not y.equal(ops.multi_lora_linear(*args, out=apart)):
        return "other bits in rows that lie apart"
    # x with factors is rounded: what that may change is a unit of x for each product
    return _far(y, expected)


def _table(slots: Sequence[Any], splits: Sequence[int], dtype: torch.dtype, device: str) -> Any:
    table = ops.AdapterTable.stack(slots, splits=splits)
    tensors = {
        name: None if t is None else t.to(device) for name, t in vars(table).items() if name not in ("splits", "k")
    }
    return dataclasses.replace(table, **(tensors | {"values": tensors["values"].to(dtype)}))


def _multi_lora(base: str, size: Weight, M: int, dtype: torch.dtype, device: str) -> str:
    """y and the gradients of x and values, with factors and biases: two maps, slots of mixed ranks, and one empty."""
    weight, splits = _weight(size), (size.N // 3, size.N - size.N // 3)
    values = torch.float32 if size.nested else dtype
    slots: list[ops.SlotAdapter | None] = [None]
    for e, ranks in enumerate(((RANK, 3), (0, 40), (1, 9))):
        pairs: list[Any] = []
        for p, (rank, n) in enumerate(zip(ranks, splits, strict=True)):
            A = _normal(rank, size.K, dtype=values, seed=10 * e + p) * size.K**-0.5
            pairs.append((A, _normal(n, rank, dtype=values, seed=10 * e + p + 5), 0.5 + e) if rank else None)
        c, b = (_normal(size.N, dtype=torch.float32, seed=30 + which) for which in range(2))
        slots.append(ops.SlotAdapter(pairs, None, *((c, b) if e == 2 else (None, None))))
    table = ops.AdapterTable.stack(slots, splits=splits, k=size.K)
    slot_ids = torch.randint(-1, len(slots), (M,), generator=torch.Generator().manual_seed(8), dtype=torch.int32)
    x, dy = _normal(M, size.K, dtype=dtype, seed=2), _normal(M, size.N, dtype=dtype, seed=4)
    bias, wide = _normal(size.N, dtype=dtype, seed=3), _decoded(weight, dtype)
    operand = {"none": None, "nf4": weight.to(device), "dense": wide.to(device)}[base]

    def run(W: Any, x: Tensor, values: Tensor, vectors: Tensor, dy: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.requires_grad_() for tensor in (x, values)]
        moved = {name: getattr(table, name).to(x.device) for name in TABLE}
        own = dataclasses.replace(table, values=leaves[1], vectors=vectors, **moved)
        y = ops.multi_lora_linear(leaves[0], W, own, slot_ids.to(x.device), bias)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    assert table.vectors is not None
    tensors = (x, table.values, table.vectors, dy, bias)
    got = run(operand, *(tensor.to(device, copy=True) for tensor in tensors))
    with backend("reference"):
        expected = run(None if base == "none" else wide.double(), *(tensor.double() for tensor in tensors))
    # dZ is rounded to x's dtype
    words = [_far(actual, true, truth.TOLERANCES[dtype]) for actual, true in zip(got, expected, strict=True)]
    return "; ".join(f"{name}: {word}" for name, word in zip(("y", "dx", "dvalues"), words, strict=True) if word)


def _adamw(bits: int, dtype: torch.dtype, device: str) -> str:
    """Two steps with clipped gradients; tensors whole and ragged, in two pages, aligned or not."""
    for aligned in (True, False):
        got = _steps(bits, dtype, device, aligned)
        with backend("reference"):
            expected = _steps(bits, dtype, "cpu", aligned)
        if not all(a.cpu().equal(b) for a, b in zip(got, expected, strict=True)):
            return "other bits"
    return ""


def _steps(bits: int, dtype: torch.dtype, device: str, aligned: bool) -> tuple[Tensor, ...]:
    """Parameters, state, norm and coefficient."""
    sizes, page_bytes = (9000, 300), 16 * 1040
    table = PageTable(sizes, [Kind(bits, dtype)] * len(sizes), page_bytes)
    memory = [_normal(2, 9008, dtype=dtype, seed=i).to(device) for i in range(len(sizes))]
    params, grads = ([m[i, not aligned :][:n] for m, n in zip(memory, sizes, strict=True)] for i in range(2))
    code = ops.DTYPE_CODES[dtype]
    rows = [(p.data_ptr(), g.data_ptr(), code) for p, g in zip(params, grads, strict=True)]
    gradients = ops.Gradients(params, grads, torch.tensor(rows, device=device), aligned)
    state = torch.zeros(table.nbytes, dtype=torch.uint8, device=device)
    pages = range(len(table.pages))
    chunks = [row for page in pages for row in table.chunks(page, page * page_bytes, ops.CHUNK)]
    parts = [(i, o, min(ops.CHUNK, n - o)) for i, n in enumerate(sizes) for o in range(0, n, ops.CHUNK)]
    partials, out = torch.empty(len(parts), dtype=torch.float64, device=device), torch.empty(2, device=device)
    hyper = torch.tensor([[0.1, 0.001, 0.01, 30.0, 1e-8, 1e-4]] * len(sizes), device=device)
    for _ in range(2):
        ops.gradient_norm(gradients, torch.tensor(parts, device=device), partials, 1.0, out)
        table_of_chunks = torch.tensor(chunks, device=device)
        ops.adamw_step(state, table_of_chunks, gradients, hyper, out[1], bits, page_bytes, dtype)
    return *params, state, out


def _far(actual: Tensor, expected: Tensor, most: float = 0.0) -> str:
    error, allowed = truth.relative_error(actual.cpu(), expected), max(truth.TOLERANCES[actual.dtype], most)
    return "" if error <= allowed else f"relative error {error:.3g}, allowed {allowed:.3g}"


if __name__ == "__main__":
    sys.exit(main())
