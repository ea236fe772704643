"""IA3Config and IA3's files: peft's fields, and what is refused by name, with nothing changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftrt
from peftrt.adapters.configs import peft_fields
from peftrt.adapters.configs.ia3 import IA3Config
from peftrt.adapters.ia3_state import validate_ia3_tensors
from peftrt.formats.errors import ConfigError, FormatError, NonFiniteError, UnsupportedError
from tests.adapters.test_io import change_config, change_tensors
from tests.adapters.tiny import build, config, unchanged

MINIMUM = {"peft_type": "IA3", "target_modules": ["k", "wo"], "feedforward_modules": ["wo"]}

BAD_FIELDS: list[tuple[str, Any]] = [
    *(("target_modules", v) for v in ("", [], [""], [3], {"q": 1}, 3, True, "a(")),
    *(("feedforward_modules", v) for v in ("", [""], [3], {"wo": 1}, 3, True, "a(", ["wi"], ["wo", "wi"])),
    *(("exclude_modules", v) for v in ("", [""], [3], 3, "[")),
    *((name, v) for name in ("fan_in_fan_out", "init_ia3_weights", "inference_mode") for v in (1, 0, "true", None)),
    *(("modules_to_save", v) for v in ("head", ["head", 3], [""], ["head|x"])),
    ("task_type", "LM"),
    ("revision", ["main"]),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda value: repr(value)[:30])
def test_bad_field(name: str, value: Any) -> None:
    values = {"target_modules": ["k", "wo"], "feedforward_modules": ["wo"], name: value}
    with pytest.raises(ConfigError, match=name):
        IA3Config(**values)
    with pytest.raises(ConfigError, match=rf"dir/adapter_config.json: .*{name}"):
        IA3Config.from_peft_dict({**MINIMUM, **values}, "dir/adapter_config.json")


@pytest.mark.parametrize("missing", ["target_modules", "feedforward_modules"])
def test_modules_are_not_guessed(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing}: name"):
        IA3Config(**{"target_modules": ["k"], "feedforward_modules": [], missing: None})
    for values in ({**MINIMUM, missing: None}, {key: v for key, v in MINIMUM.items() if key != missing}):
        with pytest.raises(ConfigError, match=f"{missing} is missing"):
            IA3Config.from_peft_dict(values)


def test_whole_paths_beside_ends_of_them_are_written_as_peft_takes_them(tmp_path: Path) -> None:
    """peft itself writes such a pair for "all-linear", and does not read it."""
    peft = pytest.importorskip("peft")
    path = "model.layers.0.mlp.down_proj"
    model = build("llama")
    peftrt.adapt(model, IA3Config(target_modules=[path, "k_proj"], feedforward_modules=["down_proj"]))
    assert model.get_submodule(path).ia3("default").feedforward
    peftrt.save(model, tmp_path)
    theirs = peft.IA3Config.from_pretrained(str(tmp_path))
    assert theirs.feedforward_modules == {path}
    assert theirs.target_modules == {path, *(f"model.layers.{i}.self_attn.k_proj" for i in range(2))}


def test_every_field_of_peft_is_known() -> None:
    peft = pytest.importorskip("peft")
    names = {field.name for field in dataclasses.fields(peft.IA3Config)}
    own = {field.name for field in dataclasses.fields(IA3Config)}
    assert own <= names
    assert names - own <= peft_fields.WITHOUT_EFFECT
    theirs = peft.IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"]).to_dict()
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in theirs.items()}
    values["peft_type"] = str(values["peft_type"].value)
    assert IA3Config.from_peft_dict(values) == IA3Config(target_modules=["k", "wo"], feedforward_modules=["wo"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("feedforward_scaling", "output"), ("r", 8), ("tomorrow", "x")],
)
def test_a_field_that_may_change_the_result_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} = .* may change the result"):
        IA3Config.from_peft_dict({**MINIMUM, name: value})


@pytest.mark.parametrize("kind", ["LORA", "ia3", 3, ["IA3"]])
def test_another_peft_type_is_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedError, match="peft_type"):
        IA3Config.from_peft_dict({**MINIMUM, "peft_type": kind})


def test_what_is_written_has_peft_s_fields_alone() -> None:
    made = IA3Config(target_modules={"wo", "k"}, feedforward_modules={"wo"}, modules_to_save=["head"])
    assert made.target_modules == ("k", "wo")
    written = json.loads(json.dumps(made.to_peft_dict()))
    assert written["peft_type"] == "IA3"
    assert written["inference_mode"] is True
    assert IA3Config.from_peft_dict(written) == dataclasses.replace(made, inference_mode=True)


def test_feed_forward_modules_are_chosen_as_by_peft() -> None:
    """An entry of a list is any end of a path, not a part of its own."""
    peft = pytest.importorskip("peft")
    paths = ["a.wo", "a.two", "wo", "wo.a", "a.wo.b", "a.b"]
    for inner in (["wo"], ["a.wo", "b"], [], r".*\.wo", "wo"):
        made = IA3Config(target_modules=".*", feedforward_modules=inner)
        theirs = peft.IA3Config(target_modules=".*", feedforward_modules=inner)
        check = peft.IA3Model._check_target_module_feedforward
        assert [made.is_feedforward(path) for path in paths] == [check(theirs, path) for path in paths]


P = "base_model.model."
K, WO = f"{P}a.k.ia3_l", f"{P}a.wo.ia3_l"


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    result: dict[str, Any] = {K: torch.ones(5, 1), WO: torch.ones(1, 6), f"{P}head.weight": torch.ones(3, 5)}
    result.update({f"{P}{key}": value for key, value in changes.items()})
    return {key: value for key, value in result.items() if value is not None}


def made(**changes: Any) -> IA3Config:
    values = {"target_modules": ["k", "wo"], "feedforward_modules": ["wo"], "modules_to_save": ["head"], **changes}
    return IA3Config(**values)


def test_tensors_are_sorted_by_module() -> None:
    given = tensors()
    state = validate_ia3_tensors(made(), given)
    assert state.factors == {"a.k": given[K], "a.wo": given[WO]}
    assert state.saved["head"].keys() == {"weight"}


WRONG: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "wrong side": ({}, {"a.k.ia3_l": torch.ones(1, 5)}, r"a\.k\.ia3_l'.*does not name the module.*got \[1, 5\]"),
    "wrong inner side": ({}, {"a.wo.ia3_l": torch.ones(6, 1)}, r"a\.wo\.ia3_l'.*names the module.*got \[6, 1\]"),
    "made with other inner modules": ({"feedforward_modules": []}, {}, r"a\.wo\.ia3_l'.*outputs are scaled"),
    "a vector": ({}, {"a.k.ia3_l": torch.ones(5)}, r"got \[5\]"),
    "empty": ({}, {"a.k.ia3_l": torch.ones(0, 1)}, r"got \[0, 1\]"),
    "three dimensions": ({}, {"a.k.ia3_l": torch.ones(5, 1, 1)}, r"got \[5, 1, 1\]"),
    "int8": ({}, {"a.k.ia3_l": torch.ones(5, 1, dtype=torch.int8)}, "torch.int8"),
    "float64": ({}, {"a.k.ia3_l": torch.ones(5, 1, dtype=torch.float64)}, "torch.float64"),
    "a matrix of LoRA": ({}, {"a.k.lora_A.weight": torch.ones(2, 5)}, "peft_type is 'IA3'"),
    "a weight's key": ({}, {"a.k.ia3_l.weight": torch.ones(5, 1)}, "is not supported"),
    "not targeted": ({"target_modules": ["wo"]}, {}, "'a.k' has tensors, but the configuration does not target"),
    "excluded": ({"exclude_modules": ["k"]}, {}, "'a.k' has tensors, but the configuration does not target"),
    "target without tensors": ({"target_modules": ["k", "wo", "v"]}, {}, "no tensor for target_modules entry 'v'"),
    "modules_to_save missing": ({"modules_to_save": None}, {}, "head.weight"),
    "a stray base": ({}, {"b.v.base_layer.weight": torch.ones(2, 2)}, "'b.v' has tensors of its own, but no adapter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_are_refused(case: str) -> None:
    changes, keys, message = WRONG[case]
    with pytest.raises(FormatError, match=f"^file: .*{message}"):
        validate_ia3_tensors(made(**changes), tensors(**keys), "file")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter of the tiny Llama."""
    model = build("llama")
    values = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    peftrt.adapt(model, IA3Config(init_ia3_weights=False, **values), name="fr")
    peftrt.save(model, tmp_path / "fr", name="fr")
    return tmp_path / "fr"


