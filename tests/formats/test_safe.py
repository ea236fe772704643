"""Bad safetensors files are refused before they cost anything; good ones come back bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from peftrt.formats import header as file_header
from peftrt.formats import safe
from peftrt.formats.errors import AdapterNameError, FormatError, MissingFileError, NonFiniteError, UnsafeFileError
from peftrt.formats.header import DTYPES
from peftrt.formats.safe import TensorReader, read_tensors, write_tensors


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def sample() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.randn(4, 5).to(torch.bfloat16),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.zeros(0, 7),
        "ints": torch.tensor([-(2**40), 7]),
        "flags": torch.tensor([True, False, True]),
    }


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name], tensor))
        assert torch.equal(*flat), name


def test_round_trip_with_safetensors_itself(tmp_path: Path) -> None:
    tensors = sample()
    write_tensors(tmp_path / "ours.safetensors", tensors, {"format": "pt", "k": "v"})
    assert_same(safetensors.torch.load_file(tmp_path / "ours.safetensors"), tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"x": "y"})
    assert_same(read_tensors(tmp_path / "theirs.safetensors"), tensors)
    with TensorReader(tmp_path / "ours.safetensors") as reader:
        assert reader.metadata == {"format": "pt", "k": "v"}
        assert_same({name: reader.read(name) for name in reader.entries}, tensors)
        with pytest.raises(KeyError):
            reader.read("absent")


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_round_trips(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    values = torch.tensor([0.0, 1.0, 0.5, 3.0, 0.0, 1.0])
    tensor = (values > 0).view(2, 3) if dtype is torch.bool else values.to(dtype).view(2, 3)
    write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    assert_same(read_tensors(tmp_path / "x.safetensors"), {"x": tensor})


def test_views_shared_memory_and_strides_are_written_as_values(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"t": base.t(), "same": base, "slice": base[1:3, ::2], "param": torch.nn.Parameter(base)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert_same(read_tensors(tmp_path / "x.safetensors"), {key: value.detach() for key, value in tensors.items()})


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "shape_product_overflow": ({"w": entry(0, 0, [2**32, 2**32], "F32")}, b"", "'w'"),
    "negative_dimension": ({"w": entry(0, 4, [-4])}, b"1234", "'w'"),
    "two_negative_dimensions": ({"w": entry(0, 4, [-2, -2])}, b"1234", "'w'"),
    "zero_times_two_to_the_62": ({"w": entry(0, 0, [0, 2**62])}, b"", "'w'"),
    "too_many_dimensions": ({"w": entry(0, 1, [1] * 17)}, b"1", "'w'"),
    "overlapping_offsets": ({"a": entry(0, 4), "w": entry(2, 6)}, b"123456", "'w'"),
    "same_bytes_twice": ({"a": entry(0, 4), "w": entry(0, 4)}, b"1234", "overlaps"),
    "hole_between_tensors": ({"a": entry(0, 2), "w": entry(4, 6)}, b"123456", "'w'"),
    "hole_at_the_start": ({"w": entry(2, 4)}, b"1234", "'w'"),
    "trailing_bytes": ({"w": entry(0, 4)}, b"12345", "trailing"),
    "data_cut_short": ({"w": entry(0, 4)}, b"123", "truncated"),
    "offsets_reversed": ({"w": entry(4, 0, [4])}, b"1234", "'w'"),
    "offsets_beyond_64_bits": ({"w": entry(2**70, 2**70 + 4, [4])}, b"1234", "'w'"),
    "offsets_negative": ({"w": entry(-4, 0, [4])}, b"1234", "'w'"),
    "offsets_do_not_fit_shape": ({"w": entry(0, 4, [3])}, b"1234", "'w'"),
    "dimension_is_a_float": ({"w": entry(0, 4, [4.0])}, b"1234", "'w'"),
    "dimension_is_true": ({"w": entry(0, 1, [True])}, b"1", "'w'"),
    "dimension_is_a_string": ({"w": entry(0, 4, ["4"])}, b"1234", "'w'"),
    "shape_missing": ({"w": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234", "'w'"),
    "unknown_key_in_tensor": ({"w": {**entry(0, 4), "code": "x"}}, b"1234", "code"),
    "tensor_is_a_list": ({"w": [1, 2]}, b"", "'w'"),
    "unknown_dtype": ({"w": entry(0, 4, dtype="F31")}, b"1234", "F31"),
    "dtype_is_a_list": ({"w": entry(0, 4, dtype=["F32"])}, b"1234", "'w'"),
    "metadata_not_strings": ({"__metadata__": {"k": 1}}, b"", "'k'"),
    "metadata_not_an_object": ({"__metadata__": [1]}, b"", "__metadata__"),
    "header_is_a_list": ([1, 2], b"", "list"),
    "duplicate_tensor_key": (
        b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b"1234",
        "'w'",
    ),
    "duplicate_key_by_escape": (
        b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"\\u0077":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        b"1234",
        "'w'",
    ),
    "duplicate_metadata_key": (b'{"__metadata__":{"k":"1","k":"2"}}', b"", "'k'"),
    "duplicate_field_of_a_tensor": (
        b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
        "dtype",
    ),
    "deeply_nested_json": (b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}", b"", "nested"),
    "nested_100_deep": (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", b"", "nested"),
    "not_json": (b"{hello", b"", "not valid JSON"),
    "nan_in_header": (b'{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1", "NaN"),
    "number_beyond_float": (b'{"w":{"dtype":"U8","shape":[1e400],"data_offsets":[0,1]}}', b"1", "1e400"),
    "number_of_5000_digits": (
        b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        b"1",
        "digits",
    ),
    "not_utf8": (b'{"\xff":{}}', b"", "UTF-8"),
    "lone_surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "surrogate"),
    "utf16_header": ("{}".encode("utf-16"), b"", "UTF-8"),
    "empty_header": (b"", b"", "not valid JSON"),
    "json_bomb": (b"[" + b"{}," * 1_500_000 + b"{}]", b"", "pieces"),
    "bool_byte_of_two": ({"w": entry(0, 2, dtype="BOOL")}, b"\x01\x02", "'w'"),
}


@pytest.mark.parametrize("fault", sorted(HEADERS))
def test_bad_header(tmp_path: Path, fault: str) -> None:
    header, data, culprit = HEADERS[fault]
    path = raw_file(tmp_path / "adapter.safetensors", header, data)
    before = path.read_bytes()
    with pytest.raises(FormatError) as caught:
        read_tensors(path)
    assert culprit in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert path.read_bytes() == before


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 1000])
def test_header_length_past_the_end(tmp_path: Path, length: int) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"w": entry(0, 1)}, b"1", length=length)
    with pytest.raises(FormatError, match=f"header of {length} bytes"):
        read_tensors(path)


def test_header_over_the_cap_is_not_read(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", b"", length=64 << 20)
    os.truncate(path, 128 << 20)
    with pytest.raises(FormatError, match="header of 67108864 bytes, at most"):
        read_tensors(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_file_shorter_than_the_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x01" * size)
    with pytest.raises(FormatError, match=f"{size} bytes"):
        read_tensors(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "good.safetensors", {"a": torch.randn(3), "b": torch.ones(2)})
    whole = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="cut"):
            read_tensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="trailing"):
        read_tensors(path)


def test_200_000_tensors_are_refused_before_any_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = {f"t{i}": entry(i, i + 1) for i in range(200_000)}
    path = raw_file(tmp_path / "x.safetensors", header, bytes(200_000))
    # Not even the JSON is parsed.
    monkeypatch.setattr(file_header, "loads_strict", lambda *args: pytest.fail("parsed"))
    with pytest.raises(FormatError, match=r"x\.safetensors: holds 200000 tensors, at most 65536"):
        read_tensors(path)


def test_the_cap_on_tensors_counts_those_with_escaped_keys(tmp_path: Path) -> None:
    tensors = ",".join(f'"t{i}":{{"dtype":"U8","shape":[],"data_\\u006fffsets":[{i},{i + 1}]}}' for i in range(20))
    path = raw_file(tmp_path / "x.safetensors", f"{{{tensors}}}".encode(), bytes(20))
    assert len(read_tensors(path)) == 20
    with pytest.raises(FormatError, match="holds 20 tensors, at most 10"):
        read_tensors(path, max_tensors=10)


def test_a_huge_sparse_file_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"w": entry(0, 2**40)})
    os.truncate(path, path.stat().st_size + 2**40)
    with pytest.raises(FormatError, match="1099511627776 bytes"):
        read_tensors(path)
    two = {"a": entry(0, 600), "b": entry(600, 1200)}
    raw_file(tmp_path / "y.safetensors", two, bytes(1200))
    with pytest.raises(FormatError, match="1200 bytes of tensors, at most 1000"):
        read_tensors(tmp_path / "y.safetensors", max_bytes=1000)


class Bomb:
    """Unpickling this makes a file: proof that something was opened that must not be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "w.pt", "w.PTH", "w.ckpt", "w.pkl"])
