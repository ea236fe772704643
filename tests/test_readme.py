"""The README's examples run as they stand, on a model of small sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import peftrt
from tests.adapters.tiny import build, config, logits, tokens

README = Path(__file__).parent.parent / "README.md"
RANKS = {"rank8": 8, "rank16": 16, "rank64": 64, "rank256": 256}


def block(mark: str) -> str:
    """The one Python block that holds ``mark``."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if mark in code]
    return found


def test_the_serving_example_serves_each_row_its_own_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, (folder, rank) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        model = build("llama")
        peftrt.adapt(model, config("llama", r=rank, lora_alpha=6 * rank), name=folder)
        peftrt.save(model, Path("adapters") / folder)
    served: Any = build("llama")
    prompts = {"input_ids": tokens(4), "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    names: dict[str, Any] = {"peftrt": peftrt, "model": served, "prompts_of_four": prompts}
    # a pool on a CPU takes its budget from RAM
    exec(block("AdapterPool").replace('"2GiB"', '"8MiB"').replace('"16GiB"', '"8MiB"'), names)
    assert "adapters_known: 2\n" in capsys.readouterr().out
    for i, folder in enumerate(("rank8", "rank256", None, "rank64")):
        alone: Any = build("llama")
        if folder is not None:
            peftrt.load(alone, Path("adapters") / folder, name=folder)
            peftrt.set_active(alone, folder)
        one = alone.generate(**{**prompts, "input_ids": tokens(4)[i : i + 1]})
        assert names["tokens"][i].tolist() == one[0].tolist(), folder
    assert len({tuple(row.tolist()) for row in names["tokens"]}) == 4


def test_the_optimizers_example_trains_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = build("llama")
    peftrt.adapt(model, config("llama", r=4, lora_alpha=8), name="fr")
    model(tokens(2)).logits.square().mean().backward()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    names: dict[str, Any] = {"peftrt": peftrt, "model": model}
    exec(block("PagedAdamW"), names)
    assert "PagedStats(pages=" in capsys.readouterr().out
    after = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    same = peftrt.optim.PagedAdamW(peftrt.optim.param_groups(model, 2e-4))
    same.load(tmp_path / "state.safetensors")
    assert same.stats().pages > 0


def methods() -> dict[str, str]:
    """Heading -> the Python block below it."""
    section = README.read_text().partition("\n## Methods\n")[2].partition("\n## ")[0]
    parts = [part.partition("\n") for part in section.split("\n### ")[1:]]
    blocks = {heading: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for heading, _, text in parts}
    return {heading: code for heading, found in blocks.items() for code in found}


def nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each text."""
    logits = model(ids).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").sum(1)


@pytest.mark.parametrize("heading", methods())
def test_every_method_s_lines(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = methods()[heading]
    if heading not in ("Merging, switching, combining", "Not forgetting: EWC and replay"):
        lines = [line for line in code.splitlines() if line and not line.startswith("...")]
        assert len(lines) <= 5, "a method is to be had with a few lines"
    for folder in ("adapters/fr", "adapters/de", "their/adapter") if "load(" in code else ():
        other = build("llama")
        peftrt.adapt(other, config("llama", target_modules=["q_proj", "v_proj"]), name="x")
        peftrt.save(other, folder)
    model: Any = build("llama")
    base = logits(model)
    names: dict[str, Any] = {"peftrt": peftrt, "torch": torch, "model": model}
    if "former_batches" in code:
        peftrt.adapt(model, config("llama"), name="fr")
        former, new = ([tokens(seed=10 * task + i) for i in range(3)] for task in range(2))
        names |= {"former_batches": former, "new_batches": new, "nll": nll}
    exec(code, names)
    if heading == "IA3":
        assert torch.equal(logits(model), base)  # it begins with factors of 1
    if "former_batches" in code:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    if "FullFineTuning" in code:
        assert all(p.requires_grad for p in model.parameters())
    written = re.findall(r'(?:save|export)\(model, "(.*?)"', code)
    assert all(any((tmp_path / folder).glob("*.safetensors")) for folder in written)
