"""peftrt: the kernel-accelerated runtime for parameter-efficient fine-tuning and multi-tenant adapter serving."""

from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import BackendError, backend

__version__ = "0.1.0"
__all__ = ["BackendError", "NF4Weight", "backend", "ops"]
