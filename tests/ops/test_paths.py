"""The table of paths, and the choice of a backend on CUDA by it: on tensors that need no device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import peftrt
from peftrt.ops import (
    _define,
    _native,
    _nf4_linear,
    _panels,
    _paths,
    _triton,
)
from peftrt.ops._backend import Backend, choose
from peftrt.ops._define import OPS
from peftrt.ops._paths import DECODE, PANELS, TILE
from peftrt.ops._weight import WeightArgs, weight_args
from peftrt.reference import nf4 as reference
from tests.cases import nf4, randn
from tests.tolerances import assert_close, assert_same_bits

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
# tensors of a device that need not be there: shapes without memory
FAKE = FakeTensorMode()
KEYS = {(direction, itemsize) for direction in ("forward", "dx", "lora", "lora_dense") for itemsize in (2, 4)}


def on_cuda(m: int, features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with FAKE:
        return torch.empty(m, features, dtype=dtype, device="cuda")


WEIGHT = weight_args("nf4_linear", nf4(512, 256))


def arguments(m: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Of nf4_linear on a device that need not be there."""
    with FAKE:
        tensors = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in WEIGHT[:4]]  # type: ignore[union-attr]
    return (on_cuda(m, WEIGHT.k, dtype), *tensors, *WEIGHT[4:], None)


def as_on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Both backends can run, on a device of the class sm_90."""
    monkeypatch.setattr(_paths, "device_class", lambda device: "sm_90")
    monkeypatch.setattr(_native, "cuda_unsupported", lambda x, dtype: None)
    monkeypatch.setattr(_native, "cuda_rows", lambda device: _paths.WIDE_ROWS)
    monkeypatch.setattr(_triton, "unsupported", lambda x, dtype: None)
    return monkeypatch


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return as_on_a_hopper(monkeypatch)


def chosen(name: str, args: tuple[Any, ...]) -> str:
    backend = choose(name, OPS[name].backends, "cuda", args).backend
    assert backend is not None
    return backend.name


def test_every_class_has_every_pass_and_size() -> None:
    for name, rows in _paths.TABLE.items():
        assert set(rows) == KEYS, name
        for (direction, itemsize), limits in rows.items():
            assert limits.tile >= 0
            # the CUDA kernels have no more rows, no other dtypes and no input gradient
            most = {"forward": _paths.WIDE_ROWS if name == "sm_90" else _paths.NATIVE_ROWS, "lora": _paths.NATIVE_ROWS}
            assert 0 <= limits.decode <= (most.get(direction, 0) if itemsize == 2 else 0)


@pytest.mark.skipif(not SOURCES.is_dir(), reason="this checkout has no CUDA kernels")
def test_the_table_and_the_kernels_agree_on_their_rows() -> None:
    wide = re.findall(r"kWideRows\s*=\s*(\d+)", (SOURCES / "wide_layout.h").read_text())
    assert wide == [str(_paths.WIDE_ROWS)]
    eights = re.findall(r"kMaxTiles\s*=\s*(\d+)", (SOURCES / "linear_layout.h").read_text())
    assert [8 * int(number) for number in eights] == [_paths.NATIVE_ROWS]


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 1), "sm_100"),
    ],
)
def test_a_device_takes_the_nearest_class(capability: tuple[int, int], name: str) -> None:
    assert _paths.nearest(capability) == name
    assert name in _paths.TABLE


@pytest.mark.parametrize(
    ("direction", "dtype", "rows", "path"),
    [
        ("forward", torch.bfloat16, 0, DECODE),
        ("forward", torch.bfloat16, 64, DECODE),
        ("forward", torch.float16, 65, DECODE),
        ("forward", torch.bfloat16, 512, DECODE),
        ("forward", torch.bfloat16, 513, PANELS),
        ("dx", torch.bfloat16, 1, TILE),
        ("dx", torch.bfloat16, 512, PANELS),
        ("forward", torch.float32, 1, TILE),
        ("forward", torch.float32, 128, PANELS),
        ("forward", torch.float64, 8192, None),
        ("lora", torch.bfloat16, 64, DECODE),
        ("lora", torch.bfloat16, 65, TILE),
        ("lora", torch.float32, 1, TILE),
        ("lora", torch.bfloat16, 639, TILE),
        ("lora", torch.bfloat16, 640, PANELS),
        ("lora_dense", torch.float16, 255, TILE),
        ("lora_dense", torch.float16, 256, PANELS),
        ("lora_dense", torch.float32, 128, PANELS),
    ],
)
def test_paths_on_a_hopper(
    direction: str, dtype: torch.dtype, rows: int, path: str | None, hopper: pytest.MonkeyPatch
) -> None:
    assert _paths.path(direction, on_cuda(rows, 64, dtype)) == path
    assert _paths.path(direction, torch.empty(rows, 64, dtype=dtype)) is None


@pytest.mark.parametrize(("rows", "path"), [(1, TILE), (511, TILE), (512, PANELS)])
def test_paths_where_nothing_decodes(rows: int, path: str, hopper: pytest.MonkeyPatch) -> None:
    assert _paths.path("forward", on_cuda(rows, 64), decodes=False) == path


def test_leading_dimensions_are_rows() -> None:
    assert [_paths.rows_of(torch.empty(shape)) for shape in ((), (5,), (2, 3, 5), (0, 5))] == [1, 1, 6, 0]


@pytest.mark.parametrize("m", [1, 64, 65, 512, 513])
def test_native_is_first_where_it_has_warpgroups(m: int, hopper: pytest.MonkeyPatch) -> None:
    assert chosen("nf4_linear", arguments(m)) == "native"


@pytest.fixture
def few_rows(hopper: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A library without the kernel for warpgroups: compiled for 9.0 and not for 9.0a."""
    hopper.setattr(_native, "cuda_rows", lambda device: _paths.NATIVE_ROWS)
    return hopper


