"""IA3 on whole models: the same files and logits as HF peft's, rows beside LoRA, merging, training, NF4 bases."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from peftrt.adapters.configs.ia3 import IA3Config
from peftrt.formats.errors import ConfigError, UnsupportedError
from peftrt.nn import AdapterLinear, IA3Adapter
from tests.adapters.test_peft import LIMIT, scramble
from tests.adapters.tiny import (
    ALL_KINDS,
    TASKS,
    config,
    inputs_of,
    logits,
    mild,
    quiet,
    state_of,
    tokens,
    unchanged,
)
from tests.tolerances import assert_close, assert_same_bits

peft = pytest.importorskip("peft")

# what peft adapts of such a model where nobody says it
TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["key", "value", "output.dense"],
    "t5": ["k", "v", "wo"],
}
INNER = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["output.dense"], "t5": ["wo"]}

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "outputs alone": {"feedforward_modules": []},
    "inputs alone": {"inner": True},
    "regex": {"regex": True},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"exclude_modules": "exclude"},
    "task": {"task": True},
}
CASES = [(kind, variant) for kind in ALL_KINDS for variant in VARIANTS]


def fields(kind: str, variant: str = "paper", **more: Any) -> dict[str, Any]:
    """A variant's fields for a model; they are the same for peft and peftrt."""
    changes = dict(VARIANTS[variant])
    result: dict[str, Any] = {
        "target_modules": TARGETS[kind],
        "feedforward_modules": INNER[kind],
        "init_ia3_weights": False,
        "fan_in_fan_out": kind == "gpt2",
    }
    if changes.pop("inner", False):
        result["target_modules"] = INNER[kind]
    if changes.pop("regex", False):
        result["target_modules"] = rf".*\.0\..*({'|'.join(TARGETS[kind])})"
        result["feedforward_modules"] = rf".*({'|'.join(INNER[kind])})"
    if changes.pop("task", False):
        result["task_type"] = TASKS[kind]
    if "exclude_modules" in changes:
        changes["exclude_modules"] = [TARGETS[kind][0]]
    return {**result, **changes, **more}


def biased(kind: str) -> Any:
    """A model whose biases are not zero: what scales a bias must show."""
    model = mild(kind)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def peft_model(kind: str, values: dict[str, Any], base: nn.Module | None = None) -> Any:
    quiet()
    model = peft.get_peft_model(base or biased(kind), peft.IA3Config(**values)).eval()
    scramble(model)
    return model


def peft_load(kind: str, path: Path) -> Any:
    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")  # not an error there
        return peft.PeftModel.from_pretrained(biased(kind), str(path)).eval()


def difference(kind: str, variant: str, path: Path) -> tuple[float, float]:
    """Of logits: ours from peft's for what peft saved, and peft's own from the base's."""
    theirs = peft_model(kind, fields(kind, variant))
    theirs.save_pretrained(str(path))
    ours = biased(kind)
    base = logits(ours)
    peftrt.load(ours, path, name="fr")
    assert torch.equal(logits(ours), base)  # loading does not activate
    peftrt.set_active(ours, "fr")
    expected = logits(theirs)
    return (logits(ours) - expected).abs().max().item(), (expected - base).abs().max().item()


def ours(kind: str, variant: str = "paper", quantize: str | None = None, **more: Any) -> Any:
    model = biased(kind)
    peftrt.adapt(model, IA3Config(**fields(kind, variant, **more)), name="fr", quantize=quantize)
    return model


def layers_of(model: nn.Module) -> dict[str, AdapterLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLinear)}


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_what_peft_saves_gives_the_same_logits(kind: str, variant: str, tmp_path: Path) -> None:
    between, effect = difference(kind, variant, tmp_path)
    assert effect > 20 * LIMIT
    assert between <= LIMIT


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_peft_gives_the_same_logits_for_what_is_saved(kind: str, variant: str, tmp_path: Path) -> None:
    model = ours(kind, variant)
    peftrt.save(model, tmp_path, name="fr")
    expected = logits(model)
    assert (expected - logits(biased(kind))).abs().max() > 20 * LIMIT
    assert (logits(peft_load(kind, tmp_path)) - expected).abs().max() <= LIMIT
    again = biased(kind)
    peftrt.load(again, tmp_path, name="de")
    peftrt.set_active(again, "de")
    assert_same_bits(logits(again), expected)


