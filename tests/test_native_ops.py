"""The raw functions of the native CPU library, against numpy, bitsandbytes and float64."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peftrt.formats.nf4 import DYNAMIC_CODEBOOK, NF4_CODEBOOK
from peftrt.ops import _native
from tests.tolerances import assert_close

NATIVE = Path(__file__).parent / "native"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))

cpu = torch.ops.peftrt_cpu


class Weight:
    """A random NF4 weight, with its values worked out by numpy: two fp32 roundings a nested scale, one a weight."""

    def __init__(self, n: int, k: int, block_size: int = 64, nested: bool = True, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, n, k, block_size, nested])
        blocks = -(-n * k // block_size)
        codes = rng.integers(0, 256, (n * k + 1) // 2, dtype=np.uint8)
        if nested:
            absmax = rng.integers(0, 256, blocks, dtype=np.uint8)
            runs = rng.uniform(0.01, 0.2, -(-blocks // 256)).astype(np.float32)
            offset = np.float32(0.21)
            scales = DYNAMIC_CODEBOOK.numpy()[absmax] * np.repeat(runs, 256)[:blocks] + offset
        else:
            scales = rng.uniform(0.0, 0.3, blocks).astype(np.float32)
            absmax = scales.view(np.uint8)
        nibbles = np.stack([codes >> 4, codes & 15], 1).reshape(-1)[: n * k]
        exact = NF4_CODEBOOK.numpy()[nibbles] * np.repeat(scales, block_size)[: n * k]
        assert exact.dtype == np.float32
        self.exact = torch.from_numpy(exact).reshape(n, k)
        self.args: tuple[Tensor, Tensor, Tensor | None, Tensor | None, int] = (
            torch.from_numpy(codes),
            torch.from_numpy(absmax.copy()),
            torch.from_numpy(runs.view(np.uint8).copy()) if nested else None,
            torch.from_numpy(offset.reshape(1).view(np.uint8).copy()) if nested else None,
            block_size,
        )


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.exact.shape, dtype=dtype)
    cpu.nf4_dequantize(*weight.args, out)
    return out


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape[0], weight.exact.shape[0], dtype=x.dtype)
    cpu.nf4_linear(x, *weight.args, bias, out)
    return out


def linear_dx(dy: Tensor, weight: Weight) -> Tensor:
    out = torch.empty(dy.shape[0], weight.exact.shape[1], dtype=dy.dtype)
    cpu.nf4_linear_dx(dy, *weight.args, out)
    return out


def bits(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


SHAPES = [(1, 1), (3, 5), (7, 33), (2, 64), (5, 96), (1, 4099), (33, 127), (64, 192), (130, 1024)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_is_bit_exact(block_size: int, nested: bool, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        weight = Weight(n, k, block_size, nested)
        assert torch.equal(dequantize(weight, dtype), weight.exact.to(dtype)), (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize_equals_bitsandbytes(block_size: int, nested: bool, dtype: torch.dtype) -> None:
    for n, k in [(2, 64), (48, 130), (33, 1024)]:
        dense = torch.randn(n, k).to(dtype)
        codes, state = bnb.quantize_4bit(dense, blocksize=block_size, compress_statistics=nested, quant_type="nf4")
        absmax, runs, offset = state.absmax, None, None
        if nested:
            runs = state.state2.absmax.view(torch.uint8)
            offset = state.offset.float().reshape(1).view(torch.uint8)
        out = torch.empty(n, k, dtype=dtype)
        cpu.nf4_dequantize(codes.reshape(-1), absmax.view(torch.uint8), runs, offset, block_size, out)
        assert torch.equal(out, bnb.dequantize_4bit(codes, state)), (n, k)


def test_codebooks_are_those_of_the_package_and_of_bitsandbytes() -> None:
    one = torch.ones(1).view(torch.uint8)
    codes = torch.tensor([(2 * i) << 4 | (2 * i + 1) for i in range(8)], dtype=torch.uint8)
    out = torch.empty(16)
    cpu.nf4_dequantize(codes, one, None, None, 32, out)
    assert torch.equal(out, NF4_CODEBOOK)
    assert torch.equal(out, bnb.get_4bit_type("nf4", device="cpu"))
    # 256 blocks of the code for 1.0, each with another scale code
    scales = torch.empty(256 * 32)
    zero = torch.zeros(1).view(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8)
    cpu.nf4_dequantize(torch.full((256 * 16,), 0xFF, dtype=torch.uint8), every, one, zero, 32, scales)
    assert torch.equal(scales[::32], DYNAMIC_CODEBOOK)
    assert torch.equal(scales[::32], bnb.create_dynamic_map())


def check_linear(m: int, weight: Weight, dtype: torch.dtype, with_bias: bool) -> None:
    n, k = weight.exact.shape
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if with_bias else None
    dense = weight.exact.to(dtype).double()
    expected = x.double() @ dense.T + (bias.double() if bias is not None else 0.0)
    assert_close(linear(x, weight, bias), expected)
    dy = torch.randn(m, n).to(dtype)
    assert_close(linear_dx(dy, weight), dy.double() @ dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 25, 48, 100])
def test_linear_and_dx_on_every_path(m: int, dtype: torch.dtype) -> None:
    check_linear(m, Weight(75, 320), dtype, with_bias=m % 2 == 0)
    check_linear(m, Weight(75, 333, nested=False), dtype, with_bias=m % 2 == 1)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_linear_and_dx_for_every_block_size(block_size: int) -> None:
    for m in (1, 3, 20):
        check_linear(m, Weight(40, 576, block_size), torch.float32, with_bias=True)
        check_linear(m, Weight(41, 97, block_size), torch.float32, with_bias=False)


@pytest.mark.parametrize("m", [1, 4, 16, 513, 600])
def test_longer_than_one_slice_of_anything(m: int) -> None:
    check_linear(m, Weight(300, 4352), torch.float32, with_bias=True)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 600),
    block_size=st.sampled_from(BLOCK_SIZES),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_any_shape(m: int, n: int, k: int, block_size: int, nested: bool, dtype: torch.dtype, with_bias: bool) -> None:
    weight = Weight(n, k, block_size, nested)
    assert torch.equal(dequantize(weight, dtype), weight.exact.to(dtype))
    check_linear(m, weight, dtype, with_bias)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 64), (3, 0, 64), (5, 8, 0), (20, 8, 0), (0, 0, 0)])
def test_empty(m: int, n: int, k: int) -> None:
    weight = Weight(n, k)
    bias = torch.randn(n)
    assert torch.equal(linear(torch.randn(m, k), weight, bias), torch.randn(m, k) @ torch.randn(n, k).T + bias)
    assert torch.equal(linear_dx(torch.randn(m, n), weight), torch.zeros(m, k))
    assert dequantize(weight, torch.float32).numel() == n * k


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_they_belong(dtype: torch.dtype) -> None:
    weight = Weight(4, 128, nested=False)
    scales = weight.args[1].clone()
    scales.view(torch.float32)[0] = float("nan")
    # every bit set is a NaN too, and rounding its bits naively to bf16 would make it -0
    scales[4 * 3 : 4 * 4] = 0xFF
    scales.view(torch.float32)[6] = float("inf")
    args = (weight.args[0], scales, *weight.args[2:])
    out = torch.empty(4, 128, dtype=dtype)
    cpu.nf4_dequantize(*args, out)
    assert out[0, :64].isnan().all()
    assert out[1, 64:].isnan().all()
    assert not out[3, :64].isfinite().any()
    assert torch.equal(out[2], weight.exact.to(dtype)[2])
    for m in (1, 20):
        y = torch.empty(m, 4, dtype=dtype)
        cpu.nf4_linear(torch.ones(m, 128, dtype=dtype), *args, None, y)
        assert y[:, :2].isnan().all()
        assert y[:, 2].isfinite().all()
        assert not y[:, 3].isfinite().any()
        x = torch.ones(m, 128, dtype=dtype)
        x[0, 5] = float("nan")
        finite = linear(x, Weight(4, 128))
        assert finite[0].isnan().all()
        assert finite[1:].isfinite().all()


@pytest.mark.parametrize("m", [1, 4, 8, 9, 16, 40])
def test_a_row_does_not_depend_on_its_neighbours(m: int) -> None:
    weight = Weight(50, 448)
    x, dy = torch.randn(m, 448), torch.randn(m, 50)
    y, dx = linear(x, weight), linear_dx(dy, weight)
    kept = m // 2
    others = torch.arange(m) != kept
    x[others], dy[others] = float("nan"), 3e38
    assert torch.equal(linear(x, weight)[kept], y[kept])
    assert torch.equal(linear_dx(dy, weight)[kept], dx[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_whole_and_nothing_beside_it(dtype: torch.dtype) -> None:
    band = 64
    weight = Weight(37, 129)
    for m in (1, 5, 19):
        for shape, call in (
            ((37, 129), lambda out: cpu.nf4_dequantize(*weight.args, out)),
            ((m, 37), lambda out, m=m: cpu.nf4_linear(torch.ones(m, 129, dtype=dtype), *weight.args, None, out)),
            ((m, 129), lambda out, m=m: cpu.nf4_linear_dx(torch.ones(m, 37, dtype=dtype), *weight.args, out)),
        ):
            size = shape[0] * shape[1]
            whole = torch.full((size + 2 * band,), float("nan"), dtype=dtype)
            call(whole[band : band + size].view(shape))
            assert whole[band : band + size].isfinite().all()
            assert whole[:band].isnan().all()
            assert whole[band + size :].isnan().all()


def test_bits_repeat_and_do_not_depend_on_the_thread_count() -> None:
    weight = Weight(517, 1088)
    before = torch.get_num_threads()
    seen: dict[int, set[str]] = {}
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for m in (1, 3, 8, 20):
                x = torch.randn(m, 1088, generator=torch.Generator().manual_seed(m))
                dy = torch.randn(m, 517, generator=torch.Generator().manual_seed(m))
                got = bits(linear(x, weight)) + bits(linear_dx(dy, weight)) + bits(dequantize(weight, torch.bfloat16))
                seen.setdefault(m, set()).add(got)
    finally:
        torch.set_num_threads(before)
    assert {m: len(variants) for m, variants in seen.items()} == {1: 1, 3: 1, 8: 1, 20: 1}


def run_script(name: str, *arguments: str, **environment: str) -> str:
    """A script of tests/native in a process of its own; its stdout."""
    command = [sys.executable, str(NATIVE / name), *arguments]
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths, **environment}
    )
    assert result.returncode == 0, f"{name}: exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_nothing_is_read_behind_the_inputs() -> None:
    # Inputs and outputs end where an unreadable page begins, at odd addresses; a breach kills the process.
    assert "no breach" in run_script("guard_pages.py")


def test_no_weight_sized_buffer_outlives_or_even_lives_during_a_call() -> None:
    assert "peak within bounds" in run_script("memory_peak.py")


def test_threads_are_torchs() -> None:
    assert "threads obeyed" in run_script("thread_count.py", OMP_NUM_THREADS="4")


def test_the_portable_kernels_give_the_same_bits_of_weights() -> None:
    portable = run_script("print_bits.py", PEFTRT_CPU_ISA="portable").split()
    best = run_script("print_bits.py", PEFTRT_CPU_ISA="").split()
    assert portable[0] == "portable"
    assert best[0] == _native.isa()
    assert portable[1] == best[1]
    # linear: the same weights, sums in another order
    assert [float(v) for v in portable[2:]] == pytest.approx([float(v) for v in best[2:]], rel=1e-5)


BAD_CALLS = [
    ("codes must have", {0: lambda t: t[:-1]}),
    ("codes must be uint8", {0: lambda t: t.view(torch.int8)}),
    ("codes must be a contiguous", {0: lambda t: t.repeat_interleave(2)[::2]}),
    ("absmax must have", {1: lambda t: t[:-1]}),
    ("nested_absmax must have", {2: lambda t: t[:-1]}),
    ("nested_offset must have", {3: lambda t: t[:-1]}),
    ("nested_offset must be given exactly", {3: lambda t: None}),
    ("block_size must be a power of two", {4: lambda g: 48}),
    ("block_size must be a power of two", {4: lambda g: 16}),
    ("block_size must be a power of two", {4: lambda g: -64}),
]


@pytest.mark.parametrize(("message", "changes"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_a_bad_weight_is_refused(message: str, changes: dict) -> None:
    args = [changes.get(i, lambda v: v)(value) for i, value in enumerate(Weight(6, 128).args)]
    out = torch.zeros(6, 128)
    with pytest.raises(RuntimeError, match=f"nf4_dequantize: {message}"):
        cpu.nf4_dequantize(*args, out)
    with pytest.raises(RuntimeError, match=f"nf4_linear: {message}"):
        cpu.nf4_linear(torch.zeros(2, 128), *args, None, torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match=f"nf4_linear_dx: {message}"):
        cpu.nf4_linear_dx(torch.zeros(2, 6), *args, torch.zeros(2, 128))
    assert not out.any()


NORM = {"weight": Weight(6, 128).args[:4], "n": 6, "k": 128, "block": 64}
NORM |= {"A": torch.zeros(3, 128), "B": torch.zeros(6, 3)}
DENSE = (torch.zeros(6, 128), None, None, None)
GRADIENT = {"dy": torch.zeros(2, 6), "y": torch.zeros(2, 6), "bias": None, "row_scale": torch.ones(6)}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("codes must have", {"n": 7, "B": torch.zeros(7, 3)}),
        ("codes must be uint8", {"weight": (torch.zeros(384), *NORM["weight"][1:])}),
        ("lora_A must be", {"k": 64}),
        ("lora_A must be float32", {"A": torch.zeros(3, 128).double()}),
        ("lora_B must be", {"B": torch.zeros(6, 4)}),
        ("weight must be", {"weight": DENSE, "n": 5, "B": torch.zeros(5, 3)}),
        ("weight must be", {"weight": (torch.zeros(768), None, None, None)}),
        ("weight must be float32", {"weight": (torch.zeros(6, 128).double(), None, None, None)}),
    ],
)
def test_bad_norms_are_refused(message: str, change: dict) -> None:
    good = NORM | change
    with pytest.raises(RuntimeError, match=f"lora_weight_norm: {message}"):
        cpu.lora_weight_norm(*good["weight"], good["n"], good["k"], good["block"], good["A"], good["B"], 0.5)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("out must be", {"y": torch.zeros(3, 6)}),
        ("y must be", {"y": torch.zeros(2, 7)}),
        ("out must be", {"y": torch.zeros(2, 6).half()}),
        ("bias must be", {"bias": torch.zeros(5)}),
        ("row_scale must be", {"row_scale": torch.ones(5)}),
        ("row_scale must be", {"row_scale": torch.ones(6).half()}),
    ],
)
def test_bad_gradients_of_a_row_scale_are_refused(message: str, change: dict) -> None:
    good = GRADIENT | change
    with pytest.raises(RuntimeError, match=f"row_scale_gradient: {message}"):
        cpu.row_scale_gradient(good["dy"], good["y"], good["bias"], good["row_scale"])


def test_bad_activations_are_refused() -> None:
    args = Weight(6, 128).args
    x, out = torch.zeros(2, 128), torch.zeros(2, 6)
    for message, call in (
        ("out must be of the input's dtype and dimensions", lambda: cpu.nf4_linear(x[0], *args, None, out)),
        ("x must be a contiguous", lambda: cpu.nf4_linear(torch.zeros(128, 2).T, *args, None, out)),
        ("x must be float32", lambda: cpu.nf4_linear(x.double(), *args, None, out.double())),
        ("out must be of the input's dtype", lambda: cpu.nf4_linear(x.half(), *args, None, out)),
        ("out must be of the input's shape but", lambda: cpu.nf4_linear(x, *args, None, torch.zeros(3, 6))),
        ("codes must have", lambda: cpu.nf4_linear(x, *args, None, torch.zeros(2, 7))),
        ("bias must be", lambda: cpu.nf4_linear(x, *args, torch.zeros(5), out)),
        ("bias must be", lambda: cpu.nf4_linear(x, *args, torch.zeros(6).half(), out)),
        ("dy must be", lambda: cpu.nf4_linear_dx(out.long(), *args, x.long())),
        ("x must be", lambda: cpu.nf4_linear(x, *args[:4], 6, 64, args[4], None)),
        ("x must be", lambda: cpu.nf4_linear(x[0, 0], *args[:4], 6, 128, args[4], None)),
        ("codes must have", lambda: cpu.nf4_linear(x, *args[:4], 7, 128, args[4], None)),
        ("dy must be", lambda: cpu.nf4_linear_dx(out, *args[:4], 7, 128, args[4])),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x must be", {"x": torch.zeros(2, 64)}),
        ("x must be float32", {"x": torch.zeros(2, 128).double()}),
        ("x must be", {"x": torch.tensor(0.0)}),
        ("dropped must be", {"dropped": torch.zeros(2, 128).half()}),
        ("dropped must be", {"dropped": torch.zeros(3, 128)}),
        ("dropped must be", {"dropped": torch.zeros(1, 2, 128)}),
        ("lora_A must be", {"A": torch.zeros(3, 127)}),
        ("lora_A must be", {"A": torch.zeros(3 * 128)}),
        ("lora_A must be float32", {"A": torch.zeros(3, 128).long()}),
        ("lora_B must be", {"B": torch.zeros(6, 4)}),
        ("lora_B must be", {"B": torch.zeros(3, 6)}),
        ("lora_B must be float32", {"B": torch.zeros(6, 3).double()}),
        ("bias must be", {"bias": torch.zeros(5)}),
        ("row_scale must be", {"row_scale": torch.zeros(5)}),
        ("row_scale must be", {"row_scale": torch.zeros(6).half()}),
        ("row_scale must be", {"row_scale": torch.zeros(6, 1)}),
        ("codes must have", {"block": 64, "weight": Weight(7, 128).args[:4]}),
    ],
)
def test_a_bad_adapter_is_refused(message: str, change: dict) -> None:
    good = {"x": torch.zeros(2, 128), "dropped": None, "weight": Weight(6, 128).args[:4], "block": 64}
    good |= {"A": torch.zeros(3, 128), "B": torch.zeros(6, 3), "bias": None, "row_scale": None} | change
    with pytest.raises(RuntimeError, match=f"nf4_lora_linear: {message}"):
        cpu.nf4_lora_linear(
            good["x"],
            good["dropped"],
            *good["weight"],
            6,
            128,
            good["block"],
            good["A"],
            good["B"],
            0.5,
            good["bias"],
            good["row_scale"],
        )
