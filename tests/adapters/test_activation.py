"""Which adapter is used: set_active, rows, and the backward of checkpointed layers."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

import peftrt
from tests.adapters.tiny import KINDS, NAMES, build, config, logits, tokens, two_adapters, unchanged
from tests.tolerances import assert_close, assert_same_bits


class TestSetActive:
    @pytest.mark.parametrize("kind", KINDS)
    def test_weights_weigh_deltas(self, kind: str) -> None:
        """The weighted sum equals the base whose weights have the weighted deltas in them."""
        model, expected = two_adapters(kind), build(kind)
        weights = {"fr": 0.7, "de": -0.4}
        for path, layer in model.named_modules():
            if isinstance(layer, peftrt.LoRALinear):
                dense = expected.get_submodule(path)
                for name in layer.adapter_names:
                    adapter = layer.adapter(name)
                    delta = adapter.lora_B.double() @ adapter.lora_A.double()
                    change = weights[name] * adapter.lora_alpha / adapter.r * delta
                    dense.weight.data += (change.t() if kind == "gpt2" else change).float()
        peftrt.set_active(model, weights)
        assert peftrt.active_adapters(model) == weights
        assert_close(logits(model), logits(expected), roundings=3)

    def test_flags_stay(self) -> None:
        model = two_adapters()
        flags = [parameter.requires_grad for parameter in model.parameters()]
        for names in (None, "fr", {"fr": 0.5, "de": 0.5}):
            peftrt.set_active(model, names)
            assert [parameter.requires_grad for parameter in model.parameters()] == flags

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("it", "no adapter 'it'.*'fr', 'de'"),
            ({"fr": 1.0, "x": 1.0}, "'x'"),
            ({"fr": float("nan")}, "finite, got nan"),
        ],
    )
    def test_errors(self, names: Any, message: str) -> None:
        model = two_adapters()
        with unchanged(model), pytest.raises(ValueError, match=message):
            peftrt.set_active(model, names)
        with pytest.raises(ValueError, match=r"no adapters; call peftrt\.adapt or peftrt.load"):
            peftrt.set_active(build("llama"), None)

    def test_remove(self) -> None:
        model = two_adapters("bert", modules_to_save=["classifier"])
        bare = build("bert")
        peftrt.set_active(model, "de")
        before = logits(model)
        peftrt.remove(model, "fr")
        assert peftrt.adapter_names(model) == ("de",)
        assert type(model.classifier) is nn.Linear
        assert_same_bits(logits(model), before)
        peftrt.remove(model, "de")
        assert_close(logits(model), logits(bare))
        assert not any("lora_" in key for key in model.state_dict())
        assert list(model.state_dict()) == list(bare.state_dict())
        with pytest.raises(ValueError, match="no adapters"):
            peftrt.remove(model, "de")


class TestRows:
    @pytest.mark.parametrize("quantize", [None, "nf4"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_row_is_what_it_is_alone(self, kind: str, quantize: str | None) -> None:
        changes = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
        model = two_adapters(kind, quantize, **changes)
        if kind == "bert":
            model.classifier.copy_of("fr").weight.data.add_(0.3)
        with peftrt.rows(model, NAMES):
            together = logits(model)
        for row, name in enumerate(NAMES):
            peftrt.set_active(model, name)
            assert_close(together[row : row + 1], logits(model, tokens()[row : row + 1]), roundings=3)
        assert peftrt.active_adapters(model) == {"fr": 1.0}
        with peftrt.rows(model, ["de"] * 3):  # one adapter for all
            same = logits(model)
        peftrt.set_active(model, "de")
        assert_close(same, logits(model), roundings=3)

    def test_a_row_does_not_see_the_others(self) -> None:
        model = two_adapters()
        with peftrt.rows(model, ["fr", "de", None]):
            first = logits(model)
        with peftrt.rows(model, ["fr", None, "de"]):
            second = logits(model)
        assert_same_bits(first[0], second[0])

    def test_expand_is_for_beams(self) -> None:
        model = two_adapters()
        ids = tokens(3).repeat_interleave(2, 0)
        with peftrt.rows(model, NAMES, expand=2):
            beams = logits(model, ids)
        with peftrt.rows(model, NAMES):
            single = logits(model)
        assert_close(beams[::2], single)
        assert_same_bits(beams[::2], beams[1::2])

    @pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck"])
    def test_beams_of_an_encoder_with_a_decoder(self, method: str) -> None:
        """The encoder is given each text once, the decoder as often as there are beams."""
        model = build("t5")
        for name in ("fr", "de"):
            if method == "lora":
                peftrt.adapt(model, config("t5", target_modules=["q", "wi_0", "shared"]), name=name)
            elif method == "ia3":
                ia3 = peftrt.IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"], init_ia3_weights=False)
                peftrt.adapt(model, ia3, name=name)
            else:
                peftrt.adapt(model, peftrt.BottleneckConfig(placement="parallel", init="houlsby"), name=name)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bottleneck" in name:
                    parameter.normal_()
        model.double()
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
        with peftrt.rows(model, NAMES, expand=3):
            together = model.generate(tokens(), **options)
        alone = []
        for row, name in enumerate(NAMES):
            peftrt.set_active(model, name)
            alone.append(model.generate(tokens()[row : row + 1], **options)[0].tolist())
        assert together.tolist() == alone
        assert len({*map(tuple, alone)}) == 3  # the adapters matter

    def test_generation(self) -> None:
        """The model calls itself with one token a step; every row goes on as it does alone."""
        model = two_adapters()
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with peftrt.rows(model, NAMES):
            together = model.generate(tokens(), **options)
        for row, name in enumerate(NAMES):
            peftrt.set_active(model, name)
            assert together[row].tolist() == model.generate(tokens()[row : row + 1], **options)[0].tolist()

    def test_errors(self) -> None:
        model = two_adapters()
        for names, error, message in (
            (["fr", "it"], ValueError, "rows: no adapter 'it' in the model; there are: 'fr', 'de'"),
            ("fr", TypeError, "list with one adapter's name or None"),
            ([], ValueError, "got none"),
        ):
            with pytest.raises(error, match=message), peftrt.rows(model, names):
                pass
        with (
            pytest.raises(ValueError, match="expand must be an integer of at least 1, got 0"),
            peftrt.rows(model, ["fr"], 0),
        ):
            pass
        for names, expand in ((["fr"], 1), (["fr", "de"], 1), (["fr"] * 2, 2)):
            with (
                peftrt.rows(model, names, expand),
                pytest.raises(ValueError, match=f"{len(names) * expand} names .* is 3"),
            ):
                logits(model)
        peftrt.set_active(model, None)
        assert_close(logits(model), logits(build("llama")))  # no routing is left behind

    def test_heads_of_different_sizes_cannot_be_one_batch(self) -> None:
        model = build("bert")
        peftrt.adapt(model, config("bert", modules_to_save=["classifier"]), name="fr")
        model.classifier.copy_of("fr").weight = nn.Parameter(torch.zeros(5, 64))
        model.classifier.copy_of("fr").bias = nn.Parameter(torch.zeros(5))
        peftrt.adapt(model, config("bert", target_modules=["query"]), name="de")
        with peftrt.rows(model, NAMES), pytest.raises(ValueError, match=r"different shapes: \[3\], \[5\]"):
            logits(model)

    def test_threads_do_not_see_each_other(self) -> None:
        model = two_adapters()
        expected = {}
        for name in ("fr", "de"):
            peftrt.set_active(model, name)
            expected[name] = logits(model)
        peftrt.set_active(model, None)
        bare = logits(model)
        gate, results = threading.Barrier(3), {}

        def serve(name: str) -> None:
            with peftrt.rows(model, [name] * 3):
                gate.wait()
                results[name] = logits(model)
                gate.wait()

        threads = [threading.Thread(target=serve, args=(name,)) for name in expected]
        for thread in threads:
            thread.start()
        gate.wait()
        outside = logits(model)
        gate.wait()
        for thread in threads:
            thread.join()
        assert_same_bits(outside, bare)
        for name, value in expected.items():
            assert_close(results[name], value, roundings=3)

    def test_models_do_not_see_each_other(self) -> None:
        first = two_adapters()
        second = copy.deepcopy(first)
        expected = logits(second)
        with peftrt.rows(first, ["fr"]):
            assert_same_bits(logits(second), expected)
        with peftrt.rows(first, ["de", "de", "de"]), peftrt.rows(second, NAMES):
            mixed, other = logits(second), logits(first)
        with peftrt.rows(second, NAMES):
            assert_same_bits(logits(second), mixed)
        with peftrt.rows(first, ["de", "de", "de"]):
            assert_same_bits(logits(first), other)


def test_explain_tells_of_every_site() -> None:
    model = two_adapters(quantize="nf4")
    found = peftrt.explain(model)
    assert len(found.sites) == 12
    site = found.sites["model.layers.0.self_attn.q_proj"]
    assert site.op == "lora_linear"
    assert site.backend in ("native", "triton", "reference")
    assert "model.layers.*.self_attn.q_proj (2x): lora_linear by" in str(found)
    peftrt.set_active(model, None)
    assert peftrt.explain(model).sites["model.layers.0.self_attn.q_proj"].op == "nf4_linear"
    with peftrt.backend("reference"):
        forced = peftrt.explain(model).sites["model.layers.0.self_attn.q_proj"]
    assert forced.backend == "reference"
    assert forced.reasons["native"] == "reference is forced"


def test_explain_one_call() -> None:
    x, weight = torch.randn(2, 64), peftrt.NF4Weight.quantize(torch.randn(8, 64))
    for target in ("nf4_linear", peftrt.ops.nf4_linear):
        with peftrt.backend("reference"):
            assert peftrt.explain(target, x, weight).backend == "reference"
    assert peftrt.explain("nf4_dequantize", weight, torch.float32).op == "nf4_dequantize"
    double = peftrt.explain("nf4_linear", x.double(), weight)
    assert double.backend == "reference"
    assert "native" in double.reasons
    assert "not native" in str(double)
    with pytest.raises(ValueError, match=r"no operation is called 'nf5_linear'; there are .*nf4_linear"):
        peftrt.explain("nf5_linear", x)
    with pytest.raises(ValueError, match=r"K = 64"):
        peftrt.explain("nf4_linear", x[:, :3], weight)
    with pytest.raises(TypeError, match="expected a module or the name"):
        peftrt.explain(3)  # type: ignore[arg-type]
