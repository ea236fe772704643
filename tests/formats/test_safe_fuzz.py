"""Random damage to a safetensors file: an error, or every byte of data accounted for; never a crash."""

from __future__ import annotations

import struct
import tempfile

import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftrt.formats.errors import FormatError
from peftrt.formats.safe import TensorReader, read_tensors


@given(st.data())
def test_flipped_bytes_give_equal_tensors_or_an_error(data: st.DataObject) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.arange(6, dtype=torch.int16).reshape(2, 3)}
    whole = bytearray(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    payload = len(whole) - 28
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, payload - 1))
        whole[position] = data.draw(st.integers(0, 255))
    check_fuzzed(bytes(whole), whole[payload:])


@given(st.binary(max_size=200))
def test_random_bytes_never_crash(blob: bytes) -> None:
    check_fuzzed(struct.pack("<Q", len(blob)) + blob, bytearray())
    check_fuzzed(blob, bytearray())


def check_fuzzed(whole: bytes, payload: bytearray) -> None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(whole)
        file.flush()
        refusal, got = None, {}
        try:
            got = read_tensors(file.name, allow_nonfinite=True)
        except FormatError as error:
            refusal = str(error)
        if refusal is not None:
            assert file.name in refusal
            return
        # What was accepted accounts for each byte of data once, in order.
        with TensorReader(file.name, allow_nonfinite=True) as reader:
            order = list(reader.entries)
        read = b"".join(bytes(got[name].reshape(-1).view(torch.uint8).numpy()) for name in order)
        assert read == bytes(payload)
