"""Tiny models in directories, as they come from the Hub, and the command in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent.parent
FRUIT, TOOLS = ("apple", "pear", "plum", "fig"), ("hammer", "saw", "drill", "file")
OTHER = ("the", "a", "is", "on", "my", "table", "red", "old", "new", "and")
WORDS = (*FRUIT, *TOOLS, *OTHER)


def sentence(rng: random.Random, label: str) -> str:
    """A few words, one of which tells the label."""
    words = [rng.choice(OTHER) for _ in range(rng.randint(2, 9))]
    words.insert(rng.randrange(len(words)), rng.choice(FRUIT if label == "fruit" else TOOLS))
    return " ".join(words)


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_tokenizer(directory: Path, *, bert: bool) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<|endoftext|>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if bert:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = (
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        if bert
        else {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<unk>"}
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(directory)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head, hidden size 64."""
    directory = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        initializer_range=0.3,  # enough for a random network to have something to tell apart
    )
    transformers.BertModel(config).save_pretrained(directory)
    make_tokenizer(directory, bert=True)
    return directory


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 (Conv1D), hidden size 64; its tokenizer has no padding token."""
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    make_tokenizer(directory, bert=False)
    return directory


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 sentences about fruit or tools, a label each."""
    rng = random.Random(3)
    rows = [{"text": sentence(rng, label), "label": label} for label in ["fruit", "tools"] * 60]
    return write_jsonl(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 400 lines."""
    rng = random.Random(4)
    path = tmp_path_factory.mktemp("data") / "prose.txt"
    path.write_text("".join(sentence(rng, rng.choice(["fruit", "tools"])) + "\n" for _ in range(400)))
    return path


@pytest.fixture
def peftrt_process(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m peftrt ...` in a process of its own, outside of the checkout."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.Popen(
            [sys.executable, "-m", "peftrt", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=tmp_path,
        )

    return start
