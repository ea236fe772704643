"""The command itself: help, version, info, build."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import peftrt
from peftrt import info
from peftrt.cli import _parser, main
from peftrt.finetune.settings import Settings
from peftrt.ops._define import OPS


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["finetune", "demo", "compare", "estimate", "convert", "info", "build"]),
        (["estimate", "--help"], ["--method", "llama-65b", "default: 512"]),
        (["compare", "--help"], ["--methods", "qlora-16", "default: 200", "--quick"]),
        (["finetune", "--help"], ["--model", "default: all-linear", "default: 0.05", "--resume"]),
        (["demo", "--help"], ["--out", "demo-out"]),
        (["convert", "--help"], ["--to", "--model", "--name"]),
        (["info", "--help"], ["--json"]),
        (["build", "--help"], ["--force"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert all(word in " ".join(text.split()) for word in words), text


def test_every_setting_is_an_option_with_its_default_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Settings):
        option = "--" + field.name.replace("_", "-")
        assert option in text
        if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in text, option


def test_no_default_overrides_a_resumed_run() -> None:
    options = vars(_parser().parse_args(["finetune", "--resume", "--out", "x"]))
    assert set(options) == {"out", "resume", "overwrite", "command", "parser"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"peftrt {peftrt.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["finetun"], "invalid choice: 'finetun'"),
        (["info", "--jsn"], "unknown argument --jsn: did you mean --json?"),
        (["build", "gpu"], "invalid choice: 'gpu'"),
        (["demo", "extra"], "unknown argument extra"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_info_tells_the_backend_of_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peftrt"] == peftrt.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["ops"]) == {*OPS, "adamw_step", "gradient_norm"}
    built = found["native"]["error"] is None
    for op, devices in found["ops"].items():
        for device, dtypes in devices.items():
            for dtype, choice in dtypes.items():
                assert choice["backend"] in ("native", "triton", "reference"), (op, device, dtype)
    assert found["ops"]["nf4_linear"]["cpu"]["fp32"]["backend"] == ("native" if built else "reference")
    assert "triton" in found["ops"]["nf4_linear"]["cpu"]["fp32"]["not"] or built


def test_info_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in OPS)
    assert f"peftrt {peftrt.__version__}" in text
    monkeypatch.setenv("PEFTRT_BACKEND", "reference")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "PEFTRT_BACKEND=reference forces a backend" in text
    assert "native   " not in text.partition("operation on cpu")[2].partition("not")[0]


@pytest.mark.parametrize("dtype", info.DTYPES.values())
@pytest.mark.parametrize("op", sorted(OPS))
def test_the_sample_calls_run(op: str, dtype: torch.dtype) -> None:
    """What ``info`` asks about is a call that can be made."""
    name, _, overload = op.partition(".")
    getattr(getattr(torch.ops.peftrt, name), overload or "default")(*info.sample(op, "cpu", dtype))


def test_build_none(peftrt_process: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = peftrt_process("build", "none")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "nothing is built" in output + errors
