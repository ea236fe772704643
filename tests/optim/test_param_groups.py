"""Groups of an optimizer: who is in which, at what rate, and that HF peft's LoRA+ sorts the same way."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import peftrt
from peftrt.optim import param_groups
from tests.adapters.tiny import build, config, quiet


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


def adapted() -> Any:
    model = build("bert")
    peftrt.adapt(model, config("bert", modules_to_save=["classifier", "LayerNorm"]), name="fr")
    return model


def test_every_trained_parameter_is_in_one_group() -> None:
    model = adapted()
    groups = param_groups(model, 1e-3, loraplus_lr_ratio=16, weight_decay=0.1)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert [group["name"] for group in groups] == ["lora_A", "lora_B", "other", "no_decay"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert all(name.endswith("lora_A@fr") for name in members["lora_A"])
    assert all(name.endswith("lora_B@fr") for name in members["lora_B"])
    assert members["other"] == {"classifier.copy@fr.weight"}
    assert "classifier.copy@fr.bias" in members["no_decay"]
    assert "bert.embeddings.LayerNorm.copy@fr.weight" in members["no_decay"]


def test_rates_and_decay() -> None:
    groups = by_name(param_groups(adapted(), 1e-3, loraplus_lr_ratio=16, weight_decay=0.1))
    got = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    fast = 16 * 1e-3
    assert got == {"lora_A": (1e-3, 0.1), "lora_B": (fast, 0.1), "other": (1e-3, 0.1), "no_decay": (fast, 0.0)}
    assert {group["lr"] for group in param_groups(adapted(), 1e-3)} == {1e-3}


def test_factors_are_not_pulled_to_zero() -> None:
    """They begin at 1, as matrices of one row or column: a decay would make them forget the base."""
    model = build("llama")
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    peftrt.adapt(model, peftrt.IA3Config(**targets), name="fr")
    (group,) = param_groups(model, 1e-3, loraplus_lr_ratio=16, weight_decay=0.1)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("factors", 1e-3, 0.0)
    assert len(group["params"]) == 4


def test_embeddings_and_magnitudes_have_groups_of_their_own() -> None:
    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape))

    named = {
        "e.lora_embedding_A": parameter(2, 8),
        "e.lora_embedding_B@fr": parameter(4, 2),
        "q.lora_magnitude_vector@fr": parameter(4),
        "q.lora_B": parameter(4, 2),
        "q.lora_A.fr.weight": parameter(2, 4),
    }
    groups = by_name(param_groups(named, 1.0, loraplus_lr_ratio=4, weight_decay=0.5, embedding_lr=0.25))
    assert groups["embedding"]["params"] == [named["e.lora_embedding_A"], named["e.lora_embedding_B@fr"]]
    assert (groups["embedding"]["lr"], groups["embedding"]["weight_decay"]) == (0.25, 0.5)
    assert groups["magnitude"]["params"] == [named["q.lora_magnitude_vector@fr"]]
    assert (groups["magnitude"]["lr"], groups["magnitude"]["weight_decay"]) == (4.0, 0.0)
    assert groups["lora_A"]["params"] == [named["q.lora_A.fr.weight"]]
    assert by_name(param_groups(named, 1.0))["embedding"]["lr"] == 1.0


def test_a_shared_parameter_counts_once_and_a_norm_by_its_class() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm((3, 4))
            self.down.weight = self.up.weight
            self.up.bias.requires_grad_(False)

    net = Net()
    groups = by_name(param_groups(net, 1.0))
    assert [id(p) for p in groups["other"]["params"]] == [id(net.up.weight)]
    assert {id(p) for p in groups["no_decay"]["params"]} == {id(p) for p in (net.down.bias, *net.norm.parameters())}


def test_an_optimizer_takes_them() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, loraplus_lr_ratio=8))
    model.train()(torch.arange(6)[None]).logits.sum().backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    # Adam's first step is the learning rate, whatever the gradient
    assert moved["bert.encoder.layer.0.attention.self.query.lora_A@fr"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["bert.encoder.layer.0.attention.self.query.lora_B@fr"] == pytest.approx(8e-2, rel=1e-3)
    assert moved["bert.encoder.layer.0.attention.self.query.weight"] == 0


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_rates_equal_peft_s(kind: str) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    quiet()
    targets = {"llama": ["q_proj", "embed_tokens"], "bert": ["query", "word_embeddings"]}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {"target_modules": targets, "use_dora": True, "modules_to_save": ["norm", "LayerNorm", "classifier"]}
        model = peft.get_peft_model(build(kind), peft.LoraConfig(**fields))
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_weight_decay=0.1, **options)
    expected = {id(p): (g["lr"], g["weight_decay"]) for g in theirs.param_groups for p in g["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, weight_decay=0.1, embedding_lr=1e-6, **options)
    got = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert got.keys() == expected.keys()
    vectors = {id(p) for p in model.parameters() if p.dim() < 2}
    for key, (rate, decay) in got.items():
        # peft knows nn.LayerNorm only, and lets DoRA's vectors and Llama's norms decay; here no vector does
        assert decay == (0.0 if key in vectors else expected[key][1]), names[key]
        if not ("lora_magnitude" in names[key] and "embed" in names[key]):  # peft: an embedding's, as its matrices
            assert rate == expected[key][0], names[key]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay must be"),
        ({"lr": 1.0, "loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio must be a finite number above 0, got 0.0"),
        ({"lr": 1.0, "embedding_lr": float("inf")}, "embedding_lr must be"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Linear(2, 2), **arguments)  # type: ignore[arg-type]


def test_nothing_to_train_and_no_model() -> None:
    with pytest.raises(ValueError, match="nothing in the model requires gradients"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1.0)
    with pytest.raises(TypeError, match="expected a module, or Parameters by name, got list"):
        param_groups([], 1.0)  # type: ignore[arg-type]
