"""Many adapters behind one model: a pool of them on the device, in host memory and on disk."""

from peftrt.serving.errors import (
    AdapterChangedError,
    AdapterTooLargeError,
    PoolBusyError,
    PoolClosedError,
    PoolError,
    QuotaError,
    UnknownAdapterError,
    UnloadTimeoutError,
)
from peftrt.serving.pool import AdapterPool
from peftrt.serving.quota import Quota
from peftrt.serving.stats import PoolStats

__all__ = [
    "AdapterChangedError",
    "AdapterPool",
    "AdapterTooLargeError",
    "PoolBusyError",
    "PoolClosedError",
    "PoolError",
    "PoolStats",
    "Quota",
    "QuotaError",
    "UnknownAdapterError",
    "UnloadTimeoutError",
]
