"""What a profiler sees of a step over NF4: one pass over the weight forward and one back, each result written once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import peftrt
from peftrt.ops import _native

pytestmark = pytest.mark.skipif(_native.load() is not None, reason="no native kernels")

# of the activations' or the weight's size, and arithmetic
PASSES = {"mm", "addmm", "matmul", "linear", "bmm", "sum", "copy_", "clone", "cat"}
PASSES |= {name + end for name in ("add", "sub", "mul", "div") for end in ("", "_")}
STEP = {"nf4_lora_linear": 1, "low_rank_gradient": 1, "nf4_lora_linear_dx": 1}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"bias": True}, {}),
        ({"lora_dropout": 0.3}, {"dropout": 1}),
        ({"use_dora": True, "lora_dropout": 0.3}, {"dropout": 1, "lora_weight_norm": 1, "row_scale_gradient": 1}),
    ],
    ids=str,
)
def test_one_pass_over_the_weight_each_way(options: dict[str, Any], more: dict[str, int]) -> None:
    layer = peftrt.QLoRALinear(256, 192, **{"bias": False, "r": 8, **options})
    torch.nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(40, 256, requires_grad=True), torch.randn(40, 192)
    layer(x).backward(dy)
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        layer(x).backward(dy)
    events = Counter(event.name for event in trace.events())
    own = {name.partition("::")[2]: count for name, count in events.items() if name.startswith("peftrt_cpu::")}
    assert own == STEP | more
    sizes = {name.removeprefix("aten::") for name in events if name.startswith("aten::")} & PASSES
    # a factor a row: m / ||W + s B A||, and its gradient
    assert sizes <= ({"div", "mul"} if "use_dora" in options else set()), sizes
