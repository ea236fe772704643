"""Tiny models in directories, as they come from the Hub, and the command in a process of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Read when transformers is imported: without it, a model that is not there is searched for on the net, for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from tests.cli.tiny import make_tokenizer, sentence, write_jsonl  # noqa: E402 - only where it can be imported

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are faster so, and a run in this process has the bits of one in a process that is told the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        initializer_range=0.1,  # enough for a random network to have something to tell apart
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
        vocab_size=32,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    make_tokenizer(directory, bert=False)
    return directory


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 sentences about fruit or tools, a label each."""
    rng = random.Random(3)
    rows = [{"text": sentence(rng, label), "label": label} for label in ["fruit", "tools"] * 120]
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
    """Starts ``python -m peftrt ...`` in a process of its own, outside of the checkout."""

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
