"""What each device is to reach: one list a class of devices. ``judging.py`` holds results against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bench.shapes import (
    BOTTLENECKS,
    ENCODER,
    FLAT_GPU,
    GPU_ROWS,
    GPU_SITES,
    LLAMA_8B,
    LORA_TENSORS,
    SMALLEST_SIDE,
    Site,
)

FLOOR = "the floor"  # what the device's own ceilings allow for the cell's bytes and operations


@dataclass(frozen=True)
class Mark:
    """``at_least`` times as fast as ``versus``, or a time of ``at_most`` times its plus ``plus_us`` microseconds; with
    ``memory``, a peak of memory of ``at_most`` times its; with ``added``, that of what each takes beyond its own base.

    Against ``FLOOR``, ``at_least`` is the share of its speed, ``at_most`` the multiple of its time; it holds for floors
    of ``floor_us`` and more. Several names in ``versus`` are the fastest of them. With ``plus_bytes``, a formula, the
    peer's time also has that of these bytes at the measured bandwidth. With ``mean`` it is the geometric mean over the
    cells that is judged.

    ``part`` may be a pattern. ``rows`` are the values of M that it holds for; with ``and_up`` the first of them and all
    above; empty for any. ``sites`` are the weights; None for all whose sides are long enough. ``everywhere`` marks ask
    the same of every cell: they do not say which cells matter most.
    """

    op: str
    part: str
    dtype: str
    rows: tuple[int, ...]
    versus: str | tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    plus_us: float = 0.0
    and_up: bool = False
    sites: tuple[Site, ...] | None = None
    everywhere: bool = False
    memory: bool = False
    added: bool = False
    plus_bytes: str = ""
    mean: bool = False
    floor_us: float = 0.0

    @property
    def peers(self) -> tuple[str, ...]:
        """The contenders that it names."""
        return (self.versus,) if isinstance(self.versus, str) else self.versus

    def covers(self, op: str, cell: Mapping[str, Any]) -> bool:
        """Whether the mark speaks of this cell."""
        if (self.op, self.dtype) != (op, cell["dtype"]) or not fnmatchcase(cell["part"], self.part):
            return False
        # before a cell is measured its floor is not known
        if cell.get("floor_ms", self.floor_us / 1e3) * 1e3 < self.floor_us:
            return False
        if self.sites is None and min(cell["N"], cell["K"]) < SMALLEST_SIDE:
            return False
        if self.sites is not None and (cell["N"], cell["K"]) not in self.sites:
            return False
        M = cell.get("M", 0)
        return not self.rows or M in self.rows or (self.and_up and self.rows[0] <= M)

    @property
    def where(self) -> str:
        """The cells that the mark speaks of."""
        rows = "" if self.everywhere else "/".join(str(M) for M in self.rows)
        name = f"{self.part}-{self.dtype}" + (f"-M{rows}" if rows else "") + ("+" if self.and_up else "")
        few = self.sites is not None and len(self.sites) <= 3
        return f"{name}, {' '.join(map(str, self.sites or ()))}" if few else name

    def __str__(self) -> str:
        peer = " / ".join(self.peers)
        if self.versus == FLOOR and self.at_least is not None:
            return f">= {self.at_least:.0%} of {FLOOR}" + (f" from {self.floor_us:g} µs" if self.floor_us else "")
        if self.at_least is not None:
            return f">= {self.at_least:g}x {peer}" + (" in the geometric mean" if self.mean else "")
        if self.memory:
            return f"<= {self.at_most:g}x the memory of {peer}"
        if self.added:
            return f"<= {self.at_most:g}x what {peer} adds"
        if self.plus_bytes:
            return f"<= {self.at_most:g}x ({peer} + {self.plus_bytes} bytes)"
        return f"<= {self.at_most:g}x {peer}" + (f" + {self.plus_us:g} µs" if self.plus_us else "")


def _linear(part: str, dtype: str, M: int, bitsandbytes: float, dense: float) -> tuple[Mark, Mark]:
    return (
        Mark("nf4_linear", part, dtype, (M,), "bitsandbytes", at_least=bitsandbytes),
        Mark("nf4_linear", part, dtype, (M,), "torch", at_least=dense),
    )


def _lora_overhead(dtype: str) -> Iterable[Mark]:
    """What an adapter may add to its base."""
    for base in ("nf4", "dense"):
        yield Mark("lora_linear", f"{base}-forward", dtype, (512,), "base", at_most=1.05, plus_us=5, and_up=True)
        yield Mark("lora_linear", f"{base}-train", dtype, (), "base", at_most=1.1)
        yield Mark("lora_linear", f"{base}-dora", dtype, (), "lora", at_most=1.15)


def _ia3_overhead(dtype: str) -> Iterable[Mark]:
    """What factors may add to their base."""
    for part in ("nf4-*", "dense-*"):
        yield Mark("ia3_linear", part, dtype, (1, 16, 512), "base", at_most=1.05)


def _bottleneck(dtype: str) -> Iterable[Mark]:
    """What one kernel saves of torch's passes."""
    yield Mark("bottleneck", "forward", dtype, (16, 512), "torch", at_most=0.8, sites=BOTTLENECKS)


