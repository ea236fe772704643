"""multi_lora_linear, one batch of many adapters, against the bare base, one adapter for all rows, a loop over the
adapters, peft's mixed batch, and the kernels of vLLM and SGLang.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftrt
from bench import batches, problem, shapes, truth
from bench.batches import BARE, DISTINCT, IDENTICAL, UNIFORM, ZIPF, Mix, Rotation, Stack
from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner, backend_of
from bench.measure import Contender
from bench.peers import UnavailableError, bitsandbytes_nf4, peft_lora, sglang_lora, torch_dense, vllm_lora
from bench.results import OWN
from bench.shapes import Site
from peftrt import NF4Weight, ops
from peftrt.ops import AdapterTable

NF4, DENSE, ALONE = "nf4", "dense", "none"  # the base; without one, the adapters' share alone
BASE = "base"  # the same rows without adapters: peftrt's own for NF4, torch's for a dense one
ONE = "one adapter"  # the same rows, all of one adapter
LOOP = "loop"  # one adapter after the other, in plain torch
INVARIANT = "batch invariant"  # the same call where a row's bits may not depend on M

# The base's weight and the activations once, and each adapter in use once; T and Q as Mix.letters has them.
ADAPTER_BYTES = "s*T*(N + K)"
TRAFFIC = {NF4: f"{NF4_BYTES} + ", DENSE: "s*N*K + ", ALONE: ""}
ARITHMETIC = {NF4: "2*M*N*K + ", DENSE: "2*M*N*K + ", ALONE: ""}

Plan = Iterator[tuple[Site, str, str, int]]
Call = Callable[[Tensor], Tensor]


def cells(device: str, quick: bool) -> list[Cell]:
    """``part`` is the base and the mix: ``nf4-zipf-rmix-e64`` has adapters of mixed ranks in 64 slots."""
    plan = _quick(device) if quick else _on_a_cpu() if device == "cpu" else _on_a_gpu()
    return [_cell(device, *row) for row in dict.fromkeys(plan)]


def _cell(device: str, site: Site, base: str, mix: str, M: int) -> Cell:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    nbytes = f"{TRAFFIC[base]}{ADAPTER_BYTES} + s*M*(N + K)"
    flops = f"{ARITHMETIC[base]}2*Q*(N + K)"
    letters = Mix.of(mix).letters(M)
    return Cell("multi_lora_linear", f"{base}-{mix}", site, M, dtype, nbytes, flops, letters)


def _quick(device: str) -> Plan:
    for base in (NF4, DENSE, ALONE):
        for mix in (f"{DISTINCT}-r16-e8", f"{ZIPF}-rmix-e8"):
            for M in shapes.QUICK_ROWS:
                yield shapes.QUICK_SITES[0], base, mix, M


def _on_a_cpu() -> Plan:
    """What marks name at every site; at the first one each way to choose, and each rank, once."""
    for site in shapes.CPU_SITES:
        for base in (NF4, DENSE):
            yield site, base, f"{DISTINCT}-r16-e64", 32
            yield site, base, f"{DISTINCT}-r8-e64", 32
        if site != shapes.CPU_SITES[0]:
            continue
        for base in (NF4, DENSE):
            for M in (1, 4, 16):
                yield site, base, f"{DISTINCT}-r16-e64", M
        for mix in (f"{DISTINCT}{BARE}", IDENTICAL, f"{IDENTICAL}{BARE}", UNIFORM, ZIPF):
            yield site, NF4, f"{mix}-r16-e64", 32
        for mix in (f"{DISTINCT}-r64-e64", f"{DISTINCT}-r128-e64", f"{DISTINCT}-rmix-e128", f"{UNIFORM}-r16-e8"):
            yield site, NF4, mix, 32
        yield site, NF4, f"{ZIPF}-rmix-e128", 128
        yield site, DENSE, f"{ZIPF}-rmix-e128", 32


def _on_a_gpu() -> Plan:
    """By site: what marks name, the adapters' share alone in every mix, and over the bases the usual rank."""
    mixes = (DISTINCT, f"{DISTINCT}{BARE}", UNIFORM, ZIPF, IDENTICAL, f"{IDENTICAL}{BARE}")
    ranks = (*(f"r{rank}" for rank in shapes.RANKS), "rmix")
    for site in shapes.GPU_SITES:
        for base in (NF4, DENSE):
            yield site, base, f"{DISTINCT}-r16-e8", 8
            for M in shapes.GPU_MULTI_ROWS:
                for mix in (DISTINCT, ZIPF):
                    yield site, base, f"{mix}-r16-e64", M
            for M in (4, 16):
                yield site, base, f"{DISTINCT}-r16-e64", M
        # one table after the other, so that each is made once
        for rank, slots, mix in itertools.product(ranks, shapes.SLOTS, mixes):
            for M in shapes.GPU_MULTI_ROWS[1:-1]:
                yield site, ALONE, f"{mix}-{rank}-e{slots}", M
        for mix in (UNIFORM, ZIPF):
            yield site, ALONE, f"{mix}-rmix-e128", shapes.GPU_MULTI_ROWS[-1]


