"""add_weighted_adapter: sums of adapters as adapters, against their definition and against HF peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftrt
from peftrt.adapters.combining import closest
from peftrt.formats.errors import AdapterNameError
from peftrt.nn import AdapterLinear
from tests.adapters.tiny import TARGETS, build, config, logits, quiet, two_adapters, unchanged
from tests.tolerances import assert_same_bits

WEIGHTS = {"fr": 0.7, "de": -0.4}


def same_rank(kind: str = "llama", **changes: Any) -> Any:
    model = build(kind)
    for name, alpha in (("fr", 8), ("de", 2)):
        peftrt.adapt(model, config(kind, lora_alpha=alpha, **changes), name=name)
    return model


def deltas(model: Any, weights: Any) -> dict[str, torch.Tensor]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdapterLinear)}
    return {
        path: sum(w * layer.adapter(n).delta() for n, w in weights.items() if n in layer.adapter_names)
        for path, layer in layers.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_cat_is_the_sum(kind: str) -> None:
    model = two_adapters(kind)
    peftrt.set_active(model, WEIGHTS)
    expected = logits(model)
    made = peftrt.add_weighted_adapter(model, WEIGHTS, "both", combination_type="cat")
    assert made.r == 6
    assert_same_bits(logits(model), expected)  # not activated
    peftrt.set_active(model, "both")
    assert (logits(model) - expected).abs().max() < 2e-6
    assert not [n for n, p in model.named_parameters() if "both" in n and p.requires_grad]


def test_svd_is_the_closest_of_its_rank() -> None:
    model = two_adapters()
    peftrt.add_weighted_adapter(model, WEIGHTS, "both", combination_type="svd", svd_rank=3)
    for path, delta in deltas(model, WEIGHTS).items():
        layer = model.get_submodule(path)
        assert layer.adapter("both").r == 3
        assert layer.adapter("both").scaling == 1.0
        lost = (layer.adapter("both").delta() - delta).norm()
        rest = torch.linalg.svdvals(delta.double())[3:].norm()
        assert abs(lost - rest) < 1e-5 * delta.norm()


def test_svd_of_full_rank_is_the_sum() -> None:
    model = two_adapters()
    peftrt.add_weighted_adapter(model, WEIGHTS, "both", svd_rank=9)  # more than there is
    for path, delta in deltas(model, WEIGHTS).items():
        assert (model.get_submodule(path).adapter("both").delta() - delta).abs().max() < 1e-6


def test_closest_is_written_out() -> None:
    lora_A, lora_B = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, -2.0]])
    new_A, new_B = closest(lora_A, lora_B, 1)
    assert (new_B @ new_A - torch.tensor([[3.0, 0.0], [0.0, 0.0]])).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_as_peft_combines(kind: str, how: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    quiet()
    model = same_rank(kind)
    for name in ("fr", "de"):
        peftrt.save(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(build(kind), str(tmp_path / "fr"), adapter_name="fr")
    theirs.load_adapter(str(tmp_path / "de"), adapter_name="de")
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "both", combination_type=how)
    theirs.set_adapter("both")
    peftrt.add_weighted_adapter(model, WEIGHTS, "both", combination_type=how)
    peftrt.set_active(model, "both")
    assert (logits(model) - logits(theirs.eval())).abs().max() < 5e-6
    peftrt.set_active(model, WEIGHTS)
    apart = (logits(model) - logits(theirs)).abs().max()
    assert (apart < 5e-6) == (how == "cat")  # a rank of 4 cannot hold two of 4


def test_what_comes_of_it_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    model = two_adapters()
    peftrt.add_weighted_adapter(model, WEIGHTS, "both", combination_type="cat")
    peftrt.set_active(model, "both")
    expected = logits(model)
    peftrt.save(model, tmp_path, name="both")
    for name in ("fr", "de"):
        peftrt.remove(model, name)
    assert_same_bits(logits(model), expected)
    other = build("llama")
    peftrt.load(other, tmp_path, name="x")
    peftrt.set_active(other, "x")
    assert (logits(other) - expected).abs().max() < 1e-6


def test_embeddings_and_heads_go_with_it() -> None:
    model = build("bert")
    whole = {"target_modules": [*TARGETS["bert"], "word_embeddings"]}
    peftrt.adapt(model, config("bert", modules_to_save=["classifier"], **whole), name="fr")
    peftrt.adapt(model, config("bert", **whole), name="de")
    peftrt.set_active(model, WEIGHTS | {"fr": 1.0})
    expected = logits(model)
    made = peftrt.add_weighted_adapter(model, WEIGHTS | {"fr": 1.0}, "both", combination_type="cat")
    assert made.modules_to_save == ("classifier",)
    peftrt.set_active(model, "both")
    assert (logits(model) - expected).abs().max() < 2e-6


def test_adapters_that_hold_a_part_of_the_base() -> None:
    model = build("llama")
    base = logits(model)
    peftrt.adapt(model, config("llama", init_lora_weights="pissa", r=4), name="fr")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B@fr" in name:
                parameter.mul_(1.5)
    peftrt.set_active(model, {"fr": 0.5})
    expected = logits(model)
    peftrt.add_weighted_adapter(model, {"fr": 0.5}, "part", combination_type="cat")
    peftrt.set_active(model, "part")
    assert (expected - base).abs().max() > 1e-3
    assert (logits(model) - expected).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"xx": 1.0}, {}, "no adapter 'xx' in the model"),
        ({}, {}, "adapters must name at least one"),
        ({"fr": float("nan")}, {}, "weight must be finite"),
        (WEIGHTS, {"combination_type": "ties"}, "must be one of 'svd', 'linear', 'cat', got 'ties'"),
        (WEIGHTS, {"combination_type": "linear"}, r"'linear' needs one rank, .*q_proj has \[2, 4\]"),
        (WEIGHTS, {"svd_rank": 0}, "svd_rank must be an integer of at least 1"),
        (WEIGHTS, {"svd_rank": 2, "combination_type": "cat"}, "for 'svd' alone, got 2"),
    ],
)
def test_what_is_refused(weights: Any, options: Any, message: str) -> None:
    model = two_adapters()
    with unchanged(model), pytest.raises(ValueError, match=message):
        peftrt.add_weighted_adapter(model, weights, "both", **options)


def test_what_cannot_be_summed_is_refused() -> None:
    model = two_adapters()
    peftrt.adapt(model, config("llama", use_dora=True), name="dora")
    peftrt.adapt(model, peftrt.BottleneckConfig(), name="bn")
    for name, message in (("dora", "'dora' is DoRA's"), ("bn", r"'bn' \(BottleneckConfig\) is not LoRA")):
        with unchanged(model), pytest.raises(ValueError, match=message):
            peftrt.add_weighted_adapter(model, {"fr": 1.0, name: 1.0}, "both")
    with unchanged(model), pytest.raises(AdapterNameError):
        peftrt.add_weighted_adapter(model, WEIGHTS, "fr")
    bert = build("bert")
    for name in ("fr", "de"):
        peftrt.adapt(bert, config("bert", modules_to_save=["classifier"]), name=name)
    with unchanged(bert), pytest.raises(ValueError, match="'fr', 'de' each have a copy of classifier"):
        peftrt.add_weighted_adapter(bert, WEIGHTS, "both")
    peftrt.set_active(model, "fr")
    peftrt.merge(model)
    with unchanged(model), pytest.raises(ValueError, match="merged into the base"):
        peftrt.add_weighted_adapter(model, WEIGHTS, "both")


def with_factors(kind: str = "llama") -> Any:
    """A model with two IA3 adapters of one shape."""
    model = build(kind)
    targets, inner = TARGETS[kind][:2], TARGETS[kind][1:2]
    for seed, name in enumerate(("fr", "de")):
        torch.manual_seed(seed)
        config_of = peftrt.IA3Config(target_modules=targets, feedforward_modules=inner, init_ia3_weights=False)
        peftrt.adapt(model, config_of, name=name)
    return model


def test_ia3_is_summed_as_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    quiet()
    model = with_factors()
    for name in ("fr", "de"):
        peftrt.save(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path / "fr"), adapter_name="fr")
    theirs.load_adapter(str(tmp_path / "de"), adapter_name="de")
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "both")
    theirs.set_adapter("both")
    before = logits(model)
    peftrt.add_weighted_adapter(model, WEIGHTS, "both")
    assert_same_bits(logits(model), before)
    peftrt.set_active(model, "both")
    assert (logits(model) - logits(theirs.eval())).abs().max() < 1e-6
    assert (logits(model) - before).abs().max() > 1e-3


def test_factors_that_do_not_go_together_are_refused() -> None:
    model = with_factors()
    other = peftrt.IA3Config(target_modules=TARGETS["llama"][:1], feedforward_modules=[])
    peftrt.adapt(model, other, name="es")
    peftrt.adapt(model, config("llama"), name="lora")
    with unchanged(model):
        with pytest.raises(ValueError, match="k_proj has factors of 'fr'; adapters of IA3"):
            peftrt.add_weighted_adapter(model, {"fr": 1.0, "es": 1.0}, "both")
        with pytest.raises(ValueError, match="of LoRA and of IA3 cannot be summed"):
            peftrt.add_weighted_adapter(model, {"fr": 1.0, "lora": 1.0}, "both")
        with pytest.raises(ValueError, match="summed 'linear', got 'svd'"):
            peftrt.add_weighted_adapter(model, WEIGHTS, "both", combination_type="svd")