def _multi_lora_cpu() -> Iterable[Mark]:
    """What it costs that the adapters differ, and what adapters cost at all."""
    op = "multi_lora_linear"
    for base, peer in (("nf4", "peft+bitsandbytes"), ("dense", "peft")):
        for rank in (8, 16):
            part = f"{base}-distinct-r{rank}-e64"
            yield Mark(op, part, "fp32", (32,), "one adapter", at_most=1.25)
            yield Mark(op, part, "fp32", (32,), peer, at_most=0.2, added=True)


KERNELS = ("vllm", "sglang triton_v2", "sglang csgmv")


def _multi_lora_gpu() -> Iterable[Mark]:
    """Against the bare base, the servers' kernels, a loop and the memory. ``none`` is the adapters' share alone."""
    op, adapters = "multi_lora_linear", "s*T*(N + K)"
    yield Mark(op, "nf4-distinct-r16-e8", "bf16", (8,), "base", at_most=1.2, plus_bytes=adapters)
    yield Mark(op, "dense-distinct-r16-e8", "bf16", (8,), "base", at_most=1.1, plus_bytes=adapters)
    yield Mark(op, "nf4-distinct-r16-e8", "bf16", (8,), "bitsandbytes+vllm", at_least=3)
    for slots in (64, 128):
        yield Mark(op, f"none-distinct-r*-e{slots}", "bf16", (32, 128), "loop", at_least=10, sites=GPU_SITES)
    on_all: dict[str, Any] = {"sites": GPU_SITES, "everywhere": True}
    yield Mark(op, "none-*", "bf16", (), KERNELS, at_least=1.5, mean=True, **on_all)
    for base in ("none", "dense"):
        yield Mark(op, f"{base}-*", "bf16", (), KERNELS, at_least=0.95, **on_all)
    yield Mark(op, "none-*", "bf16", (), FLOOR, at_least=0.65, floor_us=10, **on_all)


def _paged_adamw(device: str) -> Iterable[Mark]:
    """Everything resident, on many small tensors and on one large one; paged, against what the copies allow. In bf16
    torch's state is half as large: its fused AdamW is a mark for parameters in fp32 alone.
    """
    op, part = "paged_adamw", "32bit-resident"
    yield Mark(op, part, "fp32", (), "torch", at_most=0.9, sites=(LORA_TENSORS,))
    if device == "cpu":
        return
    yield Mark(op, part, "fp32", (), "torch", at_most=1.05, sites=(FLAT_GPU,))
    for dtype in ("fp32", "bf16"):
        yield Mark(op, part, dtype, (), "bitsandbytes paged", at_least=3, sites=(LORA_TENSORS,))
    for dtype in ("fp32", "bf16"):
        yield Mark(op, "*-rho*", dtype, (), FLOOR, at_most=1.15, sites=(LORA_TENSORS, FLAT_GPU))


