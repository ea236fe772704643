"""Benchmarks get their cells, the run that they belong to, and a table at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import environment, harness, results
from bench import report as reporting

ROOT = Path(__file__).resolve().parent.parent
SESSION = pytest.StashKey[harness.Session]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        session = _session(metafunc.config)
        cells = metafunc.module.cells(session.device, session.quick)
        metafunc.parametrize("cell", [pytest.param(cell, id=cell.id) for cell in cells])


def pytest_itemcollected(item: pytest.Item) -> None:
    # a peer's warnings are its own affair: shown, not raised
    item.add_marker(pytest.mark.filterwarnings("default::UserWarning"))
    item.add_marker(pytest.mark.filterwarnings("default::RuntimeWarning"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _session(item.config).out_of_time():
        pytest.skip("the time budget is spent; a stored result stays as it was")


@pytest.fixture
def runner(request: pytest.FixtureRequest, benchmark) -> harness.Runner:
    session = _session(request.config)
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    return harness.Runner(session, benchmark, lambda line: terminal.write_line(f"\r{line}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is not None and session.measured:
        terminalreporter.section(f"results in {session.folder}")
        terminalreporter.write_line(reporting.draw(session.folder))


def _session(config: pytest.Config) -> harness.Session:
    if SESSION not in config.stash:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        quick = config.getoption("benchmark_quick")
        # quick figures mean nothing: they never touch the ones that are kept
        folder = config.getoption("benchmark_results") or (ROOT / ".benchmarks" / "quick" if quick else results.FOLDER)
        budget = config.getoption("benchmark_budget")
        config.stash[SESSION] = harness.Session(device, Path(folder) / environment.slug(device), quick, budget)
    return config.stash[SESSION]