def test_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "fired")))
    path.chmod(0)
    with pytest.raises(UnsafeFileError, match=r"save_file\(torch\.load") as caught:
        read_tensors(path)
    assert name in str(caught.value)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("protocol", [2, 5, "zip", "legacy"])
def test_pickle_renamed_to_safetensors(tmp_path: Path, protocol: int | str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps({"x": Bomb(tmp_path / "fired"), "y": "z" * 50}, protocol=protocol))
    else:
        torch.save({"x": torch.ones(3)}, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(UnsafeFileError, match="pickle") as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_nan_and_infinity(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"ok": torch.ones(3), "w": torch.tensor([[1.0, bad], [2.0, 3.0]]).to(dtype)}
    write_tensors(path, tensors)
    with pytest.raises(NonFiniteError, match="'w'"):
        read_tensors(path)
    assert_same(read_tensors(path, allow_nonfinite=True), tensors)


def test_nan_at_the_end_of_a_tensor_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe, "_CHECK_CHUNK", 7)
    tensor = torch.ones(50)
    assert safe.is_finite(tensor)
    tensor[-1] = float("nan")
    assert not safe.is_finite(tensor)
    assert not safe.is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("keep", [0, 100, 50_000])
def test_file_truncated_after_it_was_opened(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(10_000), "b": torch.ones(10_000)})
    with TensorReader(path) as reader:
        os.truncate(path, keep)
        with pytest.raises(FormatError, match=r"x\.safetensors"):
            reader.read("b")


