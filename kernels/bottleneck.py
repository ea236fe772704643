"""y = residual + s (act(x D^T + b_d) U^T + b_u): both layers of an adapter, and what they are added to.

Where rows alone fill the device, one program takes its rows from x to y. Where they do not, programs share the first
sum, and then the columns of y. Products are as exact as fp32's; the kernels are of 32 rows (``exact_dot``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._adapter import RANKS, adapter_tile, exact_dot
from peftrt.kernels._launch import on_device, processors
from peftrt.kernels._schedule import PRECISION, any_rows, architecture_of
from peftrt.kernels.low_rank import STAGES, low_rank

# By the names that the operation has for them.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu")


@triton.jit
def logistic(b):
    """1 / (1 + e^-b), by the exponential that cannot overflow: a NaN where one comes in."""
    b_power = tl.exp(-tl.abs(b))
    return tl.where(b < 0, b_power, 1.0) / (1.0 + b_power)


@triton.jit
def normal_share(b):
    """The normal distribution's share below b: e^(-b^2 / 2) times a polynomial in 1 / (1 + |b| / 4) (activations.h)."""
    b_t = 1.0 / (1.0 + 0.25 * tl.abs(b))
    b_sum = -0.0537241097 + b_t * 0.0149752377
    b_sum = 0.0293642942 + b_t * b_sum
    b_sum = 0.0596565586 + b_t * b_sum
    b_sum = -0.0147142769 + b_t * b_sum
    b_sum = 0.102301929 + b_t * b_sum
    b_sum = 0.0662123753 + b_t * b_sum
    b_sum = 0.0968524685 + b_t * b_sum
    b_sum = 0.0993177742 + b_t * b_sum
    b_sum = 0.0997577522 + b_t * b_sum
    b_tail = tl.exp(-0.5 * b * b) * (b_t * b_sum)
    return tl.where(b < 0, b_tail, 1.0 - b_tail)


@triton.jit
def hyperbolic_tangent(b):
    """Near 0, where the quotient is a difference, a polynomial."""
    b_z = b * b
    b_sum = 0.0206505868 + b_z * -0.00571704451
    b_sum = -0.0537434979 + b_z * b_sum
    b_sum = 0.133314913 + b_z * b_sum
    b_sum = -0.333332839 + b_z * b_sum
    return tl.where(b_z < 0.390625, b + b * b_z * b_sum, 2.0 * logistic(2.0 * b) - 1.0)


@triton.jit
def activated(b, ACTIVATION: tl.constexpr):
    """act(b), of fp32 values."""
    if ACTIVATION == "relu":
        return tl.where(b < 0, 0.0, b)
    elif ACTIVATION == "gelu":
        return b * normal_share(b)
    elif ACTIVATION == "gelu_new":
        return b * logistic(1.5957691216 * (b + 0.044715 * b * b * b))
    elif ACTIVATION == "silu":
        return b * logistic(b)
    elif ACTIVATION == "tanh":
        return hyperbolic_tangent(b)
    elif ACTIVATION == "sigmoid":
        return logistic(b)
    else:
        return tl.where(b > 0, b, 0.01 * b)


