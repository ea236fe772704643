"""``python -m bench.estimate_peaks``: what ``peftrt estimate`` says, beside the memory that training took.

Every method trains a small encoder and a small Llama in processes of their own. The peak is the process's highest
resident size, from when the model stands, above what the process held before there was a model. glibc is told to give
freed blocks of 64 KiB and more back at once: what its free lists keep is no part of a model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import peftrt
from bench import environment
from peftrt.estimate.hugging_face import shape_of
from peftrt.estimate.memory import Job, estimate
from peftrt.finetune.examples import Batch, Examples
from peftrt.finetune.tasks import causal_lm_loss, classify_loss
from peftrt.finetune.trainer import Plan, Trainer

METHODS = ("full", "lora", "qlora")
# MiniLM-L6's shape (Wang et al. 2020, arXiv:2002.10957) with a head for ten classes, and 512 or 2048 tokens a step; a
# language model of Llama's form, with grouped queries.
MODELS = {
    "encoder": {"layers": 6, "hidden": 384, "intermediate": 1536, "vocabulary": 30522, "batch": 8, "tokens": 64},
    "encoder, 2048 tokens": {
        "layers": 6, "hidden": 384, "intermediate": 1536, "vocabulary": 30522, "batch": 32, "tokens": 64,
    },
    "llama": {
        "layers": 8, "hidden": 512, "intermediate": 1408, "vocabulary": 4096, "batch": 4, "tokens": 256, "kv_heads": 4,
    },
}  # fmt: skip
# What warms a process up: it is trained the same way, and is too small to be seen.
SMALL = {"layers": 1, "hidden": 64, "intermediate": 128, "vocabulary": 128, "batch": 2, "tokens": 16}
CLASSES = 10
STEPS = 4
_MMAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def measure(method: str, sizes: dict[str, int], checkpointing: bool = False) -> dict[str, Any]:
    """Bytes at the highest in a process of its own, and the estimate's."""
    command = [sys.executable, "-m", "bench.estimate_peaks", "--one", json.dumps([method, sizes, checkpointing])]
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, **_MMAP, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{method}: {result.stderr.strip()}")
    return json.loads(result.stdout)


def _one(method: str, sizes: dict[str, int], checkpointing: bool) -> dict[str, Any]:
    small = {**SMALL, **({"kv_heads": 1} if "kv_heads" in sizes else {})}
    _steps(_build(method, small, checkpointing), small)
    gc.collect()
    before = _status("VmRSS")
    model = _build(method, sizes, checkpointing)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    _steps(model, sizes)
    job = Job(
        method,
        dtype="fp32",
        batch_size=sizes["batch"],
        max_length=sizes["tokens"],
        gradient_checkpointing=checkpointing,
        device="cpu",
    )
    with torch.device("meta"):
        model = _model(sizes)
    shape = shape_of(model, model.config, "model", 0 if _is_llama(sizes) else CLASSES)
    found = estimate(shape, job)
    return {"method": method, "measured": _status("VmHWM") - before, "estimate": found.to_dict()}


def _is_llama(sizes: dict[str, int]) -> bool:
    return "kv_heads" in sizes


def _model(sizes: dict[str, int]) -> Any:
    import transformers

    common = {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["hidden"] // 32,
        "intermediate_size": sizes["intermediate"],
    }
    if _is_llama(sizes):
        config = transformers.LlamaConfig(**common, num_key_value_heads=sizes["kv_heads"], use_cache=False)
        return transformers.LlamaForCausalLM(config)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**common, **dropout, num_labels=CLASSES))


def _build(method: str, sizes: dict[str, int], checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model = _model(sizes).train()
    if method != "full":
        task = "CAUSAL_LM" if _is_llama(sizes) else "SEQ_CLS"
        config = peftrt.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)
        peftrt.adapt(model, config, quantize="nf4" if method == "qlora" else None)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _steps(model: Any, sizes: dict[str, int]) -> None:
    count, length = sizes["batch"] * STEPS, sizes["tokens"]
    random = np.random.default_rng(0)
    tokens = random.integers(1, sizes["vocabulary"], count * length)
    classes = None if _is_llama(sizes) else random.integers(0, CLASSES, count)
    examples = Examples(tokens, np.full(count, length), classes, 0)
    of_logits = causal_lm_loss if _is_llama(sizes) else classify_loss

    def loss(batch: Batch) -> torch.Tensor:
        return of_logits(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch)

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _ in Trainer(trained, loss, examples, Plan(STEPS, 1e-4, batch_size=sizes["batch"])):
        pass


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.estimate_peaks", description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(_one(*json.loads(options.one))))
        return
    rows = []
    for name, sizes in MODELS.items():
        for checkpointing in (False, True):
            for method in METHODS:
                row = {"model": name, "gradient_checkpointing": checkpointing, **measure(method, sizes, checkpointing)}
                rows.append(row)
                said, took = row["estimate"]["peak"], row["measured"]
                kind = ", gradient checkpointing" if checkpointing else ""
                figures = f"estimate {said / 1e6:.1f} MB, measured {took / 1e6:.1f} MB, {said / took - 1:+.1%}"
                print(f"{name}, {method}{kind}: {figures}", flush=True)
    if options.out:
        found = {"environment": environment.describe("cpu"), "models": MODELS, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
