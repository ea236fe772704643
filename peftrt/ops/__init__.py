"""The operations: one signature each, served by the backend that fits the call."""

from peftrt.ops._backend import BackendError, backend
from peftrt.ops._dropout import dropout
from peftrt.ops._lora_linear import lora_linear
from peftrt.ops._multi_lora_linear import AdapterTable, multi_lora_linear
from peftrt.ops._nf4_dequantize import nf4_dequantize
from peftrt.ops._nf4_linear import nf4_linear
from peftrt.ops._nf4_quantize import nf4_quantize
from peftrt.ops._scratch import release_scratch

__all__ = [
    "AdapterTable",
    "BackendError",
    "backend",
    "dropout",
    "lora_linear",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "release_scratch",
]
