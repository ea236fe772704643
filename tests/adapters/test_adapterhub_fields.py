"""AdapterHub's configurations: what peftrt computes otherwise is refused by field and value, never passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftrt
from peftrt.adapters.adapterhub.fields import NAMED, read_hub_fields
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError
from tests.adapters.test_adapterhub import FIXTURES, expected
from tests.fixtures.adapterhub.models import build, logits

pytest.importorskip("transformers")


def edited(
    tmp_path: Path,
    case: str,
    inner: dict[str, Any] | None = None,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    **fields: Any,
) -> Path:
    """A fixture's directory with other fields or tensors; None takes a field of ``config`` away."""
    tmp_path.mkdir(exist_ok=True)
    shutil.copytree(FIXTURES / case, tmp_path / "edited")
    path = tmp_path / "edited" / "adapter_config.json"
    values = {**json.loads(path.read_text()), **fields}
    if inner is not None:
        merged = {**values["config"], **inner}
        values["config"] = {name: value for name, value in merged.items() if value != "absent"}
    path.write_text(json.dumps(values))
    if change is not None:
        weights = tmp_path / "edited" / "adapter.safetensors"
        tensors = change(load_file(weights))
        weights.unlink()
        save_file(tensors, weights)
    return tmp_path / "edited"


def refused(kind: str, path: Path, message: str, error: type[Exception] = FormatError) -> None:
    """``load`` says so, and the model is as it was."""
    model = build(kind)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message) as caught:
        peftrt.load(model, path)
    assert str(path) in str(caught.value)
    assert [name for name, _ in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("seq_bn", {"phm_layer": True}, "phm_layer = True"),
    ("seq_bn", {"use_gating": True}, "use_gating = True"),
    ("seq_bn", {"ln_before": True}, "ln_before = True"),
    ("seq_bn", {"ln_after": True}, "ln_after = True"),
    ("seq_bn", {"inv_adapter": "nice"}, "inv_adapter = 'nice'"),
    ("seq_bn", {"invertible_adapter": {"block_type": "nice"}}, "invertible_adapter = "),
    ("seq_bn", {"cross_adapter": True}, "cross_adapter = True"),
    ("seq_bn", {"stochastic_depth": 0.1}, r"stochastic_depth = 0\.1"),
    ("seq_bn", {"scaling": "learned"}, "scaling = 'learned'"),
    ("seq_bn", {"scaling": "channel"}, "scaling = 'channel'"),
    ("seq_bn", {"dropout": 0.1}, r"dropout = 0\.1"),
    ("seq_bn", {"non_linearity": "mish"}, "non_linearity = 'mish'"),
    ("seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln = 'post_add'"),
    ("seq_bn", {"residual_before_ln": False}, "residual_before_ln = False"),
    ("seq_bn", {"original_ln_after": False}, "original_ln_after = False"),
    ("seq_bn", {"mh_adapter": True}, "mh_adapter = True"),
    ("double_seq_bn", {"output_adapter": False}, "output_adapter = False"),
    ("par_bn", {"mh_adapter": True}, "mh_adapter = True"),
    ("seq_bn", {"new_in_1.4": 3}, r"new_in_1.4 = 3 is not a field that peftrt knows"),
    ("lora", {"use_gating": True}, "use_gating = True"),
    ("lora", {"use_dora": True}, "use_dora = True"),
    ("lora", {"vera_d": 0.1}, r"vera_d = 0\.1"),
    ("lora", {"composition_mode": "multiply"}, "composition_mode = 'multiply'"),
    ("lora", {"attn_matrices": ["q", "o"]}, "attn_matrices: 'o'"),
    ("lora", {"dtype": "float64"}, "dtype = 'float64'"),
    ("lora", {"n_up_projection": 2}, "n_up_projection = 2"),
    ("lora", {"architecture": "mtl_lora"}, "architecture 'mtl_lora'"),
    ("lora", {"architecture": "union"}, "architecture 'union'"),
    ("lora", {"architecture": "reft"}, "architecture 'reft'"),
    ("lora", {"architecture": "prompt_tuning"}, "architecture 'prompt_tuning'"),
    ("ia3_attention", {"alpha": 2}, "alpha = 2 with composition_mode 'scale'"),
    ("prefix_flat", {"use_gating": True}, "use_gating = True"),
    ("prefix_flat", {"leave_out": [1]}, r"leave_out = \[1\]"),
    ("prefix_mlp", {"non_linearity": "mish"}, "non_linearity = 'mish'"),
]


