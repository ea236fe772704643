"""What a tenant may have in a pool."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from peftrt.serving.entry import Entry
from peftrt.serving.errors import QuotaError


@dataclass(frozen=True)
class Quota:
    """Limits of one tenant; None: no limit.

    Attributes:
        device_bytes: that all of its loaded adapters would take on the device together.
        adapters: loaded at once.
        rank: the largest of an adapter.
    """

    device_bytes: int | None = None
    adapters: int | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"quota: {name} must be an integer of at least 0 or None, got {value!r}")

    def check(self, tenant: str | None, name: str, *, device_bytes: int, adapters: int, rank: int) -> None:
        """Raise QuotaError where a tenant would have more than it may once it has the adapter ``name``."""
        for limit, asked in (("rank", rank), ("adapters", adapters), ("device_bytes", device_bytes)):
            allowed = getattr(self, limit)
            if allowed is not None and asked > allowed:
                raise QuotaError(tenant, limit, allowed, asked, name)


class Usage:
    """What tenants have loaded, held against their quotas; the pool's lock is around it.

    Args:
        default: of tenants that are not in ``quotas``, and of adapters without a tenant together.

    Attributes:
        quotas: tenant -> quota.
        rejected: how many loads were refused.
    """

    def __init__(self, default: Quota) -> None:
        self.quotas: dict[str, Quota] = {}
        self.rejected = 0
        self._default = default
        self._adapters: Counter[str | None] = Counter()
        self._bytes: Counter[str | None] = Counter()

    def check(self, entry: Entry, before: Entry | None) -> None:
        """Raise QuotaError unless the tenant may have the entry in place of ``before``."""
        tenant = entry.tenant
        quota = self._default if tenant is None else self.quotas.get(tenant, self._default)
        own = before if before is not None and before.tenant == tenant else None
        adapters = self._adapters[tenant] + 1 - (own is not None)
        nbytes = self._bytes[tenant] + entry.nbytes - (own.nbytes if own else 0)
        try:
            quota.check(tenant, entry.name, device_bytes=nbytes, adapters=adapters, rank=entry.rank)
        except QuotaError:
            self.rejected += 1
            raise

    def add(self, entry: Entry) -> None:
        """The tenant has it."""
        self._adapters[entry.tenant] += 1
        self._bytes[entry.tenant] += entry.nbytes

    def remove(self, entry: Entry) -> None:
        """The tenant has it no more."""
        self._adapters[entry.tenant] -= 1
        self._bytes[entry.tenant] -= entry.nbytes
        if not self._adapters[entry.tenant]:
            del self._adapters[entry.tenant], self._bytes[entry.tenant]