KEY = f"{P}model.layers.1.self_attn.k_proj.ia3_l"
INNER = f"{P}model.layers.1.mlp.down_proj.ia3_l"
BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "another length": (
        lambda d: change_tensors(d, lambda t: t.update({KEY: torch.ones(33, 1)})),
        FormatError,
        r"k_proj': ia3_l is \[33, 1\], the model's weight of \[32, 64\] needs \[32, 1\]",
    ),
    "another inner length": (
        lambda d: change_tensors(d, lambda t: t.update({INNER: torch.ones(1, 64)})),
        FormatError,
        r"down_proj': ia3_l is \[1, 64\], the model's weight of \[64, 96\] needs \[1, 96\]",
    ),
    "wrong side": (
        lambda d: change_tensors(d, lambda t: t.update({KEY: torch.ones(1, 64)})),
        FormatError,
        r"does not name the module, so its outputs are scaled; got \[1, 64\]",
    ),
    "another list of inner modules": (
        lambda d: change_config(d, feedforward_modules=[]),
        FormatError,
        r"down_proj.ia3_l.*does not name the module",
    ),
    "a key is missing": (
        lambda d: change_tensors(d, lambda t: t.pop(KEY)),
        FormatError,
        r"no tensors for 'model\.layers\.1\.self_attn\.k_proj'",
    ),
    "a key more": (
        lambda d: change_tensors(d, lambda t: t.update({KEY.replace("k_proj", "q_proj"): torch.ones(64, 1)})),
        FormatError,
        "does not target it",
    ),
    "unknown module": (
        lambda d: change_tensors(d, lambda t: t.update({KEY.replace("layers.1", "layers.7"): t.pop(KEY)})),
        FormatError,
        r"no module 'model\.layers\.7",
    ),
    "an embedding": (
        lambda d: (
            change_config(d, target_modules=["k_proj", "v_proj", "down_proj", "embed_tokens"]),
            change_tensors(d, lambda t: t.update({f"{P}model.embed_tokens.ia3_l": torch.ones(64, 1)})),
        ),
        FormatError,
        "embed_tokens': IA3 of an embedding is not supported",
    ),
    "nan": (lambda d: change_tensors(d, lambda t: t[KEY].fill_(float("nan"))), NonFiniteError, "k_proj"),
    "LoRA's type": (lambda d: change_config(d, peft_type="LORA", r=4), UnsupportedError, "feedforward_modules"),
}


