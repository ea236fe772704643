"""save and load: streamed, checked whole before anything changes, and whole or not at all on the disk."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from peftrt.formats import safe, stream
from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.safe import TensorReader, write_tensors
from peftrt.optim import PagedAdamW, PoisonedError, state
from peftrt.optim.state import to_fp32
from peftrt.optim.stores import FileStore
from tests.optim.conftest import NAME
from tests.optim.stateful import PAGE, bits_of, everything, make, named, parameters, train


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("options", [{}, {"page_size": 4 * PAGE}, {"device_budget": "48KiB"}], ids=str)
def test_loaded_under_another_budget_it_is_the_same_bits(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    source = make(bits=bits)
    source.save(tmp_path / NAME, extra=named(source))
    other = make(bits=bits, steps=0, **options)
    assert (other.stats().resident < other.stats().pages) == ("device_budget" in options)
    extra = other.load(tmp_path / NAME)
    assert bits_of(extra) == bits_of(named(source))
    for number, parameter in enumerate(other.parameters):
        parameter.data.copy_(extra[str(number)])
    assert bits_of(other.state_dict()) == bits_of(source.state_dict())
    for optimizer in (source, other):
        train(list(optimizer.parameters), optimizer, range(3, 5), idle=None)
    assert bits_of(list(other.parameters)) == bits_of(list(source.parameters))
    assert bits_of(other.state_dict()) == bits_of(source.state_dict())


@pytest.mark.parametrize(("there", "here"), [(32, 8), (8, 32)])
def test_loaded_with_other_bits_it_is_what_load_state_dict_makes(tmp_path: Path, there: int, here: int) -> None:
    source, one, two = make(bits=there), make(bits=here, steps=0), make(bits=here, steps=0)
    source.save(tmp_path / NAME)
    assert one.load(tmp_path / NAME) == {}
    two.load_state_dict(source.state_dict())
    assert everything(one) == everything(two)
    if here == 32:
        assert bits_of(one.state_dict()) == bits_of(to_fp32(source.state_dict()))


def test_what_is_in_the_file(tmp_path: Path) -> None:
    optimizer = make(bits=8)
    optimizer.save(tmp_path / NAME, extra={"w": torch.arange(3), "empty": torch.zeros(0, 2, dtype=torch.bfloat16)})
    found = safetensors.torch.load_file(tmp_path / NAME)
    state = optimizer.state_dict()["state"]
    expected = {
        f"state.{n}.{key}": value for n, entry in state.items() for key, value in entry.items() if key != "step"
    }
    digest = torch.tensor(list(hashlib.sha256((tmp_path / NAME).read_bytes()[:-32]).digest()), dtype=torch.uint8)
    more = {"extra.w": torch.arange(3), "extra.empty": torch.zeros(0, 2, dtype=torch.bfloat16), "sha256": digest}
    assert bits_of(found) == bits_of(expected | more)
    with TensorReader(tmp_path / NAME) as reader:
        assert json.loads(reader.metadata["steps"]) == optimizer.steps.tolist()
        assert [group["lr"] for group in json.loads(reader.metadata["param_groups"])] == [1e-2, 1e-3]


def test_an_interrupted_schedule_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    optimizer = make(steps=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=7)
    train(list(optimizer.parameters), optimizer, range(1))
    schedule.step()
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1)
    optimizer.param_groups[0].update(name="first", tags=["a", None, True])
    optimizer.save(tmp_path / NAME)
    other = make(steps=0)
    other.load(tmp_path / NAME)
    first, second = other.param_groups
    assert (first["name"], first["tags"], first["betas"]) == ("first", ["a", None, True], (0.9, 0.999))
    assert (first["lr"], first["initial_lr"]) == (optimizer.param_groups[0]["lr"], 1e-2)
    assert second["lr"] == torch.tensor(0.1).item()
    optimizer.param_groups[0]["what"] = object()
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        optimizer.save(tmp_path / NAME)
    optimizer.param_groups[0]["what"] = float("nan")
    with pytest.raises(FormatError, match="cannot be written as JSON"):
        optimizer.save(tmp_path / NAME)


def test_moments_that_are_not_finite_come_back(tmp_path: Path) -> None:
    optimizer = make()
    optimizer.parameters[0].grad[3] = float("nan")
    optimizer.parameters[0].grad[4] = float("inf")
    optimizer.step()
    optimizer.save(tmp_path / NAME, extra=named(optimizer))
    other = make(steps=0)
    extra = other.load(tmp_path / NAME)
    assert extra["0"].isnan().any()
    assert bits_of(other.state_dict()) == bits_of(optimizer.state_dict())


def test_no_more_than_a_parameters_moments_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(shapes=[(20000,), (30000,), (10000,)])
    optimizer = PagedAdamW(params, page_size=PAGE)
    train(params, optimizer, range(1))
    given: list[weakref.ref[Tensor]] = []
    empty = state._empty

    def counted(size: int, bits: int) -> Any:
        assert all(tensor() is None for tensor in given)
        made = empty(size, bits)
        given.extend(weakref.ref(part) for part in made[:2])
        return made

    monkeypatch.setattr(state, "_empty", counted)
    optimizer.save(tmp_path / NAME)
    assert len(given) == 6
    held: list[int] = []
    monkeypatch.setattr(TensorReader, "read_range", watched(TensorReader.read_range, held))
    optimizer.load(tmp_path / NAME)
    assert max(held) * 8 <= PAGE
    assert sum(held) == 2 * 60000


def watched(method: Any, held: list[int]) -> Any:
    def read(self: TensorReader, name: str, first: int, count: int) -> Tensor:
        held.append(count)
        return method(self, name, first, count)

    return read


def test_directories_links_and_names(tmp_path: Path, saved: Path) -> None:
    optimizer = make(bits=8, steps=1)
    (tmp_path / "directory").mkdir()
    with pytest.raises(FormatError, match="a directory"):
        optimizer.save(tmp_path / "directory")
    with pytest.raises(FormatError, match="a directory"):
        optimizer.load(tmp_path / "directory")
    with pytest.raises(MissingFileError):
        optimizer.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        optimizer.save(tmp_path / "nowhere" / NAME)
    with pytest.raises(FormatError, match=r"expected \.safetensors"):
        optimizer.save(tmp_path / "state.pt")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FormatError, match="a FIFO"):
        optimizer.load(tmp_path / "fifo")
    link, before = tmp_path / "latest", saved.read_bytes()
    link.symlink_to(saved)
    optimizer.load(link)
    train(list(optimizer.parameters), optimizer, range(1))
    optimizer.save(link)
    assert not link.is_symlink()
    assert saved.read_bytes() == before
    assert bits_of(optimizer.load(link)) == {}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FormatError, match="cannot be opened"):
        optimizer.load(tmp_path / "loop")


def test_extra_that_cannot_be_written_leaves_the_old_file(saved: Path) -> None:
    optimizer, before = make(), saved.read_bytes()
    for extra in ({"a": [1]}, {3: torch.ones(1)}):
        with pytest.raises(TypeError, match="extra must map str to Tensor"):
            optimizer.save(saved, extra=extra)  # type: ignore[arg-type]
    for tensor in (torch.eye(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(FormatError):
            optimizer.save(saved, extra={"a": tensor})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [NAME]


def test_a_full_disk_leaves_the_old_file(saved: Path) -> None:
    optimizer, before = make(), saved.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 4096, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                optimizer.save(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert caught.value.errno == errno.EFBIG
        assert saved.read_bytes() == before
        assert os.listdir(saved.parent) == [NAME]
    optimizer.save(saved)
    assert saved.read_bytes() != before


@contextmanager
def failing(patch: pytest.MonkeyPatch, what: str, code: int, after: int) -> Iterator[None]:
    """Inside, the calls of ``what`` from number ``after`` on raise OSError."""
    error = OSError(code, os.strerror(code))
    calls = iter(range(1 << 30))

    def checked(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= after:
                raise error
            return call(*args, **kwargs)

        return run

    class Writer:
        def __init__(self, *args: Any) -> None:
            self.file = builtins.open(*args)  # noqa: SIM115
            self.write = checked(self.file.write)

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

    with patch.context() as one:
        if what == "write":
            one.setattr(stream, "open", Writer, raising=False)
        elif what == "read_page":
            one.setattr(PagedAdamW, what, checked(PagedAdamW.read_page))
        else:
            one.setattr(os, what, checked(getattr(os, what)))
        yield


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("what", "after"), [("write", 0), ("write", 1), ("write", 9), ("read_page", 5), ("fsync", 0), ("replace", 0)]
)
def test_an_error_of_the_disk_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, code: int, what: str, after: int
) -> None:
    optimizer, before = make(), saved.read_bytes()
    state = everything(optimizer)
    with failing(monkeypatch, what, code, after), pytest.raises(OSError, match=os.strerror(code)):
        optimizer.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [NAME]
    assert everything(optimizer) == state


@pytest.mark.parametrize("way", ["load", "load_state_dict"])
def test_where_the_backing_fails_the_optimizer_is_of_no_use_until_the_next_load(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    source = make(bits=8)
    optimizer = make(bits=8, steps=1, device_budget="48KiB", backing=tmp_path / "backing")
    load = getattr(optimizer, way)
    what = saved if way == "load" else source.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "write", refusing)
        with pytest.raises(OSError, match="Input/output error"):
            load(what)
    for use in (optimizer.step, optimizer.state_dict, lambda: optimizer.save(tmp_path / "other")):
        with pytest.raises(PoisonedError, match="loading a state was not finished"):
            use()
    assert set(os.listdir(tmp_path)) <= {NAME, "backing"}
    load(what)
    assert bits_of(optimizer.state_dict()) == bits_of(source.state_dict())
    optimizer.step()


def refusing(*args: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_fork_neither_saves_nor_loads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, other = make(bits=8), saved.parent / "other"
    state = optimizer.state_dict()
    before = everything(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_process", -1)
        for use in (
            optimizer.state_dict,
            lambda: optimizer.save(other),
            lambda: optimizer.load(saved),
            lambda: optimizer.load_state_dict(state),
        ):
            with pytest.raises(RuntimeError, match="in its fork"):
                use()
    assert everything(optimizer) == before
    assert not other.exists()


def test_a_file_that_changes_while_it_is_read_is_an_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(bits=8, steps=1)
    before = everything(optimizer)
    verify = safe.RegularFile.verify_unchanged

    def meddled(self: Any) -> None:
        os.utime(saved, ns=(1, 1))
        verify(self)

    monkeypatch.setattr(safe.RegularFile, "verify_unchanged", meddled)
    with pytest.raises(FormatError, match="changed while it was read"):
        optimizer.load(saved)
    assert everything(optimizer) == before


def test_a_file_replaced_while_it_is_read_is_the_old_one_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(bits=8)
    optimizer = make(bits=8, steps=0)
    write = PagedAdamW.write_page

    def meddled(self: PagedAdamW, page: int, data: Tensor) -> None:
        if page == 2:
            write_tensors(saved, {"a": torch.ones(1)})
        write(self, page, data)

    monkeypatch.setattr(PagedAdamW, "write_page", meddled)
    optimizer.load(saved)
    assert bits_of(optimizer.state_dict()) == bits_of(expected.state_dict())


def test_a_header_that_could_not_be_read_again_is_not_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(stream, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(FormatError, match=r"a header of \d+ bytes"):
        make().save(saved)
    assert saved.read_bytes() == before


def test_many_tensors_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftrt.optim.checkpoint.MAX_TENSORS", 4)
    params = [nn.Parameter(torch.ones(1)) for _ in range(50)]
    optimizer = PagedAdamW(params, page_size=PAGE)
    train(params, optimizer, range(1))
    more = {str(number): torch.ones(1) for number in range(4)}
    with pytest.raises(FormatError, match="fewer than 4"):
        optimizer.save(tmp_path / NAME, extra=more)
    del more["0"]
    optimizer.save(tmp_path / NAME, extra=more)
    assert optimizer.load(tmp_path / NAME).keys() == more.keys()
