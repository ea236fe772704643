"""Adapters on whole models: attach, activate, save, load, merge, export, and say what was done."""

from peftrt.adapters.activation import active_adapters, adapter_names, remove, rows, set_active
from peftrt.adapters.attach import adapt
from peftrt.adapters.combining import add_weighted_adapter
from peftrt.adapters.configs.bottleneck import BottleneckConfig
from peftrt.adapters.configs.conventional import FeatureExtraction, FullFineTuning, OutputLayer
from peftrt.adapters.configs.ia3 import IA3Config
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.adapters.configs.virtual_tokens import PrefixTuningConfig, PromptTuningConfig
from peftrt.adapters.explaining import Explanation, SiteChoice, explain
from peftrt.adapters.exporting import export
from peftrt.adapters.fusing import fuse
from peftrt.adapters.hotswapping import hotswap
from peftrt.adapters.io import load, save
from peftrt.adapters.merging import merge, unmerge
from peftrt.adapters.report import AdaptedSite, AdaptReport
from peftrt.adapters.source import empty_weights

__all__ = [
    "AdaptReport",
    "AdaptedSite",
    "BottleneckConfig",
    "Explanation",
    "FeatureExtraction",
    "FullFineTuning",
    "IA3Config",
    "LoraConfig",
    "OutputLayer",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SiteChoice",
    "active_adapters",
    "adapt",
    "adapter_names",
    "add_weighted_adapter",
    "empty_weights",
    "explain",
    "export",
    "fuse",
    "hotswap",
    "load",
    "merge",
    "remove",
    "rows",
    "save",
    "set_active",
    "unmerge",
]
