"""AdapterHub's directories: what AdapterHub wrote is read, what is bad is refused by name, nothing is half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftrt.formats.adapterhub_dir import (
    HubKey,
    is_adapterhub_dir,
    join_hub_key,
    read_adapterhub_dir,
    split_hub_key,
    write_adapterhub_dir,
)
from peftrt.formats.errors import (
    AdapterNameError,
    ConfigError,
    FormatError,
    MissingFileError,
    NonFiniteError,
    UnsafeFileError,
)
from peftrt.formats.peft_dir import read_peft_dir, write_peft_dir
from tests.formats.directories import equal, snapshot

FIXTURES = Path(__file__).parent.parent / "fixtures" / "adapterhub"
VALUES: dict[str, Any] = {
    "config": {"architecture": "lora", "r": 2, "alpha": 4},
    "hidden_size": 3,
    "model_class": "BertModel",
    "model_name": "",
    "model_type": "bert",
    "name": "fr",
    "version": "adapters.1.3.0",
}


def lora(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"q.loras.fr.lora_A": torch.full((2, 3), value), "q.loras.fr.lora_B": torch.full((5, 2), value)}


def test_round_trip(tmp_path: Path) -> None:
    write_adapterhub_dir(tmp_path / "new" / "dir", VALUES, lora())
    assert is_adapterhub_dir(tmp_path / "new" / "dir")
    values, tensors = read_adapterhub_dir(tmp_path / "new" / "dir")
    assert values == VALUES
    assert equal(tensors, lora())
    assert sorted(os.listdir(tmp_path / "new" / "dir")) == ["adapter.safetensors", "adapter_config.json"]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*/adapter_config.json")), ids=lambda path: str(path.parent))
def test_reads_what_adapterhub_wrote(path: Path) -> None:
    assert is_adapterhub_dir(path.parent)
    values, tensors = read_adapterhub_dir(path.parent)
    assert values == json.loads(path.read_text())
    assert equal(tensors, load_file(path.parent / "adapter.safetensors"))
    for key in tensors:
        parts = split_hub_key(key, "fixture")
        assert join_hub_key(parts.place, parts.group, "fixture", parts.leaf) == key


def test_keys_are_taken_apart() -> None:
    key = "bert.encoder.layer.0.output.adapters.fr.adapter_down.0.weight"
    assert split_hub_key(key, "fr") == HubKey("bert.encoder.layer.0.output", "adapters", "adapter_down.0.weight")
    key = "layers.0.attention_adapters.adapters.adapters.adapter_up.bias"
    assert split_hub_key(key, "adapters") == HubKey("layers.0.attention_adapters", "adapters", "adapter_up.bias")
    key = "prefix_tuning.prefix_tunings.fr.self_prefix.control_trans"
    assert split_hub_key(key, "fr") == HubKey("prefix_tuning", "prefix_tunings", "self_prefix.control_trans")


@pytest.mark.parametrize(
    "key",
    [
        "q.loras.de.lora_A",
        "q.loras.fr",
        "q.loras.fr.",
        "loras.fr.lora_A",
        "q.prefix_gates.fr.weight",
        "q.adapter_fusion_layer.fr.query.weight",
        "base_model.model.q.lora_A.weight",
        "",
    ],
)
def test_unrecognised_key_is_named(key: str) -> None:
    with pytest.raises(FormatError, match="not supported") as caught:
        split_hub_key(key, "fr")
    assert repr(key) in str(caught.value)


def test_pickle_is_refused_and_the_message_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    (tmp_path / "adapter.safetensors").unlink()
    shared = torch.ones(2, 3)
    torch.save({**lora(), "a.loras.fr.lora_A": shared, "b.loras.fr.lora_A": shared}, tmp_path / "pytorch_adapter.bin")
    assert is_adapterhub_dir(tmp_path)
    with pytest.raises(UnsafeFileError, match=r"pytorch_adapter\.bin.*save_file") as caught:
        read_adapterhub_dir(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = "safetensors" + str(caught.value).partition("origin: safetensors")[2]
    exec(f"import safetensors.torch, torch; FILE = 'pytorch_adapter.bin'; {code}", {})
    assert len(read_adapterhub_dir(tmp_path)[1]) == 4


def test_pickle_renamed_to_safetensors(tmp_path: Path) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    torch.save(lora(), tmp_path / "adapter.safetensors")
    with pytest.raises(UnsafeFileError, match=r"adapter\.safetensors"):
        read_adapterhub_dir(tmp_path)


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"adapter_config\.json"):
        read_adapterhub_dir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(VALUES))
    assert not is_adapterhub_dir(tmp_path)
    with pytest.raises(MissingFileError, match=r"adapter\.safetensors"):
        read_adapterhub_dir(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_fifo_in_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FormatError, match=f"{name}: expected a regular file, got a FIFO"):
        read_adapterhub_dir(tmp_path)


def test_link_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_adapterhub_dir(root / "good", VALUES, lora())
    write_adapterhub_dir(tmp_path / "outside", VALUES, lora())
    (root / "good" / "adapter.safetensors").unlink()
    (root / "good" / "adapter.safetensors").symlink_to(tmp_path / "outside" / "adapter.safetensors")
    assert equal(read_adapterhub_dir(root / "good")[1], lora())
    with pytest.raises(AdapterNameError, match="leads out"):
        read_adapterhub_dir(root / "good", root=root)


def _truncate(data: bytes) -> bytes:
    return data[:-1]


def _append(data: bytes) -> bytes:
    return data + b"\0"


def _long_header(data: bytes) -> bytes:
    return (1 << 63).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize("damage", [_truncate, _append, _long_header])
def test_damaged_weights(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FormatError, match=r"adapter\.safetensors"):
        read_adapterhub_dir(tmp_path)


def test_nan_is_refused_unless_asked_for(tmp_path: Path) -> None:
    save_file(lora(float("nan")), tmp_path / "adapter.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(VALUES))
    with pytest.raises(NonFiniteError, match="lora_A"):
        read_adapterhub_dir(tmp_path)
    assert len(read_adapterhub_dir(tmp_path, allow_nonfinite=True)[1]) == 2


def test_too_many_tensors(tmp_path: Path) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    with pytest.raises(FormatError, match="at most 1 are accepted"):
        read_adapterhub_dir(tmp_path, max_tensors=1)


TEXTS = {
    "duplicate_name": ('{"name": "a", "name": "b"}', "'name'"),
    "alpha_nan": ('{"config": {"alpha": NaN}}', "NaN"),
    "alpha_1e400": ('{"config": {"alpha": 1e400}}', "1e400"),
    "deeply_nested": ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested"),
    "not_an_object": ("[1]", "list"),
    "not_json": ("config: lora", "not valid JSON"),
    "empty": ("", "not valid JSON"),
}


@pytest.mark.parametrize("fault", sorted(TEXTS))
def test_bad_config_file(tmp_path: Path, fault: str) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    text, culprit = TEXTS[fault]
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json") as caught:
        read_adapterhub_dir(tmp_path)
    assert culprit in str(caught.value)


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"config": None}, "config: expected an object or the name of one, got None"),
    ({"config": ["lora"]}, "config: expected an object"),
    ({"name": None}, "name: expected a string, got None"),
    ({"name": "a.b"}, "name: adapter name 'a.b' must not contain"),
    ({"name": "../x"}, "name: adapter name '../x' must not contain"),
    ({"name": "a\u202eb"}, "U\\+202E"),
    ({"name": ""}, "name: adapter name must not be empty"),
    ({"version": 1.3}, "version: expected a string, got 1.3"),
    ({"model_type": 3}, "model_type: expected a string, got 3"),
    ({"model_name": ["x"]}, "model_name: expected a string"),
    ({"hidden_size": "32"}, "hidden_size: expected an integer from 1 on, got '32'"),
    ({"hidden_size": True}, "hidden_size: expected an integer from 1 on, got True"),
    ({"peft_type": "LORA"}, "peft_type: a configuration of HF peft"),
]


@pytest.mark.parametrize(("changes", "message"), FIELDS)
def test_bad_field_is_refused_in_both_directions(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    before = snapshot(tmp_path)
    with pytest.raises(FormatError, match=message):
        write_adapterhub_dir(tmp_path, {**VALUES, **changes}, lora(2.0))
    assert snapshot(tmp_path) == before
    (tmp_path / "adapter_config.json").write_text(json.dumps({**VALUES, **changes}))
    with pytest.raises(FormatError, match=message):
        read_adapterhub_dir(tmp_path)


def test_field_that_is_missing(tmp_path: Path) -> None:
    write_adapterhub_dir(tmp_path, VALUES, lora())
    for name in ("config", "name", "version"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in VALUES.items() if k != name}))
        with pytest.raises(ConfigError, match=f"{name}: expected"):
            read_adapterhub_dir(tmp_path)


@pytest.mark.parametrize("other", ["pytorch_adapter.bin", "adapter_model.safetensors", "adapter_model.bin"])
def test_what_adapterhub_or_peft_would_read_instead_is_in_the_way(tmp_path: Path, other: str) -> None:
    (tmp_path / other).write_bytes(b"x")
    with pytest.raises(FormatError, match=other):
        write_adapterhub_dir(tmp_path, VALUES, lora())
    assert os.listdir(tmp_path) == [other]


def test_the_two_forms_do_not_share_a_directory(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}
    write_peft_dir(tmp_path / "peft", config, {"base_model.model.q.lora_A.weight": torch.ones(2, 3)})
    write_adapterhub_dir(tmp_path / "hub", VALUES, lora())
    assert not is_adapterhub_dir(tmp_path / "peft")
    before = snapshot(tmp_path)
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors"):
        write_adapterhub_dir(tmp_path / "peft", VALUES, lora())
    with pytest.raises(FormatError, match=r"adapter\.safetensors"):
        write_peft_dir(tmp_path / "hub", config, {})
    with pytest.raises(MissingFileError, match=r"adapter_model\.safetensors"):
        read_peft_dir(tmp_path / "hub")
    assert snapshot(tmp_path) == before
