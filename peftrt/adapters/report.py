"""What adapt did to a model: for people by ``print``, for programs by fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from peftrt.adapters.configs.base import AdapterConfig
from peftrt.adapters.explaining import SiteChoice, collapse
from peftrt.adapters.plan import Plan
from peftrt.adapters.state import ModelAdapters
from peftrt.nn import AdapterLinear, NF4Linear, QLoRALinear


@dataclass(frozen=True)
class AdaptedSite:
    """One module that holds the adapter.

    Attributes:
        path: in the model.
        in_features, out_features: K and N.
        r, scaling: of the adapter; None where it has none.
        storage: of the base: ``"nf4"``, or the dtype's name; empty where the adapter acts on no weight.
        note: why the base is dense although it was to be quantised; empty otherwise.
        choice: the operation and backend that serve it.
    """

    path: str
    in_features: int
    out_features: int
    r: int | None
    scaling: float | None
    storage: str
    note: str
    choice: SiteChoice


@dataclass(frozen=True)
class AdaptReport:
    """What :func:`peftrt.adapt` did.

    Attributes:
        name, config: of the adapter.
        sites: modules that hold it.
        saved: paths of the modules trained whole.
        left_out: linear modules without an adapter -> why.
        trainable: numbers that are trained.
        total: numbers in the model, a 4-bit weight counted as one.
        bytes_before, bytes_after: of the model's Parameters and buffers.
    """

    name: str
    config: AdapterConfig
    sites: tuple[AdaptedSite, ...]
    saved: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def trainable_share(self) -> float:
        """In 0 ... 1."""
        return self.trainable / self.total if self.total else 0.0

    @property
    def matched(self) -> tuple[str, ...]:
        """Paths of the adapted modules."""
        return tuple(site.path for site in self.sites)

    def __str__(self) -> str:
        lines = [f"adapter {self.name!r}: {len(self.sites)} modules adapted"]
        groups: dict[tuple[str, int, int, int | None, str, str, str], list[str]] = {}
        for site in self.sites:
            served = f"{site.choice.op} by {site.choice.backend}"
            key = (collapse(site.path), site.in_features, site.out_features, site.r, site.storage, site.note, served)
            groups.setdefault(key, []).append(site.path)
        rows: list[tuple[str, ...]] = [("module", "count", "shape", "rank", "base", "kernel")]
        notes = []
        for (path, k, n, r, storage, note, served), paths in groups.items():
            rows.append((path, f"{len(paths)}x", f"{n} x {k}", "" if r is None else str(r), storage, served))
            if note:
                notes.append(f"  dense: {path}: {note}")
        lines += table(rows) if self.sites else []
        lines += notes
        if self.saved:
            lines.append(f"  trained whole: {', '.join(self.saved)}")
        for path, reason in group_by_pattern(self.left_out).items():
            lines.append(f"  not adapted: {path}: {reason}")
        lines.append(f"  trainable: {self.trainable:,} of {self.total:,} ({self.trainable_share:.3%})")
        lines.append(f"  bytes: {readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)}")
        return "\n".join(lines)


def make_report(
    model: nn.Module, state: ModelAdapters, name: str, plan: Plan, sites: Iterable[AdaptedSite], bytes_before: int
) -> AdaptReport:
    """Look at a model that has just been adapted."""
    order = {path: position for position, (path, _) in enumerate(model.named_modules())}
    ordered = tuple(sorted(sites, key=lambda site: order[site.path]))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return AdaptReport(
        name, state.configs[name], ordered, tuple(plan.saved), dict(plan.left_out), trainable, count(model),
        bytes_before, model_bytes(model),
    )  # fmt: skip


def storage_of(layer: AdapterLinear) -> str:
    """How a layer's base weight is stored, in a word."""
    return "nf4" if isinstance(layer, QLoRALinear) else str(layer.weight.dtype).removeprefix("torch.")


def dense_note(plan: Plan, state: ModelAdapters, path: str) -> str:
    """Why a layer's weight is dense although weights are to be quantised; empty otherwise."""
    return plan.dense.get(path, "") if state.storage is not None and state.storage["quantize"] else ""


def count(model: nn.Module) -> int:
    """Numbers in a model: codes of a quantised weight count as weights, its scales not at all."""
    total, seen = 0, set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, NF4Linear) and name.startswith("weight"):
                total += module.in_features * module.out_features if name == "weight" else 0
            else:
                total += parameter.numel()
    return total


def model_bytes(model: nn.Module) -> int:
    """Bytes of Parameters and buffers, shared ones once; of those without data, as if they had it."""
    tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    storages = {}
    for tensor in tensors:
        # by where they begin: parts of one storage are tensors of their own
        storages[id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr(), tensor.nbytes)] = tensor.nbytes
    return sum(storages.values())


def group_by_pattern(reasons: dict[str, str]) -> dict[str, str]:
    """Like modules of all layers as one entry."""
    groups: dict[tuple[str, str], int] = {}
    for path, reason in reasons.items():
        key = (collapse(path), reason)
        groups[key] = groups.get(key, 0) + 1
    return {f"{path} ({number}x)" if number > 1 else path: reason for (path, reason), number in groups.items()}


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows in aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def readable_bytes(number: int) -> str:
    """``1.5 GiB``."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
