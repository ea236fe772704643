"""Whether a row's bits may depend on how many rows a call has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_invariant: ContextVar[bool] = ContextVar("peftrt_batch_invariant", default=False)


def invariant() -> bool:
    """Whether a call in this context takes one path, whatever its number of rows."""
    return _invariant.get()


@contextmanager
def set_invariant(value: bool) -> Iterator[None]:
    """Set what :func:`invariant` says, as a backward does to run like its forward."""
    token = _invariant.set(value)
    try:
        yield
    finally:
        _invariant.reset(token)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Give every row the same bits, however many rows are in its batch.

    ``with peftrt.batch_invariant():`` holds for the operations run inside, in this thread, and for their backward
    passes. Without it a row's bits depend on nothing but the row and on how many rows there are: which kernel serves a
    call goes by M, and the kernels sum in different orders. With it one kernel serves every M, so that a request
    alone, in a batch of 2 and in a batch of 500 has the same answer; up to 8 rows take longer.

    What it promises, row by row, on a CPU with the native library, and on a GPU with Triton (where it has not run yet):
    outputs and input gradients of ``nf4_linear``, and over any base of ``lora_linear`` and ``multi_lora_linear``, and
    so of the modules made of them; outputs of ``bottleneck``. Nothing of what torch itself multiplies: layers without
    an adapter over a dense base, fp64, the reference, gradients of gradients, on a GPU ``splits``.
    """
    with set_invariant(True):
        yield
