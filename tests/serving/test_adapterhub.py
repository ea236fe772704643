"""A pool serves what AdapterHub saved, and reads it from disk again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftrt.formats.errors import UnsupportedError
from peftrt.serving import AdapterChangedError, AdapterPool
from tests.fixtures.adapterhub.models import build, logits

pytest.importorskip("transformers")

FIXTURES = Path(__file__).parent.parent / "fixtures" / "adapterhub" / "llama"


def test_adapters_of_adapterhub_take_turns(tmp_path: Path) -> None:
    for case in ("lora", "lora_qkv"):
        shutil.copytree(FIXTURES / case, tmp_path / case)
    model = build("llama")
    # room for one of them, and none on the host: each is read from disk when its turn comes
    pool = AdapterPool(model, device_budget="24KiB", host_budget=1, max_adapters=4, max_rank=8, root=tmp_path)
    for case in ("lora", "lora_qkv"):
        pool.load(case, tmp_path / case)
    wanted = load_file(FIXTURES / "expected.safetensors")
    for case in ("lora", "lora_qkv", "lora"):
        with pool.batch([case, None, case]):
            served = logits(model, "llama")
        for rows, expected, first in zip(served.split((8, 5, 5)), (case, "base", case), (0, 8, 13), strict=True):
            assert torch.allclose(rows, wanted[expected][first : first + len(rows)], atol=1e-6, rtol=0)
    assert pool.stats().adapters_on_device == 1
    config = tmp_path / "lora_qkv" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "config": {**values["config"], "alpha": 5}}))
    with pytest.raises(AdapterChangedError, match="lora_qkv"), pool.batch(["lora_qkv"] * 3):
        logits(model, "llama")


def test_a_bottleneck_is_not_served() -> None:
    pool = AdapterPool(build("llama"), device_budget="1MiB", host_budget="1MiB", max_adapters=4, max_rank=8)
    with pytest.raises(UnsupportedError, match="seq_bn"):
        pool.load("bottleneck", FIXTURES / "seq_bn")
