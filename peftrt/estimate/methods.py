"""What each method trains, and what that makes autograd keep: counted, not allocated.

A layer has four inputs of linear modules: attention's, its output's, and the feed-forward network's first and second.
A frozen module keeps none of them for the backward; one whose weight is trained, or that an adapter stands on, does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftrt.adapters.configs.bottleneck import PLACEMENTS
from peftrt.estimate.shapes import Linear, Shape
from peftrt.finetune.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """Of the adapters: rank, maps to adapt, the bottleneck's reduction (None: its placement's), virtual tokens."""

    r: int = 16
    target_modules: tuple[str, ...] = ("all-linear",)
    reduction_factor: float | None = None
    virtual_tokens: int = 20


@dataclass(frozen=True)
class Trained:
    """What a method trains.

    Attributes:
        base: numbers of the model itself that are trained.
        added: numbers that are added to it.
        sites: linear modules that the method stands on: those that NF4 replaces where the base is quantised.
        keeps: of the inputs "attention" and "up" of a layer and of "down", those kept for the backward.
        extra: numbers that a token keeps in each layer beside them, in the adapters' dtype.
        extra_tokens: tokens that are put before each example.
        through_body: the gradient goes back through the layers; otherwise they keep nothing.
    """

    base: int
    added: int
    sites: tuple[Linear, ...]
    keeps: frozenset[str] = frozenset()
    extra: int = 0
    extra_tokens: int = 0
    through_body: bool = True


def trained(shape: Shape, method: str, sizes: Sizes) -> Trained:
    """What ``method`` trains of a model.

    Raises:
        UserError: a target that the model has not.
    """
    return METHODS[method](shape, sizes)


def _full(shape: Shape, sizes: Sizes) -> Trained:
    return Trained(shape.parameters, 0, (), frozenset({"attention", "up", "down"}))


def _lora(shape: Shape, sizes: Sizes) -> Trained:
    sites = _targets(shape, sizes.target_modules)
    rank = sizes.r
    return Trained(
        base=shape.head if shape.classes else 0,
        added=sum(rank * (linear.n + linear.k) for linear in sites),
        sites=sites,
        keeps=frozenset(_reads(linear, shape) for linear in sites),
        extra=rank * len(sites) // shape.layers,
    )


def _bottleneck(placement: str) -> Callable[[Shape, Sizes], Trained]:
    """W_up act(W_down x) with biases, at the placement's places; each keeps its input and both sides of act."""
    places = len(PLACEMENTS[placement].roles)

    def count(shape: Shape, sizes: Sizes) -> Trained:
        factor = sizes.reduction_factor or PLACEMENTS[placement].reduction_factor
        width = max(1, int(shape.hidden / factor))
        each = 2 * shape.hidden * width + width + shape.hidden
        kept = places * (shape.hidden + 2 * width)
        return Trained(_task_head(shape), shape.layers * places * each, shape.linears, extra=kept)

    return count


def _prefix(shape: Shape, sizes: Sizes) -> Trained:
    """A key and a value for each virtual token and layer."""
    added = sizes.virtual_tokens * 2 * shape.layers * shape.kv_size
    return Trained(_task_head(shape), added, shape.linears, extra=0)


def _prompt(shape: Shape, sizes: Sizes) -> Trained:
    """Rows of the embedding that stand before the text, and go through every layer."""
    added = sizes.virtual_tokens * shape.hidden
    return Trained(_task_head(shape), added, shape.linears, extra_tokens=sizes.virtual_tokens)


def _ia3(shape: Shape, sizes: Sizes) -> Trained:
    """Factors of keys, values and the feed-forward network's inner activations, each of which is kept."""
    each = 2 * shape.kv_size + shape.intermediate
    return Trained(_task_head(shape), shape.layers * each, shape.linears, extra=each)


def _head_alone(shape: Shape, sizes: Sizes) -> Trained:
    head = shape.head or shape.vocabulary * shape.hidden
    return Trained(head, 0, shape.linears, through_body=False)


def _task_head(shape: Shape) -> int:
    """A head that classifies comes untrained, and is trained along."""
    return shape.head if shape.classes else 0


METHODS: dict[str, Callable[[Shape, Sizes], Trained]] = {
    "full": _full,
    "lora": _lora,
    "qlora": _lora,
    "houlsby": _bottleneck("houlsby"),
    "pfeiffer": _bottleneck("pfeiffer"),
    "parallel": _bottleneck("parallel"),
    "prefix": _prefix,
    "prompt": _prompt,
    "ia3": _ia3,
    "output-layer": _head_alone,
    "feature-extraction": _head_alone,
}


def _targets(shape: Shape, names: tuple[str, ...]) -> tuple[Linear, ...]:
    if names == ("all-linear",):
        return shape.linears
    found = []
    for name in names:
        own = [linear for linear in shape.linears if linear.path == name or linear.path.endswith("." + name)]
        if not own:
            known = dict.fromkeys(linear.path.rpartition(".")[2] for linear in shape.linears)
            raise UserError(f"--target-modules: {shape.name} has no {name!r}; it has {', '.join(known)}")
        found += own
    return tuple(found)


def _reads(linear: Linear, shape: Shape) -> str:
    """Which input of its layer a linear module reads; attention's output is kept by attention itself."""
    if linear.k == shape.intermediate and linear.n == shape.hidden:
        return "down"
    return "up" if (linear.n, linear.k) == (shape.intermediate, shape.hidden) else "attention"
