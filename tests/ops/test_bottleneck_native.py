"""What the native functions of bottleneck refuse, past the operation's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftrt.ops import _native

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=f"native kernels: {_native.load()}")

X, D, U = torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8, 3)
FORWARD: dict[str, Any] = {
    "x": X,
    "residual": X,
    "down_weight": D,
    "down_bias": torch.zeros(3),
    "up_weight": U,
    "up_bias": torch.zeros(8),
    "scaling": 1.0,
    "activation": 0,
}
BACKWARD: dict[str, Any] = {"dy": X, "x": X, "inner": torch.zeros(2, 3), "up_weight": U, "scaling": 1.0}
BACKWARD |= {"activation": 0, "needs_down": True, "needs_up": True}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("residual must be", {"residual": X[:, 1:]}),
        ("residual must be", {"residual": X.half()}),
        ("residual must be of x's shape", {"residual": X[:1]}),
        ("x must be float32", {"x": X.double(), "residual": X.double()}),
        ("down_weight must be", {"down_weight": D[:, 1:]}),
        ("down_weight must be float32", {"down_weight": D.double()}),
        ("down_bias must be", {"down_bias": torch.zeros(4)}),
        ("down_bias must be", {"down_bias": torch.zeros(3, 1)}),
        ("up_weight must be", {"up_weight": D}),
        ("up_weight must be float32", {"up_weight": U.int()}),
        ("up_bias must be", {"up_bias": torch.zeros(3)}),
        ("activation must be", {"activation": 7}),
        ("activation must be", {"activation": -1}),
    ],
)
def test_a_bad_adapter_is_refused(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"bottleneck: {message}"):
        torch.ops.peftrt_cpu.bottleneck(*(FORWARD | change).values())


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("dy must be", {"dy": X[:, 1:]}),
        ("dy must be", {"dy": X.half()}),
        ("x must be float32", {"x": X.double(), "dy": X.double()}),
        ("inner must be", {"inner": torch.zeros(2, 4)}),
        ("inner must be", {"inner": torch.zeros(3, 3)}),
        ("inner must be", {"inner": torch.zeros(2, 3).half()}),
        ("up_weight must be", {"up_weight": D}),
        ("activation must be", {"activation": 9}),
    ],
)
def test_a_bad_gradient_is_refused(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"bottleneck_gradient: {message}"):
        torch.ops.peftrt_cpu.bottleneck_gradient(*(BACKWARD | change).values())


def test_the_good_arguments_pass() -> None:
    assert [t.shape for t in torch.ops.peftrt_cpu.bottleneck(*FORWARD.values())] == [(2, 8), (2, 3)]
    shapes = [(2, 3), (3, 8), (3,), (8, 3), (8,)]
    assert [t.shape for t in torch.ops.peftrt_cpu.bottleneck_gradient(*BACKWARD.values())] == shapes