CPU = (
    *_linear("forward", "fp32", 1, 42, 3.6),
    *_linear("forward", "fp32", 4, 25, 5.5),
    *_linear("forward", "fp32", 16, 9, 2.1),
    *_linear("forward", "fp32", 64, 4, 1.35),
    *_linear("forward", "fp32", 512, 1.3, 1.1),
    *_linear("forward", "bf16", 512, 7, 7),
    *_linear("dx", "fp32", 1, 25, 3),
    *_linear("dx", "fp32", 16, 7, 2),
    *_linear("dx", "fp32", 512, 1.3, 1.08),
    Mark("nf4_dequantize", "out", "fp32", (), "bitsandbytes", at_least=8),
    Mark("nf4_dequantize", "new", "fp32", (), "torch.zeros", at_most=1.2),
    *_lora_overhead("fp32"),
    Mark("lora_linear", "nf4-train", "fp32", (16,), "peft+bitsandbytes", at_least=3),
    Mark("lora_linear", "nf4-train", "fp32", (256,), "peft+bitsandbytes", at_least=1.5),
    Mark("train_step", "encoder", "fp32", (), "frozen", at_most=1.3, sites=(ENCODER,)),
    Mark("train_step", "encoder", "fp32", (), "peft+bitsandbytes", at_least=1.5, sites=(ENCODER,)),
    *_ia3_overhead("fp32"),
    *_bottleneck("fp32"),
    *_multi_lora_cpu(),
    *_paged_adamw("cpu"),
)


def _gpu_linear(
    part: str, rows: tuple[int, ...], dense: float | None, bitsandbytes: float | None, sites: tuple[Site, ...]
) -> Iterable[Mark]:
    for versus, at_least in (("torch", dense), ("bitsandbytes", bitsandbytes)):
        if at_least is not None:
            yield Mark("nf4_linear", part, "bf16", rows, versus, at_least=at_least, sites=sites)


# Sides of 8192 and up: one site, since no other has both.
LARGE = tuple(site for site in GPU_SITES if min(site) >= 8192)
# Where bitsandbytes 0.50 leaves its fused product for four launches at these M.
NARROW = tuple(site for site in GPU_SITES if site.N <= 4096)

# What holds on any GPU, whatever its ceilings.
GPU = (
    *(
        Mark("nf4_linear", part, "bf16", GPU_ROWS, "bitsandbytes", at_least=1.0, sites=GPU_SITES, everywhere=True)
        for part in ("forward", "dx")
    ),
    *_lora_overhead("bf16"),
    *_ia3_overhead("bf16"),
    *_bottleneck("bf16"),
)

# Hardest first: the first cells of a run that may be stopped are the first marks'.
H200 = (
    *_gpu_linear("forward", (1,), 2.8, 1.4, LARGE),
    *_gpu_linear("forward", (1,), 3.3, None, LARGE),
    *_gpu_linear("forward", (8, 16, 32), 1.8, 3.0, NARROW),
    *_gpu_linear("forward", (16,), 2.5, 1.5, LARGE),
    *_gpu_linear("forward", (64,), 2.0, 2.0, GPU_SITES),
    *_gpu_linear("forward", (128,), 1.3, 1.4, GPU_SITES),
    *_gpu_linear("forward", (256,), 0.85, 1.4, GPU_SITES),
    *_gpu_linear("forward", (2048,), 0.9, 1.05, GPU_SITES),
    *_gpu_linear("dx", (2048,), 0.9, 1.05, GPU_SITES),
    *_gpu_linear("forward", (8192,), 0.95, 1.05, GPU_SITES),
    *_gpu_linear("dx", (8192,), 0.95, 1.05, GPU_SITES),
    Mark("nf4_dequantize", "out", "bf16", (), FLOOR, at_least=0.85, sites=GPU_SITES),
    Mark("nf4_dequantize", "out", "bf16", (), "bitsandbytes", at_least=1.4, sites=GPU_SITES),
    Mark("lora_linear", "nf4-train", "bf16", (2048,), "peft+bitsandbytes", at_least=1.4),
    Mark("lora_linear", "nf4-train", "bf16", (8192,), "peft+bitsandbytes", at_least=1.2),
    Mark("train_step", "llama-8b", "bf16", (), "peft+bitsandbytes", at_least=1.3, sites=(LLAMA_8B,)),
    Mark("train_step", "llama-8b", "bf16", (), "peft+bitsandbytes", at_most=0.9, sites=(LLAMA_8B,), memory=True),
    *_paged_adamw("gpu"),
    *_multi_lora_gpu(),
    *GPU,
)

MARKS: Mapping[str, tuple[Mark, ...]] = {"cpu": CPU, "gpu": GPU, "h200": H200}


def device_class(run: Mapping[str, Any]) -> str:
    """The key of ``MARKS`` for a run's environment, as a result file holds it."""
    if run["timer"] == "perf_counter":
        return "cpu"
    return "h200" if "H200" in run["device"] else "gpu"
