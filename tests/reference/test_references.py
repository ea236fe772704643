"""The references against loops over single elements: nothing but Python's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from peftrt.formats.nf4 import DYNAMIC_CODEBOOK, NF4_CODEBOOK, NF4Weight, bytes_float, float_bytes, midpoints
from peftrt.ops._weight import weight_args
from peftrt.reference import (
    bottleneck,
    ia3_linear,
    lora_linear,
    lora_weight_norm,
    multi_lora_linear,
    nf4,
    nf4_linear,
    row_scale_gradient,
)
from tests.cases import FLOATS, randn
from tests.cases import nf4 as make
from tests.tolerances import assert_close, assert_same_bits

SCALARS: dict[str, Callable[[float], float]] = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "gelu_new": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "silu": lambda v: v / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
}


def f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


def decode(weight: NF4Weight) -> list[float]:
    """Element by element: nibble, scale with its two roundings, product."""
    codes, absmax = weight.codes.flatten().tolist(), weight.absmax.flatten()
    values = []
    for i in range(weight.numel):
        nibble = codes[i // 2] >> 4 if i % 2 == 0 else codes[i // 2] & 15
        block = i // weight.block_size
        if weight.nested_absmax is None:
            scale = bytes_float(absmax)[block].item()
        else:
            assert weight.nested_offset is not None
            step = bytes_float(weight.nested_absmax)[block // 256].item()
            product = f32(DYNAMIC_CODEBOOK[int(absmax[block])].item() * step)
            scale = f32(product + bytes_float(weight.nested_offset).item())
        values.append(f32(NF4_CODEBOOK[nibble].item() * scale))
    return values


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("n", "k"), [(4, 64), (7, 33), (1, 1), (3, 100)])
def test_dequantize(n: int, k: int, nested: bool) -> None:
    weight = make(n, k, block=32, nested=nested)
    expected = torch.tensor(decode(weight), dtype=torch.float64).view(n, k)
    args = (*weight_args("test", weight)[:4], (n, k), 32)
    for dtype in (*FLOATS, torch.float64):
        assert_same_bits(nf4.dequantize(*args, dtype), expected.to(dtype))


@pytest.mark.parametrize("activation", bottleneck.ACTIVATIONS)
def test_bottleneck(activation: str) -> None:
    m, k, r, s = 3, 5, 2, 0.75
    x, residual, dy, D, U = (randn(*t, seed=i) for i, t in enumerate(((m, k), (m, k), (m, k), (r, k), (k, r))))
    b_d, b_u = randn(r, seed=8), randn(k, seed=9)
    y, inner = bottleneck.forward(x, residual, D, b_d, U, b_u, s, activation)
    act = SCALARS[activation]
    v = [[sum(x[i, j].item() * D[q, j].item() for j in range(k)) + b_d[q].item() for q in range(r)] for i in range(m)]
    step = 1e-6
    slope = [[(act(e + step) - act(e - step)) / (2 * step) for e in row] for row in v]
    g = [
        [s * slope[i][q] * sum(dy[i, j].item() * U[j, q].item() for j in range(k)) for q in range(r)] for i in range(m)
    ]
    want_y = [
        [
            residual[i, j].item() + s * (sum(act(v[i][q]) * U[j, q].item() for q in range(r)) + b_u[j].item())
            for j in range(k)
        ]
        for i in range(m)
    ]
    want = (
        [[sum(g[i][q] * D[q, j].item() for q in range(r)) for j in range(k)] for i in range(m)],
        [[sum(g[i][q] * x[i, j].item() for i in range(m)) for j in range(k)] for q in range(r)],
        [sum(g[i][q] for i in range(m)) for q in range(r)],
        [[s * sum(dy[i, j].item() * act(v[i][q]) for i in range(m)) for q in range(r)] for j in range(k)],
        [s * sum(dy[i, j].item() for i in range(m)) for j in range(k)],
    )
    assert_close(inner, torch.tensor(v, dtype=torch.float64))
    assert_close(y, torch.tensor(want_y, dtype=torch.float64), roundings=2)
    got = bottleneck.backward(dy, x, inner, D, U, s, activation, True, True, True)
    for own, expected in zip(got, want, strict=True):
        assert_close(own, torch.tensor(expected, dtype=torch.float64), roundings=4)


def test_quantize_takes_the_nearest_level_and_the_lower_of_a_tie() -> None:
    ties = midpoints(NF4_CODEBOOK).tolist()
    values = [*ties, 1.0, -1.0, *NF4_CODEBOOK.tolist()]
    above = [torch.nextafter(torch.tensor(t), torch.tensor(2.0)).item() for t in ties]
    flat = torch.tensor([*values, *above])
    codes, absmax, *_ = nf4.quantize(flat, 64, False)
    levels = torch.stack([codes >> 4, codes & 15], 1).flatten()[: flat.numel()].tolist()
    assert bytes_float(absmax).item() == 1.0
    assert levels == [*range(15), 15, 0, *range(16), *range(1, 16)]


def test_quantised_error_is_at_most_half_a_gap() -> None:
    weight = randn(64, 64)
    packed = NF4Weight.quantize(weight, 64, double_quant=False)
    error = (packed.dequantize() - weight).abs()
    gap = (NF4_CODEBOOK[1:] - NF4_CODEBOOK[:-1]).max() / 2
    assert (error <= gap * weight.abs().amax(1, keepdim=True) * (1 + 1e-6)).all()


def test_padding_nibble_of_an_odd_count_is_the_level_of_zero() -> None:
    codes, *_ = nf4.quantize(torch.ones(3), 32, False)
    assert codes.tolist() == [0xFF, 0xF7]


def test_float_bytes_round_trip_of_any_alignment() -> None:
    values = randn(5)
    raw = float_bytes(values)
    room = torch.empty(23, dtype=torch.uint8)
    for start in range(4):
        room[start : start + 20] = raw
        assert_same_bits(bytes_float(room[start : start + 20]), values)
    assert_same_bits(bytes_float(torch.stack([raw, raw], 1)[:, 0]), values)


def test_nf4_linear_and_its_gradient_element_by_element() -> None:
    n, k, m = 3, 33, 2
    weight, x, dy, b = make(n, k), randn(m, k), randn(m, n), randn(n)
    W = torch.tensor(decode(weight), dtype=torch.float64).view(n, k).tolist()
    X, DY, b64 = x.double().tolist(), dy.double().tolist(), b.double().tolist()
    y = [[sum(X[i][c] * W[o][c] for c in range(k)) + b64[o] for o in range(n)] for i in range(m)]
    dx = [[sum(DY[i][o] * W[o][c] for o in range(n)) for c in range(k)] for i in range(m)]
    args = weight_args("test", weight)
    assert_close(nf4_linear.forward(x, *args, b), torch.tensor(y, dtype=torch.float64))
    assert_close(nf4_linear.grad_input(dy, *args), torch.tensor(dx, dtype=torch.float64))


def test_ia3_linear_element_by_element() -> None:
    n, k, m = 3, 5, 2
    weight, x, bias = randn(n, k), randn(m, k, seed=1), randn(n, seed=2)
    u, c = randn(k, seed=3), torch.tensor([0.5, 0.0, -2.0])
    W, X, U, C, b = (t.double().tolist() for t in (weight, x, u, c, bias))
    y = [[C[o] * sum(U[j] * X[i][j] * W[o][j] for j in range(k)) + b[o] for o in range(n)] for i in range(m)]
    args = weight_args("test", weight)
    assert_close(ia3_linear.forward(x, *args, u, c, bias), torch.tensor(y, dtype=torch.float64), roundings=2)
    plain = [[sum(X[i][j] * W[o][j] for j in range(k)) for o in range(n)] for i in range(m)]
    assert_close(ia3_linear.forward(x, *args, None, None, None), torch.tensor(plain, dtype=torch.float64))


def test_lora_linear_and_multi_lora_linear_element_by_element() -> None:
    n, k, m, r, s = 3, 5, 4, 2, 0.75
    weight, x, A, B = (randn(*shape, seed=i) for i, shape in enumerate(((n, k), (m, k), (r, k), (n, r))))
    W, X, a, b = (t.double().tolist() for t in (weight, x, A, B))
    plain = [[sum(X[i][c] * W[o][c] for c in range(k)) for o in range(n)] for i in range(m)]
    low = [[sum(X[i][c] * a[j][c] for c in range(k)) for j in range(r)] for i in range(m)]
    full = [[plain[i][o] + s * sum(low[i][j] * b[o][j] for j in range(r)) for o in range(n)] for i in range(m)]
    args = weight_args("test", weight)
    y, xa = lora_linear.forward(x, *args, A, B, s, None, 0.0, None, None, [])
    assert_close(y, torch.tensor(full, dtype=torch.float64))
    assert_close(xa, torch.tensor(low, dtype=torch.float64))
    c, bias = torch.tensor([0.5, 2.0, -1.0]), randn(n, seed=8)
    scaled, _ = lora_linear.forward(x, *args, A, B, s, bias, 0.0, None, c, [])
    want = [[c[o].item() * full[i][o] + bias[o].item() for o in range(n)] for i in range(m)]
    assert_close(scaled, torch.tensor(want, dtype=torch.float64))
    squares = [sum((W[o][i] + s * sum(b[o][j] * a[j][i] for j in range(r))) ** 2 for i in range(k)) for o in range(n)]
    assert_close(lora_weight_norm.forward(*args, A, B, s, []), torch.tensor(squares, dtype=torch.float64).sqrt())
    dc = [sum(X[i][o] * full[i][o] for i in range(m)) for o in range(n)]
    gradient = row_scale_gradient.forward(x[:, :n], scaled, bias, c)
    assert_close(gradient, torch.tensor(dc, dtype=torch.float64), roundings=4)

    ids = torch.tensor([0, -1, 0, -1], dtype=torch.int32)
    values, starts = torch.cat([A.flatten(), B.t().flatten()]), (torch.tensor([[[0]]]), torch.tensor([[[r * k]]]))
    table = (values, torch.tensor([[r]]), *starts, torch.tensor([[s]]), None, None, [n], ids)
    mixed = [full[i] if i % 2 == 0 else plain[i] for i in range(m)]
    assert_close(multi_lora_linear.forward(x, *args, *table, None), torch.tensor(mixed, dtype=torch.float64))
