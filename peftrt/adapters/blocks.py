"""Where the sub-layers of a model's blocks are, told by how the blocks are built and not by what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from peftrt.nn import AdapterHolder

ATTENTION, FEED_FORWARD, CROSS_ATTENTION = "attention", "feed_forward", "cross_attention"


class SubLayer(NamedTuple):
    """A sub-layer of a block: what computes h, to which the model then adds x.

    Attributes:
        block: path of the block.
        number: of the block among its siblings.
        role: "attention", "feed_forward" or "cross_attention".
        output: path of the module whose output is h, dropout included.
        residual: path of the module that is called with x before.
        norm: path of the norm of h + x, where it follows the addition; None where norms come first.
        width: features of h.
    """

    block: str
    number: int
    role: str
    output: str
    residual: str
    norm: str | None
    width: int


class _Shape(NamedTuple):
    """Paths within a block that has them: the sub-layers of a kind of model."""

    role: str
    output: str
    residual: str
    norm: str | None
    sized_by: str


_BERT = (
    _Shape(ATTENTION, "attention.output.dropout", "attention", "attention.output.LayerNorm", "output.LayerNorm"),
    _Shape(FEED_FORWARD, "output.dropout", "intermediate", "output.LayerNorm", "output.LayerNorm"),
)
_DISTILBERT = (
    _Shape(ATTENTION, "attention", "attention", "sa_layer_norm", "sa_layer_norm"),
    _Shape(FEED_FORWARD, "ffn", "ffn", "output_layer_norm", "output_layer_norm"),
)
_LLAMA = (
    _Shape(ATTENTION, "self_attn", "input_layernorm", None, "input_layernorm"),
    _Shape(FEED_FORWARD, "mlp", "post_attention_layernorm", None, "post_attention_layernorm"),
)
_GPT2 = (
    _Shape(ATTENTION, "attn", "ln_1", None, "ln_1"),
    _Shape(FEED_FORWARD, "mlp", "ln_2", None, "ln_2"),
)
# Further norms within a block say that h goes through them first: another kind of model.
_KINDS: tuple[tuple[tuple[_Shape, ...], tuple[str, ...]], ...] = (
    (_BERT, ()),
    (_DISTILBERT, ()),
    (_LLAMA, ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    (_GPT2, ()),
)
# T5's sub-layers are modules of their own, each with a norm, a dropout and one of these.
_T5 = {"SelfAttention": ATTENTION, "EncDecAttention": CROSS_ATTENTION, "DenseReluDense": FEED_FORWARD}


def sub_layers(model: nn.Module) -> list[SubLayer]:
    """The sub-layers of every block that is built like Llama's, GPT-2's, BERT's, DistilBERT's or T5's, or torch's own
    ``nn.TransformerEncoderLayer``; empty where there is none.
    """
    found: list[SubLayer] = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        here = [*_of_block(path, module)]
        if here or isinstance(module, AdapterHolder):
            inside = (*inside, path + ".")
        found += here
    return found


def _of_block(path: str, block: nn.Module) -> Iterator[SubLayer]:
    number = next((int(part) for part in reversed(path.split(".")) if part.isdecimal()), 0)
    if isinstance(block, nn.TransformerEncoderLayer):
        shapes = _torch_shapes(block)
        yield from (_made(path, number, block, shape) for shape in shapes)
        return
    for kind, without in _KINDS:
        needed = {part for shape in kind for part in (shape.output, shape.residual, shape.norm, shape.sized_by) if part}
        if all(_has(block, part) for part in needed) and not any(_has(block, part) for part in without):
            yield from (_made(path, number, block, shape) for shape in kind)
            return
    layers = block._modules.get("layer")
    if isinstance(layers, nn.ModuleList):
        for place, layer in enumerate(layers):
            role = next((role for name, role in _T5.items() if _has(layer, name)), None)
            if role is not None and _has(layer, "layer_norm") and _has(layer, "dropout"):
                inner = f"layer.{place}"
                shape = _Shape(role, f"{inner}.dropout", f"{inner}.layer_norm", None, f"{inner}.layer_norm")
                yield _made(path, number, block, shape)


def _torch_shapes(block: nn.TransformerEncoderLayer) -> tuple[_Shape, ...]:
    if block.norm_first:
        return (
            _Shape(ATTENTION, "dropout1", "norm1", None, "norm1"),
            _Shape(FEED_FORWARD, "dropout2", "norm2", None, "norm2"),
        )
    return (
        _Shape(ATTENTION, "dropout1", "self_attn", "norm1", "norm1"),
        _Shape(FEED_FORWARD, "dropout2", "linear1", "norm2", "norm2"),
    )


def _made(path: str, number: int, block: nn.Module, shape: _Shape) -> SubLayer:
    def whole(part: str) -> str:
        return f"{path}.{part}" if path else part

    weight = block.get_submodule(shape.sized_by).weight
    assert isinstance(weight, Tensor)
    norm = None if shape.norm is None else whole(shape.norm)
    return SubLayer(path, number, shape.role, whole(shape.output), whole(shape.residual), norm, weight.shape[0])


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