def bench_multi_lora_linear(cell: Cell, runner: Runner) -> None:
    batch = Batch(cell, runner.device, runner.timer.rotation_bytes)
    contenders = {OWN: batch.own}
    if batch.base != ALONE:
        contenders |= {BASE: batch.bare}
    if len({*batch.ids} - {-1}) > 1 and batch.mix.rank is not None:
        contenders |= {ONE: batch.one_adapter}
    contenders |= {LOOP: batch.loop, **_peers(batch)}
    if cell.M <= 16 and f"{batch.mix}" == f"{DISTINCT}-r16-e64":
        contenders |= {INVARIANT: batch.invariant}
    runner.run(cell, contenders)


def _peers(batch: Batch) -> dict[str, Callable[[], Contender]]:
    if batch.base == NF4:
        peers = {peft_lora.NAME_NF4: batch.peft, bitsandbytes_nf4.NAME: batch.peers_base}
        return peers if batch.on_cpu else {**peers, vllm_lora.NAME_NF4: batch.vllm}
    peers = {peft_lora.NAME: batch.peft} if batch.base == DENSE else {}
    if batch.on_cpu:
        return peers
    return peers | {
        vllm_lora.NAME: batch.vllm,
        sglang_lora.NAME_V2: batch.sglang_v2,
        sglang_lora.NAME_CHUNKED: batch.sglang_chunked,
    }


