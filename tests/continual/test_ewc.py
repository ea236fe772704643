"""Elastic weight consolidation: its numbers by hand, its Fisher against explicit gradients, and what it is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftrt
from peftrt.continual import EWC
from peftrt.continual.fisher import CHUNK
from peftrt.continual.penalty import change_penalty, parameter_penalty
from peftrt.nn import AdapterLinear, LoRALinear, QLoRALinear
from tests.nn.layers import conv1d
from tests.tolerances import assert_close


class Pair(nn.Module):
    """``y = w x``, with w [1, 2]: two Parameters' worth of model."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([list(values)], dtype=torch.float32))


def half_square(model: nn.Module, item: tuple[Tensor, Tensor]) -> Tensor:
    """-log N(t; w x, 1) without its constant: the gradient is (w x - t) x."""
    x, t = item
    return 0.5 * (model.w @ x - t).square().sum()


# w = (1, 2): residuals 1 and -1, gradients (1, 0) and (-1, -2); squares (1, 0) and (1, 4), their mean (1, 2). The
# square of the mean gradient would be (0, 1).
TWO = [(torch.tensor([1.0, 0.0]), torch.tensor(0.0)), (torch.tensor([1.0, 2.0]), torch.tensor(6.0))]


def set_w(model: Pair, *values: float) -> None:
    with torch.no_grad():
        model.w.copy_(torch.tensor([list(values)], dtype=torch.float32))


def test_the_penalty_by_hand() -> None:
    """F = (1, 2), theta* = (1, 2), lambda = 10: at (3, 1) it is 10 (1 * 4 + 2 * 1) = 60, its gradient 20 (2, -2)."""
    model = Pair(1, 2)
    ewc = EWC(model, 10.0)
    assert (ewc.target, ewc.penalty().item(), ewc.samples) == ("parameters", 0.0, [])
    assert ewc.consolidate(TWO, half_square) == 2
    assert ewc.state_dict()["tensors"]["0.parameter.w.fisher"].tolist() == [[1.0, 2.0]]
    assert ewc.penalty().item() == 0.0
    set_w(model, 3, 1)
    assert ewc.penalty().item() == 60.0
    (3 * ewc.penalty()).backward()
    assert model.w.grad is not None
    assert model.w.grad.tolist() == [[120.0, -120.0]]
    # Kirkpatrick's lambda / 2 with twice this lambda
    assert ewc.penalty().item() == 20.0 / 2 * (1 * 2.0**2 + 2 * 1.0**2)
    ewc.lambda_ = 0.5
    assert ewc.penalty().item() == 3.0


def test_separate_and_online_by_hand() -> None:
    """Task B from w = (2, 0): residuals 2 and -4, gradients (2, 0) and (-4, -8), F = ((4 + 16) / 2, 64 / 2)."""
    found = {}
    for mode, gamma in (("separate", 1.0), ("online", 0.5)):
        model = Pair(1, 2)
        ewc = EWC(model, 1.0, mode=mode, gamma=gamma)
        ewc.consolidate(TWO, half_square)
        set_w(model, 2, 0)
        ewc.consolidate(TWO, half_square)
        set_w(model, 1, 1)
        found[mode] = ewc.penalty().item()
    # around (1, 2) with F = (1, 2), and around (2, 0) with F = (10, 32)
    assert found["separate"] == (1 * 0 + 2 * 1) + (10 * 1 + 32 * 1)
    # around (2, 0) alone, with F = (0.5 * 1 + 10, 0.5 * 2 + 32)
    assert found["online"] == 10.5 * 1 + 33.0 * 1


def test_bf16_keeps_half(device: torch.device) -> None:
    model = Pair(1, 2).to(device)
    data = [tuple(part.to(device) for part in item) for item in TWO]
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        ewc = EWC(model, 1.0, fisher_dtype=dtype, fisher_device="cpu")
        ewc.consolidate(data, half_square)
        fisher = ewc.state_dict()["tensors"]["0.parameter.w.fisher"]
        assert (fisher.dtype, fisher.device.type, fisher.tolist()) == (dtype, "cpu", [[1.0, 2.0]])
        sizes[dtype] = ewc.nbytes
        assert ewc.penalty().device == model.w.device
    assert sizes == {torch.float32: 16, torch.bfloat16: 12}


