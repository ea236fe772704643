"""The diagonal of the Fisher information, from per-sample gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.formats.safe import is_finite
from peftrt.nn import AdapterLinear, LoRAEmbedding
from peftrt.nn.routing import current

# Elements of a weight's change or gradient that are made at a time on a CPU: 2 MiB in fp32, which its caches hold.
CHUNK = 1 << 19

Loss = Callable[[nn.Module, Any], Tensor]


def chunk(device: torch.device) -> int:
    """Elements that are made at a time; elsewhere than on a CPU more, since each part costs launches."""
    return CHUNK if device.type == "cpu" else 32 * CHUNK


class Fisher:
    """``F = 1/n sum_i g_i^2``, g_i the gradient of the i-th sample's loss: squares, averaged, element by element.

    Of a layer with adapters F is that of its whole weight W: ``g = dY^T X`` of the sample's rows, some rows of W at a
    time, squared and forgotten. W itself needs no gradient, so an NF4 base will do. Of a Parameter g is what autograd
    gives. Nothing of the model is changed but the training flags while it runs, which are put back; gradients that
    stand in ``.grad`` stay there.

    Args:
        model: what the loss is computed with.
        layers: path -> layer, those whose weights count.
        parameters: name -> Parameter that requires a gradient, those that count by themselves.
        device: where the sums are kept; None for beside the weights.

    Attributes:
        of_layers: path -> fp32 [N, K].
        of_parameters: name -> fp32, of the Parameter's shape.
        samples: n.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, AdapterLinear],
        parameters: Mapping[str, nn.Parameter],
        device: torch.device | None = None,
    ) -> None:
        self._model, self._layers, self._parameters = model, dict(layers), dict(parameters)
        self.of_layers = {
            path: torch.zeros(layer.out_features, layer.in_features, device=device or layer.weight.device)
            for path, layer in layers.items()
        }
        self.of_parameters = {
            name: torch.zeros(parameter.shape, device=device or parameter.device)
            for name, parameter in parameters.items()
        }
        self.samples = 0

    def measure(self, data: Iterable[Any], loss: Loss, samples: int | None = None) -> None:
        """Add the samples' squares up, and divide by their number.

        Args:
            data: what ``loss`` takes, one after the other: a sample each, or a batch of them.
            loss: takes the model, in ``eval()``, and one of ``data``; returns the sample's negative log-likelihood
                ``[]``, or those of a batch, ``[B]``. In a batch the inputs of ``layers`` are ``[B, ..., K]``, and
                samples do not act on one another.
            samples: stop where so many have been seen.

        Raises:
            ValueError: there are no data; a loss or gradient is not finite; a loss or an input of another shape.
        """
        with _evaluating(self._model), torch.enable_grad(), _Watch(self._layers, self._add) as watch:
            for item in data:
                watch.begin()
                losses = self._checked(loss(self._model, item))
                self._backward(losses, watch)
                self.samples += losses.numel()
                if samples is not None and self.samples >= samples:
                    break
        if not self.samples:
            raise ValueError("EWC: data must hold at least one sample, got none")
        for kind, sums in (("the weight of ", self.of_layers), ("", self.of_parameters)):
            for name, total in sums.items():
                if not is_finite(total):
                    raise ValueError(f"EWC: a gradient of {kind}{name} is not finite, or its square is not")
                total /= self.samples

    def _checked(self, losses: Any) -> Tensor:
        if not isinstance(losses, Tensor) or losses.dim() > 1 or not losses.numel():
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"EWC: loss must return [] for a sample, or [B] for a batch of B, got {shape}")
        if not losses.requires_grad:
            raise ValueError("EWC: the loss depends on none of the weights that are to be protected")
        if not is_finite(losses.detach()):
            raise ValueError(f"EWC: the loss after {self.samples} samples is not finite: {losses.detach().tolist()}")
        return losses.reshape(-1)

    def _backward(self, losses: Tensor, watch: _Watch) -> None:
        own = list(self._parameters.values())
        count = losses.numel()
        # one sample: all of it is one backward. Of a batch the Parameters need one each, which goes no deeper than they
        # are, and the layers one in all.
        if count > 1 and own:
            for one in losses.unbind():
                self._add_own(torch.autograd.grad(one, own, retain_graph=True, allow_unused=True))
            own = []
        watch.batch = count
        found = torch.autograd.grad(losses.sum(), [watch.token, *own], allow_unused=True)
        if own:
            self._add_own(found[1:])
        watch.settle()

    def _add_own(self, gradients: Iterable[Tensor | None]) -> None:
        for total, gradient in zip(self.of_parameters.values(), gradients, strict=True):
            if gradient is not None:
                wide = gradient.float()
                total += (wide * wide).to(total.device)

    def _add(self, path: str, x: Tensor, dy: Tensor) -> None:
        """Add one sample's square: x [T, K], or ids [T] of an embedding; dy [T, N]."""
        total, layer = self.of_layers[path], self._layers[path]
        if isinstance(layer, LoRAEmbedding):
            _add_square_of_rows(total, x, dy, layer.padding_idx)
            return
        x, dy = x.float(), dy.float()
        rows = max(1, chunk(x.device) // x.shape[1])
        for part, columns in zip(total.split(rows), dy.split(rows, dim=1), strict=True):
            gradient = columns.t() @ x
            part += gradient.square_().to(part.device)


def _add_square_of_rows(total: Tensor, ids: Tensor, dy: Tensor, padding_idx: int | None) -> None:
    """The square of an embedding's gradient, ``total`` [D, V]: of the words that the sample has alone."""
    if padding_idx is not None:
        ids, dy = ids[ids != padding_idx], dy[ids != padding_idx]
    words, places = ids.unique(return_inverse=True)
    gradient = torch.zeros(len(words), dy.shape[1], device=dy.device).index_add_(0, places, dy.float())
    total.t().index_add_(0, words.to(total.device), gradient.square_().to(total.device))


class _Watch:
    """Sees the inputs and output gradients of layers, between ``with`` and its end, for calls of this thread.

    Args:
        layers: path -> layer.
        sink: takes a path, and one sample's input and output gradient.

    Attributes:
        token: what a backward must be asked the gradient of, so that it passes by every layer.
        batch: how many samples the loss was of; to be set before the backward.
    """

    def __init__(self, layers: Mapping[str, AdapterLinear], sink: Callable[[str, Tensor, Tensor], None]) -> None:
        self._layers, self._sink = layers, sink
        self._thread = threading.get_ident()
        self.token = torch.zeros((), requires_grad=True)
        self.begin()

    def begin(self) -> None:
        """A forward follows."""
        self.batch = 0
        self._calls = dict.fromkeys(self._layers, 0)
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> _Watch:
        self._handles = ExitStack()
        for path, layer in self._layers.items():
            hook = layer.register_forward_hook(self._hook(path), with_kwargs=True)
            self._handles.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()

    def _hook(self, path: str) -> Callable[..., Tensor | None]:
        def watch(layer: AdapterLinear, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
            # the layer may serve another thread meanwhile
            if threading.get_ident() != self._thread:
                return None
            if current(layer.owner) is not None:
                raise ValueError(f"EWC: {path} is called in a rows(...) block; call consolidate outside of it")
            if not self.batch:
                self._calls[path] += 1
            x = args[0] if args else next(iter(kwargs.values()))
            return _Seen.apply(y, self.token, x.detach(), self, path)

        return watch

    def note(self, path: str, x: Tensor, dy: Tensor) -> None:
        """A layer's gradient has come; where it was called once, that is all of it."""
        self._seen.setdefault(path, []).append((x, dy))
        if self._calls[path] == 1:
            self._hand_over(path)

    def settle(self) -> None:
        """The backward is over: what layers that were called more than once have got is whole."""
        for path in list(self._seen):
            self._hand_over(path)

    def _hand_over(self, path: str) -> None:
        xs, dys = [], []
        for x, dy in self._seen.pop(path):
            batch = self.batch
            if batch > 1 and (dy.dim() < 2 or dy.shape[0] != batch):
                raise ValueError(
                    f"EWC: {path} must see [{batch}, ..., {dy.shape[-1]}] where the loss is of {batch} samples, got "
                    f"{list(dy.shape)}; give the samples one by one"
                )
            dys.append(dy.reshape(batch, -1, dy.shape[-1]))
            wide = x.dim() == dy.dim()
            xs.append(x.reshape(batch, -1, x.shape[-1]) if wide else x.reshape(batch, -1))
        for sample in range(self.batch):
            self._sink(path, torch.cat([x[sample] for x in xs]), torch.cat([dy[sample] for dy in dys]))


class _Seen(torch.autograd.Function):
    """y itself; in the backward its gradient is noted. ``token`` makes sure that there is one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, x: Tensor, watch: _Watch, path: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.watch, ctx.path = watch, path
        # a copy: a result that is its own argument may not be changed in place, as a layer's may
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.watch.note(ctx.path, *ctx.saved_tensors, gradients[0].detach())
        return gradients[0], None, None, None, None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, and as it was after."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
