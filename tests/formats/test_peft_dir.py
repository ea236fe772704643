"""Adapter directories: HF peft 0.21 writes what we read and reads what we write; anything else is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrt.formats.errors import AdapterNameError, FormatError, MissingFileError, UnsafeFileError
from peftrt.formats.peft_dir import PeftKey, join_key, read_peft_dir, split_key, write_peft_dir
from tests.formats.directories import equal, snapshot

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "a/b: c"}


def lora(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "base_model.model.q.lora_A.weight": torch.full((2, 3), value),
        "base_model.model.q.lora_B.weight": torch.full((5, 2), value),
    }


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def peft_model(name: str = "default", **fields: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], **fields)
    model = peft.get_peft_model(Net(), config, adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    return model


def test_round_trip(tmp_path: Path) -> None:
    write_peft_dir(tmp_path / "new" / "dir", CONFIG, lora())
    config, tensors = read_peft_dir(tmp_path / "new" / "dir")
    assert config == CONFIG
    assert equal(tensors, lora())
    assert sorted(os.listdir(tmp_path / "new" / "dir")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    readme = (tmp_path / "new" / "dir" / "README.md").read_text()
    assert 'base_model: "a/b: c"' in readme.split("---")[1]
    assert "LORA" in readme
    write_peft_dir(tmp_path / "new" / "dir", CONFIG, lora(), readme="mine")
    assert (tmp_path / "new" / "dir" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("saved", [None, ["head"]])
def test_reads_what_peft_writes(tmp_path: Path, saved: list[str] | None) -> None:
    from peft.utils import get_peft_model_state_dict

    model = peft_model(modules_to_save=saved)
    model.save_pretrained(tmp_path)
    config, tensors = read_peft_dir(tmp_path)
    assert config["peft_type"] == "LORA"
    assert config["r"] == 3
    assert equal(tensors, get_peft_model_state_dict(model))
    parts = {split_key(key, saved or ()) for key in tensors}
    expected = {PeftKey(f"body.{i}", part) for i in (0, 2) for part in ("lora_A", "lora_B")}
    assert parts == expected | ({PeftKey("head", "saved", leaf) for leaf in ("weight", "bias")} if saved else set())
    assert {join_key(*part) for part in parts} == tensors.keys()


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    import peft

    model = peft_model(modules_to_save=["head"])
    nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "theirs")
    write_peft_dir(tmp_path / "ours", *read_peft_dir(tmp_path / "theirs"))
    base = Net()
    base.load_state_dict(plain_state(model))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    x = torch.randn(4, 6)
    assert torch.equal(loaded(x), model(x))


def plain_state(model: Any) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in model.base_model.model.state_dict().items():
        if "lora_" not in key and "modules_to_save" not in key:
            state[key.replace("base_layer.", "").replace("original_module.", "")] = value
    return state


def test_peft_subfolder_of_a_named_adapter(tmp_path: Path) -> None:
    model = peft_model("fr")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "fr" / "adapter_config.json").exists()
    for tensors in (
        read_peft_dir(tmp_path)[1],
        read_peft_dir(tmp_path / "fr")[1],
        read_peft_dir(tmp_path, name="fr")[1],
    ):
        assert len(tensors) == 4
    write_peft_dir(tmp_path / "de", CONFIG, lora())
    with pytest.raises(FormatError, match=r"several adapters \(de, fr\)"):
        read_peft_dir(tmp_path)
    assert equal(read_peft_dir(tmp_path, name="de")[1], lora())
    with pytest.raises(MissingFileError, match=r"'es'.*de, fr"):
        read_peft_dir(tmp_path, name="es")
    with pytest.raises(MissingFileError, match="adapter_config"):
        read_peft_dir(tmp_path, name="default")
    write_peft_dir(tmp_path, CONFIG, lora(2.0))
    assert equal(read_peft_dir(tmp_path)[1], lora(2.0))
    assert equal(read_peft_dir(tmp_path, name="default")[1], lora(2.0))


@pytest.mark.parametrize("name", ["../x", "/etc", "a\0b", "a\u202eb"])
def test_name_that_leaves_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterNameError):
        read_peft_dir(tmp_path, name=name)


def test_link_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_peft_dir(root / "good", CONFIG, lora())
    write_peft_dir(tmp_path / "outside", CONFIG, lora())
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "mixed").mkdir()
    (root / "mixed" / "adapter_config.json").symlink_to(root / "good" / "adapter_config.json")
    (root / "mixed" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    assert equal(read_peft_dir(root / "good", root=root)[1], lora())
    for name in ("linked", "mixed"):
        with pytest.raises(AdapterNameError, match=name):
            read_peft_dir(root / name, root=root)
        assert equal(read_peft_dir(root / name)[1], lora())


def test_pickle_only_is_refused(tmp_path: Path) -> None:
    write_peft_dir(tmp_path, CONFIG, lora())
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsafeFileError, match=r"adapter_model\.bin.*save_file"):
        read_peft_dir(tmp_path)


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="absent"):
        read_peft_dir(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=r"no adapter_config\.json"):
        read_peft_dir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match=r"file: expected an adapter's directory"):
        read_peft_dir(tmp_path / "file")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingFileError, match=r"adapter_model\.safetensors"):
        read_peft_dir(tmp_path)
    with pytest.raises(FormatError, match="NUL"):
        read_peft_dir("a\0b")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_fifo_in_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    write_peft_dir(tmp_path, CONFIG, lora())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FormatError, match=f"{name}: expected a regular file, got a FIFO"):
        read_peft_dir(tmp_path)


CONFIGS = {
    "duplicate_r": ('{"peft_type": "LORA", "r": 8, "r": 16}', "'r'"),
    "alpha_nan": ('{"lora_alpha": NaN}', "NaN"),
    "alpha_infinity": ('{"lora_alpha": -Infinity}', "Infinity"),
    "alpha_1e400": ('{"lora_alpha": 1e400}', "1e400"),
    "deeply_nested": ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested"),
    "not_an_object": ("[1]", "list"),
    "not_json": ("peft_type: LORA", "not valid JSON"),
    "byte_order_mark": ('\ufeff{"r": 8}', "JSON"),
    "too_large": ('{"a": "' + "x" * (5 << 20) + '"}', "bytes, at most"),
    "lone_surrogate": ('{"a": "\\ud800"}', "surrogate"),
    "empty": ("", "not valid JSON"),
}


@pytest.mark.parametrize("fault", sorted(CONFIGS))
def test_bad_config_file(tmp_path: Path, fault: str) -> None:
    write_peft_dir(tmp_path, CONFIG, lora())
    text, culprit = CONFIGS[fault]
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    before = snapshot(tmp_path)
    with pytest.raises(FormatError, match=r"adapter_config\.json") as caught:
        read_peft_dir(tmp_path)
    assert culprit in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.q.lora_A",
        "base_model.model.q.lora_A.default.weight",
        "base_model.model.q.lora_magnitude_vector.weight",
        "base_model.model.embed.lora_embedding_A.weight",
        "base_model.model.embed_tokens.weight",
        "base_model.model.lora_A.weight",
        "base_model.q.lora_A.weight",
        "q.lora_A.weight",
        "prompt_embeddings",
        "",
        "base_model.model.head",
    ],
)
def test_unrecognised_key_is_named(key: str) -> None:
    with pytest.raises(FormatError, match="not supported") as caught:
        split_key(key, ["head"])
    assert repr(key) in str(caught.value)


def test_keys_of_embeddings_lora_bias_and_nested_saved_modules() -> None:
    assert split_key("base_model.model.a.b.lora_B.bias") == PeftKey("a.b", "lora_B.bias")
    assert join_key("a.b", "lora_B.bias") == "base_model.model.a.b.lora_B.bias"
    assert split_key("base_model.model.x.head.dense.weight", ["head"]) == PeftKey("x.head", "saved", "dense.weight")
    for key, part in {
        "base_model.model.a.lora_embedding_A": PeftKey("a", "lora_embedding_A"),
        "base_model.model.a.base_layer.weight": PeftKey("a", "base", "weight"),
    }.items():
        assert split_key(key) == part
        assert join_key(*part) == key
    with pytest.raises(FormatError, match="'lora_C'"):
        join_key("a", "lora_C")


@pytest.mark.parametrize(
    ("config", "tensors", "culprit"),
    [
        ({"r": 8}, lora(), "peft_type"),
        ({**CONFIG, "lora_alpha": float("nan")}, lora(), "adapter_config.json"),
        ({**CONFIG, "x": {1, 2}}, lora(), "adapter_config.json"),
        (CONFIG, {"a": torch.ones(1, device="meta")}, "'a'"),
        (CONFIG, {"a": "text"}, "'a'"),
    ],
)
def test_refused_write_changes_nothing(tmp_path: Path, config: Any, tensors: Any, culprit: str) -> None:
    write_peft_dir(tmp_path / "old", CONFIG, lora(), readme="old")
    before = snapshot(tmp_path)
    for path in (tmp_path / "old", tmp_path / "deep" / "new"):
        with pytest.raises((FormatError, TypeError)) as caught:
            write_peft_dir(path, config, tensors)
        assert culprit in str(caught.value)
    assert snapshot(tmp_path) == before
    assert os.listdir(tmp_path) == ["old"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match=r"file: expected a directory"):
        write_peft_dir(tmp_path / "file", CONFIG, lora())


def test_files_beside_the_adapter_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state").write_text("x")
    (tmp_path / "loss.png").write_bytes(b"png")
    write_peft_dir(tmp_path, CONFIG, lora())
    write_peft_dir(tmp_path, CONFIG, lora(2.0))
    assert (tmp_path / "checkpoint-3" / "state").read_text() == "x"
    assert (tmp_path / "loss.png").read_bytes() == b"png"
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == CONFIG
