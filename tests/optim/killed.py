"""A training that is killed again and again, for test_killed: ``python killed.py DIRECTORY SEED``.

Each life is a fork of this process, which itself only imports. It trains on from the checkpoint, saves at every other
step, and ends by SIGKILL: half of them send it to themselves at a counted call on the way of a page or of a checkpoint,
half get it at some time. Another one then finishes, and one that nothing disturbs does it all.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftrt.formats import _files, stream
from peftrt.formats.safe import TensorReader
from peftrt.optim import PagedAdamW
from peftrt.optim.stores import FileStore

LIVES = 20
# Calls in which a life ends, and how many of the kind there may be before: of each, some are met in the first save.
MOMENTS = (("put", 40), ("fsync", 6), ("replace", 3), ("replaced", 3), ("read", 60), ("write", 60), ("page", 30))
CHECKPOINT = "checkpoint.safetensors"


def made(directory: Path) -> tuple[nn.Module, PagedAdamW]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 8))
    optimizer = PagedAdamW(
        model.named_parameters(),
        lr=1e-2,
        bits=8,
        min_8bit_size=1024,
        page_size=4096,
        device_budget="24KiB",
        backing=directory,
        max_grad_norm=0.5,
    )
    assert optimizer.stats().resident < optimizer.stats().pages
    return model, optimizer


def train(directory: Path, checkpoint: Path, last: int | None = None, every: int | None = 2) -> None:
    """From the checkpoint, where there is one, to step ``last``, and save there; without it, on and on."""
    model, optimizer = made(directory)
    named = dict(model.named_parameters())
    if checkpoint.exists():
        for name, tensor in optimizer.load(checkpoint).items():
            named[name].data.copy_(tensor)
    step = int(optimizer.steps.max())
    while step != last:
        step += 1
        data = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 48, generator=data), torch.randn(16, 8, generator=data)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 / step**0.5
        optimizer.step()
        if step == last or (every is not None and step % every == 0):
            optimizer.save(checkpoint, extra=named)


def fork(run: Callable[[], None]) -> int:
    """The id of a process that does nothing else."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(moment: str, count: int) -> None:
    """Let this process kill itself at the call of that number."""
    left = [count]

    def counted(call: Callable[..., Any], before: bool = True) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if before and left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    class Half:
        """A file of which the last write is cut short."""

        def __init__(self, path: str, mode: str) -> None:
            self.file = open(path, mode, buffering=0)  # noqa: SIM115

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, data: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                self.file.write(bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            self.file.write(data)

    places: dict[str, tuple[Any, str, Any]] = {
        "put": (stream, "open", Half),
        "fsync": (os, "fsync", counted(os.fsync)),
        "replace": (os, "replace", counted(os.replace)),
        "replaced": (_files, "sync_directory", counted(_files.sync_directory)),
        "read": (FileStore, "read", counted(FileStore.read)),
        "write": (FileStore, "write", counted(FileStore.write, before=False)),
        "page": (PagedAdamW, "read_page", counted(PagedAdamW.read_page)),
    }
    setattr(*places[moment])


def main() -> None:
    directory, draw = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    checkpoint, whole = directory / CHECKPOINT, directory / "whole.safetensors"
    torch.set_num_threads(1)
    # What torch imports with its first optimizer takes longer than a life.
    torch.optim.SGD([torch.zeros(1)])
    lives: list[str] = []
    for life in range(LIVES):
        if life % 2:
            pid = fork(lambda: train(directory, checkpoint))
            time.sleep(draw.uniform(0.02, 0.3))
            os.kill(pid, signal.SIGKILL)
            lives.append("some time")
        else:
            name, most = MOMENTS[life // 2 % len(MOMENTS)]
            count = draw.randrange(most)
            pid = fork(lambda name=name, count=count: (die_at(name, count), train(directory, checkpoint)))
            lives.append(f"{name} {count}")
        code = ended(pid)
        if code != -signal.SIGKILL:
            sys.exit(f"life {life} ({lives[-1]}) ended by itself, with {code}")
    steps = 0
    if checkpoint.exists():
        with TensorReader(checkpoint) as reader:
            steps = max(json.loads(reader.metadata["steps"]))
    for path, every in ((checkpoint, 2), (whole, None)):
        code = ended(fork(lambda path=path, every=every: train(directory, path, steps + 5, every)))
        if code:
            sys.exit(f"{path}: ended with {code}")
    print(json.dumps({"steps": steps, "lives": lives}))


if __name__ == "__main__":
    main()
