"""Which adapter is used: set_active, rows, and the backward of checkpointed layers."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftrt
from peftrt.nn import replay
from tests.adapters.tiny import KINDS, TARGETS, build, config, logits, tokens, unchanged
from tests.tolerances import assert_close, assert_same_bits

NAMES = ["de", None, "fr"]


def two_adapters(kind: str = "llama", quantize: str | None = None, **changes: Any) -> Any:
    model = build(kind)
    peftrt.adapt(model, config(kind, **changes), name="fr", quantize=quantize)
    peftrt.adapt(model, config(kind, r=2, target_modules=TARGETS[kind][:2]), name="de", quantize=quantize)
    return model


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
        for names, expand in ((["fr"], 1), (["fr", "de"], 1), (["fr"] * 3, 2)):
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


class Blocks(nn.Module):
    """Regions to checkpoint, in whichever way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def region(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](self.layers[1](x).tanh()).relu()

    def forward(self, x: torch.Tensor, how: str = "plain") -> torch.Tensor:
        reentrant = "reentrant" in how.split()
        x = self.layers[0](x)
        if how == "plain":
            x = self.region(x)
        elif "nested" in how:
            x = checkpoint(lambda x: checkpoint(self.region, x, use_reentrant=reentrant), x, use_reentrant=reentrant)
        else:
            x = checkpoint(self.region, x, use_reentrant=reentrant)
        return self.layers[3](x.sin())


HOW = (
    "reentrant",
    "non-reentrant",
    "nested reentrant",
    "nested non-reentrant",
    "whole reentrant",
    "whole non-reentrant",
)


class TestCheckpointing:
    """What runs again in the backward does so as in its forward, although the block has ended."""

    @staticmethod
    def model() -> Blocks:
        model = Blocks()
        for name in ("fr", "de"):
            rest = {"r": 2, "init_lora_weights": False}
            peftrt.adapt(model, peftrt.LoraConfig(target_modules="all-linear", **rest), name=name)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    @staticmethod
    def run(model: Blocks, x: torch.Tensor, how: str) -> torch.Tensor:
        if "whole" in how:
            return checkpoint(model, x, use_reentrant="reentrant" in how.split())
        return model(x, how)

    @staticmethod
    def grads(model: Blocks, *inputs: torch.Tensor) -> list[torch.Tensor]:
        found = [parameter.grad for parameter in model.parameters()] + [x.grad for x in inputs]
        for tensor in (*model.parameters(), *inputs):
            tensor.grad = None
        return found

    @pytest.mark.parametrize("inside", [False, True])
    @pytest.mark.parametrize("how", HOW)
    def test_two_blocks_in_one_backward(self, how: str, inside: bool) -> None:
        model = self.model()
        first, second, third = (torch.randn(3, 8, requires_grad=True) for _ in range(3))

        def step(how: str) -> list[torch.Tensor]:
            with peftrt.rows(model, NAMES):
                loss = self.run(model, first, how).sum()
            with peftrt.rows(model, ["fr", "fr", "de"]):
                loss = loss + 2 * self.run(model, second, how).sum()
                if inside:
                    loss.backward()
            if not inside:
                # and one outside of any block
                (loss + 3 * self.run(model, third, how).sum()).backward()
            return self.grads(model, first, second, third)

        for got, expected in zip(step(how), step("plain"), strict=True):
            if expected is None:
                assert got is None
            else:
                assert_same_bits(got, expected)

    @pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
    def test_backward_in_another_thread(self, how: str) -> None:
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)
        with peftrt.rows(model, NAMES):
            self.run(model, x, "plain").sum().backward()
        expected = self.grads(model, x)
        with peftrt.rows(model, NAMES):
            loss = self.run(model, x, how).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        for got, want in zip(self.grads(model, x), expected, strict=True):
            assert_same_bits(got, want)

    @pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
    def test_a_block_inside_the_region(self, how: str) -> None:
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)

        def region(x: torch.Tensor) -> torch.Tensor:
            with peftrt.rows(model, NAMES):
                return model.region(x)

        region(x).sum().backward()
        expected = self.grads(model, x)
        with peftrt.rows(model, ["fr"] * 3):
            loss = checkpoint(region, x, use_reentrant=how == "reentrant").sum()
        loss.backward()
        for got, want in zip(self.grads(model, x), expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                assert_same_bits(got, want)

    def test_a_failed_backward_leaves_nothing_behind(self) -> None:
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)

        def fail(grad: torch.Tensor) -> None:
            raise RuntimeError("stop")

        with peftrt.rows(model, NAMES):
            hidden = model.layers[0](x)
            hidden.register_hook(fail)
            loss = checkpoint(model.region, hidden, use_reentrant=True).sum()
        with pytest.raises(RuntimeError, match="stop"):
            loss.backward()
        self.grads(model, x)
        self.run(model, x, "plain").sum().backward()
        expected = self.grads(model, x)
        self.run(model, x, "nested reentrant").sum().backward()
        for got, want in zip(self.grads(model, x), expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                assert_same_bits(got, want)

    def test_a_graph_older_than_what_is_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replay, "MAX_SPANS", 4)
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)
        with peftrt.rows(model, NAMES):
            old = self.run(model, x, "non-reentrant").sum()
        for _ in range(replay.MAX_SPANS + 1):
            with peftrt.rows(model, NAMES):
                new = self.run(model, x, "non-reentrant").sum()
        new.backward()
        with pytest.raises(RuntimeError, match="more than 4 rows"):
            old.backward()

    def test_serving_remembers_nothing(self) -> None:
        model = self.model()

        def serve() -> None:
            with torch.no_grad(), peftrt.rows(model, NAMES):
                model(torch.randn(3, 8))
            kept.append(len(replay._local.spans.spans))

        kept: list[int] = []
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        assert kept == [0]

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_hugging_face(self, reentrant: bool) -> None:
        model = two_adapters()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.train()
        model.enable_input_require_grads()

        def step() -> dict[str, torch.Tensor]:
            with peftrt.rows(model, NAMES):
                loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            return found

        expected = step()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = step()
        assert got.keys() == expected.keys()
        assert any("@de" in name for name in got)
        for name, value in expected.items():
            assert_same_bits(got[name], value)


