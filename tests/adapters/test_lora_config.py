"""LoraConfig: peft's fields and peft's numbers; what it cannot honour is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from peftrt.adapters.configs import peft_fields
from peftrt.adapters.configs.lora import LoraConfig
from peftrt.formats.errors import ConfigError, UnsupportedError

MINIMUM = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}

BAD_FIELDS: list[tuple[str, Any]] = [
    *(("r", value) for value in (0, -1, 2**31, 65537, "8", 8.5, 8.0, True, [8], float("nan"))),
    *(("lora_alpha", v) for v in (float("nan"), float("inf"), -float("inf"), "16", True, None, 10**400, 1e39, [1])),
    *(("lora_dropout", value) for value in (-0.1, 1, 1.0, 1.5, float("nan"), "0", None, True)),
    *(("target_modules", value) for value in ("", [], [""], [3], {"q": 1}, 3, True, ["q"] * 65537, "a(")),
    *(("exclude_modules", value) for value in ("", [""], [3], 3, "[")),
    *(("bias", value) for value in (None, "some", 0, ["none"])),
    *((name, v) for name in ("fan_in_fan_out", "use_rslora", "inference_mode") for v in (1, 0, "true", None)),
    *(("init_lora_weights", value) for value in (None, 1, 0, ["gaussian"])),
    *(
        ("rank_pattern", v)
        for v in ([], {"q": 0}, {"q": True}, {"q": 2**31}, {"q": "8"}, {"": 4}, {1: 4}, {"(": 4}, "q")
    ),
    *(("alpha_pattern", v) for v in ([], {"q": float("nan")}, {"q": "8"}, {"q": None}, {"(a": 4})),
    *(("rank_pattern", {f"x{i}|y": 4 for i in range(n)}) for n in (257,)),
    *(("layers_to_transform", v) for v in (-1, "1", [1.0], [True], True, {"1": 1}, [2**40], 1.5)),
    *(("layers_pattern", v) for v in (3, ["a("], "h|layers", [""], ".*")),
    *(("modules_to_save", v) for v in ("head", ["head", 3], [""], ["head|x"], [".*"], 3, {"head": 1})),
    *(("task_type", v) for v in ("LM", 3, "causal_lm")),
    ("base_model_name_or_path", 3),
    ("revision", ["main"]),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda value: repr(value)[:30])
def test_bad_field(name: str, value: Any) -> None:
    fields = {"target_modules": ["q"], name: value}
    if name == "layers_pattern":
        fields["layers_to_transform"] = [1]
    with pytest.raises(ConfigError, match=name) as caught:
        LoraConfig(**fields)
    assert len(str(caught.value)) < 1_000_000
    document = {**MINIMUM, **fields}
    with pytest.raises(ConfigError, match=name) as caught:
        LoraConfig.from_peft_dict(document, "dir/adapter_config.json")
    assert "dir/adapter_config.json" in str(caught.value)


@pytest.mark.parametrize("missing", ["r", "peft_type", "target_modules"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_missing_field(missing: str, how: str) -> None:
    document: dict[str, Any] = dict(MINIMUM)
    document.pop(missing)
    if how == "null":
        document[missing] = None
    with pytest.raises(ConfigError, match=f"adapter_config.json: {missing} is missing"):
        LoraConfig.from_peft_dict(document)


def test_no_target_is_guessed() -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        LoraConfig(r=8)


def test_string_target_with_layers() -> None:
    for fields in ({"layers_to_transform": [1]}, {"layers_pattern": "h"}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            LoraConfig(target_modules="all-linear", **fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layers_pattern: needs layers_to_transform"):
        LoraConfig(target_modules=["q"], layers_pattern="h")


def test_scaling_beyond_float32() -> None:
    with pytest.raises(ConfigError, match="lora_alpha"):
        LoraConfig(target_modules=["q"], lora_alpha=3.5e38)
    assert math.isfinite(LoraConfig(target_modules=["q"], lora_alpha=3.4e38, r=1).scaling_for("q"))


def peft_defaults() -> dict[str, Any]:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["q"]).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def test_every_field_of_peft_is_known() -> None:
    import peft

    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    ours = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names == ours | set(peft_fields.NEUTRAL_LORA) | (peft_fields.WITHOUT_EFFECT & names)
    assert ours <= names
    assert not ours & (set(peft_fields.NEUTRAL_LORA) | peft_fields.WITHOUT_EFFECT)
    for name, value in peft_defaults().items():
        if name in peft_fields.NEUTRAL_LORA:
            assert value in peft_fields.NEUTRAL_LORA[name], name


def test_a_default_peft_configuration_is_read() -> None:
    config = LoraConfig.from_peft_dict(peft_defaults())
    assert config == LoraConfig(r=8, lora_alpha=8, target_modules=["q"])


CHANGES_THE_RESULT: dict[str, Any] = {
    "lora_bias": True,
    "bias": "all",
    "megatron_config": {"hidden_size": 8},
    "trainable_token_indices": [1],
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"scale": "stable"},
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1},
    "ensure_weight_tying": True,
    "a_field_of_tomorrow": "x",
    "another_field_of_tomorrow": 0.5,
    "a_number_of_tomorrow": 0,
}


def test_list_of_what_changes_the_result_is_whole() -> None:
    assert set(peft_fields.NEUTRAL_LORA) <= set(CHANGES_THE_RESULT)


@pytest.mark.parametrize("name", sorted(CHANGES_THE_RESULT))
def test_field_that_changes_the_result_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"adapter_config.json: {name}"):
        LoraConfig.from_peft_dict({**peft_defaults(), name: CHANGES_THE_RESULT[name]})


@pytest.mark.parametrize("value", ["olora", "corda", "lora_ga", "unheard_of", "pissa_niter_", "pissa_niter_x", "PiSSA"])
def test_initialisation_that_is_not_there(value: str) -> None:
    with pytest.raises(UnsupportedError, match=f"init_lora_weights.*{value}"):
        LoraConfig.from_peft_dict({**MINIMUM, "init_lora_weights": value})
    with pytest.raises(
        UnsupportedError, match=f"{value}.*use True, False, 'gaussian'.*corda, eva, lora_ga, mica, olora"
    ):
        LoraConfig(target_modules=["q"], init_lora_weights=value)


@pytest.mark.parametrize("value", ["eva", "mica"])
def test_initialisation_that_leaves_the_base_is_read_but_not_offered(value: str) -> None:
    document = {**MINIMUM, "init_lora_weights": value, "eva_config": {"rho": 2.0}}
    assert LoraConfig.from_peft_dict(document).init_lora_weights is True
    with pytest.raises(UnsupportedError, match=value):
        LoraConfig(target_modules=["q"], init_lora_weights=value)


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16"])
def test_a_file_whose_tensors_belong_to_another_base_is_refused(value: str) -> None:
    with pytest.raises(UnsupportedError, match=f"init_lora_weights '{value}' .*path_initial_model_for_weight"):
        LoraConfig.from_peft_dict({**MINIMUM, "init_lora_weights": value})


def test_loftq_is_written_as_peft_has_it() -> None:
    config = LoraConfig(target_modules=["q"], init_lora_weights="loftq", loftq_config={"loftq_iter": 3})
    written = config.to_peft_dict()
    assert written["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 3}
    assert LoraConfig.from_peft_dict(written).loftq_config == config.loftq_config
    assert LoraConfig(target_modules=["q"], init_lora_weights="loftq").loftq_config["loftq_iter"] == 1


@pytest.mark.parametrize(
    ("init", "value", "message"),
    [
        ("loftq", {"loftq_bits": 8}, "loftq_bits must be 4"),
        ("loftq", {"loftq_iter": 0}, "loftq_iter must be an integer from 1"),
        ("loftq", {"loftq_iter": True}, "loftq_iter must be"),
        ("loftq", {"loftq_steps": 1}, "got 'loftq_steps'"),
        ("loftq", [4], "expected a map"),
        (True, {"loftq_bits": 4}, "with init_lora_weights 'loftq' only"),
    ],
    ids=str,
)
def test_a_bad_loftq_config_is_named(init: Any, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"loftq_config.*{message}"):
        LoraConfig(target_modules=["q"], init_lora_weights=init, loftq_config=value)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_doubled_ranks_keep_the_scalings(use_rslora: bool) -> None:
    patterns = {"rank_pattern": {"q": 3}, "alpha_pattern": {"k": 5}}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v"], use_rslora=use_rslora, **patterns)
    doubled = config.with_doubled_ranks()
    assert [doubled.rank_for(path) for path in ("a.q", "a.k", "a.v")] == [6, 8, 8]
    for path in ("a.q", "a.k", "a.v"):
        assert doubled.scaling_for(path) == pytest.approx(config.scaling_for(path), rel=1e-15)


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_unknown_field_that_is_off_is_accepted(value: Any) -> None:
    assert LoraConfig.from_peft_dict({**MINIMUM, "a_field_of_tomorrow": value}).r == 8


@pytest.mark.parametrize("kind", ["IA3", "lora", 3, ["LORA"], "PREFIX_TUNING"])
def test_another_peft_type_is_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedError, match="peft_type"):
        LoraConfig.from_peft_dict({**MINIMUM, "peft_type": kind})


@pytest.mark.parametrize("name", sorted(peft_fields.CODE_FIELDS))
def test_field_that_names_code_is_ignored_with_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} is ignored"):
        config = LoraConfig.from_peft_dict({**MINIMUM, name: {"AutoModel": "evil--module.Evil"}})
    assert not hasattr(config, name)


def test_what_we_write_peft_reads_with_the_same_meaning(tmp_path: Path) -> None:
    import peft

    config = LoraConfig(
        r=4,
        lora_alpha=12.5,
        target_modules={"k", "q"},
        lora_dropout=0.1,
        fan_in_fan_out=True,
        use_rslora=True,
        init_lora_weights="gaussian",
        rank_pattern={"a.q": 2},
        alpha_pattern={"^b": 3},
        layers_to_transform=[3, 1],
        layers_pattern=["layers"],
        modules_to_save=("head",),
        exclude_modules=["x"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="base",
        revision="main",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_peft_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.LoraConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(LoraConfig):
        ours, read = getattr(config, field.name), getattr(theirs, field.name)
        if field.name == "inference_mode":
            assert (ours, read) == (False, True)
        elif isinstance(ours, tuple):
            assert set(ours) == set(read), field.name
        else:
            assert ours == read, field.name
    theirs.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    again = LoraConfig.from_peft_dict({**document, "target_modules": sorted(document["target_modules"])})
    assert again == dataclasses.replace(config, inference_mode=True)


def test_values_cannot_be_changed_and_can_be_copied() -> None:
    ranks = {"q": 2}
    config = LoraConfig(target_modules=["q"], rank_pattern=ranks)
    ranks["q"] = 3
    assert config.rank_for("q") == 2
    config.to_peft_dict()["rank_pattern"]["q"] = 3
    assert config.rank_for("q") == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_rsLoRA_and_plain_scaling() -> None:
    config = LoraConfig(r=16, lora_alpha=8, target_modules=["q", "k"], rank_pattern={"k": 4}, alpha_pattern={"k": 2})
    assert config.scaling_for("a.q") == 0.5
    assert config.scaling_for("a.k") == 0.5
    stable = dataclasses.replace(config, use_rslora=True)
    assert stable.scaling_for("a.q") == 8 / 4
    assert stable.scaling_for("a.k") == 2 / 2


def test_patterns_choose_as_peft_does() -> None:
    from peft.utils.other import get_pattern_key

    rng = random.Random(7)
    parts = ["model", "layers", "0", "1", "10", "q_proj", "k_proj", "self_attn", "a-b"]
    keys = ["q_proj", "0.q_proj", "layers.1", r"layers\.1\..*", "^model.layers", "q_proj|k_proj", r".*\.10\..*q_proj"]
    keys += ["s.0", "elf_attn.q", "self_attn.q_proj", "a-b", "[qk]_proj", "1.*proj", ""]
    for _ in range(1500):
        path = ".".join(rng.choices(parts, k=rng.randint(1, 5)))
        chosen = rng.sample(keys[:-1], k=rng.randint(0, 4))
        config = LoraConfig(r=64, target_modules=["q"], rank_pattern={key: i + 1 for i, key in enumerate(chosen)})
        expected = config.rank_pattern.get(get_pattern_key(chosen, path), 64)
        assert config.rank_for(path) == expected, (path, chosen)


def test_pattern_that_would_run_for_hours_is_bounded() -> None:
    config = LoraConfig(target_modules=["q"], rank_pattern={"(a+)+": 4}, alpha_pattern={"((a|a?)+)+b": 4})
    assert config.rank_for("x." + "a" * 100 + "!") == 8
    assert config.alpha_for("x." + "a" * 100 + "!") == 8
