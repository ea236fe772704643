"""EWC: elastic weight consolidation, over the weights that adapters change, or over Parameters themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.continual.fisher import Fisher, Loss
from peftrt.continual.kept import (
    DTYPES,
    KINDS,
    Change,
    Entry,
    Task,
    Value,
    expect_fit,
    from_metadata,
    named_tensors,
    read_tasks,
    to_metadata,
)
from peftrt.continual.penalty import change_penalty, parameter_penalty
from peftrt.formats.errors import FormatError
from peftrt.formats.safe import TensorReader
from peftrt.formats.stream import Promise, verify_checksum, write_stream
from peftrt.nn import AdapterLinear

MODES = ("separate", "online")
TARGETS = ("auto", "delta", "parameters")
_CHECKSUM = "sha256"
# Against shapes whose products overflow: the file's own size bounds what is read.
_MAX_BYTES = 1 << 46


class EWC:
    """Keeps a model near what former tasks need: ``L = L_task + lambda sum_i F_i (theta_i - theta*_i)^2``.

    theta* are the values when a task ended, F the diagonal of its Fisher information, the mean over samples of squared
    per-sample gradients of the log-likelihood::

        ewc = peftrt.continual.EWC(model, lambda_=10000.0)
        ewc.consolidate(loader, loss=lambda model, batch: nll(model, batch))    # after task A
        for batch in task_b:
            (task_loss(model, batch) + ewc.penalty()).backward()

    With target "delta" theta is, of every layer with LoRA adapters, the weight that it computes with: the penalty is
    ``lambda sum F_W o (s B A - s B* A*)^2`` with the Fisher F_W of the base weight W, which may be NF4. What else is
    trained (a head of ``modules_to_save``, norms) counts as with "parameters". A Fisher of A and B themselves would not
    do: at B = 0, where LoRA begins, A has no gradient, so nothing would keep it; and a small step of B away from 0
    moves the model by as much as A is long. With "parameters" theta are the Parameters that require gradients, of any
    model.

    Conventions: there is no 1/2 here, so the lambda of Kirkpatrick's equation 3 is twice this one. Avalanche's
    ``EWCPlugin`` has none either; its Fisher squares the gradients of batches, and is this one where they hold a sample
    each. Its ``decay_factor`` is gamma.

    Args:
        model: what is trained. Its Parameters are looked up by name at every call, so they may be replaced.
        lambda_: not negative; an attribute, which may be changed.
        mode: "separate", one penalty a task; or "online", one for all, around the values after the last, with ``F =
            gamma F + F_task``. (Schwarz et al. weight the penalty by gamma once more; that is part of lambda here.)
        gamma: in (0, 1], for "online".
        target: "delta", "parameters", or "auto": "delta" where the model has layers with LoRA adapters, and none of
            them is DoRA's or IA3's.
        fisher_dtype: what F is kept in, fp32 or bf16. While it is measured it is summed in fp32.
        fisher_device: where F is kept and summed, None for beside the weights. From elsewhere it is brought part by
            part at every penalty.

    Attributes:
        target: "delta" or "parameters".

    Raises:
        ValueError: an argument out of its range, nothing to protect, or a DoRA or IA3 adapter with "delta":
            its factors change W by more than s B A.
        TypeError: ``model`` is no nn.Module, or another dtype.

    Source: Kirkpatrick et al. 2017 (arXiv:1612.00796), equation 3; online: Schwarz et al. 2018 (arXiv:1805.06370),
    section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        lambda_: float,
        *,
        mode: str = "separate",
        gamma: float = 1.0,
        target: str = "auto",
        fisher_dtype: torch.dtype = torch.float32,
        fisher_device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"EWC: model must be an nn.Module, got {type(model).__name__}")
        for name, value, known in (("mode", mode, MODES), ("target", target, TARGETS)):
            if value not in known:
                raise ValueError(f"EWC: {name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 <= lambda_ < math.inf:
            raise ValueError(f"EWC: lambda_ must be a number from 0 on, got {lambda_!r}")
        if not 0 < gamma <= 1 or (gamma != 1 and mode != "online"):
            raise ValueError(f"EWC: gamma must be in (0, 1], and 1 without mode 'online', got {gamma!r}")
        if fisher_dtype not in DTYPES:
            raise TypeError(f"EWC: fisher_dtype must be fp32 or bf16, got {fisher_dtype!r}")
        self.lambda_, self.mode, self.gamma = lambda_, mode, gamma
        self.fisher_dtype = fisher_dtype
        self.fisher_device = None if fisher_device is None else torch.device(fisher_device)
        self._model = model
        self._tasks: list[Task] = []
        layers = _layers(model)
        reason = _why_no_change(layers)
        self.target = target if target != "auto" else "delta" if reason is None else "parameters"
        if self.target == "delta":
            if reason is not None:
                raise ValueError(reason)
        else:
            self._trained()

    @property
    def samples(self) -> list[int]:
        """How many samples F was measured on: of each penalty, that is of each task, or of the last one online."""
        return [task.samples for task in self._tasks]

    @property
    def nbytes(self) -> int:
        """What is kept: F and the former values."""
        return sum(tensor.nbytes for tensor in named_tensors(self._tasks).values())

    def consolidate(
        self,
        data: Iterable[Any],
        loss: Loss | None = None,
        *,
        logits: Loss | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> int:
        """Measure the Fisher on a task that has been learnt, and keep the values as they are.

        The model is in ``eval()`` meanwhile. Its modes are put back; its Parameters, their ``requires_grad`` and their
        ``.grad`` are not touched. After an error nothing is kept of this call.

        Args:
            data: what ``loss`` takes, one after the other: a sample each, or a batch of B.
            loss: ``loss(model, item)``, the negative log-likelihood of the sample's label ``[]``, or of each sample of
                a batch ``[B]`` (not their mean): the empirical Fisher. In a batch no sample acts on another, and the
                inputs of adapted layers are ``[B, ..., K]``. A Parameter that counts by itself costs a backward a
                sample, down to it.
            logits: in its place, ``logits(model, item)`` of shape ``[B, ..., C]``: labels are drawn from their softmax,
                which makes it the true Fisher.
            samples: how many to see at most, rounded up to whole batches; None for all.
            generator: of the labels that are drawn.

        Returns:
            The number of samples.

        Raises:
            ValueError: no data, a loss or gradient that is not finite (the message names the Parameter), a shape that
                does not fit, adapters that are merged, or a model that has changed since the task before.
        """
        if (loss is None) == (logits is None):
            raise ValueError("EWC: consolidate takes either loss or logits")
        if samples is not None and samples < 1:
            raise ValueError(f"EWC: samples must be at least 1, got {samples!r}")
        self._expect_same_model()
        layers = self._expect_open() if self.target == "delta" else {}
        fisher = Fisher(self._model, layers, self._trained(), self.fisher_device)
        fisher.measure(data, loss or _drawn(logits, generator), samples)
        task = Task({}, {}, fisher.samples)
        with torch.no_grad():
            for path, layer in layers.items():
                halves = (half.clone() for half in _change(layer))
                task.layers[path] = Change(fisher.of_layers.pop(path).to(self.fisher_dtype), *halves)
            for name, parameter in self._trained().items():
                found = fisher.of_parameters.pop(name).to(self.fisher_dtype)
                task.parameters[name] = Value(found, parameter.detach().clone())
            self._keep(task)
        return fisher.samples

    def penalty(self) -> Tensor:
        """``lambda sum_i F_i (theta_i - theta*_i)^2``, summed over tasks; differentiable, exactly 0 at theta*.

        Of a layer [N, K] a few rows at a time are made, also for the gradient, which is that of A and B.

        Returns:
            fp32 [] on the device of the model's first Parameter; 0 before the first ``consolidate``.

        Raises:
            ValueError: the model has changed: a name or a shape is not what was kept, or adapters are merged.
        """
        first = next(self._model.parameters())
        total = torch.zeros((), device=first.device)
        if not self._tasks:
            return total
        self._expect_same_model()
        if self.target == "delta":
            halves = {path: _change(layer) for path, layer in self._expect_open().items()}
        parameters = dict(self._model.named_parameters())
        for task in self._tasks:
            for path, kept in task.layers.items():
                found = change_penalty(*halves[path], kept.fisher, kept.lora_A, kept.lora_B)
                total = total + found.to(first.device)
            for name, value in task.parameters.items():
                found = parameter_penalty(parameters[name], value.fisher, value.value)
                total = total + found.to(first.device)
        return self.lambda_ * total

    def state_dict(self) -> dict[str, Any]:
        """``mode``, ``target``, ``samples`` and ``tensors``: what is kept of task 0 as "0.layer.<path>.fisher",
        "....lora_A", "....lora_B", "0.parameter.<name>.fisher" and "....value". B has the scaling in it.
        """
        return {
            "mode": self.mode,
            "target": self.target,
            "samples": self.samples,
            "tensors": named_tensors(self._tasks),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; lambda and gamma stay.

        Raises:
            ValueError: it is of another mode or target, or does not fit the model; nothing is changed.
        """
        tensors = state_dict["tensors"]
        self._load(state_dict, tensors, lambda name: tensors[name])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file with a checksum, tensor by tensor, whole or not at all.

        Raises:
            FormatError: ``path`` is a directory.
            OSError: the disk is full or cannot be written.
        """
        tensors = named_tensors(self._tasks)
        promises = [Promise(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        metadata = to_metadata(self.mode, self.target, self.samples)
        write_stream(path, promises, iter(tensors.values()), metadata, checksum=_CHECKSUM)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over what :meth:`save` wrote; lambda and gamma stay.

        Raises:
            MissingFileError: there is no such file.
            FormatError: it is damaged, none of ``save``'s, or does not fit the model; nothing is changed.
        """
        with TensorReader(path, max_bytes=_MAX_BYTES) as reader:
            verify_checksum(reader, _CHECKSUM)
            entries = {name: entry for name, entry in reader.entries.items() if name != _CHECKSUM}
            try:
                self._load(from_metadata(reader.metadata, reader.path), entries, reader.read)
            except FormatError:
                raise
            except ValueError as error:
                raise FormatError(f"{reader.path}: {error}") from None

    def _load(self, saved: Mapping[str, Any], entries: Mapping[str, Any], read: Any) -> None:
        layers, parameters = _layers(self._model), dict(self._model.named_parameters())

        def placed(key: str) -> Tensor:
            kind, name = key.split(".")[1], key.split(".", 2)[2].rpartition(".")[0]
            home = layers[name].weight.device if kind == "layer" else parameters[name].device
            if key.endswith(".fisher"):
                return read(key).to(self.fisher_device or home, self.fisher_dtype, copy=True)
            return read(key).to(home, copy=True)

        self._tasks = read_tasks(saved, self.mode, self.target, entries, placed, layers, parameters)

    def _keep(self, task: Task) -> None:
        if self.mode == "online" and self._tasks:
            before = self._tasks.pop()
            for ours, former in ((task.layers, before.layers), (task.parameters, before.parameters)):
                _add_decayed(ours, former, self.gamma)  # type: ignore[arg-type]
        self._tasks.append(task)

    def _trained(self) -> dict[str, nn.Parameter]:
        """The Parameters that count by themselves."""
        halves: set[nn.Parameter] = set()
        if self.target == "delta":
            for layer in _layers(self._model).values():
                halves.update(p for name in layer.adapter_names for p in layer.adapter_parameters(name))
        found = {name: p for name, p in self._model.named_parameters() if p.requires_grad and p not in halves}
        if not found and self.target == "parameters":
            raise ValueError("EWC: no Parameter of the model requires gradients, so there is nothing to protect")
        return found

    def _expect_open(self) -> dict[str, AdapterLinear]:
        """The layers with adapters; ValueError where what they add cannot be told."""
        layers = _layers(self._model)
        reason = _why_no_change(layers)
        if reason is not None:
            raise ValueError(reason)
        for path, layer in layers.items():
            if layer.merged is not None:
                raise ValueError(f"EWC: adapters {sorted(layer.merged)} are merged into {path}; unmerge first")
        return layers

    def _expect_same_model(self) -> None:
        layers, parameters = _layers(self._model), dict(self._model.named_parameters())
        for task in self._tasks:
            for called, entry in task.entries():
                kind, _, name = called.partition(".")
                sized = {part: getattr(entry, part) for part in KINDS[kind].parts}
                expect_fit(f"EWC: {called}", kind, name, sized, layers, parameters)


def _layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """Path -> layer, of those that hold adapters."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdapterLinear) and m.adapter_names}


def _why_no_change(layers: Mapping[str, AdapterLinear]) -> str | None:
    """Why the layers' change of their weights is not s B A; None where it is."""
    if not layers:
        return "EWC: target 'delta' needs layers with LoRA adapters, the model has none"
    for path, layer in layers.items():
        for name in layer.adapter_names:
            kind = "IA3" if layer.ia3(name) else "DoRA" if layer.adapter(name).magnitude is not None else None
            if kind is not None:
                return (
                    f"EWC: adapter {name!r} of {path} is {kind}'s, whose factors change W by more than s B A: use "
                    "target='parameters'"
                )
    return None


def _change(layer: AdapterLinear) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R], the scaling in B, of what the layer now adds to its stored weight; R may be 0."""
    terms = [*layer.terms(layer.active), *layer.principal_terms(layer.active)]
    if not terms:
        device = layer.weight.device
        return torch.zeros(0, layer.in_features, device=device), torch.zeros(layer.out_features, 0, device=device)
    wide = torch.promote_types(terms[0].lora_A.dtype, torch.float32)
    halves = [(term.lora_A.to(wide), term.lora_B.to(wide) * term.scaling) for term in terms]
    return torch.cat([A for A, _ in halves]), torch.cat([B for _, B in halves], dim=1)


def _add_decayed(ours: dict[str, Entry], former: Mapping[str, Entry], gamma: float) -> None:
    for name, entry in former.items():
        if name in ours:
            ours[name].fisher = ours[name].fisher.float().add_(entry.fisher, alpha=gamma).to(entry.fisher.dtype)
        else:
            entry.fisher = entry.fisher * gamma
            ours[name] = entry


def _drawn(logits: Any, generator: torch.Generator | None) -> Loss:
    """The loss of labels that are drawn from the model's own distribution."""

    def loss(model: nn.Module, item: Any) -> Tensor:
        found: Tensor = logits(model, item)
        if found.dim() < 2:
            raise ValueError(f"EWC: logits must be [B, ..., C], got {list(found.shape)}")
        log_p = found.flatten(0, -2).float().log_softmax(-1)
        if not bool(torch.isfinite(log_p.detach()).all()):
            raise ValueError("EWC: the logits are not finite")
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        return -log_p.gather(1, labels).view(len(found), -1).sum(1)

    return loss
