"""What an optimizer needs to know about adapters."""

from peftrt.optim.param_groups import param_groups

__all__ = ["param_groups"]
