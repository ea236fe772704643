"""Model checkpoints are read one tensor at a time, one file or many, and never two checkpoints at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftrt.formats.checkpoint import open_checkpoint
from peftrt.formats.errors import AdapterNameError, FormatError, MissingFileError, NonFiniteError, UnsafeFileError
from peftrt.formats.safe import write_tensors

INDEX = "model.safetensors.index.json"


def sharded(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}.weight": torch.randn(3, 4) for i in range(4)}
    names = list(tensors)
    write_tensors(directory / "s1.safetensors", {name: tensors[name] for name in names[:2]})
    write_tensors(directory / "s2.safetensors", {name: tensors[name] for name in names[2:]})
    weight_map = {name: "s1.safetensors" if name in names[:2] else "s2.safetensors" for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 192}, "weight_map": weight_map | changes}))
    return tensors


def test_one_file_and_a_directory_and_shards(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(5).to(torch.bfloat16)}
    (tmp_path / "one").mkdir()
    write_tensors(tmp_path / "one" / "model.safetensors", tensors, {"format": "pt"})
    for path in (tmp_path / "one", tmp_path / "one" / "model.safetensors"):
        with open_checkpoint(path) as checkpoint:
            got = dict(checkpoint)
            assert checkpoint.metadata == {"format": "pt"}
            assert checkpoint.entries["a"].shape == (5,)
            assert checkpoint.entries["a"].dtype is torch.bfloat16
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    (tmp_path / "many").mkdir()
    tensors = sharded(tmp_path / "many")
    for path in (tmp_path / "many", tmp_path / "many" / INDEX):
        checkpoint = open_checkpoint(path)
        assert len(checkpoint) == 4
        assert "layer.3.weight" in checkpoint
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint)
        assert torch.equal(checkpoint.read("layer.0.weight"), tensors["layer.0.weight"])
        with pytest.raises(KeyError):
            checkpoint.read("layer.9.weight")
        checkpoint.close()


def test_shard_replaced_after_the_checkpoint_was_opened(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("layer.0.weight"), tensors["layer.0.weight"])
    write_tensors(tmp_path / "s2.safetensors", {f"layer.{i}.weight": torch.zeros(3, 4) for i in (2, 3)})
    with pytest.raises(FormatError, match=r"s2\.safetensors: was replaced"):
        checkpoint.read("layer.2.weight")
    checkpoint.close()


@pytest.mark.parametrize(
    ("shard", "culprit"),
    [
        ("../x.safetensors", "../x.safetensors"),
        ("/etc/x.safetensors", "/etc/x.safetensors"),
        ("sub/x.safetensors", "sub/x.safetensors"),
        ("..\\x.safetensors", "expected a .safetensors file beside"),
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("absent.safetensors", "absent.safetensors"),
        (3, "layer.0.weight"),
        ("s2.safetensors", "layer.0.weight"),
    ],
)
def test_index_that_names_a_wrong_file(tmp_path: Path, shard: Any, culprit: str) -> None:
    sharded(tmp_path, **{"layer.0.weight": shard})
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    assert culprit in str(caught.value)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}', "'a'"),
        ("{", "JSON"),
    ],
)
def test_bad_index(tmp_path: Path, text: str, culprit: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError, match=INDEX) as caught:
        open_checkpoint(tmp_path)
    assert culprit in str(caught.value)


def test_bad_shard_is_found_when_the_checkpoint_is_opened(tmp_path: Path) -> None:
    sharded(tmp_path)
    whole = (tmp_path / "s2.safetensors").read_bytes()
    (tmp_path / "s2.safetensors").write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=r"s2\.safetensors: truncated"):
        open_checkpoint(tmp_path)


def test_pickles_nothing_or_too_much(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(MissingFileError, match="absent"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin.*save_file"):
        open_checkpoint(tmp_path)
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert open_checkpoint(tmp_path).entries.keys() == {"a"}
    write_tensors(tmp_path / "y.safetensors", {"a": torch.ones(1)})
    with pytest.raises(FormatError, match=r"x\.safetensors, y\.safetensors"):
        open_checkpoint(tmp_path)


def test_nonfinite_weights(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"ok": torch.ones(1), "bad": torch.tensor([float("inf")])})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("ok") == 1
    with pytest.raises(NonFiniteError, match="'bad'"):
        checkpoint.read("bad")
    checkpoint.close()
    with open_checkpoint(tmp_path, allow_nonfinite=True) as checkpoint:
        assert checkpoint.read("bad").isinf()


def test_shard_that_links_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    sharded(root)
    (root / "s2.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (root / "s2.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert len(open_checkpoint(root)) == 4
    with pytest.raises(AdapterNameError, match=r"s2\.safetensors"):
        open_checkpoint(root, root=root)
