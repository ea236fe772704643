"""peftrt: the kernel-accelerated runtime for parameter-efficient fine-tuning and multi-tenant adapter serving."""

from pathlib import Path

# In a checkout the Triton kernels stand beside this package; an installed one holds them as peftrt.kernels.
# (Resolved: the package may be reached through a link that leaves the rest of the checkout off the path.)
if (Path(__file__).resolve().parent.parent / "kernels" / "_nf4.py").is_file():
    __path__.append(str(Path(__file__).resolve().parent.parent))

from peftrt import continual, nn, ops, optim, serving
from peftrt.adapters import (
    AdaptReport,
    BottleneckConfig,
    FeatureExtraction,
    FullFineTuning,
    IA3Config,
    LoraConfig,
    OutputLayer,
    PrefixTuningConfig,
    PromptTuningConfig,
    active_adapters,
    adapt,
    adapter_names,
    add_weighted_adapter,
    empty_weights,
    explain,
    export,
    fuse,
    hotswap,
    load,
    merge,
    remove,
    rows,
    save,
    set_active,
    unmerge,
)
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import Bottleneck, IA3Linear, LoRAEmbedding, LoRALinear, NF4Linear, QLoRALinear
from peftrt.ops import BackendError, backend, batch_invariant, release_scratch

__version__ = "0.1.0"
__all__ = [
    "AdaptReport",
    "BackendError",
    "Bottleneck",
    "BottleneckConfig",
    "FeatureExtraction",
    "FullFineTuning",
    "IA3Config",
    "IA3Linear",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "NF4Linear",
    "NF4Weight",
    "OutputLayer",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "QLoRALinear",
    "active_adapters",
    "adapt",
    "adapter_names",
    "add_weighted_adapter",
    "backend",
    "batch_invariant",
    "continual",
    "empty_weights",
    "explain",
    "export",
    "fuse",
    "hotswap",
    "load",
    "merge",
    "nn",
    "ops",
    "optim",
    "release_scratch",
    "remove",
    "rows",
    "save",
    "serving",
    "set_active",
    "unmerge",
]
