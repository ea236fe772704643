"""What EWC keeps in a file, and what it refuses: everything by name, with the model as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from peftrt.continual import EWC
from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.safe import read_tensors, write_tensors
from peftrt.nn import LoRALinear
from tests.continual.test_ewc import Net, adapted, batches, move, nll


def state_of(model: nn.Module) -> list[Any]:
    """Modes, flags, gradients and hooks: what measuring must leave alone."""
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    return [hooks, modes, [p.requires_grad for p in model.parameters()], gradients]


@pytest.mark.parametrize("target", ["delta", "parameters"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(target: str, fails: bool) -> None:
    model = adapted()
    model.train()
    model.norm.eval()
    nll(model, batches(3, size=3)[0]).sum().backward()
    before, values = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def loss(model: nn.Module, item: Any) -> Tensor:
        seen.append(any(module.training for module in model.modules()))
        if fails and len(seen) == 3:
            raise ZeroDivisionError
        return nll(model, item)

    ewc = EWC(model, 1.0, target=target)
    if fails:
        with pytest.raises(ZeroDivisionError):
            ewc.consolidate(batches(), loss)
        assert ewc.samples == []
    else:
        ewc.consolidate(batches(), loss)
        assert ewc.samples == [6]
    assert not any(seen), "measured in train()"
    assert state_of(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


def test_a_layer_whose_result_is_changed_in_place_or_that_nothing_trains() -> None:
    """The gradient is that of what the layer gave; frozen adapters have a Fisher as well."""
    torch.manual_seed(2)
    layer = LoRALinear.from_linear(nn.Linear(6, 4), r=2, init=False)
    x = torch.randn(3, 6)

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mul_(3.0).relu_()

    model = InPlace()
    model.requires_grad_(False)
    ewc = EWC(model, 1.0)
    ewc.consolidate([x], lambda model, x: model(x).sum())
    dy = 3.0 * (layer(x) > 0).float()
    torch.testing.assert_close(ewc.state_dict()["tensors"]["0.layer.layer.fisher"], (dy.t() @ x).square())
    assert not layer.lora_A.requires_grad


def test_samples_end_the_measurement() -> None:
    model = adapted()
    ewc = EWC(model, 1.0)
    assert ewc.consolidate(batches(6, size=2), nll, samples=3) == 4
    first = EWC(model, 1.0)
    assert first.consolidate(batches(6, size=2)[:2], nll) == 4
    found, expected = (e.state_dict()["tensors"] for e in (ewc, first))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_threads_are_not_watched() -> None:
    """A layer that serves another thread meanwhile: its rows are not of this task."""
    model = adapted()
    alone = EWC(model, 1.0)
    alone.consolidate(batches(), nll)
    ewc = EWC(model, 1.0)

    def loss(model: nn.Module, item: Any) -> Tensor:
        other = threading.Thread(target=lambda: nll(model, batches(4, size=4, seed=1)[0]).sum())
        other.start()
        other.join()
        return nll(model, item)

    ewc.consolidate(batches(), loss)
    found, expected = (e.state_dict()["tensors"] for e in (ewc, alone))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_models_over_one_base() -> None:
    """Layers of two models over the same Parameter: each has its own Fisher and its own change."""
    linear = nn.Linear(6, 4)
    models = [nn.Sequential(LoRALinear.from_linear(linear, r=2, init=False)) for _ in range(2)]
    assert models[0][0].weight is models[1][0].weight
    xs = [torch.randn(3, 6), torch.randn(3, 6)]
    ewcs = [EWC(model, 1.0) for model in models]
    for ewc, x in zip(ewcs, xs, strict=True):
        ewc.consolidate([x], lambda model, x: model(x).sum())
    for ewc, x in zip(ewcs, xs, strict=True):
        expected = torch.ones(4, 1) * x.sum(0).square()
        torch.testing.assert_close(ewc.state_dict()["tensors"]["0.layer.0.fisher"], expected)
    move(models[0], 0.1)
    assert ewcs[0].penalty() > 0
    assert ewcs[1].penalty() == 0


@pytest.mark.parametrize("mode", ["separate", "online"])
@pytest.mark.parametrize("target", ["delta", "parameters"])
def test_saved_and_loaded(mode: str, target: str, tmp_path: Path) -> None:
    model = adapted()
    ewc = EWC(model, 2.0, mode=mode, target=target)
    ewc.consolidate(batches(), nll)
    move(model, 0.1)
    ewc.consolidate(batches(4, seed=1), nll)
    move(model, 0.1)
    ewc.save(tmp_path / "ewc.safetensors")
    for load in ("file", "state"):
        other = EWC(model, 2.0, mode=mode, target=target)
        if load == "file":
            other.load(tmp_path / "ewc.safetensors")
        else:
            other.load_state_dict(ewc.state_dict())
        assert torch.equal(other.penalty(), ewc.penalty())
        assert other.penalty() > 0
        assert other.samples == ewc.samples == ([6, 4] if mode == "separate" else [4])
        # its own memory: the next task does not write into the former's
        other.consolidate(batches(2, seed=2), nll)
        move(model, 0.1)
    model2 = Net()
    with pytest.raises(FormatError, match=r"ewc\.safetensors: (target must be|0\.parameter\.\S+: the model has no)"):
        EWC(model2, 2.0, mode=mode).load(tmp_path / "ewc.safetensors")


def test_files_that_are_refused(tmp_path: Path) -> None:
    model = adapted()
    ewc = EWC(model, 2.0)
    ewc.consolidate(batches(), nll)
    move(model, 0.1)
    path = tmp_path / "ewc.safetensors"
    ewc.save(path)
    penalty = ewc.penalty()

    def refused(message: str, error: type[Exception] = FormatError, **options: Any) -> None:
        reader = EWC(model, 2.0, **options) if options else ewc
        with pytest.raises(error, match=message):
            reader.load(path)
        assert torch.equal(ewc.penalty(), penalty), "a refused file changed what was kept"

    refused("mode must be 'online', as here, got 'separate'", mode="online")
    refused("target must be 'parameters', as here, got 'delta'", target="parameters")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused("truncated|offsets|bytes")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(bytes(flipped))
    refused("the file is damaged")
    write_tensors(path, {"0.layer.hidden.fisher": torch.zeros(16, 16)})
    refused("expected a checksum")
    path.unlink()
    refused("no such file", MissingFileError)


def test_states_that_do_not_fit() -> None:
    model = adapted()
    ewc = EWC(model, 2.0)
    ewc.consolidate(batches(), nll)
    move(model, 0.1)
    penalty, state = ewc.penalty(), ewc.state_dict()
    tensors = state["tensors"]

    def refused(message: str, **changes: Any) -> None:
        changed = {**tensors, **changes.pop("tensors", {})}
        changed = {name: value for name, value in changed.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            ewc.load_state_dict({**state, "tensors": changed, **changes})
        assert torch.equal(ewc.penalty(), penalty)

    refused(r"samples must be a list of numbers from 1 on", samples=[0])
    refused(r"is none of EWC's for 0 tasks", samples=[])
    refused(r"tensor 'x' is none of EWC's", tensors={"x": torch.zeros(1)})
    refused(r"0\.layer\.hidden: expected fisher, lora_A, lora_B", tensors={"0.layer.hidden.lora_A": None})
    refused(r"hidden\.fisher: expected floating \[16, 16\]", tensors={"0.layer.hidden.fisher": torch.zeros(16, 15)})
    refused(r"hidden\.lora_B: expected floating \[16, 2\]", tensors={"0.layer.hidden.lora_B": torch.zeros(16, 3)})
    whole = torch.zeros(16, 16, dtype=torch.int32)
    refused(r"hidden\.fisher: expected floating .* got int32", tensors={"0.layer.hidden.fisher": whole})
    refused(r"hidden\.fisher: .*a negative number", tensors={"0.layer.hidden.fisher": -torch.ones(16, 16)})
    refused(
        r"0\.layer\.other: the model has no layer with adapters 'other'",
        tensors={f"0.layer.other.{part}": torch.zeros(1, 1) for part in ("fisher", "lora_A", "lora_B")},
    )


def test_an_online_state_is_of_one_task() -> None:
    model = adapted()
    ewc = EWC(model, 2.0, mode="online")
    with pytest.raises(ValueError, match="one number at most in mode 'online'"):
        ewc.load_state_dict({**ewc.state_dict(), "samples": [1, 2]})


def test_arguments_that_are_refused() -> None:
    model = adapted()

    def refused(message: str, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=message):
            EWC(**{"model": model, "lambda_": 1.0, **options})

    refused("model must be an nn.Module, got dict", TypeError, model={})
    refused("mode must be one of separate, online, got 'on'", mode="on")
    refused("target must be one of auto, delta, parameters, got 'weights'", target="weights")
    refused("lambda_ must be a number from 0 on, got -1", lambda_=-1)
    refused("lambda_ must be a number from 0 on, got nan", lambda_=float("nan"))
    refused(r"gamma must be in \(0, 1\]", gamma=0.0, mode="online")
    refused("gamma must be .* 1 without mode 'online', got 0.5", gamma=0.5)
    refused("fisher_dtype must be fp32 or bf16, got torch.float16", TypeError, fisher_dtype=torch.float16)
    refused("'delta' needs layers with LoRA adapters, the model has none", model=Net(), target="delta")
    frozen = Net().requires_grad_(False)
    refused("no Parameter of the model requires gradients", model=frozen)
    dora = nn.Sequential(LoRALinear.from_linear(nn.Linear(6, 4), use_dora=True))
    refused("adapter 'default' of 0 is DoRA's, .* use target='parameters'", model=dora, target="delta")
    assert EWC(dora, 1.0).target == "parameters"
    ia3 = Net()
    peftrt.adapt(ia3, peftrt.IA3Config(target_modules=["hidden"], feedforward_modules=[]))
    refused("adapter 'default' of hidden is IA3's, .* use target='parameters'", model=ia3, target="delta")
    assert EWC(ia3, 1.0).target == "parameters"


Make = Callable[..., EWC]


def test_measurements_that_are_refused() -> None:
    model = adapted()
    ewc = EWC(model, 1.0)

    def refused(message: str, data: Any = None, loss: Any = nll, **options: Any) -> None:
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            ewc.consolidate(batches() if data is None else data, loss, **options)
        assert state_of(model) == before
        assert ewc.samples == []

    refused("data must hold at least one sample", data=[])
    refused("either loss or logits", loss=None)
    refused("either loss or logits", logits=nll)
    refused("samples must be at least 1, got 0", samples=0)
    refused(r"loss must return \[\] for a sample, or \[B\] .* got \[1, 3\]", loss=lambda m, item: m(item[0]))
    refused("loss must return .* got float", loss=lambda m, item: 1.0)
    refused("the loss depends on none of the weights", loss=lambda m, item: torch.zeros(()))
    refused("the loss after 0 samples is not finite", loss=lambda m, item: nll(m, item) * float("inf"))
    refused(r"hidden must see \[4, ..., 16\] .* 4 samples", data=batches(4, 4), loss=_flat)
    refused(r"logits must be \[B, ..., C\]", loss=None, logits=lambda m, item: m(item[0]).sum())
    refused("the logits are not finite", loss=None, logits=lambda m, item: m(item[0]) * float("nan"))

    def steep(name: str) -> Callable[[nn.Module, Any], Tensor]:
        def loss(model: nn.Module, item: Any) -> Tensor:
            # a finite loss with a gradient that is not: the square root's at 0
            one = dict(model.named_parameters())[name].flatten()[:1]
            return nll(model, item) + (one - one.detach()).abs().sqrt()

        return loss

    refused("a gradient of head.copy@default.bias is not finite", loss=steep("head.copy@default.bias"))
    with peftrt.rows(model, ["default"]):
        refused(r"table is called in a rows\(...\) block")
    peftrt.merge(model)
    refused(r"adapters \['default'\] are merged into table; unmerge first")


def _flat(model: Any, item: Any) -> Tensor:
    """A network that flattens its batch, as some do: which rows are whose cannot be told."""
    ids, labels = item
    x = model.table(ids).flatten(0, 1)
    x = model.hidden(x).view(*ids.shape, -1)
    return nn.functional.cross_entropy(model.head(x.mean(1)), labels, reduction="none")


def test_a_gradient_of_a_layer_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(6, 4)))
    ewc = EWC(model, 1.0)
    with pytest.raises(ValueError, match="a gradient of the weight of 0 is not finite"):
        ewc.consolidate([torch.zeros(2, 6)], lambda m, x: (m(x) - m(x).detach()).abs().sum().sqrt())


def test_a_model_that_has_changed_is_refused() -> None:
    model = adapted()
    ewc = EWC(model, 1.0)
    ewc.consolidate(batches(), nll)
    head = model.head.chosen
    head.weight = nn.Parameter(torch.zeros(5, 16))
    message = r"EWC: parameter\.head\.copy@default\.weight\.fisher: expected floating \[5, 16\] as in the model, got"
    for call in (ewc.penalty, lambda: ewc.consolidate(batches(), nll)):
        with pytest.raises(ValueError, match=message):
            call()
    head.weight = nn.Parameter(torch.zeros(3, 16))
    assert ewc.penalty() > 0
    peftrt.remove(model, "default")
    with pytest.raises(ValueError, match="the model has no"):
        ewc.penalty()


def test_fp16_autocast_does_not_round_the_penalty() -> None:
    model = adapted()
    ewc = EWC(model, 1.0)
    ewc.consolidate(batches(), nll)
    move(model, 1e-3)
    expected = ewc.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ewc.penalty(), expected)
    assert expected.dtype == torch.float32


def test_the_file_holds_what_the_documentation_says(tmp_path: Path) -> None:
    model = adapted()
    ewc = EWC(model, 1.0)
    ewc.consolidate(batches(), nll)
    ewc.save(tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    names = {f"0.layer.{path}.{part}" for path in ("table", "hidden") for part in ("fisher", "lora_A", "lora_B")}
    head = {
        f"0.parameter.head.copy@default.{leaf}.{part}" for leaf in ("weight", "bias") for part in ("fisher", "value")
    }
    assert set(found) == names | head | {"sha256"}
    layer = model.hidden
    assert torch.equal(found["0.layer.hidden.lora_B"], layer.scaling * layer.lora_B)
    assert ewc.nbytes == sum(tensor.nbytes for name, tensor in found.items() if name != "sha256")
