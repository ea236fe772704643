"""``python -m peftrt.demo.again DIR``: the demo's tenants in a fresh process, from their files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import peftrt
from peftrt.demo.encoder import load_encoder
from peftrt.demo.tenants import Tenant
from peftrt.finetune.errors import RunError
from peftrt.finetune.examples import Batch
from peftrt.finetune.tasks import evaluating
from peftrt.formats.safe import read_tensors, write_tensors

QUESTION, ANSWER, CLASSES = "question.safetensors", "answer.safetensors", "classes.json"


def logits_of_all(tenants: dict[str, Tenant], batch: Batch) -> dict[str, Tensor]:
    """Every tenant's logits of one batch."""
    found = {}
    for name, tenant in tenants.items():
        peftrt.set_active(tenant.encoder, name)
        with evaluating(tenant.encoder):
            found[name] = tenant.logits(batch)
    return found


def ask_fresh_process(directory: Path, tenants: dict[str, Tenant], batch: Batch) -> dict[str, float]:
    """The largest difference of each tenant's logits to those that another process computes from the saved files."""
    here = logits_of_all(tenants, batch)
    write_tensors(directory / QUESTION, {"ids": batch.input_ids, "mask": batch.attention_mask})
    path = os.pathsep.join([str(Path(peftrt.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "peftrt.demo.again", str(directory)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RunError(f"the fresh process failed:\n{result.stderr.strip()}")
    there = read_tensors(directory / ANSWER)
    for name in (QUESTION, ANSWER):
        (directory / name).unlink()
    return {name: float((here[name] - there[name]).abs().max()) for name in tenants}


def main(directory: Path) -> None:
    """Load the tenants that are saved in a directory and answer the question in it."""
    question = read_tensors(directory / QUESTION)
    ids, mask = question["ids"], question["mask"]
    encoder = load_encoder()
    tenants = {}
    for name, classes in json.loads((directory / CLASSES).read_text("utf-8")).items():
        tenants[name] = Tenant(name, encoder, classes)
        tenants[name].adapt()
        tenants[name].load(directory / name)
    batch = Batch(ids, mask, torch.zeros(len(ids), dtype=torch.int64), int(mask.sum()))
    write_tensors(directory / ANSWER, logits_of_all(tenants, batch))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
