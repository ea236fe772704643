"""Every test runs with NaN-poisoned ``torch.empty``, fixed seeds and no forced backend."""

from __future__ import annotations

import os
import sys

# libgomp reads it when torch is imported. Threads that spin while they wait make a shared machine, as CI has, ten times
# slower. Benchmarks, which pytest loads this file for too, have them as users do.
if "--benchmark" not in sys.argv:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Deterministic cuBLAS must be asked for before its first call; without it the fixture below would make matmuls raise.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

try:
    import hypothesis
except ImportError:  # tests/gpu, which run where little is installed, do not draw examples
    hypothesis = None

# "ci" draws the same bounded examples on every run, "fuzz" many fresh ones.
if hypothesis is not None:
    hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, database=None)
    hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=500, print_blob=True)

SEED = 20250801


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", action="store_true", help="Long runs over fresh random shapes and sequences of calls.")
    parser.addoption(
        "--fuzz-seed", type=int, metavar="SEED", help="Repeat the run of tests/test_fuzz.py with this seed."
    )


def pytest_configure(config: pytest.Config) -> None:
    if hypothesis is not None:
        hypothesis.settings.load_profile("fuzz" if config.getoption("--fuzz") else "ci")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; left out where there is none")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (floats), the largest value (integers) or True: a result that is not written whole shows.

    PyTorch does the filling inside ``at::empty``, so that it reaches Python and C++ allocations alike.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED % 2**32)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def default_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend forced from outside, and no test leaves a global setting behind for the next."""
    monkeypatch.delenv("PEFTRT_BACKEND", raising=False)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert torch.get_default_dtype() == dtype, "the test left another default dtype"
    assert torch.is_grad_enabled() == grad, "the test left gradients switched"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that compile native code come first: at the end one worker would wait for the other's last of them."""
    items.sort(key=lambda item: "/" in item.nodeid.removeprefix("tests/").partition("::")[0])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The fixture ``walk_seed``: 30 fixed seeds; with --fuzz 3000 fresh ones; with --fuzz-seed that one."""
    if "walk_seed" in metafunc.fixturenames:
        one, many = metafunc.config.getoption("--fuzz-seed"), metafunc.config.getoption("--fuzz")
        # workers that share a run must draw the same seeds
        first = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(2**31) if many else 0
        metafunc.parametrize("walk_seed", [one] if one is not None else range(first, first + (3000 if many else 30)))


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a CUDA device where there is one."""
    return torch.device(request.param)
