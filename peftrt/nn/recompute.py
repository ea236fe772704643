"""The routing of a forward, found again in its backward, where checkpointed layers run a second time.

``torch.utils.checkpoint`` calls a layer again during the backward, when the ``with rows(...)`` block around its forward
has ended. Nothing is hung on the graph for that: autograd numbers the nodes that a thread makes, so the span of numbers
that a block covered tells, of the node that runs now, in which block it was made. A block in which no node was made, as
in serving, leaves nothing behind.

Numbers are a thread's own. On a CPU a backward runs in the thread that called it, which is usually that of the forward;
for a CUDA device it runs in a thread of torch's, where all threads' blocks are looked through. What could be of two
threads is an error; threads that serve while another trains should do so under ``torch.no_grad()``.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import torch

# Blocks kept for each thread. A graph that outlives so many later blocks cannot be told: an error, not silence.
MAX_SPANS = 4096
_MAX_ENDED_THREADS = 64

Names = tuple[str | None, ...]


class ForwardOnly(tuple[str | None, ...]):
    """Names of a block whose layers cannot be run again."""


class Span:
    """The autograd nodes ``first <= number < end`` of a thread were made under ``names``; in the block, end is None."""

    def __init__(self, owner: Any, names: Names, first: int) -> None:
        self.owner = weakref.ref(owner)
        self.names = names
        self.first = first
        self.end: int | None = None

    def holds(self, owner: Any, node: int) -> bool:
        """Whether the node was made in this block, for layers of ``owner``."""
        return self.first <= node and (self.end is None or node < self.end) and self.owner() is owner


class _Spans:
    """The blocks of one thread, in the order in which they began."""

    def __init__(self) -> None:
        self.spans: deque[Span] = deque()
        self.forgotten = 0

    def add(self, span: Span) -> None:
        self.spans.append(span)
        while len(self.spans) > MAX_SPANS:
            self.forgotten = max(self.forgotten, self.spans.popleft().end or 0)

    def find(self, owner: Any, node: int) -> Span | None:
        # From the end: of nested blocks, the inner one began last.
        return next((span for span in reversed(self.spans) if span.holds(owner, node)), None)


class _Task:
    """A backward in progress, and the blocks found for the node that ran last in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.names: dict[int, Names | None] = {}

    def __call__(self) -> None:
        """What the engine is told to call in the end: it only has to hold this object as long as the backward lasts."""


class _Local(threading.local):
    def __init__(self) -> None:
        self.spans: _Spans | None = None
        self.task: weakref.ref[_Task] | None = None


_local = _Local()
_threads: weakref.WeakSet[_Spans] = weakref.WeakSet()
# A backward may run after the thread of its forward has ended.
_ended: deque[_Spans] = deque(maxlen=_MAX_ENDED_THREADS)


def backward_number() -> int:
    """The number of the backward that this thread is in the middle of; -1 outside of one."""
    return torch._C._current_graph_task_id()


def begin(owner: Any, names: Names) -> Span:
    """Note that this thread runs the owner's layers under ``names`` from now on."""
    if _local.spans is None:
        _local.spans = _Spans()
    if torch.is_grad_enabled() and _local.spans not in _threads:
        _threads.add(_local.spans)
        _ended.append(_local.spans)
    span = Span(owner, names, torch.autograd._get_sequence_nr())
    _local.spans.add(span)
    return span


def end(span: Span) -> None:
    """The block is over."""
    span.end = torch.autograd._get_sequence_nr()
    spans = _local.spans
    if span.end == span.first and spans is not None and spans.spans and spans.spans[-1] is span:
        spans.spans.pop()


def recall(owner: Any) -> Names | None:
    """The names under which the node that runs now in the backward was made; None where it was made outside of a block.

    Raises:
        RuntimeError: it was made so many blocks ago that this is not known any more.
    """
    number = backward_number()
    task = _local.task() if _local.task is not None else None
    if task is not None and task.number != number and id(owner) in task.names:
        # A backward within a backward, of what a checkpointed region has just made anew.
        return task.names[id(owner)]
    node: Any = torch._C._current_autograd_node()
    span = _find(owner, node._sequence_nr())
    if task is None or task.number != number:
        task = _Task(number)
        _local.task = weakref.ref(task)
        torch.autograd.Variable._execution_engine.queue_callback(task)
    task.names[id(owner)] = None if span is None else span.names
    return task.names[id(owner)]


def _find(owner: Any, node: int) -> Span | None:
    here = _local.spans
    span = None if here is None else here.find(owner, node)
    if span is not None:
        return span
    if here is not None and node < here.forgotten:
        raise RuntimeError(
            f"a checkpointed layer runs again in the backward of a graph made more than {MAX_SPANS} rows(...) blocks "
            "ago: its routing is not known any more; call backward sooner"
        )
    found = [span for spans in list(_threads) if spans is not here and (span := spans.find(owner, node))]
    if len({span.names for span in found}) > 1 or (found and not _made_elsewhere(node)):
        raise RuntimeError(
            "a checkpointed layer runs again in a backward, and the autograd node could be of several threads, some of "
            "them in rows(...) blocks: call backward in the thread of the forward, and serve under torch.no_grad()"
        )
    return found[0] if found else None


def _made_elsewhere(node: int) -> bool:
    """Whether another thread must have made the node: this one has not made so many, or is the engine's own."""
    engines = isinstance(threading.current_thread(), threading._DummyThread)
    return engines or node >= torch.autograd._get_sequence_nr()
