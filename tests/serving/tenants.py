"""A model of two layers, adapters for it on disk, and what it must answer with each."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from peftrt.serving import AdapterPool
from peftrt.serving.slots import Slots
from tests.tolerances import assert_close

SIZES = {"first": (24, 16), "second": (16, 24)}
PREFIX = "base_model.model."


class Tower(nn.Module):
    """``second(tanh(first(x)))``."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, (n, k) in SIZES.items():
            linear = nn.Linear(k, n)
            for parameter in linear.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(k)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@dataclass(frozen=True)
class Tenant:
    """An adapter: its files, and its tensors by layer."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def weight(self, name: str, base: Tensor) -> Tensor:
        """The weight of a layer with the adapter, fp64."""
        key = f"{PREFIX}{name}.lora_A.weight"
        if key not in self.tensors:
            return base.double()
        A, B = self.tensors[key].double(), self.tensors[f"{PREFIX}{name}.lora_B.weight"].double()
        r, alpha = self.config["r"], self.config["lora_alpha"]
        whole = base.double() + B @ A * alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)
        magnitude = self.tensors.get(f"{PREFIX}{name}.lora_magnitude_vector")
        return whole if magnitude is None else whole * (magnitude.double() / whole.norm(dim=1))[:, None]


def write(path: Path, seed: int, r: int = 4, targets: Sequence[str] = tuple(SIZES), **config: Any) -> Tenant:
    """An adapter's directory as peft writes it, fast."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in targets:
        n, k = SIZES[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, k, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(n, r, generator=generator)
        if config.get("use_dora"):
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.rand(n, generator=generator) + 0.5
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2, "target_modules": list(targets), **config}
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
    (path / "adapter_config.json").write_text(json.dumps(config))
    return Tenant(path, tensors, config)


def some(folder: Path, count: int, **options: Any) -> dict[str, Tenant]:
    """Adapters "t0", "t1", ..."""
    return {f"t{i}": write(folder / str(i), seed=100 + i, **options) for i in range(count)}


def load_all(pool: Any, tenants: Mapping[str, Tenant], **options: Any) -> None:
    """Load each under its name."""
    for name, tenant in tenants.items():
        pool.load(name, tenant.path, **options)


def bytes_of(r: int, targets: Sequence[str] = tuple(SIZES)) -> int:
    """That an fp32 adapter takes on the device."""
    return sum(-(-r // 8) * 8 * sum(SIZES[name]) * 4 for name in targets)


def make_pool(adapters: float = 4, r: int = 4, **options: Any) -> AdapterPool:
    """Over a new Tower, ``pool.model``, with room for so many adapters of rank r."""
    model = Tower()
    defaults = {"device_budget": int(adapters * bytes_of(r)), "host_budget": "1GiB"}
    pool = AdapterPool(model, **{**defaults, **options})
    pool.model = model  # type: ignore[attr-defined]
    return pool


def inputs(batch: int, length: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


def expected(model: Any, tenants: Sequence[Tenant | None], x: Tensor) -> Tensor:
    """What each entry of the batch must give, fp64."""
    rows = []
    for tenant, row in zip(tenants, x.double(), strict=True):
        for name in SIZES:
            layer = getattr(model, name)
            weight = layer.weight.detach()
            weight = weight.double() if tenant is None else tenant.weight(name, weight)
            row = row @ weight.t() + layer.bias.detach().double()
            row = row.tanh() if name == "first" else row
        rows.append(row)
    return torch.stack(rows)


def serve(pool: Any, names: Sequence[str | None], x: Tensor | None = None, **options: Any) -> Tensor:
    x = inputs(len(names)) if x is None else x
    with torch.no_grad(), pool.batch(names, **options):
        return pool.model(x)


def check(pool: Any, tenants: dict[str, Tenant], names: Sequence[str | None], **options: Any) -> None:
    """Serve a batch; each row is its own adapter's."""
    x = inputs(len(names), seed=len(names))
    result = serve(pool, names, x, **options)
    wanted = expected(pool.model, [None if name is None else tenants[name] for name in names], x)
    assert_close(result, wanted, torch.float32, roundings=8)


def is_empty(slots: Slots) -> bool:
    """Whether nothing of any adapter is left on the device."""
    descriptors = [slots._ranks, slots._A_pages, slots._B_pages, slots._scaling]
    clean = not slots.slab.any() and not any(tensor.any() for tensor in descriptors)
    return clean and bool((slots._vectors == -1).all()) and slots.arena.used == 0


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start a call in a thread; the result waits for it, and has its value or raises its error."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(30)
        assert not thread.is_alive(), "the thread does not end"
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return result
