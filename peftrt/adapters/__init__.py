"""Adapters on whole models: attach, activate, save, load, merge, export, and say what was done."""

from peftrt.adapters.active import active, adapters, remove, rows, set_active
from peftrt.adapters.attach import adapt
from peftrt.adapters.configs import LoraConfig
from peftrt.adapters.explain import Explanation, SiteChoice, explain
from peftrt.adapters.export import export
from peftrt.adapters.io import load, save
from peftrt.adapters.merge import merge, unmerge
from peftrt.adapters.report import AdaptedSite, AdaptReport
from peftrt.adapters.source import empty_weights

__all__ = [
    "AdaptReport",
    "AdaptedSite",
    "Explanation",
    "LoraConfig",
    "SiteChoice",
    "active",
    "adapt",
    "adapters",
    "empty_weights",
    "explain",
    "export",
    "load",
    "merge",
    "remove",
    "rows",
    "save",
    "set_active",
    "unmerge",
]
