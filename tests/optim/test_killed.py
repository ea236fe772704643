"""A training that is killed twenty times, also in the middle of saving, ends with the bits of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from tests.optim import killed
from tests.optim.stateful import bits_of


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_twenty_times_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, killed.__file__, str(tmp_path), "1"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["lives"]) == killed.LIVES
    assert told["steps"] > 0
    once, often = (safetensors.torch.load_file(tmp_path / name) for name in ("whole.safetensors", killed.CHECKPOINT))
    assert {"state.0.exp_avg_q", "state.1.exp_avg", "extra.0.weight"} <= once.keys()
    assert bits_of(often) == bits_of(once)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / killed.CHECKPOINT).read_bytes()
    left = {path.name for path in tmp_path.iterdir()} - {"whole.safetensors", killed.CHECKPOINT}
    assert all(name.startswith(".tmp-") for name in left)
    assert left, "no life ended in the middle of a save"
