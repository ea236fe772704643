"""``pytest --benchmark``: an option beside pytest-benchmark's own, which runs the benchmarks in place of the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftrt benchmarks")
    group.addoption("--benchmark", action="store_true", help="Run the benchmarks in bench/ in place of the tests.")
    group.addoption("--benchmark-quick", action="store_true", help="Small sizes, few rounds: only to see them run.")
    group.addoption("--benchmark-budget", type=float, metavar="SECONDS", help="Start no cell after this much time.")
    # pytest takes an existing folder after a space for the root of the tests before it knows this option
    group.addoption(
        "--benchmark-results",
        type=Path,
        metavar="DIR",
        help="Where results go, as --benchmark-results=DIR. Default: bench/results.",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark"):
        config.option.benchmark_only = not config.getoption("benchmark_disable")  # it takes one of the two
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args = [str(ROOT / "bench")]


def _make_importable(name: str) -> None:
    """Import a package of the checkout without putting the checkout on the path.

    There ``kernels/`` would become a package of that name, which others look for.
    """
    folder = ROOT / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_make_importable("bench")
