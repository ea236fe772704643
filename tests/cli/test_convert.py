"""``peftrt convert``: what both libraries compute alike goes over and keeps its logits, the rest is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftrt
from peftrt.cli import main
from peftrt.formats.adapterhub_dir import read_adapterhub_dir
from peftrt.formats.peft_dir import write_peft_dir
from tests.fixtures.adapterhub.models import KINDS, build, logits

FIXTURES = Path(__file__).parent.parent / "fixtures" / "adapterhub"
ALIKE = [(kind, case) for kind in KINDS for case in ("lora", "lora_qkv")]
ALIKE += [(kind, "ia3_attention") for kind in ("llama", "gpt2", "bert")]
# the outputs of a feed-forward layer, which peft scales where feedforward_modules does not name it
ALIKE += [("llama", "ia3")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each model with its ``config.json`` and nothing else."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        build(kind).config.save_pretrained(folder / kind)
    return folder


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], target: Path, *arguments: object) -> str:
    """The one line that says why, once nothing was written."""
    assert convert(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert not target.exists()
    return errors[0]


@pytest.mark.parametrize(("kind", "case"), ALIKE)
def test_there_and_back(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], kind: str, case: str) -> None:
    peft_dir, hub_dir = tmp_path / "peft", tmp_path / "hub"
    assert convert(FIXTURES / kind / case, peft_dir, "--to", "peft", "--model", models / kind) == 0
    assert f"{peft_dir}: {'IA3' if case.startswith('ia3') else 'LORA'}, " in capsys.readouterr().out
    config = models / kind / "config.json"
    assert convert(peft_dir, hub_dir, "--to", "adapterhub", "--model", config, "--name", "fixture") == 0
    ours, theirs = read_adapterhub_dir(hub_dir), read_adapterhub_dir(FIXTURES / kind / case)
    assert ours[0]["config"] == theirs[0]["config"]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][key], theirs[1][key]) for key in ours[1])


@pytest.mark.parametrize(("kind", "case"), ALIKE)
def test_peft_computes_what_adapterhub_did(tmp_path: Path, models: Path, kind: str, case: str) -> None:
    peft = pytest.importorskip("peft")
    assert convert(FIXTURES / kind / case, tmp_path / "peft", "--to", "peft", "--model", models / kind) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(build(kind), tmp_path / "peft").eval()
    wanted = load_file(FIXTURES / kind / "expected.safetensors")[case]
    assert (logits(model, kind) - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("llama/prefix_flat", "counts positions from behind a prefix"),
        ("llama/seq_bn", "HF peft has no bottleneck adapters"),
        ("t5/prefix_flat", "prefixes of an encoder-decoder model"),
    ],
)
def test_what_differs_is_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], case: str, message: str
) -> None:
    target = tmp_path / "new"
    arguments = (FIXTURES / case, target, "--to", "peft", "--model", models / case.partition("/")[0])
    assert re.search(message, refusal(capsys, target, *arguments))


def written(directory: Path, target: str, rank: int = 2) -> Path:
    """A LoRA of one kind of module of the Llama, as HF peft has it."""
    tensors = {}
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.self_attn.{target}"
        tensors[f"{path}.lora_A.weight"] = torch.ones(rank, 32)
        tensors[f"{path}.lora_B.weight"] = torch.ones(32, rank)
    write_peft_dir(
        directory, {"peft_type": "LORA", "r": 2, "target_modules": [target], "task_type": "CAUSAL_LM"}, tensors
    )
    return directory


def test_what_adapterhub_cannot_say_is_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = written(tmp_path / "peft", "o_proj"), tmp_path / "new"
    said = refusal(capsys, target, source, target, "--to", "adapterhub", "--model", models / "llama")
    assert f"{source}: AdapterHub has no LoRA at model.layers.0.self_attn.o_proj" in said


def test_ia3_as_hf_peft_has_it_on_a_llama_is_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama")
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    peftrt.adapt(model, peftrt.IA3Config(init_ia3_weights=False, **targets))
    peftrt.save(model, tmp_path / "peft")
    target = tmp_path / "new"
    said = refusal(capsys, target, tmp_path / "peft", target, "--to", "adapterhub", "--model", models / "llama")
    assert "model.layers.0.mlp.down_proj: HF peft's (IA)^3 scales the input of a feed-forward module" in said


@pytest.mark.parametrize("to", ["peft", "adapterhub"])
def test_an_adapter_of_that_form_already(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    source = written(tmp_path / "peft", "q_proj") if to == "peft" else FIXTURES / "llama" / "lora"
    said = refusal(capsys, tmp_path / "new", source, tmp_path / "new", "--to", to, "--model", models / "llama")
    assert "already" in said


def test_a_bad_adapter_is_one_line(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "peft", "q_proj", rank=3)
    target = tmp_path / "new"
    said = refusal(capsys, target, source, target, "--to", "adapterhub", "--model", models / "llama")
    assert "lora_A has 3 rows, the configuration says rank 2" in said
    said = refusal(capsys, target, tmp_path / "absent", target, "--to", "peft")
    assert "absent: no such directory" in said
    said = refusal(capsys, target, FIXTURES / "llama" / "lora", target, "--to", "peft", "--model", models / "gpt2")
    assert "no module 'model.layers.0.mlp.down_proj': made for another base?" in said


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = FIXTURES / "llama" / "lora", tmp_path / "new"
    said = refusal(capsys, target, source, target, "--to", "peft")
    assert "--model: the adapter does not say for what base it is" in said
    said = refusal(capsys, target, source, target, "--to", "peft", "--model", tmp_path / "absent")
    assert "--model: cannot load the configuration" in said


def test_the_model_that_the_adapter_names(tmp_path: Path, models: Path) -> None:
    shutil.copytree(FIXTURES / "llama" / "lora", tmp_path / "hub")
    path = tmp_path / "hub" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_name": str(models / "llama")}))
    assert convert(tmp_path / "hub", tmp_path / "peft", "--to", "peft") == 0
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(models / "llama")
    assert convert(tmp_path / "peft", tmp_path / "again", "--to", "adapterhub") == 0
    assert read_adapterhub_dir(tmp_path / "again")[0]["model_name"] == str(models / "llama")


def test_a_name_that_cannot_be_one(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = written(tmp_path / "peft", "q_proj"), tmp_path / "new"
    arguments = (source, target, "--to", "adapterhub", "--model", models / "llama", "--name", "a.b")
    assert "name: adapter name 'a.b' must not contain '.'" in refusal(capsys, target, *arguments)


def test_warnings_are_lines(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FIXTURES / "llama" / "lora", tmp_path / "hub")
    (tmp_path / "hub" / "model_head.safetensors").write_bytes(b"")
    assert convert(tmp_path / "hub", tmp_path / "peft", "--to", "peft", "--model", models / "llama") == 0
    errors = capsys.readouterr().err
    assert errors.startswith("peftrt: warning: ")
    assert "model_head.safetensors is not read" in errors


def test_help_and_a_form_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "{peft,adapterhub}" in text
    assert "refused, with the reason" in text
    assert convert("a", "b", "--to", "bnb") == 2
    assert "invalid choice: 'bnb'" in capsys.readouterr().err
