"""Continual learning: keep what former tasks need (EWC), and rehearse them (replay)."""

from peftrt.continual.ewc import EWC
from peftrt.continual.replay import ReplayBuffer

__all__ = ["EWC", "ReplayBuffer"]
