"""Adapter directories: HF peft 0.21 writes what we read and reads what we write; anything else is refused."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrt.formats import pair
from peftrt.formats.errors import AdapterNameError, FormatError, MissingFileError, UnsafeFileError
from peftrt.formats.peft_dir import PeftKey, join_key, read_peft_dir, split_key, write_peft_dir
from peftrt.formats.safe import TensorReader, write_tensors

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "a/b: c"}


def lora(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "base_model.model.q.lora_A.weight": torch.full((2, 3), value),
        "base_model.model.q.lora_B.weight": torch.full((5, 2), value),
    }


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


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


@pytest.mark.parametrize("failing", ["adapter_model.safetensors", "adapter_config.json"])
def test_failed_rename_puts_the_old_adapter_back(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft_dir(tmp_path, CONFIG, lora(1.0), readme="old")
    before = snapshot(tmp_path)
    real, failed = os.replace, []

    def replace(source: str, target: str) -> None:
        if os.fspath(target).endswith(failing) and not failed:
            failed.append(target)
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        write_peft_dir(tmp_path, {**CONFIG, "r": 4}, lora(2.0))
    assert failed
    assert snapshot(tmp_path) == before
    assert read_peft_dir(tmp_path)[0] == CONFIG


def test_save_killed_between_the_renames_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "_ATTEMPTS", 2)
    write_peft_dir(tmp_path, CONFIG, lora())
    (tmp_path / pair.MARKER_NAME).write_text("")
    with pytest.raises(FormatError, match="killed half-way"):
        read_peft_dir(tmp_path)
    write_peft_dir(tmp_path, CONFIG, lora(3.0))
    assert equal(read_peft_dir(tmp_path)[1], lora(3.0))


def test_marker_stands_while_the_two_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, marked = os.replace, {}

    def replace(source: str, target: str) -> None:
        marked[os.path.basename(target)] = (tmp_path / pair.MARKER_NAME).exists()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for expected in (False, True):
        write_peft_dir(tmp_path, CONFIG, lora())
        assert list(marked) == ["adapter_model.safetensors", "adapter_config.json", "README.md"]
        assert marked["adapter_model.safetensors"] is marked["adapter_config.json"] is expected
        assert not (tmp_path / pair.MARKER_NAME).exists()
        marked.clear()


def test_adapter_replaced_while_it_loads_is_never_mixed(tmp_path: Path) -> None:
    write_peft_dir(tmp_path, {**CONFIG, "version": 0}, lora(0.0))
    stop = threading.Event()

    def replace() -> None:
        version = 0
        while not stop.is_set():
            version += 1
            write_peft_dir(tmp_path, {**CONFIG, "version": version}, lora(float(version)))
            stop.wait(0.002)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        seen = set()
        for _ in range(40):
            config, tensors = read_peft_dir(tmp_path)
            assert equal(tensors, lora(float(config["version"])))
            seen.add(config["version"])
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def before_weights_are_opened(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Have ``action`` happen once, after a reader has read the configuration and before it opens the weights."""
    pending = [action]

    def reader(*args: Any, **kwargs: Any) -> TensorReader:
        if pending:
            pending.pop()()
        return TensorReader(*args, **kwargs)

    monkeypatch.setattr(pair, "TensorReader", reader)


def test_adapter_replaced_between_configuration_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft_dir(tmp_path, CONFIG, lora(1.0))
    new = {**CONFIG, "lora_alpha": 99}
    before_weights_are_opened(monkeypatch, lambda: write_peft_dir(tmp_path, new, lora(2.0)))
    config, tensors = read_peft_dir(tmp_path)
    assert config == new
    assert equal(tensors, lora(2.0))


@pytest.mark.parametrize("begun", ["before_the_reader", "after_the_configuration_was_read"])
def test_reader_waits_while_only_the_weights_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    write_peft_dir(tmp_path, CONFIG, lora(1.0))
    new = {**CONFIG, "lora_alpha": 99}

    def first_half() -> None:
        (tmp_path / pair.MARKER_NAME).write_text("")
        write_tensors(tmp_path / "adapter_model.safetensors", lora(2.0))

    def second_half(seconds: float) -> None:
        (tmp_path / "config.new").write_text(json.dumps(new))
        os.replace(tmp_path / "config.new", tmp_path / "adapter_config.json")
        (tmp_path / pair.MARKER_NAME).unlink()

    if begun == "before_the_reader":
        first_half()
    else:
        before_weights_are_opened(monkeypatch, first_half)
    monkeypatch.setattr(pair.time, "sleep", second_half)
    config, tensors = read_peft_dir(tmp_path)
    assert config == new
    assert equal(tensors, lora(2.0))


def test_files_beside_the_adapter_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state").write_text("x")
    (tmp_path / "loss.png").write_bytes(b"png")
    write_peft_dir(tmp_path, CONFIG, lora())
    write_peft_dir(tmp_path, CONFIG, lora(2.0))
    assert (tmp_path / "checkpoint-3" / "state").read_text() == "x"
    assert (tmp_path / "loss.png").read_bytes() == b"png"
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == CONFIG
