"""PagedAdamW: AdamW whose state takes no more of the device than it is given."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftrt.formats.adamw_state import BITS, BLOCK, block_bytes
from peftrt.formats.sizes import expect_bytes
from peftrt.ops import Gradients, adamw_step, gradient_norm
from peftrt.optim.page_table import Kind, PageTable
from peftrt.optim.pager import RING, Pager
from peftrt.optim.parameters import Parameters, check_groups
from peftrt.optim.saved_state import SavedState
from peftrt.optim.step_tables import StepTables, table_bytes
from peftrt.optim.stores import FileStore, HostStore, Store
from peftrt.optim.uninterrupted import uninterrupted

MIB = 1 << 20
PAGE_SIZES = (16 * MIB, 8 * MIB, 4 * MIB)
_LEAST_PAGE = 4096
# A budget is cut into so many pages at least, where they stay above the smallest size: the ring takes three of them.
_PAGES_OF_A_BUDGET = 8


class PoisonedError(RuntimeError):
    """A step failed half-way: some parameters have had it and some have not. Loading a state makes it good."""


@dataclass(frozen=True)
class PagedStats:
    """What an optimizer holds and has moved.

    Attributes:
        pages, page_bytes: of the state.
        resident: pages that stay on the device; the others come through a ring of three.
        device_bytes: held on the device, tables among them.
        budget: what it may hold; None for no limit.
        store_bytes: of the memory or file behind it.
        bytes_in, bytes_out: moved to the device and from it since the beginning.
        steps, skipped: taken, and left out because a gradient was not finite.
    """

    pages: int
    page_bytes: int
    resident: int
    device_bytes: int
    budget: int | None
    store_bytes: int
    bytes_in: int
    bytes_out: int
    steps: int
    skipped: int


class PagedAdamW(SavedState):
    """AdamW with decoupled weight decay whose state lies in pages: those that fit stay on the device, the others stream
    through three slots from page-locked host memory, or from a file.

    Every step is one fused kernel a page over all the tensors in it, however small. ``step`` allocates nothing on the
    device, and the bytes there never exceed the budget. Results are the same bits whatever the budget and the backing,
    on a CPU and on a GPU: every operation is rounded to fp32 by itself (``peftrt.ops.adamw_step`` has the equations).

    A Ctrl-C in the middle of a step is raised when the step is done.

    Parameters may be re-allocated between steps (``p.data = ...``): their addresses are looked at in every step. One
    that has changed its dtype, device or number of elements is an error.

    Args:
        params: as of any optimizer of torch's: Parameters, named Parameters or groups. fp32, bf16 or fp16, contiguous,
            on one device (a CPU or CUDA). Groups may have their own ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        lr, betas, eps, weight_decay: as of ``torch.optim.AdamW``.
        bits: of the state: 32, 8 bytes an element, or 8, 2.03 (dynamic maps, blocks of 256, as bitsandbytes has them).
        min_8bit_size: with ``bits=8``, Parameters of fewer elements keep a state of 32, as in bitsandbytes.
        device_budget: what the state may take of the device, its tables among it: bytes, or a text such as "64MiB";
            three pages at least. None: all of it stays there. On a CPU this is memory.
        backing: where the rest is: "host" for host memory, or a path: a directory, or a name in one that nothing has
            yet, for a file that is gone with the process. It is scratch: ``save`` makes checkpoints.
        page_size: bytes or a text; a power of two. Default, where not all of it stays: 16, 8 or 4 MiB, so that the
            budget holds eight.
        max_grad_norm: gradients of a greater norm, over all groups together, are scaled down to it as
            ``torch.nn.utils.clip_grad_norm_`` does, in the same kernel; ``.grad`` stays as it is.
        skip_nonfinite: a step with NaN or infinity in any gradient changes nothing and is counted. Lets the host
            wait once a step.

    Raises:
        TypeError, ValueError: a Parameter, number, budget or path that cannot be used.
        OSError: no room for the file.

    Source: AdamW, Loshchilov and Hutter 2019 (arXiv:1711.05101); paging, QLoRA, Dettmers et al. 2023
    (arXiv:2305.14314), section 3; 8 bits, Dettmers et al. 2021 (arXiv:2110.02861).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        min_8bit_size: int = 4096,
        device_budget: int | str | None = None,
        backing: str | os.PathLike[str] = "host",
        page_size: int | str | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        if bits not in BITS:
            raise ValueError(f"PagedAdamW: bits must be one of {BITS}, got {bits!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"PagedAdamW: max_grad_norm must be above 0 or None, got {max_grad_norm!r}")
        self._pager: Pager | None = None
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        check_groups(self.param_groups)
        self._max_grad_norm = max_grad_norm
        self._skip_nonfinite = skip_nonfinite
        self._known = Parameters(self.param_groups)
        self.steps: np.ndarray = np.zeros(len(self._known.tensors), dtype=np.int64)
        self._taken = self._skipped = 0
        self._broken: str | None = None
        self._process = os.getpid()
        self._budget = None if device_budget is None else expect_bytes(device_budget, "device_budget")
        kinds = [Kind(32 if p.numel() < min_8bit_size else bits, p.dtype) for p in self._known.tensors]
        self.table = self._page_table(kinds, page_size)
        # asked before any memory is taken
        slots = self._slots(self._budget)
        self._pager = Pager(self.table, self._known.device, self._open_store(backing))
        try:
            self._pager.start(slots)
            self._tables = StepTables(self.table, self._known.sizes, self._with_norm(), self._known.device)
            self._tables.place(self._pager.resident)
        except BaseException:
            self._pager.close()
            raise

    @property
    def parameters(self) -> Sequence[Tensor]:
        """All Parameters, group after group."""
        return self._known.tensors

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, fp32 ``[]`` on the device; None where nothing asks for it."""
        return None if self._tables.norm is None else self._tables.norm[0]

    @property
    def max_grad_norm(self) -> float | None:
        """As it was given: what clipping needs was allocated then."""
        return self._max_grad_norm

    @property
    def skip_nonfinite(self) -> bool:
        """As it was given."""
        return self._skip_nonfinite

    def _with_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    def _page_table(self, kinds: Sequence[Kind], page_size: int | str | None) -> PageTable:
        sizes = self._known.sizes
        if page_size is not None:
            size = expect_bytes(page_size, "page_size")
            if size < _LEAST_PAGE or size & (size - 1):
                raise ValueError(f"PagedAdamW: page_size must be a power of two from {_LEAST_PAGE}, got {page_size!r}")
            return PageTable(sizes, kinds, size)
        # Where all of it stays, only the last page of each kind is not full: pages of a sixteenth waste little.
        total = sum(-(-n // BLOCK) * block_bytes(kind.bits) for n, kind in zip(sizes, kinds, strict=True))
        share = -(-total // 16 // _LEAST_PAGE) * _LEAST_PAGE
        whole = PageTable(sizes, kinds, min(PAGE_SIZES[-1], max(_LEAST_PAGE, share)))
        if self._budget is None or whole.nbytes + table_bytes(whole, sizes, self._with_norm()) <= self._budget:
            return whole
        fitting = (size for size in PAGE_SIZES if size * _PAGES_OF_A_BUDGET <= self._budget)
        return PageTable(sizes, kinds, next(fitting, PAGE_SIZES[-1]))

    def _slots(self, budget: int | None) -> int:
        """How many pages a budget has room for, beside the tables."""
        pages = len(self.table.pages)
        if budget is None:
            return pages
        tables = table_bytes(self.table, self._known.sizes, self._with_norm())
        slots = max(0, budget - tables) // self.table.page_bytes
        if slots < min(pages, RING):
            needed = min(pages, RING) * self.table.page_bytes + tables
            raise ValueError(
                f"PagedAdamW: device_budget must be at least {needed} bytes, three pages of {self.table.page_bytes} "
                f"and {tables} of tables, got {budget}; page_size makes pages smaller"
            )
        return min(slots, pages)

    def _open_store(self, backing: str | os.PathLike[str]) -> Store:
        if backing == "host":
            return HostStore(self.table.page_bytes, pinned=self._known.device.type == "cuda")
        return FileStore(backing, self.table.page_bytes, len(self.table.pages))

    @property
    def _paging(self) -> Pager:
        assert self._pager is not None
        return self._pager

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: its memory is taken once.

        Raises:
            ValueError: at any other time.
        """
        if self._pager is not None:
            raise ValueError("PagedAdamW: groups cannot be added later: make a new optimizer, and load the state there")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a Parameter without gradient is left alone.

        Args:
            closure: computes the loss anew, with gradients, and returns it.

        Returns:
            What the closure did, or None.

        Raises:
            TypeError, ValueError: a gradient that is sparse or of another dtype, or a Parameter that is not what it
                was; nothing is changed.
            PoisonedError: an earlier step failed half-way.
            RuntimeError: the device's memory is released, or the process is a fork of the one that made the optimizer.
        """
        self._expect_usable()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        addresses, grads = self._known.look()
        has_grad = addresses[:, 1] != 0
        if not has_grad.any():
            return loss
        steps = self.steps + has_grad
        tables = self._tables
        tables.upload(addresses, self._hyper(steps))
        gradients = Gradients(self._known.tensors, grads, tables.addresses, self._known.aligned(addresses))
        norm = self._norm(gradients)
        if self.skip_nonfinite and norm is not None and not math.isfinite(float(norm[0])):
            self._skipped += 1
            return loss
        with uninterrupted():
            self._apply(gradients, None if norm is None or self.max_grad_norm is None else norm[1], has_grad)
            self.steps = steps
            self._taken += 1
            # so that autograd knows of what no operation of torch's has changed
            torch.autograd.graph.increment_version(
                [p for p, grad in zip(self.parameters, grads, strict=True) if grad is not None]
            )
        return loss

    def _norm(self, gradients: Gradients) -> Tensor | None:
        """The norm of all gradients and what they are to be multiplied with, on the device, where it is asked for."""
        tables = self._tables
        if tables.norm is None or tables.norm_chunks is None or tables.partials is None:
            return None
        most = math.inf if self.max_grad_norm is None else self.max_grad_norm
        gradient_norm(gradients, tables.norm_chunks, tables.partials, most, tables.norm)
        return tables.norm

    def _apply(self, gradients: Gradients, coefficient: Tensor | None, has_grad: np.ndarray) -> None:
        pager, page_bytes, hyper = self._paging, self.table.page_bytes, self._tables.hyper
        slab, spare = pager.slab, pager.threads
        assert slab is not None

        def launch(page: int, offset: int) -> None:
            state = slab[offset:] if page >= 0 else slab
            for kind, chunks in self._tables.launches(page):
                # a page in 8 bits takes four times as long to compute as to move
                left = spare if kind.bits == 32 else 0
                adamw_step(state, chunks, gradients, hyper, coefficient, kind.bits, page_bytes, kind.dtype, left)

        touched = [any(has_grad[segment.tensor] for segment in page.segments) for page in self.table.pages]
        try:
            pager.step(touched, launch)
        except BaseException as error:
            self._broken = f"an earlier step failed half-way ({type(error).__name__}: {error})"
            raise

    def _hyper(self, steps: np.ndarray) -> np.ndarray:
        """The rows of ``adamw_step``'s hyper, computed in fp64."""
        rows = np.empty((len(steps), 6), dtype=np.float64)
        for group, (first, last) in zip(self.param_groups, self._known.spans, strict=True):
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            t = np.maximum(steps[first:last], 1)
            rows[first:last, 0] = 1 - beta1
            rows[first:last, 1] = 1 - beta2
            rows[first:last, 2] = lr / (1 - beta1**t)
            rows[first:last, 3] = 1 / np.sqrt(1 - beta2**t)
            rows[first:last, 4] = group["eps"]
            rows[first:last, 5] = lr * group["weight_decay"]
        return rows.astype(np.float32)

    def _expect_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"PagedAdamW: made in process {self._process}, used in its fork {os.getpid()}: pages, threads and CUDA "
                "are the first one's alone; make the optimizer after the fork"
            )

    def _expect_whole(self) -> None:
        self._expect_process()
        if self._broken is not None:
            raise PoisonedError(f"PagedAdamW: {self._broken}: load a state, and the parameters that belong to it")

    def _expect_usable(self) -> None:
        self._expect_whole()
        if self._paging.slab is None:
            raise RuntimeError(
                "PagedAdamW: the device's memory is released: end release_device(), or, where that failed for want of "
                "memory, enter and leave it again"
            )

    def read_page(self, page: int) -> Tensor:
        """A page's bytes as of the last step, uint8 ``[page_bytes]`` on the CPU; they hold until the next call.

        Raises:
            PoisonedError, RuntimeError: as ``step`` does.
        """
        self._expect_whole()
        return self._paging.read(page)

    def write_page(self, page: int, data: Tensor) -> None:
        """Replace a page; in ``replacing``."""
        self._paging.write(page, data)

    @contextmanager
    def replacing(self, steps: np.ndarray) -> Iterator[None]:
        """A block that writes every page, after which the Parameters have had so many steps (int64 ``[T]``).

        It makes a poisoned optimizer good; where it ends with an error, the optimizer is poisoned.
        """
        self._expect_process()
        self._broken = "loading a state was not finished"
        self._paging.forget()
        yield
        self.steps, self._broken = steps.copy(), None

    def stats(self) -> PagedStats:
        """What is held and was moved."""
        pager = self._paging
        slab = 0 if pager.slab is None else pager.slab.nbytes
        return PagedStats(
            pages=len(self.table.pages),
            page_bytes=self.table.page_bytes,
            resident=pager.resident if pager.slab is not None else 0,
            device_bytes=slab + self._tables.nbytes,
            budget=self._budget,
            store_bytes=pager.store.nbytes,
            bytes_in=pager.bytes_in,
            bytes_out=pager.bytes_out,
            steps=self._taken,
            skipped=self._skipped,
        )

    @contextmanager
    def release_device(self) -> Iterator[None]:
        """Give the device's memory for other use in this block; the state is in host memory, or the file, meanwhile.

        Raises:
            RuntimeError, MemoryError, OSError: there is no room for it there, and all is as it was; or, at the end,
                none on the device: the state is safe where it is, and another ``release_device`` tries again.
        """
        self._expect_whole()
        self._paging.release()
        try:
            yield
        finally:
            self._acquire(self._slots(self._budget))

    def shrink(self, nbytes: int | str) -> None:
        """Give back so much of what the device holds, at least, and lower the budget to what is left.

        Raises:
            ValueError: what is left is under three pages; nothing is changed.
        """
        self._expect_usable()
        less = max(0, self.stats().device_bytes - expect_bytes(nbytes, "nbytes"))
        slots = self._slots(less)
        self._paging.release()
        self._budget = less
        self._acquire(slots)

    def _acquire(self, slots: int) -> None:
        self._paging.acquire(slots)
        self._tables.place(self._paging.resident)

    def close(self) -> None:
        """Give back memory, threads and the file; the optimizer is of no use afterwards."""
        self._paging.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("PagedAdamW: pages cannot be copied or pickled: state_dict() and save() have the state")