class Net(nn.Module):
    """An embedding, a hidden layer and a head over sequences; the hidden layer may be called twice."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.table = nn.Embedding(11, 16, padding_idx=0)
            self.norm = nn.LayerNorm(16)
            self.hidden = nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)
        self.calls = calls

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        for _ in range(self.calls):
            x = torch.tanh(self.hidden(x))
        return self.head(x.mean(1))


def nll(model: nn.Module, item: tuple[Tensor, Tensor]) -> Tensor:
    ids, labels = item
    return F.cross_entropy(model(ids), labels, reduction="none")


def batches(count: int = 6, size: int = 1, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (count, 7), generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return list(zip(ids.split(size), labels.split(size), strict=True))


def explicit(model: nn.Module, parameters: dict[str, nn.Parameter], data: list[Any]) -> dict[str, Tensor]:
    """The mean square of each sample's gradient, by a plain loop."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for item in data:
        gradients = torch.autograd.grad(nll(model, item).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            sums[name] += gradient**2 / len(data)
    return sums


@pytest.mark.parametrize("size", [1, 4])
def test_fisher_of_parameters_against_a_loop(size: int) -> None:
    model = Net()
    ewc = EWC(model, 1.0)
    assert ewc.consolidate(batches(size=size), nll) == 6
    expected = explicit(model, dict(model.named_parameters()), batches())
    found = ewc.state_dict()["tensors"]
    for name, value in expected.items():
        assert_close(found[f"0.parameter.{name}.fisher"], value)


def adapted(calls: int = 1, quantize: str | None = None, zero: bool = False) -> Any:
    """A Net with LoRA on its hidden layer and its embedding, trained with its head."""
    model = Net(calls)
    config = peftrt.LoraConfig(r=2, target_modules=["hidden", "table"], modules_to_save=["head"])
    peftrt.adapt(model, config, quantize=quantize)
    if not zero:
        move(model, 0.3)
    return model


def move(model: nn.Module, by: float) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def layers_of(model: nn.Module) -> dict[str, AdapterLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLinear)}


def merged(model: Any) -> Net:
    """A dense Net with the adapters in its weights."""
    dense = Net(model.calls)
    dense.load_state_dict(
        {
            "table.weight": model.table.adapted_weight().t(),
            "hidden.weight": model.hidden.adapted_weight(),
            "hidden.bias": model.hidden.bias,
            **{f"norm.{name}": value for name, value in model.norm.state_dict().items()},
            **{f"head.{name}": value for name, value in model.head.chosen.state_dict().items()},
        }
    )
    return dense


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_fisher_of_a_change_is_that_of_the_dense_weight(quantize: str | None, calls: int, size: int) -> None:
    """F_W from rows and output gradients, over NF4 too, against the gradient of a dense weight of the same values."""
    model = adapted(calls, quantize)
    ewc = EWC(model, 1.0)
    assert ewc.target == "delta"
    ewc.consolidate(batches(size=size), nll)
    dense = merged(model)
    weights = {name: p for name, p in dense.named_parameters() if not name.startswith("norm")}
    expected = explicit(dense, weights, batches())
    tensors = ewc.state_dict()["tensors"]
    # the dense embedding is stored [V, D], as its layer's W [D, V] is not
    assert_close(tensors["0.layer.table.fisher"], expected["table.weight"].t(), intermediate=1e-3)
    assert_close(tensors["0.layer.hidden.fisher"], expected["hidden.weight"], intermediate=1e-3)
    assert_close(tensors["0.parameter.head.copy@default.weight.fisher"], expected["head.weight"], intermediate=1e-3)
    assert not tensors["0.layer.table.fisher"][:, 0].any(), "padding has no gradient"
    assert {name.split(".")[1] for name in tensors} == {"layer", "parameter"}
    assert not any("lora" in name for name in tensors if name.startswith("0.parameter"))


