"""The training loop by itself: order, rates, accumulation, and going on bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftrt.finetune.errors import RunError, UserError
from peftrt.finetune.examples import IGNORE, Batch, Examples, Order
from peftrt.finetune.metrics import macro_f1, perplexity
from peftrt.finetune.optimizers import OPTIMIZERS, PAGED, Optim
from peftrt.finetune.tasks import causal_lm_loss, evaluate_causal_lm, evaluate_classify
from peftrt.finetune.trainer import Plan, Trainer, steps_per_epoch

SEQUENCES = [[i % 7 + 1] * (i % 5 + 1) for i in range(22)]


def examples() -> Examples:
    return Examples.of(SEQUENCES, [i % 3 for i in range(22)], pad_id=0)


class Bag(nn.Module):
    """Classifies by the mean of its tokens' embeddings, with dropout from torch's generator."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(8, 6, generator=generator))
        self.out = nn.Parameter(torch.randn(3, 6, generator=generator))
        self.dropout = dropout

    def forward(self, batch: Batch) -> Tensor:
        mask = batch.attention_mask.unsqueeze(-1)
        mean = (self.table[batch.input_ids] * mask).sum(1) / mask.sum(1)
        return F.dropout(mean, self.dropout) @ self.out.t()

    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch), batch.labels, reduction="sum")


def trainer(model: Bag, plan: Plan, optim: Optim | None = None) -> Trainer:
    return Trainer(dict(model.named_parameters()), model.loss, examples(), plan, optim=optim)


def test_a_batch_is_padded_on_the_right() -> None:
    batch = Examples.of([[5, 6, 7], [8]], None, pad_id=9).batch(np.array([1, 0]))
    assert batch.input_ids.tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[8, IGNORE, IGNORE], [5, 6, 7]]
    assert (batch.tokens, batch.targets) == (4, 2)
    labelled = examples().batch(np.array([4, 0]))
    assert labelled.labels.tolist() == [1, 0]
    assert labelled.targets == 2


def test_selected_examples_keep_their_tokens_and_classes() -> None:
    some = examples().select(np.array([21, 3]))
    batch = some.batch(np.array([0, 1]))
    assert batch.input_ids[0, : len(SEQUENCES[21])].tolist() == SEQUENCES[21]
    assert batch.labels.tolist() == [0, 0]
    assert some.tokens == len(SEQUENCES[21]) + len(SEQUENCES[3])


def test_every_epoch_has_every_example_once_in_another_order() -> None:
    order = Order(examples().lengths, 4, seed=5)
    assert order.batches_per_epoch == 6
    epochs = [[order[6 * epoch + i].tolist() for i in range(6)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == list(range(22))
    assert epochs[0] != epochs[1] != epochs[2]
    again = Order(examples().lengths, 4, seed=5)
    assert [again[i].tolist() for i in range(12, 18)] == epochs[2], "the order depends on where it was entered"
    assert [Order(examples().lengths, 4, seed=6)[i].tolist() for i in range(6)] != epochs[0]


def test_batches_hold_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 640)
    order = Order(lengths, 8, seed=0)
    spread = [int(np.ptp(lengths[order[i]])) for i in range(order.batches_per_epoch)]
    assert np.mean(spread) < 10


def test_rates() -> None:
    plan = Plan(steps=10, lr=1.0, warmup=4)
    assert [plan.rate(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert plan.rate(4) == 1.0
    assert plan.rate(7) == pytest.approx(0.5)
    assert plan.rate(9) == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)))
    linear = Plan(steps=10, lr=2.0, schedule="linear")
    assert [linear.rate(0), linear.rate(5)] == [2.0, 1.0]
    assert {Plan(steps=10, lr=3.0, schedule="constant").rate(i) for i in range(10)} == {3.0}


def test_loraplus_moves_b_faster() -> None:
    model = Bag()
    named = {"table.lora_A": model.table, "out.lora_B": model.out}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    plan = Plan(steps=1, lr=1e-3, schedule="constant", max_grad_norm=0, loraplus_ratio=16)
    step = next(iter(Trainer(named, model.loss, examples(), plan)))
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in named.items()}
    # Adam's first step is as long as the rate
    assert moved == {"table.lora_A": pytest.approx(1e-3, rel=1e-3), "out.lora_B": pytest.approx(16e-3, rel=1e-3)}
    assert step.rate == 1e-3