@pytest.mark.parametrize(
    ("m", "name"), [(1, "native"), (64, "native"), (65, "triton"), (511, "triton"), (512, "native")]
)
def test_native_leaves_to_triton_what_its_tiles_do_faster(m: int, name: str, few_rows: pytest.MonkeyPatch) -> None:
    assert chosen("nf4_linear", arguments(m)) == name


def test_the_reason_is_told(few_rows: pytest.MonkeyPatch) -> None:
    choice = choose("nf4_linear", OPS["nf4_linear"].backends, "cuda", arguments(65))
    assert "native: at M = 65 tiles by Triton are expected to be faster" in str(choice)


@pytest.mark.parametrize(("m", "name"), [(64, "native"), (65, "triton"), (512, "native")])
def test_rows_of_a_weight_that_no_piece_of_16_bytes_fits_are_few(m: int, name: str, hopper: pytest.MonkeyPatch) -> None:
    x, *weight, n, k, block, bias = arguments(m)
    assert chosen("nf4_linear", (x, *weight, n, k - 16, block, bias)) == name


@pytest.mark.parametrize("m", [1, 64, 500, 4000])
def test_where_bits_count_every_number_of_rows_goes_by_triton_s_tiles(m: int, hopper: pytest.MonkeyPatch) -> None:
    with peftrt.batch_invariant():
        choice = choose("nf4_linear", OPS["nf4_linear"].backends, "cuda", arguments(m))
        ways = {_paths.path(direction, on_cuda(m, 256)) for direction in ("forward", "dx", "lora", "lora_dense")}
    assert choice.backend is not None
    assert (choice.backend.name, ways) == ("triton", {TILE})


def test_what_is_forced_is_not_asked_whether_it_is_slower(hopper: pytest.MonkeyPatch) -> None:
    for name in ("native", "triton"):
        with peftrt.backend(name):
            assert {chosen("nf4_linear", arguments(m)) for m in (1, 128, 4096)} == {name}