def test_file_rewritten_in_place_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(10), "b": torch.ones(10)})
    with TensorReader(path) as reader:
        assert reader.read("a").sum() == 10
        with open(path, "r+b") as file:
            file.seek(-40, os.SEEK_END)
            file.write(bytes(40))
        os.utime(path, ns=(1, 1))
        with pytest.raises(FormatError, match="changed while it was read"):
            reader.read("b")


def test_file_replaced_while_it_loads_gives_one_of_the_two(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    versions = [{f"t{i}": torch.full((64,), float(v)) for i in range(8)} for v in range(2)]
    write_tensors(path, versions[0])
    stop = threading.Event()

    def replace() -> None:
        turn = 0
        while not stop.is_set():
            turn ^= 1
            write_tensors(path, versions[turn])

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(60):
            got = read_tensors(path)
            assert len({float(value) for tensor in got.values() for value in tensor}) == 1
    finally:
        stop.set()
        thread.join()
    with TensorReader(path) as reader:
        old = float(reader.read("t0")[0])
        write_tensors(path, versions[1 - int(old)])
        assert float(reader.read("t7")[0]) == old


def test_fifo_device_directory_and_socket_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.safetensors"))
        for name, kind in (
            ("fifo", "a FIFO"),
            ("dir", "a directory"),
            ("device", "a character device"),
            ("socket", "a socket"),
        ):
            with pytest.raises(FormatError, match=kind) as caught:
                read_tensors(tmp_path / f"{name}.safetensors")
            assert f"{name}.safetensors" in str(caught.value)


def test_missing_file_and_loop_of_links(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"gone\.safetensors"):
        read_tensors(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "gone.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(FormatError, match=r"loop\.safetensors"):
        read_tensors(tmp_path / "loop.safetensors")
    with pytest.raises(FormatError, match="NUL"):
        read_tensors("a\0b.safetensors")


def test_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    write_tensors(outside / "x.safetensors", {"a": torch.ones(1)})
    write_tensors(root / "blob.safetensors", {"a": torch.ones(1)})
    (root / "bad.safetensors").symlink_to(outside / "x.safetensors")
    (root / "good.safetensors").symlink_to("blob.safetensors")
    with pytest.raises(AdapterNameError, match=r"bad\.safetensors"):
        read_tensors(root / "bad.safetensors", root=root)
    assert_same(read_tensors(root / "bad.safetensors"), {"a": torch.ones(1)})
    assert_same(read_tensors(root / "good.safetensors", root=root), {"a": torch.ones(1)})


def test_descriptor_is_closed_after_every_error(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"w": entry(0, 4, dtype="F31")}, b"1234")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(FormatError, match="F31"):
            read_tensors(path)
    assert len(os.listdir("/proc/self/fd")) == before
