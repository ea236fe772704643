"""Reading and making the dense modules that peftrt's layers stand in for: ``nn.Linear``, and GPT-2's ``Conv1D``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.formats.nf4 import FLOAT_DTYPES

# What nn.Module keeps of a user's hooks; a layer that takes another's place takes them along.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class DenseSource:
    """A dense linear module, taken apart.

    Attributes:
        module: the module itself.
        transposed: its weight is stored [K, N], as Conv1D does.
        in_features, out_features: K and N.
    """

    module: nn.Module
    transposed: bool
    in_features: int
    out_features: int

    @property
    def weight(self) -> Tensor:
        """W as [N, K], a view."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.detach().t() if self.transposed else weight.detach()


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D, by its shape: a weight [K, N] and the attribute ``nf`` (= N)."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == module.nf


def unsuitable(module: nn.Module) -> str | None:
    """Why a layer of peftrt cannot take the module's place; None where it can."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{kind} belongs to nn.MultiheadAttention, which uses its weight without calling it"
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return f"{kind} has a forward of its own, which would be lost"
    elif isinstance(module, nn.modules.conv._ConvNd):
        return f"{kind} is a convolution; peftrt adapts linear layers and embeddings, convolutions are out of its scope"
    elif not is_conv1d(module):
        return f"{kind} is neither nn.Linear nor Conv1D"
    if hasattr(module, "parametrizations"):
        return f"{kind} is parametrised; remove the parametrisation first"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"{kind} has a weight of {module.weight.dtype}; fp32, bf16 and fp16 are supported"
    return None


def unsuitable_embedding(module: nn.Module) -> str | None:
    """Why an embedding of peftrt cannot take the module's place; None where it can."""
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding):
        return f"{kind} is no nn.Embedding"
    if type(module).forward is not nn.Embedding.forward:
        return f"{kind} has a forward of its own, which would be lost"
    if module.max_norm is not None:
        return f"{kind} has max_norm, which rewrites rows of the table as they are read; a frozen table must not change"
    if hasattr(module, "parametrizations"):
        return f"{kind} is parametrised; remove the parametrisation first"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"{kind} has a weight of {module.weight.dtype}; fp32, bf16 and fp16 are supported"
    return None


def read_dense(module: nn.Module) -> DenseSource:
    """Take an ``nn.Linear`` or Conv1D apart.

    Raises:
        TypeError: another kind of module, with the reason why it cannot be replaced.
    """
    reason = unsuitable(module)
    if reason is not None:
        raise TypeError(reason)
    weight: Any = module.weight
    transposed = not isinstance(module, nn.Linear)
    n, k = weight.shape[::-1] if transposed else weight.shape
    return DenseSource(module, transposed, k, n)


def make_dense(origin: type[nn.Module], weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    """A module of the class ``origin`` (nn.Linear, or a Conv1D) with W [N, K] and b [N], which it takes over."""
    n, k = weight.shape
    with torch.device("meta"):
        module = origin(n, k) if transposed else nn.Linear(k, n, bias=bias is not None)
    module.weight = nn.Parameter(weight.t().contiguous() if transposed else weight.contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hooks, the children and the training flag of the module whose place it takes."""
    new._modules.update(old._modules)  # what acts on the module from outside: a linear layer has none of its own
    for name in _HOOKS:
        getattr(new, name).update(getattr(old, name))
    new.train(old.training)