class Batch:
    """One cell's operands, and its contenders over copies of them."""

    def __init__(self, cell: Cell, device: str, rotation_bytes: int) -> None:
        self.base, mix = cell.part.split("-", 1)
        self.mix, self.site, self.dtype, self.M = Mix.of(mix), cell.site, cell.dtype, cell.M
        self.device, self.on_cpu = device, device == "cpu"
        self.x = problem.activations(cell.M, cell.site.K, cell.dtype, device)
        self.ids = self.mix.ids(cell.M)
        self.adapters = batches.adapters(cell.site, tuple(self.mix.ranks), cell.dtype, device)
        self.dense = None if self.base == ALONE else problem.decoded(cell.site, cell.dtype, device)
        self.rotation = Rotation.plan(self.mix, cell.M, cell.evaluate(cell.bytes), rotation_bytes)
        self.weights: Sequence[Tensor | NF4Weight | None] = [None]
        if self.dense is not None:
            nf4 = self.base == NF4
            operand = problem.weight(cell.site, cell.dtype, device) if nf4 else self.dense
            self.weights = problem.copies(operand, rotation_bytes)[: self.rotation.calls]
        self._truth: tuple[Tensor, ...] | None = None
        self._tables: list[AdapterTable] = []
        self._stacks: list[Stack] = []

    @property
    def truth(self) -> tuple[Tensor, ...]:
        """y, once for all contenders."""
        if self._truth is None:
            self._truth = (truth.multi_lora(self.x, self.dense, self.adapters, self.ids),)
        return self._truth

    def contender(self, make: Callable[[int], Call], **options: Any) -> Contender:
        """``make(i)`` is what call i does with x."""
        made = [torch.no_grad()(make(i)) for i in range(self.rotation.calls)]
        calls = tuple(lambda call=call: call(self.x) for call in made)
        return Contender(calls, options.pop("truth", self.truth), truth.TOLERANCES[self.dtype], **options)

    def weight(self, call: int) -> Any:
        """The copy of the base's weight that a call reads."""
        return self.weights[call % len(self.weights)]

    def slot_ids(self, call: int, ids: Sequence[int] | None = None) -> Tensor:
        """Each row's slot in a call."""
        found = self.rotation.ids(self.ids if ids is None else ids, call)
        return torch.tensor(found, dtype=torch.int32, device=self.device)

    def table(self, call: int) -> AdapterTable:
        """The copy of the table that a call reads."""
        if not self._tables:
            table = AdapterTable.stack(self.adapters)
            self._tables = [table, *(batches.moved(table) for _ in range(self.rotation.tables - 1))]
        return self._tables[self.rotation.table(call)]

    def stack(self, call: int) -> Stack:
        """The same as servers hold it."""
        if not self._stacks:
            stack = Stack.of(self.adapters)
            self._stacks = [stack, *(stack.clone() for _ in range(self.rotation.tables - 1))]
        return self._stacks[self.rotation.table(call)]

    def _multi(self, call: int, ids: Sequence[int] | None = None) -> Call:
        weight, table, slot_ids = self.weight(call), self.table(call), self.slot_ids(call, ids)
        return lambda x: ops.multi_lora_linear(x, weight, table, slot_ids)

    def own(self) -> Contender:
        table, weight, site = self.table(0), self.weights[0], self.site
        parts = (weight,) if isinstance(weight, NF4Weight) else (weight, None, None, None, site.N, site.K, 0)
        pairs = (table.values, table.ranks, table.A_pages, table.B_pages, table.scaling)
        rest = (*pairs, None, None, list(table.splits), self.slot_ids(0), None)
        backend = backend_of("multi_lora_linear", self.x, *parts, *rest)
        return self.contender(self._multi, backend=backend, over=BASE)

    def one_adapter(self) -> Contender:
        """The first adapter for every row that has one."""
        ids = [min(slot, 0) for slot in self.ids]
        expected = (truth.multi_lora(self.x, self.dense, self.adapters, ids),)
        return self.contender(lambda call: self._multi(call, ids), truth=expected)

    def invariant(self) -> Contender:
        within = getattr(peftrt, "batch_invariant", None)
        if within is None:
            raise UnavailableError("this peftrt has no batch_invariant")

        def make(call: int) -> Call:
            run = self._multi(call)

            def guarded(x: Tensor) -> Tensor:
                with within():
                    return run(x)

            return guarded

        return self.contender(make)

    def _base(self, call: int) -> Call:
        weight = self.weight(call)
        if isinstance(weight, NF4Weight):
            return lambda x: ops.nf4_linear(x, weight)
        return lambda x: F.linear(x, weight)

    def bare(self) -> Contender:
        return self.contender(self._base, truth=self._bare_truth())

    def _bare_truth(self) -> tuple[Tensor, ...]:
        assert self.dense is not None
        return (truth.linear(self.x, self.dense),)

    def loop(self) -> Contender:
        """Which rows are whose is known beforehand, as it is where requests are batched."""

        def make(call: int) -> Call:
            ids = self.rotation.ids(self.ids, call)
            groups = []
            for slot in sorted({*ids} - {-1}):
                rows = [i for i, of_row in enumerate(ids) if of_row == slot]
                groups.append((torch.tensor(rows, device=self.device), *self.adapters[slot]))
            base = self._zeros if self.base == ALONE else self._base(call)

            def run(x: Tensor) -> Tensor:
                y = base(x)
                for rows, A, B, scaling in groups:
                    y.index_add_(0, rows, scaling * (x.index_select(0, rows) @ A.t() @ B.t()))
                return y

            return run

        return self.contender(make, over=None if self.base == ALONE else BASE)

    def _zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.M, self.site.N)

    def _peers_base(self, call: int) -> nn.Module:
        weight = self.weight(call)
        nf4 = isinstance(weight, NF4Weight)
        return bitsandbytes_nf4.linear(weight, self.dtype) if nf4 else torch_dense.linear(weight)

    def peers_base(self) -> Contender:
        """What bitsandbytes takes without adapters."""
        return self.contender(self._peers_base, truth=self._bare_truth())

    def peft(self) -> Contender:
        """One model for all calls: its time is the host's, and not the memory's."""
        used = {slot: self.adapters[slot] for slot in sorted({*self.ids} - {-1})}
        model = peft_lora.mixed(self._peers_base(0), used, self.ids)
        return self.contender(lambda call: model, over=bitsandbytes_nf4.NAME if self.base == NF4 else BASE)

    def _added(self, adding: Callable[[int, bool], Callable[[Tensor, Tensor], Tensor]], zeros: bool) -> Contender:
        """A peer's kernels over its base. Without one they write over zeros that stand there from the beginning,
        unless they can only add: then ``zeros`` says that every call makes them.
        """
        adds = self.base != ALONE or zeros

        def make(call: int) -> Call:
            add = adding(call, adds)
            if self.base == ALONE:
                standing = self._zeros(self.x)
                return lambda x: add(x, self._zeros(x) if zeros else standing)
            base = self._peers_base(call)
            return lambda x: add(x, base(x))

        return self.contender(make, over={NF4: bitsandbytes_nf4.NAME, DENSE: BASE}.get(self.base))

    def vllm(self) -> Contender:
        folded: dict[int, Stack] = {}

        def adding(call: int, keep: bool) -> Callable[[Tensor, Tensor], Tensor]:
            place = self.rotation.table(call)
            if place not in folded:
                folded[place] = self.stack(call).folded()
            return vllm_lora.adding(folded[place], self.slot_ids(call), keep)

        return self._added(adding, zeros=False)

    def sglang_v2(self) -> Contender:
        def adding(call: int, keep: bool) -> Callable[[Tensor, Tensor], Tensor]:
            return sglang_lora.v2(self.stack(call), self.rotation.ids(self.ids, call), keep)

        return self._added(adding, zeros=False)

    def sglang_chunked(self) -> Contender:
        def adding(call: int, keep: bool) -> Callable[[Tensor, Tensor], Tensor]:
            return sglang_lora.chunked(self.stack(call), self.rotation.ids(self.ids, call))

        return self._added(adding, zeros=True)
