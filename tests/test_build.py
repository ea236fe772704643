"""peftrt/_build.py: what it plans, what it says when it cannot build, and that it builds once."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from peftrt import _build

ROOT = Path(__file__).parent.parent

SOURCES = {
    "binding_cpu.cpp": '#include "cpu/answer.h"\nint answer() { return peftrt_portable() + SHIFT; }\n',
    "cpu/answer.h": "int peftrt_portable();\n#define SHIFT 1\n",
    "cpu/nf4_answer.cpp": (
        "#define JOIN(a, b) a##b\n#define NAME(isa) JOIN(peftrt_, isa)\nint NAME(PEFTRT_ISA)() { return 1; }\n"
    ),
}


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """A tiny stand-in for csrc/ that compiles in no time."""
    for name, text in SOURCES.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "csrc"


@pytest.fixture
def chosen(csrc: Path) -> _build.Plan:
    plan = _build.plan("auto", csrc)
    if not plan.targets:
        pytest.skip(plan.reason)
    return plan


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse((ROOT / "peftrt" / "_build.py").read_text("utf8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_no_torch_in_the_build_requirements() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["build-system"]["requires"]
    assert [requirement.partition(">")[0] for requirement in requires] == ["setuptools"]


def test_the_torch_of_this_environment_is_found() -> None:
    import torch

    found = _build.find_torch()
    assert found is not None
    assert found.root == Path(torch.__file__).parent
    assert found.version == torch.__version__


def test_torch_is_found_where_site_packages_is_not_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _build.find_torch()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    assert _build.find_torch() == expected


def test_torch_is_found_through_virtual_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so", "version.py"):
        (site / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (site / "torch" / name).write_text("__version__ = '2.12.1+cpu'\n")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(_build.sysconfig, "get_path", lambda key: str(tmp_path / "nowhere"))
    assert _build.find_torch() is None
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert _build.find_torch() == _build.Torch(site / "torch", "2.12.1+cpu")


def test_unknown_mode() -> None:
    with pytest.raises(_build.BuildError, match="must be one of auto, cpu, cuda, none, got 'gpu'"):
        _build.plan("gpu")


def test_none_builds_nothing(csrc: Path) -> None:
    assert _build.plan("none", csrc).targets == ()


NVCC = """#!/bin/sh
# In the place of nvcc: says its version, or hands the C++ of a .cu file to a compiler that knows none of its flags.
case "$*" in *--version*) printf 'nvcc\\nCopyright\\nrelease 13.0\\nbuild\\n'; exit;; esac
[ -z "$NVCC_FAILS" ] || { echo no code today >&2; exit 1; }
for flag; do
  shift
  case "$flag" in -gencode*|--threads*|-ccbin*|-fmad*|-cudart*|-Xlinker*|-Xcompiler*) ;; *) set -- "$@" "$flag";; esac
done
case "$*" in *-shared*) exec c++ "$@";; *) exec c++ -fPIC -x c++ "$@";; esac
"""


@pytest.fixture
def nvcc(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUDA sources, a compiler for them, and a torch that could load what it makes."""
    for name in ("cuda/nf4_answer.cu", "binding_cuda.cpp"):
        (csrc / name).parent.mkdir(exist_ok=True)
        (csrc / name).write_text(f"int {Path(name).stem}() {{ return 1; }}\n")
    script = tmp_path / "nvcc"
    script.write_text(NVCC)
    script.chmod(0o755)
    monkeypatch.setenv("NVCC", str(script))
    monkeypatch.setattr(_build.Torch, "has_cuda", True)
    # this machine's torch may lack the library that a CUDA build links with
    monkeypatch.setattr(_build, "_libraries", lambda chosen, target: [])
    return script


