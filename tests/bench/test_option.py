"""``pytest`` runs the tests alone, ``pytest --benchmark`` the benchmarks alone, and a run leaves its results behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench import results
from bench.results import OWN

ROOT = Path(__file__).resolve().parents[2]


def _pytest(*args: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *args]
    # pytest-benchmark measures nothing where it believes to be one of several workers
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_option_selects_the_benchmarks() -> None:
    output = _pytest("--benchmark", "--collect-only")
    assert "results in" not in output, "nothing was measured, and nothing may be drawn"
    collected = [line for line in output.splitlines() if "::" in line]
    assert collected
    assert {line.split("::")[0] for line in collected} == {
        f"bench/{path.name}" for path in (ROOT / "bench").glob("bench_*.py")
    }


def test_without_it_only_tests_are_collected(request) -> None:
    assert request.config.getini("testpaths") == ["tests"]


def test_a_quick_run_checks_times_and_stores(tmp_path: Path) -> None:
    saved = tmp_path / "pytest-benchmark.json"
    output = _pytest(
        "--benchmark",
        "--benchmark-quick",
        f"--benchmark-results={tmp_path}",
        f"--benchmark-json={saved}",
        "-k",
        "forward-fp32-512x1024-M16 and nf4_linear",
    )
    (path,) = tmp_path.glob("*/*.json")
    assert path.name == "nf4_linear.json"
    content = results.read(path)
    (run,) = content["runs"].values()
    assert run["quick"] is True
    assert run["threads"] >= 1
    cell = content["cells"]["forward-fp32-512x1024-M16"]
    assert cell["flops"] == {"formula": "2*M*N*K", "value": 2 * 16 * 512 * 1024}
    own = cell["contenders"][OWN]
    assert 0 < own["ms"]["min"] <= own["ms"]["p50"] <= own["ms"]["p80"]
    assert 0 < own["error"] < 1e-5
    assert {"torch", "bitsandbytes"} < set(cell["contenders"])
    assert "## nf4_linear" in output
    # pytest-benchmark timed the very calls that are stored: it sees each from a little farther away
    (recorded,) = json.loads(saved.read_text())["benchmarks"]
    assert recorded["stats"]["rounds"] == cell["rounds"]
    assert recorded["stats"]["min"] * 1e3 >= own["ms"]["min"] * 0.999
    assert recorded["extra_info"][OWN]["ms"] == own["ms"]
