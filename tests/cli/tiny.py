"""Tiny tokenizers and sentences to learn from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

FRUIT, TOOLS = ("apple", "pear", "plum", "fig"), ("hammer", "saw", "drill", "file")
OTHER = ("the", "a", "is", "on", "my", "table", "red", "old", "new", "and")
WORDS = (*FRUIT, *TOOLS, *OTHER)


def sentence(rng: random.Random, label: str) -> str:
    """A few words, one of which tells the label."""
    words = [rng.choice(OTHER) for _ in range(rng.randint(1, 4))]
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
