"""The operations: one signature each, served by the backend that fits the call."""

from peftrt.ops._adamw_step import adamw_step
from peftrt.ops._adapter_table import AdapterTable, SlotAdapter
from peftrt.ops._addresses import CHUNK, DTYPE_CODES, Gradients
from peftrt.ops._backend import BackendError, backend
from peftrt.ops._bottleneck import bottleneck
from peftrt.ops._dora import dora_scale
from peftrt.ops._dropout import dropout
from peftrt.ops._gradient_norm import gradient_norm
from peftrt.ops._ia3_linear import ia3_linear
from peftrt.ops._invariant import batch_invariant
from peftrt.ops._lora_linear import lora_linear
from peftrt.ops._lora_weight_norm import lora_weight_norm
from peftrt.ops._multi_lora_linear import multi_lora_linear
from peftrt.ops._nf4_dequantize import nf4_dequantize
from peftrt.ops._nf4_linear import nf4_linear
from peftrt.ops._nf4_quantize import nf4_quantize
from peftrt.ops._row_scale_gradient import row_scale_gradient
from peftrt.ops._scratch import release_scratch
from peftrt.reference.bottleneck import ACTIVATIONS

BOTTLENECK_ACTIVATIONS = tuple(ACTIVATIONS)

__all__ = [
    "BOTTLENECK_ACTIVATIONS",
    "CHUNK",
    "DTYPE_CODES",
    "AdapterTable",
    "BackendError",
    "Gradients",
    "SlotAdapter",
    "adamw_step",
    "backend",
    "batch_invariant",
    "bottleneck",
    "dora_scale",
    "dropout",
    "gradient_norm",
    "ia3_linear",
    "lora_linear",
    "lora_weight_norm",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "release_scratch",
    "row_scale_gradient",
]