def test_cuda_without_nvcc(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(_build.BuildError, match="nvcc is not found"):
        _build.plan("cuda", csrc)


def test_cuda_without_sources(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", sys.executable)
    with pytest.raises(_build.BuildError, match="the CUDA sources"):
        _build.plan("cuda", csrc)


def test_auto_builds_cuda_where_it_can_be_used(csrc: Path, nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _build.plan("auto", csrc).targets == ("cpu", "cuda")
    assert _build.plan("cpu", csrc).targets == ("cpu",)
    monkeypatch.setattr(_build.Torch, "has_cuda", False)
    plan = _build.plan("auto", csrc)
    assert plan.targets == ("cpu",)
    assert "is not a build for CUDA" in plan.reason
    # what is asked for by name is compiled, whatever torch is here
    assert _build.plan("cuda", csrc).targets == ("cpu", "cuda")
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    assert "nvcc is not found" in _build.plan("auto", csrc).reason


@pytest.mark.parametrize("archs", ["9", "sm_90", "7.5", "9.0x"])
def test_unknown_architectures(archs: str, csrc: Path, nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTRT_CUDA_ARCHS", archs)
    with pytest.raises(_build.BuildError, match=f"PEFTRT_CUDA_ARCHS must hold .* got '{archs}'"):
        _build.plan("cuda", csrc)


def test_both_libraries_are_built_once_and_again_for_other_architectures(
    csrc: Path, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "_C"
    cpu, cuda = _build.build(_build.plan("auto", csrc), out)
    assert (cpu.name, cuda.name) == ("libpeftrt_cpu.so", "libpeftrt_cuda.so")
    stamp = _build.read_stamp(out, "cuda")
    assert stamp is not None
    assert stamp["archs"] == _build.CUDA_ARCHS.split()
    assert str(stamp["compiler"]).startswith("release 13.0, and ")
    written = [path.stat().st_mtime_ns for path in (cpu, cuda)]
    _build.build(_build.plan("auto", csrc), out)
    assert [path.stat().st_mtime_ns for path in (cpu, cuda)] == written
    monkeypatch.setenv("PEFTRT_CUDA_ARCHS", "8.0, 9.0a")
    _build.build(_build.plan("auto", csrc), out)
    assert cpu.stat().st_mtime_ns == written[0]
    assert cuda.stat().st_mtime_ns > written[1]


def test_a_failure_of_one_does_not_lose_the_other(
    csrc: Path, nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVCC_FAILS", "1")
    with pytest.raises(_build.BuildError, match="no code today"):
        _build.build(_build.plan("cuda", csrc), tmp_path / "demanded")
    (library,) = _build.build(_build.plan("auto", csrc), tmp_path / "_C")
    assert library.name == "libpeftrt_cpu.so"
    assert "libpeftrt_cuda.so is left out: the compiler failed" in capfd.readouterr().err


def test_each_library_has_its_own_sources() -> None:
    found = {target: {path.name for path in _build.source_files(ROOT / "csrc", target)} for target in ("cpu", "cuda")}
    assert "nf4.h" in found["cpu"] & found["cuda"]
    assert {"binding_cpu.cpp", "dispatch.cpp"} <= found["cpu"] - found["cuda"]
    assert {"binding_cuda.cpp", "device.h"} <= found["cuda"] - found["cpu"]


@pytest.mark.parametrize(
    ("missing", "words"),
    [("compiler", "CXX='/nowhere/c\\+\\+' is not found"), ("torch", "no torch with headers"), ("sources", "csrc")],
)
def test_what_is_missing(missing: str, words: str, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "compiler":
        monkeypatch.setenv("CXX", "/nowhere/c++")
    elif missing == "torch":
        monkeypatch.setattr(_build, "find_torch", lambda: None)
    else:
        shutil.rmtree(csrc)
    with pytest.raises(_build.BuildError, match=words):
        _build.plan("cpu", csrc)
    plan = _build.plan("auto", csrc)
    assert plan.targets == ()
    assert "python -m peftrt build" in plan.reason


def test_an_old_torch_is_refused(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "find_torch", lambda: _build.Torch(Path("/torch"), "2.10.0+cu130"))
    with pytest.raises(_build.BuildError, match=r"torch 2\.10\.0\+cu130 in /torch is older than 2\.11"):
        _build.plan("cpu", csrc)


def test_no_machine_flags_outside_the_table() -> None:
    common = (*_build.COMMON_FLAGS, *_build.WARNING_FLAGS)
    assert not [flag for flag in common if flag.startswith(("-m", "-fopenmp"))]
    for unit in _build.kernel_units(ROOT / "csrc"):
        assert any(flag.startswith("-m") for flag in unit.flags) == unit.name.endswith(("_avx2", "_avx512")), unit


def test_built_once_and_again_when_something_changed(
    chosen: _build.Plan, csrc: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "_C"
    (library,) = _build.build(chosen, out)
    assert library.name == "libpeftrt_cpu.so"
    stamp = _build.read_stamp(out)
    assert stamp is not None
    assert chosen.torch is not None
    assert stamp["torch"] == chosen.torch.version
    assert {"compiler", "flags", "isa", "fingerprint"} <= stamp.keys()
    assert sorted(path.name for path in out.iterdir()) == ["libpeftrt_cpu.so", "libpeftrt_cpu.so.json"]
    capfd.readouterr()

    written = library.stat().st_mtime_ns
    _build.build(chosen, out)
    assert library.stat().st_mtime_ns == written
    assert capfd.readouterr().err == ""
    _build.build(chosen, out, force=True)
    assert library.stat().st_mtime_ns > written

    written = library.stat().st_mtime_ns
    (csrc / "cpu" / "answer.h").write_text(SOURCES["cpu/answer.h"].replace("1", "2"))
    _build.build(chosen, out)
    assert library.stat().st_mtime_ns > written
    assert _build.read_stamp(out) != stamp


def test_a_compile_error_shows_the_command_and_keeps_the_old_library(
    chosen: _build.Plan, csrc: Path, tmp_path: Path
) -> None:
    out = tmp_path / "_C"
    (library,) = _build.build(chosen, out)
    before = library.read_bytes()
    (csrc / "cpu" / "nf4_answer.cpp").write_text("#error no answer today\n")
    with pytest.raises(_build.BuildError, match=r"(?s)-DPEFTRT_ISA=.*nf4_answer\.cpp.*no answer today"):
        _build.build(chosen, out)
    assert library.read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["libpeftrt_cpu.so", "libpeftrt_cpu.so.json"]


def test_a_symbol_that_nothing_defines_is_an_error(chosen: _build.Plan, csrc: Path, tmp_path: Path) -> None:
    (csrc / "cpu" / "nf4_answer.cpp").write_text("int something_else;\n")
    with pytest.raises(_build.BuildError, match="peftrt_portable"):
        _build.build(chosen, tmp_path / "_C")


def test_the_library_needs_torch_alone_and_no_python() -> None:
    library = _build.default_directory() / _build.library_name("cpu")
    if not library.is_file() or shutil.which("readelf") is None:
        pytest.skip("the library is not built, or there is no readelf")
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in listing.splitlines() if "(NEEDED)" in line}
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "gomp" in name or "omp" in name or name == "libc10.so"]