MUTANTS: dict[str, tuple[str, Any]] = {
    "outputs scaled as inputs": ("y_scale", property(lambda self: None)),
    "inputs not scaled": ("x_scale", property(lambda self: None)),
    "the bias left out of it": ("of_bias", lambda self, bias: bias),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_implementation_would_show(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = MUTANTS[mutant]
    if mutant == "outputs scaled as inputs":  # keys and values of this model are square
        monkeypatch.setattr(IA3Adapter, "x_scale", property(lambda self: self.ia3_l.view(-1)))
    monkeypatch.setattr(IA3Adapter, name, wrong)
    kind, variant = ("bert", "outputs alone") if name != "x_scale" else ("bert", "paper")
    if mutant == "outputs scaled as inputs":
        monkeypatch.setitem(TARGETS, "bert", ["key", "value"])
    between, _ = difference(kind, variant, tmp_path)
    assert between > 20 * LIMIT


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_the_same_modules_are_adapted(kind: str, variant: str) -> None:
    values = fields(kind, variant)
    theirs = peft_model(kind, values)
    model = biased(kind)
    report = peftrt.adapt(model, IA3Config(**values))
    layer = peft.tuners.ia3.layer.IA3Layer
    found = {path.removeprefix("base_model.model."): m for path, m in theirs.named_modules() if isinstance(m, layer)}
    assert list(report.matched) == list(found)
    assert report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for path, module in found.items():
        adapter = model.get_submodule(path).ia3("default")
        assert adapter.feedforward == module.is_feedforward
        assert adapter.ia3_l.shape == module.ia3_l["default"].shape


def test_files_and_keys_are_peft_s(tmp_path: Path) -> None:
    from safetensors import safe_open

    for kind in ("bert", "gpt2"):
        values = fields(kind, "task")
        peft_model(kind, values).save_pretrained(str(tmp_path / "theirs"))
        model = biased(kind)
        peftrt.adapt(model, IA3Config(**values))
        peftrt.save(model, tmp_path / "ours")
        keys = {}
        for who in ("ours", "theirs"):
            with safe_open(tmp_path / who / "adapter_model.safetensors", "pt") as file:
                keys[who] = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert keys["ours"] == keys["theirs"]
        written = {who: json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in keys}
        for field, value in written["ours"].items():
            theirs = written["theirs"][field]
            if field in ("target_modules", "feedforward_modules"):
                assert set(theirs) == set(value)
            elif field == "modules_to_save":  # peft names heads that are not there
                assert set(theirs or ()) - {"score"} == set(value or ())
            elif field != "base_model_name_or_path":
                assert value == theirs or (not value and not theirs), field


def loss_of(model: Any) -> Tensor:
    ids = tokens(4, 7, seed=2)
    out = model(ids, **inputs_of(model, ids)).logits
    labels = torch.arange(out.shape[:-1].numel()) % out.shape[-1]
    return nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), labels)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_gradients_and_training_equal_peft_s(kind: str) -> None:
    values = fields(kind, "paper", init_ia3_weights=True)
    theirs = peft.get_peft_model(biased(kind), peft.IA3Config(**values)).eval()
    mine = biased(kind)
    peftrt.adapt(mine, IA3Config(**values))
    assert_close(logits(mine), logits(theirs), roundings=4)
    named = {
        name.removeprefix("base_model.model.").removesuffix(".default"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    own = {name: parameter for name, parameter in mine.named_parameters() if parameter.requires_grad}
    assert own.keys() == named.keys()
    optimizers = [torch.optim.SGD(p.values(), lr=10.0 if kind == "bert" else 1.0) for p in (own, named)]
    losses = []
    for _ in range(5):
        pair = [loss_of(mine), loss_of(theirs)]
        losses.append(pair[0].item())
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        largest = max(p.grad.abs().max().item() for p in named.values())
        for name, parameter in own.items():
            assert_close(parameter.grad, named[name].grad, roundings=8, intermediate=largest)
        for optimizer in optimizers:
            optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_over_an_nf4_base(kind: str, tmp_path: Path) -> None:
    """peft over the same dequantised weights is the truth; training lowers the loss."""
    model = ours(kind, quantize="nf4", init_ia3_weights=True)
    scramble(model)
    peftrt.save(model, tmp_path)
    theirs = peft_load(kind, tmp_path)
    quantised = 0
    for path, module in layers_of(model).items():
        if isinstance(module, peftrt.QLoRALinear):
            quantised += 1
            inner = theirs.get_submodule(f"base_model.model.{path}").base_layer
            weight = module.nf4_weight().dequantize()
            inner.weight.data = weight.t().contiguous() if module._transposed else weight
    assert quantised >= 4
    assert (logits(model) - logits(theirs)).abs().max() <= LIMIT
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_rows_serve_ia3_and_lora_in_one_batch(kind: str, quantize: str | None) -> None:
    """Some layers hold one of them, some both."""
    model = ours(kind, quantize=quantize)
    targets = [TARGETS[kind][0], INNER[kind][0]]
    peftrt.adapt(model, config(kind, target_modules=targets), name="lora", quantize=quantize)
    both = [layer for layer in layers_of(model).values() if layer.adapter_names == ("fr", "lora")]
    assert both
    alone = {}
    for name in ("fr", "lora", None):
        peftrt.set_active(model, name)
        alone[name] = logits(model)
    names = ["lora", None, "fr"]
    with peftrt.rows(model, names):
        together = logits(model)
    for row, name in enumerate(names):
        assert_close(together[row], alone[name][row], roundings=12)
    assert (alone["fr"] - alone["lora"]).abs().max() > 20 * LIMIT
    with pytest.raises(ValueError, match=r"set_active: .*: 'fr' of IA3 cannot be summed"), unchanged(model):
        peftrt.set_active(model, {"fr": 1.0, "lora": 1.0})
    with pytest.raises(ValueError, match=r"'fr' of IA3 cannot be summed"), unchanged(model):
        peftrt.set_active(model, {"fr": 0.5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_merging_there_and_back(kind: str, dtype: torch.dtype) -> None:
    model = biased(kind).to(dtype)
    peftrt.adapt(model, IA3Config(**fields(kind)), name="fr")
    before, expected = state_of(model), logits(model)
    peftrt.merge(model)
    first = next(iter(layers_of(model)))
    assert peftrt.explain(model).sites[first].op == "linear"
    assert_close(logits(model), expected, roundings=16)
    peftrt.unmerge(model)
    for key, value in state_of(model).items():
        if isinstance(value, Tensor):
            assert_same_bits(value, before[key])
    assert_same_bits(logits(model), expected)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_exported_model_is_the_adapted_one(kind: str, quantize: str | None, tmp_path: Path) -> None:
    model = ours(kind, quantize=quantize)
    peftrt.export(model, tmp_path / "merged", dtype=torch.float32)
    quiet()
    plain = type(model).from_pretrained(tmp_path / "merged").eval()
    assert_close(logits(plain), logits(model), roundings=16)


def test_reports_and_removal() -> None:
    model = biased("llama")
    report = peftrt.adapt(model, IA3Config(**fields("llama", init_ia3_weights=True)), name="fr")
    assert_close(logits(model), logits(biased("llama")), roundings=4)
    assert "ia3_linear by" in str(report)
    assert {site.r for site in report.sites} == {None}
    assert report.trainable == 2 * (32 + 32 + 96)
    first = report.matched[0]
    assert peftrt.explain(model).sites[first].op == "ia3_linear"
    assert "IA3 of outputs" in repr(model)
    assert "IA3 of inputs" in repr(model)
    assert copy.deepcopy(model).model.layers[0].mlp.down_proj.ia3("fr") is not None
    peftrt.remove(model, "fr")
    assert peftrt.adapter_names(model) == ()
    assert_same_bits(logits(model), logits(biased("llama")))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an embedding": (
        {"target_modules": ["embed_tokens"], "feedforward_modules": []},
        UnsupportedError,
        "IA3 of an emb",
    ),
    "nothing": ({"target_modules": ["nope"], "feedforward_modules": []}, ConfigError, "'nope' matches no module"),
    "no such inner": (
        {"feedforward_modules": "down"},
        ConfigError,
        "feedforward_modules: 'down' matches no module that is adapted",
    ),
    "an inner one that is not adapted": (
        {"target_modules": ".*k_proj", "feedforward_modules": ["k_proj", "down_proj"]},
        ConfigError,
        "feedforward_modules: 'down_proj' matches no module that is adapted",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_changes_nothing(case: str) -> None:
    changes, error, message = REFUSED[case]
    model = biased("llama")
    with unchanged(model), pytest.raises(error, match=message):
        peftrt.adapt(model, IA3Config(**fields("llama", **changes)))
