"""How the adapters of a table lie in memory: what peftrt.ops.AdapterTable, its reference and the pool go by."""

from __future__ import annotations

# Ranks of a page: what an adapter's rank is rounded up to. Stands in kernels/_slots.py and in csrc, too.
PAGE = 8
# The columns of vector_starts.
X_SCALE, Y_SCALE, BIAS = range(3)
