"""Use an installed peftrt from outside its checkout: ``python smoke.py CHECKOUT``."""

import sys
from pathlib import Path

import torch

import peftrt

checkout = Path(sys.argv[1]).resolve()
assert checkout not in Path(peftrt.__file__).resolve().parents, f"imported from the checkout: {peftrt.__file__}"

import peftrt.kernels  # noqa: E402  the Triton kernels are part of the package

layer = peftrt.QLoRALinear(96, 64, r=4, lora_alpha=8, init=False)
x = torch.randn(3, 96, requires_grad=True)
with peftrt.backend(nf4_linear="native", nf4_linear_dx="native", lora_linear="native"):
    y = layer(x)
    y.square().sum().backward()
with peftrt.backend("reference"):
    expected = layer(x)
torch.testing.assert_close(y, expected)
assert layer.lora_A.grad is not None
print(f"peftrt {peftrt.__version__} from {Path(peftrt.__file__).parent}: native kernels agree with the reference")
