"""Optimizers: their groups, and AdamW with its state in pages."""

from peftrt.optim.paged_adamw import PagedAdamW, PagedStats, PoisonedError
from peftrt.optim.param_groups import param_groups

__all__ = ["PagedAdamW", "PagedStats", "PoisonedError", "param_groups"]