@pytest.mark.parametrize("kind", ["nn.Linear", "Conv1D"])
def test_rows_in_parts_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows of W give the Fisher and the penalty that one gives."""
    model = nn.Sequential(LoRALinear.from_linear(nn.Linear(64, 48) if kind == "nn.Linear" else conv1d(), init=False))
    data = [torch.randn(5, 64) for _ in range(3)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    found = []
    for chunk in (CHUNK, 3 * 64):
        monkeypatch.setattr("peftrt.continual.fisher.CHUNK", chunk)
        other = copy.deepcopy(model)
        ewc = EWC(other, 2.0)
        ewc.consolidate(data, loss)
        move(other, 0.1)
        ewc.penalty().backward()
        fisher = ewc.state_dict()["tensors"]["0.layer.0.fisher"]
        found.append([fisher, ewc.penalty().detach(), *(p.grad for p in other.parameters() if p.grad is not None)])
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, roundings=2)


@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
def test_the_penalty_of_a_change_is_the_formula(cls: type) -> None:
    model = nn.Sequential(cls.from_linear(nn.Linear(64, 48), r=4, init=False))
    layer = model[0]
    ewc = EWC(model, 3.0)
    ewc.consolidate([torch.randn(5, 64)], lambda model, x: model(x).square().sum())
    assert ewc.penalty().item() == 0.0
    before = layer.delta_weight()
    move(model, 0.05)
    kept = ewc.state_dict()["tensors"]
    delta = layer.scaling * layer.lora_B @ layer.lora_A - before
    expected = 3.0 * (kept["0.layer.0.fisher"] * delta**2).sum()
    penalty = ewc.penalty()
    assert_close(penalty, expected.detach(), roundings=4)
    ours = torch.autograd.grad(penalty, (layer.lora_A, layer.lora_B))
    for gradient, truth in zip(ours, torch.autograd.grad(expected, (layer.lora_A, layer.lora_B)), strict=True):
        assert_close(gradient, truth, roundings=4)


def test_little_changes_are_not_lost_to_rounding() -> None:
    """A thousandth of a thousandth of B: the difference of two products in fp32 would be noise."""
    A0, B0, fisher = torch.randn(4, 64), torch.randn(48, 4), torch.rand(48, 64)
    A, B = A0.clone().requires_grad_(), (B0 * (1 + 1e-6 * torch.randn(48, 4))).requires_grad_()
    truth = (fisher.double() * (B.double() @ A.double() - B0.double() @ A0.double()) ** 2).sum()
    found = change_penalty(A, B, fisher, A0, B0)
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)
    expected = torch.autograd.grad(truth, (A, B))
    for gradient, wide in zip(torch.autograd.grad(found, (A, B)), expected, strict=True):
        torch.testing.assert_close(gradient, wide, rtol=1e-3, atol=1e-5 * wide.abs().max().item())


class Largest(TorchDispatchMode):
    """The most elements that an operation inside has given."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_the_change_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftrt.continual.fisher.CHUNK", 8 * 256)
    model = nn.Sequential(QLoRALinear.from_linear(nn.Linear(256, 256), r=4, init=False))
    ewc = EWC(model, 1.0)
    ewc.consolidate([torch.randn(2, 256)], lambda model, x: model(x).sum())
    move(model, 0.1)
    with Largest() as largest:
        ewc.penalty().backward()
    # A and A - A*, below one another, are as much as 8 rows
    assert largest.numel == 8 * 256


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    fisher = draw(5, 7).square()
    for rank in (2, 3, 4):  # the adapter that was kept has 3
        halves = draw(rank, 7).requires_grad_(), draw(5, rank).requires_grad_()
        anchors = draw(3, 7), draw(5, 3)
        assert torch.autograd.gradcheck(lambda A, B, a=anchors: change_penalty(A, B, fisher, *a), halves)
        truth = (fisher * (halves[1] @ halves[0] - anchors[1] @ anchors[0]) ** 2).sum()
        assert_close(change_penalty(*halves, fisher, *anchors).detach(), truth.detach(), roundings=4)
    value, anchor = draw(5, 7).t().requires_grad_(), draw(7, 5)
    assert torch.autograd.gradcheck(lambda p: parameter_penalty(p, fisher.t(), anchor), (value,))