@pytest.mark.parametrize(("case", "config", "message"), UNSUPPORTED)
def test_what_changes_the_result_is_refused(tmp_path: Path, case: str, config: dict[str, Any], message: str) -> None:
    refused("llama", edited(tmp_path, f"llama/{case}", config), message, UnsupportedError)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("lora", {"r": 0}, "r: expected an integer from 1"),
    ("lora", {"r": "4"}, "r: expected an integer from 1"),
    ("lora", {"r": True}, "r: expected an integer from 1"),
    ("lora", {"alpha": "4"}, "alpha: expected a finite number"),
    ("lora", {"selfattn_lora": 1}, "selfattn_lora: expected true or false"),
    ("lora", {"attn_matrices": "qv"}, "attn_matrices: expected a list of names"),
    ("lora", {"leave_out": 1}, "leave_out: expected a list of numbers of layers"),
    ("lora", {"leave_out": [-1]}, "leave_out: expected a list of numbers of layers"),
    ("lora", {"dropout": 1}, "dropout: expected a probability"),
    ("seq_bn", {"mh_adapter": "absent"}, "mh_adapter is missing"),
    ("seq_bn", {"reduction_factor": "absent"}, "reduction_factor: expected a finite number"),
    ("seq_bn", {"reduction_factor": {"default": 4}}, "reduction_factor: expected a finite number"),
    ("seq_bn", {"reduction_factor": 0}, "reduction_factor: expected a number above 0"),
    ("prefix_flat", {"prefix_length": 0}, "prefix_length: expected an integer from 1"),
    ("prefix_mlp", {"bottleneck_size": "12"}, "bottleneck_size: expected an integer from 1"),
]


@pytest.mark.parametrize(("case", "config", "message"), BAD)
def test_bad_value_is_named(tmp_path: Path, case: str, config: dict[str, Any], message: str) -> None:
    refused("llama", edited(tmp_path, f"llama/{case}", config), message, ConfigError)


def test_fields_that_others_switch_off_have_no_effect(tmp_path: Path) -> None:
    harmless = {"phm_dim": 8, "phm_bias": False, "inv_adapter_reduction_factor": 2, "init_weights_seed": 3}
    model = build("llama")
    peftrt.load(model, edited(tmp_path, "llama/seq_bn", harmless))
    peftrt.set_active(model, "default")
    assert torch.allclose(logits(model, "llama"), expected("llama")["seq_bn"], atol=1e-6, rtol=0)


def test_fields_that_older_versions_lack_are_at_their_defaults(tmp_path: Path) -> None:
    old = {"stochastic_depth", "phm_bias", "init_weights_seed", "dropout", "ln_before"}
    model = build("llama")
    peftrt.load(model, edited(tmp_path, "llama/par_bn", dict.fromkeys(old, "absent")))
    peftrt.set_active(model, "default")
    assert torch.allclose(logits(model, "llama"), expected("llama")["par_bn"], atol=1e-6, rtol=0)


def test_code_that_a_file_names_is_not_run(tmp_path: Path) -> None:
    path = edited(tmp_path, "llama/lora", {"auto_map": {"AutoConfig": "evil.Config"}})
    with pytest.warns(UserWarning, match="auto_map is ignored") as caught:
        peftrt.load(build("llama"), path)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("case", ["double_seq_bn", "seq_bn", "par_bn", "ia3"])
def test_named_configurations_are_adapterhubs(case: str) -> None:
    theirs = json.loads((FIXTURES / "llama" / case / "adapter_config.json").read_text())["config"]
    named = NAMED[case] if case == "ia3" else {**NAMED[case], "reduction_factor": 4}
    assert named == theirs
    assert NAMED["houlsby"] == NAMED["double_seq_bn"]
    assert NAMED["pfeiffer"] == NAMED["seq_bn"]
    assert NAMED["parallel"] == NAMED["par_bn"]


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_name_is_read_or_refused_by_field(name: str) -> None:
    values = {"config": name, "name": "x", "version": "adapters.1.3.0"}
    if "inv" in name:
        with pytest.raises(UnsupportedError, match="inv_adapter = 'nice'"):
            read_hub_fields(values, "file")
    else:
        fields = read_hub_fields(values, "file")
        assert fields == {**NAMED[name], "architecture": NAMED[name].get("architecture")}


def test_a_name_that_is_none(tmp_path: Path) -> None:
    refused("llama", edited(tmp_path, "llama/lora", config="compacter"), "config 'compacter' is not supported")


def test_lora_of_a_version_that_did_not_scale(tmp_path: Path) -> None:
    path = edited(tmp_path, "llama/lora", version="adapters.1.0.1")
    with pytest.warns(
        UserWarning, match=r"adapters\.1\.0\.1 did not scale by alpha / r; alpha = 6 is read as 4"
    ) as caught:
        config = peftrt.load(build("llama"), path)
    assert isinstance(config, peftrt.LoraConfig)
    assert config.lora_alpha == config.r == 4
    assert caught[0].filename == __file__
    config = peftrt.load(build("llama"), edited(tmp_path / "new", "llama/lora", version="adapters.1.1.0"))
    assert isinstance(config, peftrt.LoraConfig)
    assert config.lora_alpha == 6
