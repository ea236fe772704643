"""Under FSDP2's mixed precision, which casts every floating Parameter on the way, codes and scales stay as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANK = """
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from peftrt.nn import QLoRALinear

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(QLoRALinear(64, 48, r=4, init=False), QLoRALinear(48, 64, r=4, init=False))
x = torch.randn(5, 64)
whole = [layer.nf4_weight().dequantize() for layer in model]
expected = model(x)
for layer in model:
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
assert model[0].weight.to_local().shape[0] == 24
y = model(x)
assert y.dtype == torch.bfloat16
error = ((y.float() - expected).norm() / expected.norm()).item()
assert error < 0.02, error
y.float().square().sum().backward()
assert all(layer.lora_B.grad is not None and layer.lora_B.grad.to_local().abs().sum() > 0 for layer in model)
model.unshard()
for layer, want in zip(model, whole):
    layer.unshard()
    assert torch.equal(layer.nf4_weight().dequantize(), want)
    assert layer.lora_A.dtype == torch.bfloat16  # floating Parameters were cast, so the policy was at work
print("ok")
"""


def test_codes_and_scales_survive_sharding_in_mixed_precision(tmp_path: Path) -> None:
    """Two processes, each with half of the rows."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, err
        assert out.strip() == "ok"