@triton.jit
def bottleneck_columns(
    p_activated,
    p_up,
    p_up_bias,
    p_residual,
    p_out,
    o_m,
    m_m,
    i_k,
    K,
    R,
    stride_up_k,
    stride_up_r,
    scaling,
    BN: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns [i_k, i_k + BN) of y, of what is activated in memory."""
    o_k = (i_k + tl.arange(0, BN)).to(tl.int64)
    m_k = o_k < K
    b_sum = tl.zeros((o_m.shape[0], BN), tl.float32)
    b_sum = adapter_tile(
        p_activated, p_up, b_sum, o_m, m_m, o_k, m_k, R, R, stride_up_r, stride_up_k, 1.0, BR, PRECISION
    )
    b_sum += tl.load(p_up_bias + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    o_tile = o_m[:, None] * K + o_k[None, :]
    m_tile = m_m[:, None] & m_k[None, :]
    b_residual = tl.load(p_residual + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_out + o_tile, (b_residual + b_sum * scaling).to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def bottleneck_kernel(
    p_x,
    p_residual,
    p_down,
    p_down_bias,
    p_up,
    p_up_bias,
    p_inner,
    p_activated,
    p_out,
    M,
    K,
    R,
    stride_down_r,
    stride_down_k,
    stride_up_k,
    stride_up_r,
    scaling,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM rows of y; what is activated stays in the L1 or L2 meanwhile."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    for i_r in tl.range(0, R, BR, num_stages=1):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        b_sum = tl.zeros((BM, BR), tl.float32)
        for i in range(tl.cdiv(K, BK)):
            o_k = (i * BK + tl.arange(0, BK)).to(tl.int64)
            m_k = o_k < K
            b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            p_row = p_down + o_r.to(tl.int64)[:, None] * stride_down_r + o_k[None, :] * stride_down_k
            b_down = tl.load(p_row, mask=m_r[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_sum = exact_dot(b_x, b_down.T, b_sum, PRECISION)
        b_sum += tl.load(p_down_bias + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
        o_tile = o_m[:, None] * R + o_r[None, :]
        m_tile = m_m[:, None] & m_r[None, :]
        tl.store(p_inner + o_tile, b_sum, mask=m_tile)
        tl.store(p_activated + o_tile, activated(b_sum, ACTIVATION), mask=m_tile)
    # what one thread has written, others of the program read
    tl.debug_barrier()
    for i_k in tl.range(0, K, BN, num_stages=1):
        bottleneck_columns(
            p_activated,
            p_up,
            p_up_bias,
            p_residual,
            p_out,
            o_m,
            m_m,
            i_k,
            K,
            R,
            stride_up_k,
            stride_up_r,
            scaling,
            BN,
            RANKS,
            PRECISION,
        )


@triton.jit
def bottleneck_activate_kernel(
    p_sum, p_down_bias, p_inner, p_activated, numel, R, ACTIVATION: tl.constexpr, SIZE: tl.constexpr
):
    """The first layer's bias and activation, of x D^T [M, R]."""
    o = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m = o < numel
    b_inner = tl.load(p_sum + o, mask=m, other=0.0) + tl.load(p_down_bias + o % R, mask=m, other=0.0).to(tl.float32)
    tl.store(p_inner + o, b_inner, mask=m)
    tl.store(p_activated + o, activated(b_inner, ACTIVATION), mask=m)


@triton.jit
def bottleneck_up_kernel(
    p_activated,
    p_up,
    p_up_bias,
    p_residual,
    p_out,
    M,
    K,
    R,
    stride_up_k,
    stride_up_r,
    scaling,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile [BM, BN] of y."""
    # neighbouring programs share a tile of U
    i_m = tl.program_id(0) % tl.cdiv(M, BM)
    i_k = tl.program_id(0) // tl.cdiv(M, BM) * BN
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    bottleneck_columns(
        p_activated,
        p_up,
        p_up_bias,
        p_residual,
        p_out,
        o_m,
        o_m < M,
        i_k,
        K,
        R,
        stride_up_k,
        stride_up_r,
        scaling,
        BN,
        RANKS,
        PRECISION,
    )


# 32 rows at most (``exact_dot``). Not measured on a device; chosen by compiled code: with 128 columns of fp32 some
# programs would spill registers on sm_90.
ROWS, DEPTH, WARPS = 32, 64, 4
COLUMNS = {2: 128, 4: 64}  # by the bytes of an element of x
ACTIVATE_SIZE = 1024


def rank_tile(rank: int) -> int:
    """Ranks that x is read once for."""
    return 16 if rank <= 16 else 32


def bottleneck(
    x: Tensor,
    residual: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scaling: float,
    activation: str,
    inner: Tensor,
    out: Tensor,
) -> None:
    """``inner = x D^T + b_d`` and ``out = residual + s (act(inner) U^T + b_u)``, sums in fp32.

    Args:
        x, residual: [M, K], fp32, bf16 or fp16, contiguous.
        down_weight: D [R, K], fp32, bf16 or fp16, any strides.
        down_bias: b_d [R], fp32, bf16 or fp16, contiguous.
        up_weight: U [K, R], as D.
        up_bias: b_u [K], as b_d.
        scaling: s.
        activation: one of ``ACTIVATIONS``.
        inner: fp32 [M, R], contiguous.
        out: [M, K], of x's dtype, contiguous.
    """
    if out.numel() == 0:
        inner.copy_(down_bias.expand(inner.shape))
        return
    (M, K), R = x.shape, down_weight.shape[0]
    architecture, activated_inner = architecture_of(x.device), inner.new_empty(inner.shape)
    columns = COLUMNS[x.element_size()]
    tile = {"BM": ROWS, "BN": columns, "RANKS": RANKS, "num_warps": WARPS, "enable_fp_fusion": False}
    tile["PRECISION"] = PRECISION[architecture] if x.is_cuda else "ieee"
    with on_device(x):
        if triton.cdiv(M, ROWS) >= processors(x.device) and not any_rows():
            bottleneck_kernel[(triton.cdiv(M, ROWS),)](
                x,
                residual,
                down_weight,
                down_bias,
                up_weight,
                up_bias,
                inner,
                activated_inner,
                out,
                M,
                K,
                R,
                *down_weight.stride(),
                *up_weight.stride(),
                scaling,
                ACTIVATION=activation,
                BK=DEPTH,
                BR=rank_tile(R),
                num_stages=STAGES[architecture],
                **tile,
            )
            return
        low_rank(x, down_weight, activated_inner)
        if inner.numel():
            bottleneck_activate_kernel[(triton.cdiv(inner.numel(), ACTIVATE_SIZE),)](
                activated_inner,
                down_bias,
                inner,
                activated_inner,
                inner.numel(),
                R,
                ACTIVATION=activation,
                SIZE=ACTIVATE_SIZE,
                enable_fp_fusion=False,
            )
        bottleneck_up_kernel[(triton.cdiv(M, ROWS) * triton.cdiv(K, columns),)](
            activated_inner, up_weight, up_bias, residual, out, M, K, R, *up_weight.stride(), scaling, **tile
        )