def test_losses_are_means_over_all_targets_of_a_step() -> None:
    # 22 examples in batches of 4, three of them a step: 12 and 10 examples.
    model = Bag()
    batches = Order(examples().lengths, 4, seed=0)
    with torch.no_grad():
        rows = torch.cat([model(examples().batch(batches[i])) for i in range(3)])
        labels = torch.cat([examples().batch(batches[i]).labels for i in range(3)])
        expected = float(F.cross_entropy(rows, labels))
    step = next(iter(trainer(model, Plan(steps=2, lr=0.1, batch_size=4, grad_accum=3))))
    assert step.loss == pytest.approx(expected, rel=1e-6)
    assert steps_per_epoch(22, 4, 3) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_accumulated_batches_train_as_one(clip: float, name: str) -> None:
    """One step over the whole set, cut in six, is one step of AdamW on the mean loss."""
    cut, whole = Bag(), Bag()
    plan = Plan(steps=1, lr=0.1, batch_size=4, grad_accum=6, max_grad_norm=clip, weight_decay=0.1)
    list(trainer(cut, plan, Optim(name)))
    batch = examples().batch(np.arange(22))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.1, weight_decay=0.1)
    (whole.loss(batch) / 22).backward()
    if clip:
        nn.utils.clip_grad_norm_(whole.parameters(), clip)
    optimizer.step()
    for ours, expected in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_trainer_goes_on_bit_for_bit(name: str) -> None:
    plan = Plan(steps=20, lr=0.05, batch_size=4, grad_accum=2, warmup=3, seed=2)
    torch.manual_seed(7)
    model = Bag(dropout=0.4)
    straight = trainer(model, plan, Optim(name))
    saved = None
    for step in straight:
        if step.number == 8:
            saved = {name: value.clone() for name, value in straight.state().items()}
    assert saved is not None
    torch.manual_seed(99)
    other = Bag(dropout=0.4)
    with torch.no_grad():
        other.table.zero_()
    resumed = trainer(other, plan, Optim(name))
    resumed.restore(saved)
    assert resumed.step == 8
    list(resumed)
    assert [step.loss for step in resumed.history] == [step.loss for step in straight.history]
    for ours, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", PAGED)
def test_a_state_in_pages_goes_on_from_torchs(name: str) -> None:
    """The entries are the same, and so are the numbers, as far as the last bits of a step go."""
    plan = Plan(steps=12, lr=0.05, batch_size=4, seed=2)
    model, other = Bag(), Bag()
    first = trainer(model, plan)
    steps = iter(first)
    for _ in range(6):
        next(steps)
    saved = {key: value.clone() for key, value in first.state().items()}
    assert {"optimizer.step.out", "optimizer.exp_avg.out", "optimizer.exp_avg_sq.out"} < set(saved)
    second = trainer(other, plan, Optim(name))
    second.restore(saved)
    for key, value in second.state().items():
        assert torch.equal(value, saved[key]), key
    assert [step.loss for step in second] == pytest.approx([step.loss for step in steps], rel=1e-4)


def test_a_state_of_another_model_changes_nothing() -> None:
    model = Bag()
    mine = trainer(model, Plan(steps=4, lr=0.1))
    next(iter(mine))
    before = {name: value.clone() for name, value in mine.state().items()}
    for name, value, message in (
        ("parameter.out", torch.zeros(4, 6), r"out must be torch.float32 \[3, 6\], got torch.float32 \[4, 6\]"),
        ("parameter.out", torch.zeros(3, 6, dtype=torch.float64), "float64"),
        ("parameter.extra", torch.zeros(1), "extra is only in the checkpoint"),
        ("optimizer.exp_avg.out", torch.zeros(2), "exp_avg.out does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            mine.restore({**before, name: value})
    with pytest.raises(UserError, match="out is not in the checkpoint"):
        mine.restore({name: value for name, value in before.items() if name != "parameter.out"})
    with pytest.raises(UserError, match="no 'history'"):
        mine.restore({name: value for name, value in before.items() if name != "history"})
    for name, value in mine.state().items():
        assert torch.equal(value, before[name]), name


def test_a_loss_that_is_not_finite_stops_before_the_parameters_change() -> None:
    model = Bag()
    mine = Trainer(
        dict(model.named_parameters()), lambda batch: model.loss(batch) * math.nan, examples(), Plan(steps=3, lr=0.1)
    )
    before = model.table.clone()
    with pytest.raises(RunError, match="the loss is nan at step 1"):
        next(iter(mine))
    assert torch.equal(model.table, before)


def test_macro_f1_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    for classes in (2, 3, 7):
        actual, predicted = random.integers(0, classes, 50), random.integers(0, classes, 50)
        assert macro_f1(predicted, actual) == pytest.approx(sklearn.f1_score(actual, predicted, average="macro"))
    assert macro_f1(np.array([0, 0]), np.array([0, 3])) == pytest.approx(1 / 3)


def test_evaluation_counts_every_example_once() -> None:
    model = Bag()
    with torch.no_grad():
        for batch_size in (1, 5, 64):
            found = evaluate_classify(model, examples(), batch_size)
            logits = torch.cat([model(examples().batch(np.array([i]))) for i in range(22)])
            labels = torch.tensor([i % 3 for i in range(22)])
            assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
            assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_perplexity_by_hand() -> None:
    texts = Examples.of([[1, 2, 3], [1, 2]], None, pad_id=0)

    def uniform(batch: Batch) -> Tensor:
        return torch.zeros(*batch.input_ids.shape, 8)

    found = evaluate_causal_lm(uniform, texts, batch_size=2)
    assert found["perplexity"] == pytest.approx(8.0)
    batch = texts.batch(np.array([0, 1]))
    assert float(causal_lm_loss(uniform(batch), batch)) == pytest.approx(3 * math.log(8))
    assert perplexity(1e4) == math.inf
