"""Checkpoints: one safetensors file, replaced whole, beside a description of the run that it belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.finetune.errors import UserError
from peftrt.formats.errors import FormatError
from peftrt.formats.safe import read_tensors, write_tensors

CHECKPOINT = "checkpoint.safetensors"
RUN = "run.json"


def write_checkpoint(directory: Path, state: dict[str, Tensor]) -> None:
    """Replace the directory's checkpoint; whatever happens meanwhile, the old one or the new one is there, whole."""
    write_tensors(directory / CHECKPOINT, state)


def read_checkpoint(directory: Path) -> dict[str, Tensor] | None:
    """The directory's checkpoint, or None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    try:
        return read_tensors(path)
    except FormatError as error:
        raise UserError(f"the checkpoint cannot be read: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def fresh_directory(out: Path, mark: str) -> Iterator[Path]:
    """A directory beside ``out`` that takes its place when the block ends well, and is removed when it does not.

    Args:
        out: new, empty, or holding the file ``mark`` of a former run, which is then replaced.
        mark: a file that the block writes.

    Raises:
        UserError: ``out`` is something else; nothing is touched.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).is_file():
        raise UserError(f"--out: {out} is not empty, and no former run's ({mark} is missing): nothing was removed")
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield directory
        directory.chmod(0o777 & ~_umask())
        if out.exists():
            old = directory.with_name(directory.name + "-old")
            out.rename(old)
            directory.rename(out)
            shutil.rmtree(old)
        else:
            directory.rename(out)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_run(directory: Path) -> dict[str, Any]:
    """The description of the run in a directory.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = directory / RUN
    if not path.is_file():
        raise UserError(f"--resume: no run in {directory} ({RUN} is missing)")
    try:
        run = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged: {error}") from None
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise UserError(f"--resume: {path} is damaged: expected an object with 'settings'")
    return run


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_digest(model: nn.Module) -> str:
    """SHA-256 over the ends of every frozen parameter: enough to tell one base model from another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            ends = torch.cat([flat[:256], flat[-256:]]).cpu().contiguous()
            digest.update(f"{name}{list(parameter.shape)}".encode() + ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Interrupts:
    """The first Ctrl-C (or SIGTERM) is only remembered, and the second one ends the process as usual.

    Attributes:
        caught: the signal that came, or None.
    """

    caught: signal.Signals | None = None

    @contextlib.contextmanager
    def remembered(self) -> Iterator[Interrupts]:
        """Remember signals inside; the former handlers are put back after."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def remember(number: int, frame: FrameType | None) -> None:
            self.caught = signal.Signals(number)
            os.write(2, b"\nstopping after this step (once more: at once)\n")
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, remember)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
