"""The demo's story: two tenants trained on one 4-bit encoder, compared, saved, loaded again, served in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from peftrt.demo.again import CLASSES, ask_fresh_process
from peftrt.demo.docstrings import Docstring, most_frequent, read_docstrings
from peftrt.demo.encoder import embed, load_encoder, tokenize
from peftrt.demo.probe import fit_probe
from peftrt.demo.report import JSON, draw, print_result
from peftrt.demo.results import Result, Score, TaskResult
from peftrt.demo.serving import serve_mixed
from peftrt.demo.tenants import Tenant
from peftrt.finetune.checkpoint import fresh_directory, write_json
from peftrt.finetune.errors import UserError
from peftrt.finetune.examples import Examples
from peftrt.finetune.progress import console, peak_memory
from peftrt.finetune.tasks import evaluating

QUESTIONS = {"package": "which package?", "kind": "what is documented?"}
FEWEST = 100  # docstrings that there is something to learn from
ROWS = 9  # of the mixed batch


def demo(out: Path, docstrings: Sequence[Docstring] | None = None) -> Result:
    """Run the demo and write ``out``: two adapters, a plot and a JSON file; nothing is there before all of it is.

    Args:
        out: a directory that is new, empty, or a former demo's.
        docstrings: what to train on; those of the running Python's library by default.

    Raises:
        UserError: ``out`` holds something else, the model is not installed, or there are too few docstrings.
    """
    start = time.perf_counter()
    terminal = console()
    with fresh_directory(out, JSON) as directory:
        docstrings = most_frequent(read_docstrings()) if docstrings is None else docstrings
        held_out = np.array([docstring.held_out for docstring in docstrings], bool)
        if len(docstrings) < FEWEST:
            raise UserError(f"peftrt demo: this Python's library has only {len(docstrings)} docstrings to learn from")
        terminal.print(f"{(~held_out).sum()} docstrings of Python's library to train on, {held_out.sum()} held out")
        texts = [docstring.text for docstring in docstrings]
        ids, pad_id = tokenize(texts)

        terminal.print("the baseline: the encoder as it is, in fp32")
        encoder = load_encoder()
        features = embed_all(encoder, Examples.of(ids, None, pad_id))

        tenants: dict[str, Tenant] = {}
        tasks: list[TaskResult] = []
        for name, question in QUESTIONS.items():
            classes, labels = index([getattr(docstring, name) for docstring in docstrings])
            examples = Examples.of(ids, labels, pad_id)
            probe = fit_probe(features[~held_out], torch.from_numpy(labels[~held_out]), len(classes))
            torch.manual_seed(0)
            tenants[name] = tenant = Tenant(name, encoder, classes)
            tenant.start_from(*probe)
            report = tenant.adapt()
            if len(tenants) == 1:
                terminal.print(str(report), soft_wrap=True)
            history = tenant.train(examples.select(np.flatnonzero(~held_out)))
            predicted = tenant.predict(examples.select(np.flatnonzero(held_out)))
            tenant.save(directory / name)
            majority = Score.of(most_frequent_class(labels, held_out), labels[held_out])
            baseline = Score.of(F.linear(features[held_out], *probe).argmax(1).numpy(), labels[held_out])
            adapted = Score.of(predicted, labels[held_out])
            size = sum(file.stat().st_size for file in (directory / name).glob("*.safetensors"))
            scores = (majority, baseline, adapted)
            tasks.append(TaskResult(name, question, classes, *scores, tenant.parameters, size, history))

        unseen = np.flatnonzero(held_out)
        write_json(directory / CLASSES, {name: tenant.classes for name, tenant in tenants.items()})
        differences = ask_fresh_process(directory, tenants, examples.batch(unseen[:32]))
        served = serve_mixed(encoder, tenants, examples, unseen[:: max(1, len(unseen) // ROWS)][:ROWS], texts)

        sizes, seconds = (int((~held_out).sum()), len(unseen)), time.perf_counter() - start
        result = Result(*sizes, tasks, differences, served, seconds, peak_memory(), torch.get_num_threads())
        write_json(directory / JSON, asdict(result))
        draw(directory, result)
    print_result(terminal, result, out)
    return result


def embed_all(encoder: nn.Module, examples: Examples) -> Tensor:
    """Every example's embedding: ``[examples, 384]``."""
    features = torch.empty(len(examples), encoder.config.hidden_size)  # type: ignore[arg-type, union-attr]
    with evaluating(encoder):
        for indices in examples.by_length(64):
            features[indices] = embed(encoder, examples.batch(indices))
    return features


def index(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The classes, sorted, and each name's number among them."""
    classes = sorted(set(names))
    return classes, np.array([classes.index(name) for name in names], np.int64)


def most_frequent_class(labels: NDArray[np.int64], held_out: NDArray[np.bool_]) -> NDArray[np.int64]:
    """What always saying the most frequent class of the rest says of what is held out."""
    return np.full(held_out.sum(), np.bincount(labels[~held_out]).argmax(), np.int64)