class TestModule:
    """An adapted model is still a module like any other."""

    @pytest.mark.parametrize("quantize", [None, "nf4"])
    @pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, through: Any, quantize: str | None) -> None:
        model = two_adapters("bert", quantize, modules_to_save=["classifier"])
        peftrt.set_active(model, {"fr": 1.0, "de": 0.5})
        copied = through(model)
        assert_same_bits(logits(copied), logits(model))
        before = logits(model)
        peftrt.set_active(copied, None)
        with peftrt.rows(copied, NAMES):
            mixed = logits(copied)
        with peftrt.rows(model, NAMES):
            assert_same_bits(logits(model), mixed)
        peftrt.remove(copied, "fr")
        assert peftrt.adapter_names(model) == ("fr", "de")
        assert_same_bits(logits(model), before)

    @pytest.mark.parametrize("quantize", [None, "nf4"])
    def test_state_dict(self, quantize: str | None) -> None:
        model = two_adapters("bert", quantize, modules_to_save=["classifier"])
        state = model.state_dict()
        # the base's keys are what they were
        assert set(build("bert").state_dict()) <= set(state)
        assert {"classifier.copy@fr.weight", "classifier.copy@fr.bias"} < set(state)
        torch.manual_seed(99)
        other = two_adapters("bert", quantize, modules_to_save=["classifier"])
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.is_floating_point():
                    parameter.add_(1.0)
        other.load_state_dict(state)
        for name in ("fr", "de"):
            peftrt.set_active(model, name)
            peftrt.set_active(other, name)
            assert_same_bits(logits(other), logits(model))

    def test_a_dense_checkpoint_loads_into_a_quantised_model(self) -> None:
        model = two_adapters("bert", "nf4", modules_to_save=["classifier"])
        peftrt.set_active(model, None)
        expected = logits(model)
        base = build("bert").state_dict()
        result = model.load_state_dict(base, strict=False)
        assert not result.unexpected_keys
        assert all("lora_" in key or "copy@" in key for key in result.missing_keys)
        assert_same_bits(logits(model), expected)

    def test_compile_without_a_break(self) -> None:
        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.head = nn.Linear(64, 64), nn.Linear(64, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.up(x).relu())

        model = Small()
        changes = {"r": 2, "init_lora_weights": False, "modules_to_save": ["head"]}
        peftrt.adapt(model, peftrt.LoraConfig(target_modules=["up"], **changes), name="fr", quantize="nf4")
        x = torch.randn(3, 64)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with peftrt.rows(model, ["fr"] * 3):  # a block in the past must not matter
            model(x).sum().backward()
        model.zero_grad()
        assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(x).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_close(got[name], parameter.grad)
        # functions of peftrt take the compiled model, too
        peftrt.set_active(compiled, None)
        assert peftrt.active_adapters(model) == {}
        assert_close(compiled(x), model(x))


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
