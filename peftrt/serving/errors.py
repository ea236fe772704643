"""What an adapter pool raises; bad names, files and configurations raise what ``peftrt.load`` raises for them."""

from __future__ import annotations


class PoolError(RuntimeError):
    """A pool cannot do what was asked; nothing is half-changed."""


class UnknownAdapterError(PoolError, KeyError):
    """No adapter of that name is loaded; the base is never served in its place."""

    # a KeyError shows its argument's repr
    __str__ = RuntimeError.__str__


class PoolBusyError(PoolError):
    """No room now: what is on the device is pinned or in flight. The same call may succeed later."""


class AdapterTooLargeError(PoolError):
    """The adapter, or all of one batch together, can never fit into the pool as it was made."""


class AdapterChangedError(PoolError):
    """An adapter's files are not those that were loaded; nothing is served in their place."""


class QuotaError(PoolError):
    """A tenant would have more than it may.

    Attributes:
        tenant: whose quota.
        limit: the field of the quota: "device_bytes", "adapters" or "rank".
        allowed: its value.
        asked: what there would be.
    """

    def __init__(self, tenant: str | None, limit: str, allowed: int, asked: int, name: str) -> None:
        of = "adapters without a tenant" if tenant is None else f"tenant {tenant!a}"
        super().__init__(f"load: adapter {name!a}: {of} may have {limit} = {allowed}, would have {asked}")
        self.tenant, self.limit, self.allowed, self.asked = tenant, limit, allowed, asked


class UnloadTimeoutError(PoolError, TimeoutError):
    """An unloaded adapter is still in flight: no new batch gets it, and it is freed when the last one ends."""


class PoolClosedError(PoolError):
    """The pool was closed."""
