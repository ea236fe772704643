"""A checkpoint, for the tests of what is done with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.optim.stateful import make, named

NAME = "state.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Of an optimizer with 8 bits, and its Parameters."""
    optimizer = make(bits=8)
    optimizer.save(tmp_path / NAME, extra=named(optimizer))
    return tmp_path / NAME