def test_at_b_zero_a_has_no_fisher() -> None:
    """Why the change is what is penalised: where LoRA begins, the Fisher of A itself protects nothing."""
    model = adapted(zero=True)
    assert not model.hidden.lora_B.any()
    by_parameters = EWC(model, 1.0, target="parameters")
    by_parameters.consolidate(batches(), nll)
    tensors = by_parameters.state_dict()["tensors"]
    assert not tensors["0.parameter.hidden.lora_A.fisher"].any()
    assert tensors["0.parameter.hidden.lora_B.fisher"].any()
    by_change = EWC(model, 1.0)
    by_change.consolidate(batches(), nll)
    assert by_change.state_dict()["tensors"]["0.layer.hidden.fisher"].any()
    with torch.no_grad():
        model.hidden.lora_A += 100.0
    # B is 0 still, so the model is what it was, and both say so
    assert by_parameters.penalty().item() == by_change.penalty().item() == 0.0
    with torch.no_grad():
        model.hidden.lora_B += 1e-3
    # now A counts, and only one of the two knows how far it went
    with torch.no_grad():
        near = copy.deepcopy(model)
        near.hidden.lora_A -= 100.0
    assert by_parameters.penalty().item() == pytest.approx(_moved(by_parameters, near).item())
    assert by_change.penalty().item() > 100 * _moved(by_change, near).item() > 0


def _moved(ewc: EWC, model: nn.Module) -> Tensor:
    """The penalty of another model with the same names."""
    other = EWC(model, ewc.lambda_, mode=ewc.mode, target=ewc.target)
    other.load_state_dict(ewc.state_dict())
    return other.penalty()


def test_the_true_fisher_is_the_mean_over_the_models_own_labels() -> None:
    """One sample, seen often: the mean square under drawn labels tends to ``sum_c p_c g_c^2``, within 4 deviations."""
    model = Net()
    ids, label = batches(1)[0]
    ewc = EWC(model, 1.0)
    generator = torch.Generator().manual_seed(0)
    ewc.consolidate([ids] * 2000, logits=lambda model, ids: model(ids), generator=generator)
    parameters = {name: p for name, p in model.named_parameters() if name in ("head.weight", "hidden.weight")}
    p = model(ids).softmax(-1)[0].detach()
    squares = [explicit(model, parameters, [(ids, torch.tensor([c]))]) for c in range(3)]
    for name in parameters:
        found = ewc.state_dict()["tensors"][f"0.parameter.{name}.fisher"].sum()
        of_label = torch.stack([square[name].sum() for square in squares])
        mean = p @ of_label
        deviation = ((p @ (of_label - mean) ** 2) / 2000).sqrt()
        assert (found - mean).abs() < 4 * deviation
        assert (of_label[label] - mean).abs() > 8 * deviation, "the label of the data would do as well"


def test_ewc_forgets_less() -> None:
    """Two tasks that lean on different inputs: with the penalty the second is learnt, and the first is still known."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 200, 20, generator=generator)
    inputs[0, :, 10:] *= 0.05
    inputs[1, :, :10] *= 0.05
    truth = torch.randn(20, generator=generator)
    labels = (inputs @ truth > 0).long()
    accuracies = {}
    for lambda_ in (0.0, 200.0):
        torch.manual_seed(0)
        model = nn.Sequential(LoRALinear.from_linear(nn.Linear(20, 2), r=2))
        ewc = EWC(model, lambda_)
        found = []
        for task in (0, 1):
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
            for _ in range(300):
                optimizer.zero_grad()
                (F.cross_entropy(model(inputs[task]), labels[task]) + ewc.penalty()).backward()
                optimizer.step()
            data = list(zip(inputs[task].split(50), labels[task].split(50), strict=True))
            ewc.consolidate(data, lambda m, item: F.cross_entropy(m(item[0]), item[1], reduction="none"))
            found.append([(model(inputs[t]).argmax(-1) == labels[t]).float().mean().item() for t in (0, 1)])
        accuracies[lambda_] = found
    assert accuracies[0.0][0][0] > 0.97
    assert accuracies[0.0][1][0] < 0.9, "without the penalty it forgets"
    assert accuracies[200.0][1][0] > 0.95
    assert accuracies[200.0][1][1] > 0.9