@pytest.mark.parametrize("how", ["dense", "nf4"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_directory_is_refused_and_changes_nothing(case: str, how: str, directory: Path) -> None:
    spoil, error, message = BAD[case]
    spoil(directory)
    model = build("llama")
    if how == "nf4":
        peftrt.adapt(model, config("llama", target_modules=["k_proj", "up_proj"]), name="mine", quantize="nf4")
    with unchanged(model), pytest.raises(error, match=message):
        peftrt.load(model, directory, name="fr")


def test_names_are_shared_with_the_other_methods(directory: Path) -> None:
    model = build("llama")
    peftrt.load(model, directory, name="fr", trainable=True)
    assert all(p.requires_grad == ("ia3_l" in name) for name, p in model.named_parameters())
    with unchanged(model), pytest.raises(ValueError, match="'fr'"):
        peftrt.adapt(model, config("llama"), name="fr")
    peftrt.adapt(model, config("llama", target_modules=["k_proj"]), name="de")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "ia3_l" in name)
    peftrt.load(model, directory, name="de", replace=True)
    assert model.model.layers[0].self_attn.k_proj.ia3("de") is not None
    assert "lora_A@de" not in dict(model.model.layers[0].self_attn.k_proj.named_parameters())


def test_a_pool_refuses(directory: Path) -> None:
    pool = peftrt.serving.AdapterPool(build("llama"), device_budget="1MiB", host_budget="1MiB")
    with pytest.raises(UnsupportedError, match="IA3"):
        pool.load("fr", directory)
    assert pool.names == ()
