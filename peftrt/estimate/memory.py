"""The estimate: what lies in memory in a training step, item by item.

For T = batch x tokens of a step, e bytes a number of what is computed in (4 for fp32, 2 for bf16), sizes h (hidden),
f (intermediate), q and k (of all query and key heads):

weights        e a number; in NF4 4 + 8/64 + 32/(64 x 256) = 4.127 bits, where a method stands on the module;
               embeddings, norms, biases and heads stay dense
adapter        what is added, in the adapters' dtype
gradients      as large as what is trained
optimizer      AdamW's two moments, 8 bytes a number, or 2.03 in 8 bits; with a budget at most that; 4 more for an fp32
               master copy of weights that are trained in "mixed" precision
activations    what a layer keeps for its backward, a token:
                 norms          2 h, in fp32 where the model's norms are, and 2 h e more where they are trained
                 attention      (2 q + 2 k) e: queries, keys, values, outputs, attention being fused; 4 a head
                 feed-forward   f e (the activation's input), 3 f e where it is gated
                 inputs         h e of attention, h e of the maps up, f e of the map down: of those, the ones read by
                                something that is trained
                 adapters       LoRA's x A^T, a bottleneck's input and inside, IA3's unscaled values
               and what is there while the last layer comes back, (2 f + 2 h) e a token, or a language model's head
               if that is more: 12 bytes a token and word (logits' logarithms and their gradients, in fp32).
               With gradient checkpointing h e a layer, and one layer's activations while it is computed again.
fixed          scratch of NF4's kernels, and of the libraries'

The peak is weights + adapter + optimizer + fixed + the larger of gradients and activations: while the backward goes
down the layers, activations are released and gradients come up. Where gradients are kept over several batches
(``grad_accum``), it is the sum of both.

Not counted: what the process holds without a model (CUDA's context, about half a gigabyte, is not in torch's figures),
an allocator's gaps, and the masks of the model's own dropout.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from peftrt.estimate.methods import Sizes, Trained, trained
from peftrt.estimate.shapes import Shape
from peftrt.finetune.errors import UserError
from peftrt.finetune.optimizers import PAGED
from peftrt.formats.adamw_state import BLOCK, block_bytes
from peftrt.formats.sizes import expect_bytes
from peftrt.ops._scratch import LIMIT

BYTES = {"fp32": 4, "bf16": 2, "mixed": 2}
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_LOGITS = 12  # bytes a token and word of the vocabulary
# cuBLAS's workspace on Hopper; on a CPU what oneDNN keeps (bench/estimate_peaks.py, one thread, Zen 3, November 2026).
_LIBRARIES = {"cuda": 32 << 20, "cpu": 4 << 20}


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Attributes:
        method: one of ``METHODS``.
        sizes: of the adapters.
        quantize: how frozen weights are kept: "nf4" or "none"; "qlora" is LoRA over "nf4".
        dtype: "bf16" (all in bf16 but the adapters and the optimizer's state), "mixed" (the same, with an fp32 copy of
            weights that are trained) or "fp32".
        adapter_dtype: of what is added, "fp32" or "bf16".
        optim, optim_budget: as of ``peftrt finetune``.
        batch_size, max_length: of a step; every example as long as the longest.
        grad_accum: batches a step.
        gradient_checkpointing: activations are computed twice.
        device: "cuda" or "cpu".
    """

    method: str
    sizes: Sizes = field(default_factory=Sizes)
    quantize: str | None = None
    dtype: str = "bf16"
    adapter_dtype: str = "fp32"
    optim: str = "adamw"
    optim_budget: str | None = None
    batch_size: int = 1
    max_length: int = 512
    grad_accum: int = 1
    gradient_checkpointing: bool = False
    device: str = "cuda"

    @property
    def nf4(self) -> bool:
        return self.quantize == "nf4" or (self.quantize is None and self.method == "qlora")


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run, item by item; see the module's docstring.

    Attributes:
        method: as asked for.
        trainable, total: numbers that are trained, and in the model with what is added.
        weights, adapter, gradients, optimizer, activations, fixed: bytes.
        peak: bytes at the highest.
    """

    method: str
    trainable: int
    total: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    fixed: int
    peak: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(shape: Shape, job: Job) -> Estimate:
    """What the job takes of a model of this shape; nothing is loaded or allocated.

    Raises:
        UserError: the job cannot be: full fine-tuning of 4-bit weights, a target that the model has not.
    """
    if job.nf4 and job.method == "full":
        raise UserError("--quantize nf4: full fine-tuning trains every weight, and 4-bit ones cannot be trained")
    what = trained(shape, job.method, job.sizes)
    each, added_each = BYTES[job.dtype], BYTES[job.adapter_dtype]
    packed = sum(linear.weights for linear in what.sites) if job.nf4 else 0
    weights = int(packed * NF4_BITS / 8) + (shape.parameters - packed) * each
    copied = what.base if job.method != "full" else 0
    # modules that are trained whole are copies of the base's, which stays
    weights += copied * each
    gradients = what.base * each + what.added * added_each
    numbers = what.base + what.added
    kept = activations(shape, job, what)
    fixed = _LIBRARIES[job.device] + (LIMIT if job.nf4 and job.device == "cuda" else 0)
    optimizer = optimizer_bytes(numbers, job) + (4 * what.base if job.dtype == "mixed" else 0)
    adapter = what.added * added_each
    coming = gradients + kept if job.grad_accum > 1 else max(gradients, kept)
    return Estimate(
        method=job.method,
        trainable=numbers,
        total=shape.parameters + copied + what.added,
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        fixed=fixed,
        peak=weights + adapter + optimizer + fixed + coming,
    )


def optimizer_bytes(numbers: int, job: Job) -> int:
    """What AdamW's moments take of the device: all of them, or the budget of those that lie in pages."""
    state = -(-numbers // BLOCK) * block_bytes(PAGED.get(job.optim, 32))
    if job.optim_budget is None:
        return state
    if job.optim not in PAGED:
        raise UserError(f"--optim-budget needs --optim {' or '.join(PAGED)}, not {job.optim}")
    try:
        return min(state, expect_bytes(job.optim_budget, "--optim-budget"))
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def activations(shape: Shape, job: Job, what: Trained) -> int:
    """Bytes that a step keeps for its backward at most, its temporaries among them."""
    each = BYTES[job.dtype]
    tokens = job.batch_size * (job.max_length + what.extra_tokens)
    layer = tokens * layer_bytes(shape, job, what)
    # one layer's temporaries: two activations of the feed-forward network and the stream beside them
    working = tokens * each * (2 * shape.intermediate + 2 * shape.hidden)
    head = 0 if shape.classes else _LOGITS * tokens * shape.vocabulary
    if not what.through_body:
        return max(working, head)
    if job.gradient_checkpointing:
        return shape.layers * tokens * shape.hidden * each + max(layer + working, head)
    return shape.layers * layer + max(working, head)


def layer_bytes(shape: Shape, job: Job, what: Trained) -> int:
    """Bytes that a token keeps in one layer."""
    each, added_each = BYTES[job.dtype], BYTES[job.adapter_dtype]
    hidden, inner = shape.hidden, shape.intermediate
    norms = 2 * hidden * (4 if shape.fp32_norms else each)
    if shape.fp32_norms and job.method == "full":
        norms += 2 * hidden * each
    attention = (2 * shape.query_size + 2 * shape.kv_size) * each + 4 * shape.heads
    feed_forward = (3 if shape.gated else 1) * inner * each
    inputs = {"attention": hidden, "up": hidden, "down": inner}
    read = sum(size for name, size in inputs.items() if name in what.keeps) * each
    return norms + attention + feed_forward + read + what.extra * added_each
