"""What ends a command early: the user's mistakes, and the user's wish."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something that the user can put right; the command prints it as one line and exits with status 2."""


class RunError(Exception):
    """The run itself failed (the loss is NaN, the disk is full); printed as one line, exit status 1."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The user stopped the run.

    Attributes:
        resume: the command that goes on from here, or None where there is nothing to go on from.
        status: the exit status, 128 + the signal's number.
    """

    def __init__(self, message: str, resume: str | None = None, status: int = 130) -> None:
        super().__init__(message)
        self.resume = resume
        self.status = status


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency; where it is missing, say in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise UserError(f"{purpose} needs {package}, which is not installed: pip install 'peftrt[{extra}]'") from None
