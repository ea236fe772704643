"""Drop-in modules: an nn.Linear's signature, then the adapter's."""

from peftrt.nn.adapter import Adapter
from peftrt.nn.adapter_linear import AdapterLinear
from peftrt.nn.bottleneck import Bottleneck
from peftrt.nn.features import Features, FeatureStats
from peftrt.nn.holder import AdapterHolder
from peftrt.nn.hooked import HookedAdapters
from peftrt.nn.ia3 import IA3Adapter
from peftrt.nn.ia3_linear import IA3Linear
from peftrt.nn.lora_embedding import LoRAEmbedding
from peftrt.nn.lora_linear import LoRALinear, QLoRALinear
from peftrt.nn.nf4_linear import NF4Linear
from peftrt.nn.routing import AdapterSet, Routing, routed
from peftrt.nn.whole import WholeModel

__all__ = [
    "Adapter",
    "AdapterHolder",
    "AdapterLinear",
    "AdapterSet",
    "Bottleneck",
    "FeatureStats",
    "Features",
    "HookedAdapters",
    "IA3Adapter",
    "IA3Linear",
    "LoRAEmbedding",
    "LoRALinear",
    "NF4Linear",
    "QLoRALinear",
    "Routing",
    "WholeModel",
    "routed",
]
