"""multi_lora_linear on seeded random batches in Triton's interpreter; run as interpreted.py is.

PEFTRT_BATCHES says how many.
"""

from __future__ import annotations

import os

import pytest
import torch

import peftrt
from tests.ops.multi_lora import Batch, check_gradients, check_rows

COUNT = int(os.environ.get("PEFTRT_BATCHES", "6"))
# from here on some are large: the interpreter takes a minute for one
SMALL = 16
# its tl.dot is wrong in bf16
DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("seed", range(COUNT))
def test_rows_and_gradients_equal_their_truth(seed: int) -> None:
    batch = Batch(seed, DTYPES, large=seed >= SMALL)
    with peftrt.backend("triton"):
        check_rows(batch)
        check_gradients(batch, solo=seed % 4 == 0)
