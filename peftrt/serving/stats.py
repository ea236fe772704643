"""What a pool holds and has done, for programs, people and Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

_PREFIX = "peftrt_pool_"


def _counted(text: str) -> Any:
    return field(metadata={"text": text, "kind": "counter"})


def _now(text: str) -> Any:
    return field(metadata={"text": text, "kind": "gauge"})


@dataclass(frozen=True)
class PoolStats:
    """A pool at one moment; what is counted begins with the pool.

    The fields' meanings are the help texts of :meth:`prometheus`; sizes are in bytes, times in seconds.
    """

    adapters_known: int = _now("Adapters that are loaded, wherever they are.")
    adapters_on_host: int = _now("Adapters in host memory.")
    adapters_on_device: int = _now("Adapters on the device, unloaded ones that are still in flight included.")
    pinned: int = _now("Adapters that stay on the device.")
    in_flight: int = _now("Adapters that open batches use.")
    batches: int = _now("Open batches.")
    device_bytes_used: int = _now("Bytes of the slab that adapters take.")
    device_bytes_free: int = _now("Bytes of the slab that no adapter takes.")
    device_bytes_largest_hole: int = _now("Bytes of the largest free range of the slab.")
    host_bytes_used: int = _now("Bytes of host memory that adapters take.")
    hits: int = _counted("Adapters wanted by batches that were on the device.")
    loads: int = _counted("Adapters brought to the device.")
    evictions: int = _counted("Adapters that left the device to make room.")
    host_evictions: int = _counted("Adapters that left host memory to make room.")
    reloads_from_disk: int = _counted("Adapters read from disk again.")
    rejected_busy: int = _counted("Calls that found no room.")
    rejected_quota: int = _counted("Loads beyond a quota.")
    load_count: int = _counted("Times that adapters were brought to the device for a batch or a pin.")
    load_seconds_sum: float = _counted("Seconds that took in all, reading from disk included.")
    load_seconds_max: float = _now("The longest of them.")

    def as_dict(self) -> dict[str, int | float]:
        """Field -> value."""
        return asdict(self)

    def prometheus(self) -> str:
        """The text format of a metrics endpoint (version 0.0.4)."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        for name, about in self.__dataclass_fields__.items():
            kind = about.metadata["kind"]
            metric = _PREFIX + name + ("_total" if kind == "counter" else "")
            yield f"# HELP {metric} {about.metadata['text']}"
            yield f"# TYPE {metric} {kind}"
            yield f"{metric} {getattr(self, name)}"

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.as_dict().items())