def test_a_slower_backend_runs_where_no_other_can(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(_triton, "unsupported", lambda x, dtype: "triton is not installed")
    assert chosen("nf4_linear", arguments(128)) == "native"
    hopper.setattr(_native, "cuda_unsupported", lambda x, dtype: "the native CUDA library is not built")
    assert chosen("nf4_linear", arguments(128)) == "reference"


def test_a_weight_that_no_panel_fits_goes_by_tiles(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(_panels, "rows_fit", lambda weight, itemsize: False)
    assert chosen("nf4_linear", arguments(4096)) == "triton"
    assert chosen("nf4_linear", arguments(512)) == "native"
    choice = choose("nf4_linear", OPS["nf4_linear"].backends, "cuda", arguments(513))
    assert "native: takes 512 rows of bf16 or fp16, and more where panels" in str(choice)


def test_fp32_goes_by_panels_or_tiles(hopper: pytest.MonkeyPatch) -> None:
    assert chosen("nf4_linear", arguments(16, torch.float32)) == "triton"
    assert chosen("nf4_linear", arguments(4096, torch.float32)) == "native"


def test_the_input_gradient_is_tritons(hopper: pytest.MonkeyPatch) -> None:
    weight = arguments(8)[1:-1]
    for m in (1, 4096):
        assert chosen("nf4_linear_dx", (on_cuda(m, 512), *weight)) == "triton"


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_lora_linear_is_tritons_and_torchs_where_there_is_none(kind: str, hopper: pytest.MonkeyPatch) -> None:
    m = 65 if kind == "nf4" else 8
    x, *weight, _ = arguments(m)
    if kind == "dense":
        weight[:4] = [on_cuda(WEIGHT.n, WEIGHT.k), None, None, None]
    A, B, xa = on_cuda(4, WEIGHT.k, torch.float32), on_cuda(WEIGHT.n, 4, torch.float32), on_cuda(m, 4, torch.float32)
    adapter, options = (A, B, 2.0), (None, None)
    calls = {
        "lora_linear": (x, *weight, *adapter, None, 0.0, *options, []),
        "lora_linear_backward": (on_cuda(m, WEIGHT.n), x, xa, *weight, *adapter, 0.0, *options, *(True,) * 3, []),
    }
    for name, args in calls.items():
        choice = choose(name, OPS[name].backends, "cuda", args)
        assert choice.backend is not None
        assert choice.backend.name == "triton"
        assert "native: the base's product and torch's pass over y three times" in str(choice)
    assert chosen("lora_weight_norm", (*weight, A, B, 2.0, [])) == "triton"
    hopper.setattr(_triton, "unsupported", lambda x, dtype: "triton is not installed")
    assert {chosen(name, args) for name, args in calls.items()} == {"native"}


def test_decoding_and_quantising_are_native_first(hopper: pytest.MonkeyPatch) -> None:
    _, *weight, n, k, block, _ = arguments(1)
    assert chosen("nf4_dequantize", (*weight, [n, k], block, torch.bfloat16)) == "native"
    assert chosen("nf4_dequantize.out", (*weight, [n, k], block, on_cuda(n, k))) == "native"
    assert chosen("nf4_quantize", (on_cuda(n, k), 64, True)) == "native"


def test_cuda_tensors_go_to_the_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes and quantises, on tensors without memory: which functions are called, with which sizes."""
    calls: list[tuple[str, list[int]]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, [a.numel() for a in args if isinstance(a, Tensor)]))

    monkeypatch.setattr(torch.ops, "peftrt_cuda", Recorder())
    monkeypatch.setattr(torch.ops, "peftrt_cpu", None)
    run = {name: next(b.run for b in OPS[name].backends if b.name == "native") for name in OPS if "quantize" in name}
    _, *weight, n, k, block, _ = arguments(1)
    with FAKE:
        run["nf4_dequantize"](*weight, [n, k], block, torch.bfloat16)
        run["nf4_dequantize.out"](*weight, [n, k], block, torch.empty(n, k, device="cuda"))
        results = run["nf4_quantize"](torch.empty(n, k, device="cuda"), block, True)
    tensors = [512 * 256 // 2, 2048, 4 * 8, 4]
    assert [result.numel() for result in results] == tensors
    assert all(result.device.type == "cuda" for result in results)
    assert calls == [
        ("nf4_dequantize", [*tensors, n * k]),
        ("nf4_dequantize", [*tensors, n * k]),
        ("nf4_quantize", [n * k, tensors[0], 4 * tensors[1]]),
        ("nf4_quantize_scales", [4 * tensors[1], 4, tensors[1], tensors[2]]),
    ]


class Library:
    """``torch.ops.peftrt_cuda`` in plain torch, on CPU tensors, with a note of each call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.nf4_dequantize = self.Function(self, "nf4_dequantize", self._dequantize)
        self.nf4_linear = self.Function(self, "nf4_linear", self._linear)

    class Function:
        def __init__(self, owner: Library, name: str, run: Any) -> None:
            self.owner, self.name, self.default = owner, name, self
            self.run = run

        def __call__(self, *args: Any) -> Any:
            self.owner.calls.append(self.name)
            return self.run(*args)

    @staticmethod
    def _dequantize(*args: Any) -> None:
        *weight, block, out = args
        out.copy_(reference.dequantize(*weight, tuple(out.shape), block, out.dtype))

    @staticmethod
    def _linear(x: Tensor, *rest: Any) -> Tensor:
        with peftrt.backend("reference"):
            return torch.ops.peftrt.nf4_linear(x, *rest)


@pytest.fixture
def library(hopper: pytest.MonkeyPatch) -> Iterator[Library]:
    """CPU tensors take the ways of CUDA ones: the library in Python, the table by the number of rows."""
    made = Library()
    hopper.setattr(torch.ops, "peftrt_cuda", made)
    op = OPS["nf4_linear"]
    native, *others = op.backends
    native = dataclasses.replace(native, run=_nf4_linear._native_cuda, slower=_nf4_linear._cuda_slower)
    hopper.setitem(op.__dict__, "backends", (native, *others))
    hopper.delitem(op.__dict__, "strict", raising=False)
    limits = _paths.TABLE["sm_90"]["forward", 2]
    hopper.setattr(
        _paths,
        "path",
        lambda direction, x, decodes=False: (
            DECODE if decodes and x.shape[0] <= limits.decode else TILE if x.shape[0] <= limits.tile else PANELS
        ),
    )
    yield made
    op.__dict__.pop("strict", None)


def native(*args: Any) -> Tensor:
    backend = next(b for b in OPS["nf4_linear"].backends if b.name == "native")
    result = backend.run(*args)
    assert isinstance(result, Tensor)
    return result


def call(m: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> tuple[Any, ...]:
    weight = nf4(96, 128)
    b = randn(96, seed=3, dtype=dtype) if bias else None
    return (randn(m, 128, seed=2, dtype=dtype), *weight_args("nf4_linear", weight), b)


@pytest.mark.parametrize(
    ("m", "most", "kernel"),
    [
        (3, 512, "nf4_linear"),
        (100, 512, "nf4_linear"),
        (600, 512, "nf4_dequantize"),
        # where it is forced, or Triton is missing
        (100, 64, "nf4_dequantize"),
    ],
)
def test_native_runs_its_kernel_or_panels(
    m: int, most: int, kernel: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "cuda_rows", lambda device: most)
    args = call(m)
    y = native(*args)
    assert set(library.calls) == {kernel}
    with peftrt.backend("reference"):
        assert_close(y, torch.ops.peftrt.nf4_linear(*args))


def test_a_call_goes_straight_to_the_kernel(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the checks and the dispatcher, as on a CPU."""
    op = OPS["nf4_linear"]
    monkeypatch.setattr(_define.Op, "run", lambda *_: pytest.fail("the checks were made"))
    assert op(*call(3)).shape == (3, 96)
    assert op(*call(600)).shape == (600, 96)


def test_a_call_that_triton_does_faster_goes_round(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[str] = []
    monkeypatch.setattr(_native, "cuda_rows", lambda device: _paths.NATIVE_ROWS)
    monkeypatch.setattr(_define.Op, "run", lambda op, device, *args: went.append(device))
    OPS["nf4_linear"](*call(100))
    assert went == ["cpu"]
    assert library.calls == []


def test_on_a_device_that_the_library_is_not_for_nothing_is_launched(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strict backend is tried before it is asked what it cannot take."""
    monkeypatch.setattr(_native, "cuda_unsupported", lambda x, dtype: "is compiled for another capability")
    for m in (3, 600):
        with pytest.raises(RuntimeError, match="nf4_linear: native is compiled for another capability"):
            native(*call(m))
    assert library.calls == []


def test_panels_refuse_what_cublas_would_take(library: Library) -> None:
    x, *rest = call(600)
    bias = rest[-1]
    with pytest.raises(ValueError, match="bias must be"):
        native(x, *rest[:-1], bias[:1])
    with pytest.raises(TypeError, match="bias must be of x's dtype"):
        native(x, *rest[:-1], bias.float())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        native(x, *rest)


def test_panels_take_any_layout(library: Library) -> None:
    x, *weight, bias = call(600, torch.float32)
    expected = native(x, *weight, bias)
    wide = torch.cat([x, x], 1)[:, :128].view(20, 30, 128)
    assert_same_bits(native(wide, *weight, torch.stack([bias, bias], 1)[:, 0]), expected.view(20, 30, 96))


def test_slower_is_heeded_where_nothing_is_forced() -> None:
    """Of any operation: the reason stands among the others."""
    never = Backend("native", lambda x: "native", lambda x: None, ("cpu",), slower=lambda x: f"slow at {x}")
    other = Backend("reference", lambda x: "reference", lambda x: None, ("cpu",))
    assert str(choose("op", (never, other), "cpu", (3,))) == "op: reference (not native: slow at 3)"
    with peftrt.backend("native"):
        assert str(choose("op", (never, other), "cpu", (3,))) == "op: native"
    alone = choose("op", (never,), "cpu", (3,))
    assert alone.backend is None, "`slower` answers only where another backend can take the call"


def test_weight_arguments_are_seven() -> None:
    """What the paths read of a call: the weight's arguments stand behind x."""
    assert len(WeightArgs._fields) == 7
    schema = torch.ops.peftrt.nf4_linear.default._schema
    assert [a.name for a in schema.arguments][1:8] == list(WeightArgs._fields)
